"""ROS2: its order with any matrix, and its stability function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from conftest import network, network_loss
from curve_fit import effective_gradient, misfit
from jax.flatten_util import ravel_pytree

import rk_optax
from rk_optax import LeastSquares, ModelLoss, Ros2, RosenbrockEuler, VectorField


def half_square(outputs):
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(outputs))


@functools.cache
def flow():
    params, data = network(np.float64)
    theta, unravel = ravel_pytree(params)

    def outputs(theta):
        p = unravel(theta)
        return jnp.tanh(data["x"] @ p["w1"] + p["b1"]) @ p["w2"]

    loss = ModelLoss(outputs, lambda out: jnp.mean((out - data["y"]) ** 2))
    gradient = jax.jit(jax.grad(lambda theta: network_loss(unravel(theta), **data)))
    run = scipy.integrate.solve_ivp(
        lambda t, y: -np.asarray(gradient(y)), (0, 0.5), np.asarray(theta), "DOP853", rtol=1e-13, atol=1e-14
    )
    return theta, loss, run.y[:, -1]


def errors_at_the_end(solver, counts):
    theta, loss, end = flow()

    @jax.jit
    def run(count):
        tx = rk_optax.runge_kutta(loss, lambda _: 0.5 / count, solver)

        def step(_, carry):
            theta, state = carry
            change, state = tx.update(jax.grad(loss)(theta), state, theta)
            return theta + change, state

        return jax.lax.fori_loop(0, count, step, (theta, tx.init(theta)))[0]

    return [np.linalg.norm(run(n) - end) for n in counts]


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton", "zero"])
def test_ros2_is_of_order_two_with_any_matrix(curvature, x64):
    errors = errors_at_the_end(Ros2(curvature, 1e-11), (32, 64, 128))
    assert np.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.12)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


def test_rosenbrock_euler_is_of_order_one(x64):
    errors = errors_at_the_end(RosenbrockEuler(tolerance=1e-10), (64, 128))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.1)


def test_without_a_matrix_ros2_is_heuns_method(x64):
    def loss(params):
        return half_square(misfit(params))

    heun, _ = effective_gradient(loss, 0.2, "heun")
    ours, state = effective_gradient(loss, 0.2, Ros2("zero"))
    np.testing.assert_allclose(ours, heun, rtol=1e-12)
    assert (int(state.cost.gradients), int(state.cost.products)) == (2, 0)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("curvature", "gamma", "used"),
    [
        ("hessian", None, 1 - 0.5**0.5),
        ("gauss_newton", None, 1 + 0.5**0.5),
        ("gauss_newton", 0.5, 0.5),
    ],
)
def test_ros2_on_a_quadratic_is_its_stability_function(curvature, gamma, used, x64):
    rates = np.array([0.0, 0.1, 1.0, 7.0, 1e6])
    loss = LeastSquares(lambda theta: np.sqrt(rates) * theta)
    found, _ = effective_gradient(loss, 1.0, Ros2(curvature, 1e-14, 50, used if gamma else None), np.ones(5))
    k1 = -rates / (1 + used * rates)
    k2 = (-rates * (1 + k1) - 2 * k1) / (1 + used * rates)
    np.testing.assert_allclose(-found, 1.5 * k1 + 0.5 * k2, rtol=1e-9, atol=1e-10)


def test_with_half_the_curvature_the_greater_gamma_is_stable_and_the_smaller_is_not(x64):
    """REFERENCES: max|R| 10.7 for γ = 1 − 1/√2 and 0.99 for 1 + 1/√2."""
    rates = jnp.logspace(-2, 6, 400)

    def growth(gamma):
        solver = Ros2("gauss_newton", 1e-10, gamma=gamma)

        def mode(rate, wrong):  # one mode at a time: CG solves a system of one unknown in one iteration
            problem = VectorField(lambda theta, stage: rate * theta)
            object.__setattr__(problem, "gauss_newton", lambda theta: lambda v: wrong * v)
            one = jnp.ones(1)
            return 1 - solver.step(problem, one, rate * one, 1.0, ()).direction[0]

        return float(jnp.abs(jax.jit(jax.vmap(mode))(rates, 0.5 * rates)).max())

    root = 0.5**0.5
    assert growth(1 - root) == pytest.approx(10.7, abs=0.1)
    assert growth(1 + root) == pytest.approx(0.99, abs=0.01)
    assert growth(None) == growth(1 + root)
