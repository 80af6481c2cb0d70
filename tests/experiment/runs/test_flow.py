"""`rk-optax flow`: gradient descent, its gradient flow and its central flow from one start."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.flatten_util
import numpy as np
import pytest

import rk_optax
from rk_optax.experiment.config import DataConfig, FlowConfig, ModelConfig, checked, load
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.flow import FlowStudy, Followed
from rk_optax.experiment.show.flow_summary import flow_summary
from rk_optax.experiment.store.run_folder import RunFolder

from ..helpers import Silent, read_metrics, run_command, strict_loads, write_train_config

NAMES = ["gradient_descent", "gradient_flow", "central_flow"]
SMALL = FlowConfig(
    learning_rate=0.1,
    steps=8,
    save_every=4,
    examples=10,
    initial_scale=0.7,
    model=ModelConfig(hidden=(3,), l2=0.0, loss="squared_error"),
    eigenvalues=1,
    edge_eigenvalues=1,
    central_steps=2,
    checkpoint_every=3,
)
CONFIG = Path(__file__).parents[3] / "configs" / "edge_of_stability.py"


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder of a whole run from the command line, what it printed, and the study that ran."""
    folder = tmp_path_factory.mktemp("flow")
    studies, run = [], FlowStudy.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowStudy, "run", lambda study, *rest: studies.append(study) or run(study, *rest))
        status, out, err = run_command("flow", write_train_config(folder / "small.py", SMALL), "--out", folder / "run")
    assert (status, err) == (0, "")
    return folder / "run", out, studies[0]


def pieces(folder):
    found = {name: strict_loads((folder / "pieces" / f"{name}.json").read_text()) for name in NAMES}
    return {name: {field: x for field, x in piece.items() if field != "seconds"} for name, piece in found.items()}


@pytest.mark.slow
def test_gradient_descent_is_a_loop_of_ones_own(followed):
    folder, _, study = followed
    params, losses = study.params, []
    step = jax.jit(jax.value_and_grad(lambda p: study.loss_fn(p, **study.data)))
    for index in range(9):
        loss, grads = step(params)
        losses.append(loss)
        if index < 8:
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    kept = pieces(folder)
    np.testing.assert_allclose(kept["gradient_descent"]["loss"], losses[::4], rtol=1e-5)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda w: study.loss_fn(unravel(w), **study.data)))(flat)
    np.testing.assert_allclose(kept["gradient_descent"]["eigenvalues"][-1], np.linalg.eigvalsh(hessian)[-1:], rtol=1e-4)
    assert kept["gradient_descent"]["distance"] == [0, 0, 0]

    def fine(_, w):  # the flow is the limit of many short steps
        return w - 5e-4 * jax.grad(lambda w: study.loss_fn(unravel(w), **study.data))(w)

    start = jax.flatten_util.ravel_pytree(study.params)[0]
    limit = jax.jit(lambda w: jax.lax.fori_loop(0, 1600, fine, w))(start)
    np.testing.assert_allclose(kept["gradient_flow"]["distance"][-1], np.linalg.norm(limit - flat), rtol=0.02)


@pytest.mark.slow
def test_the_folder_holds_figure_summary_and_metrics(followed):
    folder, out, _ = followed
    summary = strict_loads((folder / "summary.json").read_text())
    assert summary["edge"] == 20
    assert [row["flow"] for row in summary["flows"]] == NAMES
    assert [row["accepted"] for row in summary["flows"]][::2] == [8, 16]
    assert (folder / "flow.png").stat().st_size > 20_000
    lines = read_metrics(folder)
    assert [(line["flow"], line["steps"]) for line in lines] == [(name, n) for name in NAMES for n in (0, 4, 8)]
    for part in ("gradient descent", "reaches 2/h = 20 at t = 0.", "from t = 0.4 on", f"Written to {folder}"):
        assert part in out
    status, _, err = run_command("plot", folder)
    assert status == 2
    assert "flow.png" in err


