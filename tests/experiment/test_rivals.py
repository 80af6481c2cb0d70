"""The rivals take the steps that their papers say, by oracles that know nothing of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rk_optax
from rk_optax.experiment.config import EntrantConfig
from rk_optax.experiment.entrants import build_optimizer
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.rivals import broyden_inverse, engd_w, optimistix_lm, somax_egn, spring, ssbroyden

pytestmark = pytest.mark.usefixtures("x64")


def residual_fn(params, x, y):
    return jnp.tanh(x @ params["w"] + params["b"]) @ params["v"] - y


def problem(points=12):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(2, 4)), "b": rng.normal(size=4), "v": rng.normal(size=4)}
    data = {"x": rng.normal(size=(points, 2)), "y": rng.normal(size=points)}
    return rk_optax.LeastSquares(residual_fn), jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, data)


def jacobian(params, data):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return flat, unravel, np.asarray(jax.jacfwd(lambda p: residual_fn(unravel(p), **data))(flat))


def run(tx, loss_fn, params, data, steps):
    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params, **data)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=lambda p: loss_fn(p, **data), **data
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("points", [12, 20])
def test_engd_w_steps_by_the_damped_least_squares_solution(points):
    loss_fn, params, data = problem(points)
    flat, unravel, rows = jacobian(params, data)
    residual, damping = np.asarray(residual_fn(params, **data)), 1e-3
    stacked = np.vstack([rows, np.sqrt(damping) * np.eye(flat.size)])
    step = -np.linalg.lstsq(stacked, np.append(residual, np.zeros(flat.size)), rcond=None)[0]
    new, _ = run(engd_w(loss_fn, 0.25, damping), loss_fn, params, data, 1)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(new)[0], flat + 0.25 * step, rtol=1e-9)
    # Without a rate it takes the best of a grid of 31.
    losses = jax.jit(jax.vmap(lambda rate: loss_fn(unravel(flat + rate * step), **data)))
    best = 0.5 ** float(np.argmin(losses(0.5 ** np.arange(31))))
    new, state = run(engd_w(loss_fn, None, damping), loss_fn, params, data, 1)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(new)[0], flat + best * step, rtol=1e-9)
    assert (int(state.cost.rows), int(state.cost.losses)) == (points, 31)


@pytest.mark.parametrize("bound", [None, 1e-4])
def test_spring_is_its_formula(bound):
    loss_fn, params, data = problem()
    damping, momentum, rate = 1e-2, 0.8, 0.3
    theta, unravel, _ = jacobian(params, data)
    phi = np.zeros(theta.size)
    for _ in range(3):
        _, _, rows = jacobian(unravel(jnp.asarray(theta)), data)
        residual = np.asarray(residual_fn(unravel(jnp.asarray(theta)), **data))
        kernel = rows @ rows.T + damping * np.eye(len(rows))
        phi = momentum * phi + rows.T @ np.linalg.solve(kernel, -residual - momentum * rows @ phi)
        size = rate if bound is None else min(rate, np.sqrt(bound) / np.linalg.norm(phi))
        theta = theta + size * phi
    new, _ = run(spring(loss_fn, rate, damping, momentum, bound), loss_fn, params, data, 3)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(new)[0], theta, rtol=1e-8)


@pytest.mark.parametrize("fresh", [True, False])
def test_broydens_inverse_fulfils_the_secant_equation_and_stays_positive(fresh):
    rng = np.random.default_rng(1)
    root = np.eye(6) if fresh else rng.normal(size=(6, 6))
    inverse, s = root @ root.T, rng.normal(size=6)
    hessian = rng.normal(size=(6, 6))
    y = hessian @ hessian.T @ s
    length = s @ np.linalg.solve(inverse, s)
    new = np.asarray(jax.jit(broyden_inverse)(inverse, inverse @ y, s, y, length, fresh))
    np.testing.assert_allclose(new @ y, s, rtol=0, atol=1e-14 * np.linalg.norm(new, 2) * np.linalg.norm(y))
    np.testing.assert_allclose(new, new.T, rtol=1e-12)
    assert np.linalg.eigvalsh(new)[0] > 0


@pytest.mark.slow
def test_ssbroyden_finds_the_minimum_of_rosenbrock_and_of_a_stiff_quadratic():
    def rosenbrock(w):
        return jnp.sum(100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2)

    w, state = run(ssbroyden(rosenbrock), rosenbrock, jnp.full(4, -1.2), {}, 80)
    np.testing.assert_allclose(w, 1, rtol=1e-8)
    assert 80 <= int(state.cost.gradients) < 200

    scales = jnp.logspace(0, 4, 10)

    def quadratic(w):
        return 0.5 * jnp.sum(scales * w**2)

    # Far fewer steps than gradient descent, whose error falls by 1e-4 of itself a step.
    w, _ = run(ssbroyden(quadratic), quadratic, jnp.ones(10), {}, 60)
    assert quadratic(w) < 1e-16 * quadratic(jnp.ones(10))


def test_somax_and_optimistix_solve_a_linear_problem_exactly():
    rng = np.random.default_rng(2)
    matrix, y = jnp.asarray(rng.normal(size=(9, 3))), jnp.asarray(rng.normal(size=9))
    loss_fn = rk_optax.LeastSquares(lambda p, matrix, y: matrix @ p["w"] - y)
    data, start = {"matrix": matrix, "y": y}, {"w": jnp.zeros(3)}
    best = np.linalg.lstsq(matrix, y, rcond=None)[0]
    pytest.importorskip("optimistix")
    found, _ = run(optimistix_lm(loss_fn, 5), loss_fn, start, data, 4)
    np.testing.assert_allclose(found["w"], best, rtol=1e-8)
    pytest.importorskip("somax")
    step = np.linalg.solve(matrix.T @ matrix + 0.1 * np.eye(3), matrix.T @ y)
    found, _ = run(somax_egn(loss_fn, 1.0, 0.1, adapts=False), loss_fn, start, data, 1)
    np.testing.assert_allclose(found["w"], step, rtol=1e-8)
    found, _ = run(somax_egn(loss_fn, 1.0, 1e-2), loss_fn, start, data, 40)
    np.testing.assert_allclose(found["w"], best, rtol=1e-6)


@pytest.mark.slow
def test_rivals_are_entrants_of_a_race():
    loss_fn, params, data = problem()
    for config in (
        EntrantConfig("ssbroyden"),
        EntrantConfig("engd_w", options={"damping": 1e-6}),
        EntrantConfig("spring", options={"momentum": 0.5}),
    ):
        optimizer = build_optimizer("entrants.x", config, loss_fn, has_rate=False)
        tx = optimizer.make(loss_fn, None, None)
        before = tx.init(params)
        new, after = run(tx, loss_fn, params, data, 2)
        assert loss_fn(new, **data) < loss_fn(params, **data)
        assert sum(map(int, optimizer.cost(before, after, 0))) > 0
    with pytest.raises(UsageError, match="LeastSquares"):
        build_optimizer("entrants.x", EntrantConfig("engd_w"), lambda p: jnp.sum(p), has_rate=False)
    with pytest.raises(UsageError, match="takes no learning_rate"):
        build_optimizer("entrants.x", EntrantConfig("ssbroyden", trials=(0.1,)), loss_fn, has_rate=True)
