import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rk_optax.experiment.config import DataConfig, ModelConfig, OptimizerConfig
from rk_optax.experiment.entrants import build_optimizer
from rk_optax.experiment.runs.loop import Trainer
from rk_optax.experiment.tasks import supervised
from rk_optax.experiment.tasks.data import batch_indices, load_dataset
from rk_optax.experiment.tasks.models import build_model
from rk_optax.experiment.tasks.problems import PROBLEMS
from rk_optax.experiment.tasks.supervised import Supervised, build_task, probe_loss


@pytest.fixture(scope="module")
def task():
    return build_task(DataConfig(batch_size=32), ModelConfig(hidden=(), l2=1e-2))


def make(factory, rates=(0.1, 1.0), model=ModelConfig(), **fields):  # noqa: B008
    config = OptimizerConfig(factory, rates, **fields)
    return build_optimizer("x", config, probe_loss(model), has_rate=rates is not None, sliced=Supervised.sliced)


def final_params(trainer, steps):
    for point in trainer.run(steps):
        params = jax.tree.map(np.asarray, point.state.params)
    return params


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_agrees_with_a_plain_loop(task):
    """The oracle: Optax as its tutorial uses it, one step after the other."""
    data = load_dataset(DataConfig())
    model = build_model(ModelConfig(hidden=()), data.classes)
    params = model.init(jax.random.key(5), data.train.images[:1])

    def loss(params, images, labels):
        logits = model.apply(params, images)
        penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean() + 5e-3 * penalty

    tx = optax.sgd(0.1)
    state = tx.init(params)
    gradient = jax.jit(jax.grad(loss))
    for batch in batch_indices(5, len(data.train.labels), 32, 0, 6):
        grads = gradient(params, data.train.images[batch], data.train.labels[batch])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    trainer = Trainer(task, make("sgd"), seeds=5, rates=0.1, chunk=3)
    assert_close(final_params(trainer, 6), params, rtol=1e-5, atol=1e-6)


