"""What a race found: where each entrant ends, and what every error costs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rk_optax.experiment.runs.race import Raced, RaceRun


def race_summary(results: Sequence[Raced], targets: Sequence[float]) -> list[dict[str, Any]]:
    """One record per entrant: medians over its seeds, and the price of every target.

    Gradients, V and seconds of a target are medians over all seeds, with those that never reach it as infinite (None).
    """
    rows = []
    for result in results:
        errors = np.array([run.error[-1] if np.isfinite(run.error[-1]) else np.inf for run in result.runs])
        rows.append(
            {
                "entrant": result.name,
                "tuned": result.value,
                "seeds": len(result.runs),
                "final_error": _median(errors),
                "final_error_range": [_median(errors.min()), _median(errors.max())],
                "final_loss": _median([run.loss[-1] for run in result.runs]),
                "seconds": _median([run.seconds[-1] for run in result.runs]),
                "v_ms": _median([1e3 * run.v_seconds for run in result.runs]),
                "targets": [_price(result.runs, target) for target in targets],
                "curve": _curve(result.runs),
            }
        )
    return rows


def on_grid(runs: Sequence[RaceRun], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors (seed, point) on a common logarithmic grid of the cost: at each, that of the last point reached.

    A run that diverged has an infinite error from there on.
    """
    costs = [getattr(run, field) for run in runs]
    ends = [cost[-1] for run, cost in zip(runs, costs, strict=True) if np.isfinite(run.error[-1])]
    start, end = max(cost[:2][-1] for cost in costs), min(ends or [cost[-1] for cost in costs])
    low = max(start, 1e-9)  # a method of products alone counts no gradient
    grid = np.geomspace(low, max(end, low * (1 + 1e-9)), 80)
    at = [np.searchsorted(cost, grid, side="right") - 1 for cost in costs]
    errors = np.stack([run.error[index] for run, index in zip(runs, at, strict=True)])
    return grid, np.where(np.isfinite(errors), errors, np.inf)


def _price(runs: Sequence[RaceRun], target: float) -> dict[str, Any]:
    """What an error costs."""
    paid = [(run, run.first_below(target)) for run in runs]
    gradients = [np.inf if i is None else run.gradients[i] for run, i in paid]
    seconds = [np.inf if i is None else run.seconds[i] for run, i in paid]
    v = [spent / run.v_seconds for spent, run in zip(seconds, runs, strict=True)]
    prices = {"gradients": _median(gradients), "v": _median(v), "seconds": _median(seconds)}
    return {"error": target, "reached": sum(i is not None for _, i in paid), **prices}


def _curve(runs: Sequence[RaceRun]) -> dict[str, list[float]]:
    """The median error over seconds, thinned for a file."""
    if min(len(run.steps) for run in runs) < 2:
        return {"seconds": [], "error": []}
    grid, errors = on_grid(runs, "seconds")
    columns = np.stack([grid, np.median(errors, axis=0)])[:, ::4]
    shown = columns[:, np.isfinite(columns[1])]
    return {
        name: [float(f"{value:.4g}") for value in column]
        for name, column in zip(("seconds", "error"), shown, strict=True)
    }


def _median(values: Any) -> float | None:
    """The median, where what is not finite is the largest; None if that is the median."""
    middle = float(np.median(np.where(np.isfinite(values), values, np.inf)))
    return middle if np.isfinite(middle) else None
