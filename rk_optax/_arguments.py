"""Which keywords of `update` feed which arguments of a user's function.

Data reach a solver as keyword arguments of `update` and are matched by name to the signature of the loss
(or of a `grad_fn`), read once at construction.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# `update(updates, state, params, *, grad_fn=...)` has these names already: they can never reach a loss as keywords.
_TAKEN = frozenset({"updates", "state", "params", "grad_fn"})

# Generic trainers send these to every optimizer, so they are never read as misspelt data.
_COMMON_EXTRAS = frozenset({"value", "grad", "value_fn"})

_Parameter = inspect.Parameter


@dataclasses.dataclass(frozen=True)
class DataFunction:
    """A function `f(params, *data)` and the names under which `update` receives its data.

    Attributes:
      function: the user's function; its first argument is the parameters.
      role: how messages call it, such as "loss_fn".
      required: names of the data arguments without a default.
      optional: names of those with a default.
      positional: those that are passed by position, in this order; the others go by keyword.
    """

    function: Callable[..., Any]
    role: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()

    def select(self, extra_args: Mapping[str, Any]) -> dict[str, Any]:
        """Picks this function's data out of the keywords of one update.

        Raises:
          TypeError: a required argument is missing, or an unknown keyword looks like a misspelt argument.
        """
        known = (*self.required, *self.optional)
        data = {name: extra_args[name] for name in known if name in extra_args}
        unknown = [name for name in extra_args if name not in known and name not in _COMMON_EXTRAS]
        for name in unknown:
            near = near_miss(name, [required for required in self.required if required not in data])
            # An argument with a default may well be left out, and the keyword be another transformation's.
            near = near or near_miss(name, [n for n in self.optional if n not in data and _is_typo(name, n)])
            if near is not None:
                raise TypeError(
                    f"update() got a keyword {name!r}, which {self.role} does not take; did you mean "
                    f"{near!r}? {self._usage()}"
                    + (
                        f" If {name!r} is for another transformation, pass {near!r} too."
                        if near in self.optional
                        else ""
                    )
                )
        missing = [name for name in self.required if name not in data]
        if missing:
            names = ", ".join(repr(name) for name in missing)
            raise TypeError(f"update() is missing {names}, needed by {self.role}. {self._usage()}")
        return data

    def __call__(self, params: Any, data: Mapping[str, Any]) -> Any:
        """Calls the function on parameters and selected data."""
        keywords = {name: value for name, value in data.items() if name not in self.positional}
        return self.function(params, *(data[name] for name in self.positional), **keywords)

    def _usage(self) -> str:
        keywords = "".join(f", {name}={name}" for name in self.required)
        keywords += "".join(f"[, {name}={name}]" for name in self.optional)
        return f"Pass data by keyword: tx.update(grads, state, params{keywords})."


def near_miss(name: str, candidates: Sequence[str]) -> str | None:
    """The candidate that `name` looks like a misspelling of."""
    lowered = {candidate.lower(): candidate for candidate in candidates}
    # 0.65 catches a swap in a three-letter name ("rgn" for "rng", ratio 0.67).
    found = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.65)
    return lowered[found[0]] if found else None


def _is_typo(name: str, meant: str) -> bool:
    """Whether `name` is hardly a word of its own: the letters of `meant` in another order, or nearly the same ones."""
    name, meant = name.lower(), meant.lower()
    return sorted(name) == sorted(meant) or difflib.SequenceMatcher(None, name, meant).ratio() >= 0.8


def read_data_function(function: Callable[..., Any], role: str, argnames: Sequence[str] | None = None) -> DataFunction:
    """Reads the data arguments of `function` from its signature, or takes them from `argnames`.

    Args:
      function: `function(params, *data)`; `functools.partial`, bound methods, jitted functions and decorators
        with `functools.wraps` are read through.
      role: how messages call it.
      argnames: the names of the data arguments, for a signature that cannot be read by name.

    Raises:
      TypeError: `function` is not callable, or takes no parameters argument.
      ValueError: the signature cannot be read by name and `argnames` is not given, `argnames` disagrees with the
        signature, or a data argument has a name that `update` itself uses.
    """
    if not callable(function):
        raise TypeError(f"{role} must be callable, got {type(function).__name__}.")
    if isinstance(argnames, str):
        argnames = (argnames,)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a builtin or C extension without a signature
        parameters = [_Parameter("args", _Parameter.VAR_POSITIONAL)]
    if not parameters or parameters[0].kind in (_Parameter.KEYWORD_ONLY, _Parameter.VAR_KEYWORD):
        raise TypeError(
            f"{role} must take the parameters as its first positional argument, then its data: "
            f"def {role}(params, batch). Its signature has no such argument."
        )
    first, rest = parameters[0], parameters[1:]
    if first.kind is _Parameter.VAR_POSITIONAL:
        rest = parameters
    if argnames is None:
        required, optional = _readable_names(rest, role)
        positional = ()
    else:
        required, optional = tuple(argnames), ()
        positional = _positional_names(rest, required, role)
    taken = sorted(_TAKEN.intersection((*required, *optional)))
    if taken:
        raise ValueError(
            f"{role} has a data argument named {taken[0]!r}, a name that update(updates, state, params, *, "
            f"grad_fn) uses itself, so no keyword could reach it. Rename the argument."
        )
    return DataFunction(function, role, required, optional, positional)


def _readable_names(parameters: Sequence[inspect.Parameter], role: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the data arguments without and with a default, all of which can be passed by keyword."""
    reasons = {
        _Parameter.VAR_KEYWORD: "takes **{0}",
        _Parameter.VAR_POSITIONAL: "takes *{0}",
        _Parameter.POSITIONAL_ONLY: "takes {0!r} by position only",
    }
    for p in parameters:
        if p.kind in reasons:
            raise ValueError(
                f"The data arguments of {role} cannot be read from its signature: it {reasons[p.kind].format(p.name)}. "
                'Name them with argnames=("batch", ...), or wrap the decorated function with functools.wraps.'
            )
    required = tuple(p.name for p in parameters if p.default is _Parameter.empty)
    return required, tuple(p.name for p in parameters if p.default is not _Parameter.empty)


def _positional_names(parameters: Sequence[inspect.Parameter], argnames: tuple[str, ...], role: str) -> tuple[str, ...]:
    """Which of `argnames` must go by position, once they are known to fit the signature."""
    kinds = {p.name: p.kind for p in parameters}
    takes_keywords = _Parameter.VAR_KEYWORD in kinds.values()
    takes_positions = _Parameter.VAR_POSITIONAL in kinds.values()
    named = {n: k for n, k in kinds.items() if k not in (_Parameter.VAR_KEYWORD, _Parameter.VAR_POSITIONAL)}
    unlisted = [p.name for p in parameters if p.name in named and p.default is _Parameter.empty]
    unlisted = [name for name in unlisted if name not in argnames]
    further = [name for name in argnames if name not in named]
    unknown = [] if takes_keywords or takes_positions else further
    if unlisted or unknown:
        raise ValueError(
            f"argnames={argnames!r} disagrees with the signature of {role}: it "
            + (f"needs {unlisted!r} too." if unlisted else f"has no argument {unknown!r}.")
        )
    by_position = {_Parameter.POSITIONAL_ONLY}
    if further and not takes_keywords:  # *args comes after whatever can be given by position
        by_position.add(_Parameter.POSITIONAL_OR_KEYWORD)
    else:
        further = []
    return (*(n for n, kind in named.items() if kind in by_position and n in argnames), *further)
