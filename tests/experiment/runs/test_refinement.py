"""Time that is refined in mid-training: more nodes and steps, the optimizer's state carried over."""

import dataclasses
import shutil

import jax
import numpy as np
import optax
import pytest

from rk_optax.experiment.config import (
    BudgetConfig,
    CompareConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainOptimizerConfig,
    TuningConfig,
)
from rk_optax.experiment.entrants import build_optimizer
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.compare import Comparison
from rk_optax.experiment.runs.loop import Trainer, refinements
from rk_optax.experiment.runs.plan import make_plan
from rk_optax.experiment.runs.train import Training
from rk_optax.experiment.store.run_folder import RunFolder
from rk_optax.experiment.tasks.data import batch_indices
from rk_optax.experiment.tasks.supervised import build_task, probe_loss

from ..helpers import Silent, read_metrics, run_command, without_time, write_train_config

DATA = DataConfig(batch_size=33)  # which no two of the eight devices of the tests can share
MODEL = ModelConfig("rk_net", width=4, depth=2, steps=2, method="heun", refine_at=(0.5,), l2=0.0)
CONFIG = TrainConfig(
    TrainOptimizerConfig("adam", 0.01), data=DATA, model=MODEL, steps=8, evaluate_every=2, metrics=("transfer_gap",)
)


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refined")
    status, _, err = run_command("train", write_train_config(folder / "r.py", CONFIG), "--out", folder / "run")
    assert (status, err) == (0, "")
    return folder / "run"


def in_between(x, old, new):
    """Linear interpolation along the first axis, by NumPy."""
    columns = np.asarray(x, float).reshape(len(x), -1).T
    return np.stack([np.interp(new, old, column) for column in columns], axis=-1).reshape(len(new), *x.shape[1:])


@pytest.mark.slow
def test_it_is_a_loop_over_two_networks_with_moments_as_densities(refined):
    task = build_task(DATA, MODEL)
    fine = build_task(DATA, dataclasses.replace(MODEL, depth=4, steps=4))  # five nodes, but at 0, 1, ..., 4
    fine.model = fine.model.clone(depth=2, steps=2, halvings=1)
    params, tx, losses = task.init(0).params, optax.adam(0.01), []
    state = tx.init(params)
    old, new = np.arange(3.0), np.arange(5) / 2
    support = {0: np.array([0.5, 1, 0.5]), 1: np.array([0.25, 0.5, 0.5, 0.5, 0.25])}

    def refine(tree, power):
        def of(x):
            wide = (-1,) + (1,) * (x.ndim - 1)
            density = in_between(x / support[0].reshape(wide) ** power, old, new)
            return np.float32(density * support[1].reshape(wide) ** power)

        block = tree["params"]["block"]
        return {"params": tree["params"] | {"block": block | {"controls": jax.tree.map(of, block["controls"])}}}

    for step, batch in enumerate(batch_indices(0, task.examples, 33, 0, 8)):
        if step == 4:
            task, params = fine, refine(params, 0)
            moments = state[0]._replace(mu=refine(state[0].mu, 1), nu=refine(state[0].nu, 2))
            state = (moments, *state[1:])
        images, labels = task.source.images[batch], task.source.labels[batch]
        loss, gradient = jax.value_and_grad(task.loss_fn)(params, images=images, labels=labels)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    found = [record["train_loss"] for record in read_metrics(refined)[1:]]
    np.testing.assert_allclose(found, np.reshape(losses, (-1, 2)).mean(axis=1), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(refined, tmp_path, step):
    """From before the refinement, from the moment of it, and from after it."""
    run = shutil.copytree(refined, tmp_path / "run")
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.is_dir() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    if step == 2:  # it is not among the last three
        shutil.rmtree(run / "checkpoints")
    assert run_command("train", "--resume", run)[::2] == (0, "")
    assert without_time(read_metrics(run)) == without_time(read_metrics(refined))


def optimizer(factory, **options):
    probe, config = probe_loss(MODEL), TrainOptimizerConfig(factory, options=options)
    return build_optimizer("optimizer", config, probe, has_rate=factory != "lbfgs", sliced=("images", "labels"))


@pytest.mark.slow
def test_a_grid_of_runs_is_refined_as_each_of_them():
    task, adam = build_task(DATA, MODEL), optimizer("adam")
    *_, grid = Trainer(task, adam, (3, 4), (0.01, 0.1), 2, refine_at=(2,)).run(4)
    *_, alone = Trainer(task, adam, 4, 0.1, 2, refine_at=(2,)).run(4)
    kernels = [run.state.params["params"]["block"]["controls"]["kernel"] for run in (grid, alone)]
    assert kernels[1].shape == (5, 4, 4)
    np.testing.assert_allclose(kernels[0][1, 1], kernels[1], rtol=2e-4, atol=1e-6)


COMPARED = CompareConfig(
    {"adam": OptimizerConfig("adam", (0.01, 0.1)), "rk4": OptimizerConfig("rk4", (0.1, 0.5))},
    data=DATA,
    model=MODEL,
    budget=BudgetConfig(gradients=16, evaluate_every=2),
    tuning=TuningConfig(trials=2, seeds=(100,)),
    seeds=(0,),
    timed_runs=1,
)


def test_a_comparison_plans_fractions_of_every_run():
    def plan(**changes):
        return [(e.whole.refine_at, e.tuning.refine_at) for e in make_plan(dataclasses.replace(COMPARED, **changes))]

    assert plan() == [((8,), (8,)), ((2,), (2,))]
    with pytest.raises(UsageError, match="smaller evaluate_every or a longer run"):  # two steps of rk4 in tuning
        plan(tuning=TuningConfig(trials=2, seeds=(100,), fraction=0.5))
    with pytest.raises(UsageError, match=r"rkc has no fixed number of.*budget\.updates"):
        plan(optimizers={"rkc": OptimizerConfig("rkc")})
    with pytest.raises(UsageError, match=r"timed_updates = 4 must be None with model\.refine_at"):
        plan(timed_updates=4, budget=BudgetConfig(updates=8, evaluate_every=2))


@pytest.mark.slow
def test_a_comparison_refines_compared_and_timed_runs_alike(tmp_path):
    config = dataclasses.replace(COMPARED, optimizers={"rk4": COMPARED.optimizers["rk4"]})
    with RunFolder(tmp_path / "run", resume=False) as folder:
        (compared,) = Comparison(config).run(folder, Silent())
    timed = [record for record in read_metrics(tmp_path / "run") if record["phase"] == "time"]
    assert timed[-1]["steps"] == 4
    np.testing.assert_allclose(timed[-1]["train_loss"], compared.runs.train_loss[0, -1], rtol=1e-4)


def test_what_cannot_be_refined_is_refused_before_it_runs():
    with pytest.raises(UsageError, match=r"does not go with this optimizer.*params\['params'\]\['block'\]"):
        Training(dataclasses.replace(CONFIG, optimizer=TrainOptimizerConfig("lbfgs")))
    with pytest.raises(UsageError, match=r"after steps \(0,\).*lie within the run"):
        Training(dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, refine_at=(0.01,))))
    with pytest.raises(TypeError, match="no grid to refine"):
        build_task(DATA, ModelConfig()).finer()
    assert refinements((0.3, 0.6), 100, 10) == (30, 60)
    assert optimizer("adamax").powers == {"nu": 1}
    assert optimizer("rmsprop", momentum=0.9).powers == {"trace": 0}
