"""Explicit Runge–Kutta methods, for any explicit Butcher tableau."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax import _checks, _tree
from rk_optax.field import VectorField
from rk_optax.solver._base import Cost, Quantity, Solver, Step, check_offers
from rk_optax.tableau import ButcherTableau
from rk_optax.traced_tableau import TracedTableau

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Explicit(Solver):
    """The explicit Runge–Kutta method of a tableau: g* = Σ b_i k_i, k_i = g(θ − h Σ_{j<i} a_ij k_j).

    A step costs one gradient for each stage that the weights use (`tableau.effective_stages`; with an error
    estimate, also those that only b_hat uses), k1 included. Memory beside params: all stages, or one stage and the
    weighted sum where each stage looks back only to the one before it (RK4, midpoint, Heun, Ralston).
    Where "stages" are wanted all of the tableau's are evaluated and returned.

    Args:
      tableau: an explicit Butcher tableau, or a `TracedTableau`, whose coefficients are inputs of the computation.
      unroll: whether to write the stages out, one after the other, instead of looping over them: faster where a
        gradient takes microseconds, slower to compile (s times the loss), and all stages are kept. Traced
        coefficients are always written out.

    Raises:
      TypeError: `tableau` is no tableau.
      ValueError: the tableau is not explicit, or `unroll` is no bool.
    """

    tableau: ButcherTableau | TracedTableau
    unroll: bool = False

    def __post_init__(self):
        if not isinstance(self.tableau, ButcherTableau | TracedTableau):
            raise TypeError(f"tableau must be a ButcherTableau, got {type(self.tableau).__name__}.")
        if not self.tableau.is_explicit:
            raise ValueError(
                f"The tableau {self.tableau.name!r} is not explicit (a must be strictly lower triangular), so its "
                "stages cannot be evaluated one after the other. Choose an explicit tableau: see "
                "rk_optax.TABLEAUS; or solve for the stages: rk_optax.Implicit(tableau)."
            )
        _checks.flags(self, "unroll")

    @property
    def gradients_per_step(self) -> int:
        """Gradients of one step without an error estimate."""
        return self.tableau.effective_stages

    @property
    def order(self) -> int:
        """Order of a step."""
        return self.tableau.order

    @property
    def error_order(self) -> int | None:
        """The lower of the orders of the two methods, where the tableau has two."""
        order = self.tableau.order_hat
        return None if order is None else min(order, self.tableau.order)

    @property
    def offers(self) -> frozenset[Quantity]:
        """An error where the tableau has embedded weights; a curvature where a second stage is at another place.

        The last stage where it is the next first one, dense output where the tableau has a published one, and all
        stages where there are several.
        """
        tableau = self.tableau
        method = TracedTableau.of(tableau, tableau.needed_stages(with_error=False))
        fixed = tableau if isinstance(tableau, ButcherTableau) else None
        more: dict[Quantity, bool] = {
            "curvature": method.stages > 1 and _counts(method.rows[0][0]),
            "last_stage": fixed is not None and fixed.first_same_as_last,
            "dense": fixed is not None and fixed.interpolant is not None,
            "stages": tableau.stages > 1,
        }
        return super().offers.union(quantity for quantity, offered in more.items() if offered)

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
        tableau = self.tableau
        check_offers(self, wants, "This step")
        if self.unroll or "stages" in wants or isinstance(tableau, TracedTableau):
            return self._written_out(field, params, k1, h, state, wants)
        want_error = "error" in wants
        beyond = bool(wants & {"last_stage", "dense"})
        kept = np.arange(tableau.stages) if beyond else np.array(tableau.needed_stages(with_error=want_error))
        a, weights = tableau.a[np.ix_(kept, kept)], [tableau.b[kept]]
        if tableau.b_hat is not None and want_error:
            weights.append((tableau.b - tableau.b_hat)[kept])

        # Both forms evaluate stages 2 to s in one scan, so that the loss is traced and compiled once whatever s is.
        want_change = "curvature" in wants
        quantities: dict[Quantity, Any] = {}
        if beyond or np.tril(a, -2).any():
            ks = _stored_stages(field, params, k1, h, a)
            # Stages of weight 0 are in the sums too, where 0·∞ is NaN: one that is not finite must not pass unseen.
            direction, *errors = (_combined(w, ks, range(len(kept))) for w in weights)
            change = _distance(_stage(ks, 0), _stage(ks, 1)) if want_change else None
            if "last_stage" in wants:
                quantities["last_stage"] = _stage(ks, len(kept) - 1)
            if "dense" in wants and tableau.interpolant is not None:
                quantities["dense"] = functools.partial(_interpolated, tableau.interpolant, ks)
        else:
            (direction, *errors), change = _chained_stages(field, params, k1, h, a, weights, want_change)
        if want_error:
            quantities["error"] = _tree.scale(h, errors[0])
        if change is not None:
            quantities["curvature"] = _curvature(change, a[1, 0], h, k1)
        return Step(
            direction,
            Cost(gradients=len(kept)),
            quantities=quantities,
            state=state,
        )

    def _written_out(
        self, field: VectorField, params: PyTree, k1: PyTree, h: Any, state: PyTree, wants: frozenset[Quantity]
    ) -> Step:
        """A step without a loop over its stages."""
        needed = self.tableau.needed_stages(with_error="error" in wants)
        method = TracedTableau.of(self.tableau, None if wants & {"stages", "last_stage", "dense"} else needed)
        ks = [k1]
        for i, row in enumerate(method.rows, start=1):
            used = [j for j, a in enumerate(row) if _counts(a)] or [0]
            offset = _combination([row[j] for j in used], [ks[j] for j in used])
            ks.append(field(_moved(params, h, offset), i))
        quantities: dict[Quantity, Any] = {}
        if "stages" in wants:
            quantities["stages"] = tuple(ks)
        if "last_stage" in wants:
            quantities["last_stage"] = ks[-1]
        if "dense" in wants and isinstance(self.tableau, ButcherTableau) and self.tableau.interpolant is not None:
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ks)
            quantities["dense"] = functools.partial(_interpolated, self.tableau.interpolant, stacked)
        if "error" in wants:
            assert method.b_hat is not None  # for the type checker: the solver offers no error otherwise
            weights = [b - b_hat for b, b_hat in zip(method.b, method.b_hat, strict=True)]
            quantities["error"] = _tree.scale(h, _combination(weights, ks))
        if "curvature" in wants:
            quantities["curvature"] = _curvature(_distance(ks[0], ks[1]), method.rows[0][0], h, k1)
        return Step(_combination(method.b, ks), Cost(gradients=len(ks)), quantities=quantities, state=state)


def _counts(coefficient: Any) -> bool:
    """Whether a coefficient may differ from 0; a traced one may."""
    return not isinstance(coefficient, int | float) or coefficient != 0


def _combination(weights: Sequence[Any], ks: Sequence[PyTree]) -> PyTree:
    """Σ w_i k_i, stages of weight 0 included, where 0·∞ is NaN: one that is not finite must not pass unseen."""

    def of_leaves(*leaves: jax.Array) -> jax.Array:
        terms = (jnp.asarray(w, _tree.real_dtype(k)) * k for w, k in zip(weights, leaves, strict=True))
        return functools.reduce(jnp.add, terms)

    return jax.tree.map(of_leaves, *ks)


def _chained_stages(
    field: VectorField, params: PyTree, k1: PyTree, h: Any, a: np.ndarray, weights: list[np.ndarray], want_change: bool
) -> tuple[list[PyTree], jax.Array | None]:
    """Σ w_i k_i for each row of weights, where a stage needs only the one before it, as in classical RK4.

    Also ‖k2 − k1‖ where that is wanted. Two trees beside params, where unrolling keeps a third and a fourth alive. A
    stage that is not finite makes the sums so, even with weight 0.
    """

    def first_change(i: jax.Array, k: PyTree, before: PyTree) -> jax.Array:
        # Only stage 2's is wanted, and on a small batch a pass over the parameters is no small part of a gradient.
        zero = jnp.zeros([], jax.eval_shape(_distance, k, before).dtype)
        return jax.lax.cond(i == 1, lambda: _distance(k, before), lambda: zero)

    def stage(carry: Any, inputs: Any) -> tuple[Any, jax.Array | None]:
        before, sums = carry
        i, coefficient, new_weights = inputs
        k = field(_moved(params, h, _tree.scale(coefficient, before)), i)
        sums = [_tree.add_scaled(total, w, k) for total, w in zip(sums, new_weights, strict=True)]
        return (k, sums), first_change(i, k, before) if want_change else None

    sums = [_tree.scale(w[0], k1) for w in weights]
    if len(a) == 1:  # an empty scan would trace the loss for nothing
        return sums, None
    stages = (np.arange(1, len(a)), np.diagonal(a, -1), np.stack(weights, axis=1)[1:])
    (_, sums), changes = jax.lax.scan(stage, (k1, sums), jax.tree.map(jnp.asarray, stages))
    return sums, None if changes is None else changes[0]


def _stored_stages(field: VectorField, params: PyTree, k1: PyTree, h: Any, a: np.ndarray) -> PyTree:
    """The stages k_1 to k_s, where later ones need several earlier ones: each leaf with a leading axis of length s."""
    s = len(a)
    rows = [functools.partial(_combined, row, used=np.flatnonzero(row).tolist() or [0]) for row in a[1:]]

    def stage(ks: PyTree, i: jax.Array) -> tuple[PyTree, None]:
        k = field(_moved(params, h, jax.lax.switch(i - 1, rows, ks)), i)
        ks = jax.tree.map(lambda slots, new: jax.lax.dynamic_update_index_in_dim(slots, new, i, 0), ks, k)
        return ks, None

    ks = jax.tree.map(lambda k: jnp.stack([k, *[jnp.zeros_like(k)] * (s - 1)]), k1)
    return jax.lax.scan(stage, ks, jnp.arange(1, s))[0]


def _combined(weights: np.ndarray, ks: PyTree, used: Iterable[int]) -> PyTree:
    """Σ w_j k_j over the stages `used`.

    Only those are read. A product with all weights reads twice as many for an eighth-order method, and a dot product
    would be rounded to bfloat16 or TF32 on accelerators.
    """
    return jax.tree.map(lambda k: sum(jnp.asarray(weights[j], _tree.real_dtype(k)) * k[j] for j in used), ks)


def _interpolated(interpolant: np.ndarray, ks: PyTree, sigma: jax.Array) -> PyTree:
    """D(σ) of dense output, θ(t + σh) = θ − h·D(σ)."""
    powers = jnp.asarray(sigma) ** np.arange(1, interpolant.shape[1] + 1)
    # In the precision of σ, which is that of time; a matrix product would be rounded to bfloat16 or TF32.
    weights = jnp.sum(jnp.asarray(interpolant, powers.dtype) * powers, axis=1)
    return jax.tree.map(
        lambda k: sum(weights[j].astype(_tree.real_dtype(k)) * k[j] for j in range(len(interpolant))), ks
    )


def _stage(ks: PyTree, i: int) -> PyTree:
    return jax.tree.map(lambda k: k[i], ks)


def _moved(params: PyTree, h: Any, offset: PyTree) -> PyTree:
    """θ − h·offset."""
    return jax.tree.map(lambda theta, d: theta - jnp.asarray(h, _tree.real_dtype(d)) * d, params, offset)


def _curvature(change: jax.Array, a21: Any, h: Any, k1: PyTree) -> jax.Array:
    # One dtype for all: strict promotion refuses to mix them.
    size = _tree.norm(k1).astype(change.dtype)
    length = jnp.abs(jnp.asarray(a21, change.dtype) * jnp.asarray(h, change.dtype)) * size
    # Stages at one place tell nothing, which is no curvature of 0.
    return jnp.where(length == 0, -1, _tree.ratio(change, length))


def _distance(x: PyTree, y: PyTree) -> jax.Array:
    return _tree.norm(jax.tree.map(jnp.subtract, x, y))
