"""What a solver is: one step of one method, from a vector field to an effective gradient."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax import _checks, _returned
from rk_optax.field import Capability, VectorField
from rk_optax.parameter_view import check_like_params

PyTree = Any
Quantity = Literal["error", "curvature", "predicted_fall", "path", "precise_path", "last_stage", "dense", "stages"]
"""What a solver can return of a step beside its direction, where a step-size rule wants it:

error: estimate of the local error, like params and in its units (those of θ, not of g*).
curvature: ‖k1 − k2‖/(a21 h ‖k1‖), about ‖Hg‖/‖g‖, a scalar; −1 where h or k1 is 0, which shows none.
predicted_fall: of the loss, by the solver's own quadratic model, a scalar.
path: the steps of all h from one factorisation, as a function that makes it of this step's field, or of
    `VectorField.on_fewer_points` of that; see `Factored` and `Path`.
precise_path: the same by a factorisation that costs more and keeps more digits; where there is one, it comes with
    `path`.
last_stage: the field at the end of the step, like params, where the method evaluates it there.
dense: the published interpolant of the step, a function σ ↦ D(σ), like params, with θ(t + σh) = θ − h·D(σ).
stages: k_1 to k_s, a tuple of trees like params, of all of a tableau's stages.
"""


class Cost(NamedTuple):
    """Work spent, each field an int32 scalar in state and a plain integer in a step."""

    gradients: Any = 0  # gradients, stage 1 included whoever evaluated it
    losses: Any = 0  # losses without a gradient
    products: Any = 0  # Hessian, Gauss–Newton or Jacobian products
    rows: Any = 0  # rows of an explicitly formed Jacobian

    @classmethod
    def zeros(cls) -> Cost:
        """Nothing spent, as a state holds it: int32 scalars, in separate buffers so that they can be donated."""
        return cls(*(jnp.zeros([], jnp.int32) for _ in cls._fields))

    def plus(self, other: Cost) -> Cost:
        """The sum, field by field, in int32; one that would not fit stays at the largest int32."""
        return Cost(*(saturating_sum(x, y) for x, y in zip(self, other, strict=True)))

    def beyond_k1(self) -> Cost:
        """The cost of a step where k1 has been counted, if it was a gradient."""
        return self._replace(gradients=jnp.maximum(self.gradients - 1, 0))


def saturating_sum(x: Any, y: Any) -> Any:
    """X + y of counts, in int32, or the largest int32 where that is less.

    Of two that are known when the program is traced it is a number of NumPy's, and one that is 0 adds no operation: an
    update has many of both.
    """
    most = np.iinfo(np.int32).max
    known = [isinstance(count, int | np.integer) for count in (x, y)]
    if all(known):
        return np.int32(min(int(x) + int(y), most))
    for count, other, is_known in ((x, y, known[0]), (y, x, known[1])):
        if is_known and count == 0:
            return jnp.asarray(other, jnp.int32)
    x, y = jnp.asarray(x, jnp.int32), jnp.asarray(y, jnp.int32)
    return jnp.minimum(x, most - y) + y


class Step(NamedTuple):
    """The outcome of one solver step from θ with step size h."""

    direction: PyTree  # g*, like params: the step proposes θ − h·g*
    cost: Cost
    finite: bool | jax.Array = True  # False for a stage that was not finite and does not show in g*
    solved: bool | jax.Array = True  # did the solver's own iteration, where it has one, converge?
    quantities: Mapping[Quantity, Any] = MappingProxyType({})  # those that were asked for
    work: Any = None  # gradients that h asks for, a fraction too, estimates not counted; None: see cost
    largest_step: jax.Array | None = None  # the largest h that the solver could have taken here, where it knows one
    state: PyTree = ()
    refused_state: PyTree | None = None  # what to keep of a refused step (diagnostics, estimates at θ); None: nothing

    def state_if_refused(self, before: PyTree) -> PyTree:
        """The solver's state where the step is refused, which began with the state `before`."""
        return before if self.refused_state is None else self.refused_state