def test_chunks_do_not_matter(task):
    one, three = (Trainer(task, make("heun"), seeds=1, rates=0.3, chunk=chunk) for chunk in (6, 2))
    assert_close(final_params(one, 6), final_params(three, 6), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_grid_is_its_runs(task):
    grid = final_params(Trainer(task, make("heun"), seeds=(3, 4), rates=(0.1, 0.4), chunk=4), 4)
    for row, column, seed, rate in [(0, 1, 3, 0.4), (1, 0, 4, 0.1)]:
        alone = final_params(Trainer(task, make("heun"), seeds=seed, rates=rate, chunk=4), 4)
        here = jax.tree.map(lambda leaf: leaf[row, column], grid)
        assert_close(here, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_runs_in_turns_are_the_runs_side_by_side(task):
    arguments = task, make("heun", options={"momentum": 0.5}), (3, 4), (0.1, 0.4), 4
    in_turns, side_by_side = (final_params(Trainer(*arguments, vectorized=v), 8) for v in (False, True))
    assert_close(in_turns, side_by_side, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_split_batches_are_a_step_over_the_slices(task):
    """The oracle: Heun's two formulas, each stage on its half of the batch."""
    params, data = task.init(5).params, task.dataset.train

    def gradient(params, batch):
        return jax.grad(task.loss_fn)(params, images=data.images[batch], labels=data.labels[batch])

    for batch in task.batches(5, 0, 2):
        k1, h = gradient(params, batch[:16]), 0.2
        middle = jax.tree.map(lambda p, k: p - h * k, params, k1)
        k2 = gradient(middle, batch[16:])
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
    score = trainer.score(points[-1], task.dataset.validation)
    assert score.loss.shape == score.accuracy.shape == (3, 2)
    assert trainer.compile_seconds > 0


def test_a_run_can_be_repeated(task):
    trainer = Trainer(task, make("adam"), seeds=0, rates=0.01, chunk=2)
    assert_close(final_params(trainer, 4), final_params(trainer, 4), rtol=0, atol=0)


def test_score_is_over_the_whole_split(task):
    params, statistics, _ = task.init(0)
    score = task.score(params, statistics, task.dataset.test)
    logits = task.model.apply(params, task.dataset.test.images)
    labels = np.asarray(task.dataset.test.labels)
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
    whole = task.score(params, statistics, task.dataset.train)
    for piece in (100, 73, len(task.dataset.train.labels)):
        monkeypatch.setattr(supervised, "_PIECE", piece)
        fresh = Supervised(task.model, load_dataset(DataConfig()), 32, l2=1e-2)
        score = fresh.score(params, statistics, fresh.dataset.train)
        np.testing.assert_allclose([score.loss, score.accuracy], [whole.loss, whole.accuracy], rtol=1e-5)


@pytest.mark.slow
def test_stiff_methods_train_in_a_grid_and_alone(task):
    """What differs from run to run is counted for each."""
    optimizer = make("rkc", None, options={"max_stages": 8})
    grid = Trainer(task, optimizer, seeds=(3, 4), rates=(None,), chunk=3)
    *_, last = grid.run(3)
    alone = Trainer(task, optimizer, seeds=4, rates=None, chunk=3)
    *_, single = alone.run(3)
    assert grid.spent(last)[1, 0] == pytest.approx(alone.spent(single))
    assert_close(jax.tree.map(lambda leaf: leaf[1, 0], last.state.params), single.state.params, rtol=1e-3, atol=1e-5)
    cost = single.state.cost
    assert alone.spent(single) == pytest.approx(int(cost.gradients) + 2 * int(cost.products) + int(cost.losses) / 3)
    assert int(cost.gradients) > 3  # more than one stage a step


@pytest.mark.slow
def test_lbfgs_keeps_the_gradient_where_the_data_stay():
    problem = PROBLEMS["gp_dual"](0, points=20)
    optimizer = build_optimizer("x", OptimizerConfig("lbfgs"), problem.loss_fn, has_rate=False)
    trainer = Trainer(problem, optimizer, 0, None, 3)
    *_, last = trainer.run(3)
    tx, params = optax.lbfgs(), problem.params  # Optax's own loop
    state, spent = tx.init(params), 0

    def loss(params):
        return problem.loss_fn(params, **problem.source)

    for _ in range(3):
        value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        params = optax.apply_updates(params, updates)
        spent += int(optax.tree_utils.tree_get(state, "num_linesearch_steps"))
    np.testing.assert_allclose(last.state.params, params, rtol=1e-4, atol=1e-5)
    assert trainer.spent(last) == spent


@pytest.mark.slow
def test_squared_errors_show_their_residuals(task):
    """The oracle: half the mean squared distance from the one-hot label, and its penalty."""
    model = ModelConfig(hidden=(), l2=1e-2, loss="squared_error")
    squared = build_task(DataConfig(batch_size=32), model)
    params, batch = squared.init(0).params, squared.batches(0, 0, 1)[0]
    images, labels = (np.asarray(part)[batch] for part in squared.dataset.train)
    distance = np.asarray(squared.model.apply(params, images)) - np.eye(10)[labels]
    penalty = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(params))
    expected = 0.5 * np.mean(np.sum(distance**2, axis=1)) + 0.5e-2 * penalty
    assert float(squared.loss_fn(params, images=images, labels=labels)) == pytest.approx(expected, rel=1e-5)
    assert float(squared.loss_and_statistics(params, images=images, labels=labels)[0]) == pytest.approx(
        expected, rel=1e-5
    )
    assert squared.loss_fn.count_rows(params, {"images": images, "labels": labels}) == 320 + 650
    trainer = Trainer(squared, make("residual_euler", None, model), 0, None, 3)
    first, *_, last = (float(trainer.score(point, squared.dataset.train).loss) for point in trainer.run(6))
    assert last < 0.5 * first
