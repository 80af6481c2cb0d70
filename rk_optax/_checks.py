"""Checks of numbers that users pass: concrete ones are checked at construction, traced ones cannot be."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.core
import numpy as np

_RANGES = {
    "positive": ("positive and finite", lambda x: 0 < x < math.inf),
    "not negative": ("finite and not negative", lambda x: 0 <= x < math.inf),
    "decay": ("in [0, 1)", lambda x: 0 <= x < 1),
}


def number(value: Any, name: str, kind: Literal["positive", "not negative", "decay"], why: str = "") -> Any:
    """A concrete number as a Python float, which promotes no dtype; a traced scalar as it is.

    Raises:
      ValueError: not a real scalar in its range.
    """
    if isinstance(value, jax.core.Tracer):
        return value
    what, fits = _RANGES[kind]
    scalar = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    if not scalar or np.shape(value) != () or np.iscomplexobj(value) or not fits(float(value)):
        raise ValueError(f"{name} must be {what}, got {value!r}" + (f"; {why}." if why else "."))
    return float(value)


def count(value: Any, name: str) -> int:
    """An integer of at least 1.

    Raises:
      ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    return int(value)
