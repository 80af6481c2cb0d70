"""What test files share: a loss and its RK4 step by hand, training loops, exact flows, curvatures, scales, counts."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
from jax.sharding import AxisType
from numpy.polynomial import Chebyshev, Legendre

import rk_optax
from rk_optax import Cost, DiagonalPreconditioner, VectorField

H = 0.3
PARAMS = {"w": np.array([0.5, -0.3, 0.8]), "b": np.array([0.4, -0.2])}
X = np.array([0.1, 0.2, -0.4])


def loss_fn(params, x):
    """Both leaves enter both gradients, so what one leaf does at a stage shows in the other."""
    return jnp.sum((params["w"] - x) ** 4) / 4 + jnp.sum((params["b"] * jnp.sum(params["w"])) ** 2) / 2


def loss_gradient(params, x=X):
    """The gradient of `loss_fn`, by hand and in NumPy."""
    total = np.sum(params["w"])
    return {"w": (params["w"] - x) ** 3 + total * np.sum(params["b"] ** 2), "b": params["b"] * total**2}


def numpy_rk4(gradient, params, h, k1=None):
    """The effective gradient of one classical Runge-Kutta step downhill, by the textbook."""

    def stage(k, fraction):
        return gradient(jax.tree.map(lambda p, d: p - fraction * h * d, params, k))

    k1 = gradient(params) if k1 is None else k1
    k2 = stage(k1, 0.5)
    k3 = stage(k2, 0.5)
    k4 = stage(k3, 1.0)
    return jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)


def numpy_update(params, x, h=H, **kwargs):
    """The update of `rk4(loss_fn, h)`."""
    return jax.tree.map(lambda g: -h * g, numpy_rk4(lambda p: loss_gradient(p, x), params, h, **kwargs))


def descent_gradient(loss, params, **data):
    """What Optax calls the gradient: conjugated for complex leaves."""
    return jax.tree.map(jnp.conj, jax.grad(loss)(params, **data))


def first_update(tx, loss, params, jit=True, **data):
    """The first update of `tx` and the state after it, as one program: operations compiled one by one take longer."""

    def update(params, data):
        return tx.update(descent_gradient(loss, params, **data), tx.init(params), params, **data)

    return (jax.jit(update) if jit else update)(jax.tree.map(jnp.asarray, params), data)


def trajectory(tx, loss, params, data, steps, jit=True):
    """`(params, state)` at the start and after each of some steps on the same data."""

    def step(params, state, data):
        updates, state = tx.update(descent_gradient(loss, params, **data), state, params, **data)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    params = jax.tree.map(jnp.asarray, params)
    visited = [(params, tx.init(params))]
    for _ in range(steps):
        visited.append(step(*visited[-1], data))
    return visited


def make_step(tx, loss):
    """A training step `(params, state, data) -> (params, state)`, as a user writes it."""

    def step(params, state, data):
        updates, state = tx.update(descent_gradient(loss, params, **data), state, params, **data)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, loss, params, data, steps, jit=True):
    """Parameters and state after some steps on the same data."""
    step = jax.jit(make_step(tx, loss)) if jit else make_step(tx, loss)
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, data)
    return params, state


def steps(tx, loss, w, count=3):
    """Parameters and state after some updates, in a program that can be compiled, mapped and differentiated."""

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    return jax.lax.scan(step, (w, tx.init(w)), length=count)[0]


def assert_close(actual, expected, rtol=1e-12, atol=1e-14):
    """Same structure, nearly the same numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


