"""Where the step size h comes from, and why a step was refused.

h is a learning rate: an Euler step with it is a gradient-descent step.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

LearningRate = float | jax.Array | Callable[[Any], Any]


class Reason(enum.IntEnum):
    """Why a step was accepted or refused; `state.reason` holds the number.

    >>> Reason(1).message
    'a stage, the step size or the update was not finite; parameters and solver were left as they were'
    """

    ACCEPTED = 0
    NOT_FINITE = 1
    SOLVER_FAILED = 2

    @property
    def message(self) -> str:
        """A sentence for people."""
        return _MESSAGES[self]


_MESSAGES = {
    Reason.ACCEPTED: "the step was taken",
    Reason.NOT_FINITE: "a stage, the step size or the update was not finite; parameters and solver were left as "
    "they were",
    Reason.SOLVER_FAILED: "the solver could not complete a stage; parameters and solver were left as they were",
}


def as_schedule(learning_rate: LearningRate) -> Callable[[Any], Any]:
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
            return _real_scalar(h, "The learning_rate schedule")

        return scheduled
    if isinstance(learning_rate, jax.Array):
        h = _real_scalar(learning_rate, "learning_rate")
        if not isinstance(h, jax.core.Tracer):
            _check_positive(float(h), zero_is_fine=True)
        return lambda count: h
    if isinstance(learning_rate, np.ndarray) and learning_rate.shape == ():
        learning_rate = learning_rate.item()
    if isinstance(learning_rate, bool | np.bool_) or not isinstance(
        learning_rate, int | float | np.integer | np.floating
    ):
        raise TypeError(
            f"learning_rate must be a positive number, a JAX scalar or an Optax schedule, got {learning_rate!r}."
        )
    # A NumPy scalar would promote what it meets; a Python float takes each leaf's dtype.
    number = float(learning_rate)
    _check_positive(number)
    return lambda count: number


def _check_positive(number: float, *, zero_is_fine: bool = False) -> None:
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero_is_fine):
        raise ValueError(
            f"learning_rate must be finite and positive, got {number}. It is the step size h of the solver, and a "
            "solver already steps downhill; to pause training use a schedule that returns 0."
        )


def _real_scalar(h: jax.Array, what: str) -> jax.Array:
    if h.shape != () or jnp.issubdtype(h.dtype, jnp.bool_):
        raise ValueError(f"{what} must be a real scalar, got shape {h.shape} and dtype {h.dtype}.")
    # optax.inject_hyperparams casts rates to the dtype of the parameters, complex ones included.
    return jnp.real(h)
