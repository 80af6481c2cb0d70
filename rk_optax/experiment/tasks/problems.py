"""The full-batch problems on which solvers race: stiff, deterministic, small enough for one core."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from sklearn.datasets import load_digits

import rk_optax
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.tasks.full_batch import FullBatch
from rk_optax.experiment.tasks.lorenz96 import lorenz96
from rk_optax.experiment.tasks.pinn import allen_cahn, burgers, burgers_mild, initial_network, poisson, poisson_5d
from rk_optax.experiment.tasks.task import Params


def logistic(seed: int, condition: float = 1e4, examples: int = 400, features: int = 40) -> FullBatch:
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

    def error(w: jax.Array) -> jax.Array:
        return jnp.linalg.norm(w - best) / jnp.linalg.norm(best)

    data = {"x": jnp.asarray(x), "y": jnp.asarray(y)}
    return FullBatch(loss_fn, jnp.zeros(features), data, error, "‖w − w*‖/‖w*‖")


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

    def other_label(w: np.ndarray) -> np.ndarray:  # its probability
        return 1 / (1 + np.exp(y * (x @ w)))

    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = other_label(w)
        step = np.linalg.solve(hessian(w, p), l2 * w - x.T @ (y * p) / len(y))
        w = w - step * min(1, max(5, np.linalg.norm(w)) / np.linalg.norm(step))
        if np.linalg.norm(step) < 1e-14 * (1 + np.linalg.norm(w)):
            break
    return w, hessian(w, other_label(w))


def gp_dual(seed: int, points: int = 500, noise: float = 0.05) -> FullBatch:
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

    data = {"matrix": device_matrix, "y": jnp.asarray(y, float)}
    return FullBatch(loss_fn, jnp.zeros(points), data, error, "relative error, energy norm")


def digits(seed: int, l2: float = 1e-3) -> FullBatch:
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
    start = initial_network(jax.random.key(seed), (64, 64, 10))
    return FullBatch(loss_fn, start, data, lambda params: loss_fn(params, **data), "training loss")


def factorisation(
    seed: int, rows: int = 40, columns: int = 30, rank: int = 4, condition: float = 1e3, observed: float = 0.5
) -> FullBatch:
    """The factors of a matrix of low rank from a part of its entries; run it in float64.

    The singular values are log-spaced from 1 to 1/condition, `rank` is known, and so is a random fraction `observed`
    of the entries, more than `rank` in each row and column. The start is normal, of the size of the solution. The error
    is ‖LRᵀ − A‖/‖A‖ over all entries.
    """
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (rows, columns))
    matrix = left * np.logspace(0, -np.log10(condition), rank) @ right.T
    row, column = _known_entries(rng, rows, columns, round(observed * rows * columns), rank + 1)

    def residual_fn(params: Params, row: jax.Array, column: jax.Array, entry: jax.Array) -> jax.Array:
        return params["left"][row] @ params["right"][column] - entry

    whole = jnp.asarray(matrix)
    scale = float(np.sqrt(1 / (rows * columns)) ** 0.5 / rank**0.25)
    sizes = {"left": rows, "right": columns}
    start = {name: jnp.asarray(scale * rng.normal(size=(size, rank))) for name, size in sizes.items()}

    def error(params: Params) -> jax.Array:
        return jnp.linalg.norm(params["left"] @ params["right"].T - whole) / jnp.linalg.norm(whole)

    data = {"row": jnp.asarray(row), "column": jnp.asarray(column), "entry": jnp.asarray(matrix[row, column])}
    loss_fn = rk_optax.LeastSquares(residual_fn, pointwise=tuple(data))
    return FullBatch(loss_fn, start, data, error, "relative error, all entries")


def _known_entries(
    rng: np.random.Generator, rows: int, columns: int, count: int, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of `count` entries, at least `least` in each row and column."""
    for _ in range(1000):
        row, column = np.divmod(np.sort(rng.permutation(rows * columns)[:count]), columns)
        if min(np.bincount(row, minlength=rows).min(), np.bincount(column, minlength=columns).min()) >= least:
            return row, column
    raise UsageError(f"problem_options: observed leaves a row or a column with fewer than {least} entries: raise it")


# A new problem needs its name here.
_ALL = (poisson, poisson_5d, burgers, burgers_mild, allen_cahn, logistic, gp_dual, factorisation, digits, lorenz96)
PROBLEMS: dict[str, Callable[..., FullBatch]] = {problem.__name__: problem for problem in _ALL}
