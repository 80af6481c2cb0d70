import dataclasses
from collections import Counter, defaultdict

import numpy as np
import pytest

from rk_optax.experiment.compare import Comparison
from rk_optax.experiment.config import OptimizerConfig
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.run_folder import RunFolder

from .helpers import Silent, read_metrics


def of_phase(metrics, phase):
    return [record for record in metrics if record["phase"] == phase]


def test_every_run_ends_at_the_same_number_of_gradients(smoke):
    last = {}
    for record in smoke.metrics:
        key = (record["phase"], record["optimizer"], record["seed"], record.get("trial"), record.get("repeat"))
        last[key] = record["gradients"]
    assert set(last.values()) == {smoke.config.budget.gradients}
    assert {key[1] for key in last} == set(smoke.config.optimizers)


def test_every_entrant_gets_the_same_trials(smoke):
    trials = Counter(record["optimizer"] for record in of_phase(smoke.metrics, "tune"))
    per_entrant = smoke.config.tuning.trials * len(smoke.config.tuning.seeds)
    assert trials == dict.fromkeys(smoke.config.optimizers, per_entrant)


def test_every_entrant_runs_every_seed(smoke):
    seeds = defaultdict(set)
    for record in of_phase(smoke.metrics, "compare"):
        seeds[record["optimizer"]].add(record["seed"])
    assert all(found == set(smoke.config.seeds) for found in seeds.values())
    assert len(seeds) == len(smoke.config.optimizers)


def test_initial_losses_depend_on_the_seed_alone(smoke):
    initial = defaultdict(set)
    for record in of_phase(smoke.metrics, "compare"):
        if record["steps"] == 0:
            initial[record["seed"]].add((record["train_loss"], record["test_accuracy"]))
    assert all(len(values) == 1 for values in initial.values())
    assert len(set.union(*initial.values())) == len(smoke.config.seeds)


def test_tuning_takes_the_best_validation_loss(smoke):
    for result in smoke.results:
        losses = {
            record["learning_rate"]: record["validation_loss"]
            for record in of_phase(smoke.metrics, "tune")
            if record["optimizer"] == result.entrant.name
        }
        assert result.tuned.rate == min(losses, key=losses.__getitem__)
        assert result.tuned.rate in result.entrant.rates
        index = result.entrant.rates.index(result.tuned.rate)
        assert result.tuned.at_edge == {0: "lowest", 2: "highest"}.get(index)


def test_tuning_sees_neither_test_data_nor_compared_seeds(smoke):
    for record in of_phase(smoke.metrics, "tune"):
        assert "test_accuracy" not in record
        assert record["seed"] not in smoke.config.seeds


def test_tuned_rates_are_the_ones_compared_and_timed(smoke):
    rates = {result.entrant.name: result.tuned.rate for result in smoke.results}
    for record in of_phase(smoke.metrics, "compare") + of_phase(smoke.metrics, "time"):
        assert record["learning_rate"] == rates[record["optimizer"]]


def test_only_timed_runs_have_seconds(smoke):
    for record in smoke.metrics:
        assert ("seconds" in record) == (record["phase"] == "time")
    times = defaultdict(list)
    for record in of_phase(smoke.metrics, "time"):
        times[record["optimizer"], record["repeat"]].append(record["seconds"])
    assert len(times) == smoke.config.timed_runs * len(smoke.config.optimizers)
    assert all(seconds[0] == 0 and np.all(np.diff(seconds) > 0) for seconds in times.values())


def test_timed_runs_are_the_compared_runs(smoke):
    """The seconds of the serial run may be read off for the compared ones only if they do the same work."""
    compared = {
        (record["optimizer"], record["seed"], record["steps"]): record["train_loss"]
        for record in of_phase(smoke.metrics, "compare")
    }
    for record in of_phase(smoke.metrics, "time"):
        expected = compared[record["optimizer"], record["seed"], record["steps"]]
        assert record["train_loss"] == pytest.approx(expected, rel=1e-3)


def test_curves_are_the_logged_ones(smoke):
    for result in smoke.results:
        logged = [
            record["train_loss"]
            for record in of_phase(smoke.metrics, "compare")
            if record["optimizer"] == result.entrant.name and record["seed"] == 1
        ]
        assert np.array_equal(result.curve.train_loss[1], logged)
        assert len(result.seconds) == len(result.gradients) == len(logged)


def test_training_learns(smoke):
    for result in smoke.results:
        assert np.all(result.curve.train_loss[:, -1] < result.curve.train_loss[:, 0])


def test_progress_adds_up(smoke):
    assert smoke.reporter.done == smoke.reporter.work
    assert len(smoke.reporter.said) == len(smoke.config.optimizers)


@pytest.fixture
def one_entrant(smoke_config):
    def config(learning_rates, **changes):
        return dataclasses.replace(
            smoke_config,
            optimizers={"only": OptimizerConfig("sgd", learning_rates)},
            seeds=(0,),
            timed_runs=1,
            **changes,
        )

    return config


def test_a_diverged_trial_loses(one_entrant, smoke_config, tmp_path):
    reporter = Silent()
    full_batch = dataclasses.replace(smoke_config.data, batch_size=None)
    with RunFolder(tmp_path / "run") as folder:
        (result,) = Comparison(one_entrant((0.1, 1e36), data=full_batch)).run(folder, reporter)
    assert np.all(np.diff(result.curve.train_loss) < 0)
    assert result.tuned.rate == 0.1
    assert result.tuned.at_edge == "lowest"
    assert "diverged" in reporter.said[0]
    tuned = of_phase(read_metrics(tmp_path / "run"), "tune")
    assert tuned[-1]["validation_loss"] is None


def test_divergence_everywhere_is_an_error(one_entrant, tmp_path):
    with (
        RunFolder(tmp_path / "run") as folder,
        pytest.raises(UsageError, match=r"only diverged .* lower optimizers\.only\.learning_rates"),
    ):
        Comparison(one_entrant((1e35, 1e36))).run(folder, Silent())
    assert len(read_metrics(tmp_path / "run")) == 3
