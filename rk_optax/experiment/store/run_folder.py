"""The folder that a run writes: resolved configuration, metrics line by line, finished pieces, results."""

import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TextIO, TypeVar

import flax
import jax
import numpy as np
import optax
from pydantic_core import to_jsonable_python

import rk_optax
from rk_optax.experiment.config import parse
from rk_optax.experiment.errors import UsageError, refusing, require

Config = TypeVar("Config")


class RunFolder:
    """A folder in which what has been written is complete at any moment, so that Ctrl-C loses nothing.

    `metrics.jsonl` holds one strict JSON object per line; NaN and infinities are written as null. A piece of the run
    that is finished has a file of its own in `pieces/`, from which a resumed run takes it.
    """

    def __init__(self, path: Path, *, resume: bool = False):
        """Creates the folder, or opens that of a run that is to go on."""
        self.path, self._resumed = path, resume
        with refusing(f"{path}: cannot write a run there", OSError):
            if resume:
                self._forget_unfinished()
            else:
                path.mkdir(parents=True, exist_ok=True)
                remedy = "choose another folder with --out, or go on with the run in it with --resume"
                require(_blank(path), f"{path} is not empty: {remedy}")
            self._metrics = self._opened()

    def _opened(self) -> TextIO:
        return (self.path / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)

    def _forget_unfinished(self) -> None:
        """Drops the metrics of a piece that was interrupted: it will be done anew."""
        try:
            kept = [line for line, record in metrics(self.path) if self._piece(record["piece"]).exists()]
        except (ValueError, KeyError, TypeError) as error:
            path = self.path / "metrics.jsonl"
            raise UsageError(f"{path} is damaged ({error}): start afresh with --out") from error
        self._replace("metrics.jsonl", "".join(kept))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._metrics.close()

    def write_config(self, command: str, name: str, config: Any) -> None:
        """Writes the resolved configuration, and what it ran on, to the `config.json` of a new run."""
        if self._resumed:
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
        try:
            return read_json(path) if path.exists() else None
        except UsageError as error:
            raise UsageError(f"{error}; remove it to have that piece done again") from error

    def _piece(self, name: str) -> Path:
        return self.path / "pieces" / f"{name}.json"

    def _replace(self, name: str, text: str) -> None:
        """Writes a file so that at any moment there is all of the new one or all of the old one."""
        unfinished = self.path / f"{name}.new"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.path / name)


class TrainFolder(RunFolder):
    """A run folder whose metrics can be wound back to a checkpoint."""

    def _forget_unfinished(self) -> None:
        """Leaves the metrics alone until the checkpoint is known that they have to end with."""

    def rewind(self, steps: int | None) -> dict[str, Any] | None:
        """Drops the metrics beyond a checkpoint, with a last line that was cut short; returns the last record left."""
        path, kept, last = self.path / "metrics.jsonl", [], {}
        try:
            for line, record in metrics(self.path) if steps is not None else ():
                if record["steps"] <= steps:
                    kept.append(line)
                    last = record
                if record["steps"] >= steps:
                    break
        except (ValueError, KeyError, TypeError):
            last = {}
        require(
            last.get("steps") == steps, f"{path} is damaged: no metrics of step {steps}, from which the run goes on"
        )
        self._metrics.close()
        self._replace(path.name, "".join(kept))
        self._metrics = self._opened()
        return last or None


def stored_config(path: Path, command: str, kind: type[Config]) -> Config:
    """The configuration of the run in a folder."""
    config = path / "config.json"
    require(config.exists(), f"{path} holds no run to resume: start one with --out {path}")
    content = read_json(config)
    written = isinstance(content, dict) and content.get("command") == command
    require(written, f"{path} holds no run of rk-optax {command}")
    with refusing(f"{config} is damaged, or of another version of rk-optax", UsageError):
        return parse(kind, json.dumps(content.get("config")))


def first_difference(old: Any, new: Any) -> str | None:
    """The first field in which two configurations differ, with both values; None if there is none."""
    before, after = (_flat(_strict(dataclasses.asdict(config))) for config in (old, new))
    for field in differing(before, after):
        return f"{field} = {before.get(field)!r}, not {after.get(field)!r}"
    return None


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """The keys under which two mappings have not the same."""
    return (key for key in {**one, **other} if one.get(key) != other.get(key))


def read_json(path: Path) -> Any:
    """What a JSON file of a run holds."""
    with (
        refusing(f"{path.parent} holds no run: {path.name}", OSError),
        refusing(f"{path} is damaged", ValueError, RecursionError),  # of UTF-8 or of JSON
    ):
        return json.loads(path.read_text(encoding="utf-8"))


def metrics(folder: Path) -> Iterator[tuple[str, Any]]:
    """The lines of `metrics.jsonl` and what they say; a kill may have cut the last one short."""
    path = folder / "metrics.jsonl"
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if line.endswith(b"\n"):
            with refusing(f"{path} is damaged", ValueError, RecursionError):
                read = line.decode(), json.loads(line)
            yield read


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
    return to_jsonable_python(value, inf_nan_mode="null", fallback=lambda array: np.asarray(array).tolist())
