"""Docstrings and signatures as `help()` shows them: ready optimizers get theirs when the package is imported.

The fields of a NamedTuple are listed with the comments behind them. Doctests become blocks of code wherever they stand:
in Markdown `>>>` would quote three times.
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
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", inspect.cleandoc(obj.docstring.value), flags=re.MULTILINE)
            text = _DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", text)
            obj.docstring = griffe.Docstring(text, parent=obj)

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Called by griffe once it knows the members of a class."""
        if cls.docstring is None or "NamedTuple" not in map(str, cls.bases) or "Attributes:" in cls.docstring.value:
            return
        fields = [field for field in cls.attributes.values() if field.annotation is not None]
        lines = [f"  {field.name}: {_comment(field) or f'a `{field.annotation}`'}" for field in fields]
        if lines:
            text = "\n".join([cls.docstring.value.rstrip(), "", "Attributes:", *lines])
            cls.docstring = griffe.Docstring(text, parent=cls)


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


def _comment(field: griffe.Attribute) -> str:
    if isinstance(field.filepath, list) or field.lineno is None:
        return ""
    line = field.filepath.read_text(encoding="utf-8").splitlines()[field.lineno - 1]
    _, mark, comment = line.rpartition(" # ")  # of two comments on a line, the one for people comes last
    return comment if mark and not comment.startswith("pyright") else ""
