"""Families of Runge–Kutta methods whose parameter is an input: sampled, switched or averaged while a network trains.

Each function returns the coefficients of one member, of its order for any parameter (never 0), traced or not; give it
to `integrate(..., solver=)`. A network that was trained with a parameter drawn anew for each batch does not overfit to
one method:

    u = families.smoothed(key, 1 / 3, 0.05)                                      # a member near the classical RK4
    y = integrate(layer, controls, y, grid, families.rk4_u2(u))
    u = families.switched(key, jnp.array([0.25, 1 / 3, 0.5]))                    # one of a list
    y = families.averaged(lambda u: integrate(layer, controls, y, grid, families.rk4_u2(u)), us)   # an ensemble

Source: Gusak et al., "Meta-Solver for Neural Ordinary Differential Equations", arXiv 2103.08561.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rk_optax import _families
from rk_optax.traced_tableau import TracedTableau

PyTree = Any
Scalar = Any


def rk2(u: Scalar) -> TracedTableau:
    """Every two-stage method of order 2, c = (0, u), with the embedded Euler method.

    u = 1/2 is the midpoint method, 2/3 Ralston's, 1 Heun's.

    Raises:
      ValueError: a concrete u that is 0, at which the formulas divide by zero, or not finite.
    """
    return _member("rk2", _families.rk2(_parameter("u", u)), 2, b_hat=(1.0, 0.0), order_hat=1)


def rk3(u: Scalar, v: Scalar) -> TracedTableau:
    """The three-stage methods of order 3, c = (0, u, v).

    Raises:
      ValueError: concrete parameters with u = 0, v = 0, u = v or u = 2/3, or not finite.
    """
    u, v = _parameter("u", u, 2 / 3), _parameter("v", v)
    _apart(u, v)
    return _member("rk3", _families.rk3(u, v), 3)


def rk4(u: Scalar, v: Scalar) -> TracedTableau:
    """Kutta's four-stage methods of order 4, c = (0, u, v, 1); the classical one is in `rk4_u2`.

    Raises:
      ValueError: concrete parameters with u or v in {0, 1}, u = 1/2 or u = v, or not finite.
    """
    u, v = _parameter("u", u, 1, 1 / 2), _parameter("v", v, 1)
    _apart(u, v)
    return _member("rk4", _families.rk4(u, v), 4)


def rk4_u1(u: Scalar) -> TracedTableau:
    """The methods of order 4 with c = (0, 1/2, 0, 1) and weights (1/6 − u, 2/3, u, 1/6).

    Raises:
      ValueError: a concrete u that is 0 or not finite.
    """
    return _member("rk4_u1", _families.rk4_u1(_parameter("u", u)), 4, (0, 0.5, 0, 1))


def rk4_u2(u: Scalar) -> TracedTableau:
    """The methods of order 4 with c = (0, 1/2, 1/2, 1) and weights (1/6, 2/3 − u, u, 1/6); u = 1/3 is classical.

    >>> [round(float(b), 4) for b in rk4_u2(1 / 3).b]
    [0.1667, 0.3333, 0.3333, 0.1667]

    Raises:
      ValueError: a concrete u that is 0 or not finite.
    """
    return _member("rk4_u2", _families.rk4_u2(_parameter("u", u)), 4, (0, 0.5, 0.5, 1))


def rk4_u3(u: Scalar) -> TracedTableau:
    """The methods of order 4 with c = (0, 1, 1/2, 1) and weights (1/6, 1/6 − u, 2/3, u).

    Raises:
      ValueError: a concrete u that is 0 or not finite.
    """
    return _member("rk4_u3", _families.rk4_u3(_parameter("u", u)), 4, (0, 1, 0.5, 1))


def smoothed(key: jax.Array, u: Scalar, scale: Scalar = 1e-3) -> jax.Array:
    """A parameter near u: drawn from the Cauchy distribution of width `scale`, and u itself where that is 2·scale off.

    >>> abs(smoothed(jax.random.key(0), 0.5, 0.01) - 0.5) <= 0.02
    Array(True, dtype=bool)
    """
    offset = scale * jax.random.cauchy(key)
    return u + jnp.where(jnp.abs(offset) > 2 * scale, 0, offset)


def switched(key: jax.Array, us: jax.Array, probabilities: jax.Array | None = None) -> jax.Array:
    """One of the parameters `us` (leading axis), each as likely as `probabilities` says, by default alike."""
    return jax.random.choice(key, us, p=probabilities)


def averaged(run: Callable[..., PyTree], *us: jax.Array) -> PyTree:
    """The mean of `run(u)` over the parameters (leading axis): an ensemble of methods, evaluated at once.

    >>> averaged(lambda u: {"y": 2 * u}, jnp.array([1.0, 3.0]))
    {'y': Array(4., dtype=float32)}
    """
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), jax.vmap(run)(*us))


def _member(
    name: str,
    formula: _families.Formula,
    order: int,
    c: tuple[float, ...] | None = None,
    b_hat: tuple[float, ...] | None = None,
    order_hat: int | None = None,
) -> TracedTableau:
    c = (0.0, *map(sum, formula.a)) if c is None else c
    return TracedTableau(name, formula.a, formula.b, c, order, b_hat, order_hat)


def _parameter(name: str, value: Scalar, *poles: float) -> Scalar:
    if isinstance(value, jax.core.Tracer):
        return value
    if np.ndim(value) or not np.isfinite(value) or any(abs(value - pole) < 1e-6 for pole in (0, *poles)):
        raise ValueError(
            f"{name} must be a finite number away from {', '.join(f'{pole:.3g}' for pole in (0, *poles))}, where the "
            f"family's formulas divide by zero, got {value!r}."
        )
    return value


def _apart(u: Scalar, v: Scalar) -> None:
    if not isinstance(u, jax.core.Tracer) and not isinstance(v, jax.core.Tracer) and abs(u - v) < 1e-6:
        raise ValueError(f"u and v must differ: the family's formulas divide by zero at u = v = {u!r}.")
