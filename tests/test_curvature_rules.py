"""The rules that take h from the sharpness and from the loss, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rk_optax
from rk_optax import spectrum
from tests.conftest import network, network_loss


def quadratic(w):
    return 0.5 * jnp.sum(jnp.array([0.5, 2.0, -1.0, 8.0]) * w**2)


def one_update(loss_fn, rule, w, solver="euler", **options):
    tx = rk_optax.runge_kutta(loss_fn, rule, solver, **options)
    return jax.jit(tx.update)(jax.grad(loss_fn)(w), tx.init(w), w)


@pytest.mark.slow
def test_the_capped_step_is_alpha_over_the_sharpness():
    w = jnp.array([1.0, 1.0, 0.1, 0.2])
    updates, state = one_update(quadratic, rk_optax.sharpness_capped(1.5), w)
    assert state.step_size == pytest.approx(1.5 / 8, rel=1e-4)
    np.testing.assert_allclose(updates, -state.step_size * jax.grad(quadratic)(w), rtol=1e-6)
    assert (state.cost.gradients, state.cost.products) == (1, 20)
    # With a preconditioner it is the sharpness of the flow that is integrated.
    halved = rk_optax.precondition_by(optax.scale(0.5))
    _, state = one_update(quadratic, rk_optax.sharpness_capped(1.5), w, preconditioner=halved)
    assert state.step_size == pytest.approx(3.0 / 8, rel=1e-4)
    # No curvature, and a loss in other units.
    _, state = one_update(jnp.sum, rk_optax.sharpness_capped(max_learning_rate=0.3), w)
    assert state.step_size == pytest.approx(0.3)
    _, state = one_update(lambda w: 1e-20 * quadratic(w), rk_optax.sharpness_capped(max_learning_rate=1e30), w)
    assert state.step_size == pytest.approx(1e20 / 8, rel=1e-4)


def test_one_product_a_step_follows_the_sharpness_of_a_network():
    params, data = network()
    tx = rk_optax.euler(network_loss, rk_optax.sharpness_capped(0.5))

    @jax.jit
    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(network_loss)(w, **data), state, w, **data)
        return (jax.tree.map(jnp.add, w, updates), state), None

    (w, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=100)
    true = spectrum.sharpness(network_loss, w, data=data)
    assert state.rule.sharpness == pytest.approx(float(true), rel=0.02)
    assert state.cost.products == 20 + 99
    assert state.time > 0


@pytest.mark.slow
def test_the_corridor_is_polyaks_step():
    w = jnp.array([3.0])
    _, state = one_update(lambda w: 2 * jnp.sum(w**2), rk_optax.corridor(10.0), w)
    assert state.step_size == 0.125  # hλ = 1/2, λ = 4
    _, state = one_update(lambda w: 2 * jnp.sum(w**2) + 5, rk_optax.corridor(10.0, minimum=5.0), w)
    assert state.step_size == pytest.approx(0.125)
    _, state = one_update(lambda w: 2 * jnp.sum(w**2), rk_optax.corridor(0.01), w)
    assert state.step_size == pytest.approx(0.01)
    assert state.cost.losses == 1
    _, state = one_update(lambda w: jnp.sum(0 * w) + 1, rk_optax.corridor(0.7), w)
    assert state.step_size == pytest.approx(0.7)  # no gradient
    # hλ = 1/2 of a diagonally preconditioned quadratic of one dimension too.
    rule = rk_optax.precondition_by_adagrad()
    _, state = one_update(lambda w: 2 * jnp.sum(w**2), rk_optax.corridor(100.0), w, preconditioner=rule)
    assert state.step_size == pytest.approx(0.125 * np.sqrt(1 + 12.0**2), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: rk_optax.sharpness_capped(0.0), "alpha must be"),
        (lambda: rk_optax.sharpness_capped(products=0), "products must be"),
        (lambda: rk_optax.sharpness_capped(max_learning_rate=-1.0), "max_learning_rate"),
        (lambda: rk_optax.corridor(0.0), "max_learning_rate"),
        (lambda: rk_optax.euler(None, rk_optax.corridor(1.0), grad_fn=lambda w: w), "loss"),
        (lambda: rk_optax.euler(None, rk_optax.sharpness_capped(), grad_fn=lambda w: w), "product"),
    ],
)
def test_bad_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
