"""Checks of what users pass: concrete numbers are checked at construction, traced ones cannot be."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.core
import numpy as np

Kind = Literal["positive", "not negative", "decay", "shrinkage", "fraction", "growth", "real"]
_RANGES = {
    "positive": ("positive and finite", lambda x: 0 < x < math.inf),
    "not negative": ("finite and not negative", lambda x: 0 <= x < math.inf),
    "decay": ("in [0, 1)", lambda x: 0 <= x < 1),
    "shrinkage": ("in (0, 1)", lambda x: 0 < x < 1),
    "fraction": ("in (0, 1]", lambda x: 0 < x <= 1),
    "growth": ("above 1 and finite", lambda x: 1 < x < math.inf),
    "real": ("a real number", lambda x: True),
}


def number(value: Any, name: str, kind: Kind, why: str = "") -> Any:
    """A concrete number as a Python float, which promotes no dtype; a traced scalar as it is.

    Raises:
      ValueError: not a real scalar, or a concrete one that is not in its range.
    """
    what, fits = _RANGES[kind]
    traced = isinstance(value, jax.core.Tracer)
    scalar = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    # Injected hyperparameters arrive in the dtype of params, complex ones included: a traced scalar is not looked into.
    if not scalar or np.shape(value) != () or not (traced or (not np.iscomplexobj(value) and fits(float(value)))):
        raise ValueError(f"{name} must be {what}, got {value!r}" + (f"; {why}." if why else "."))
    return value if traced else float(value)


def numbers(instance: Any, why: str = "", **kinds: Kind) -> None:
    """`number` for attributes of a frozen dataclass, each of which becomes what `number` returns."""
    for name, kind in kinds.items():
        object.__setattr__(instance, name, number(getattr(instance, name), name, kind, why))


def names(value: Any, what: str) -> frozenset[Any]:
    """A set of names.

    Raises:
      TypeError: anything else; of a plain string the letters would be taken.
    """
    if not isinstance(value, frozenset | set) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{what} must be a frozenset of names, such as frozenset({{'loss'}}), got {value!r}.")
    return frozenset(value)


def is_traced(*values: Any) -> bool:
    """Whether one of the numbers is known only when the program runs, so that nothing can be said of it now."""
    return any(isinstance(value, jax.core.Tracer) for value in values)


def count(value: Any, name: str) -> int:
    """An integer of at least 1.

    Raises:
      ValueError: anything else, a traced integer too: programs are compiled for counts.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} is static: the program is compiled for it. Pass a Python integer, got {value!r}.")
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
    return int(value)


def flag(value: Any, name: str) -> bool:
    """A plain bool; NumPy's counts as one.

    Raises:
      ValueError: anything else, which would be taken for what its truth value is, and a traced boolean too: programs
        are compiled for flags.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} is static: the program is compiled for it. Pass True or False, got {value!r}.")
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def flags(instance: Any, *names: str) -> None:
    """`flag` for attributes of a frozen dataclass, each of which becomes what `flag` returns."""
    for name in names:
        object.__setattr__(instance, name, flag(getattr(instance, name), name))


def choice(value: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raises a ValueError unless `value` is one of the allowed names."""
    if not (isinstance(value, str) and value in allowed):
        names = [repr(a) for a in allowed]
        raise ValueError(f"{name} must be {', '.join(names[:-1])} or {names[-1]}, got {value!r}.")
