"""What one update is: step size, against steps by hand in NumPy, Optax and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import network, network_gradient, network_loss
from training import (
    PARAMS,
    H,
    X,
    assert_close,
    assert_same,
    first_update,
    loss_fn,
    loss_gradient,
    make_step,
    numpy_rk4,
    numpy_update,
    train,
)

import rk_optax


# --- Step size -----------------------------------------------------------------------------------------------------
def test_a_schedule_is_read_at_the_count_of_updates(x64):
    rates = np.array([0.3, 0.1, 0.25, 0.05])
    tx = rk_optax.rk4(loss_fn, lambda count: jnp.asarray(rates)[count])
    step = jax.jit(make_step(tx, loss_fn))
    params, state = PARAMS, tx.init(PARAMS)
    expected = PARAMS
    for rate in rates:
        params, state = step(params, state, {"x": X})
        expected = jax.tree.map(np.add, expected, numpy_update(expected, X, rate))
        assert_close(params, expected)
        np.testing.assert_allclose(state.step_size, rate)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("zero", [0.0, 0, jnp.float32(0.0)])
def test_a_schedule_that_returns_zero_gives_a_zero_update_and_finite_state(jit, zero, x64):
    tx = rk_optax.rk4(loss_fn, lambda count: zero, momentum=0.9)
    update = jax.jit(tx.update) if jit else tx.update
    updates, state = update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert_same(updates, jax.tree.map(np.zeros_like, PARAMS))
    assert_close(state.after.trace, loss_gradient(PARAMS, X))
    assert (state.count, state.step_size, bool(state.accepted)) == (1, 0.0, True)


def test_a_warm_up_from_zero_trains():
    params, data = network()
    tx = rk_optax.rk4(network_loss, optax.linear_schedule(0.0, 0.5, 5))
    trained, state = train(tx, network_loss, params, data, 20)
    assert network_loss(trained, **data) < 0.5 * network_loss(params, **data)
    assert state.rejected == 0


def test_a_scale_after_the_solver_is_not_a_smaller_step():
    def stability(z):
        return 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24

    def quadratic(params):
        return 0.5 * jnp.sum(params**2)

    w = jnp.array([1.0])
    for tx, factor in [
        (rk_optax.rk4(quadratic, 0.5), stability(-0.5)),
        (optax.chain(rk_optax.rk4(quadratic, 1.0), optax.scale(0.5)), (1 + stability(-1.0)) / 2),
    ]:
        updates, _ = first_update(tx, quadratic, w)
        np.testing.assert_allclose(w + updates, [factor], rtol=1e-6)
    assert abs(stability(-0.5) - (1 + stability(-1.0)) / 2) > 0.05


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("rate", [H, jnp.float32(H), optax.cosine_decay_schedule(H, 20)])
def test_scale_by_rk_in_a_chain_with_trace_is_the_ready_optimizer_with_momentum(rate):
    params, data = network()
    chain = optax.chain(
        rk_optax.scale_by_rk(network_loss, rate, "rk4"), optax.trace(0.9), optax.scale_by_learning_rate(rate)
    )
    expected, _ = train(rk_optax.runge_kutta(network_loss, rate, "rk4", momentum=0.9), network_loss, params, data, 10)
    assert_close(train(chain, network_loss, params, data, 10)[0], expected, rtol=1e-5, atol=1e-6)


def test_momentum_is_a_trace_of_the_effective_gradient(x64):
    params, state = train(rk_optax.rk4(loss_fn, H, momentum=0.8), loss_fn, PARAMS, {"x": X}, 6)
    expected, moment = PARAMS, jax.tree.map(np.zeros_like, PARAMS)
    for _ in range(6):
        direction = numpy_rk4(lambda p: loss_gradient(p, X), expected, H)
        moment = jax.tree.map(lambda m, g: 0.8 * m + g, moment, direction)
        expected = jax.tree.map(lambda p, m: p - H * m, expected, moment)
    assert_close(params, expected)
    assert_close(state.after.trace, moment)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({"momentum": 0.7}, optax.trace(0.7)),
        ({"momentum": 0.7, "nesterov": True}, optax.trace(0.7, nesterov=True)),
        ({"momentum": 0.0}, optax.identity()),
        ({"after": optax.scale_by_adam()}, optax.scale_by_adam()),
        (
            {"after": optax.chain(optax.clip(0.1), optax.add_decayed_weights(0.01))},
            optax.chain(optax.clip(0.1), optax.add_decayed_weights(0.01)),
        ),
    ],
)
def test_after_runs_between_the_solver_and_the_step_size(options, after):
    params, data = network()
    solver = rk_optax.scale_by_rk(network_loss, H, "heun")

    @jax.jit
    def step(params, states):
        direction, solver_state = solver.update(network_gradient(params, **data), states[0], params, **data)
        direction, after_state = after.update(direction, states[1], params)
        return jax.tree.map(lambda p, d: p - H * d, params, direction), (solver_state, after_state)

    expected, states = params, (solver.init(params), after.init(params))
    for _ in range(4):
        expected, states = step(expected, states)
    trained, _ = train(rk_optax.heun(network_loss, H, **options), network_loss, params, data, 4)
    assert_close(trained, expected, rtol=1e-5, atol=1e-6)


def test_keywords_of_update_reach_a_transformation_given_as_after():
    def scale_by_value(updates, state, params=None, *, value, **extra):
        del params, extra
        return jax.tree.map(lambda u: value * u, updates), state

    after = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scale_by_value)
    plain, _ = first_update(rk_optax.rk4(loss_fn, H), loss_fn, PARAMS, x=X)
    tx = rk_optax.rk4(loss_fn, H, after=after)
    scaled, _ = tx.update(jax.grad(loss_fn)(PARAMS, X), tx.init(PARAMS), PARAMS, x=X, value=3.0)
    assert_close(scaled, jax.tree.map(lambda u: 3 * u, plain), rtol=1e-6)


@pytest.mark.slow
def test_vmap_over_learning_rates_and_momenta_is_the_loop():
    params, data = network()
    rates, momenta = np.array([0.05, 0.2, 0.8], np.float32), np.array([0.0, 0.5, 0.9], np.float32)

    def run(rate, momentum):
        return train(rk_optax.rk4(network_loss, rate, momentum=momentum), network_loss, params, data, 2, jit=False)

    together, states = jax.jit(jax.vmap(run))(rates, momenta)
    np.testing.assert_allclose(states.step_size, rates)
    for i, (rate, momentum) in enumerate(zip(rates.tolist(), momenta.tolist(), strict=True)):
        alone, _ = train(rk_optax.rk4(network_loss, rate, momentum=momentum), network_loss, params, data, 2)
        assert_close(jax.tree.map(lambda a: a[i], together), alone, rtol=1e-5, atol=1e-6)