class Solver(abc.ABC):
    """A method for dθ/dt = −g(θ). Subclasses are frozen dataclasses; all that changes is in `state`.

    Attributes:
      needs: what the solver asks of a field beyond its values, its preconditioner included; checked when a
        transformation is built.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset()

    @property
    def gradients_per_step(self) -> int | None:
        """Gradients of one step where each stage is one gradient and their number is fixed, else None."""
        return None

    @property
    def error_order(self) -> int | None:
        """p̂ of the error estimate, which falls like h^(p̂+1); None without an estimate."""
        return None

    @property
    def offers(self) -> frozenset[Quantity]:
        """What a step can return beside its direction, on demand: here an error estimate, where it has an order."""
        return frozenset() if self.error_order is None else frozenset({"error"})

    def init(self, params: PyTree) -> PyTree:
        """The solver's state; `params` may be abstract, and holds the moving leaves only."""
        del params
        return ()

    def start(
        self, field: VectorField, params: PyTree, *, wants: frozenset[Quantity] = frozenset()
    ) -> tuple[PyTree, VectorField]:
        """Stage 1 and the loss at params together, where the caller brings neither; see `VectorField.started`."""
        del wants
        return field.started(params)

    @abc.abstractmethod
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
        """One step.

        Args:
          field: the field; `field(params, stage)` evaluates it.
          params: θ, a pytree in the stage dtype.
          k1: the field at θ (stage 1), like params.
          h: the step size, in units of the flow's time (a learning rate): a number or a real scalar array.
          state: what `init` or the last step returned.
          wants: the quantities to return in `Step.quantities`, a subset of `offers`.
        """


def stepped(
    solver: Solver, field: VectorField, params: PyTree, k1: PyTree, h: Any, state: PyTree, wants: frozenset[Quantity]
) -> Step:
    """`solver.step`, checked as far as a rule may use it that chooses another step of the same path.

    Raises:
      TypeError, ValueError: it is no `Step`, or one without what was wanted.
    """
    who = f"{type(solver).__name__}.step"
    step = _returned.record(
        solver.step(field, params, k1, h, state, wants=wants), Step, "Step(direction, cost, state=state)", who
    )
    _returned.cost(step.cost, Cost, who)
    for quantity in sorted(wants - step.quantities.keys()):
        raise ValueError(
            f"{who} was asked for the quantity {quantity!r}, which {type(solver).__name__} offers, and returns "
            f"Step(quantities={{...}}) with {sorted(step.quantities) or 'nothing'} in it."
        )
    return step


def fitting(solver: Solver, step: Step, k1: PyTree, state: PyTree) -> Step:
    """The step of `solver` that is to be tried, which began with `state`; its own is then in the dtypes of `init`.

    Raises:
      ValueError: a direction that is not like k1, a state that is not like the one before.
    """
    who = f"{type(solver).__name__}.step"
    check_like_params(step.direction, k1, f"The direction that {who} returns", "k1")
    kept = None if step.refused_state is None else _returned.state(step.refused_state, state, f"{who} (refused_state)")
    return step._replace(state=_returned.state(step.state, state, who), refused_state=kept)


_ABOUT: dict[Quantity, tuple[str, str]] = {
    "error": (
        "an embedded error estimate",
        "Use a solver that has one, such as 'bogacki_shampine', 'tsit5', 'rkc2' or Ros2, or descent_control()",
    ),
    "curvature": (
        "the curvature read off the solver's first two stages",
        "Use estimate='product' or 'difference' instead of 'free', or a solver with a second stage, such as 'heun'",
    ),
    "predicted_fall": (
        "the fall of the loss by the solver's quadratic model",
        "Use it with rosenbrock_euler or residual_euler, or descent_control() with this solver",
    ),
    "path": ("the steps of all h from one factorisation", "Use it with residual_euler or rosenbrock_euler"),
    "precise_path": ("the same with more digits", "Ask for 'path': where there is one, it comes with that"),
    "last_stage": ("the field at the end of the step", "Use a solver whose last stage is the next first one"),
    "dense": ("dense output", "Use an explicit solver"),
    "stages": ("the stages of an explicit method of at least two", "Use a tableau, such as 'heun' or 'rk4'"),
}


def check_offers(solver: Solver, wants: frozenset[Quantity], who: str) -> None:
    """Raises a ValueError, with the remedy, where `who` wants what the solver does not offer.

    A quantity that the package does not know has a name of its author's, and what offers it, too.
    """
    own = "Use a solver whose offers have it"
    for quantity in sorted(_checks.names(wants, f"{who}: wants") - _checks.names(solver.offers, "offers")):
        what, remedy = _ABOUT.get(quantity, (f"the quantity {quantity!r}", own))
        raise ValueError(f"{who} needs {what}, which {name_of(solver)} does not offer. {remedy}.")


def needs_of(wants: frozenset[Quantity]) -> frozenset[Capability]:
    """What the wanted quantities need of a field: those that are differences of stages, stages without own noise."""
    return frozenset({"deterministic"}) if wants & {"error", "curvature"} else frozenset()


def name_of(solver: Solver) -> str:
    """How messages call a solver."""
    tableau = getattr(solver, "tableau", None)
    return type(solver).__name__ if tableau is None else f"the tableau {tableau.name!r}"
