"""Physics-informed networks: the residuals of a differential equation as a least-squares loss."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial.hermite import hermgauss

import rk_optax
from rk_optax.experiment.tasks.full_batch import FullBatch
from rk_optax.experiment.tasks.task import Params


def poisson(seed: int) -> FullBatch:
    """−Δu = f on the unit square with u = sin(πx) sin(2πy): 900 points inside, 30 on each side, tanh 2-32-32-32-1.

    The loss is ½(mean r² inside + 100 mean r² on the boundary); the error is relative in L2, on 2,000 other points.
    """
    inside, sides, elsewhere, start = jax.random.split(jax.random.key(seed), 4)
    x, t = jax.random.uniform(inside, (900, 2)), jax.random.uniform(sides, (4, 30))
    zero, one = jnp.zeros(30), jnp.ones(30)
    edges = [(t[0], zero), (t[1], one), (zero, t[2]), (one, t[3])]
    boundary = jnp.concatenate([jnp.stack(edge, axis=1) for edge in edges])

    def solution(x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.pi * x[0]) * jnp.sin(2 * jnp.pi * x[1])

    def equation(params: Params, x: jax.Array) -> jax.Array:
        second = [_second_derivative(lambda y: network(params, y), x, unit) for unit in jnp.eye(2)]
        return sum(second) + 5 * jnp.pi**2 * solution(x)

    def at_boundary(params: Params, x_boundary: jax.Array) -> jax.Array:
        return network(params, x_boundary)

    loss_fn = rk_optax.LeastSquares(
        {"equation": equation, "boundary": at_boundary},
        weights={"equation": 1.0, "boundary": 100.0},
        pointwise=("x", "x_boundary"),
        reduction="mean",
    )
    points = jax.random.uniform(elsewhere, (2000, 2))
    return FullBatch(
        loss_fn,
        initial_network(start, (2, 32, 32, 32, 1)),
        {"x": x, "x_boundary": boundary},
        _relative_error(points, jax.vmap(solution)(points)),
        "relative L2 error",
    )


VISCOSITY = 0.01 / np.pi


def burgers(seed: int) -> FullBatch:
    """u_t + u u_x = ν u_xx on (−1, 1) × (0, 1), u(x, 0) = −sin(πx), u(±1, t) = 0, ν = 0.01/π: a shock forms at x = 0.

    1,000 points inside, 100 at t = 0 and 50 on each side, tanh 2-32-32-32-1; the error is relative in L2, on a grid.
    The points inside are cubes of uniform ones in x, so denser at the shock: uniform ones do not see it, and a network
    can then have any loss and an error of 0.2.
    """
    inside, first, sides, start = jax.random.split(jax.random.key(seed), 4)
    xt = jax.random.uniform(inside, (1000, 2), minval=jnp.array([-1.0, 0.0]), maxval=1.0)
    xt = xt.at[:, 0].power(3)
    x_start = jax.random.uniform(first, (100,), minval=-1.0, maxval=1.0)
    t_side = jax.random.uniform(sides, (100,))
    x_side = jnp.where(jnp.arange(100) < 50, -1.0, 1.0)

    def equation(params: Params, xt: jax.Array) -> jax.Array:
        def u(point: jax.Array) -> jax.Array:
            return network(params, point)

        value, (u_x, u_t) = jax.value_and_grad(u)(xt)
        return u_t + value * u_x - VISCOSITY * _second_derivative(u, xt, jnp.array([1.0, 0.0]))

    def at_start(params: Params, x_start: jax.Array) -> jax.Array:
        return network(params, jnp.stack([x_start, jnp.zeros_like(x_start)])) + jnp.sin(jnp.pi * x_start)

    def at_side(params: Params, side: jax.Array) -> jax.Array:
        return network(params, side)

    loss_fn = rk_optax.LeastSquares(
        {"equation": equation, "start": at_start, "side": at_side},
        weights={"equation": 1.0, "start": 10.0, "side": 10.0},
        pointwise=("xt", "x_start", "side"),
        reduction="mean",
    )
    grid = np.stack(np.meshgrid(np.linspace(-1, 1, 81), np.linspace(0, 1, 26)), axis=-1).reshape(-1, 2)
    return FullBatch(
        loss_fn,
        initial_network(start, (2, 32, 32, 32, 1)),
        {"xt": xt, "x_start": x_start, "side": jnp.stack([x_side, t_side], axis=1)},
        _relative_error(jnp.asarray(grid, xt.dtype), jnp.asarray(burgers_solution(*grid.T), xt.dtype)),
        "relative L2 error",
    )


def burgers_solution(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    """The exact solution by the Cole–Hopf transformation, its integrals by Gauss–Hermite quadrature, in float64."""
    nodes, weights = hermgauss(120)
    shifted = x[..., None] - np.sqrt(4 * VISCOSITY * t[..., None]) * nodes
    # The exponent less its largest value, which cancels in the quotient.
    exponent = -np.cos(np.pi * shifted) / (2 * np.pi * VISCOSITY)
    kernel = weights * np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    return -np.sum(np.sin(np.pi * shifted) * kernel, axis=-1) / np.sum(kernel, axis=-1)


def initial_network(key: jax.Array, widths: tuple[int, ...]) -> Params:
    """Glorot-normal weights and zero biases."""
    glorot = jax.nn.initializers.glorot_normal()
    keys = jax.random.split(key, len(widths) - 1)
    shapes = itertools.pairwise(widths)
    return [{"w": glorot(k, shape), "b": jnp.zeros(shape[1])} for k, shape in zip(keys, shapes, strict=True)]


def network(params: Params, x: jax.Array) -> jax.Array:
    """A tanh network at one point; a scalar."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[0]


def _second_derivative(u: Callable[[jax.Array], jax.Array], x: jax.Array, unit: jax.Array) -> jax.Array:
    unit = unit.astype(x.dtype)
    return jax.jvp(lambda y: jax.jvp(u, (y,), (unit,))[1], (x,), (unit,))[1]


def _relative_error(points: jax.Array, values: jax.Array) -> Callable[[Params], jax.Array]:
    def error(params: Params) -> jax.Array:
        predicted = jax.vmap(lambda x: network(params, x))(points)
        return jnp.linalg.norm(predicted - values) / jnp.linalg.norm(values)

    return error
