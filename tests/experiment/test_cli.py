import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

import rk_optax
from rk_optax.experiment.runs.summary import summarize
from rk_optax.experiment.show.tables import comparison_table
from rk_optax.experiment.store.run_folder import RunFolder

from .helpers import read_metrics, strict_loads, write_train_config

MAIN = "from rk_optax.experiment.cli import main; main()"


def test_version(command):
    assert command("--version") == (0, f"rk-optax {rk_optax.__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--help"], "compare optimizers at an equal budget"),
        (["solvers", "--help"], "usage: rk-optax solvers"),
        (["compare", "--help"], "usage: rk-optax compare CONFIG"),
    ],
)
def test_help(command, argv, expected):
    status, out, _ = command(*argv)
    assert status == 0
    assert expected in out


def test_help_of_a_config_lists_its_fields(command, smoke_file):
    status, out, _ = command("compare", smoke_file, "--help")
    assert status == 0
    for field in ("--out DIR", "--budget.gradients {None}|INT", "--optimizers.rk4.learning-rates"):
        assert field in out
    assert "Gradient evaluations of every run" in out


def test_solvers(command):
    status, out, err = command("solvers")
    assert (status, err) == (0, "")
    for name in rk_optax.TABLEAUS:
        assert re.search(rf"^{name} ", out, re.MULTILINE)


@pytest.mark.parametrize("argv", [[], ["train-everything"], ["solvers", "--fast"], ["compare"], ["compare", "--out"]])
def test_wrong_usage(command, argv):
    status, out, err = command(*argv)
    assert status == 2
    assert out == ""
    assert "rk-optax" in err


def test_compare_writes_a_run_and_prints_its_table(smoke):
    assert smoke.status == 0
    assert "Traceback" not in smoke.err
    assert sorted(path.name for path in smoke.path.iterdir()) == [
        "comparison.png",
        "config.json",
        "metrics.jsonl",
        "pieces",
        "summary.json",
    ]
    assert (smoke.path / "comparison.png").stat().st_size > 20_000
    assert len(strict_loads((smoke.path / "summary.json").read_text())["table"]) == 9
    assert comparison_table_text(smoke) in smoke.out
    assert smoke.out.endswith(f"Written to {smoke.path}\n")


def comparison_table_text(smoke):
    stream = io.StringIO()
    Console(width=100, file=stream).print(comparison_table(summarize(smoke.results)))
    return stream.getvalue()


def test_overrides_reach_the_run(smoke):
    config = strict_loads((smoke.path / "config.json").read_text())["config"]
    assert config["seeds"] == [0, 1, 2]
    assert config["timed_runs"] == 2
    assert {record["seed"] for record in smoke.metrics if record["phase"] == "compare"} == {0, 1, 2}
    assert {record["repeat"] for record in smoke.metrics if record["phase"] == "time"} == {0, 1}


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("--budget.gradiens", "--budget.gradients"),
        ("--optimizers.rk4.learning-rate", "--optimizers.rk4.learning-rates"),
        ("--tunning.trials", "--tuning.trials"),
    ],
)
def test_a_misspelt_field_suggests_the_right_one(command, smoke_file, override, suggestion):
    status, out, err = command("compare", smoke_file, override, "3")
    assert status == 2
    assert out == ""
    assert "Perhaps you meant" in err
    assert suggestion in err


def test_an_override_of_the_wrong_type(command, smoke_file):
    status, _, err = command("compare", smoke_file, "--budget.gradients", "many")
    assert status == 2
    assert "--budget.gradients" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--budget.gradients", "-48"], "budget.gradients = -48: must be greater than 0"),
        (["--budget.gradients", "50"], "take 48"),
        (["--data.batch-size", "5000"], "data.batch_size = 5000"),
        (["--optimizers.rk4.factory", "rkk4"], "did you mean 'rk4'"),
    ],
)
def test_an_impossible_override_is_one_line_and_writes_nothing(command, smoke_file, tmp_path, argv, message):
    status, out, err = command("compare", smoke_file, "--out", tmp_path / "run", *argv)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "run").exists()


