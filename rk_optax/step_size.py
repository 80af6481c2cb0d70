"""Where the step size h comes from, and why a step was refused.

h is a learning rate: an Euler step with it is a gradient-descent step.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rk_optax import _returned
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost, Quantity, Solver, Step, check_offers

PyTree = Any


class Reason(enum.IntEnum):
    """Why a step was accepted or refused; `state.reason` holds the number.

    >>> Reason(1).message
    'a stage or the update was not finite; parameters and solver were left as they were'
    """

    ACCEPTED = 0
    NOT_FINITE = 1
    NOT_SOLVED = 2
    LOSS_ROSE = 3
    ERROR_TOO_LARGE = 4
    SMALLEST_STEP = 5
    UNRESOLVED = 6
    BAD_STEP_SIZE = 7
    NOT_DOWNHILL = 8

    @property
    def message(self) -> str:
        """A sentence for people."""
        return _MESSAGES[self]


_KEPT = "parameters and solver were left as they were"
_MESSAGES = {
    Reason.ACCEPTED: "the step was taken",
    Reason.NOT_FINITE: f"a stage or the update was not finite; {_KEPT}",
    Reason.NOT_SOLVED: "the solver's own iteration did not converge, or the step size is beyond what it can take; "
    f"{_KEPT}",
    Reason.LOSS_ROSE: f"the loss would have risen; {_KEPT}, the next step is shorter",
    Reason.ERROR_TOO_LARGE: f"the error estimate exceeds the tolerance; {_KEPT}, the next step is shorter",
    Reason.SMALLEST_STEP: "refused at min_step_size, where the curvature asks for less: lower min_step_size or leave "
    f"it out, or loosen the tolerance of error_control; {_KEPT}",
    Reason.UNRESOLVED: "rounding may hide what the loss L did (no fall above 16 eps |L|, no rise above 2000 eps |L|), "
    "and what else the rule looks at, slopes or model, shows no fall worth the step: converged, as far as this "
    f"precision can tell; {_KEPT}",
    Reason.BAD_STEP_SIZE: "the learning rate, or its schedule, gave a step size that is negative or not finite; "
    f"{_KEPT}",
    Reason.NOT_DOWNHILL: "the loss rises in proportion to the step size, however short: the gradient is not that of "
    f"this loss on this batch, or momentum or after leads uphill; {_KEPT}",
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

    Subclasses are frozen dataclasses that check their fields in `__post_init__`; all that changes is in the rule's
    state. Where stage 1 is not finite it says nothing about h, and a transformation keeps the state as it was before
    `propose`, whatever `judge` returns.

    Attributes:
      needs: what the rule asks of the field; checked when a transformation is built.
      adaptive: whether h depends on more than the count of updates.
      wants: the quantities of a step that the rule reads in `Step.quantities`; checked likewise.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset()
    adaptive: ClassVar[bool] = True
    wants: ClassVar[frozenset[Quantity]] = frozenset()

    def check(self, solver: Solver, has_after: bool = False) -> None:
        """Raises a ValueError, with the reason, where the rule makes no sense with the solver, or with an `after`."""
        del has_after
        check_offers(solver, self.wants, type(self).__name__)

    def init(self, params: PyTree) -> PyTree:
        """The rule's state; `params` may be abstract, and holds the moving leaves only."""
        del params
        return ()

    def seen(self, field: VectorField, params: PyTree) -> VectorField:
        """The field as far as the rule uses it, from which the solver sees what its stage 1 is for."""
        del params
        return field

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


