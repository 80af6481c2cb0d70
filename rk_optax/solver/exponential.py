"""Exponential time differencing: a diagonal linear part of the field exactly, the rest as by Euler or Heun."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver._base import Cost, Quantity, Solver, Step, check_offers
from rk_optax.solver._diagonal import DiagonalCurvature

PyTree = Any
LinearPart = Literal["l2", "diagonal", "given"] | DiagonalCurvature


@dataclasses.dataclass(frozen=True)
class Etd(Solver):
    """ETD1 or ETDRK2 on dθ/dt = −P(Dθ + N(θ)) with a diagonal D: what D describes is integrated exactly.

    With z = hPD and k1 the whole field at θ, ETD1 is g* = φ₁(−z) k1, which where z is large ends the step in the
    minimum of the quadratic with curvature D. ETDRK2 adds φ₂(−z) P(N(θ − hg*) − N(θ)). The orders are 1 and 2 for any
    D; order is not stability, which takes a D of the size of the curvature.

    Costs one or two gradients, k1 included, and with a curvature estimate one Hessian product each `every` steps. The
    state is that of the estimate, `()` for "l2".

    Args:
      order: 1 (ETD1) or 2 (ETDRK2).
      linear: D. "l2": the field's own `l2`, so that this decay is exact; "diagonal" or a `DiagonalCurvature`: an
        estimate of the Hessian's diagonal, l2 included; "given": the field's own, which a layer of `rk_optax.networks`
        has (`Semilinear`) and a loss has not.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a `grad_fn` without a loss for an
        estimate or a preconditioner that is not diagonal; at the first update, "l2" where the optimizer has no `l2=`.

    Source: Cox and Matthews, J. Comput. Phys. 176 (2002) 430-455.
    """

    order: Literal[1, 2] = 2
    linear: LinearPart = "diagonal"

    def __post_init__(self):
        if self.order not in (1, 2) or isinstance(self.order, bool):
            raise ValueError(f"order must be 1 or 2, got {self.order!r}.")
        if self.linear not in ("l2", "diagonal", "given") and not isinstance(self.linear, DiagonalCurvature):
            raise ValueError(f"linear must be 'l2', 'diagonal', 'given' or a DiagonalCurvature, got {self.linear!r}.")

    @property
    def needs(self) -> frozenset[Capability]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """PD is to be diagonal; a Hessian product where the curvature is estimated, or D the field's own."""
        needs: set[Capability] = {"diagonal_scale"}
        if self.linear == "given":
            needs.add("decay")
        elif self._estimator is not None:
            needs.add("product")
        return frozenset(needs)

    @property
    def gradients_per_step(self) -> int:
        """One for each order."""
        return self.order

    @property
    def error_order(self) -> int | None:
        """Of ETD1 within ETDRK2."""
        return 1 if self.order == 2 else None

    def init(self, params: PyTree) -> PyTree:
        """The estimator's state."""
        return () if self._estimator is None else self._estimator.init(params)

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
        """One step; see `Solver.step`. `h` may be zero or traced."""
        check_offers(self, wants, "This step")
        if self._estimator is not None:
            rate, state, cost = self._estimator.update(field, params, state)
        elif self.linear == "given":
            assert field.decay is not None  # for the type checker: whoever builds the field saw to it
            rate, cost = field.decay(params), Cost()
        else:
            if field.l2 is None:
                raise ValueError("Etd(linear='l2') integrates the optimizer's l2 exactly, and there is none: pass l2=.")
            ones = jax.tree.map(lambda p: jnp.ones(p.shape, _tree.real_dtype(p)), params)
            rate, cost = _tree.scale(field.l2, ones), Cost()
        if field.scale is not None:
            rate = jax.tree.map(jnp.multiply, rate, field.scale)
        z = jax.tree.map(lambda d: -jnp.asarray(h, d.dtype) * d, rate)
        direction = jax.tree.map(lambda x, k: phi1(x) * k, z, k1)
        quantities: dict[Quantity, Any] = {}
        if self.order == 2:
            k2 = field(_tree.add_scaled(params, -h, direction), 1)
            # N(a) − N(θ) = k2 − k1 − PD(a − θ) at a = θ − hφ₁k1, where 1 + zφ₁(z) = exp(z): no difference of positions.
            change = jax.tree.map(lambda x, new, old: phi2(x) * (new - jnp.exp(x) * old), z, k2, k1)
            direction = jax.tree.map(jnp.add, direction, change)
            if "error" in wants:
                quantities["error"] = _tree.scale(h, change)
        return Step(
            direction,
            cost._replace(gradients=self.order),
            quantities=quantities,
            state=state,
            # The curvature is that of the place where a refused step stays.
            refused_state=state,
        )

    @property
    def _estimator(self) -> DiagonalCurvature | None:
        if isinstance(self.linear, DiagonalCurvature):
            return self.linear
        return DiagonalCurvature() if self.linear == "diagonal" else None


def phi1(x: jax.Array) -> jax.Array:
    """φ₁(x) = (exp(x) − 1)/x, 1 at 0, to a few units of rounding for any real x."""
    zero = x == 0
    return jnp.where(zero, 1, jnp.expm1(x) / jnp.where(zero, 1, x))


def phi2(x: jax.Array) -> jax.Array:
    """φ₂(x) = (exp(x) − 1 − x)/x², 1/2 at 0, to a few units of rounding for any real x."""
    small = jnp.abs(x) < 1
    # Not of x itself: a series that is not selected must not overflow, for the derivative's sake.
    near, series = jnp.where(small, x, 0), jnp.zeros_like(x)
    for n in range(19, 1, -1):  # 1/20! is below float64's rounding
        series = series * near + 1 / math.factorial(n)
    return jnp.where(small, series, (phi1(x) - 1) / jnp.where(small, 1, x))
