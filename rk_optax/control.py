"""Step-size rules that refuse steps: by the error estimate, by the loss, or by how well a quadratic model foretold it.

Each update is one attempt. A refused one leaves parameters, solver and momentum as they were and shortens the next, so
nothing loops inside a step, and `state.reason` says why. All losses are those of the step's batch. Every number of a
rule may be traced; h and its bounds have the units of θ²/L. No h is final: its bounds are finite and not 0.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax._loss_comparison import Losses, root_of_slope
from rk_optax.field import Capability
from rk_optax.solver import Quantity, Solver, saturating_sum
from rk_optax.step_size import Attempt, KeptStepSize, Reason, Verdict

PyTree = Any
Number = float | jax.Array


class ControlledRule(KeptStepSize):
    """A rule that keeps the next h in its state, between bounds.

    Subclasses are dataclasses with the three fields below.
    """

    initial_step_size: Number
    min_step_size: Number | None
    max_step_size: Number | None

    def __post_init__(self):
        _checks.numbers(self, initial_step_size="positive")
        if self.min_step_size is not None:
            _checks.numbers(self, min_step_size="positive")
        if self.max_step_size is not None:
            _checks.numbers(self, max_step_size="real")
        first, low, high = self.initial_step_size, self.min_step_size, self.max_step_size
        low = 0.0 if low is None or _checks.is_traced(low) else low
        high = math.inf if high is None or _checks.is_traced(high) else high
        if not (low <= high if _checks.is_traced(first) else low <= first <= high):
            raise ValueError(
                f"initial_step_size must lie between min_step_size and max_step_size, got {first!r} outside "
                f"[{self.min_step_size!r}, {self.max_step_size!r}]."
            )

    def bounded(self, h: jax.Array, attempt: Attempt) -> jax.Array:
        """The step size within the bounds and, with some room, within what the solver can take."""
        if attempt.step.largest_step is not None:
            h = jnp.minimum(h, (0.95 * attempt.step.largest_step).astype(h.dtype))
        smallest, largest = self._bounds(h.dtype)
        return jnp.clip(h, smallest, largest)

    def first_step_size(self) -> jax.Array:
        """The first h, within the bounds."""
        h = jnp.full([], self.initial_step_size, _tree.default_float())
        return jnp.clip(h, *self._bounds(h.dtype))

    def at_smallest(self, h: jax.Array) -> jax.Array:
        """Whether h cannot get smaller."""
        return h <= self._bounds(h.dtype)[0]

    def _bounds(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """What the user gave, as far as the dtype can express it: an infinite h would stay so, and a subnormal one.

        Where nothing was given, with room for the products of h with other numbers.
        """
        info = jnp.finfo(dtype)
        low = info.tiny / info.eps if self.min_step_size is None else self.min_step_size
        high = info.max * info.eps if self.max_step_size is None else self.max_step_size
        low, high = (jnp.clip(jnp.asarray(x, dtype), info.tiny, info.max) for x in (low, high))
        return low, high


class ErrorControlState(NamedTuple):
    """State of `ErrorControl`."""

    next_step_size: jax.Array  # shape=(), float: the next h
    error: jax.Array  # shape=(), float: the latest scaled error; a step is taken where it is at most 1
    errors: jax.Array  # shape=(2,), float: of the last two accepted steps, the latest first


@dataclasses.dataclass(frozen=True)
class ErrorControl(ControlledRule):
    """The step size that keeps the embedded error estimate at a tolerance: to follow the flow, not to train fast.

    A step is taken where e = rms(error/(atol + rtol·max(|θ|, |θ_next|))) ≤ 1. With k = p̂ + 1 the next h is h times
    safety·e₀^(−(P+I+D)/k)·e₁^((P+2D)/k)·e₂^(−D/k), within [factor_min, factor_max], at most `safety` after a refusal;
    e₁ and e₂ are those of the last accepted steps. The mean is over the numbers that the step moves, so that an inert
    leaf changes nothing; a step that moves none, as on a batch without a gradient, leaves h.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return jnp.sum(w ** 4)
    >>> tx = rk_optax.dopri5(loss_fn, rk_optax.error_control(rtol=1e-4))
    >>> w = jnp.array([1.0, 2.0])
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> bool(state.accepted), bool(state.rule.error < 1), f"{state.rule.next_step_size:.3f}"
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
      min_step_size: h never gets smaller; None: 1e-31, about the smallest that float32 can compute with.
      max_step_size: h never gets larger; None: 4e31, likewise.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a solver without an error estimate.

    Cost: none beside the solver's own estimate. Source: Söderlind (2003), as in diffrax's PIDController.
    """

    rtol: Number = 1e-3
    atol: Number = 1e-6
    _: dataclasses.KW_ONLY
    initial_step_size: Number = 1e-2
    pcoeff: Number = 0.0
    icoeff: Number = 1.0
    dcoeff: Number = 0.0
    safety: Number = 0.9
    factor_min: Number = 0.2
    factor_max: Number = 10.0
    min_step_size: Number | None = None
    max_step_size: Number | None = None
    wants: ClassVar[frozenset[Quantity]] = frozenset({"error"})

    def __post_init__(self):
        super().__post_init__()
        _checks.numbers(self, rtol="not negative", atol="positive", safety="fraction")
        _checks.numbers(self, pcoeff="real", icoeff="real", dcoeff="real", factor_min="real", factor_max="real")
        low, high = self.factor_min, self.factor_max
        if not ((_checks.is_traced(low) or 0 < low < 1) and (_checks.is_traced(high) or 1 < high < math.inf)):
            raise ValueError(f"factor_min < 1 < factor_max is required, got {low!r} and {high!r}.")

    def init(self, params: PyTree) -> ErrorControlState:
        """As if the steps before the first had been just within the tolerance."""
        del params
        dtype = _tree.default_float()
        return ErrorControlState(self.first_step_size(), jnp.zeros([], dtype), jnp.ones([2], dtype))

    def judge(self, state: ErrorControlState, attempt: Attempt) -> Verdict:
        """Accepts where the scaled error is at most 1."""
        dtype = state.next_step_size.dtype
        error, moves = self._scaled_error(attempt, dtype)
        known = jnp.isfinite(error)
        error = jnp.where(known, error, jnp.finfo(dtype).max)
        accepted = attempt.usable & (error <= 1)
        factor = self._factor(jnp.concatenate([error[None], state.errors]), accepted, attempt)
        factor = jnp.where(attempt.usable & known, factor, jnp.asarray(self.factor_min, dtype))
        # Where nothing moves, as in a batch without a gradient, an error of 0 says nothing about h.
        factor = jnp.where(attempt.usable & ~moves, 1, factor)
        new = ErrorControlState(
            self.bounded(state.next_step_size * factor, attempt),
            error,
            jnp.where(accepted & moves, jnp.stack([error, state.errors[0]]), state.errors),
        )
        refused = jnp.where(self.at_smallest(attempt.step_size), Reason.SMALLEST_STEP, Reason.ERROR_TOO_LARGE)
        return Verdict(accepted, jnp.where(accepted, Reason.ACCEPTED, refused), new)

    def _factor(self, history: jax.Array, accepted: jax.Array, attempt: Attempt) -> jax.Array:
        """A PID controller in the logarithm of the error, whose proportional part is that of differences."""
        dtype = history.dtype
        p, i, d, safety, smallest, largest = (
            jnp.asarray(x, dtype)
            for x in (self.pcoeff, self.icoeff, self.dcoeff, self.safety, self.factor_min, self.factor_max)
        )
        weights = -jnp.stack([p + i + d, -(p + 2 * d), d]) / ((attempt.solver.error_order or 0) + 1)
        logarithms = jnp.log(jnp.maximum(history, jnp.finfo(dtype).tiny))
        factor = safety * jnp.exp(jnp.sum(weights * logarithms))
        return jnp.clip(factor, smallest, jnp.where(accepted, largest, safety))

    def _scaled_error(self, attempt: Attempt, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The root mean square of error / (atol + rtol·max(|θ|, |θ_next|)), and whether the step moves anything.

        Numbers that the step does not move are left out: those of an inert leaf, of which there may be any number,
        would make the mean smaller.
        """

        def scaled(error: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
            size = jnp.maximum(jnp.abs(before), jnp.abs(after))
            return jnp.abs(error) / (jnp.asarray(self.atol, size.dtype) + jnp.asarray(self.rtol, size.dtype) * size)

        def moved(error: jax.Array, direction: jax.Array) -> jax.Array:
            return jnp.sum((error != 0) | (direction != 0), dtype=dtype)

        errors = attempt.step.quantities["error"]
        counts = jax.tree.leaves(jax.tree.map(moved, errors, attempt.step.direction))
        count = sum(counts, jnp.zeros([], dtype))
        total = _tree.norm(jax.tree.map(scaled, errors, attempt.params, attempt.candidate)).astype(dtype)
        return total / jnp.sqrt(jnp.maximum(count, 1)), count > 0


error_control = ErrorControl


class DescentControlState(NamedTuple):
    """State of `DescentControl`."""

    next_step_size: jax.Array  # shape=(), float: the next h
    fall: jax.Array  # shape=(), float: of the loss, by the latest attempt that shows one; negative where it rose
    tried: jax.Array  # shape=(), float: h of that attempt; 0 before the first
    uphill: jax.Array  # shape=(), bool: whether refused steps rise in proportion to h
    gain: jax.Array  # shape=(), float: fall/(slope·cost) of the last accepted step; 0 before one and after a refusal
    growing: jax.Array  # shape=(), bool: whether h grows or shrinks
    worth: jax.Array  # shape=(), float: gradients (and products) of the last step with a clear fall; 0 before one
    ties: jax.Array  # shape=(), int32: steps since then that were too short, or too near the minimum, to show one


@dataclasses.dataclass(frozen=True)
class DescentControl(ControlledRule):
    """The step size that makes the loss fall most per gradient; a step that raises the loss is refused.

    h climbs: it keeps growing, or shrinking, by `growth` as long as the fall per ‖k1‖² and per gradient (or product)
    does not decline, and turns round where it does. A refused step multiplies h by `shrinkage`. A step too short
    for the losses to show what it does multiplies h by `growth`, whatever has been seen before; at convergence h
    therefore grows until a rise shows. Where a longer step costs more gradients, as in `rkc`, the n-th such step in a
    row costs at most 1 + log₂(1 + n/100) times what the last one with a clear fall did. Both losses are those of the
    step's own batch: made for large batches and deterministic losses. With a diagonal preconditioner P, ‖k1‖² stands
    for ⟨∇L, P∇L⟩.

    Where rounding may hide what the loss L does (no fall above 16 eps |L|, no rise above 2000 eps |L|, which are 2e-6
    and 2.4e-4 of it in float32), the slopes at both ends of the step decide in their place, by the approximate Wolfe
    condition of Hager and Zhang (2005). Near the minimum of a loss whose terms are larger than itself they go on to
    show falls: on an ill-conditioned Gaussian-process dual, `rkc` ends at errors of 5e-5 to 7e-5, and at 3e-4 to 6e-3
    by the losses alone.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return jnp.sum(w ** 2)
    >>> tx = rk_optax.rk4(loss_fn, rk_optax.descent_control(initial_step_size=100.0))
    >>> w = jnp.array([1.0, 2.0])
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> bool(state.accepted), rk_optax.Reason(int(state.reason)).name, float(state.rule.next_step_size)
    (False, 'LOSS_ROSE', 25.0)

    Args:
      initial_step_size: the first h; a poor one costs some refused steps.
      growth: factor per accepted step, above 1.
      shrinkage: factor after a refused step, in (0, 1).
      min_step_size: h never gets smaller; None: 1e-31, about the smallest that float32 can compute with.
      max_step_size: h never gets larger; None: 4e31, likewise.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a `grad_fn` without a loss.

    Cost: two losses a step, and two gradients where they show nothing.
    """

    initial_step_size: Number = 1e-2
    _: dataclasses.KW_ONLY
    growth: Number = 1.5
    shrinkage: Number = 0.25
    min_step_size: Number | None = None
    max_step_size: Number | None = None
    needs: ClassVar[frozenset[Capability]] = frozenset({"loss", "deterministic"})

    def __post_init__(self):
        super().__post_init__()
        _checks.numbers(self, growth="growth", shrinkage="shrinkage")

    def init(self, params: PyTree) -> DescentControlState:
        """Growing until something speaks against it."""
        del params
        fall, tried, gain, worth = (jnp.zeros([], _tree.default_float()) for _ in range(4))
        uphill, growing, ties = jnp.zeros([], bool), jnp.ones([], bool), jnp.zeros([], jnp.int32)
        return DescentControlState(self.first_step_size(), fall, tried, uphill, gain, growing, worth, ties)

    def judge(self, state: DescentControlState, attempt: Attempt) -> Verdict:
        """Accepts where the loss does not rise or, where rounding may hide that, where the slopes show a fall.

        Costs two losses, or one where that at params is known, and two gradients where the losses show nothing.
        """
        dtype = state.next_step_size.dtype
        growth, shrinkage = (jnp.asarray(x, dtype) for x in (self.growth, self.shrinkage))
        size = root_of_slope(attempt).astype(dtype)
        losses = Losses.of(attempt, (attempt.step_size * size).astype(dtype) * size)
        accepted, tie = losses.accepted, losses.tie
        cost, work = attempt.step.cost, attempt.step.work
        work = jnp.asarray(jnp.maximum(cost.gradients + cost.products, 1) if work is None else work, dtype)
        gain = jnp.where(tie, state.gain, _tree.ratio(_tree.ratio(losses.fall, size), size * work))
        growing = jnp.where(gain < state.gain, ~state.growing, state.growing)
        factor = jnp.where(accepted, jnp.where(growing, growth, 1 / growth), shrinkage)
        # Whatever has happened before: h grows until the losses show what it does, unless nothing can be expected. It
        # does so slowly where it costs more than what has shown something: all may have converged.
        spent = jnp.maximum(work, 2)  # the least number of stages, where there is a choice
        worth = jnp.where(losses.shows_fall, spent, state.worth)
        ties = jnp.where(losses.shows_fall, 0, saturating_sum(state.ties, tie))
        dear = (worth > 0) & (spent > worth * (1 + jnp.log2(1 + ties.astype(dtype) / 100)))
        factor = jnp.where(tie, jnp.where(size > 0, jnp.where(dear, 1 / growth, growth), 1), factor)
        fall, tried, uphill = losses.seen(state)
        h, gain = self.bounded(state.next_step_size * factor, attempt), jnp.where(accepted | tie, gain, 0)
        new = DescentControlState(h, fall, tried, uphill, gain, growing | ~(accepted | tie), worth, ties)
        return Verdict(accepted, losses.reason(uphill, self.at_smallest(attempt.step_size)), new, losses.cost)


descent_control = DescentControl


class TrustRatioState(NamedTuple):
    """State of `TrustRatioControl`."""

    next_step_size: jax.Array  # shape=(), float: the next h
    ratio: jax.Array  # shape=(), float: the fall of the loss over the predicted one, of the latest step that shows it
    divisor: jax.Array  # shape=(), float: of h at the next refusal; doubles with each in a row, to 1024
    fall: jax.Array  # shape=(), float: of the loss, by the latest attempt that shows one; negative where it rose
    tried: jax.Array  # shape=(), float: h of that attempt; 0 before the first
    uphill: jax.Array  # shape=(), bool: whether refused steps rise in proportion to h


@dataclasses.dataclass(frozen=True)
class TrustRatioControl(ControlledRule):
    """The step size of a linearly implicit step by how well its quadratic model foretells the loss.

    With ρ = (L(θ) − L(θ_next))/(predicted fall), an accepted step multiplies h by 1/max(1/growth, 1 − (2ρ − 1)³): by
    `growth` where the model is right, by 1 at ρ = 1/2, by 1/2 at ρ = 0. Refusals in a row divide it by 2, 4, 8, ...,
    1024; a step whose fall is below all rounding doubles it. A step that raises the loss of its batch is refused; where
    rounding may hide that, the slopes decide, as in `descent_control`. (A fixed factor of 3 at ρ > 3/4 and ρ < 1/4
    refuses a third of the steps on a PINN and needs more of them.)

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> loss_fn = rk_optax.LeastSquares(lambda w: jnp.array([w[0] - 1, 10 * (w[1] - w[0] ** 2)]))
    >>> tx = rk_optax.rosenbrock_euler(loss_fn, rk_optax.trust_ratio_control(initial_step_size=0.1))
    >>> w = jnp.zeros(2)
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> bool(state.accepted), f"{state.rule.next_step_size:.1f}"
    (True, '0.3')

    Args:
      initial_step_size: the first h.
      growth: factor, above 1.
      min_step_size: h never gets smaller; None: 1e-31, about the smallest that float32 can compute with.
      max_step_size: h never gets larger; None: 4e31, likewise.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a solver without a quadratic model, or
        momentum, after or weight_decay.

    Cost: as `descent_control`. Source: Nielsen (1999), "Damping parameter in Marquardt's method", with λ = 1/h.
    """

    initial_step_size: Number = 1.0
    _: dataclasses.KW_ONLY
    growth: Number = 3.0
    min_step_size: Number | None = None
    max_step_size: Number | None = None
    needs: ClassVar[frozenset[Capability]] = frozenset({"loss", "deterministic"})
    wants: ClassVar[frozenset[Quantity]] = frozenset({"predicted_fall"})

    def __post_init__(self):
        super().__post_init__()
        _checks.numbers(self, growth="growth")

    def check(self, solver: Solver, has_after: bool = False) -> None:
        """Refuses solvers without a model, and updates that the model does not describe."""
        super().check(solver, has_after)
        if has_after:
            raise ValueError(
                "trust_ratio_control: the model foretells the fall of the solver's own step, not of one changed by "
                "momentum, after or weight_decay. Leave those out (l2= is in the model), or use descent_control()."
            )

    def init(self, params: PyTree) -> TrustRatioState:
        """No ratio yet: 0."""
        del params
        ratio, fall, tried = (jnp.zeros([], _tree.default_float()) for _ in range(3))
        divisor = jnp.full([], 2, ratio.dtype)
        return TrustRatioState(self.first_step_size(), ratio, divisor, fall, tried, jnp.zeros([], bool))

    def judge(self, state: TrustRatioState, attempt: Attempt) -> Verdict:
        """Accepts where the loss does not rise or, where rounding may hide that, where the slopes show a fall.

        Costs two losses, or one where that at params is known, and two gradients where the losses show nothing.
        """
        dtype = state.next_step_size.dtype
        predicted = attempt.step.quantities["predicted_fall"].astype(dtype)
        losses = Losses.of(attempt, predicted)
        accepted, tie = losses.accepted, losses.tie
        # At a minimum both falls are rounding, and 0/0 is agreement.
        ratio = jnp.where((losses.fall == 0) & (predicted <= 0), 1, _tree.ratio(losses.fall, predicted))
        known = jnp.isfinite(ratio)
        ratio = jnp.where(known, ratio, 0)
        # The loss fell: where the model foretold a rise, that is no better than foretelling nothing.
        grown = 1 / jnp.maximum(1 / jnp.asarray(self.growth, dtype), 1 - (2 * jnp.clip(ratio, 0, 2) - 1) ** 3)
        factor = jnp.where(accepted & known, grown, 1 / state.divisor)
        # As in `DescentControl`. Where no fall is foretold in spite of a gradient, h is so small or large that numbers
        # have underflowed.
        lost = jnp.where(attempt.step_size < self.first_step_size(), 2, 0.5)
        lost = jnp.where(_tree.norm(attempt.k1) == 0, 1, lost)
        factor = jnp.where(tie, jnp.where(predicted > 0, 2, lost), factor)
        divisor = jnp.where(accepted, 2, jnp.minimum(2 * state.divisor, 1024))
        fall, tried, uphill = losses.seen(state)
        new = TrustRatioState(
            self.bounded(state.next_step_size * factor, attempt),
            jnp.where(tie | ~known, state.ratio, ratio),
            jnp.where(tie, state.divisor, divisor),
            fall,
            tried,
            uphill,
        )
        return Verdict(accepted, losses.reason(uphill, self.at_smallest(attempt.step_size)), new, losses.cost)


trust_ratio_control = TrustRatioControl
