"""Docstrings as `help()` shows them: those of the ready optimizers are completed when the package is imported."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import griffe


class RuntimeDocstrings(griffe.Extension):
    """Replaces the docstring of every module-level function by that of the function itself."""

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Called by griffe for each function it has read."""
        if func.parent is None or not func.parent.is_module or not func.path.startswith("rk_optax"):
            return
        try:
            value = getattr(importlib.import_module(func.parent.path), func.name)
        except (ImportError, AttributeError):
            return
        text = inspect.getdoc(value)
        if text:
            func.docstring = griffe.Docstring(text, parent=func)
