"""The curves of finished or running experiments, read from their folders."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rk_optax.experiment.errors import UsageError


class Curve(NamedTuple):
    """One line of a plot; NaN where nothing was measured."""

    label: str
    steps: np.ndarray  # (point,)
    cost: np.ndarray  # (point,) gradients
    seconds: np.ndarray  # (point,) NaN if nobody timed the run
    train_loss: np.ndarray  # (point,)
    test_accuracy: np.ndarray  # (point,)


def read_curves(path: Path) -> list[Curve]:
    """The curve of a training run, or the curves of a comparison, each the mean over its seeds.

    Args:
        path: the folder.

    Raises:
        UsageError: if it holds no run with metrics, or a damaged one.
    """
    config = _read(path / "config.json", path)
    records = [_object(line, path / "metrics.jsonl") for line in _lines(path / "metrics.jsonl", path)]
    try:
        if config.get("command") == "train":
            curves = [_curve(path.name, records, None)]
        else:
            curves = _comparison(path.name, records)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path / 'metrics.jsonl'} is damaged: {type(error).__name__}: {error}") from error
    if not any(len(curve.steps) for curve in curves):
        raise UsageError(f"{path}: the run has no metrics to plot yet")
    return curves


def _comparison(name: str, records: Sequence[Mapping[str, Any]]) -> list[Curve]:
    phases: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        phases[record["phase"]][record["optimizer"]].append(record)
    timed = phases["time"]
    return [
        _curve(f"{name}, {optimizer}", compared, timed.get(optimizer, []))
        for optimizer, compared in phases["compare"].items()
    ]


def _curve(label: str, records: Sequence[Mapping[str, Any]], timed: Sequence[Mapping[str, Any]] | None) -> Curve:
    """The curve of these records, with the seconds of their own or of other records."""
    steps, (cost, loss, accuracy) = _means(records, "gradients", "train_loss", "test_accuracy")
    if timed is None:
        seconds = _means(records, "seconds")[1][0]
    elif timed:
        at, (measured,) = _means(timed, "seconds", average=np.median)
        # A constant time per step where the timed runs were shorter than the compared ones.
        seconds = np.interp(steps, at, measured) * np.maximum(steps / max(at[-1], 1), 1)
    else:
        seconds = np.full(len(steps), np.nan)
    return Curve(label, steps, cost, seconds, loss, accuracy)


def _means(
    records: Sequence[Mapping[str, Any]], *fields: str, average: Any = np.mean
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The steps that records are of, and each field averaged over the records of the same step."""
    by_step: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        by_step[record["steps"]].append(record)
    steps = sorted(by_step)
    values = [[average([_number(record[field]) for record in by_step[step]]) for step in steps] for field in fields]
    return np.array(steps, float), [np.array(column, float) for column in values]


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)


def _lines(path: Path, folder: Path) -> list[str]:
    """The whole lines of a file; the last one of a running or killed run may be cut short."""
    lines = _text(path, folder).splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _read(path: Path, folder: Path) -> Mapping[str, Any]:
    return _object(_text(path, folder), path)


def _object(text: str, path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} is damaged: {text[:40]!r} is no record")
    return content


def _text(path: Path, folder: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise UsageError(f"{folder} holds no run: {path.name}: {error.strerror or error}") from error
