"""The networks that are Runge–Kutta methods, and CIFAR-10 and Lorenz 96 for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rk_optax.experiment.config import DataConfig, ModelConfig, checked
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.tasks.data import Split, load_dataset
from rk_optax.experiment.tasks.lorenz96 import _whole, coarse, lorenz96
from rk_optax.experiment.tasks.models import build_model
from rk_optax.experiment.tasks.supervised import METRICS, build_task


def test_the_convolutional_network_has_251_866_parameters():
    model = build_model(ModelConfig("rk_conv_net", activation="relu"), classes=10)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 251_866
    assert set(variables) == {"params", "batch_stats"}


@pytest.mark.slow
def test_a_convolutional_network_of_any_size_has_finite_gradients():
    model = build_model(ModelConfig("rk_conv_net", activation="relu", method="euler"), classes=3).clone(widths=(2,))
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = model.init(jax.random.key(1), images)

    def loss(params):
        logits, moved = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.sum(logits**2), moved

    gradient, moved = jax.grad(loss, has_aux=True)(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert len(moved["batch_stats"]) == 2  # none inside the blocks
    assert gradient["block0"]["controls"]["kernel"].shape == (5, 3, 3, 2, 2)


@pytest.mark.slow
def test_the_transfer_gap_is_own_minus_refined_accuracy_and_that_of_a_resolved_network_is_0():
    images = jax.random.normal(jax.random.key(0), (64, 4, 4, 1))
    gaps = {}
    for method, scale in (("euler", 8.0), ("rk4", 0.3)):
        model = build_model(ModelConfig("rk_net", width=6, depth=2, steps=2, method=method), classes=3)
        variables = model.init(jax.random.key(1), images)
        variables["params"]["block"]["controls"]["kernel"] *= scale
        labels = model.apply(variables, images).argmax(-1)
        refined = model.apply(variables, images, refined=True)
        gaps[method] = METRICS["transfer_gap"](model, variables, Split(images, labels)).mean()
        assert gaps[method] == pytest.approx(float(1 - jnp.mean(refined.argmax(-1) == labels)))
    assert gaps["rk4"] < 0.05 < gaps["euler"]


@pytest.mark.slow
def test_a_task_reports_the_gap_and_another_network_has_none():
    data = DataConfig("digits", batch_size=64)
    with pytest.raises(UsageError, match=r"transfer_gap' needs a network with a grid to refine .*not mlp"):
        build_task(data, ModelConfig("mlp"), ("accuracy", "transfer_gap"))
    task = build_task(data, ModelConfig("rk_net", width=8, method="euler"), ("accuracy", "transfer_gap"))
    start = task.init(0)
    score = task.score(start.params, start.statistics, task.dataset.validation)
    assert set(score.metrics) == {"accuracy", "transfer_gap"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "rk5"}, "must be 'euler'"),
        ({"steps": 6}, "steps = 6 must be a multiple of depth = 4"),
        ({"name": "rk_conv_net", "depth": 3, "steps": 3}, "multiple of depth = 4"),
        ({"name": "mlp", "refine_at": (0.5,)}, "refine_at = .* is for rk_net and rk_conv_net, not mlp"),
        ({"refine_at": (0.5, 0.25)}, "must increase"),
    ],
)
def test_networks_that_cannot_be_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        checked(ModelConfig(**({"name": "rk_net"} | change)))


@pytest.fixture
def cifar(tmp_path):
    """Six made files; the label is in the red channel of the upper left pixel."""
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        records = rng.integers(0, 256, size=(20, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(20) % 10
        records[:, 1], records[:, 2] = records[:, 0], 200  # the next pixel of the row
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path


def test_cifar_is_read_from_its_binary_version(cifar):
    dataset = load_dataset(DataConfig("cifar10", data_dir=cifar, validation_fraction=0.2, batch_size=10))
    assert dataset.train.images.shape == (80, 32, 32, 3)
    assert dataset.test.labels.dtype == np.int32
    for split in (dataset.train, dataset.validation, dataset.test):
        np.testing.assert_allclose(split.images[:, 0, 0, 0] * 255, split.labels, atol=1e-4)
        np.testing.assert_allclose(split.images[:, 0, 1, 0] * 255, 200, atol=1e-4)


def test_damaged_or_missing_cifar_is_named(cifar):
    config = DataConfig("cifar10", data_dir=cifar, batch_size=10)
    (cifar / "data_batch_2.bin").write_bytes(b"0" * 100)
    with pytest.raises(UsageError, match=r"data_batch_2\.bin is damaged"):
        load_dataset(config)
    (cifar / "data_batch_1.bin").unlink()
    with pytest.raises(UsageError, match=r"data_batch_1\.bin cannot be read"):
        load_dataset(config)
    with pytest.raises(UsageError, match="needs --data-dir"):
        load_dataset(DataConfig("cifar10"))


def test_the_two_scale_system_is_that_of_the_literature():
    """In components, as it is printed."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=8), rng.normal(size=(8, 8))
    du, dv = _whole(None, (jnp.asarray(u[None]), jnp.asarray(v[None])), 0.0)
    flat, k, j = v.ravel(), 2, 7  # the last fast variable of a slow one: its neighbours are of the next
    expected = -u[k - 1] * (u[k - 2] - u[k + 1]) - u[k] + 20 - v[k].sum()
    np.testing.assert_allclose(du[0, k], expected, rtol=1e-5)
    i = 8 * k + j
    expected = -100 * flat[i + 1] * (flat[i + 2] - flat[i - 1]) - 10 * flat[i] + u[k]
    np.testing.assert_allclose(dv[0, k, j], expected, rtol=1e-5)
    np.testing.assert_allclose(coarse(jnp.asarray(u))[k], du[0, k] + v[k].sum(), rtol=1e-5)


@pytest.mark.slow
def test_a_closure_problem_is_generated_from_its_seed_and_a_perfect_model_has_no_error():
    task = lorenz96(0, windows=4, rollout=2, horizon=0.05)
    assert task.source["u"].shape == (4, 8)
    assert task.source["targets"].shape == (4, 2, 8)
    nothing = jax.tree.map(jnp.zeros_like, task.params)
    error = float(task.error(nothing))
    assert 0.02 < error < 0.2  # what the coarse dynamics leave out, after 0.05 time units
    assert float(task.loss_fn(nothing, **task.source)) > 0
    with pytest.raises(ValueError, match="at least 1"):
        lorenz96(0, rollout=0)
