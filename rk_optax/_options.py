"""The keywords that every optimizer takes: their types, their checks, and how functions show them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, TypeVar, cast

import jax

from rk_optax import _checks
from rk_optax._arguments import near_miss
from rk_optax.parameter_view import check_stage_dtype
from rk_optax.preconditioner import Preconditioner

PyTree = Any
_F = TypeVar("_F", bound=Callable[..., Any])


class Options(TypedDict, total=False):
    """Keywords that `scale_by_rk` and every ready optimizer share; `scale_by_rk` describes them."""

    grad_fn: Callable[..., Any] | None
    has_aux: bool
    mask: PyTree | Callable[[PyTree], PyTree] | None
    reuse_updates: bool
    argnames: Sequence[str] | None
    stage_dtype: Any
    skip_nonfinite: bool
    finite_derivatives: bool
    preconditioner: Preconditioner | None
    l2: float | jax.Array | None
    stage_batches: Literal["same", "fresh", "split"]
    batch_argnames: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CheckedOptions:
    """`Options` with their defaults, checked as far as each can be alone."""

    grad_fn: Callable[..., Any] | None = None
    has_aux: bool = False
    mask: PyTree | Callable[[PyTree], PyTree] | None = None
    reuse_updates: bool = True
    argnames: Sequence[str] | None = None
    stage_dtype: Any = "float32"
    skip_nonfinite: bool = True
    finite_derivatives: bool = False
    preconditioner: Preconditioner | None = None
    l2: float | jax.Array | None = None
    stage_batches: Literal["same", "fresh", "split"] = "same"
    batch_argnames: Sequence[str] = ()

    def __post_init__(self):
        if not isinstance(self.preconditioner, Preconditioner | None):
            raise TypeError(
                f"preconditioner must be a Preconditioner, got {type(self.preconditioner).__name__}; an Optax "
                "transformation becomes one with rk_optax.precondition_by(...), and a class such as "
                "precondition_by_adagrad when it is called."
            )
        if self.l2 is not None:
            object.__setattr__(self, "l2", _checks.number(self.l2, "l2", "not negative"))
        check_stage_dtype(self.stage_dtype)
        _checks.flags(self, "reuse_updates", "skip_nonfinite", "finite_derivatives")
        if self.finite_derivatives and not self.skip_nonfinite:
            raise ValueError(
                "finite_derivatives=True is for steps that are refused because they are not finite, and "
                "skip_nonfinite=False refuses none: leave one of the two out."
            )


_OF_READY_ONES = ("momentum", "nesterov", "after", "weight_decay")


def with_options_of(source: Callable[..., Any]) -> Callable[[_F], _F]:
    """Shows the keywords of `source` where a function takes `**options` and passes them on; others are refused.

    `help` reads the result, and so does `optax.inject_hyperparams`, which cannot see through `**options`.
    """
    shared = [p for p in inspect.signature(source).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        parameters = [*own, *(p for p in shared if p.name not in names)]
        known = [p.name for p in parameters]

        @functools.wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            for name in keywords:
                if name not in known:
                    raise TypeError(f"Got an unexpected keyword argument {name!r}; {_hint(name, known)}")
            return function(*args, **keywords)

        vars(checked)["__signature__"] = signature.replace(parameters=parameters)
        return cast(_F, checked)

    return decorate


def _hint(unknown: str, known: Sequence[str]) -> str:
    """What to do about a keyword that no optimizer takes, or not this one."""
    if unknown in _OF_READY_ONES:
        return "scale_by_rk emits g* alone: chain what is to follow after it, or use rk_optax.runge_kutta."
    near = near_miss(unknown, known)
    shared = [*Options.__annotations__, *_OF_READY_ONES]
    return f"did you mean {near!r}?" if near else f"what every optimizer takes: {', '.join(shared)}."
