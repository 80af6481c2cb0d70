"""The figures: of a comparison, of a race, and of runs overlaid."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from rk_optax.experiment.errors import require
from rk_optax.experiment.runs.compare import Compared
from rk_optax.experiment.runs.flow import DESCENT, Followed
from rk_optax.experiment.runs.race import Raced
from rk_optax.experiment.show.curves import TEST_ERROR, Curve, error_percent
from rk_optax.experiment.show.race_summary import on_grid

# Okabe and Ito's palette: its colours stay apart for colour-blind readers, the markers also in print.
COLORS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

AXES = {"steps": "steps", "cost": "cost, gradient evaluations", "seconds": "training time, s (without compilation)"}


class _Drawn(NamedTuple):
    """A line of a panel, with a band around it where there are several runs."""

    label: str
    x: np.ndarray  # (point,)
    runs: np.ndarray  # (run, point)


def plot_comparison(results: Sequence[Compared], path: Path) -> None:
    """Draws training loss and test error against steps, gradients and seconds.

    Lines are means over the seeds, bands reach from the lowest to the highest seed, and dotted
    lines mark where the table compares: the least that an entrant has spent in all.
    """
    figure = Figure(figsize=(12, 7), dpi=120, layout="constrained")
    axes = figure.subplots(2, 3, sharex="col", sharey="row")
    spent = {
        "steps": [result.runs.steps for result in results],
        "gradient evaluations": [result.runs.gradients.mean(axis=0) for result in results],
        AXES["seconds"]: [result.seconds for result in results],
    }
    for column, (label, costs) in zip(axes.T, spent.items(), strict=True):
        names = [f"{result.entrant.name}{_valued(result.tuned.rate, '.3g')}" for result in results]
        # The initial point has no place on a logarithmic axis.
        losses = [result.runs.train_loss[:, 1:] for result in results]
        errors = [error_percent(result.runs.test_accuracy)[:, 1:] for result in results]
        for axis, runs in zip(column, (losses, errors), strict=True):
            lines = [_Drawn(name, x[1:], y) for name, x, y in zip(names, costs, runs, strict=True)]
            _draw(axis, lines, np.mean)
            axis.axvline(min(cost[-1] for cost in costs), color="0.4", linewidth=1.2, linestyle=":")
        column[1].set_xlabel(label)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel(TEST_ERROR)
    seeds = len(results[0].runs.train_loss)
    title = f"optimizer, tuned learning rate (mean and range over {seeds} seeds; dotted: where the table compares)"
    _save(figure, axes[0, 0], path, columns=min(len(results), 5), title=title)


def plot_race(results: Sequence[Raced], error_name: str, path: Path) -> None:
    """Error against seconds and against gradients: the median over the seeds, and their range as a band."""
    figure = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    labels = {"seconds": AXES["seconds"], "gradients": "gradient evaluations (products and Jacobian rows not counted)"}
    for axis, (field, label) in zip(axes, labels.items(), strict=True):
        names = [f"{result.name}{_valued(result.value, 'g')}" for result in results]
        grids = [on_grid(result.runs, field) for result in results]
        _draw(axis, [_Drawn(n, x, y) for n, (x, y) in zip(names, grids, strict=True)], np.median)
        axis.set_xlabel(label)
    axes[0].set_ylabel(error_name)
    title = f"entrant, tuned value (median and range over {len(results[0].runs)} seeds)"
    _save(figure, axes[0], path, columns=min(len(results), 4), title=title)


def plot_flows(results: Sequence[Followed], learning_rate: float, path: Path | str) -> None:
    """Sharpness, loss and distance from gradient descent through time.

    Dashed is the edge 2/h, dotted are the further eigenvalues of the central flow.
    """
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    sharpness, loss, distance = axes = figure.subplots(1, 3)
    for result, color in zip(results, ("#E69F00", "#0072B2", "#000000"), strict=True):
        style = {"color": color, "linewidth": 1.4, "label": result.name.replace("_", " ")}
        sharpness.plot(result.times, result.sharpness, **style)
        loss.plot(result.times, result.loss, **style)
        if result.name != DESCENT:
            distance.plot(result.times, result.distance, **style)
        if result.name == "central_flow":
            sharpness.plot(result.times, result.eigenvalues[:, 1:], color=color, linewidth=0.8, linestyle=":")
    sharpness.axhline(2 / learning_rate, color="0.4", linewidth=1.2, linestyle="--")
    for axis, label in zip(axes, ("sharpness", "loss", "distance from gradient descent"), strict=True):
        axis.set(xlabel="time nh", ylabel=label)
        _style(axis, logarithmic=axis is loss)
    _save(figure, sharpness, path, columns=3)


def plot_curves(curves: Sequence[Curve], x: str, path: Path) -> None:
    """Draws training loss and error of several runs against steps, cost or seconds."""
    kinds = dict.fromkeys(curve.error_name for curve in curves)
    require(len(kinds) <= 1, f"cannot overlay runs that measure different errors: {'; '.join(kinds)}. Draw them apart")
    figure = Figure(figsize=(9, 7), dpi=120, layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for axis, name, field in zip(axes, ("training loss", *kinds), ("train_loss", "error"), strict=True):
        lines = []
        for curve in curves:
            along, values = getattr(curve, x), getattr(curve, field)
            seen = np.isfinite(along) & np.isfinite(values)
            lines.append(_Drawn(curve.label, along[seen], values[seen][None]))
        _draw(axis, lines, np.mean, along="linear")
        axis.set_ylabel(name)
    axes[1].set_xlabel(AXES[x])
    _save(figure, axes[0], path, columns=min(len(curves), 3))


def _draw(axis: Any, lines: Sequence[_Drawn], middle: Callable[..., np.ndarray], along: str = "log") -> None:
    """Lines with their bands, along a scale."""
    for index, (label, x, runs) in enumerate(lines):
        color, line = COLORS[index % len(COLORS)], ("-", "--", ":")[index // len(COLORS) % 3]
        marks = _marked(x, index) if along == "log" else (index, max(1, len(x) // 8))
        style: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markersize": 6, "markevery": marks}
        axis.plot(x, middle(runs, axis=0), label=label, color=color, linestyle=line, linewidth=1.6, **style)
        if len(runs) > 1:
            axis.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axis.set_xscale(along)
    # The loss of a race may be negative.
    _style(axis, logarithmic=all(np.nanmin(runs, initial=np.inf) > 0 for _, _, runs in lines))


def _style(axis: Any, *, logarithmic: bool) -> None:
    """A grid, no frame, and plain numbers, on a logarithmic axis also between the powers of ten."""
    if logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(which="both", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, axis: Any, path: Path | str, *, columns: int, title: str | None = None) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, title=title)
    figure.savefig(path)


def _valued(value: float | None, form: str) -> str:
    return "" if value is None else f", {value:{form}}"


def _marked(x: np.ndarray, index: int) -> list[int]:
    """Indices of points to mark, evenly on a logarithmic axis, staggered from line to line."""
    wanted = np.geomspace(x[0], x[-1], 6) * 1.15**index
    return np.unique(np.searchsorted(x, wanted[wanted <= x[-1]])).tolist()
