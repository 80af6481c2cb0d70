import dataclasses
import json
import shutil
import types
from collections import Counter, defaultdict

import numpy as np
import pytest

from rk_optax.experiment.config import BudgetConfig, ModelConfig, OptimizerConfig, TuningConfig
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.compare import Comparison, Runs, Timing, Tuned
from rk_optax.experiment.runs.loop import Trainer
from rk_optax.experiment.runs.protocol import restored
from rk_optax.experiment.store.run_folder import RunFolder
from rk_optax.experiment.tasks.supervised import build_task

from ..helpers import SMOKE, Silent, read_metrics


def of_phase(metrics, phase):
    return [record for record in metrics if record["phase"] == phase]


def test_every_run_ends_at_the_same_number_of_gradients(smoke):
    last = {}
    for record in smoke.metrics:
        key = (record["phase"], record["optimizer"], record["seed"], record.get("trial"), record.get("repeat"))
        last.setdefault(key, []).append(record["gradients"])
    budget = smoke.config.budget.gradients
    for (_, name, *_), spent in last.items():
        if name != "rkc":
            assert spent[-1] == budget
        elif len(spent) > 1:  # it goes on until every seed has spent the budget, and is read before that
            assert spent[-1] >= budget
    assert {key[1] for key in last} == set(smoke.config.optimizers)
    rkc = next(result for result in smoke.results if result.entrant.name == "rkc").runs
    assert np.min(rkc.gradients[:, -1]) >= budget > np.min(rkc.gradients[:, -2])


def test_every_entrant_gets_the_same_trials(smoke):
    trials = Counter(record["optimizer"] for record in of_phase(smoke.metrics, "tune"))
    per_entrant = smoke.config.tuning.trials * len(smoke.config.tuning.seeds)
    # None for an optimizer that finds its own step size.
    assert trials == dict.fromkeys(("momentum", "heun"), per_entrant)


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
    assert smoke.results[-1].tuned.rate is None
    for result in smoke.results[:-1]:
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
        assert np.array_equal(result.runs.train_loss[1], logged)
        assert len(result.seconds) == len(result.runs.gradients[1]) == len(logged)


def test_training_learns(smoke):
    for result in smoke.results:
        assert np.all(result.runs.train_loss[:, -1] < result.runs.train_loss[:, 0])


def test_progress_adds_up(smoke):
    assert smoke.reporter.done == pytest.approx(smoke.reporter.work)
    assert len(smoke.reporter.said) == 2  # of the tuned ones


# A study in miniature: a budget in updates, short tuning and timing, ingredients.
SMALL = dataclasses.replace(
    SMOKE,
    model=ModelConfig(hidden=()),
    optimizers={
        "sgd": OptimizerConfig("sgd", (0.05, 0.5)),
        "all": OptimizerConfig(
            "heun",
            (0.1, 1.0),
            options={"momentum": 0.5},
            preconditioner="adagrad",
            rule="dal",
            rule_options={"estimate": "free"},
        ),
    },
    budget=BudgetConfig(updates=12, evaluate_every=3, scored_examples=100),
    tuning=TuningConfig(trials=2, seeds=(100,), fraction=0.5),
    seeds=(0, 1),
    timed_runs=1,
    timed_updates=2,
    vectorized=False,
)


def run_small(path, **folder_options):
    reporter = Silent()
    with RunFolder(path, **folder_options) as folder:
        folder.write_config("compare", "small", SMALL)
        results = Comparison(SMALL).run(folder, reporter)
    assert reporter.done == reporter.work
    return types.SimpleNamespace(path=path, results=results, metrics=read_metrics(path), said=reporter.said)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return run_small(tmp_path_factory.mktemp("small") / "run")


