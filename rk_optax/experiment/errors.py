"""The error that the command line shows as one line, and how other errors become one."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


class UsageError(ValueError):
    """What was asked for cannot be done; the message says what to change.

    All that the runner checks of what it is given, configurations, data and files, ends in this error.
    """


@contextlib.contextmanager
def refusing(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of these kinds into a UsageError about `what`, with their own message after a colon."""
    try:
        yield
    except kinds as error:
        if isinstance(error, UsageError) and UsageError not in kinds:
            raise
        reason = isinstance(error, OSError) and error.strerror
        raise UsageError(f"{what}: {reason or error}") from error


def require(condition: object, message: str) -> None:
    """Raises a UsageError unless a condition holds."""
    if not condition:
        raise UsageError(message)


def optional(module: str, needs: str, install: str) -> Any:
    """A module that not every installation has, or a UsageError that says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"{needs}, which is not installed: pip install {install}") from error