class KeptStepSize(StepSizeRule):
    """A rule that keeps the next h in its state, which has a field `next_step_size`."""

    def propose(self, count: jax.Array, state: Any, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """The step size in the state. Costs nothing."""
        del count, field, params, k1
        return Proposal(state.next_step_size, state)


def proposed(
    rule: StepSizeRule, count: jax.Array, state: PyTree, field: VectorField, params: PyTree, k1: PyTree
) -> Proposal:
    """`rule.propose`, with what it returns checked: the state is in the dtypes of `init`.

    Raises:
      TypeError, ValueError: it is no `Proposal`, or one with a step size that is no scalar or a state of another form.
    """
    who = f"{type(rule).__name__}.propose"
    returned = rule.propose(count, state, field, params, k1)
    made = _returned.record(returned, Proposal, "Proposal(step_size, state)", who)
    _returned.cost(made.cost, Cost, who)
    _returned.scalar(made.step_size, f"The step size that {who} returns")
    return made._replace(state=_returned.state(made.state, state, who))


def chosen(
    rule: StepSizeRule, state: PyTree, field: VectorField, params: PyTree, k1: PyTree, h: Any, step: Step
) -> Choice:
    """`rule.choose`, with what it returns checked likewise.

    Raises:
      TypeError, ValueError: as for `proposed`; it is no `Choice`, or one of a step that is none.
    """
    who = f"{type(rule).__name__}.choose"
    returned = rule.choose(state, field, params, k1, h, step)
    made = _returned.record(returned, Choice, "Choice(step_size, step, state)", who)
    _returned.cost(made.cost, Cost, who)
    _returned.scalar(made.step_size, f"The step size that {who} returns")
    _returned.record(made.step, Step, "Step", f"{who}, as the step of its Choice,")
    return made._replace(state=_returned.state(made.state, state, who))


def judged(
    rule: StepSizeRule, state: PyTree, attempt: Attempt, finite: jax.Array
) -> tuple[Verdict, jax.Array, jax.Array]:
    """The rule's verdict on an attempt, whether the step is to be taken, and why not.

    A step that is not `finite`, or whose solver did not converge, is refused whatever the rule says.

    Raises:
      TypeError, ValueError: what `judge` returns is no `Verdict`, or one with another reason than those of `Reason`,
        an `accepted` that is no scalar or a state of another form.
    """
    who = f"{type(rule).__name__}.judge"
    verdict = _returned.record(rule.judge(state, attempt), Verdict, "Verdict(accepted, reason, state)", who)
    _returned.cost(verdict.cost, Cost, who)
    _returned.scalar(verdict.accepted, f"What {who} returns as accepted")
    if isinstance(verdict.reason, int) and verdict.reason not in list(Reason):
        raise ValueError(f"The reason that {who} returns must be one of rk_optax.Reason, got {verdict.reason!r}.")
    verdict = verdict._replace(state=_returned.state(verdict.state, state, who))
    solved = attempt.step.solved
    reason = jnp.where(finite, jnp.where(solved, verdict.reason, Reason.NOT_SOLVED), Reason.NOT_FINITE)
    return verdict, attempt.usable & verdict.accepted, reason.astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Scheduled(StepSizeRule):
    """h as a function of the count of updates so far; a constant is such a function too.

    Args:
      schedule: a positive number, a JAX scalar or an Optax schedule.

    Raises:
      TypeError, ValueError: as `as_schedule`.
    """

    schedule: float | jax.Array | Callable[[Any], Any]
    adaptive: ClassVar[bool] = False

    def __post_init__(self):
        as_schedule(self.schedule)

    def propose(self, count: jax.Array, state: PyTree, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """Reads the schedule; costs nothing."""
        del field, params, k1
        return Proposal(as_schedule(self.schedule)(count), state)


LearningRate = float | jax.Array | Callable[[Any], Any] | StepSizeRule


def as_rule(learning_rate: LearningRate) -> StepSizeRule:
    """A rule from a rule, a number, a JAX scalar or an Optax schedule.

    Raises:
      TypeError, ValueError: as `as_schedule`.
    """
    return learning_rate if isinstance(learning_rate, StepSizeRule) else Scheduled(learning_rate)


def as_schedule(learning_rate: Any, name: str = "learning_rate") -> Callable[[Any], Any]:
    """A function from the count of updates so far (int32 scalar) to h, from a rate or an Optax schedule.

    A Python number stays one, so that each leaf sees it in full precision.

    Raises:
      TypeError: not a number, a scalar array or a function; a rule that was not called, such as `rk_optax.dal`.
      ValueError: a concrete rate that is not finite and positive. A JAX scalar may also be 0: warm-ups reach a
        transformation in this form through `optax.inject_hyperparams`.
    """
    maker = getattr(learning_rate, "func", learning_rate)  # of a partial
    if isinstance(maker, type) and issubclass(maker, StepSizeRule):
        raise TypeError(f"{name} is {maker.__name__} itself, which makes a rule: call it, as in {_call(maker)}.")
    if callable(learning_rate):

        def scheduled(count: Any) -> Any:
            h = learning_rate(count)
            if isinstance(h, StepSizeRule):
                raise TypeError(f"{name} is a function that makes a rule ({type(h).__name__}): pass what it returns.")
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


def _call(rule: type[StepSizeRule]) -> str:
    required = [p.name for p in inspect.signature(rule).parameters.values() if p.default is p.empty]
    return f"{rule.__name__}({', '.join(f'{name}=...' for name in required)})"
