"""Configurations out of Python files and out of JSON, each field checked by pydantic against its declaration."""

import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from rk_optax.experiment.errors import UsageError, refusing, require

Config = TypeVar("Config")


def load(path: Path, kind: type[Config]) -> Config:
    """Runs a configuration file and returns what its `get_config()` returns, a dataclass of this kind, checked."""
    require(path.is_file(), f"{path}: no such config file")
    module_name = f"_rk_optax_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: a config is a Python file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up the module that defines them, so it has to be registered.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        config: Any = get_config() if callable(get_config) else None
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file does wrong is the file's error
        raise UsageError(f"{_place(error, path)}: {type(error).__name__}: {error}") from error
    usage = f"{path}: define get_config() and let it return a {kind.__name__} (see configs/digits.py)"
    require(callable(get_config), usage)
    returned = f"{path}: get_config() must return a {kind.__name__}, got {type(config).__name__}"
    require(isinstance(config, kind), returned)
    with refusing(str(path), UsageError):
        return checked(config)


def checked(config: Config) -> Config:
    """The configuration, of which every field has its declared type and lies in its declared range."""
    return _valid(pydantic.TypeAdapter(type(config)).validate_python, config)


def parse(kind: type[Config], text: str | bytes) -> Config:
    """The configuration that was written as JSON."""
    return _valid(pydantic.TypeAdapter(kind).validate_json, text)


def _valid(validate: Callable[[Any], Config], value: Any) -> Config:
    try:
        return validate(value)
    except pydantic.ValidationError as error:
        raise UsageError(_first(error)) from error


def _first(error: pydantic.ValidationError) -> str:
    """The first mistake that pydantic found, in one line."""
    mistake = error.errors()[0]
    where = ".".join(map(str, mistake["loc"])) or "the configuration"
    message = mistake["msg"].removeprefix("Value error, ").replace("Input should", "must")
    if dataclasses.is_dataclass(mistake["input"]) and mistake["type"] == "value_error":  # of fields together
        return f"{where}: {message}" if mistake["loc"] else message
    return f"{where} = {mistake['input']!r}: {message}"


def _place(error: BaseException, path: Path) -> str:
    """The line of the config file that an error came from, as `file:line`."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{path}:{error.lineno}"
    own = (path, path.resolve())
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) in own]
    return f"{path}:{lines[-1]}" if lines else str(path)
