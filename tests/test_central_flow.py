"""Flows that gradient descent follows, against gradient descent itself and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rk_optax
from rk_optax.central_flow import complementary

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def gradient_descent(loss_fn, w, h, steps):
    return jax.lax.fori_loop(0, steps, lambda _, w: w - h * jax.grad(loss_fn)(w), w)


def valley(w):
    return 0.5 * w[0] ** 2 + 0.1 * w[0] * w[1] ** 3 + jnp.cosh(w[1])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_implicit_regularisation_is_an_order_closer_than_the_gradient_flow():
    w, errors = jnp.array([1.0, -0.8]), {}
    for h in (0.1, 0.05):
        discrete = gradient_descent(valley, w, h, round(1 / h))
        for field in (None, rk_optax.implicit_gradient_regularization(h)):
            flow = rk_optax.gradient_flow(valley, w, [0.0, 1.0], field=field, **TIGHT)
            errors[h, field is None] = np.abs(flow.params - discrete).max()
    assert 0.8 < np.log2(errors[0.1, True] / errors[0.05, True]) < 1.3
    assert 1.8 < np.log2(errors[0.1, False] / errors[0.05, False]) < 2.3


@pytest.mark.usefixtures("x64")
def test_the_principal_flow_of_a_quadratic_meets_gradient_descent():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    matrix = basis @ np.diag([0.0, 1.0, 4.5]) @ basis.T
    h, times = 0.2, 0.2 * np.arange(0, 11, 2)

    def loss_fn(w):
        return 0.5 * w @ matrix @ w + w @ basis[:, 1]

    flow = rk_optax.gradient_flow(loss_fn, jnp.ones(3), times, field=rk_optax.principal_flow(h), **TIGHT)
    iterates = [gradient_descent(loss_fn, jnp.ones(3), h, n) for n in range(0, 11, 2)]
    np.testing.assert_allclose(flow.values, iterates, atol=1e-8)
    with pytest.raises(ValueError, match="at most 2"):
        rk_optax.gradient_flow(loss_fn, jnp.ones(3), times, field=rk_optax.principal_flow(h, max_parameters=2))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("k", [1, 2, 4])
def test_complementarity_holds_to_rounding(k):
    rng = np.random.default_rng(k)
    solve = jax.jit(complementary)
    for sharp in (0.0, 3.0):
        thirds = rng.normal(size=(k, k, 9))
        thirds = np.exp(2 * rng.normal()) * (thirds + thirds.transpose(1, 0, 2))
        linear = np.einsum("ijm,klm->ijkl", thirds, thirds)
        constant = rng.normal(size=(k, k))
        constant = constant + constant.T - sharp * np.eye(k)
        x = np.asarray(solve(constant, linear))
        left, scale = constant + np.einsum("ijkl,kl->ij", linear, x), np.abs(constant).max()
        assert np.linalg.eigvalsh(x)[0] >= -1e-10 * np.abs(x).max()
        assert np.linalg.eigvalsh(left)[0] >= -1e-9 * scale
        assert abs(np.sum(x * left)) <= 1e-9 * scale * np.trace(x)
    assert np.abs(solve(np.eye(k), linear)).max() == 0
    assert np.isnan(solve(np.full((k, k), np.nan), linear)).all()


@pytest.mark.usefixtures("x64")
def test_two_eigenvalues_at_the_edge_against_gradient_descent():
    # Two sharp directions x, whose sharpness is y: the loss drives y up, and only the oscillation of x holds it.
    def loss_fn(w):
        x, y = w[:2], w[2:]
        return 0.5 * jnp.sum(x**2 * y) - 0.01 * y[0] - 0.03 * y[1]

    eta = 0.05  # 2/η = 40
    solver = rk_optax.CentralFlow(eta, k=3)
    start = jnp.array([1e-3, 1e-3, 39.99, 39.97])
    flow = rk_optax.gradient_flow(loss_fn, start, [0.0, 4.0], solver=solver, step_size=eta / 4)
    assert flow.result == rk_optax.FlowResult.REACHED_END
    np.testing.assert_allclose(flow.params[2:], [40, 40], rtol=1e-5)
    # By hand, y' = 0.01 − σ₁²/2 = 0 and 0.03 − σ₂²/2 = 0.
    np.testing.assert_allclose(flow.state.solver.oscillation, [0, 0.02, 0.06], atol=2e-4)
    np.testing.assert_allclose(flow.state.solver.sharpness[:2], [40, 40], rtol=1e-4)

    # Gradient descent's own mean squares; its sharpness goes round 2/η.
    def step(w, _):
        w = w - eta * jax.grad(loss_fn)(w)
        return w, w

    _, path = jax.lax.scan(step, jnp.array([0.15, 0.26, 40.0, 40.0]), length=4000)
    np.testing.assert_allclose(jnp.mean(path[:, :2] ** 2, axis=0), [0.02, 0.06], rtol=0.05)
    np.testing.assert_allclose(jnp.mean(path[:, 2:], axis=0), [40, 40], rtol=1e-3)


def test_below_the_edge_it_is_the_gradient_flow():
    solver = rk_optax.CentralFlow(0.1, k=2)
    w = jnp.array([1.0, -0.8])
    central = rk_optax.gradient_flow(valley, w, [0.0, 1.0], solver=solver, step_size=0.02)
    euler = rk_optax.gradient_flow(valley, w, [0.0, 1.0], solver="euler", step_size=0.02)
    np.testing.assert_allclose(central.params, euler.params, rtol=1e-6)
    assert (central.state.solver.oscillation == 0).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: rk_optax.CentralFlow(0.0), "learning_rate"),
        (lambda: rk_optax.CentralFlow(0.1, k=3, basis=3), "basis must be larger"),
        (lambda: rk_optax.principal_flow(-1.0), "learning_rate"),
        (
            lambda: rk_optax.gradient_flow(
                valley, jnp.ones(2), [0, 1], solver=rk_optax.CentralFlow(0.1), step_size=0.1, preconditioner=0.5
            ),
            "no preconditioner",
        ),
        (
            lambda: rk_optax.gradient_flow(
                None, jnp.ones(2), [0, 1], grad_fn=lambda w: w, field=rk_optax.implicit_gradient_regularization(0.1)
            ),
            "not known to be differentiable",
        ),
        (
            lambda: rk_optax.gradient_flow(valley, jnp.ones(2), [0, 1], solver=rk_optax.CentralFlow(0.1)),
            "Pass step_size",
        ),
    ],
)
def test_bad_arguments_are_named(make, says):
    with pytest.raises(ValueError, match=says):
        make()
