"""Full-batch problems with a known solution, on which solvers race: stiff, deterministic, small enough for one core."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial.hermite import hermgauss
from scipy.optimize import brentq
from sklearn.datasets import load_digits

import rk_optax

Params = Any


class Problem(NamedTuple):
    """A loss, where to start, and how far from the solution one is."""

    loss_fn: Callable[..., jax.Array]  # loss_fn(params, **data)
    params: Params
    data: dict[str, jax.Array]
    error: Callable[[Params], jax.Array]
    error_name: str


# --- Physics-informed networks -------------------------------------------------------------------------------------


def poisson(seed: int) -> Problem:
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
    return Problem(
        loss_fn,
        initial_network(start, (2, 32, 32, 32, 1)),
        {"x": x, "x_boundary": boundary},
        _relative_error(points, jax.vmap(solution)(points)),
        "relative L2 error",
    )


VISCOSITY = 0.01 / np.pi


def burgers(seed: int) -> Problem:
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
    return Problem(
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


# --- Convex problems of prescribed stiffness -----------------------------------------------------------------------


def logistic(seed: int, condition: float = 1e4, examples: int = 400, features: int = 40) -> Problem:
    """Logistic regression whose Hessian has the given condition number at the optimum; run it in float64.

    The features' singular values are log-spaced; their spread is found by root search. The error is ‖w − w*‖/‖w*‖.
    """

    def at(spread: float) -> tuple[float, Any]:
        x, y, l2 = _logistic_data(seed, spread, examples, features)
        optimum, hessian = _logistic_optimum(x, y, l2)
        return float(np.linalg.cond(hessian)), (x, y, l2, optimum)

    spread: Any = brentq(lambda spread: np.log(at(spread)[0] / condition), 0.0, np.log10(condition) + 2, xtol=1e-6)
    x, y, l2, optimum = at(spread)[1]

    def loss_fn(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.logaddexp(0, -y * (x @ w))) + 0.5 * l2 * w @ w

    best = jnp.asarray(optimum)
    return Problem(
        loss_fn,
        jnp.zeros(features),
        {"x": jnp.asarray(x), "y": jnp.asarray(y)},
        lambda w: jnp.linalg.norm(w - best) / jnp.linalg.norm(best),
        "‖w − w*‖/‖w*‖",
    )


def _logistic_data(seed: int, spread: float, examples: int, features: int) -> tuple[np.ndarray, np.ndarray, float]:
    rng = np.random.default_rng(seed)
    left, _ = np.linalg.qr(rng.normal(size=(examples, features)))
    right, _ = np.linalg.qr(rng.normal(size=(features, features)))
    x = left * np.logspace(0, -spread / 2, features) * np.sqrt(examples) @ right.T
    # Noisy labels: the classes overlap, so that the optimum is finite and the logistic curvature about 1/4.
    y = np.sign(x @ right @ rng.normal(size=features) + 0.5 * rng.normal(size=examples))
    return x, y, 0.1 * 10**-spread


def _logistic_optimum(x: np.ndarray, y: np.ndarray, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Damped Newton iterations, and the Hessian where they end."""

    def hessian(w: np.ndarray, p: np.ndarray) -> np.ndarray:
        return (x.T * (p * (1 - p))) @ x / len(y) + l2 * np.eye(len(w))

    def wrong(w: np.ndarray) -> np.ndarray:  # the probability of the other label
        return 1 / (1 + np.exp(y * (x @ w)))

    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = wrong(w)
        step = np.linalg.solve(hessian(w, p), l2 * w - x.T @ (y * p) / len(y))
        w = w - step * min(1, max(5, np.linalg.norm(w)) / np.linalg.norm(step))
        if np.linalg.norm(step) < 1e-14 * (1 + np.linalg.norm(w)):
            break
    return w, hessian(w, wrong(w))


def gp_dual(seed: int, points: int = 500, noise: float = 0.05) -> Problem:
    """The dual of Gaussian-process regression, (½αᵀ(K + σ²I)α − yᵀα)/n, with a Matérn 3/2 kernel on the unit square.

    The error is relative in the norm of K + σ²I.
    """
    rng = np.random.default_rng(seed)
    inputs = rng.uniform(size=(points, 2))
    distance = np.sqrt(3) * np.linalg.norm(inputs[:, None] - inputs[None], axis=-1) / 0.3
    matrix = (1 + distance) * np.exp(-distance) + noise**2 * np.eye(points)
    y = np.sin(6 * inputs[:, 0]) * np.cos(4 * inputs[:, 1]) + noise * rng.normal(size=points)
    best = np.linalg.solve(matrix, y)
    scale = float(best @ matrix @ best)

    def loss_fn(alpha: jax.Array, matrix: jax.Array, y: jax.Array) -> jax.Array:
        return (0.5 * alpha @ (matrix @ alpha) - y @ alpha) / points

    device_matrix, device_best = jnp.asarray(matrix, float), jnp.asarray(best, float)

    def error(alpha: jax.Array) -> jax.Array:
        gap = alpha - device_best.astype(alpha.dtype)
        return jnp.sqrt(gap @ (device_matrix.astype(alpha.dtype) @ gap) / scale)

    return Problem(
        loss_fn,
        jnp.zeros(points),
        {"matrix": jnp.asarray(matrix, float), "y": jnp.asarray(y, float)},
        error,
        "relative error, energy norm",
    )


# --- A small network, all of its data at every step ----------------------------------------------------------------


def digits(seed: int, l2: float = 1e-3) -> Problem:
    """Cross-entropy of a tanh network 64-64-10 on scikit-learn's digits, all 1,797 of them, plus (l2/2)‖θ‖².

    The error is the loss itself.
    """
    examples: Any = load_digits()

    def model(params: Params, x: jax.Array) -> tuple[jax.Array, Params]:
        hidden = jnp.tanh(x @ params[0]["w"] + params[0]["b"])
        # The weights are outputs too: so the penalty is part of the Gauss–Newton model.
        return hidden @ params[1]["w"] + params[1]["b"], params

    def output_loss(outputs: Any, y: jax.Array) -> jax.Array:
        logits, params = outputs
        log_p = jax.nn.log_softmax(logits)
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return -jnp.mean(jnp.take_along_axis(log_p, y[:, None], axis=1)) + 0.5 * l2 * squares

    loss_fn = rk_optax.ModelLoss(model, output_loss)
    data = {"x": jnp.asarray(examples.data / 16, jnp.float32), "y": jnp.asarray(examples.target)}
    return Problem(
        loss_fn,
        initial_network(jax.random.key(seed), (64, 64, 10)),
        data,
        lambda params: loss_fn(params, **data),
        "training loss",
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {
    "poisson": poisson,
    "burgers": burgers,
    "logistic": logistic,
    "gp_dual": gp_dual,
    "digits": digits,
}
