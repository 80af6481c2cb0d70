"""Tables for a terminal, a pipe or a file."""

import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rk_optax.experiment.config import CompareConfig
from rk_optax.experiment.direct import DIRECT
from rk_optax.experiment.entrants import OPTAX, SOLVERS
from rk_optax.experiment.rivals import RIVALS
from rk_optax.experiment.runs.compare import Compared
from rk_optax.experiment.runs.flow import DESCENT
from rk_optax.experiment.runs.summary import Row, Spread
from rk_optax.tableau import ButcherTableau


def make_console(*, stderr: bool = False, piped_width: int = 100) -> Console:
    """A console on stdout or stderr; the width holds where there is no terminal to ask."""
    stream = sys.stderr if stderr else sys.stdout
    known = stream.isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, width=None if known else piped_width, highlight=False)


def _table(left: Sequence[str], right: Sequence[str], *, folded: Sequence[str] = (), title: str | None = None) -> Table:
    """A table of columns of words, of columns of numbers, and of columns whose text may take several lines."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", overflow="fold")
    for heading in folded:
        table.add_column(heading, overflow="fold")
    return table


def comparison_table(rows: Sequence[Row]) -> Table:
    """The table of a comparison: a block each at equal steps, equal gradients, equal seconds."""
    numbers = "rate", "steps", "gradients", "seconds", "test accuracy, %", "training loss"
    table = _table(["equal", "optimizer"], numbers)
    for index, row in enumerate(rows):
        first = index == 0 or rows[index - 1].equal != row.equal
        if first and index:
            table.add_section()
        table.add_row(
            row.equal if first else "",
            row.optimizer,
            "–" if row.learning_rate is None else f"{row.learning_rate:.2g}",
            str(row.steps),
            str(row.gradients),
            f"{row.seconds:.3f}" if row.seconds < 10 else f"{row.seconds:.1f}",
            _spread(row.test_accuracy, lambda accuracy: f"{100 * accuracy:.1f}"),
            _spread(row.train_loss, lambda loss: f"{loss:#.3g}"),
        )
    return table


def comparison_notes(config: CompareConfig, results: Sequence[Compared]) -> list[str]:
    """What a reader has to know to read the table."""
    compiled = ", ".join(f"{result.entrant.name} {result.timing.compile_seconds:.1f} s" for result in results)
    notes = [
        f"Mean [min, max] over {len(config.seeds)} seeds, which set initial parameters and batches.",
        f"Rates: the best of {config.tuning.trials} for everyone, by validation loss over the last "
        f"half of the budget, on {len(config.tuning.seeds)} other seeds.",
        f"Seconds: training steps alone, one run at a time, median of {config.timed_runs}"
        + ("" if config.timed_updates is None else f" of {config.timed_updates} steps, extrapolated")
        + f"; at equal seconds, the last point evaluated (every {config.budget.evaluate_every} steps) by then.",
        f"Compilation, not included: {compiled}.",
    ]
    if any(result.entrant.optimizer.gradients_per_step is None for result in results):
        notes.append(
            "Gradients: where steps differ, a Hessian-vector product counts as two and a loss as a third of one; "
            "linear algebra shows in the seconds alone."
        )
    unsteady = max(float(result.timing.totals.max() / result.timing.totals.min()) for result in results)
    if unsteady > 1.25:
        notes.append(
            f"Caution: the timed runs of an entrant differ by a factor of up to {unsteady:.1f}, so the machine was "
            "busy with something else; do not trust the block at equal seconds."
        )
    notes += [
        f"Caution: the rate of {result.entrant.name} is the {result.tuned.at_edge} of its grid; a "
        f"better one may lie outside: widen optimizers.{result.entrant.name}.learning_rates."
        for result in results
        if result.tuned.at_edge
    ]
    return notes


def training_summary(record: Mapping[str, Any]) -> list[str]:
    """The end of a training run, from the last line of its metrics."""

    def scored(split: str) -> str:
        loss, accuracy = record[f"{split}_loss"], record.get(f"{split}_accuracy")
        if loss is None or not math.isfinite(loss):
            return f"{split}: diverged"
        return f"{split}: loss {loss:#.4g}" + ("" if accuracy is None else f", accuracy {100 * accuracy:.2f} %")

    return [
        f"{record['steps']} steps, {record['gradients']:.0f} gradients, {record['seconds']:.1f} s in training steps",
        scored("validation"),
        scored("test"),
    ]


def race_table(rows: Sequence[Mapping[str, Any]], error_name: str) -> Table:
    """Gradients, V and seconds to every target, and where each entrant ends; names are never cut."""
    title = f"{error_name}: median over {rows[0]['seeds']} seeds (– : not by half of them)"
    targets = [f"≤ {price['error']:g}\ngradients / V / s" for price in rows[0]["targets"]]
    table = _table(["entrant"], [*targets, "at the end\n(range)", "after\ns"], title=title)
    for row in rows:
        tuned = "" if row["tuned"] is None else f", {row['tuned']:g}"
        prices = [[price["gradients"], price["v"], price["seconds"]] for price in row["targets"]]
        cells = [
            " / ".join(
                "–" if cost is None else f"{cost:.{digits}f}" for cost, digits in zip(price, (0, 0, 2), strict=True)
            )
            for price in prices
        ]
        final, low, high = (_short(value) for value in (row["final_error"], *row["final_error_range"]))
        table.add_row(row["entrant"] + tuned, *cells, f"{final} ({low} to {high})", f"{row['seconds']:.0f}")
    return table


def flow_table(summary: Mapping[str, Any]) -> Table:
    """Where each of the three flows is in the second half of the time, and what it took."""
    table = _table([""], ["sharpness / (2/h)", "distance", "final\nloss", "steps", "gradients +\nproducts", "s"])
    for row in summary["flows"]:
        distance = "" if row["flow"] == DESCENT else _three(row["distance"])
        table.add_row(
            row["flow"].replace("_", " "),
            _three(row["sharpness"]),
            distance,
            f"{row['final_loss']:#.3g}",
            str(row["accepted"]),
            f"{row['gradients']} + {row['products']}",
            f"{row['seconds']:.0f}" if math.isfinite(row["seconds"]) else "–",
        )
    return table


def flow_notes(summary: Mapping[str, Any]) -> list[str]:
    """What the table does not say."""
    reached, edge = summary["reached_at"], f"2/h = {summary['edge']:g}"
    where = f"reaches {edge} at t = {reached or 0:g}."
    if reached is None:
        where = f"does not reach {edge}: give it more steps, or a higher learning_rate."
    return [
        f"Gradient descent {where}",
        "Sharpness, and distance from gradient descent: mean and range over the second half, "
        f"from t = {summary['late_from']:g} on.",
        f"Distance from the central flow over that from the gradient flow: {_three(summary['distance_ratio'])}.",
    ]


def solver_table(tableaus: Mapping[str, ButcherTableau]) -> Table:
    """Every solver with its order, cost and stability."""
    numbers = "stages", "gradients\nper step", "real\ninterval", "interval /\ngradient"
    table = _table(["solver", "order"], numbers, folded=["source"])
    for name, tableau in tableaus.items():
        interval = tableau.real_stability_interval
        embedded = "" if tableau.order_hat is None else f"({tableau.order_hat})"
        table.add_row(
            name,
            f"{tableau.order}{embedded}",
            str(tableau.stages),
            str(tableau.effective_stages),
            f"{interval:.3f}",
            f"{interval / tableau.effective_stages:.3f}",
            tableau.source,
        )
    return table


def optimizer_table(tableaus: Mapping[str, ButcherTableau]) -> Table:
    """Every other optimizer of the package in the words of its documentation, and the names of all others."""
    table = _table(["optimizer", "needs"], [], folded=["method"])
    for name, factory in SOLVERS.items():
        if name not in tableaus:
            rate = inspect.signature(factory).parameters["learning_rate"].default is inspect.Parameter.empty
            summary = (inspect.getdoc(factory) or "").splitlines()[0]
            table.add_row(name, "a learning rate" if rate else "nothing", summary)
    table.add_section()
    table.add_row("published rivals", "", ", ".join(sorted(RIVALS)))
    table.add_row("told the problem", "", ", ".join(sorted(DIRECT)))
    table.add_row("of Optax", "", ", ".join(sorted(OPTAX)))
    return table


def _three(spread: Mapping[str, float]) -> str:
    return _spread(Spread(**spread), lambda value: f"{value:#.3g}")


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _spread(spread: Spread, show: Callable[[float], str]) -> str:
    if not math.isfinite(spread.mean):
        return "diverged"
    return f"{show(spread.mean)} [{show(spread.min)}, {show(spread.max)}]"
