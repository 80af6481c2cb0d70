"""Stiff layers: the linear part exactly, its steady state, its orders; the baseline whose steady state is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.linalg import expm

from rk_optax import Etd
from rk_optax.networks import Controls, IntegratingFactorEuler, Semilinear, integrate, orthogonal, rotated

from .cases import largest_difference, order

CONSTANT = Semilinear(lambda theta, t: theta["rate"], lambda theta, y, t: jnp.broadcast_to(theta["source"], y.shape))


@pytest.mark.parametrize("reach", [1.0, 100.0])
@pytest.mark.usefixtures("x64")
def test_the_steady_state_is_exact_and_that_of_the_integrating_factor_wrong(reach):
    theta = Controls.constant_in_time({"rate": jnp.array([reach]), "source": jnp.array([100.0 * reach])}, (0,))
    grid = np.arange(41.0)
    for solver in (Etd(1, "given"), Etd(2, "given")):
        end = integrate(CONSTANT, theta, jnp.zeros((1, 1)), grid, solver, unroll=1)
        np.testing.assert_allclose(end, 100.0, rtol=1e-14)
    wrong = integrate(CONSTANT, theta, jnp.zeros((1, 1)), grid, IntegratingFactorEuler(), unroll=1)
    np.testing.assert_allclose(wrong, 100 * reach / np.expm1(reach), rtol=1e-12)


@pytest.mark.parametrize(
    ("solver", "expected"), [(Etd(1, "given"), 1), (Etd(2, "given"), 2), (IntegratingFactorEuler(), 1)]
)
@pytest.mark.usefixtures("x64")
def test_orders_on_a_stiff_system_that_radau_solves(solver, expected):
    rates = np.array([1.0, 50.0])
    coupled = Semilinear(lambda theta, t: theta, lambda theta, y, t: jnp.sin(y[:, ::-1]) + jnp.cos(t))
    radau = solve_ivp(
        lambda t, y: -rates * y + np.sin(y[::-1]) + np.cos(t), (0, 1), [1.0, 0.5], "Radau", rtol=1e-11, atol=1e-12
    )
    block = Controls.constant_in_time(jnp.asarray(rates), (0,))
    run = jax.jit(lambda grid: integrate(coupled, block, jnp.array([[1.0, 0.5]]), grid, solver, unroll=1))

    def error(n):
        return largest_difference(run(jnp.linspace(0, 1, n + 1))[0], radau.y[:, -1])

    assert expected - 0.3 < order(error, (128, 256)) < expected + 0.4


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_dense_linear_part_is_exact_in_its_eigenbasis_and_trainable():
    rng = np.random.default_rng(0)
    params = {"skew": jnp.asarray(rng.normal(size=(4, 4))), "rate": jnp.asarray(rng.normal(size=4)) * 4}
    y = jnp.asarray(rng.normal(size=(3, 4)))

    def run(params, rest):
        q = orthogonal(params["skew"])
        layer = Semilinear(lambda theta, t: jax.nn.softplus(theta), rotated(rest, q))
        block = Controls.constant_in_time(params["rate"], (0,))
        return integrate(layer, block, y @ q, (0, 1.0, 3.0), Etd(2, "given")) @ q.T

    q = np.asarray(orthogonal(params["skew"]))
    np.testing.assert_allclose(q @ q.T, np.eye(4), atol=1e-14)
    matrix = -q @ np.diag(np.log1p(np.exp(params["rate"]))) @ q.T

    def still(theta, y, t):
        return jnp.zeros_like(y)

    np.testing.assert_allclose(run(params, still), y @ expm(3 * matrix), atol=1e-13)
    gradient = jax.jit(jax.grad(lambda p: run(p, lambda theta, y, t: jnp.tanh(y)).sum()))(params)
    assert all(np.isfinite(g).all() and g.any() for g in jax.tree.leaves(gradient))


@pytest.mark.usefixtures("x64")
def test_any_other_solver_takes_the_whole_layer_and_reports_work_with_the_split():
    block = Controls({"rate": jnp.array([[1.0], [3.0]]), "source": jnp.ones((2, 1))}, (0, 1))
    run = functools.partial(integrate, CONSTANT, block, jnp.ones((2, 1)), np.linspace(0, 1, 33), unroll=1)
    exact = run("rk4")
    assert largest_difference(run(Etd(2, "given")), exact) < 1e-3
    _, report = run(Etd(2, "given"), report=["error", "states"])
    assert report.error.shape == (32, 2)
    assert int(report.cost.gradients) == 64
