"""What all experiments keep to: choosing among trials, taking turns on the clock, pieces done once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from rk_optax.experiment.errors import require
from rk_optax.experiment.runs.progress import ProgressBar
from rk_optax.experiment.store.run_folder import RunFolder

Record = TypeVar("Record")


def choose(name: str, losses: Sequence[float] | np.ndarray, remedy: str) -> tuple[int, np.ndarray]:
    """Which trial has the lowest loss, and all losses, infinite where a run diverged; an error if all of them did."""
    finite = np.where(np.isfinite(losses), losses, np.inf)
    require(np.isfinite(finite).any(), f"{name} diverged at every one of its {len(finite)} trials: {remedy}")
    return int(finite.argmin()), finite


def nearest_multiple(number: int, unit: int) -> int:
    """The positive multiple of a unit that is nearest to a number."""
    return max(1, round(number / unit)) * unit


def in_turns(entrants: Sequence[Any], repeat: int) -> list[Any]:
    """The order of one round of timed runs: forth and back, so that a slow spell of the machine hits all alike."""
    return list(entrants)[:: 1 if repeat % 2 == 0 else -1]


def seconds_at(steps: np.ndarray, timed: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Seconds of a run at some steps: linear between those that were timed, proportional to the steps beyond."""
    beyond = np.maximum(steps / max(timed[-1], 1), 1)
    return np.interp(steps, timed, seconds) * beyond


def piece(
    folder: RunFolder,
    report: ProgressBar,
    kind: type[Record],
    name: str,
    work: float,
    do: Callable[..., Any],
    *given: Any,
    **about: Any,
) -> Any:
    """What `do(*given)` returns, a named tuple of a kind or a list of them; from the folder where it was done before.

    Either way it is as JSON has it, so that a resumed run goes on with the same values as another. `about` is written
    beside it.
    """
    if folder.finished(name) is None:
        done = do(*given)
        folder.finish(name, [each._asdict() for each in done] if isinstance(done, list) else about | done._asdict())
    else:
        report.advance(work)
    kept = folder.finished(name)
    return [restored(kind, each) for each in kept] if isinstance(kept, list) else restored(kind, kept)


def restored(kind: type[Record], kept: Any) -> Record:
    """A named tuple of arrays and numbers from what JSON has of it, null in an array being NaN."""
    fields: Sequence[str] = getattr(kind, "_fields", ())
    known = isinstance(kept, Mapping) and kept.keys() >= set(fields)
    require(known, "the pieces of this run are of another version of rk-optax: start afresh with --out")
    return kind(**{field: _array(kept[field]) if isinstance(kept[field], list) else kept[field] for field in fields})


def _array(values: list[Any]) -> np.ndarray:
    array = np.array(values)
    return array if array.dtype.kind == "i" else np.array(values, float)
