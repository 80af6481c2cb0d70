"""Checkpoints of a training run: whole states, written atomically by Orbax, checked before they are used."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Self

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
import pydantic

from rk_optax.experiment.errors import UsageError, refusing, require
from rk_optax.experiment.store.run_folder import differing

_FORMAT = 2
_ABOUT = "about.json"


class _About(pydantic.BaseModel):
    """What stands in a checkpoint beside its arrays."""

    format: int
    seconds: float = pydantic.Field(ge=0)
    layout: dict[str, str] = pydantic.Field(min_length=1)
    files: dict[str, str] = pydantic.Field(min_length=1)  # their checksums


class Checkpoints:
    """The last few checkpoints of a run, by the number of steps.

    A checkpoint holds every array of the run's state under its name, parameters and optimizer state alike, as host
    arrays, so that a run may go on with other devices than it began with. Orbax's CheckpointManager writes and removes
    them; what it does not do is notice damage (a tenth of damaged files are read as other numbers, and the reads that
    are under way when another one fails end in tracebacks). So a checkpoint counts once `about.json` stands in it, with
    the layout of the state and the checksums of its files, and Orbax reads nothing that is not as it wrote it.
    """

    def __init__(self, path: Path, keep: int):
        """Opens the folder of the checkpoints, new or old."""
        # What Orbax has to say goes into exceptions too, and these we report.
        absl.logging.set_verbosity(absl.logging.FATAL)
        logging.getLogger("absl").setLevel(logging.FATAL)
        self._path = path.absolute()
        old = (path / "index.json").exists()
        require(not old, f"{path}: checkpoints of another version of rk-optax; remove {path} to start anew")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        with refusing(f"{path}: cannot hold checkpoints", OSError):
            self._path.mkdir(exist_ok=True)
            self._manager = ocp.CheckpointManager(self._path, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._manager.close()

    def save(self, steps: int, seconds: float, state: Any) -> None:
        """Writes a checkpoint and removes those that are too many; a kill at any moment leaves the others whole."""
        arrays = {name: np.asarray(leaf) for name, leaf in named(state).items()}
        for other in self._manager.all_steps():
            if other >= steps:  # one that was killed before it counted
                self._manager.delete(other)
        # Orbax refuses arrays without entries; there is nothing in them to keep.
        self._manager.save(steps, args=ocp.args.StandardSave({name: a for name, a in arrays.items() if a.size}))
        folder = self._folder(steps)
        about = _About(format=_FORMAT, seconds=seconds, layout=_layout(arrays), files=_checksums(folder))
        (folder / f"{_ABOUT}.new").write_text(about.model_dump_json(indent=1), encoding="utf-8")
        (folder / f"{_ABOUT}.new").replace(folder / _ABOUT)

    def restore(self, layout: Callable[[int], Any]) -> tuple[int, float, Any] | None:
        """Steps, seconds and host arrays of the latest checkpoint; None if there is none.

        `layout(steps)` is the state after so many steps, as shapes.
        """
        steps = max(self._counted(), default=None)
        if steps is None:
            return None
        try:
            about = _About.model_validate_json((self._folder(steps) / _ABOUT).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            self._refuse(steps, f"is damaged: {_ABOUT}: {_line(error)}")
        if about.format != _FORMAT:
            self._refuse(steps, "is of another version of rk-optax")
        like = layout(steps)
        wanted = named(like)
        expected = _layout(wanted)
        for name in differing(expected, about.layout):
            self._refuse(
                steps,
                f"has another layout: {name} is {about.layout.get(name, 'missing')}, this version of rk-optax expects "
                f"{expected.get(name, 'nothing there')}",
            )
        try:
            found = _checksums(self._folder(steps))
        except OSError as error:
            self._refuse(steps, f"cannot be read: {error.strerror or error}")
        for name in differing(about.files, found):
            self._refuse(steps, f"is damaged: {name} is not what was written")
        empty = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
        try:
            filled = {name: array for name, array in empty.items() if array.size}
            arrays: Any = self._manager.restore(steps, args=ocp.args.StandardRestore(filled))
        except Exception as error:  # another version of Orbax, perhaps
            self._refuse(steps, f"cannot be read: {_line(error)}")
        leaves = [arrays.get(name, empty[name]) for name in wanted]
        return steps, about.seconds, jax.tree.unflatten(jax.tree.structure(like), leaves)

    def _counted(self) -> list[int]:
        return [steps for steps in self._manager.all_steps(read=True) if (self._folder(steps) / _ABOUT).exists()]

    def _folder(self, steps: int) -> Path:
        return self._path / str(steps)

    def _refuse(self, steps: int, reason: str) -> NoReturn:
        others = [other for other in self._counted() if other < steps]
        remedy = f"go on from step {max(others)}" if others else "start the run anew"
        raise UsageError(f"checkpoint {self._folder(steps)} {reason}; remove that folder to {remedy}")


def named(state: Any) -> dict[str, Any]:
    """The leaves of a state by their path in it."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _layout(leaves: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _checksums(folder: Path) -> dict[str, str]:
    """The files below a folder, by their path in it, without the one that holds this."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _ABOUT)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _line(error: Exception) -> str:
    """The beginning of an error's message; those of Orbax and TensorStore go on for pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
