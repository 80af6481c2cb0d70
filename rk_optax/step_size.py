"""Where the step size h comes from, and why a step was refused.

h is a learning rate: an Euler step with it is a gradient-descent step.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rk_optax import _checks, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost, Explicit, Quantity, Solver, Step, check_offers

PyTree = Any


class Reason(enum.IntEnum):
    """Why a step was accepted or refused; `state.reason` holds the number.

    >>> Reason(1).message
    'a stage, the step size or the update was not finite; parameters and solver were left as they were'
    """

    ACCEPTED = 0
    NOT_FINITE = 1
    NOT_SOLVED = 2
    LOSS_ROSE = 3
    ERROR_TOO_LARGE = 4
    SMALLEST_STEP = 5
    UNRESOLVED = 6

    @property
    def message(self) -> str:
        """A sentence for people."""
        return _MESSAGES[self]


_MESSAGES = {
    Reason.ACCEPTED: "the step was taken",
    Reason.NOT_FINITE: "a stage, the step size or the update was not finite; parameters and solver were left as "
    "they were",
    Reason.NOT_SOLVED: "the solver's own iteration did not converge, or the step size is beyond what it can take; "
    "parameters and solver were left as they were",
    Reason.LOSS_ROSE: "the loss would have risen; parameters and solver were left as they were, the next step is "
    "shorter",
    Reason.ERROR_TOO_LARGE: "the error estimate exceeds the tolerance; parameters and solver were left as they were, "
    "the next step is shorter",
    Reason.SMALLEST_STEP: "refused even at the smallest step size: converged to rounding, or the gradient is not that "
    "of the loss; parameters and solver were left as they were",
    Reason.UNRESOLVED: "the loss rose, but by no more than its rounding: converged, as far as this precision can tell; "
    "parameters and solver were left as they were",
}


class Proposal(NamedTuple):
    """What a rule proposes for one step."""

    step_size: Any  # h: a Python number or a real scalar array
    state: PyTree
    cost: Cost = Cost()


class Choice(NamedTuple):
    """The step that a rule chooses among those that the solver offers."""

    step_size: Any  # h
    step: Step
    state: PyTree  # of the rule
    cost: Cost = Cost()


class Attempt(NamedTuple):
    """A step that the solver has made and the rule may refuse."""

    solver: Solver
    field: VectorField
    params: PyTree  # θ, in the stage dtype
    k1: PyTree  # the (preconditioned) field at θ
    candidate: PyTree  # θ with the update added, momentum and all
    step_size: jax.Array  # h
    step: Step
    usable: jax.Array  # shape=(), bool: finite and solved; what is not is refused whatever the rule says


class Verdict(NamedTuple):
    """What a rule makes of an attempt."""

    accepted: bool | jax.Array
    reason: int | jax.Array  # a `Reason`, read where the attempt was usable
    state: PyTree  # of the rule, kept whether the step is taken or not
    cost: Cost = Cost()


class StepSizeRule(abc.ABC):
    """Chooses h for each step, and may refuse it afterwards.

    Subclasses are frozen dataclasses; all that changes is in the rule's state.

    Attributes:
      needs: what the rule asks of the field; checked when a transformation is built.
      adaptive: whether h depends on more than the count of updates.
      wants: the quantities of a step that the rule reads in `Step.quantities`; checked likewise.
    """

    needs: frozenset[Capability] = frozenset()
    adaptive: ClassVar[bool] = True
    wants: frozenset[Quantity] = frozenset()

    def check(self, solver: Solver, has_after: bool = False) -> None:
        """Raises a ValueError, with the reason, where the rule makes no sense with the solver, or with an `after`."""
        del has_after
        check_offers(solver, self.wants, type(self).__name__)

    def init(self) -> PyTree:
        """The rule's state, scalars only."""
        return ()

    @abc.abstractmethod
    def propose(self, count: jax.Array, state: PyTree, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """Chooses h before a step, from the (preconditioned) field and its stage 1 at params."""

    def choose(self, state: PyTree, field: VectorField, params: PyTree, k1: PyTree, h: Any, step: Step) -> Choice:
        """Chooses among the steps that the solver offers, before `after` and `judge`: here the only one.

        Args:
          state: the rule's, as `propose` returned it.
          field: the (preconditioned) field; `field.loss` evaluates the loss on the step's batch.
          params: θ, in the stage dtype.
          k1: the field at θ.
          h: the step size that was proposed.
          step: the solver's step with h, with the `wants` of the rule in `step.quantities`.
        """
        del field, params, k1
        return Choice(h, step, state)

    def judge(self, state: PyTree, attempt: Attempt) -> Verdict:
        """Takes or refuses the solver's step, and learns from it either way."""
        del attempt
        return Verdict(True, Reason.ACCEPTED, state)


@dataclasses.dataclass(frozen=True)
class Scheduled(StepSizeRule):
    """h as a function of the count of updates so far; a constant is such a function too."""

    schedule: Callable[[Any], Any]
    adaptive: ClassVar[bool] = False

    def propose(self, count: jax.Array, state: PyTree, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """Reads the schedule; costs nothing."""
        del field, params, k1
        return Proposal(self.schedule(count), state)


class DalState(NamedTuple):
    """State of `dal`."""

    ratio: jax.Array  # shape=(), float: the latest r = ‖Hg‖/‖g‖


@dataclasses.dataclass(frozen=True)
class Dal(StepSizeRule):
    """See `dal`."""

    max_learning_rate: Callable[[Any], Any]
    power: float
    form: str
    estimate: str
    every: int
    wants: frozenset[Quantity] = frozenset()
    needs: frozenset[Capability] = frozenset()

    def init(self) -> DalState:
        """No curvature has been seen: NaN, which `propose` reads as such."""
        return DalState(jnp.full([], jnp.nan, _tree.default_float()))

    def propose(self, count: jax.Array, state: PyTree, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """Costs a Hessian-vector product, a gradient or nothing, by `estimate`."""
        c = self.max_learning_rate(count)
        if self.estimate == "free":
            ratio, cost = state.ratio, Cost()
        else:
            measure = _ratio_by_product if self.estimate == "product" else _ratio_by_difference
            # Refused and skipped estimates keep the last one; before the first, NaN asks for one.
            due = (count % self.every == 0) | jnp.isnan(state.ratio)
            measured = jax.lax.cond(due, lambda: measure(field, params, k1), lambda: state.ratio)
            ratio = jnp.where(jnp.isfinite(measured), measured, state.ratio)
            spent = due.astype(jnp.int32)
            cost = Cost(products=spent) if self.estimate == "product" else Cost(gradients=spent)
        return Proposal(self._step_size(c, ratio), DalState(ratio), cost)

    def judge(self, state: PyTree, attempt: Attempt) -> Verdict:
        """Refuses nothing; takes the free estimate for the next step."""
        if self.estimate == "free":
            seen = attempt.step.quantities["curvature"].astype(state.ratio.dtype)
            state = DalState(jnp.where(jnp.isfinite(seen), seen, state.ratio))
        return Verdict(True, Reason.ACCEPTED, state)

    def _step_size(self, c: Any, ratio: jax.Array) -> jax.Array:
        c = jnp.asarray(c, ratio.dtype)
        curved = ratio**self.power / 2  # 1/h where c does not matter
        h = jnp.minimum(1 / curved, c) if self.form == "clipped" else c / (1 + c * curved)
        # Nothing seen yet, which only the free estimate meets: a small step shows the curvature as well as any.
        return jnp.where(jnp.isnan(ratio), c / 100, h)


def dal(
    max_learning_rate: float | jax.Array | Callable[[Any], Any],
    power: float = 1.0,
    *,
    form: Literal["rescaled", "clipped"] = "rescaled",
    estimate: Literal["product", "difference", "free"] = "product",
    every: int = 1,
) -> Dal:
    """DAL: a learning rate from the curvature along the gradient, r = ‖Hg‖/‖g‖.

    "rescaled" is the paper's h = c/(1 + (c/2) r^p), which is c where r is small and 2/r^p where c is large;
    "clipped" is Rosca's h = min(2/r^p, c). With a preconditioner P both are taken of the preconditioned field: g is
    P∇L and H its Jacobian P∇²L with P frozen, so r is the curvature of the flow that the solver integrates. The r it
    saw is in `state.rule.ratio`.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return 3.0 * w ** 2  # curvature 6
    >>> tx = rk_optax.rk4(loss_fn, rk_optax.dal(max_learning_rate=1.0))
    >>> w = jnp.array(1.0)
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> float(state.rule.ratio), float(state.step_size)
    (6.0, 0.25)

    Args:
      max_learning_rate: c, a positive number, a JAX scalar or a schedule.
      power: p, positive.
      form: "rescaled" or "clipped".
      estimate: how ‖Hg‖ is found. "product": an exact Hessian-vector product, forward over reverse, at about two
        gradients; "difference": (g(θ) − g(θ − εg/‖g‖))/ε at one gradient; "free": from the solver's own first two
        stages, k1 − k2 ≈ a21·h·Hg, for nothing, used in the next step. The first free step is c/100.
      every: steps between estimates ("product" and "difference").

    Raises:
      ValueError: an argument out of its range, or at construction of the optimizer a solver without a second stage
        for "free".

    Source: arXiv 2505.13397 (rescaled) and 2302.01952 (clipped).
    """
    if form not in ("rescaled", "clipped"):
        raise ValueError(f"form must be 'rescaled' or 'clipped', got {form!r}.")
    if estimate not in ("product", "difference", "free"):
        raise ValueError(f"estimate must be 'product', 'difference' or 'free', got {estimate!r}.")
    power, every = _checks.number(power, "power", "positive"), _checks.count(every, "every")
    if estimate == "free" and every != 1:
        raise ValueError("every has no use with estimate='free', which costs nothing: leave it at 1.")
    needs: frozenset[Capability] = frozenset({"product"}) if estimate == "product" else frozenset()
    return Dal(
        as_schedule(max_learning_rate, "max_learning_rate"),
        power,
        form,
        estimate,
        every,
        frozenset({"curvature"}) if estimate == "free" else frozenset(),
        needs,
    )


class SgdG2State(NamedTuple):
    """State of `sgd_g2`."""

    step_size: jax.Array  # shape=(), float: h of the latest step, from which the next is found
    optimal: jax.Array  # shape=(), float: the latest h_opt


@dataclasses.dataclass(frozen=True)
class SgdG2(StepSizeRule):
    """See `sgd_g2`."""

    initial_learning_rate: float
    decay: float

    def check(self, solver: Solver, has_after: bool = False) -> None:
        """Refuses every solver but Euler's."""
        if not (isinstance(solver, Explicit) and solver.gradients_per_step == 1):
            raise ValueError(
                "sgd_g2 finds the step size of a gradient-descent step from Heun's two gradients; another solver's "
                "stability limit is not the one it estimates. Use it with rk_optax.euler, or dal() with this solver."
            )

    def init(self) -> SgdG2State:
        """The initial step size."""
        dtype = _tree.default_float()
        return SgdG2State(jnp.full([], self.initial_learning_rate, dtype), jnp.full([], jnp.nan, dtype))

    def propose(self, count: jax.Array, state: PyTree, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """Costs one gradient."""
        del count
        h = state.step_size
        k2 = field(_tree.add_scaled(params, -h, k1), 0)
        change = jax.tree.map(jnp.subtract, k1, k2)
        inner, square = _tree.inner(change, k1), _tree.inner(change, change)
        optimal = 2 * h * inner / square
        optimal = jnp.where((inner > 0) & jnp.isfinite(optimal), optimal, h).astype(h.dtype)
        grown = self.decay * h + (1 - self.decay) * optimal
        h = jnp.where(optimal >= h, grown, (1 - self.decay) * optimal)
        return Proposal(h, SgdG2State(h, optimal), Cost(gradients=1))


def sgd_g2(initial_learning_rate: float = 1e-3, decay: float = 0.9) -> SgdG2:
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
      initial_learning_rate: the first h, positive.
      decay: β, in [0, 1).

    Raises:
      ValueError: an argument out of its range, or at construction of the optimizer another solver than Euler's.

    Source: Ayadi and Turinici, arXiv 2002.09304.
    """
    initial = _checks.number(initial_learning_rate, "initial_learning_rate", "positive")
    return SgdG2(initial, _checks.number(decay, "decay", "decay"))


LearningRate = float | jax.Array | Callable[[Any], Any] | StepSizeRule


def as_rule(learning_rate: LearningRate) -> StepSizeRule:
    """A rule from a rule, a number, a JAX scalar or an Optax schedule.

    Raises:
      TypeError, ValueError: as `as_schedule`.
    """
    if isinstance(learning_rate, StepSizeRule):
        return learning_rate
    return Scheduled(as_schedule(learning_rate))


def as_schedule(learning_rate: Any, name: str = "learning_rate") -> Callable[[Any], Any]:
    """A function from the count of updates so far (int32 scalar) to h, from a rate or an Optax schedule.

    A Python number stays one, so that each leaf sees it in full precision.

    Raises:
      TypeError: not a number, a scalar array or a function.
      ValueError: a concrete rate that is not finite and positive. A JAX scalar may also be 0: warm-ups reach a
        transformation in this form through `optax.inject_hyperparams`.
    """
    if callable(learning_rate):

        def scheduled(count: Any) -> Any:
            h = learning_rate(count)
            if not isinstance(h, jax.Array):
                h = jnp.asarray(h)
            return _real_scalar(h, f"The {name} schedule")

        return scheduled
    if isinstance(learning_rate, jax.Array):
        h = _real_scalar(learning_rate, name)
        if not isinstance(h, jax.core.Tracer):
            if jnp.imag(learning_rate) != 0:
                raise ValueError(f"{name} must be real, got {learning_rate}.")
            _check_positive(float(h), name, zero_is_fine=True)
        return lambda count: h
    if isinstance(learning_rate, np.ndarray) and learning_rate.shape == ():
        learning_rate = learning_rate.item()
    if isinstance(learning_rate, bool | np.bool_) or not isinstance(
        learning_rate, int | float | np.integer | np.floating
    ):
        raise TypeError(f"{name} must be a positive number, a JAX scalar or an Optax schedule, got {learning_rate!r}.")
    # A NumPy scalar would promote what it meets; a Python float takes each leaf's dtype.
    number = float(learning_rate)
    _check_positive(number, name)
    return lambda count: number


def _check_positive(number: Any, name: str, *, zero_is_fine: bool = False) -> None:
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero_is_fine):
        raise ValueError(
            f"{name} must be finite and positive, got {number}. It is the step size h of the solver, and a "
            "solver already steps downhill; to pause training use a schedule that returns 0."
        )


def _real_scalar(h: jax.Array, what: str) -> jax.Array:
    if h.shape != () or jnp.issubdtype(h.dtype, jnp.bool_):
        raise ValueError(f"{what} must be a real scalar, got shape {h.shape} and dtype {h.dtype}.")
    # optax.inject_hyperparams casts rates to the dtype of the parameters, complex ones included.
    return jnp.real(h)


def _ratio_by_product(field: VectorField, params: PyTree, k1: PyTree) -> jax.Array:
    """‖Hg‖/‖g‖ by an exact product; 0 where g = 0."""
    return _tree.ratio(_tree.norm(field.product(params, k1)), _tree.norm(k1)).astype(_tree.default_float())


def _ratio_by_difference(field: VectorField, params: PyTree, k1: PyTree) -> jax.Array:
    """‖Hg‖/‖g‖ by a difference of gradients along g; 0 where g = 0."""
    norm = _tree.norm(k1)
    # The square root of the rounding error, relative to params, balances rounding and truncation.
    epsilon = math.sqrt(max(_tree.unit_roundoff(params), field.rounding)) * (1 + _tree.norm(params))
    factor = _tree.ratio(epsilon, norm)
    change = jax.tree.map(jnp.subtract, k1, field(_tree.add_scaled(params, -factor, k1), 0))
    return (_tree.norm(change) / epsilon).astype(_tree.default_float())
