import json

import numpy as np
import pytest

from rk_optax.experiment.show.curves import read_curves

from ..helpers import run_command, strict_loads


def test_a_training_run(finished):
    (curve,) = read_curves(finished)
    records = [strict_loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert curve.label == "run"
    assert curve.steps.tolist() == list(range(0, 25, 4))
    assert curve.cost.tolist() == list(range(0, 49, 8))
    assert np.isnan(curve.train_loss[0])
    assert curve.train_loss[1:].tolist() == [record["train_loss"] for record in records[1:]]
    np.testing.assert_allclose(curve.error, [100 * (1 - record["test_accuracy"]) for record in records])
    assert curve.seconds.tolist() == [record["seconds"] for record in records]


def test_a_comparison(smoke):
    curves = {curve.label: curve for curve in read_curves(smoke.path)}
    assert list(curves) == [f"run, {name}" for name in smoke.config.optimizers]
    for result in smoke.results:
        curve = curves[f"run, {result.entrant.name}"]
        np.testing.assert_allclose(curve.steps, result.runs.steps)
        np.testing.assert_allclose(curve.cost, result.runs.gradients.mean(axis=0))
        np.testing.assert_allclose(curve.train_loss, result.runs.train_loss.mean(axis=0))
        np.testing.assert_allclose(curve.error, 100 * (1 - result.runs.test_accuracy.mean(axis=0)))
        np.testing.assert_allclose(curve.seconds, result.seconds)


def test_a_run_that_goes_on_is_read_as_far_as_it_is(run):
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-30])
    assert read_curves(run)[0].steps.tolist() == list(range(0, 21, 4))


@pytest.mark.parametrize("x", ["steps", "cost", "seconds"])
def test_plot(finished, smoke, tmp_path, x):
    out = tmp_path / "figure.png"
    assert run_command("plot", finished, smoke.path, "--x", x, "--out", out) == (0, f"Written to {out}\n", "")
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 20_000


def test_plot_writes_a_pdf(finished, tmp_path):
    out = tmp_path / "figure.pdf"
    assert run_command("plot", finished, "--out", out)[0] == 0
    assert out.read_bytes().startswith(b"%PDF")


def test_a_race(raced, tmp_path):
    """`rk-optax plot` of a finished race said that it had no metrics to plot yet."""
    _, run = raced
    curves = {curve.label: curve for curve in read_curves(run)}
    assert list(curves) == [f"run, {name}" for name in ("gd", "adam", "both", "rkc")]
    pieces = [strict_loads((run / "pieces" / f"run-gd-{seed}.json").read_text()) for seed in (0, 1)]
    curve = curves["run, gd"]
    assert curve.error_name == "relative error, energy norm"
    for field, name in [("steps", "steps"), ("gradients", "cost"), ("seconds", "seconds"), ("error", "error")]:
        np.testing.assert_allclose(getattr(curve, name), np.median([piece[field] for piece in pieces], axis=0))
    assert run_command("plot", run, "--x", "seconds", "--out", tmp_path / "race.png")[0] == 0
    assert (tmp_path / "race.png").stat().st_size > 20_000


def test_errors_of_different_kinds_are_not_overlaid(raced, finished, tmp_path):
    status, _, err = run_command("plot", raced[1], finished, "--out", tmp_path / "both.png")
    assert (status, err.count("\n")) == (2, 1)
    assert "cannot overlay runs that measure different errors: relative error, energy norm; test error" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere holds no run: config.json: No such file or directory"),
        (["RUN", "--out", "x.gif"], "--out x.gif must be a PNG, PDF or SVG file: take x.png"),
        (["RUN", "--out", "nowhere/x.png"], "--out nowhere/x.png: cannot be written: No such file or directory"),
    ],
)
def test_wrong_usage(finished, argv, message):
    argv = [str(finished) if argument == "RUN" else argument for argument in argv]
    assert run_command("plot", *argv) == (2, "", f"rk-optax: {message}\n")


def test_argparse_reports_the_rest(finished):
    status, _, err = run_command("plot", finished, "--x", "epochs")
    assert status == 2
    assert "invalid choice: 'epochs'" in err


@pytest.mark.parametrize("line", ["{", "[]", '{"steps": 1}', '{"steps": "x"}'])
def test_damaged_metrics(run, line):
    (run / "metrics.jsonl").write_text(line + "\n")
    status, out, err = run_command("plot", run)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "damaged" in err
    assert str(run) in err


def test_no_metrics_yet(run):
    (run / "metrics.jsonl").write_text("")
    assert run_command("plot", run)[2] == f"rk-optax: {run}: the run has no metrics to plot yet\n"


def test_a_comparison_that_is_not_timed_yet(smoke, tmp_path):
    lines = (smoke.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["phase"] != "time"))
    (tmp_path / "config.json").write_bytes((smoke.path / "config.json").read_bytes())
    status, _, err = run_command("plot", tmp_path, "--x", "seconds")
    assert status == 2
    assert "has not been timed yet: take --x steps or --x cost" in err
