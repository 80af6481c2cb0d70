"""Checks of what a solver, a rule or a preconditioner returns, which may be anybody's.

They run where the program is traced and leave nothing in it. Without them a mistake shows where the package uses the
result, in words that name no method, or broadcasts without an error.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from rk_optax.parameter_view import check_like_params

PyTree = Any
_T = TypeVar("_T", bound=tuple)
_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)  # each fits into those after it


def record(returned: Any, kind: type[_T], call: str, who: str) -> _T:
    """What `who` returned, if it is a `kind`, which is made as in `call`.

    Raises:
      TypeError: it is something else.
    """
    if not isinstance(returned, kind):
        raise TypeError(f"{who} must return a rk_optax.{call}, got {type(returned).__name__}.")
    return returned


def cost(spent: Any, kind: type[_T], who: str) -> _T:
    """What `who` has spent, if it is a `kind` of counts.

    Raises:
      TypeError: it is something else, or counts what is no integer.
    """
    if not isinstance(spent, kind):
        raise TypeError(f"The cost that {who} returns must be a rk_optax.Cost, got {type(spent).__name__}.")
    for name, n in spent._asdict().items():  # pyright: ignore[reportAttributeAccessIssue]
        if _kind(n) > 1 or jnp.shape(n) != ():
            raise TypeError(f"The cost that {who} returns counts {name}: an integer scalar, got {n!r}.")
    return spent


def scalar(value: Any, what: str) -> Any:
    """A scalar, as it is.

    Raises:
      ValueError: it has another shape, which would be broadcast over the parameters.
    """
    if jnp.shape(value) != ():
        raise ValueError(f"{what} must be a scalar, got shape {jnp.shape(value)}.")
    return value


def state(new: PyTree, before: PyTree, who: str) -> PyTree:
    """The next state, in the dtypes of the one before: a loop that is compiled carries one type.

    Raises:
      ValueError: other leaves or shapes, or a leaf that the dtype of `init` would truncate, as an integer does a float.
    """
    what = f"The state that {who} returns"
    check_like_params(new, before, what, "the state that init made")

    def kept(path: Any, leaf: Any, old: Any) -> Any:
        dtype = _dtype(old)
        if getattr(leaf, "dtype", None) == dtype:
            return leaf
        if _kind(leaf) > _kind(old):
            raise ValueError(
                f"{what} has {_dtype(leaf)} at state{jax.tree_util.keystr(path)}, where init has {dtype}, which would "
                f"truncate it: let init return {_dtype(leaf)} there."
            )
        return jnp.asarray(leaf, dtype)

    return jax.tree_util.tree_map_with_path(kept, new, before)


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)


def _kind(value: Any) -> int:
    """The place of its dtype in `_KINDS`; what is no number, such as a random key, stands before all."""
    return next((i for i, kind in enumerate(_KINDS) if jnp.issubdtype(_dtype(value), kind)), -1)
