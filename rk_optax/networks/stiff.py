"""Stiff layers: a linear part that decays fast, integrated exactly, beside a part that may be anything.

A dense linear part with real eigenvalues is diagonal in its eigenbasis Q, which is learned along with the rates:

    q = orthogonal(params["skew"])
    layer = Semilinear(lambda theta, t: jax.nn.softplus(theta["rate"]), rotated(rest, q))
    y = integrate(layer, controls, y @ q, grid, Etd(2, "given")) @ q.T       # y' = −Q softplus(rate) Qᵀ y + rest(y)

An exponential of a fast rate is 0 and so is its slope: such a method hides stiff rates from the gradient. Train rates
through their logarithm or a softplus, and scale features to about 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax.field import Capability, VectorField
from rk_optax.networks.block import Layer
from rk_optax.solver import Cost, Quantity, Solver, Step
from rk_optax.solver.exponential import phi1

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Semilinear:
    """The layer y' = −D(θ, t) y + N(θ, y, t) with a diagonal D, which `Etd(order, "given")` integrates exactly.

    For any other solver it is a layer as any. Order 1 or 2 holds for any D, stability takes that D has what is stiff.

    >>> from rk_optax import Etd
    >>> from rk_optax.networks import Controls, Semilinear, integrate
    >>> layer = Semilinear(lambda theta, t: jnp.exp(theta["log_rate"]), lambda theta, y, t: theta["source"])
    >>> theta = {"log_rate": jnp.log(jnp.array([1.0, 1e4])), "source": jnp.array([2.0, 3e4])}
    >>> y = jnp.zeros((1, 2))
    >>> integrate(layer, Controls.constant_in_time(theta, (0,)), y, (0, 10, 20), Etd(1, "given")).round(5)
    Array([[2., 3.]], dtype=float32)

    Args:
      decay: `decay(theta, t)`: D, broadcast against y; a tree like y where y is one.
      rest: `rest(theta, y, t)`: N, like y.
    """

    decay: Callable[[PyTree, Any], PyTree]
    rest: Layer

    def __call__(self, theta: PyTree, y: PyTree, t: Any) -> PyTree:
        """Y' as a whole."""
        return jax.tree.map(
            lambda d, x, n: n - jnp.asarray(d, _tree.real_dtype(x)) * x, self.decay(theta, t), y, self.rest(theta, y, t)
        )


def orthogonal(skew: jax.Array) -> jax.Array:
    """An orthogonal matrix from any square one: (I − A)⁻¹(I + A) with A = (skew − skewᵀ)/2, Cayley's transform.

    >>> q = orthogonal(jax.random.normal(jax.random.key(0), (4, 4)))
    >>> bool(jnp.allclose(q @ q.T, jnp.eye(4), atol=1e-5))
    True
    """
    a = (skew - skew.T) / 2
    eye = jnp.eye(len(skew), dtype=skew.dtype)
    return jnp.linalg.solve(eye - a, eye + a)


def rotated(rest: Layer, q: jax.Array) -> Layer:
    """`rest` for features in the basis q: of w = yQ it is N(θ, wQᵀ, t)Q."""
    return lambda theta, w, t: rest(theta, w @ q.T, t) @ q


@dataclasses.dataclass(frozen=True)
class IntegratingFactorEuler(Solver):
    """y⁺ = exp(−hD)(y + hN(y)), the integrating-factor (Lawson) Euler method: a baseline, not to be used.

    Its steady state is wrong: of y' = −λy + c it is hc/(exp(hλ) − 1), 42 % below c/λ at hλ = 1, and 0 at hλ = 100.
    `Etd(1, "given")` costs the same and is exact there.

    Source: Fronk and Petzold, arXiv 2412.01181, who train stiff neural ODEs with it.
    """

    needs = frozenset[Capability]({"decay"})
    order = 1

    @property
    def gradients_per_step(self) -> int:
        """One."""
        return 1

    def step(
        self,
        field: VectorField,
        params: PyTree,
        k1: PyTree,
        h: Any,
        state: PyTree,
        *,
        wants: frozenset[Quantity] = frozenset(),
    ) -> Step:
        """One step; see `Solver.step`."""
        assert field.decay is not None  # for the type checker: whoever builds the field saw to it

        def direction(d: jax.Array, y: jax.Array, k: jax.Array) -> jax.Array:
            z = -jnp.asarray(h, d.dtype) * d
            # (y − y⁺)/h without a difference of positions, which has no digits for a short step.
            return phi1(z) * d * y + jnp.exp(z) * (k - d * y)

        return Step(jax.tree.map(direction, field.decay(params), params, k1), Cost(gradients=1), state=state)
