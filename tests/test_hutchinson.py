"""Hutchinson's diagonal: exact where it must be, its running mean, its products and its leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import Evaluations

import rk_optax

CURVATURE = np.array([0.5, 2.0, -3.0, 0.0])


def quadratic(params, matrix):
    return params @ matrix @ params / 2


@functools.cache
def euler(**settings):
    """Its `init` and its compiled `update`."""
    tx = rk_optax.euler(quadratic, 1.0, preconditioner=rk_optax.precondition_by_hutchinson(**settings))
    return tx.init, jax.jit(tx.update)


def hutchinson_scale(state_before, matrix, params, **settings):
    """P of one step and the state after it, through Euler's method."""
    init, update = euler(**settings)
    state = init(params) if state_before is None else state_before
    # The incoming gradient is ours to choose: ones show the scale.
    updates, state = update(jnp.ones_like(params), state, params, matrix=matrix)
    return -np.asarray(updates), state


@pytest.mark.slow
def test_hutchinson_is_exact_on_a_diagonal_quadratic_whatever_the_signs(x64):
    state, params = None, jnp.array([1.0, -2.0, 0.3, 0.7])
    for _ in range(5):
        scale, state = hutchinson_scale(state, np.diag(CURVATURE), params, floor=0.1, every=2)
        np.testing.assert_allclose(scale, 1 / (np.abs(CURVATURE) + 0.1), rtol=1e-12)


def test_hutchinson_is_the_corrected_running_mean_of_squared_probes_of_random_signs(x64):
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(4, 4))
    matrix = matrix + matrix.T
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    candidates = (signs * (signs @ matrix)) ** 2  # (z ⊙ Hz)² for all the signs there are
    state, mean, used = None, 0.0, []
    for t in range(1, 9):
        scale, state = hutchinson_scale(state, matrix, jnp.zeros(4), decay=0.8, floor=0.1, every=1, seed=5)
        trial = (0.8 * mean + 0.2 * candidates) / (1 - 0.8**t)
        misses = np.max(np.abs(1 / (np.sqrt(trial) + 0.1) - scale), axis=1)
        best = int(np.argmin(misses))
        assert misses[best] < 1e-12
        mean = 0.8 * mean + 0.2 * candidates[best]
        used.append(best)
    assert len({min(i, 15 - i) for i in used}) > 2  # fresh signs at every estimate (z and −z give the same)


@pytest.mark.slow
def test_hutchinson_seeds_decide_the_probes(x64):
    matrix = np.array([[1.0, 0.6, -0.2], [0.6, 2.0, 0.4], [-0.2, 0.4, 0.5]])
    scales = [hutchinson_scale(None, matrix, jnp.zeros(3), seed=seed)[0] for seed in (0, 0, *range(1, 8))]
    np.testing.assert_array_equal(scales[0], scales[1])
    assert any(np.any(np.abs(scale - scales[0]) > 1e-3) for scale in scales[2:])


def test_hutchinson_makes_no_product_between_its_estimates():
    counted = Evaluations(quadratic)
    tx = rk_optax.heun(counted.function, 0.1, preconditioner=rk_optax.precondition_by_hutchinson(every=3))
    update = jax.jit(tx.update)
    params, matrix = jnp.ones(4), jnp.diag(jnp.arange(4.0))
    state, evaluated, charged = tx.init(params), [], []
    for _ in range(8):
        before = state.cost.products
        _, state = update(matrix @ params, state, params, matrix=matrix)
        evaluated.append(counted.take() - 1)  # one evaluation is the second stage of Heun's method
        charged.append(int(state.cost.products - before))
    assert evaluated == charged == [1, 0, 0, 1, 0, 0, 1, 0]
    assert int(state.cost.gradients) == 16


def test_hutchinson_keeps_the_scale_between_its_estimates(x64):
    state, params, scales = None, jnp.ones(2), []
    for curvature in (1.0, 5.0, 7.0, 3.0):
        scale, state = hutchinson_scale(state, curvature * np.eye(2), params, decay=0.5, floor=1.0, every=3)
        scales.append(1 / scale[0] - 1)
    # Estimates of 1 at the first step and of 3 at the fourth: (½·½·1² + ½·3²)/(1 − ½²).
    np.testing.assert_allclose(scales, [1, 1, 1, np.sqrt((0.25 + 4.5) / 0.75)], rtol=1e-12)


def test_hutchinson_sees_the_l2_term_and_the_moving_leaves_only(x64):
    def loss(params):
        return 1.5 * jnp.sum(params["w"] ** 2) + jnp.sum(params["w"]) * params["fixed"]

    params = {"w": jnp.zeros(3), "fixed": jnp.array(2.0)}
    tx = rk_optax.euler(
        loss,
        1.0,
        preconditioner=rk_optax.precondition_by_hutchinson(floor=0.5),
        l2=0.25,
        mask={"w": True, "fixed": False},
    )
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -1 / (3.25 + 0.5), rtol=1e-12)
    assert float(updates["fixed"]) == 0.0
    assert state.preconditioner.mean["fixed"] is None


def test_hutchinson_on_complex_leaves_finds_an_isotropic_curvature(x64):
    params = jnp.array([0.5 + 0.2j, -0.4j])
    tx = rk_optax.euler(
        lambda w: jnp.sum(jnp.array([1.5, 0.5]) * jnp.abs(w) ** 2),
        1.0,
        preconditioner=rk_optax.precondition_by_hutchinson(floor=0.1),
    )
    updates, state = tx.update(jnp.ones_like(params), tx.init(params), params)
    np.testing.assert_allclose(updates, -1 / (np.array([3.0, 1.0]) + 0.1), rtol=1e-12)
    assert state.preconditioner.mean.dtype == jnp.float64


def test_hutchinson_takes_its_products_from_the_loss_where_there_is_a_grad_fn_too(x64):
    tx = rk_optax.euler(
        quadratic,
        1.0,
        grad_fn=lambda params, matrix: 1e6 * params,
        preconditioner=rk_optax.precondition_by_hutchinson(floor=0.1),
    )
    params = jnp.ones(3)
    updates, _ = tx.update(params, tx.init(params), params, matrix=2.0 * jnp.eye(3))
    np.testing.assert_allclose(updates, -1 / 2.1, rtol=1e-12)
