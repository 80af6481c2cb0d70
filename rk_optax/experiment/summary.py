"""What a comparison found, read off at equal steps, equal cost and equal time."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rk_optax.experiment.compare import Result


class Spread(NamedTuple):
    """A quantity over the seeds; NaN as soon as one of them diverged."""

    mean: float
    min: float
    max: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Mean, minimum and maximum of one value per seed."""
        return cls(float(values.mean()), float(values.min()), float(values.max()))


class Row(NamedTuple):
    """An entrant at one point of its run."""

    equal: str  # what all the entrants have spent alike: "steps", "gradients" or "seconds"
    optimizer: str
    learning_rate: float
    steps: int
    gradients: int
    seconds: float
    test_accuracy: Spread
    train_loss: Spread


def summarize(results: Sequence[Result]) -> list[Row]:
    """One row per measure of cost and entrant.

    Each measure is taken as far as every entrant got. At equal seconds the row is the last point
    of evaluation that a run reaches in that time.
    """
    measures = {
        "steps": [result.curve.steps for result in results],
        "gradients": [result.gradients for result in results],
        "seconds": [result.seconds for result in results],
    }
    rows = []
    for equal, spent in measures.items():
        limit = min(entrant[-1] for entrant in spent)
        for result, entrant in zip(results, spent, strict=True):
            index = int(np.searchsorted(entrant, limit, side="right")) - 1
            rows.append(
                Row(
                    equal,
                    result.entrant.name,
                    result.tuned.rate,
                    int(result.curve.steps[index]),
                    int(result.gradients[index]),
                    float(result.seconds[index]),
                    Spread.of(result.curve.test_accuracy[:, index]),
                    Spread.of(result.curve.train_loss[:, index]),
                )
            )
    return rows


def as_json(results: Sequence[Result], rows: Sequence[Row]) -> dict:
    """The content of `summary.json`."""
    return {
        "spread": "minimum and maximum over the seeds",
        "table": [
            row._asdict()
            | {
                "test_accuracy": row.test_accuracy._asdict(),
                "train_loss": row.train_loss._asdict(),
            }
            for row in rows
        ],
        "optimizers": [
            {
                "optimizer": result.entrant.name,
                "gradients_per_step": result.entrant.gradients_per_step,
                "learning_rate": result.tuned.rate,
                "at_edge_of_grid": result.tuned.at_edge,
                "trials": [
                    {"learning_rate": rate, "validation_loss": loss}
                    for rate, loss in zip(result.entrant.rates, result.tuned.losses.tolist(), strict=True)
                ],
                "timed_seconds": result.timing.totals,
                "compile_seconds": result.timing.compile_seconds,
            }
            for result in results
        ],
    }
