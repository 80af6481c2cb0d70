"""Learning rates read off the curvature along the gradient: DAL and SGD-G2. They refuse no step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost, Explicit, Quantity, Solver
from rk_optax.step_size import Attempt, Proposal, Reason, StepSizeRule, Verdict, as_schedule

PyTree = Any


class DalState(NamedTuple):
    """State of `Dal`."""

    ratio: jax.Array  # shape=(), float: the latest r = ‖Hg‖/‖g‖; 0 before the first
    seen: jax.Array  # shape=(), bool: whether there has been one


@dataclasses.dataclass(frozen=True)
class Dal(StepSizeRule):
    """DAL: a learning rate from the curvature along the gradient, r = ‖Hg‖/‖g‖. `rk_optax.dal` is this class.

    "rescaled" is the paper's h = c/(1 + (c/2) r^p), which is c where r is small and 2/r^p where c is large;
    "clipped" is Rosca's h = min(2/r^p, c). With a preconditioner P both are taken of the preconditioned field: g is
    P∇L and H its Jacobian P∇²L with P frozen, so r is the curvature of the flow that the solver integrates. The r it
    saw is in `state.rule.ratio`, in units of 1/h.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return 3.0 * w ** 2  # curvature 6
    >>> tx = rk_optax.rk4(loss_fn, rk_optax.dal(max_learning_rate=1.0))
    >>> w = jnp.array(1.0)
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> float(state.rule.ratio), float(state.step_size)
    (6.0, 0.25)

    Args:
      max_learning_rate: c, a positive number, a JAX scalar or a schedule.
      power: p, positive; may be traced.
      form: "rescaled" or "clipped".
      estimate: how ‖Hg‖ is found. "product": an exact Hessian-vector product, forward over reverse, at about two
        gradients; "difference": (g(θ) − g(θ − εg/‖g‖))/ε at one gradient; "free": from the solver's own first two
        stages, k1 − k2 ≈ a21·h·Hg, for nothing, used in the next step. The first free step is c/100, so that gradients
        with a relative rounding error ε change the second h by up to 50ε/a21 (in float32 2e-4 for dopri8, whose a21 is
        1/18, and 1e-5 for Heun's method), and later ones by a hundredth of that.
      every: steps between estimates ("product" and "difference").

    ε is the square root of the rounding error times Σ ‖θ_leaf‖·‖g_leaf‖/‖g‖: a leaf counts by its share of the
    gradient, so that one without a gradient changes nothing, however large it is. Where the moving leaves are 0 it is
    c‖g‖ instead, and never less than the step min(2/r, c)·‖g‖ that the last estimate allows.

    Raises:
      ValueError: an argument out of its range, or at construction of the optimizer a solver without a second stage
        for "free".

    Source: arXiv 2505.13397 (rescaled) and 2302.01952 (clipped).
    """

    max_learning_rate: float | jax.Array | Callable[[Any], Any]
    power: float | jax.Array = 1.0
    _: dataclasses.KW_ONLY
    form: Literal["rescaled", "clipped"] = "rescaled"
    estimate: Literal["product", "difference", "free"] = "product"
    every: int = 1

    def __post_init__(self):
        as_schedule(self.max_learning_rate, "max_learning_rate")
        _checks.choice(self.form, "form", ("rescaled", "clipped"))
        _checks.choice(self.estimate, "estimate", ("product", "difference", "free"))
        _checks.numbers(self, power="positive")
        if _checks.count(self.every, "every") != 1 and self.estimate == "free":
            raise ValueError("every has no use with estimate='free', which costs nothing: leave it at 1.")

    @property
    def needs(self) -> frozenset[Capability]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A product, for the estimate by one, and no noise in a difference."""
        return frozenset({"product"} if self.estimate == "product" else {"deterministic"})

    @property
    def wants(self) -> frozenset[Quantity]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The curvature that the solver's stages show, for the free estimate."""
        return frozenset({"curvature"}) if self.estimate == "free" else frozenset()

    @property
    def cost_per_estimate(self) -> Cost:
        """What an estimate costs: one product, one gradient or nothing."""
        return {"product": Cost(products=1), "difference": Cost(gradients=1), "free": Cost()}[self.estimate]

    def init(self, params: PyTree) -> DalState:
        """No curvature has been seen."""
        del params
        return DalState(jnp.zeros([], _tree.default_float()), jnp.zeros([], bool))

    def propose(self, count: jax.Array, state: DalState, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """Costs a Hessian-vector product, a gradient or nothing, by `estimate`."""
        c = jnp.asarray(as_schedule(self.max_learning_rate, "max_learning_rate")(count), state.ratio.dtype)
        if self.estimate == "free":
            return Proposal(self._step_size(c, state), state)

        def measure() -> jax.Array:
            if self.estimate == "product":
                ratio = _ratio_by_product(field, params, k1)
            else:
                reach = jnp.where(state.seen, jnp.minimum(_tree.ratio(jnp.asarray(2, c.dtype), state.ratio), c), 0)
                ratio = _ratio_by_difference(field, params, k1, c, reach)
            return ratio.astype(state.ratio.dtype)

        # Skipped estimates keep the last one, and so do those that are not finite.
        due = (count % self.every == 0) | ~state.seen
        measured = jax.lax.cond(due, measure, lambda: state.ratio)
        known = jnp.isfinite(measured)
        state = DalState(jnp.where(known, measured, state.ratio), state.seen | known)
        return Proposal(
            self._step_size(c, state), state, jax.tree.map(lambda n: n * due.astype(jnp.int32), self.cost_per_estimate)
        )

    def judge(self, state: DalState, attempt: Attempt) -> Verdict:
        """Refuses nothing; takes the free estimate for the next step."""
        if self.estimate == "free":
            ratio = attempt.step.quantities["curvature"].astype(state.ratio.dtype)
            known = jnp.isfinite(ratio) & (ratio >= 0)
            state = DalState(jnp.where(known, ratio, state.ratio), state.seen | known)
        return Verdict(True, Reason.ACCEPTED, state)

    def _step_size(self, c: jax.Array, state: DalState) -> jax.Array:
        bent = state.ratio > 0  # both sides of a `where` have to have a derivative
        curved = jnp.where(bent, jnp.where(bent, state.ratio, 1) ** jnp.asarray(self.power, c.dtype), 0) / 2
        if self.form == "clipped":
            limited = c * curved > 1
            h = jnp.where(limited, 1 / jnp.where(limited, curved, 1), c)
        else:
            h = c / (1 + c * curved)
        # Nothing seen yet, which only the free estimate meets: a small step shows the curvature as well as any.
        return jnp.where(state.seen, h, c / 100)


dal = Dal


class SgdG2State(NamedTuple):
    """State of `SgdG2`."""

    last_step_size: jax.Array  # shape=(), float: h of the latest step, from which the next is found
    optimal: jax.Array  # shape=(), float: the latest h_opt; the initial h before the first


@dataclasses.dataclass(frozen=True)
class SgdG2(StepSizeRule):
    """SGD-G2: the step size of gradient descent from Heun's two gradients, for `rk_optax.euler` only.

    With g̃ = g(θ − hg), h_opt = 2h⟨g − g̃, g⟩/‖g − g̃‖² (h itself where the inner product is not positive); then
    h ← decay·h + (1 − decay)·h_opt if h_opt ≥ h, else (1 − decay)·h_opt; then an Euler step with the new h. On a
    quadratic in one dimension h_opt is the stability limit 2/λ. Each step costs one gradient more.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return 2.0 * w ** 2  # λ = 4
    >>> tx = rk_optax.euler(loss_fn, rk_optax.sgd_g2(0.01))
    >>> w = jnp.array(1.0)
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> f"{state.rule.optimal:.3f}"
    '0.500'

    Args:
      initial_learning_rate: the first h, positive; may be traced.
      decay: β, in [0, 1); may be traced.

    Raises:
      ValueError: an argument out of its range, or at construction of the optimizer another solver than Euler's.

    Source: Ayadi and Turinici, arXiv 2002.09304.
    """

    initial_learning_rate: float | jax.Array = 1e-3
    decay: float | jax.Array = 0.9
    needs: ClassVar[frozenset[Capability]] = frozenset({"deterministic"})

    def __post_init__(self):
        _checks.numbers(self, initial_learning_rate="positive", decay="decay")

    def check(self, solver: Solver, has_after: bool = False) -> None:
        """Refuses every solver but Euler's."""
        if not (isinstance(solver, Explicit) and solver.gradients_per_step == 1):
            raise ValueError(
                "sgd_g2 finds the step size of a gradient-descent step from Heun's two gradients; another solver's "
                "stability limit is not the one it estimates. Use it with rk_optax.euler, or dal() with this solver."
            )

    def init(self, params: PyTree) -> SgdG2State:
        """The initial step size."""
        del params
        dtype = _tree.default_float()
        return SgdG2State(*(jnp.full([], self.initial_learning_rate, dtype) for _ in SgdG2State._fields))

    def propose(self, count: jax.Array, state: SgdG2State, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """Costs one gradient."""
        del count
        h = state.last_step_size
        k2 = field(_tree.add_scaled(params, -h, k1), 0)
        change = jax.tree.map(jnp.subtract, k1, k2)
        # ⟨change, k1⟩/‖change‖² with a unit vector in place of one of the changes, whose square may overflow.
        unit, size = _tree.unit(change)
        along = _tree.inner(unit, k1).astype(h.dtype)
        optimal = 2 * h * _tree.ratio(along, size.astype(h.dtype))
        largest = jnp.finfo(h.dtype).max
        optimal = jnp.where((along > 0) & jnp.isfinite(optimal), jnp.minimum(optimal, largest), h)
        decay = jnp.asarray(self.decay, h.dtype)
        h = jnp.where(optimal >= h, decay * h + (1 - decay) * optimal, (1 - decay) * optimal)
        h = jnp.clip(h, jnp.finfo(h.dtype).tiny, largest)
        return Proposal(h, SgdG2State(h, optimal), Cost(gradients=1))


sgd_g2 = SgdG2


def _ratio_by_product(field: VectorField, params: PyTree, k1: PyTree) -> jax.Array:
    """‖Hg‖/‖g‖ by an exact product with g/‖g‖, because Hg may overflow; 0 where g = 0."""
    return _tree.norm(field.product(params, _tree.unit(k1)[0]))


def _ratio_by_difference(field: VectorField, params: PyTree, k1: PyTree, c: jax.Array, reach: jax.Array) -> jax.Array:
    """‖Hg‖/‖g‖ by a difference of gradients along g; 0 where g = 0.

    The relative length of the difference is the square root of the rounding error, which balances rounding and
    truncation: relative to params, and to the step of size `reach` that the last estimate allows. Were it the former
    alone, parameters next to 0 would show rounding instead of curvature.
    """
    unit, norm = _tree.unit(k1)
    length = functools.reduce(
        jnp.add,
        (_tree.norm(p) * _tree.norm(u) for p, u in zip(jax.tree.leaves(params), jax.tree.leaves(unit), strict=True)),
        jnp.zeros([], c.dtype),
    ).astype(c.dtype)
    norm = norm.astype(c.dtype)
    length = jnp.maximum(jnp.where(length > 0, length, c * norm), reach * norm)
    length = math.sqrt(max(_tree.unit_roundoff(params), field.rounding)) * length
    change = jax.tree.map(jnp.subtract, k1, field(_tree.add_scaled(params, -length, unit), 0))
    return _tree.ratio(_tree.norm(change).astype(c.dtype), length)
