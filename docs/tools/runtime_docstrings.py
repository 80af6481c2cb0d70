"""Docstrings and signatures as `help()` shows them: ready optimizers get theirs when the package is imported.

The comment behind a field of a class is its docstring. Doctests become blocks of code wherever they stand: in Markdown
`>>>` would quote three times.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> .*(?:\n(?!\n).*)*", re.MULTILINE)  # to the next empty line, at the left margin


class RuntimeDocstrings(griffe.Extension):
    """Reads functions of modules at run time, and fences doctests in all docstrings."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for everything that it has read."""
        if isinstance(obj, griffe.Function) and obj.parent is not None and obj.parent.is_module:
            _read_function(obj)
        if (
            isinstance(obj, griffe.Attribute)
            and obj.docstring is None
            and obj.parent is not None
            and obj.parent.is_class
        ):
            _read_comment(obj)
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", inspect.cleandoc(obj.docstring.value), flags=re.MULTILINE)
            text = _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", text)
            obj.docstring = griffe.Docstring(text, parent=obj)


def _read_function(function: griffe.Function) -> None:
    try:
        value = getattr(importlib.import_module(function.parent.path), function.name)
        signature = inspect.signature(value)
    except (ImportError, AttributeError, TypeError, ValueError):
        return
    if text := inspect.getdoc(value):
        function.docstring = griffe.Docstring(text, parent=function)
    if not list(function.parameters) and signature.parameters:  # a bare definition that a decorator completes
        function.parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    name,
                    kind=getattr(griffe.ParameterKind, parameter.kind.name.lower()),
                    default=None if parameter.default is parameter.empty else repr(parameter.default),
                )
                for name, parameter in signature.parameters.items()
            )
        )


def _read_comment(field: griffe.Attribute) -> None:
    if isinstance(field.filepath, list) or field.lineno is None:
        return
    line = field.filepath.read_text(encoding="utf-8").splitlines()[field.lineno - 1]
    _, mark, comment = line.rpartition(" # ")  # of two comments on a line, the one for people comes last
    if mark and not comment.startswith("pyright"):
        field.docstring = griffe.Docstring(comment, parent=field)
