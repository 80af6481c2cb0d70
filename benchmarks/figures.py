"""Draws every figure of the site from the committed results.

    python benchmarks/figures.py

One colour and marker per method in all of them. Files go to docs/figures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"

# Okabe and Ito's palette, for colour-blind readers; line and marker keep two methods of one colour apart.
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, BLACK, GREY = "#0072B2", "#D55E00", "#CC79A7", "#000000", "#777777"
BROWN, PURPLE = "#8A6D00", "#7F3C8D"
STYLES: dict[str, tuple[str, str, str, str]] = {  # method: label, colour, marker, line
    "sgd": ("SGD", GREY, "v", "-"),
    "gradient_descent": ("gradient descent", GREY, "v", "-"),
    "momentum": ("SGD with momentum", ORANGE, "s", "-"),
    "nesterov": ("Nesterov", ORANGE, "s", "--"),
    "adam": ("Adam", BLACK, "D", "-"),
    "lbfgs": ("L-BFGS", PINK, "X", "-"),
    "adam, lbfgs": ("Adam, then L-BFGS", PINK, "x", "--"),
    "heun": ("Heun", SKY, "^", "-"),
    "rk4": ("RK4", RED, "o", "-"),
    "rk4_adagrad": ("RK4 + preconditioner", PINK, "^", "--"),
    "rk4_dal": ("RK4 + DAL", SKY, "X", "--"),
    "rk4_momentum": ("RK4 + momentum", BROWN, "s", "--"),
    "rk4_all": ("RK4 + all three", PURPLE, "P", "-."),
    "rk4_split": ("RK4, split batch", GREY, "d", ":"),
    "rkc": ("rkc", GREEN, "P", "-"),
    "rosenbrock_euler": ("rosenbrock_euler", SKY, "d", "-"),
    "rosenbrock_euler, path": ("rosenbrock_euler, path_control()", SKY, "D", "--"),
    "rosenbrock_euler, secant": ('rosenbrock_euler("secant")', GREEN, "X", "--"),
    "rosenbrock_euler, limited secant": ('rosenbrock_euler("limited_secant")', GREEN, "X", ":"),
    "residual_euler": ("residual_euler", BLUE, "o", "-"),
    "residual_euler, search": ("residual_euler, line_search()", BLUE, "o", ":"),
    "residual_euler, path": ("residual_euler, path_control()", BLUE, "o", "--"),
    "ssbroyden": ("self-scaled Broyden", RED, "X", "-"),
    "engd_w": ("ENGD-W", BROWN, "s", "-"),
    "spring": ("SPRING", PURPLE, "P", ":"),
    "somax": ("somax, Gauss–Newton", GREY, "d", "--"),
    "optimistix": ("optimistix, LM", GREY, "*", ":"),
    "sdd": ("stochastic dual descent", PURPLE, "s", ":"),
    "cg": ("conjugate gradients", RED, "P", "--"),
    "cholesky": ("Cholesky", BROWN, "*", "-"),
    "als": ("alternating least squares", RED, "*", "-."),
}
# A loss is drawn as its distance from the least value that anybody reached in the race, where there is no error.
LEAST_LOSS = {"digits"}
TITLES = {
    "poisson": "2-D Poisson PINN",
    "poisson_float64": "2-D Poisson PINN, float64",
    "poisson_small": "2-D Poisson PINN, 257 weights, float64",
    "poisson_small_float32": "2-D Poisson PINN, 257 weights, float32",
    "poisson_5d": "5-D Poisson PINN, points that stay",
    "poisson_5d_new_points": "5-D Poisson PINN, new points in each step",
    "burgers": "Burgers' equation by a PINN",
    "burgers_mild": "Burgers' equation with ν = 0.01",
    "burgers_mild_float32": "Burgers' equation with ν = 0.01, float32",
    "allen_cahn": "Allen–Cahn by a PINN",
    "allen_cahn_float32": "Allen–Cahn by a PINN, float32",
    "gp_dual": "Gaussian-process dual",
    "factorisation": "factors of a matrix",
    "logistic": "logistic regression, κ = 1e4",
    "digits": "digits, all at every step",
}
_STYLE = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "savefig.dpi": 110,
    "font.size": 10,
}


def read(name: str) -> Any:
    """A committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def style(method: str, **more: Any) -> dict[str, Any]:
    """How a method looks, everywhere."""
    label, color, marker, line = STYLES[method]
    return {
        "label": label,
        "color": color,
        "marker": marker,
        "linestyle": line,
        "markersize": 5,
        "linewidth": 1.5,
        **more,
    }


