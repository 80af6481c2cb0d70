"""The problems of a race have the solutions that they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rk_optax.experiment.tasks.pinn import VISCOSITY, allen_cahn_solution, burgers_solution, network
from rk_optax.experiment.tasks.problems import PROBLEMS

pytestmark = pytest.mark.usefixtures("x64")


def test_burgers_solution_solves_the_equation_and_starts_where_it_should():
    x, t, d = np.linspace(-0.9, 0.9, 37), np.full(37, 0.15), 1e-4  # before the shock: differences see it all

    def u(dx=0.0, dt=0.0):
        return burgers_solution(x + dx, t + dt)

    u_t, u_x = (u(dt=d) - u(dt=-d)) / (2 * d), (u(dx=d) - u(dx=-d)) / (2 * d)
    u_xx = (u(dx=d) - 2 * u() + u(dx=-d)) / d**2
    np.testing.assert_allclose(u_t + u() * u_x - VISCOSITY * u_xx, 0, atol=1e-4)
    np.testing.assert_allclose(burgers_solution(x, 0 * t), -np.sin(np.pi * x), atol=1e-12)
    # The published value of the slope at the origin, at the time when it is steepest (Basdevant et al., 1986).
    slope = (burgers_solution(np.array([1e-6]), np.array([1.6037 / np.pi])) / 1e-6).item()
    assert abs(-slope - 152.00516) < 0.01


@pytest.mark.slow
def test_poisson_is_the_problem_as_stated():
    problem = PROBLEMS["poisson"](0)
    x, edge = problem.source["x"], problem.source["x_boundary"]
    assert (x.shape, edge.shape) == ((900, 2), (120, 2))
    assert jnp.all(jnp.any((edge == 0) | (edge == 1), axis=1))

    def u(x):
        return network(problem.params, x)

    laplace = jax.jit(jax.vmap(lambda p: jnp.trace(jax.hessian(u)(p))))(x)
    source = 5 * np.pi**2 * np.sin(np.pi * x[:, 0]) * np.sin(2 * np.pi * x[:, 1])
    expected = 0.5 * jnp.mean((laplace + source) ** 2) + 50 * jnp.mean(jax.vmap(u)(edge) ** 2)
    loss = problem.score(problem.params, {}).loss
    np.testing.assert_allclose(loss, expected, rtol=1e-10)


@pytest.mark.parametrize("condition", [1e2, 1e6])
def test_the_hessian_of_the_logistic_regression_has_the_condition_number_asked_for(condition):
    problem = PROBLEMS["logistic"](0, condition=condition, examples=100, features=10)
    w = jnp.zeros(10)

    @jax.jit
    def newton(w):  # again, by JAX
        h = jax.hessian(problem.loss_fn)(w, **problem.source)
        step = jnp.linalg.solve(h, jax.grad(problem.loss_fn)(w, **problem.source))
        return w - step * jnp.minimum(1, jnp.maximum(3, jnp.linalg.norm(w)) / jnp.linalg.norm(step)), h

    for _ in range(60):
        w, h = newton(w)
    assert problem.error(w) < 1e-6
    assert np.linalg.cond(h) == pytest.approx(condition, rel=1e-3)


def test_the_gp_dual_has_its_minimum_where_the_error_is_zero():
    problem = PROBLEMS["gp_dual"](0, points=40)
    best = jnp.linalg.solve(problem.source["matrix"], problem.source["y"])
    assert problem.error(best) < 1e-10
    assert problem.error(problem.params) == pytest.approx(1.0)
    assert jnp.abs(jax.grad(problem.loss_fn)(best, **problem.source)).max() < 1e-12


@pytest.mark.slow
def test_the_structured_loss_of_digits_is_cross_entropy_with_a_penalty():
    problem = PROBLEMS["digits"](0, l2=1e-2)
    p, (x, y) = problem.params, (problem.source["x"], problem.source["y"])
    logits = jnp.tanh(x @ p[0]["w"] + p[0]["b"]) @ p[1]["w"] + p[1]["b"]
    plain = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    plain += 0.5 * 1e-2 * optax.tree_utils.tree_norm(p, squared=True)
    np.testing.assert_allclose(problem.loss_fn(p, **problem.source), plain, rtol=1e-6)


def test_allen_cahns_solution_solves_the_equation_and_starts_where_it_should():
    x, d = np.linspace(-0.9, 0.9, 19), 2e-3

    def u(dx=0.0):
        return allen_cahn_solution(x + dx, np.array([0.5 - d, 0.5, 0.5 + d]))

    mid = u()
    u_t = (mid[2] - mid[0]) / (2 * d)
    u_xx = (u(d)[1] - 2 * mid[1] + u(-d)[1]) / d**2
    np.testing.assert_allclose(u_t, 1e-4 * u_xx + 5 * (mid[1] - mid[1] ** 3), atol=5e-4)
    np.testing.assert_allclose(allen_cahn_solution(x, np.array([0.0, 1.0]))[0], x**2 * np.cos(np.pi * x), atol=1e-5)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["burgers_mild", "allen_cahn"])
def test_the_periodic_problems_are_as_stated(name):
    problem = PROBLEMS[name](0)
    (x, t), start = problem.source["xt"].T, problem.source["x_start"]
    assert problem.source["xt"].shape == (4096, 2)
    assert sum(leaf.size for leaf in jax.tree.leaves(problem.params)) == 1361

    def u(x, t):
        return network(problem.params, jnp.stack([jnp.cos(jnp.pi * x), jnp.sin(jnp.pi * x), t]))

    @jax.jit
    @jax.vmap
    def parts(x, t):
        return u(x, t), jax.grad(u)(x, t), jax.grad(u, 1)(x, t), jax.grad(jax.grad(u))(x, t)

    value, u_x, u_t, u_xx = map(np.asarray, parts(x, t))
    start = np.asarray(start)
    equation, first = {
        "burgers_mild": (u_t + value * u_x - 0.01 * u_xx, -np.sin(np.pi * start)),
        "allen_cahn": (u_t - 1e-4 * u_xx + 5 * value**3 - 5 * value, start**2 * np.cos(np.pi * start)),
    }[name]
    gap = np.asarray(jax.jit(jax.vmap(u))(start, 0 * start)) - first
    expected = 0.5 * np.mean(equation**2) + 5 * np.mean(gap**2)
    np.testing.assert_allclose(problem.score(problem.params, {}).loss, expected, rtol=1e-10)
    np.testing.assert_allclose(*(parts(side * np.ones(3), np.arange(3.0))[0] for side in (1, -1)))


@pytest.mark.slow
def test_poisson_in_five_dimensions_is_the_problem_as_stated_at_new_points_each_step():
    fixed, moving = (PROBLEMS["poisson_5d"](0, inside=30, boundary=20, new_points=new) for new in (False, True))
    assert sum(leaf.size for leaf in jax.tree.leaves(fixed.params)) == 10065
    x, edge = fixed.source["x"], fixed.source["x_boundary"]
    assert jnp.all(jnp.any((edge == 0) | (edge == 1), axis=1))

    def u(x):
        return network(fixed.params, x)

    laplace = jax.jit(jax.vmap(lambda p: jnp.trace(jax.hessian(u)(p))))(x)
    gap = jax.vmap(u)(edge) - jnp.cos(np.pi * edge).sum(1)
    expected = 0.5 * jnp.mean((laplace + np.pi**2 * jnp.cos(np.pi * x).sum(1)) ** 2) + 0.5 * jnp.mean(gap**2)
    np.testing.assert_allclose(fixed.score(fixed.params, {}).loss, expected, rtol=1e-10)
    np.testing.assert_allclose(moving.score(fixed.params, {}).loss, expected, rtol=1e-10)
    assert fixed.data(fixed.source, None, {}, None) is fixed.source
    keys = [jax.random.key_data(jax.random.key(i)) for i in range(2)]
    first, second = (moving.data(moving.source, None, {}, key) for key in keys)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, fixed.source)
    assert not jnp.any(first["x"] == second["x"])
