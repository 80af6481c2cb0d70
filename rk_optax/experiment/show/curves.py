"""The curves of finished or running experiments, read from their folders."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rk_optax.experiment.errors import UsageError, require
from rk_optax.experiment.runs.protocol import seconds_at
from rk_optax.experiment.store.run_folder import metrics, read_json

_Record = Mapping[str, Any]
TEST_ERROR = "test error, % (100 − accuracy)"


class Curve(NamedTuple):
    """One line of a plot; NaN where nothing was measured."""

    label: str
    steps: np.ndarray  # (point,)
    cost: np.ndarray  # (point,) gradients
    seconds: np.ndarray  # (point,) NaN if nobody timed the run
    train_loss: np.ndarray  # (point,)
    error: np.ndarray  # (point,)
    error_name: str = TEST_ERROR


def read_curves(path: Path) -> list[Curve]:
    """The curve of a training run, or the curves of a comparison or a race, each averaged over its seeds."""
    config = read_json(path / "config.json")
    command = config.get("command") if isinstance(config, Mapping) else None
    read: dict[Any, Callable[[Path, _Record], list[Curve]]] = {"train": _train, "compare": _compare, "race": _race}
    require(command != "flow", f"{path} holds flows, whose figure is {path / 'flow.png'}")
    known = isinstance(command, str) and command in read
    require(known, f"{path / 'config.json'} is damaged: no command of rk-optax made this run")
    try:
        curves = read[command](path, config)
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"the metrics in {path} are damaged: {type(error).__name__}: {error}") from error
    require(any(len(curve.steps) for curve in curves), f"{path}: the run has no metrics to plot yet")
    return curves


def _train(path: Path, config: _Record) -> list[Curve]:
    records = [record for _, record in metrics(path)]
    steps, (cost, seconds, loss, error) = _means(records, "gradients", "seconds", "train_loss", "test_accuracy")
    return [Curve(path.name, steps, cost, seconds, loss, error_percent(error))]


def _compare(path: Path, config: _Record) -> list[Curve]:
    phases: dict[str, dict[str, list[_Record]]] = defaultdict(lambda: defaultdict(list))
    for _, record in metrics(path):
        phases[record["phase"]][record["optimizer"]].append(record)
    curves = []
    for optimizer, compared in phases["compare"].items():
        steps, (cost, loss, accuracy) = _means(compared, "gradients", "train_loss", "test_accuracy")
        seconds = np.full(len(steps), np.nan)
        if optimizer in phases["time"]:
            timed, (measured,) = _means(phases["time"][optimizer], "seconds", average=np.median)
            seconds = seconds_at(steps, timed, measured)
        curves.append(Curve(f"{path.name}, {optimizer}", steps, cost, seconds, loss, error_percent(accuracy)))
    return curves


def _race(path: Path, config: _Record) -> list[Curve]:
    """Medians over the seeds, at the steps that all of them reached; the name of the error once the race is over."""
    summary, name = path / "summary.json", "error"
    if summary.exists():
        name = str(read_json(summary)["error"])
    curves = []
    for entrant in config["config"]["entrants"]:
        pieces = (path / "pieces" / f"run-{entrant}-{seed}.json" for seed in config["config"]["seeds"])
        runs = [read_json(piece) for piece in pieces if piece.exists()]
        fields = ("steps", "gradients", "seconds", "loss", "error")
        points = [point for run in runs for point in zip(*(run[field] for field in fields), strict=True)]
        records: list[_Record] = [dict(zip(fields, point, strict=True)) for point in points]
        steps, (cost, seconds, loss, error) = _means(records, *fields[1:], average=np.median, least=len(runs))
        curves.append(Curve(f"{path.name}, {entrant}", steps, cost, seconds, loss, error, name))
    return curves


def error_percent(accuracy: np.ndarray) -> np.ndarray:
    """The test error; one of zero is drawn at 0.01 %, because there is no zero on a logarithmic axis."""
    return np.maximum(100 * (1 - accuracy), 0.01)


def _means(
    records: Sequence[_Record], *fields: str, average: Any = np.mean, least: int = 1
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The steps that records are of, and each field averaged over the records of the same step."""
    by_step: dict[int, list[_Record]] = defaultdict(list)
    for record in records:
        by_step[record["steps"]].append(record)
    steps = sorted(step for step, same in by_step.items() if len(same) >= least)
    values = [
        [average(np.array([record[field] for record in by_step[step]], float)) for step in steps] for field in fields
    ]
    return np.array(steps, float), [np.array(column, float) for column in values]