def race_seconds(ax: Axes, problem: str, entrants: Iterable[str] | None = None) -> None:
    """Median error against seconds, of all entrants or of some."""
    race = read(f"race_{problem}")
    least = _least(race) if problem in LEAST_LOSS else 0.0
    for entrant in race["entrants"]:
        if entrants is not None and entrant["entrant"] not in entrants:
            continue
        seconds, error = (np.asarray(entrant["curve"][key], float) for key in ("seconds", "error"))
        shown = (seconds > 0) & (error - least > 0)
        ax.loglog(seconds[shown], (error - least)[shown], **style(entrant["entrant"], markevery=4))
    ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # the labels of all of them run into each other
    what = f"{race['error']} − {least:.4f}" if least else race["error"]
    ax.set(xlabel="seconds, without compilation", ylabel=what, title=TITLES[problem])


def race_cost(ax: Axes, problem: str) -> None:
    """What each target costs in V, into which products, Jacobian rows and factorisations count by their time."""
    race = read(f"race_{problem}")
    least = _least(race) if problem in LEAST_LOSS else 0.0
    for entrant in race["entrants"]:
        prices = [(price["v"], price["error"] - least) for price in entrant["targets"] if price["v"] is not None]
        if prices:
            ax.loglog(*zip(*prices, strict=True), **style(entrant["entrant"], markersize=7))
            ax.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    if ax.lines:
        # A decade at least: of less Matplotlib labels more marks than there is room for.
        low, high = ax.get_xlim()
        wider = max(1.0, (10 * low / high) ** 0.5)
        ax.set_xlim(low / wider, high * wider)
    else:
        ax.set(xticks=[], yticks=[])
        ax.text(0.5, 0.5, "no target was reached in the median", ha="center", transform=ax.transAxes)
    ax.set(
        xlabel="cost in V (one value_and_grad), everything counted",
        ylabel="target reached",
        title="what a target costs",
    )


def _least(race: Any) -> float:
    """The least loss that anybody reached, less a little, so that there is no logarithm of 0."""
    reached = min(min(entrant["final_error_range"]) for entrant in race["entrants"])
    return reached - 1e-3 * abs(race["entrants"][0]["targets"][-1]["error"] - reached)


def mnist(ax: Axes, equal: str, methods: Iterable[str], quantity: str = "test_accuracy") -> None:
    """Test error or training loss against the batch size, at equal steps or gradients; mean and range of the seeds."""
    sizes = (16, 64, 1024, 8192)
    tables = {size: [row for row in read(f"mnist_{size}")["table"] if row["equal"] == equal] for size in sizes}
    for index, method in enumerate(methods):
        rows = [next(row for row in tables[size] if row["optimizer"] == method)[quantity] for size in sizes]
        values = np.array([[row[key] for key in ("mean", "min", "max")] for row in rows]).T
        mean, *ends = 100 * (1 - values) if quantity == "test_accuracy" else values
        bars = np.abs(np.sort(ends, axis=0) - mean)
        ax.errorbar(np.array(sizes) * 1.05 ** (index - 4), mean, bars, elinewidth=1, **style(method))  # side by side
    what = {"test_accuracy": "MNIST test error, %", "train_loss": "training loss, nats"}[quantity]
    ax.set(xscale="log", yscale="log", xlabel="batch size, examples", ylabel=what)
    ax.set_title({"steps": "at equal steps", "gradients": "at equal cost in gradients"}[equal])
    ax.set_xticks(sizes, map(str, sizes))
    if quantity == "test_accuracy":
        ax.set_yticks((2, 3, 5, 10), ("2", "3", "5", "10"))
    ax.minorticks_off()


