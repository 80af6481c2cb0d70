"""SGD-G2: against its equations in NumPy, and exact on quadratics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import network, network_gradient, poisoned_loss
from training import assert_same, first_update, trajectory

import rk_optax
from rk_optax import Reason, sgd_g2

# --- SGD-G2 ----------------------------------------------------------------------------------------------------------


def numpy_g2(gradient, theta, h, beta, steps):
    """SGD-G2 as its equations stand: the path, the rates, and which branch each step took."""
    path, rates, branches = [theta], [], []
    for _ in range(steps):
        g = gradient(theta)
        change = g - gradient(theta - h * g)
        inner = np.vdot(change, g)
        optimal = 2 * h * inner / np.vdot(change, change) if inner > 0 else h
        branches.append("kept" if inner <= 0 else "grown" if optimal >= h else "shrunk")
        h = beta * h + (1 - beta) * optimal if optimal >= h else (1 - beta) * optimal
        theta = theta - h * g
        path.append(theta)
        rates.append(h)
    return path, rates, branches


def wavy_loss(w):
    return jnp.sum(1 - jnp.cos(w)) + 0.05 * jnp.sum(w) ** 2


def wavy_gradient(w):
    return np.sin(w) + 0.1 * np.sum(w)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("start", "initial", "beta", "branches"),
    [
        ([2.0, -1.0, 0.5], 0.05, 0.9, {"grown"}),
        ([1.3, -1.0, 0.5], 6.0, 0.6, {"grown", "shrunk"}),
        ([2.9, 2.8, 3.0], 0.3, 0.5, {"grown", "shrunk", "kept"}),
        ([1.3, -1.0, 0.5], 0.5, 0.0, {"grown", "shrunk"}),
    ],
)
def test_sgd_g2_is_its_equations(start, initial, beta, branches, x64):
    path, rates, taken = numpy_g2(wavy_gradient, np.array(start), initial, beta, 20)
    assert set(taken) == branches
    tx = rk_optax.euler(wavy_loss, sgd_g2(initial, beta))
    visited = trajectory(tx, wavy_loss, np.array(start), {}, 20)
    for (theta, state), expected, rate in zip(visited[1:], path[1:], rates, strict=True):
        np.testing.assert_allclose(theta, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.step_size, rate, rtol=1e-9)
        np.testing.assert_allclose(state.rule.last_step_size, rate, rtol=1e-9)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("curvature", [0.1, 1.0, 30.0])
def test_the_optimal_rate_on_a_quadratic_of_one_dimension_is_the_stability_limit(curvature, x64):
    tx = rk_optax.euler(lambda w: curvature * w**2 / 2, sgd_g2(1e-3))
    for _, state in trajectory(tx, lambda w: curvature * w**2 / 2, 1.0, {}, 5)[1:]:
        np.testing.assert_allclose(state.rule.optimal, 2 / curvature, rtol=1e-9)


def test_sgd_g2_takes_both_gradients_of_the_preconditioned_field(x64):
    start, h, beta = np.array([2.0, -1.0, 0.5]), 0.3, 0.8
    tx = rk_optax.euler(wavy_loss, sgd_g2(h, beta), preconditioner=rk_optax.precondition_by_adagrad())
    theta, total = start, np.zeros(3)
    for seen, state in trajectory(tx, wavy_loss, start, {}, 6)[1:]:
        total = total + wavy_gradient(theta) ** 2
        scale = (1 + total) ** -0.5
        path, rates, _ = numpy_g2(lambda w, scale=scale: scale * wavy_gradient(w), theta, h, beta, 1)
        theta, h = path[1], rates[0]
        np.testing.assert_allclose(seen, theta, rtol=1e-10)
        np.testing.assert_allclose(state.step_size, h, rtol=1e-10)


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_sgd_g2_keeps_its_rate_where_there_is_no_gradient_or_no_curvature(w):
    loss = {0.0: lambda w: w**2, 1.0: lambda w: w}[w]
    tx = rk_optax.euler(loss, sgd_g2(0.1))
    updates, state = first_update(tx, loss, np.float32(w))
    assert bool(state.accepted)
    assert np.isfinite(updates)
    np.testing.assert_allclose([state.step_size, state.rule.last_step_size], 0.1, rtol=1e-6)


def test_a_refused_step_leaves_sgd_g2s_rate(x64):
    params, data = network(np.float64)
    tx = rk_optax.euler(poisoned_loss, sgd_g2(0.1))
    gradient = network_gradient(params, **data)
    _, state = jax.jit(tx.update)(gradient, tx.init(params), params, **data)
    for how in ({"poison": True}, {}):
        nan = jax.tree.map(lambda g, how=how: g if how else g * jnp.nan, gradient)
        updates, refused = jax.jit(tx.update)(nan, state, params, **data, **how)
        np.testing.assert_allclose(refused.rule.last_step_size, state.rule.last_step_size, rtol=1e-12)
        if not how:
            assert int(refused.reason) == Reason.NOT_FINITE
            assert_same(updates, jax.tree.map(jnp.zeros_like, params))
