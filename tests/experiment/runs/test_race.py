"""`rk-optax race`: from a config to a table, in pieces that resume."""

import json
import shutil

import numpy as np
import pytest

from rk_optax.experiment.runs.race import Raced, RaceRun
from rk_optax.experiment.show.race_summary import race_summary

from ..helpers import RACE, race


def test_a_race_writes_every_run_a_summary_and_a_figure(raced):
    _, run = raced
    rows = {row["entrant"]: row for row in json.loads((run / "summary.json").read_text())["entrants"]}
    assert list(rows) == ["gd", "adam", "both", "rkc"]
    assert rows["gd"]["tuned"] in (0.5, 1.0)
    easy, impossible = rows["rkc"]["targets"]
    assert easy["reached"] == 2
    assert easy["v"] > 0
    assert impossible["reached"] == 0
    assert impossible["seconds"] is None
    assert (run / "race.png").stat().st_size > 10_000


def test_the_work_of_each_method_is_counted(raced):
    _, run = raced

    def gradients(name):
        return json.loads((run / "pieces" / f"run-{name}-0.json").read_text())["gradients"]

    assert gradients("adam") == [0, 10, 20]
    assert gradients("both")[1] == 4  # Adam's, one a step
    assert gradients("both")[2] >= 8  # at least one line-search step each
    assert gradients("rkc")[-1] >= 8  # two stages at least


def test_a_resumed_race_keeps_what_was_finished_and_does_the_rest(raced, tmp_path):
    run = shutil.copytree(raced[1], tmp_path / "run")
    before = {path.name: path.stat().st_mtime_ns for path in (run / "pieces").iterdir()}
    (run / "pieces" / "run-rkc-1.json").unlink()
    assert race("--resume", run) == 0  # with the config that it has
    after = {path.name: path.stat().st_mtime_ns for path in (run / "pieces").iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["run-rkc-1.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("sgd", "sgdd"), "did you mean 'sgd'"),
        (('"max_stages"', '"most_stages"'), "most_stages"),
        (('"points"', '"point"'), "problem_options"),
        (("seeds=(0, 1)", "seeds=(100,)"), "tuning_seed"),
        (('schedule="cosine", steps=20', 'schedule="cosine"'), "entrants.adam.schedule = 'cosine' needs steps"),
        (
            ('"adam", trials=(0.1,), schedule="cosine"', '"adam"'),
            "entrants.adam.factory = 'adam' needs a learning_rate",
        ),
        (('"rkc",', '"rkc", stage_batches="split",'), "sees all of its data at every step"),
    ],
)
def test_what_cannot_run_says_so_in_one_line(tmp_path, capsys, change, message):
    config = tmp_path / "bad.py"
    config.write_text(RACE.replace(*change, 1))
    assert race(config, "--out", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_target_costs_what_the_first_point_below_it_cost():
    steps = np.array([0.0, 1, 2, 3])
    run = RaceRun(
        steps, steps / 2, 4 * steps, 0 * steps, 0 * steps, 0 * steps, steps, np.array([1, 0.5, 0.05, 0.2]), 0.1
    )
    assert run.first_below(0.1) == 2
    (row,) = race_summary([Raced("a", None, [run])], [0.1, 0.01])
    assert (row["targets"][0]["gradients"], row["targets"][0]["seconds"]) == (8, 1)
    assert row["targets"][0]["v"] == pytest.approx(10)
    assert row["targets"][1]["v"] is None


def test_tuning_prefers_more_targets_then_less_time_then_a_lower_loss():
    def run(errors, seconds, losses=(1.0, 1.0, 1.0)):
        nothing = np.zeros(3)
        columns = nothing, np.array(seconds), nothing, nothing, nothing, nothing, np.array(losses), np.array(errors)
        return RaceRun(*columns, v_seconds=1.0)

    time = [0.0, 1.0, 2.0]
    ordered = [
        run([1, 0.09, 0.009], time, (1, 1, 0.9)),  # both targets
        run([1, 0.09, 0.02], time),  # one of them, early
        run([1, 0.2, 0.02], time, (1, 0.5, 0.1)),  # one of them, late, though with a lower loss
        run([1, 0.09, 0.02], [0.0, 3.0, 100.0]),  # one of them, later, of a longer run
        run([1, 0.5, 0.3], time, (1, 0.5, 0.2)),
        run([1, 0.4, 0.2], time, (1, 0.5, 0.4)),  # none: the loss decides
    ]
    shortfalls = [each.shortfall([0.1, 0.01]) for each in ordered]
    assert shortfalls == sorted(shortfalls)
    assert len(set(shortfalls)) == len(shortfalls)
    assert np.isnan(run([1, 0.01, np.nan], time, (1, 1, np.nan)).shortfall([0.1]))


def test_one_run_that_diverged_is_the_worst_of_its_entrant_and_does_not_hide_the_others():
    def run(errors):
        n = len(errors)
        nothing, time = np.zeros(n), np.arange(n, dtype=float)
        return RaceRun(time, time, nothing, nothing, nothing, nothing, np.array(errors), np.array(errors), 1.0)

    runs = [run([1, 0.1, 0.01, 0.002]), run([1, np.nan]), run([1, 0.2, 0.02, 0.001])]
    (row,) = race_summary([Raced("a", None, runs)], [0.05])
    assert row["final_error"] == 0.002
    assert row["final_error_range"] == [0.001, None]
    assert row["targets"][0]["reached"] == 2
    assert row["curve"]["seconds"][-1] > 2.5
    assert row["curve"]["error"][-1] == 0.02
    (row,) = race_summary([Raced("a", None, [run([1, np.nan])] * 2)], [0.05])
    assert row["final_error"] is None
