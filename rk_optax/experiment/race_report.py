"""The table and the figure of a race."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from rk_optax.experiment.plot import COLORS, MARKERS
from rk_optax.experiment.race import Result, Run


def first_below(run: Run, target: float) -> int | None:
    """The first point whose error is at most the target."""
    below = np.flatnonzero(run.error <= target)
    return int(below[0]) if len(below) else None


def summary(results: Sequence[Result], targets: Sequence[float]) -> list[dict[str, Any]]:
    """One record per entrant: medians over its seeds, and the price of every target.

    Gradients, V and seconds of a target are medians over all seeds, with those that never reach it as infinite (None).
    """
    rows = []
    for result in results:
        prices = []
        for target in targets:
            paid = [(run, first_below(run, target)) for run in result.runs]
            columns = {
                "gradients": [np.inf if i is None else run.gradients[i] for run, i in paid],
                "v": [np.inf if i is None else run.seconds[i] / run.v_seconds for run, i in paid],
                "seconds": [np.inf if i is None else run.seconds[i] for run, i in paid],
            }
            prices.append(
                {
                    "error": target,
                    "reached": sum(i is not None for _, i in paid),
                    **{name: _median(values) for name, values in columns.items()},
                }
            )
        last = {
            field: [float(getattr(run, field)[-1]) for run in result.runs] for field in ("error", "loss", "seconds")
        }
        rows.append(
            {
                "entrant": result.name,
                "tuned": result.value,
                "seeds": len(result.runs),
                "final_error": _median(last["error"]),
                "final_error_range": [min(last["error"]), max(last["error"])],
                "final_loss": _median(last["loss"]),
                "seconds": _median(last["seconds"]),
                "v_ms": _median([1e3 * run.v_seconds for run in result.runs]),
                "targets": prices,
                "curve": _curve(result.runs),
            }
        )
    return rows


def race_table(rows: Sequence[dict[str, Any]], error_name: str) -> Table:
    """Gradients, V and seconds to every target, and where each entrant ends."""
    table = Table(title=f"{error_name}: median over {rows[0]['seeds']} seeds (– : not by half of them)")
    table.add_column("entrant")
    for price in rows[0]["targets"]:
        table.add_column(f"≤ {price['error']:g}\ngradients / V / s", justify="right")
    table.add_column("at the end\n(lowest to highest)", justify="right")
    table.add_column("after\ns", justify="right")
    for row in rows:
        tuned = "" if row["tuned"] is None else f", {row['tuned']:g}"
        cells = [
            " / ".join(
                "–" if price[k] is None else f"{price[k]:.{d}f}"
                for k, d in (("gradients", 0), ("v", 0), ("seconds", 2))
            )
            for price in row["targets"]
        ]
        low, high = row["final_error_range"]
        table.add_row(
            row["entrant"] + tuned,
            *cells,
            f"{row['final_error']:.2g} ({low:.2g} to {high:.2g})",
            f"{row['seconds']:.0f}",
        )
    return table


def plot_race(results: Sequence[Result], error_name: str, path: Path) -> None:
    """Error against seconds and against gradients: the median over the seeds, and their range as a band."""
    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, field, label in (
        (axes[0], "seconds", "training time, s (without compilation)"),
        (axes[1], "gradients", "gradient evaluations (products and Jacobian rows not counted)"),
    ):
        for index, result in enumerate(results):
            grid, errors = _on_grid(result.runs, field)
            color = COLORS[index % len(COLORS)]
            axis.plot(
                grid,
                np.median(errors, axis=0),
                color=color,
                linewidth=1.6,
                marker=MARKERS[index % len(MARKERS)],
                markersize=6,
                markevery=(3 * index % 12, 12),
                label=result.name + ("" if result.value is None else f", {result.value:g}"),
            )
            axis.fill_between(grid, errors.min(axis=0), errors.max(axis=0), color=color, alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.grid(which="both", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(error_name)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(results), 4),
        title=f"entrant, tuned value (median and range over {len(results[0].runs)} seeds)",
    )
    figure.savefig(path)


def _on_grid(runs: Sequence[Run], field: str) -> tuple[np.ndarray, np.ndarray]:
    """Errors (seed, point) on a common logarithmic grid of the cost: at each, that of the last point reached."""
    costs = [getattr(run, field) for run in runs]
    start, end = max(cost[1] for cost in costs), min(cost[-1] for cost in costs)
    grid = np.geomspace(max(start, 1e-9), max(end, start * (1 + 1e-9)), 80)
    at = [np.searchsorted(cost, grid, side="right") - 1 for cost in costs]
    return grid, np.stack([run.error[index] for run, index in zip(runs, at, strict=True)])


def _curve(runs: Sequence[Run]) -> dict[str, list[float]]:
    """The median error over seconds, thinned for a file."""
    if min(len(run.steps) for run in runs) < 2:
        return {"seconds": [], "error": []}
    grid, errors = _on_grid(runs, "seconds")
    thin = slice(None, None, 4)
    return {
        "seconds": [float(f"{value:.4g}") for value in grid[thin]],
        "error": [float(f"{value:.4g}") for value in np.median(errors, axis=0)[thin]],
    }


def _median(values: Sequence[float]) -> float | None:
    middle = float(np.median(values))
    return middle if np.isfinite(middle) else None
