import numpy as np
import pytest

from rk_optax.experiment.entrants import Optimizer
from rk_optax.experiment.runs.compare import Compared, Runs, Timing, Tuned
from rk_optax.experiment.runs.plan import Entrant, Length
from rk_optax.experiment.runs.summary import Spread, as_json, summarize

from ..helpers import strict_loads


def result(name, cost, total_steps, seconds_per_step):
    """A run over three seeds whose loss at step n is n, n + 1, n + 2."""
    steps = np.arange(0, total_steps + 1, 10)
    loss = steps + np.arange(3)[:, None]
    lengths = [Length(total_steps, 10, total_steps)] * 3
    return Compared(
        Entrant(name, Optimizer(lambda *_: None, cost), (0.1, 0.2), *lengths),
        Tuned(0.2, np.array([np.inf, 1.0]), "highest"),
        Runs(steps, np.tile(cost * steps, (3, 1)), loss.astype(float), loss / 1000),
        Timing(np.array([0, total_steps]), np.array([0, total_steps * seconds_per_step]), np.ones(2), 0.5),
    )


@pytest.fixture
def rows():
    # slow spends 4 gradients a step and 0.5 s, fast 1 gradient and 0.1 s.
    found = summarize([result("fast", 1, 80, 0.1), result("slow", 4, 20, 0.5)])
    return {(row.equal, row.optimizer): row for row in found}


def test_equal_steps_is_the_smallest_common_number(rows):
    assert rows["steps", "fast"].steps == rows["steps", "slow"].steps == 20
    assert rows["steps", "fast"].gradients == 20
    assert rows["steps", "slow"].gradients == 80


def test_equal_cost_is_the_budget(rows):
    assert rows["gradients", "fast"].gradients == rows["gradients", "slow"].gradients == 80
    assert rows["gradients", "fast"].steps == 80


def test_equal_seconds_is_what_everybody_reached(rows):
    assert rows["seconds", "fast"].seconds == pytest.approx(8)
    # slow would need 16 steps for 8 s; the last evaluation by then is at 10.
    assert rows["seconds", "slow"].steps == 10
    assert rows["seconds", "slow"].seconds == pytest.approx(5)


def test_values_are_read_where_the_row_stands(rows):
    assert rows["seconds", "slow"].train_loss == Spread(11, 10, 12)
    assert rows["steps", "fast"].test_accuracy == pytest.approx(Spread(0.021, 0.020, 0.022))


def test_one_diverged_seed_is_not_averaged_away():
    spread = Spread.of(np.array([1.0, np.nan, 2.0]))
    assert np.isnan(spread.mean)


def test_json_has_the_whole_table(smoke, tmp_path):
    from rk_optax.experiment.store.run_folder import RunFolder

    with RunFolder(tmp_path / "run") as folder:
        folder.write_json("summary.json", as_json(smoke.results, summarize(smoke.results)))
    summary = strict_loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["table"]) == 3 * len(smoke.config.optimizers)
    assert set(summary["table"][0]["train_loss"]) == {"mean", "min", "max"}
    assert [o["optimizer"] for o in summary["optimizers"]] == list(smoke.config.optimizers)


def test_last_row_agrees_with_the_metrics(smoke):
    for row in summarize(smoke.results):
        if row.optimizer == "rkc":  # its seeds are read at different steps
            continue
        losses = [
            record["train_loss"]
            for record in smoke.metrics
            if record["phase"] == "compare" and record["optimizer"] == row.optimizer and record["steps"] == row.steps
        ]
        assert row.train_loss.mean == pytest.approx(np.mean(losses))
        assert (row.train_loss.min, row.train_loss.max) == (min(losses), max(losses))


def test_runs_whose_steps_differ_are_read_where_each_has_spent_the_same():
    steady, other = result("steady", 1, 80, 0.1), result("differs", 1, 80, 0.1)
    spent = np.array([[0, 20, 40, 60, 80, 100, 120, 140, 160], [0, 40, 80, 120, 160, 200, 240, 280, 320]])
    steps = np.arange(0, 81, 10)
    loss = steps + np.arange(2)[:, None] * 100.0
    other = other._replace(runs=Runs(steps, spent, loss, loss / 1000))
    rows = {(row.equal, row.optimizer): row for row in summarize([steady, other])}
    row = rows["gradients", "differs"]
    assert (row.steps, row.gradients) == (30, 80)  # 40 steps of one run and 20 of the other
    assert row.train_loss == Spread(80, 40, 120)
    assert rows["gradients", "steady"].gradients == 80
