"""Checkpoints of a training run: whole states, written atomically by Orbax, checked before they are used."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.training import Point, Trainer

_FORMAT = 1


class Checkpoints:
    """The last few checkpoints of a run, by the number of steps.

    A checkpoint holds every array of the run's state under its name, parameters and optimizer state alike, as host
    arrays, so that a run may go on with other devices than it began with. It counts once `index.json` lists it,
    with the layout of the state and the checksums of its files: Orbax reads nothing that is not as it wrote it, because
    the reads that it has under way when one of them fails end in tracebacks.
    """

    def __init__(self, path: Path, keep: int):
        """Opens the folder of the checkpoints, new or old.

        Raises:
            UsageError: if it cannot be read, or its index is damaged.
        """
        # What Orbax has to say goes into exceptions too, and these we report.
        absl.logging.set_verbosity(absl.logging.FATAL)
        self._path = path.absolute()
        self._keep = keep
        try:
            self._path.mkdir(exist_ok=True)
            self._index = self._read_index()
        except OSError as error:
            raise UsageError(f"{path}: cannot hold checkpoints: {error.strerror or error}") from error
        self._checkpointer = ocp.StandardCheckpointer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._checkpointer.close()

    def save(self, point: Point) -> None:
        """Writes a checkpoint and removes those that are too many; a kill at any moment leaves the others whole."""
        arrays = {name: np.asarray(leaf) for name, leaf in _named(point.state).items()}
        folder = self._folder(point.steps)
        shutil.rmtree(folder, ignore_errors=True)  # one that was killed before it was listed
        self._checkpointer.save(folder, arrays)
        self._checkpointer.wait_until_finished()
        self._index[point.steps] = {"seconds": point.seconds, "layout": _layout(arrays), "files": _checksums(folder)}
        self._index = {steps: self._index[steps] for steps in sorted(self._index)[-self._keep :]}
        text = json.dumps({"format": _FORMAT, "checkpoints": self._index}, indent=1)
        (self._path / "index.json.new").write_text(text, encoding="utf-8")
        (self._path / "index.json.new").replace(self._path / "index.json")
        for other in self._path.iterdir():
            if other.is_dir() and other.name not in map(str, self._index):
                shutil.rmtree(other)

    def restore(self, trainer: Trainer) -> Point | None:
        """The point of the latest checkpoint, on the devices of the trainer; None if there is no checkpoint.

        Raises:
            UsageError: if it is damaged, or of another layout than the trainer's state.
        """
        steps = max((steps for steps in self._index if self._folder(steps).exists()), default=None)
        if steps is None:
            return None
        about = self._index[steps]
        wanted = _named(trainer.layout)
        self._compare(steps, about["layout"], _layout(wanted))
        try:
            found = _checksums(self._folder(steps))
        except OSError as error:
            self._refuse(steps, f"cannot be read: {error.strerror or error}")
        for name in [*about["files"], *found]:
            if found.get(name) != about["files"].get(name):
                self._refuse(steps, f"is damaged: {name} is not what was written")
        like = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
        try:
            arrays = self._checkpointer.restore(self._folder(steps), like)
        except Exception as error:  # another version of Orbax, perhaps
            self._refuse(steps, f"cannot be read: {_line(error)}")
        leaves = [arrays[name] for name in wanted]
        state = trainer.restored(jax.tree.unflatten(jax.tree.structure(trainer.layout), leaves))
        return Point(steps, about["seconds"], state)

    def _read_index(self) -> dict[int, Any]:
        path = self._path / "index.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise UsageError(
                    f"{path}: checkpoints of another version of rk-optax; remove {self._path} to start anew"
                )
            index = {int(steps): about for steps, about in content["checkpoints"].items()}
            for about in index.values():
                if not (dict(about["layout"]) and dict(about["files"]) and float(about["seconds"]) >= 0):
                    raise ValueError("an entry is incomplete")
        except FileNotFoundError:
            # A kill before the first one was listed leaves one folder at most.
            if sum(entry.is_dir() and entry.name.isdigit() for entry in self._path.iterdir()) > 1:
                raise UsageError(f"{path} is missing; remove {self._path} to start the run anew") from None
            return {}
        except UsageError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise UsageError(
                f"{path} is damaged ({_line(error)}); remove {self._path} to start the run anew"
            ) from error
        return index

    def _folder(self, steps: int) -> Path:
        return self._path / str(steps)

    def _compare(self, steps: int, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        for name in [*wanted, *found]:
            if found.get(name) != wanted.get(name):
                self._refuse(
                    steps,
                    f"has another layout: {name} is {found.get(name, 'missing')}, this version of rk-optax expects "
                    f"{wanted.get(name, 'nothing there')}",
                )

    def _refuse(self, steps: int, reason: str) -> NoReturn:
        others = [other for other in self._index if other < steps and self._folder(other).exists()]
        remedy = f"go on from step {max(others)}" if others else "start the run anew"
        raise UsageError(f"checkpoint {self._folder(steps)} {reason}; remove that folder to {remedy}")


def _named(state: Any) -> dict[str, Any]:
    """The leaves of a state by their path in it."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _layout(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _checksums(folder: Path) -> dict[str, str]:
    """The files below a folder, by their path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _line(error: Exception) -> str:
    """The beginning of an error's message; those of Orbax and TensorStore go on for pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
