"""`rk-optax race`: from a config to a table, in pieces that resume."""

import json

import numpy as np
import pytest

from rk_optax.experiment.cli import main
from rk_optax.experiment.race import Result, Run
from rk_optax.experiment.race_report import first_below, summary

CONFIG = """
from rk_optax.experiment.race import EntrantConfig, RaceConfig

def get_config():
    return RaceConfig(
        problem="gp_dual",
        problem_options={"points": 20},
        entrants={
            "gd": EntrantConfig("gradient_descent", trials=(0.5, 1.0), steps=20, chunk=10),
            "adam": EntrantConfig("adam", trials=(0.1,), steps=20, chunk=10),
            "lbfgs": EntrantConfig("lbfgs", options={"memory_size": 5}, steps=4, chunk=2),
            "both": EntrantConfig("adam_then_lbfgs", trials=(0.1,), options={"adam_steps": 4}, steps=8, chunk=4),
            "rkc": EntrantConfig("rkc", options={"max_stages": 20}, steps=20, chunk=10),
        },
        seeds=(0, 1),
        targets=(0.9, 1e-30),
    )
"""


def race(*argv):
    with pytest.raises(SystemExit) as done:
        main(["race", *map(str, argv)])
    return done.value.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race")
    config = folder / "small.py"
    config.write_text(CONFIG)
    assert race(config, "--out", folder / "run") == 0
    return config, folder / "run"


def test_a_race_writes_every_run_a_summary_and_a_figure(finished):
    _, run = finished
    rows = {row["entrant"]: row for row in json.loads((run / "summary.json").read_text())["entrants"]}
    assert list(rows) == ["gd", "adam", "lbfgs", "both", "rkc"]
    assert rows["gd"]["tuned"] in (0.5, 1.0)
    easy, impossible = rows["rkc"]["targets"]
    assert easy["reached"] == 2
    assert easy["v"] > 0
    assert impossible["reached"] == 0
    assert impossible["seconds"] is None
    assert (run / "race.png").stat().st_size > 10_000


def test_the_work_of_each_method_is_counted(finished):
    _, run = finished

    def gradients(name):
        return json.loads((run / "pieces" / f"run-{name}-0.json").read_text())["gradients"]

    assert gradients("adam") == [0, 10, 20]
    assert gradients("lbfgs")[-1] >= 4  # at least one line-search step each
    assert gradients("both")[1] == 4  # Adam's, one a step
    assert gradients("rkc")[-1] >= 8  # two stages at least


def test_a_resumed_race_keeps_what_was_finished_and_does_the_rest(finished):
    config, run = finished
    before = {path.name: path.stat().st_mtime_ns for path in (run / "pieces").iterdir()}
    (run / "pieces" / "run-rkc-1.json").unlink()
    assert race(config, "--resume", run) == 0
    after = {path.name: path.stat().st_mtime_ns for path in (run / "pieces").iterdir()}
    assert [name for name in before if before[name] != after[name]] == ["run-rkc-1.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gradient_descent", "gradient_decent"), "gradient_decent"),
        (('"max_stages"', '"most_stages"'), "most_stages"),
        (('"points"', '"point"'), "problem_options"),
        (("seeds=(0, 1)", "seeds=(100,)"), "tuning_seed"),
        (("trials=(0.1,), steps=20", "trials=(0.1,)"), "steps"),
        (("trials=(0.1,), steps=20", "steps=20"), "learning_rate"),
    ],
)
def test_what_cannot_run_says_so_in_one_line(tmp_path, capsys, change, message):
    config = tmp_path / "bad.py"
    config.write_text(CONFIG.replace(*change, 1))
    assert race(config, "--out", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_target_costs_what_the_first_point_below_it_cost():
    steps = np.array([0.0, 1, 2, 3])
    run = Run(steps, steps / 2, 4 * steps, 0 * steps, 0 * steps, 0 * steps, steps, np.array([1, 0.5, 0.05, 0.2]), 0.1)
    assert first_below(run, 0.1) == 2
    (row,) = summary([Result("a", None, [run])], [0.1, 0.01])
    assert (row["targets"][0]["gradients"], row["targets"][0]["seconds"]) == (8, 1)
    assert row["targets"][0]["v"] == pytest.approx(10)
    assert row["targets"][1]["v"] is None
