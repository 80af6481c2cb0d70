"""The folder that a run writes: resolved configuration, metrics line by line, results."""

import dataclasses
import datetime
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import flax
import jax
import numpy as np
import optax

import rk_optax
from rk_optax.experiment.errors import UsageError


class RunFolder:
    """A new folder; what has been written to it is complete at any moment, so Ctrl-C loses nothing.

    `metrics.jsonl` holds one strict JSON object per line; NaN and infinities are written as null.
    """

    def __init__(self, path: Path):
        """Creates the folder.

        Raises:
            UsageError: if it holds something already, or cannot be written.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise UsageError(f"{path} is not empty: choose another folder with --out, or remove it")
            self._metrics = (path / "metrics.jsonl").open("w", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UsageError(f"{path}: cannot write a run there: {error.strerror or error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._metrics.close()

    def write_config(self, command: str, name: str, config: Any) -> None:
        """Writes the resolved configuration, and what it ran on, to `config.json`."""
        device = jax.devices()[0]
        self.write_json(
            "config.json",
            {
                "command": command,
                "name": name,
                "config": dataclasses.asdict(config),
                "versions": {
                    "python": platform.python_version(),
                    "rk-optax": rk_optax.__version__,
                    **{package.__name__: package.__version__ for package in (jax, optax, flax, np)},
                },
                "device": {"platform": device.platform, "kind": device.device_kind},
            },
        )

    def write_json(self, name: str, content: Any) -> None:
        """Writes a JSON file of the folder."""
        text = json.dumps(_strict(content), indent=2, allow_nan=False)
        (self.path / name).write_text(text + "\n", encoding="utf-8")

    def log(self, **record: Any) -> None:
        """Appends a line to `metrics.jsonl`."""
        self._metrics.write(json.dumps(_strict(record), allow_nan=False) + "\n")


def default_path(config_name: str) -> Path:
    """`runs/<config>-<time>`, relative to the working directory."""
    return Path("runs") / f"{config_name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _strict(value: Any) -> Any:
    """The value in terms of what strict JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _strict(value.tolist())
    if isinstance(value, np.generic):
        return _strict(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, Path) else value
