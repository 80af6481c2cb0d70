"""Step-size rules that refuse steps: by the error estimate, by the loss, or by how well a quadratic model foretold it.

Each update is one attempt. A refused one leaves parameters, solver and momentum as they were and shortens the next, so
nothing loops inside a step, and at the smallest step size `state.reason` says so. All losses are those of the batch of
the step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost, Quantity, Solver
from rk_optax.step_size import Attempt, Proposal, Reason, StepSizeRule, Verdict

PyTree = Any


@dataclasses.dataclass(frozen=True)
class _Controlled(StepSizeRule):
    """What the three share: h is in the state, between bounds."""

    initial_step_size: float
    min_step_size: float
    max_step_size: float

    def __post_init__(self):
        for name in ("initial_step_size", "min_step_size"):
            _checks.number(getattr(self, name), name, "positive")
        if not self.min_step_size <= self.initial_step_size <= self.max_step_size:
            raise ValueError(
                f"initial_step_size must lie between min_step_size and max_step_size, got {self.initial_step_size!r} "
                f"outside [{self.min_step_size!r}, {self.max_step_size!r}]."
            )

    def propose(self, count: jax.Array, state: Any, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """The step size in the state."""
        del count, field, params, k1
        return Proposal(state.step_size, state)

    def _bounded(self, h: jax.Array, attempt: Attempt, dtype: jnp.dtype) -> jax.Array:
        """The step size within the bounds and, with some room, within what the solver can take."""
        if attempt.step.largest_step is not None:
            h = jnp.minimum(h, 0.95 * attempt.step.largest_step)
        return jnp.clip(h, self.min_step_size, self.max_step_size).astype(dtype)

    def _reason(
        self, accepted: jax.Array, attempt: Attempt, refused: Reason, tie: bool | jax.Array = False
    ) -> jax.Array:
        at_end = attempt.step_size <= self.min_step_size
        why = jnp.where(at_end, Reason.SMALLEST_STEP, jnp.where(tie, Reason.UNRESOLVED, refused))
        return jnp.where(accepted, Reason.ACCEPTED, why)

    def _factor_of_tie(
        self, accepted: jax.Array, nothing_seen: jax.Array, growth: float, shrinkage: float
    ) -> jax.Array:
        """What becomes of h after a step that the losses do not resolve: converged, where one has been resolved before.

        A first h that is far too short would stay for good if it did not grow; at convergence h must not run away.
        """
        return jnp.where(nothing_seen, growth, jnp.where(accepted, 1, shrinkage))

    def _scalar(self, value: float) -> jax.Array:
        return jnp.full([], value, _tree.default_float())


class ErrorControlState(NamedTuple):
    """State of `error_control`."""

    step_size: jax.Array  # shape=(), float: the next h
    error: jax.Array  # shape=(), float: the latest scaled error; a step is taken where it is at most 1
    errors: jax.Array  # shape=(2,), float: of the last two accepted steps, the latest first


@dataclasses.dataclass(frozen=True)
class ErrorControl(_Controlled):
    """See `error_control`."""

    rtol: float
    atol: float
    coefficients: tuple[float, float, float]
    safety: float
    factors: tuple[float, float]
    wants: frozenset[Quantity] = frozenset({"error"})

    def init(self) -> ErrorControlState:
        """As if the steps before the first had been just right."""
        return ErrorControlState(
            self._scalar(self.initial_step_size), self._scalar(math.nan), jnp.ones([2], _tree.default_float())
        )

    def judge(self, state: ErrorControlState, attempt: Attempt) -> Verdict:
        """Accepts where the scaled error is at most 1."""
        error = self._scaled(attempt).astype(state.errors.dtype)
        accepted = attempt.usable & (error <= 1)
        history = jnp.concatenate([error[None], state.errors])
        # A PID controller in the logarithm of the error, whose proportional part is that of differences.
        p, i, d = self.coefficients
        weights = -jnp.array([p + i + d, -(p + 2 * d), d], history.dtype) / ((attempt.solver.error_order or 0) + 1)
        smallest, largest = self.factors
        tiny = jnp.finfo(history.dtype).tiny
        factor = self.safety * jnp.exp(jnp.sum(weights * jnp.log(jnp.maximum(history, tiny))))
        factor = jnp.clip(factor, smallest, jnp.where(accepted, largest, self.safety))
        factor = jnp.where(attempt.usable & jnp.isfinite(error), factor, smallest)
        new = ErrorControlState(
            self._bounded(state.step_size * factor, attempt, state.step_size.dtype),
            error,
            jnp.where(accepted, history[:2], state.errors),
        )
        return Verdict(accepted, self._reason(accepted, attempt, Reason.ERROR_TOO_LARGE), new)

    def _scaled(self, attempt: Attempt) -> jax.Array:
        """The root mean square of error / (atol + rtol·max(|θ|, |θ_next|))."""
        sizes = jax.tree.map(
            lambda a, b: self.atol + self.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)), attempt.params, attempt.candidate
        )
        scaled = jax.tree.map(jnp.divide, attempt.step.quantities["error"], sizes)
        count = sum(leaf.size for leaf in jax.tree.leaves(scaled))
        return _tree.norm(scaled) / math.sqrt(max(count, 1))


def error_control(
    rtol: float = 1e-3,
    atol: float = 1e-6,
    *,
    initial_step_size: float = 1e-2,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    safety: float = 0.9,
    factor_min: float = 0.2,
    factor_max: float = 10.0,
    min_step_size: float = 1e-12,
    max_step_size: float = math.inf,
) -> ErrorControl:
    """The step size that keeps the embedded error estimate at a tolerance: to follow the flow, not to train fast.

    A step is taken where e = rms(error/(atol + rtol·max(|θ|, |θ_next|))) ≤ 1. With k = p̂ + 1 the next h is h times
    safety·e₀^(−(P+I+D)/k)·e₁^((P+2D)/k)·e₂^(−D/k), within [factor_min, factor_max], at most `safety` after a refusal;
    e₁ and e₂ are those of the last accepted steps.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return jnp.sum(w ** 4)
    >>> tx = rk_optax.dopri5(loss_fn, rk_optax.error_control(rtol=1e-4))
    >>> w = jnp.array([1.0, 2.0])
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> bool(state.accepted), bool(state.rule.error < 1), f"{state.rule.step_size:.3f}"
    (True, True, '0.020')

    Args:
      rtol: relative tolerance, not negative.
      atol: absolute tolerance, positive.
      initial_step_size: the first h.
      pcoeff: P; P = 0.4 with I = 0.3 is a usual PI controller.
      icoeff: I; I = 1 alone is the elementary controller.
      dcoeff: D.
      safety: factor on the predicted step, in (0, 1].
      factor_min: the most that h shrinks at once, in (0, 1).
      factor_max: the most that it grows, above 1.
      min_step_size: h never gets smaller; refused there, a step says SMALLEST_STEP.
      max_step_size: h never gets larger.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a solver without an error estimate.

    Cost: none beside the solver's own estimate. Source: Söderlind (2003), as in diffrax's PIDController.
    """
    rtol, atol = _checks.number(rtol, "rtol", "not negative"), _checks.number(atol, "atol", "positive")
    if not 0 < safety <= 1:
        raise ValueError(f"safety must be in (0, 1], got {safety!r}.")
    if not 0 < factor_min < 1 < factor_max < math.inf:
        raise ValueError(f"factor_min < 1 < factor_max is required, got {factor_min!r} and {factor_max!r}.")
    return ErrorControl(
        initial_step_size,
        min_step_size,
        max_step_size,
        rtol,
        atol,
        (pcoeff, icoeff, dcoeff),
        safety,
        (factor_min, factor_max),
    )


class DescentControlState(NamedTuple):
    """State of `descent_control`."""

    step_size: jax.Array  # shape=(), float: the next h
    fall: jax.Array  # shape=(), float: of the loss, by the latest attempt that shows one; negative where it rose
    gain: jax.Array  # shape=(), float: fall/(‖k1‖²·cost) of the last accepted step; 0 before one and after a refusal
    growing: jax.Array  # shape=(), bool: whether h grows or shrinks


@dataclasses.dataclass(frozen=True)
class DescentControl(_Controlled):
    """See `descent_control`."""

    growth: float
    shrinkage: float
    needs: frozenset[Capability] = frozenset({"loss"})

    def init(self) -> DescentControlState:
        """Growing until something speaks against it."""
        return DescentControlState(
            self._scalar(self.initial_step_size), self._scalar(math.nan), self._scalar(0.0), jnp.ones([], bool)
        )

    def judge(self, state: DescentControlState, attempt: Attempt) -> Verdict:
        """Accepts where the loss does not rise. Costs two losses."""
        dtype = state.step_size.dtype
        before, after = attempt.field.loss(attempt.params), attempt.field.loss(attempt.candidate)
        fall, square = (before - after).astype(dtype), _tree.inner(attempt.k1, attempt.k1)
        accepted = attempt.usable & (fall >= 0)
        tie = attempt.usable & _unresolved(before, after, attempt.step_size * square)
        cost, work = attempt.step.cost, attempt.step.work
        work = jnp.maximum(cost.gradients + cost.products, 1) if work is None else work
        gain = jnp.where(tie, state.gain, _tree.ratio(fall, (square * work).astype(dtype)))
        growing = jnp.where(gain < state.gain, ~state.growing, state.growing)
        factor = jnp.where(accepted, jnp.where(growing, self.growth, 1 / self.growth), self.shrinkage)
        factor = jnp.where(
            tie,
            self._factor_of_tie(accepted, jnp.isnan(state.fall) & (square > 0), self.growth, self.shrinkage),
            factor,
        )
        new = DescentControlState(
            self._bounded(state.step_size * factor, attempt, dtype),
            jnp.where(tie, state.fall, fall),
            jnp.where(accepted | tie, gain, 0).astype(dtype),
            growing | ~(accepted | tie),
        )
        reason = self._reason(accepted, attempt, Reason.LOSS_ROSE, tie)
        return Verdict(accepted, reason, new, Cost(losses=2))


def descent_control(
    initial_step_size: float = 1e-2,
    *,
    growth: float = 1.5,
    shrinkage: float = 0.25,
    min_step_size: float = 1e-12,
    max_step_size: float = 1e12,
) -> DescentControl:
    """The step size that makes the loss fall most per gradient; a step that would raise the loss is refused.

    h climbs: it keeps growing, or shrinking, by `growth` as long as the fall per ‖k1‖² and per gradient (or product)
    does not decline, and turns round where it does. A refused step multiplies h by `shrinkage`. Both losses are those
    of the step's own batch: made for large batches and deterministic losses.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return jnp.sum(w ** 2)
    >>> tx = rk_optax.rk4(loss_fn, rk_optax.descent_control(initial_step_size=100.0))
    >>> w = jnp.array([1.0, 2.0])
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> bool(state.accepted), rk_optax.Reason(int(state.reason)).name, float(state.rule.step_size)
    (False, 'LOSS_ROSE', 25.0)

    Args:
      initial_step_size: the first h; a poor one costs some refused steps.
      growth: factor per accepted step, above 1.
      shrinkage: factor after a refused step, in (0, 1).
      min_step_size: h never gets smaller; refused there, a step says SMALLEST_STEP.
      max_step_size: h never gets larger.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a `grad_fn` without a loss.

    Cost: two losses a step.
    """
    if not 1 < growth < math.inf:
        raise ValueError(f"growth must be above 1 and finite, got {growth!r}.")
    if not 0 < shrinkage < 1:
        raise ValueError(f"shrinkage must be in (0, 1), got {shrinkage!r}.")
    return DescentControl(initial_step_size, min_step_size, max_step_size, growth, shrinkage)


class TrustRatioState(NamedTuple):
    """State of `trust_ratio_control`."""

    step_size: jax.Array  # shape=(), float: the next h
    ratio: jax.Array  # shape=(), float: the fall of the loss over the predicted one, of the latest step that shows it
    divisor: jax.Array  # shape=(), float: of h at the next refusal; doubles with each in a row


@dataclasses.dataclass(frozen=True)
class TrustRatioControl(_Controlled):
    """See `trust_ratio_control`."""

    growth: float
    needs: frozenset[Capability] = frozenset({"loss"})
    wants: frozenset[Quantity] = frozenset({"predicted_fall"})

    def check(self, solver: Solver, has_after: bool = False) -> None:
        """Refuses solvers without a model, and updates that the model does not describe."""
        super().check(solver, has_after)
        if has_after:
            raise ValueError(
                "trust_ratio_control: the model foretells the fall of the solver's own step, not of one changed by "
                "momentum, after or weight_decay. Leave those out (l2= is in the model), or use descent_control()."
            )

    def init(self) -> TrustRatioState:
        """No ratio yet."""
        return TrustRatioState(self._scalar(self.initial_step_size), self._scalar(math.nan), self._scalar(2.0))

    def judge(self, state: TrustRatioState, attempt: Attempt) -> Verdict:
        """Accepts where the loss does not rise. Costs two losses."""
        dtype = state.step_size.dtype
        before, after = attempt.field.loss(attempt.params), attempt.field.loss(attempt.candidate)
        accepted = attempt.usable & (before - after >= 0)  # ∞ − ∞ is no fall
        predicted = attempt.step.quantities["predicted_fall"]
        # At a minimum both falls are rounding, and 0/0 is agreement.
        ratio = jnp.where((after == before) & (predicted <= 0), 1, (before - after) / predicted).astype(dtype)
        grown = 1 / jnp.maximum(1 / self.growth, 1 - (2 * ratio - 1) ** 3)
        factor = jnp.where(accepted, grown, 1 / state.divisor)
        tie = attempt.usable & _unresolved(before, after, predicted)
        factor = jnp.where(tie, self._factor_of_tie(accepted, jnp.isnan(state.ratio) & (predicted > 0), 2, 0.5), factor)
        divisor = jnp.where(accepted, 2, 2 * state.divisor)
        new = TrustRatioState(
            self._bounded(state.step_size * factor, attempt, dtype),
            jnp.where(tie, state.ratio, ratio),
            jnp.where(tie, state.divisor, divisor).astype(dtype),
        )
        return Verdict(accepted, self._reason(accepted, attempt, Reason.LOSS_ROSE, tie), new, Cost(losses=2))


def trust_ratio_control(
    initial_step_size: float = 1.0,
    *,
    growth: float = 3.0,
    min_step_size: float = 1e-12,
    max_step_size: float = 1e12,
) -> TrustRatioControl:
    """The step size of a linearly implicit step by how well its quadratic model foretells the loss.

    With ρ = (L(θ) − L(θ_next))/(predicted fall), an accepted step multiplies h by 1/max(1/growth, 1 − (2ρ − 1)³): by
    `growth` where the model is right, by 1 at ρ = 1/2, by 1/2 at ρ = 0. Refusals in a row divide it by 2, 4, 8, ... A
    step is taken only if the loss of its batch does not rise. (A fixed factor of 3 at ρ > 3/4 and ρ < 1/4 refuses a
    third of the steps on a PINN and needs more of them.)

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> loss_fn = rk_optax.LeastSquares(lambda w: jnp.array([w[0] - 1, 10 * (w[1] - w[0] ** 2)]))
    >>> tx = rk_optax.rosenbrock_euler(loss_fn, rk_optax.trust_ratio_control(initial_step_size=0.1))
    >>> w = jnp.zeros(2)
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> bool(state.accepted), f"{state.rule.step_size:.1f}"
    (True, '0.3')

    Args:
      initial_step_size: the first h.
      growth: factor, above 1.
      min_step_size: h never gets smaller; refused there, a step says SMALLEST_STEP.
      max_step_size: h never gets larger.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a solver without a quadratic model, or
        momentum, after or weight_decay.

    Cost: two losses a step. Source: Nielsen (1999), "Damping parameter in Marquardt's method", with λ = 1/h.
    """
    if not 1 < growth < math.inf:
        raise ValueError(f"growth must be above 1 and finite, got {growth!r}.")
    return TrustRatioControl(initial_step_size, min_step_size, max_step_size, growth)


def _unresolved(before: jax.Array, after: jax.Array, foretold: jax.Array) -> jax.Array:
    """Whether the losses tell nothing: neither their difference nor the fall to be expected is above their rounding.

    Then all has converged, or the first h is far too short.
    """
    rounding = 2 * jnp.finfo(before.dtype).eps * jnp.abs(before)
    return (jnp.abs(before - after) <= rounding) & (foretold <= rounding)