def test_a_budget_in_updates(small):
    assert {record["steps"] for record in of_phase(small.metrics, "tune")} == {6}
    assert {record["steps"] for record in of_phase(small.metrics, "time")} == {0, 2}
    assert {record["steps"] for record in of_phase(small.metrics, "compare")} == {0, 3, 6, 9, 12}
    assert [result.runs.gradients[0, -1] for result in small.results] == [12, 24]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_results(small, tmp_path):
    """As if stopped in the middle of the last training: half of its metrics are there, and nothing of the timing."""
    shutil.copytree(small.path, tmp_path / "run")
    for piece in ("compare-all", "time"):
        (tmp_path / "run" / "pieces" / f"{piece}.json").unlink()
    kept = [record for record in small.metrics if record["phase"] != "time"][:-3]
    assert kept[-1]["piece"] == "compare-all"
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    resumed = run_small(tmp_path / "run", resume=True)
    assert resumed.said == []  # nothing was tuned again
    for before, after in zip(small.results, resumed.results, strict=True):
        for a, b in zip((*before.tuned, *before.runs), (*after.tuned, *after.runs), strict=True):
            np.testing.assert_array_equal(a, b)

    def untimed(records):
        return [{key: value for key, value in record.items() if key != "seconds"} for record in records]

    assert untimed(resumed.metrics) == untimed(small.metrics)


def test_a_finished_run_computes_nothing_anew(small, tmp_path, monkeypatch):
    shutil.copytree(small.path, tmp_path / "run")
    monkeypatch.setattr(Trainer, "run", None)
    again = run_small(tmp_path / "run", resume=True)
    assert again.metrics == small.metrics
    assert [r.seconds.tolist() for r in again.results] == [r.seconds.tolist() for r in small.results]


def test_a_diverged_trial_and_run_are_remembered_as_such():
    assert restored(Tuned, {"rate": 0.1, "losses": [0.5, None], "at_edge": None}).losses.tolist() == pytest.approx(
        [0.5, np.nan], nan_ok=True
    )
    kept = {"steps": [0, 2], "gradients": [[0, 4]], "train_loss": [[1.0, None]], "test_accuracy": [[0.5, 0.25]]}
    assert restored(Runs, kept).steps.dtype.kind == "i"
    with pytest.raises(UsageError, match="another version of rk-optax: start afresh with --out"):
        restored(Runs, {name: value for name, value in kept.items() if name != "gradients"})
    np.testing.assert_array_equal(restored(Runs, kept).train_loss, [[1.0, np.nan]])


def test_short_timed_runs_are_extrapolated(smoke):
    result = smoke.results[0]._replace(
        runs=Runs(np.array([0, 2, 4, 40]), *np.zeros((3, 1, 4))),
        timing=Timing(np.array([0, 4]), np.array([0.0, 0.2]), np.array([0.2]), 1.0),
    )
    np.testing.assert_allclose(result.seconds, [0, 0.1, 0.2, 2.0])


def test_the_scored_examples_are_the_first(small):
    task = build_task(SMALL.data, SMALL.model)
    images, labels = (part[:100] for part in task.dataset.train)
    loss = task.loss_fn(task.init(0).params, images=images, labels=labels)
    assert small.results[0].runs.train_loss[0, 0] == pytest.approx(float(loss), rel=1e-5)


@pytest.fixture
def one_entrant(smoke_config):
    def config(learning_rates, **changes):
        return dataclasses.replace(
            smoke_config,
            model=ModelConfig(hidden=()),
            optimizers={"only": OptimizerConfig("sgd", learning_rates)},
            seeds=(0,),
            timed_runs=1,
            **changes,
        )

    return config


@pytest.mark.slow
def test_a_diverged_trial_loses(one_entrant, smoke_config, tmp_path):
    reporter = Silent()
    full_batch = dataclasses.replace(smoke_config.data, batch_size=None)
    with RunFolder(tmp_path / "run") as folder:
        (result,) = Comparison(one_entrant((0.1, 1e36), data=full_batch)).run(folder, reporter)
    assert np.all(np.diff(result.runs.train_loss) < 0)
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
