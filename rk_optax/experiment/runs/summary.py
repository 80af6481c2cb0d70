"""What a comparison found, read off at equal steps, equal cost and equal time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rk_optax.experiment.runs.compare import Compared


class Spread(NamedTuple):
    """A quantity over the seeds, or over times; NaN as soon as one of them is."""

    mean: float
    min: float
    max: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Mean, minimum and maximum of one value per seed or time."""
        return cls(float(values.mean()), float(values.min()), float(values.max()))


class Row(NamedTuple):
    """An entrant at one point of its run."""

    equal: str  # what all the entrants have spent alike: "steps", "gradients" or "seconds"
    optimizer: str
    learning_rate: float | None
    steps: int
    gradients: int
    seconds: float
    test_accuracy: Spread
    train_loss: Spread


def summarize(results: Sequence[Compared]) -> list[Row]:
    """One row per measure of cost and entrant.

    Each measure is taken as far as every run of every entrant got, and a run is read at the last point of evaluation
    that it reaches with that. Where the cost of a step varies, steps and gradients are means over the seeds.
    """
    measures = {
        "steps": [np.broadcast_to(result.runs.steps, result.runs.gradients.shape) for result in results],
        "gradients": [result.runs.gradients for result in results],
        "seconds": [np.broadcast_to(result.seconds, result.runs.gradients.shape) for result in results],
    }
    rows = []
    for equal, spent in measures.items():
        limit = min(float(runs[:, -1].min()) for runs in spent)
        for result, runs in zip(results, spent, strict=True):
            at = np.array([np.searchsorted(run, limit * (1 + 1e-12), side="right") - 1 for run in runs])
            each = np.arange(len(at)), at
            rows.append(
                Row(
                    equal,
                    result.entrant.name,
                    result.tuned.rate,
                    round(float(result.runs.steps[at].mean())),
                    round(float(result.runs.gradients[each].mean())),
                    float(result.seconds[at].mean()),
                    Spread.of(result.runs.test_accuracy[each]),
                    Spread.of(result.runs.train_loss[each]),
                )
            )
    return rows


def as_json(results: Sequence[Compared], rows: Sequence[Row]) -> dict:
    """The content of `summary.json`."""
    return {
        "spread": "minimum and maximum over the seeds",
        "table": [
            row._asdict() | {"test_accuracy": row.test_accuracy._asdict(), "train_loss": row.train_loss._asdict()}
            for row in rows
        ],
        "optimizers": [
            {
                "optimizer": result.entrant.name,
                "gradients_per_step": result.entrant.optimizer.gradients_per_step,
                "learning_rate": result.tuned.rate,
                "at_edge_of_grid": result.tuned.at_edge,
                "trials": [
                    {"learning_rate": rate, "validation_loss": loss}
                    for rate, loss in zip(result.entrant.rates, result.tuned.losses.tolist(), strict=False)
                ],
                "timed_seconds": result.timing.totals,
                "compile_seconds": result.timing.compile_seconds,
            }
            for result in results
        ],
    }
