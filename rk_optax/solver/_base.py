"""What a solver is: one step of one method, from a vector field to an effective gradient."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax.problem import Capability, Problem

PyTree = Any


class Cost(NamedTuple):
    """Work spent, each field an int32 scalar in state and a plain integer in a step."""

    gradients: Any = 0  # gradients, stage 1 included whoever evaluated it
    losses: Any = 0  # losses without a gradient
    products: Any = 0  # Hessian, Gauss–Newton or Jacobian products
    rows: Any = 0  # rows of an explicitly formed Jacobian

    def plus(self, other: Cost) -> Cost:
        """The sum, field by field, in int32."""
        return Cost(*(jnp.asarray(x, jnp.int32) + jnp.asarray(y, jnp.int32) for x, y in zip(self, other, strict=True)))


class Step(NamedTuple):
    """The outcome of one solver step from θ with step size h."""

    direction: PyTree  # g*, like params: the step proposes θ − h·g*
    cost: Cost
    finite: bool | jax.Array = True  # False for a stage that was not finite and does not show in g*
    solved: bool | jax.Array = True  # did the solver's own iteration, where it has one, converge?
    error: PyTree | None = None  # estimate of the local error, like params and in its units
    predicted_fall: jax.Array | None = None  # of the loss, by the solver's own quadratic model
    curvature: jax.Array | None = None  # ‖k1 − k2‖ / (a21 h ‖k1‖), about ‖Hg‖/‖g‖; None where not asked for
    work: Any = None  # gradients that h asks for, a fraction too, estimates not counted; None: see cost
    largest_step: jax.Array | None = None  # the largest h that the solver could have taken here, where it knows one
    state: PyTree = ()
    refused_state: PyTree | None = None  # what to keep of a refused step (diagnostics, estimates at θ); None: nothing


class Solver(abc.ABC):
    """A method for dθ/dt = −g(θ). Subclasses are frozen dataclasses; all that changes is in `state`.

    Attributes:
      needs: what the solver asks of a problem beyond its field; checked when a transformation is built.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset()

    @property
    def gradients_per_step(self) -> int | None:
        """Gradients of one step where each stage is one gradient and their number is fixed, else None."""
        return None

    @property
    def needs_diagonal_scale(self) -> bool:
        """Whether a preconditioner has to be a diagonal, with which alone the linear systems are symmetric."""
        return False

    @property
    def error_order(self) -> int | None:
        """p̂ of the error estimate, which falls like h^(p̂+1); None without an estimate."""
        return None

    @property
    def predicts_fall(self) -> bool:
        """Whether a step says by how much its own quadratic model of the loss falls."""
        return False

    @property
    def sees_curvature(self) -> bool:
        """Whether `step` takes `want_curvature=True`, and then returns the curvature along k1 for nothing."""
        return False

    def init(self, params: PyTree) -> PyTree:
        """The solver's state; `params` may be abstract, and holds the moving leaves only."""
        del params
        return ()

    @abc.abstractmethod
    def step(
        self,
        problem: Problem,
        params: PyTree,
        k1: PyTree,
        h: Any,
        state: PyTree,
        *,
        want_error: bool = False,
    ) -> Step:
        """One step.

        Args:
          problem: the field; `problem(params, stage)` evaluates it.
          params: θ, a pytree in the stage dtype.
          k1: the field at θ (stage 1), like params.
          h: the step size, in units of the flow's time (a learning rate): a number or a real scalar array.
          state: what `init` or the last step returned.
          want_error: whether to return an error estimate.
        """
