"""Physics-informed networks: the residuals of a differential equation as a least-squares loss."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.polynomial.hermite import hermgauss
from scipy.integrate import solve_ivp

import rk_optax
from rk_optax.experiment.tasks.full_batch import FullBatch
from rk_optax.experiment.tasks.task import Data, Params


def network(params: Params, x: jax.Array) -> jax.Array:
    """A tanh network at one point; a scalar."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[0]


def _pinn(
    key: jax.Array,
    widths: tuple[int, ...],
    terms: Mapping[str, tuple[float, Callable[..., jax.Array]]],
    data: Data,
    points: Any,
    values: Any,
    u: Callable[[Params, jax.Array], jax.Array] = network,
    **options: Any,
) -> FullBatch:
    """A problem whose error is relative in L2, from the `values` of the solution at some `points`.

    Each of the `terms` of its loss is a weight and the residual at one point, which takes the `data` by name; `u` is
    the solution as the network of these `widths` has it. Further options are those of `FullBatch`.
    """
    points, values = jnp.asarray(points, float), jnp.asarray(values, float)

    def error(params: Params) -> jax.Array:
        predicted = jax.vmap(lambda x: u(params, x))(points)
        return jnp.linalg.norm(predicted - values) / jnp.linalg.norm(values)

    loss_fn = rk_optax.LeastSquares(
        {name: residual for name, (_, residual) in terms.items()},
        weights={name: weight for name, (weight, _) in terms.items()},
        pointwise=tuple(data),
        reduction="mean",
    )
    return FullBatch(loss_fn, initial_network(key, widths), data, error, "relative L2 error", **options)


def poisson(seed: int, width: int = 32, layers: int = 3, inside: int = 900, side: int = 30) -> FullBatch:
    """−Δu = f on the unit square with u = sin(πx) sin(2πy): 900 points inside, 30 on each side, tanh 2-32-32-32-1.

    Or as many points `inside` and on each `side` as asked for, and a network of so many hidden `layers` of that
    `width`; one of 64 has fewer weights than there are points.

    The loss is ½(mean r² inside + 100 mean r² on the boundary); the error is relative in L2, on 2,000 other points.
    """
    within, sides, elsewhere, start = jax.random.split(jax.random.key(seed), 4)
    x, t = jax.random.uniform(within, (inside, 2)), jax.random.uniform(sides, (4, side))
    zero, one = jnp.zeros(side), jnp.ones(side)
    edges = [(t[0], zero), (t[1], one), (zero, t[2]), (one, t[3])]
    boundary = jnp.concatenate([jnp.stack(edge, axis=1) for edge in edges])

    def solution(x: jax.Array) -> jax.Array:
        return jnp.sin(jnp.pi * x[0]) * jnp.sin(2 * jnp.pi * x[1])

    def equation(params: Params, x: jax.Array) -> jax.Array:
        second = [_second_derivative(lambda y: network(params, y), x, unit) for unit in jnp.eye(2)]
        return sum(second) + 5 * jnp.pi**2 * solution(x)

    def at_boundary(params: Params, x_boundary: jax.Array) -> jax.Array:
        return network(params, x_boundary)

    points = jax.random.uniform(elsewhere, (2000, 2))
    terms = {"equation": (1.0, equation), "boundary": (100.0, at_boundary)}
    data, widths = {"x": x, "x_boundary": boundary}, (2, *[width] * layers, 1)
    return _pinn(start, widths, terms, data, points, jax.vmap(solution)(points))


VISCOSITY = 0.01 / float(np.pi)


class _Evolution(NamedTuple):
    """An equation on (−1, 1) × (0, 1)."""

    residual: Callable[[Callable[[jax.Array], jax.Array], jax.Array], jax.Array]  # of a function, at a point (x, t)
    start: Callable[[jax.Array], jax.Array]  # u(x, 0)
    solution: Callable[[np.ndarray, np.ndarray], np.ndarray]  # at all points of two axes, shape (len(t), len(x))


