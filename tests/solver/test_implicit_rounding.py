"""What rounding excuses in an implicit stage, and what it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rk_optax

pytestmark = pytest.mark.latest


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["sdirk3", "radau3"])  # stages one by one, and coupled
def test_near_a_minimum_no_step_is_refused_for_the_rounding_of_the_gradient(name):
    """In float32 the terms of this gradient are a thousand times larger than what is left of it."""

    def valley(w):
        return jnp.sum(100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2)

    tx = rk_optax.runge_kutta(valley, 0.03, name)

    @jax.jit
    def run(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(valley)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), length=2000)[0]

    w, state = run(jnp.array([0.9, 0.8]))
    np.testing.assert_allclose(w, 1, atol=2e-4)
    assert int(state.rejected) == 0


def test_a_stage_far_off_on_an_exponential_is_not_excused_by_the_rounding_there(x64):
    """Newton's first correction, from where the field is flat, leads to a gradient of 1e20 to 1e250."""

    def loss_fn(w):
        return jnp.sum(jnp.exp(20 * w) / 20 - 0.3 * w)

    gradient = jax.grad(loss_fn)

    @jax.jit
    @jax.vmap
    def step(w, h):
        tx = rk_optax.backward_euler(loss_fn, lambda count: h)
        updates, state = tx.update(gradient(w), tx.init(w), w)
        return updates, state.accepted

    w, h = (x.ravel() for x in np.meshgrid(np.linspace(-2, 2, 21), np.logspace(-2, 2, 21)))
    updates, accepted = (np.asarray(x) for x in step(jnp.asarray(w)[:, None], jnp.asarray(h)))
    ends = w + updates[:, 0]
    with np.errstate(over="ignore"):
        wrong = np.abs(updates[:, 0] + h * (np.exp(20 * ends) - 0.3))
    assert 0.1 < accepted.mean() < 1
    # d solves d = ∇L(θ − hd) to 1e-5 of itself, or what rounding of θ does to the field at the end.
    rounding = 64 * 2.0**-53 * (1 + h * 20 * np.exp(20 * ends[accepted].max())) * np.abs(ends)
    assert (wrong <= 2e-5 * np.abs(updates[:, 0]) + rounding)[accepted].all()
