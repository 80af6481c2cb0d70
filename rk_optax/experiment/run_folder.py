"""The folder that a run writes: resolved configuration, metrics line by line, finished pieces, results."""

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
    """A folder in which what has been written is complete at any moment, so that Ctrl-C loses nothing.

    `metrics.jsonl` holds one strict JSON object per line; NaN and infinities are written as null. A piece of the run
    that is finished has a file of its own in `pieces/`, from which a resumed run takes it.
    """

    def __init__(self, path: Path, *, resume: bool = False):
        """Creates the folder, or opens that of a run that is to go on.

        Args:
            path: the folder.
            resume: whether it holds a run already.

        Raises:
            UsageError: if it holds something, or nothing to resume, or cannot be written.
        """
        self.path, self._resumed = path, resume
        try:
            if resume:
                self._forget_unfinished()
            else:
                path.mkdir(parents=True, exist_ok=True)
                if not _blank(path):
                    raise UsageError(
                        f"{path} is not empty: choose another folder with --out, or go on with the run in it with "
                        "--resume"
                    )
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        except OSError as error:
            raise UsageError(f"{path}: cannot write a run there: {error.strerror or error}") from error

    def _forget_unfinished(self) -> None:
        """Drops the metrics of a piece that was interrupted: it will be done anew."""
        if not (self.path / "config.json").is_file():
            raise UsageError(f"{self.path} holds no run to resume: start one with --out {self.path}")
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
        # A crash of the machine may have cut the last line short.
        whole = [line for line in lines if line.endswith("}\n")]
        try:
            kept = [line for line in whole if self._piece(json.loads(line)["piece"]).exists()]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{metrics} is damaged ({error}): start afresh with --out") from error
        self._replace("metrics.jsonl", "".join(kept))

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
        """Writes the resolved configuration, and what it ran on, to `config.json`.

        Raises:
            UsageError: if the folder holds a run with another configuration.
        """
        if self._resumed:
            self._check_config(command, config)
            return
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
        self._replace(name, json.dumps(_strict(content), indent=2, allow_nan=False) + "\n")

    def log(self, piece: str, **record: Any) -> None:
        """Appends a line to `metrics.jsonl`, as part of a piece of the run."""
        self._metrics.write(json.dumps(_strict({"piece": piece, **record}), allow_nan=False) + "\n")

    def finish(self, piece: str, content: Any) -> None:
        """Keeps the result of a piece of the run."""
        self._piece(piece).parent.mkdir(exist_ok=True)
        self.write_json(str(self._piece(piece).relative_to(self.path)), content)

    def finished(self, piece: str) -> Any:
        """The result of a piece as strict JSON has it, or None if the piece is still to be done."""
        path = self._piece(piece)
        return _read_json(path, "remove it to have that piece done again") if path.exists() else None

    def _piece(self, name: str) -> Path:
        return self.path / "pieces" / f"{name}.json"

    def _replace(self, name: str, text: str) -> None:
        """Writes a file so that at any moment there is all of the new one or all of the old one."""
        unfinished = self.path / f"{name}.new"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.path / name)

    def _check_config(self, command: str, config: Any) -> None:
        stored = self.path / "config.json"
        before = _read_json(stored, "start afresh with --out")
        if not isinstance(before, dict) or not isinstance(before.get("config"), dict) or "command" not in before:
            raise UsageError(f"{stored} is damaged: start afresh with --out")
        old = _flat({"command": before["command"], **before["config"]})
        new = _flat({"command": command, **_strict(dataclasses.asdict(config))})
        for field in [*old, *new]:
            if old.get(field) != new.get(field):
                raise UsageError(
                    f"{self.path} holds a run with {field} = {old.get(field)!r}, not {new.get(field)!r}: go on with "
                    "the same configuration, or start afresh with --out"
                )


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of UTF-8 or of JSON
        raise UsageError(f"{path} is damaged ({error}): {remedy}") from error


def default_path(config_name: str) -> Path:
    """`runs/<config>-<time>`, relative to the working directory."""
    return Path("runs") / f"{config_name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _blank(path: Path) -> bool:
    """Whether a folder is empty, or was left by a run that was killed before it began."""
    begun = {"config.json.new", "metrics.jsonl"}
    metrics = path / "metrics.jsonl"
    return {entry.name for entry in path.iterdir()} <= begun and not (metrics.exists() and metrics.stat().st_size)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, by names such as budget.updates."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return leaves


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