def _burgers(viscosity: float) -> _Evolution:
    def residual(u: Callable[[jax.Array], jax.Array], xt: jax.Array) -> jax.Array:
        value, (u_x, u_t) = jax.value_and_grad(u)(xt)
        return u_t + value * u_x - viscosity * _second_derivative(u, xt, jnp.array([1.0, 0.0]))

    def solution(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return burgers_solution(x, t[:, None], viscosity)

    return _Evolution(residual, lambda x: -jnp.sin(jnp.pi * x), solution)


def burgers(seed: int) -> FullBatch:
    """u_t + u u_x = ν u_xx on (−1, 1) × (0, 1), u(x, 0) = −sin(πx), u(±1, t) = 0, ν = 0.01/π: a shock forms at x = 0.

    1,000 points inside, 100 at t = 0 and 50 on each side, tanh 2-32-32-32-1; the error is relative in L2, on a grid.
    The points inside are cubes of uniform ones in x, so denser at the shock: uniform ones do not see it, and a network
    can then have any loss and an error of 0.2.
    """
    inside, first, sides, weights = jax.random.split(jax.random.key(seed), 4)
    data = _evolution_points(inside, 1000, first, 100)
    data["xt"] = data["xt"].at[:, 0].power(3)
    x_side = jnp.where(jnp.arange(100) < 50, -1.0, 1.0)
    data["side"] = jnp.stack([x_side, jax.random.uniform(sides, (100,))], axis=1)

    def at_side(params: Params, side: jax.Array) -> jax.Array:
        return network(params, side)

    return _evolution(_burgers(VISCOSITY), weights, (2, 32, 32, 32, 1), data, side=(10.0, at_side))


def burgers_mild(seed: int) -> FullBatch:
    """The same equation with ν = 0.01, whose solution is smooth, and a network that is periodic in x, 3-20-20-20-20-1.

    4,096 points inside and 512 at t = 0. The network sees cos(πx), sin(πx) and t; the error is relative in L2, on a
    grid.
    """
    return _periodic(seed, _burgers(0.01))


def allen_cahn(seed: int) -> FullBatch:
    """u_t = 10⁻⁴ u_xx + 5(u − u³) on (−1, 1) × (0, 1), u(x, 0) = x² cos(πx), periodic in x; else as `burgers_mild`."""

    def residual(u: Callable[[jax.Array], jax.Array], xt: jax.Array) -> jax.Array:
        value, (_, u_t) = jax.value_and_grad(u)(xt)
        return u_t - 1e-4 * _second_derivative(u, xt, jnp.array([1.0, 0.0])) - 5 * (value - value**3)

    return _periodic(seed, _Evolution(residual, lambda x: x**2 * jnp.cos(jnp.pi * x), allen_cahn_solution))


def _periodic(seed: int, equation: _Evolution) -> FullBatch:
    inside, first, weights = jax.random.split(jax.random.key(seed), 3)

    def u(params: Params, point: jax.Array) -> jax.Array:
        x, t = point
        return network(params, jnp.stack([jnp.cos(jnp.pi * x), jnp.sin(jnp.pi * x), t]))

    data = _evolution_points(inside, 4096, first, 512)
    return _evolution(equation, weights, (3, 20, 20, 20, 20, 1), data, u)


def _evolution_points(inside: jax.Array, count: int, first: jax.Array, count_at_start: int) -> Data:
    """So many points inside and at t = 0, uniform."""
    xt = jax.random.uniform(inside, (count, 2), minval=jnp.array([-1.0, 0.0]), maxval=1.0)
    return {"xt": xt, "x_start": jax.random.uniform(first, (count_at_start,), minval=-1.0, maxval=1.0)}


def _evolution(
    equation: _Evolution, key: jax.Array, widths: tuple[int, ...], data: Data, u: Any = network, **further: Any
) -> FullBatch:
    """A problem of an equation and its start, with `further` terms; the error is measured on a grid."""

    def inside(params: Params, xt: jax.Array) -> jax.Array:
        return equation.residual(lambda point: u(params, point), xt)

    def at_start(params: Params, x_start: jax.Array) -> jax.Array:
        return u(params, jnp.stack([x_start, jnp.zeros_like(x_start)])) - equation.start(x_start)

    axes = np.linspace(-1, 1, 81), np.linspace(0, 1, 26)
    grid = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    terms = {"equation": (1.0, inside), "start": (10.0, at_start), **further}
    return _pinn(key, widths, terms, data, grid, equation.solution(*axes).ravel(), u)


def poisson_5d(seed: int, inside: int = 3000, boundary: int = 500, new_points: bool = False) -> FullBatch:
    """−Δu = f on (0, 1)⁵ with u = Σ cos(πxᵢ), tanh 5-64-64-48-48-1; the error is relative in L2, on 4,000 other points.

    Of Guzmán-Cordero et al. (2025), with as many points `inside` and on the `boundary`; with `new_points`, others in
    each step. The loss is ½(mean r² inside + mean r² on the boundary).
    """
    points, elsewhere, start = jax.random.split(jax.random.key(seed), 3)

    def solution(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.cos(jnp.pi * x))

    def equation(params: Params, x: jax.Array) -> jax.Array:
        second = jax.vmap(lambda unit: _second_derivative(lambda y: network(params, y), x, unit))(jnp.eye(5))
        return jnp.sum(second) + jnp.pi**2 * solution(x)

    def at_boundary(params: Params, x_boundary: jax.Array) -> jax.Array:
        return network(params, x_boundary) - solution(x_boundary)

    def sample(key: jax.Array) -> Data:
        of_inside, of_boundary, face, side = jax.random.split(key, 4)
        edge = jax.random.uniform(of_boundary, (boundary, 5))
        which = jax.random.randint(face, (boundary,), 0, 5)
        value = jax.random.bernoulli(side, shape=(boundary,)).astype(edge.dtype)
        edge = edge.at[jnp.arange(boundary), which].set(value)
        return {"x": jax.random.uniform(of_inside, (inside, 5)), "x_boundary": edge}

    test = jax.random.uniform(elsewhere, (4000, 5))
    terms = {"equation": (1.0, equation), "boundary": (1.0, at_boundary)}
    options: dict[str, Any] = {"sample": sample, "seed": seed} if new_points else {}
    widths = 5, 64, 64, 48, 48, 1
    return _pinn(start, widths, terms, sample(points), test, jax.vmap(solution)(test), **options)


def burgers_solution(x: np.ndarray, t: np.ndarray, viscosity: float = VISCOSITY) -> np.ndarray:
    """The exact solution by the Cole–Hopf transformation, its integrals by Gauss–Hermite quadrature, in float64."""
    nodes, weights = hermgauss(120)
    shifted = x[..., None] - np.sqrt(4 * viscosity * t[..., None]) * nodes
    # The exponent less its largest value, which cancels in the quotient.
    exponent = -np.cos(np.pi * shifted) / (2 * np.pi * viscosity)
    kernel = weights * np.exp(exponent - exponent.max(axis=-1, keepdims=True))
    return -np.sum(np.sin(np.pi * shifted) * kernel, axis=-1) / np.sum(kernel, axis=-1)


def allen_cahn_solution(x: np.ndarray, t: np.ndarray, points: int = 2048) -> np.ndarray:
    """The solution at all points of two axes, shape (len(t), len(x)), by trigonometric interpolation in x.

    To about 10⁻⁷ just after the start, whose slope jumps at x = ±1, and better later.
    """
    nodes = -1 + 2 * np.arange(points) / points
    waves = np.pi * np.fft.rfftfreq(points, 1 / points)

    def field(_: float, u: np.ndarray) -> np.ndarray:
        diffused = np.fft.irfft(-1e-4 * waves**2 * np.fft.rfft(u), points)
        return diffused + 5 * (u - u**3)

    start = nodes**2 * np.cos(np.pi * nodes)
    path = solve_ivp(field, (0, max(t)), start, "DOP853", t, rtol=1e-9, atol=1e-11).y.T
    coefficients = np.fft.rfft(path) / points
    coefficients[:, 1:-1] *= 2
    return np.real(coefficients @ np.exp(1j * np.outer(waves, x + 1)))


def initial_network(key: jax.Array, widths: tuple[int, ...]) -> Params:
    """Glorot-normal weights and zero biases."""
    glorot = jax.nn.initializers.glorot_normal()
    keys = jax.random.split(key, len(widths) - 1)
    shapes = itertools.pairwise(widths)
    return [{"w": glorot(k, shape), "b": jnp.zeros(shape[1])} for k, shape in zip(keys, shapes, strict=True)]


def _second_derivative(u: Callable[[jax.Array], jax.Array], x: jax.Array, unit: jax.Array) -> jax.Array:
    unit = unit.astype(x.dtype)
    return jax.jvp(lambda y: jax.jvp(u, (y,), (unit,))[1], (x,), (unit,))[1]