def test_a_broken_config_is_one_line(command, config_file):
    path = config_file("return CompareConfig({'sgd': OptimizerConfig('sgd', (0.1, 'x'))})")
    status, out, err = command("compare", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert str(path) in err
    assert "optimizers.sgd.learning_rates" in err


def test_a_used_run_folder_is_refused(command, smoke_file, tmp_path):
    status, _, err = command("compare", smoke_file, "--out", tmp_path)
    assert status == 2
    remedy = "choose another folder with --out, or go on with the run in it with --resume"
    assert err == f"rk-optax: {tmp_path} is not empty: {remedy}\n"


@pytest.mark.slow
def test_interrupt_keeps_what_was_finished(command, run_file, tmp_path, monkeypatch):
    log = RunFolder.log

    def interrupted_log(folder, piece, **record):
        if record["optimizer"] == "heun":
            raise KeyboardInterrupt
        log(folder, piece, **record)

    monkeypatch.setattr(RunFolder, "log", interrupted_log)
    run = tmp_path / "run"
    status, out, err = command("compare", run_file, "--out", run)
    assert (status, out) == (130, "")
    assert err.splitlines()[-1] == f"rk-optax: interrupted; go on with: rk-optax compare --resume {run}"
    assert [record["optimizer"] for record in read_metrics(run)] == ["momentum"] * 3
    assert strict_loads((run / "config.json").read_text())["command"] == "compare"


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_its_folder_alone(command, run_file, smoke, tmp_path):
    """`compare --resume DIR` asked for the config and for all overrides again."""
    run = tmp_path / "run"
    shutil.copytree(smoke.path, run)
    (run / "pieces" / "time.json").unlink()
    (run / "summary.json").unlink()
    status, out, _ = command("compare", "--resume", run)
    assert status == 0
    before, after = (strict_loads((path / "summary.json").read_text()) for path in (smoke.path, run))
    assert [row["train_loss"] for row in before["table"][:3]] == [row["train_loss"] for row in after["table"][:3]]
    assert out.endswith(f"Written to {run}\n")
    status, _, err = command("compare", run_file, "--resume", run, "--seeds", "0")
    assert (status, err.count("\n")) == (2, 1)
    assert "seeds = [0, 1, 2], not [0]" in err
    status, _, err = command("race", "--resume", run)
    assert (status, err) == (2, f"rk-optax: {run} holds no run of rk-optax race\n")


@pytest.mark.parametrize(
    ("verb", "parent", "field"), [("train", "optimizer", "rate"), ("compare", "optimizers.rk4", "rates")]
)
def test_initials_suggest_the_field_that_they_stand_for(command, smoke_file, tmp_path, verb, parent, field):
    """--optimizer.lr suggested --optimizer.rule."""
    path = smoke_file if verb == "compare" else write_train_config(tmp_path / "tiny.py")
    status, out, err = command(verb, path, f"--{parent}.lr", "0.1")
    assert (status, out) == (2, "")
    assert err == f"rk-optax: unrecognized option --{parent}.lr: did you mean --{parent}.learning-{field}?\n"


def test_out_and_resume_exclude_each_other(command, smoke_file, tmp_path):
    status, _, err = command("compare", smoke_file, "--out", tmp_path / "a", "--resume", tmp_path / "b")
    assert status == 2
    assert err == "rk-optax: --out is for a new run and --resume for an old one: give one of them\n"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c(smoke_file, tmp_path):
    run = tmp_path / "run"
    endless = ["--budget.gradients", str(10**9), "--tuning.trials", "2", "--model.hidden", "4"]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "compare", str(smoke_file), "--out", str(run), *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (run / "config.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)  # into compilation or training
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out == ""
    assert err == f"rk-optax: interrupted; go on with: rk-optax compare --resume {run}\n"
    assert read_metrics(run) == []


WITHOUT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flax", "matplotlib", "orbax", "pydantic", "rich", "sklearn", "tyro"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from rk_optax.experiment.cli import main
for argv in (["solvers"], ["compare", "configs/digits.py"], ["compare", "--help"], ["--version"]):
    try:
        main(argv)
    except SystemExit as done:
        print(done.code, file=sys.stderr)
"""


def test_without_the_extra():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    missing = r"rk-optax: \w+ is not installed: pip install 'rk-optax\[experiment\]'\n2\n"
    assert re.fullmatch(f"({missing}){{3}}0\n", done.stderr), done.stderr
    assert done.stdout == f"rk-optax {rk_optax.__version__}\n"