def assert_same(actual, expected):
    """Same structure, the very same numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


# Each scale from its equation: the running sum or mean after step t (from 1), and P from it.
SCALE_EQUATIONS = {
    "adagrad": (lambda v, g, t: v + g**2, lambda v, t: (1 + v) ** -0.5),
    "rms": (lambda v, g, t: 0.9 * v + 0.1 * g**2, lambda v, t: 1 / (np.sqrt(v) + 0.1)),
    "adam": (lambda v, g, t: 0.99 * v + 0.01 * g**2, lambda v, t: 1 / (np.sqrt(v / (1 - 0.99**t)) + 0.1)),
}
PRECONDITIONERS = {
    "adagrad": rk_optax.precondition_by_adagrad(),
    "rms": rk_optax.precondition_by_rms(0.9, 0.1),
    "adam": rk_optax.precondition_by_adam(0.99, 0.1),
    "hutchinson": rk_optax.precondition_by_hutchinson(0.9, 0.1, every=2),
    "clip": rk_optax.precondition_by(optax.clip_by_global_norm(0.5)),
    "rss": rk_optax.precondition_by(optax.scale_by_rss(1.0, eps=0.0)),
}


@dataclasses.dataclass(frozen=True, eq=False)
class FixedScale(DiagonalPreconditioner):
    """P = `scale`, a tree like params, whatever the gradient is."""

    scale: Any

    def update(self, gradient, state, params, field):
        return self.scale, state, Cost()


def numpy_dal(c, r, p, form):
    """The rate of DAL from the curvature r, as the two papers print it."""
    return min(2 / r**p, c) if form == "clipped" else c / (1 + c / 2 * r**p)


@functools.lru_cache
def dense(loss):
    """The gradient and the whole Hessian over flattened parameters, of `(params, data)`."""

    def both(params, data):
        flat, unravel = jax.flatten_util.ravel_pytree(params)

        def flat_loss(theta):
            return loss(unravel(theta), **data)

        return jax.grad(flat_loss)(flat), jax.hessian(flat_loss)(flat)

    return jax.jit(both)


def exact_ratio(loss, params, data=None, scale=None):
    """‖PHPg‖/‖Pg‖ by a dense Hessian."""
    gradient, hessian = (np.asarray(a) for a in dense(loss)(params, data or {}))
    p = 1.0 if scale is None else np.asarray(jax.flatten_util.ravel_pytree(scale)[0])
    field = p * gradient
    return np.linalg.norm(p * (hessian @ field)) / np.linalg.norm(field)


def stability_polynomial(family, s, damping):
    """R as a function of hλ, from NumPy's own Chebyshev and Legendre polynomials."""
    basis = Chebyshev if family.startswith("rkc") else Legendre
    p = basis.basis(s)
    w0 = 1 + damping / s**2 if basis is Chebyshev else 1.0
    first, second = p.deriv()(w0), p.deriv(2)(w0)
    if family.endswith("1"):
        return lambda x: p(w0 - x * p(w0) / first) / p(w0)
    b = second / first**2
    return lambda x: 1 - b * p(w0) + b * p(w0 - x * first / second)


def types(tree):
    """Shape and dtype of each leaf."""
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


class Evaluations:
    """Counts how often a function is evaluated when the program runs, compiled or not; a product counts once."""

    def __init__(self, function):
        self._calls = []

        @functools.wraps(function)
        def counted(*args, **kwargs):
            jax.debug.callback(lambda: self._calls.append(1))
            return function(*args, **kwargs)

        self.function = counted

    def take(self):
        """The evaluations since the last call of `take`."""
        jax.effects_barrier()
        n = len(self._calls)
        self._calls.clear()
        return n


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def observed_order(tx_at, loss, params, data, exact, time, numbers_of_steps):
    """The slope of the error at `time` against h."""
    errors = []
    for steps in numbers_of_steps:
        end, _ = train(tx_at(time / steps), loss, params, data, steps)
        difference = jax.tree.map(lambda a, e: jnp.max(jnp.abs(a - e)), end, exact)
        errors.append(max(jax.tree.leaves(difference)))
    return -np.polyfit(np.log(numbers_of_steps), np.log(errors), 1)[0]


def exact_flow(gradient, params, time):
    """The gradient flow by SciPy's eighth-order integrator; complex parameters stay complex."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    field = jax.jit(lambda theta: -jax.flatten_util.ravel_pytree(gradient(unravel(theta)))[0])
    run = scipy.integrate.solve_ivp(
        lambda t, theta: np.asarray(field(theta)), (0, time), np.asarray(flat), "DOP853", rtol=1e-13, atol=1e-14
    )
    return unravel(run.y[:, -1])


STAYS = 1 - 1 + 1 / 2 - 1 / 6 + 1 / 24  # what one RK4 step at h·λ = 1 leaves of an offset


def attempts(tx, loss, theta, count):
    """What the state says after each of some updates: h, accepted, and the parameters."""
    step = jax.jit(lambda theta, state: tx.update(jax.grad(loss)(theta), state, theta))
    theta, state, seen = jnp.asarray(theta), tx.init(jnp.asarray(theta)), []
    for _ in range(count):
        change, state = step(theta, state)
        theta = theta + change
        seen.append((float(state.step_size), bool(state.accepted), np.asarray(theta)))
    return [np.array(column) for column in zip(*seen, strict=True)], state


def cubic(theta):
    """A smooth nonlinear field that NumPy and JAX both take."""
    return theta**3 + 0.3 * theta[::-1] * theta - 0.2


def one_step(solver, field, theta, h, **options):
    """A solver's step on a field of its own, as one program."""
    problem = VectorField(lambda theta, stage: field(theta))
    theta = jnp.asarray(theta)
    return jax.jit(lambda h: solver.step(problem, theta, field(theta), h, solver.init(theta), **options))(h)


needs_explicit_axes = pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="explicit axes need jax.set_mesh")
MESHES = ["auto", pytest.param("explicit", marks=needs_explicit_axes)]


@contextlib.contextmanager
def eight_devices(axes):
    """A mesh of eight devices along x, with "auto" axes or, set as JAX's own, "explicit" ones."""
    explicit = axes == "explicit"
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))
    with jax.set_mesh(mesh) if explicit else contextlib.nullcontext():
        yield mesh