def condition(ax: Axes) -> None:
    """Gradients against the condition number."""
    rows = read("stiffness")["rows"]
    for method in ("gradient_descent", "rkc"):
        points = [(row["condition"], row[method]) for row in rows if row[method] is not None]
        ax.loglog(*zip(*points, strict=True), **style(method))
    ax.set(xlabel="condition number κ", ylabel="gradients to 1e-4", title="logistic regression, float64")


def curves(ax: Axes, against: str) -> None:
    """Training loss of the mini-batch comparison on the digits at equal steps, gradients or seconds."""
    rows = [row for row in read("digits")["table"] if row["equal"] == against]
    rows.sort(key=lambda row: row["train_loss"]["mean"])
    for position, row in enumerate(rows):
        loss = row["train_loss"]
        bars = [[loss["mean"] - loss["min"]], [loss["max"] - loss["mean"]]]
        ax.errorbar([loss["mean"]], [position], xerr=bars, **style(row["optimizer"], markersize=8))
    ax.set_yticks(range(len(rows)), [STYLES[row["optimizer"]][0] for row in rows])
    ax.set(xlabel="training loss, nats", title=f"at equal {against}")


Panel = Callable[[Axes], None]
# Of the races on Poisson's problem: what everybody uses, the best of what is published for it, and our methods.
SHORT_LIST = ("adam", "lbfgs", "adam, lbfgs", "ssbroyden", "engd_w", "residual_euler", "residual_euler, path")
COST_METHODS = ("sgd", "momentum", "adam", "heun", "rk4", "rk4_adagrad", "rk4_momentum", "rk4_all")
ALL_METHODS = (*COST_METHODS, "rk4_dal", "rk4_split")


def _races() -> dict[str, tuple[list[Panel], tuple[float, float]]]:
    found: dict[str, tuple[list[Panel], tuple[float, float]]] = {}
    for problem in TITLES:
        found[f"race-{problem}"] = (
            [lambda ax, p=problem: race_seconds(ax, p), lambda ax, p=problem: race_cost(ax, p)],
            (9.5, 4.0),
        )
    return found


FIGURES_TO_DRAW: dict[str, tuple[list[Panel], tuple[float, float]]] = {
    "home": (
        [
            lambda ax: race_seconds(ax, "poisson_float64", SHORT_LIST),
            lambda ax: mnist(ax, "gradients", ("sgd", "momentum", "adam", "rk4", "rk4_all")),
        ],
        (9.5, 4.0),
    ),
    "poisson-seconds": ([lambda ax: race_seconds(ax, "poisson", SHORT_LIST)], (6.0, 4.2)),
    "mnist-cost": ([lambda ax: mnist(ax, "gradients", COST_METHODS)], (6.0, 4.2)),
    "mnist": (
        [
            lambda ax, e=equal, q=quantity: mnist(ax, e, ALL_METHODS, q)
            for quantity in ("test_accuracy", "train_loss")
            for equal in ("steps", "gradients")
        ],
        (9.5, 8.0),
    ),
    "condition": ([condition], (5.0, 3.6)),
    "digits": ([lambda ax, a=a: curves(ax, a) for a in ("steps", "gradients", "seconds")], (10.5, 2.8)),
    **_races(),
}


def draw(name: str, folder: Path = FIGURES) -> Path:
    """Draws one figure; the same bytes each time on one machine."""
    panels, size = FIGURES_TO_DRAW[name]
    path = folder / f"{name}.png"
    with mpl.rc_context(cast(Any, _STYLE)):
        rows = 2 if len(panels) == 4 else 1
        figure, axes = plt.subplots(rows, len(panels) // rows, figsize=size, squeeze=False)
        for ax, panel in zip(axes.flat, panels, strict=True):
            panel(ax)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        if len(labels) > 7 and len(panels) > 1 and name != "digits":  # one legend for all panels, over none of them
            figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8)
        elif name != "digits":  # there the methods are the labels of the axis
            for ax in axes.flat:
                ax.legend(fontsize=7.5)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    return path


if __name__ == "__main__":
    mpl.use("agg")
    FIGURES.mkdir(exist_ok=True)
    for name in FIGURES_TO_DRAW:
        print(draw(name).relative_to(ROOT))
