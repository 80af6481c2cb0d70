import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rk_optax import TABLEAUS
from rk_optax.experiment.config import OptimizerConfig
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.optimizers import build_optimizer


def loss_fn(params, images, labels):
    return jnp.mean((images @ params - labels) ** 2)


DATA = {"images": jnp.array([[1.0, 2.0], [3.0, -1.0]]), "labels": jnp.array([0.5, 1.0])}


def build(factory, **options):
    return build_optimizer("x", OptimizerConfig(factory, (0.1, 1.0), options))


def one_step(optimizer, learning_rate=0.01):
    params = jnp.array([0.3, -0.2])
    tx = optimizer.make(loss_fn, learning_rate)
    grads = jax.grad(loss_fn)(params, **DATA)
    return tx.update(grads, tx.init(params), params, **DATA)


@pytest.mark.parametrize("factory", ["sgd", "momentum", "adam", *TABLEAUS])
def test_all_are_called_alike_and_cost_what_they_say(factory):
    optimizer = build(factory)
    updates, state = one_step(optimizer)
    assert np.all(np.isfinite(updates))
    if factory in TABLEAUS:
        assert int(state.cost.gradients) == optimizer.gradients_per_step
    else:
        assert optimizer.gradients_per_step == 1


@pytest.mark.parametrize(
    ("factory", "reference"),
    [
        ("sgd", optax.sgd(0.01)),
        ("euler", optax.sgd(0.01)),
        ("momentum", optax.sgd(0.01, momentum=0.9)),
        ("adam", optax.adam(0.01)),
    ],
)
def test_agrees_with_optax(factory, reference):
    updates, _ = one_step(build(factory))
    params = jnp.array([0.3, -0.2])
    expected, _ = reference.update(jax.grad(loss_fn)(params, **DATA), reference.init(params), params)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_learning_rates_can_be_mapped_over():
    optimizer = build("rk4")
    rates = jnp.array([0.01, 0.1])
    mapped, _ = jax.vmap(lambda rate: one_step(optimizer, rate))(rates)
    for rate, updates in zip(rates, mapped, strict=True):
        np.testing.assert_allclose(updates, one_step(optimizer, float(rate))[0], rtol=1e-5)


def test_options_reach_the_factory():
    plain, _ = one_step(build("adam"))
    changed, _ = one_step(build("adam", b1=0.0, nesterov=True))
    assert jax.tree.structure(plain) == jax.tree.structure(changed)
    assert build("heun", momentum=0.5).make(loss_fn, 0.1).init(jnp.zeros(2)).after is not None


def test_unknown_factories_suggest_a_known_one():
    with pytest.raises(UsageError, match=r"optimizers\.x\.factory = 'adm' .* did you mean 'adam'"):
        build("adm")
    with pytest.raises(UsageError, match="neither of sgd, momentum, adam nor a solver listed by"):
        build("qqqqqqq")


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("adam", {"momentum": 0.9}, "momentum"),
        ("sgd", {"learning_rate": 0.9}, "learning_rate"),
        ("rk4", {"momentun": 0.9}, "momentun"),
        ("rk4", {"momentum": 1.5}, "momentum"),
    ],
)
def test_wrong_options_are_refused_before_training(factory, options, message):
    with pytest.raises(UsageError, match=rf"optimizers\.x\.options = .*{message}"):
        build(factory, **options)
