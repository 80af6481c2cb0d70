"""The figures: of a comparison, and of runs overlaid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from rk_optax.experiment.compare import Result
from rk_optax.experiment.curves import Curve

# Okabe and Ito's palette: its colours stay apart for colour-blind readers, the markers also in print.
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

AXES = {
    "steps": "steps",
    "cost": "cost, gradient evaluations",
    "seconds": "training time, s (without compilation)",
}


def plot_comparison(results: Sequence[Result], path: Path) -> None:
    """Draws training loss and test error against steps, gradients and seconds.

    Lines are means over the seeds, bands reach from the lowest to the highest seed, and dotted
    lines mark where the table compares: the least that an entrant has spent in all.

    Args:
        results: what the comparison returned.
        path: a PNG file.
    """
    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    axes = figure.subplots(2, 3, sharex="col", sharey="row")
    spent = {
        "steps": [result.curve.steps for result in results],
        "gradient evaluations": [result.gradients for result in results],
        "training time, s (without compilation)": [result.seconds for result in results],
    }
    for column, (label, costs) in zip(axes.T, spent.items(), strict=True):
        for index, (result, cost) in enumerate(zip(results, costs, strict=True)):
            for axis, runs in zip(
                column,
                # A run without test errors is drawn at 0.01 %: there is no zero on the axis.
                (result.curve.train_loss, np.maximum(100 * (1 - result.curve.test_accuracy), 0.01)),
                strict=True,
            ):
                color = COLORS[index % len(COLORS)]
                # The initial point has no place on a logarithmic axis.
                x, y = cost[1:], runs[:, 1:]
                axis.plot(
                    x,
                    y.mean(axis=0),
                    color=color,
                    linewidth=1.6,
                    marker=MARKERS[index % len(MARKERS)],
                    markersize=6,
                    markevery=_marked(x, index),
                    label=f"{result.entrant.name}, {result.tuned.rate:.3g}",
                )
                axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.2, linewidth=0)
        for axis in column:
            axis.set_xscale("log")
            axis.axvline(min(cost[-1] for cost in costs), color="0.4", linewidth=1.2, linestyle=":")
            axis.grid(which="both", alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel(label)
    loss, error = axes[:, 0]
    for axis in (loss, error):
        _logarithmic(axis)
    loss.set_ylabel("training loss")
    error.set_ylabel("test error, % (100 − accuracy)")
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=min(len(results), 5),
        title=f"optimizer, tuned learning rate (mean and range over {len(results[0].curve.train_loss)} "
        "seeds; dotted: where the table compares)",
    )
    figure.savefig(path)


def plot_curves(curves: Sequence[Curve], x: str, path: Path) -> None:
    """Draws training loss and test error of several runs against steps, cost or seconds.

    Args:
        curves: the runs.
        x: a key of `AXES`.
        path: a PNG file.
    """
    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    loss, error = figure.subplots(2, 1, sharex=True)
    for index, curve in enumerate(curves):
        style = {
            "color": COLORS[index % len(COLORS)],
            "linestyle": ("-", "--", ":")[index // len(COLORS) % 3],
            "marker": MARKERS[index % len(MARKERS)],
            "linewidth": 1.6,
            "markersize": 6,
        }
        along = getattr(curve, x)
        # A run without test errors is drawn at 0.01 %: there is no zero on the axis.
        for axis, values in ((loss, curve.train_loss), (error, np.maximum(100 * (1 - curve.test_accuracy), 0.01))):
            seen = np.isfinite(along) & np.isfinite(values)
            marks = (index, max(1, int(seen.sum()) // 8))
            axis.plot(along[seen], values[seen], label=curve.label, markevery=marks, **style)
    for axis, name in ((loss, "training loss"), (error, "test error, % (100 − accuracy)")):
        axis.set_ylabel(name)
        axis.grid(which="both", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        _logarithmic(axis)
    error.set_xlabel(AXES[x])
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(curves), 3))
    figure.savefig(path)


def _logarithmic(axis: Any) -> None:
    """A logarithmic vertical axis with labels between the powers of ten too, which may lie outside."""
    axis.set_yscale("log")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _marked(x: np.ndarray, index: int) -> list[int]:
    """Indices of points to mark, evenly on a logarithmic axis, staggered from curve to curve."""
    wanted = np.geomspace(x[0], x[-1], 6) * 1.15**index
    return np.unique(np.searchsorted(x, wanted[wanted <= x[-1]])).tolist()