class Impatient(Silent):
    """Presses Ctrl-C once a flow has come somewhere, and keeps what is reported."""

    def __init__(self, flow=None):
        super().__init__()
        self.flow, self.advances = flow, []

    def advance(self, work):
        super().advance(work)
        self.advances.append(work)

    def phase(self, description):
        if self.flow and description.startswith(f"{self.flow}, t = "):
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(("flow", "finished"), [("gradient descent", 0), ("central flow", 2)])
def test_an_interrupted_run_goes_on_to_the_same_numbers(followed, tmp_path, flow, finished):
    folder, _, study = followed
    with pytest.raises(KeyboardInterrupt), RunFolder(tmp_path / "run") as stopped:
        study.run(stopped, Impatient(flow))
    again = Impatient()
    with RunFolder(tmp_path / "run", resume=True) as resumed:
        study.run(resumed, again)
    assert 0 < again.advances[finished] < 0.8  # from a checkpoint, not from the start
    assert pieces(tmp_path / "run") == pieces(folder)
    assert [line["flow"] for line in read_metrics(tmp_path / "run")] == [line["flow"] for line in read_metrics(folder)]
    assert again.done == pytest.approx(again.work)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"save_every": 3}, "steps = 8 must be a multiple of save_every = 3"),
        ({"data": DataConfig()}, "data.batch_size = 256 must be None"),
        ({"model": ModelConfig(dropout=0.1)}, "model.dropout = 0.1 must be 0"),
        ({"model": ModelConfig("cnn", hidden=(2,))}, "keeps statistics of its batches"),
        ({"examples": 10_000}, "is more than the 1167 training examples"),
        ({"learning_rate": -1.0}, "learning_rate"),
    ],
)
def test_what_cannot_run_says_so(change, message):
    with pytest.raises(UsageError, match=message):
        FlowStudy(dataclasses.replace(SMALL, **change))


@pytest.mark.slow
def test_a_flow_that_does_not_reach_the_end_is_named(followed, tmp_path, monkeypatch):
    study = followed[2]
    refused = study.follow("gradient_descent")._replace(result=rk_optax.FlowResult.REFUSED, time=0.4)
    monkeypatch.setattr(study, "follow", lambda *name, **options: refused)
    says = r"gradient descent ended at t = 0\.4 of 0\.8: a step of a fixed size .* lower learning_rate"
    with RunFolder(tmp_path / "run") as folder, pytest.raises(UsageError, match=says):
        study.run(folder, Silent())


def test_the_second_half_is_summed_up():
    def made_up(name, sharpness, distance):
        arrays = np.arange(5), np.arange(5) / 2, np.ones(5), np.array(sharpness)[:, None], np.array(distance)
        return Followed(name, *arrays, 4, 0, 5, 0, 1.0)

    results = [
        made_up("gradient_descent", [1, 5, 4, 4, 4.4], [0, 0, 0, 0, 0]),
        made_up("gradient_flow", [1, 5, 6, 7, 8], [0, 1, 1, 2, 4]),
        made_up("central_flow", [1, 4, 4, 4, 4], [0, 1, 0.1, 0.1, 0.1]),
    ]
    summary = flow_summary(results, 0.5)
    assert (summary["edge"], summary["reached_at"], summary["late_from"]) == (4, 0.5, 1)
    assert summary["flows"][0]["sharpness"] == pytest.approx({"mean": 4.4 / 4 / 3 + 2 / 3, "min": 1, "max": 1.1})
    assert summary["distance_ratio"] == pytest.approx({"mean": (0.1 + 0.05 + 0.025) / 3, "min": 0.025, "max": 0.1})


def test_the_committed_summary_is_that_of_the_config():
    config = load(CONFIG, FlowConfig)
    kept = json.loads((CONFIG.parents[1] / "benchmarks" / "results" / "edge_of_stability.json").read_text())
    assert checked(config) == config
    assert kept["edge"] == 2 / config.learning_rate
    assert kept["flows"][0]["accepted"] == config.steps
    hovers(kept)


def test_the_notebook_follows_the_flows_of_the_config():
    notebook = json.loads((CONFIG.parents[1] / "notebooks" / "edge_of_stability.ipynb").read_text(encoding="utf-8"))
    (source,) = (c["source"] for c in notebook["cells"] if any("FlowConfig(" in line for line in c["source"]))
    names = {"FlowConfig": FlowConfig}
    exec("".join(source).partition("if SMOKE")[0], names)
    assert names["config"] == load(CONFIG, FlowConfig)


def hovers(summary):
    """What makes the edge of stability: gradient descent is at it, the flow beyond, the central flow beside."""
    descent, flow, central = (row["sharpness"] for row in summary["flows"])
    assert descent["min"] >= 0.9
    assert descent["max"] <= 1.1
    assert flow["min"] > 1.5
    assert central["max"] <= 1.01
    assert summary["distance_ratio"]["max"] < 0.1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_edge_of_stability(tmp_path):
    config = load(CONFIG, FlowConfig)
    with RunFolder(tmp_path / "run") as folder:
        hovers(flow_summary(FlowStudy(config).run(folder, Silent()), config.learning_rate))
