import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rk_optax.experiment import training
from rk_optax.experiment.config import DataConfig, ModelConfig, OptimizerConfig
from rk_optax.experiment.data import batch_indices, load_dataset
from rk_optax.experiment.models import build_model
from rk_optax.experiment.optimizers import build_optimizer
from rk_optax.experiment.training import Task, Trainer


@pytest.fixture(scope="module")
def task():
    data = load_dataset(DataConfig())
    return Task(build_model(ModelConfig(hidden=(6,)), data.classes), data, batch_size=32, l2=1e-2)


def make(factory, **fields):
    return build_optimizer("optimizers.x", OptimizerConfig(factory, (0.1, 1.0), **fields))


def final_params(trainer, steps):
    for point in trainer.run(steps):
        params = jax.tree.map(np.asarray, point.state.params)
    return params


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_agrees_with_a_plain_loop(task):
    """The oracle: Optax as its tutorial uses it, one step after the other."""
    data = load_dataset(DataConfig())
    model = build_model(ModelConfig(hidden=(6,)), data.classes)
    params = model.init(jax.random.key(5), data.train.images[:1])

    def loss(params, images, labels):
        logits = model.apply(params, images)
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + 5e-3 * penalty

    tx = optax.sgd(0.1)
    state = tx.init(params)
    for batch in batch_indices(5, len(data.train.labels), 32, 0, 6):
        grads = jax.grad(loss)(params, data.train.images[batch], data.train.labels[batch])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    trainer = Trainer(task, make("sgd"), seeds=5, rates=0.1, chunk=3)
    assert_close(final_params(trainer, 6), params, rtol=1e-5, atol=1e-6)


def test_chunks_do_not_matter(task):
    one, three = (Trainer(task, make("heun"), seeds=1, rates=0.3, chunk=chunk) for chunk in (6, 2))
    assert_close(final_params(one, 6), final_params(three, 6), rtol=1e-5, atol=1e-6)


def test_a_grid_is_its_runs(task):
    grid = final_params(Trainer(task, make("rk4"), seeds=(3, 4), rates=(0.1, 0.4), chunk=4), 4)
    for row, column, seed, rate in [(0, 1, 3, 0.4), (1, 0, 4, 0.1)]:
        alone = final_params(Trainer(task, make("rk4"), seeds=seed, rates=rate, chunk=4), 4)
        here = jax.tree.map(lambda leaf: leaf[row, column], grid)
        assert_close(here, alone, rtol=1e-4, atol=1e-5)


def test_runs_in_turns_are_the_runs_side_by_side(task):
    arguments = task, make("rk4", options={"momentum": 0.5}), (3, 4), (0.1, 0.4), 4
    in_turns, side_by_side = (final_params(Trainer(*arguments, vectorized=v), 8) for v in (False, True))
    assert_close(in_turns, side_by_side, rtol=1e-4, atol=1e-5)


def test_split_batches_are_a_step_over_the_slices(task):
    """The oracle: Heun's two formulas, each stage on its half of the batch."""
    params, data = task.init(5).params, task.data.train
    for batch in task.batches(5, 0, 2):
        k1, h = jax.grad(task.loss)(params, data.images[batch[:16]], data.labels[batch[:16]]), 0.2
        middle = jax.tree.map(lambda p, k: p - h * k, params, k1)
        k2 = jax.grad(task.loss)(middle, data.images[batch[16:]], data.labels[batch[16:]])
        params = jax.tree.map(lambda p, a, b: p - h / 2 * (a + b), params, k1, k2)
    trainer = Trainer(task, make("heun", stage_batches="split"), seeds=5, rates=0.2, chunk=2)
    assert_close(final_params(trainer, 2), params, rtol=1e-5, atol=1e-6)


def test_points(task):
    trainer = Trainer(task, make("sgd"), seeds=(0, 1, 2), rates=(0.1, 0.2), chunk=2)
    points = list(trainer.run(6))
    assert [point.steps for point in points] == [0, 2, 4, 6]
    seconds = [point.seconds for point in points]
    assert seconds[0] == 0
    assert np.all(np.diff(seconds) > 0)
    score = trainer.score(points[-1], task.data.validation)
    assert score.loss.shape == score.accuracy.shape == (3, 2)
    assert trainer.compile_seconds > 0


def test_a_run_can_be_repeated(task):
    trainer = Trainer(task, make("adam"), seeds=0, rates=0.01, chunk=2)
    assert_close(final_params(trainer, 4), final_params(trainer, 4), rtol=0, atol=0)


def test_score_is_over_the_whole_split(task):
    params, statistics, _ = task.init(0)
    score = task.score(params, statistics, task.data.test)
    logits = task.model.apply(params, task.data.test.images)
    labels = np.asarray(task.data.test.labels)
    assert score.accuracy == pytest.approx(np.mean(np.argmax(logits, -1) == labels))
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(labels)), labels]
    squares = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(params))
    assert score.loss == pytest.approx(-log_probabilities.mean() + 0.5 * 1e-2 * squares, rel=1e-5)


def test_evaluation_is_not_timed(task):
    trainer = Trainer(task, make("sgd"), seeds=0, rates=0.1, chunk=2)
    before = time.perf_counter()
    seconds = []
    for point in trainer.run(4):
        time.sleep(0.2)
        seconds.append(point.seconds)
    assert seconds[-1] < time.perf_counter() - before - 0.4


def test_a_large_split_is_scored_in_pieces(task, monkeypatch):
    params, statistics, _ = task.init(0)
    whole = task.score(params, statistics, task.data.train)
    for piece in (100, 73, len(task.data.train.labels)):
        monkeypatch.setattr(training, "_PIECE", piece)
        fresh = Task(task.model, load_dataset(DataConfig()), 32, l2=1e-2)
        np.testing.assert_allclose(fresh.score(params, statistics, fresh.data.train), whole, rtol=1e-5)
