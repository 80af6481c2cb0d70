"""Checkpoints of a training run: whole states, written atomically by Orbax, checked before they are used."""

import hashlib
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

    A checkpoint holds every array of the run's state under its name, parameters and optimizer state alike, and beside
    them the names, shapes and types, and a checksum. Arrays are kept as host arrays, so that a run may go on
    with other devices than it began with.
    """

    def __init__(self, path: Path, keep: int):
        """Opens the folder of the checkpoints, new or old.

        Raises:
            UsageError: if it cannot be read.
        """
        # What Orbax has to say goes into exceptions too, and these we report.
        absl.logging.set_verbosity(absl.logging.FATAL)
        self._path = path.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        try:
            self._manager = ocp.CheckpointManager(self._path, options=options)
        except Exception as error:
            raise UsageError(f"{path}: cannot hold checkpoints: {_line(error)}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    def save(self, point: Point) -> None:
        """Writes a checkpoint and removes those that are too many; a kill at any moment leaves the others whole."""
        arrays = {name: np.asarray(leaf) for name, leaf in _named(point.state).items()}
        about = {
            "format": _FORMAT,
            "steps": point.steps,
            "seconds": point.seconds,
            "layout": _layout(arrays),
            "sha256": _checksum(arrays),
        }
        self._manager.save(
            point.steps, args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about))
        )

    def restore(self, trainer: Trainer) -> Point | None:
        """The point of the latest checkpoint, on the devices of the trainer; None if there is no checkpoint.

        Raises:
            UsageError: if it is damaged, or of another layout than the trainer's state.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        about = self._read(step, "about", ocp.args.JsonRestore())
        if not isinstance(about, Mapping) or about.get("format") != _FORMAT or about.get("steps") != step:
            self._refuse(step, "is damaged, or of another version of rk-optax")
        wanted = _named(trainer.layout)
        self._compare(step, about.get("layout"), _layout(wanted))
        like = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
        arrays = self._read(step, "state", ocp.args.StandardRestore(like))
        if _checksum(arrays) != about.get("sha256"):
            self._refuse(step, "is damaged: its checksum does not match")
        leaves = [arrays[name] for name in wanted]
        state = trainer.restored(jax.tree.unflatten(jax.tree.structure(trainer.layout), leaves))
        return Point(step, about["seconds"], state)

    def _read(self, step: int, item: str, how: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:  # whatever a damaged file makes a library do
            self._refuse(step, f"is damaged: {_line(error)}")

    def _compare(self, step: int, found: Any, wanted: Mapping[str, str]) -> None:
        found = found if isinstance(found, Mapping) else {}
        for name in [*wanted, *found]:
            if found.get(name) != wanted.get(name):
                self._refuse(
                    step,
                    f"has another layout: {name} is {found.get(name, 'missing')}, this version of rk-optax expects "
                    f"{wanted.get(name, 'nothing there')}",
                )

    def _refuse(self, step: int, reason: str) -> NoReturn:
        others = [other for other in self._manager.all_steps() if other < step]
        remedy = f"go on from step {max(others)}" if others else "start the run anew"
        raise UsageError(f"checkpoint {self._path / str(step)} {reason}; remove that folder to {remedy}")


def _named(state: Any) -> dict[str, Any]:
    """The leaves of a state by their path in it."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _layout(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _line(error: Exception) -> str:
    """The beginning of an error's message; those of Orbax and TensorStore go on for pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
