"""What one update costs in this checkout and in another one, for every optimizer and rule, in turns.

    python benchmarks/step_cost_between.py OTHER                       # the folder that holds the other rk_optax
    python benchmarks/step_cost_between.py OTHER --json FILE --only rk4 rkc   # some rows; those in FILE are kept

Two processes, one for each version, compile the same update (a least-squares loss of a tanh MLP 64-256-256-1 on a batch
of 128, in float32 unless `--x64` is given) and take turns in random order; a turn is some updates from the same
parameters and state. Columns:

ratio     CPU time of an update here over that of the other, median of the ratios of the rounds, and their quartiles:
          whatever else the machine does falls on both.
ms        CPU time of an update, median: here, other. It counts all cores, so it is not what a user waits.
work      gradients + losses + products + rows of an update: here, other. Where they differ, so must the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent.parent
FIXED = (
    *("euler", "heun", "midpoint", "ralston", "kutta3", "ssprk3", "bogacki_shampine", "rk4", "rk38", "dopri5", "tsit5"),
    *("dopri8", "backward_euler", "implicit_midpoint", "trapezoid", "sdirk2", "sdirk3", "radau3", "gauss4", "etd1"),
    *("etdrk2", "rosenbrock_euler", "ros2", "residual_euler"),
)
SETTINGS = ("rounds", "seconds", "widths", "batch", "step_size", "x64")


def entries(step_size: float) -> dict[str, Callable[[Any, Any], Any]]:
    """From the name of a row to a function of the package and the loss that makes its optimizer."""

    def fixed(name: str) -> Callable[[Any, Any], Any]:
        return lambda rk, loss: getattr(rk, name)(loss, step_size)

    def by_default(name: str) -> Callable[[Any, Any], Any]:
        return lambda rk, loss: getattr(rk, name)(loss)

    rows = {name: fixed(name) for name in FIXED}
    for name in ("rkc", "rkl"):
        rows[f"{name}, 5 stages"] = lambda rk, loss, name=name: getattr(rk, name)(loss, step_size, stages=5)
    for name in ("rkc", "rkl", "rosenbrock_euler", "ros2", "residual_euler"):
        rows[f"{name}, default rule"] = by_default(name)
    return rows | {
        "rk4, descent_control": lambda rk, loss: rk.rk4(loss, rk.descent_control()),
        "bogacki_shampine, error_control": lambda rk, loss: rk.bogacki_shampine(loss, rk.error_control()),
        "heun, dal product": lambda rk, loss: rk.heun(loss, rk.dal(step_size)),
        "heun, dal difference": lambda rk, loss: rk.heun(loss, rk.dal(step_size, estimate="difference")),
        "heun, dal free": lambda rk, loss: rk.heun(loss, rk.dal(step_size, estimate="free")),
        "euler, sgd_g2": lambda rk, loss: rk.euler(loss, rk.sgd_g2(step_size)),
        "rk4, precondition_by_adam": lambda rk, loss: rk.rk4(
            loss, step_size, preconditioner=rk.precondition_by_adam(), momentum=0.9
        ),
    }


def serve(settings: argparse.Namespace) -> None:
    """Reads the name of a row, or a number of updates, a line each; answers with their work or CPU time."""
    import jax
    import jax.numpy as jnp

    import rk_optax

    jax.config.update("jax_enable_x64", settings.x64)
    widths, dtype = settings.widths, jnp.float64 if settings.x64 else jnp.float32
    rng = np.random.default_rng(0)
    shapes = list(itertools.pairwise(widths))
    params = [jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype) for shape in shapes]
    data = {"x": jnp.asarray(rng.normal(size=(settings.batch, widths[0])), dtype)}
    data["y"] = jnp.sin(data["x"][:, 0])

    def residuals(params, x, y):
        *hidden, last = params
        for w in hidden:
            x = jnp.tanh(x @ w)
        return (x @ last)[:, 0] - y

    loss = rk_optax.LeastSquares(residuals, reduction="mean")
    rows = entries(settings.step_size)
    update: Any = None
    state: Any = None
    for line in sys.stdin:
        if line.strip().isdigit():
            start = time.process_time()
            for _ in range(int(line)):
                jax.block_until_ready(update(params, state))
            print(time.process_time() - start, flush=True)
            continue
        tx = rows[line.strip()](rk_optax, loss)
        update = jax.jit(lambda params, state, tx=tx: tx.update(jax.grad(loss)(params, **data), state, params, **data))
        state = update(params, tx.init(params))[1]  # what the first step alone does is not counted
        after = update(params, state)[1]
        print(sum(int(b) - int(a) for a, b in zip(state.cost, after.cost, strict=True)), flush=True)


class Version:
    """A process that runs one version of the package."""

    def __init__(self, folder: pathlib.Path, settings: argparse.Namespace):
        command = [sys.executable, __file__, str(folder), "--serve", "--batch", str(settings.batch)]
        command += ["--widths", *map(str, settings.widths), "--step-size", str(settings.step_size)]
        command += ["--x64"] if settings.x64 else []
        environment = os.environ | {"PYTHONPATH": str(folder)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, line: Any) -> float:
        """The answer to a line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(line, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())


def compare(here: Version, other: Version, name: str, rounds: int, seconds: float) -> dict[str, Any]:
    """One row."""
    work = [version.ask(name) for version in (here, other)]
    count = max(1, round(seconds / max(version.ask(1) for version in (here, other))))
    rng, times = np.random.default_rng(0), []
    for _ in range(rounds):
        pair = [0.0, 0.0]
        for i in rng.permutation(2):
            version = (here, other)[i]
            version.ask(1)  # fills the caches
            pair[i] = version.ask(count) / count
        times.append(pair)
    ratios = np.array(times)[:, 0] / np.array(times)[:, 1]
    q1, ratio, q3 = np.percentile(ratios, [25, 50, 75])
    return {
        "row": name,
        "ratio": round(float(ratio), 3),
        "quartiles": [round(float(q1), 3), round(float(q3), 3)],
        "ms": [float(f"{1e3 * t:.3g}") for t in np.median(times, axis=0)],
        "work": [int(w) for w in work],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=pathlib.Path, help="the folder that holds the other rk_optax")
    parser.add_argument("--only", nargs="+", choices=list(entries(1.0)), metavar="ROW", help="rows to measure; all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.1, help="CPU seconds of a turn")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 256, 1])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--step-size", type=float, default=0.01, help="of the rows without a rule")
    parser.add_argument("--x64", action="store_true", help="in float64")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    here, other = Version(HERE, options), Version(options.other, options)
    settings = {name: getattr(options, name) for name in SETTINGS}
    rows: dict[str, Any] = {}
    if options.json and options.json.exists():
        rows = {row["row"]: row for row in json.loads(options.json.read_text())["rows"]}
    print(f"{'':34}{'ratio':>7} {'quartiles':>13} {'ms':>15} {'work':>11}")
    for name in options.only or entries(options.step_size):
        row = rows[name] = compare(here, other, name, options.rounds, options.seconds)
        (q1, q3), (ms, other_ms), (work, other_work) = row["quartiles"], row["ms"], row["work"]
        quartiles = f"{q1:.3f}-{q3:.3f}"
        print(f"{name:34}{row['ratio']:7.3f} {quartiles:>13} {ms:7} {other_ms:7} {work:5} {other_work:5}", flush=True)
        if options.json:
            options.json.write_text(json.dumps({"settings": settings, "rows": list(rows.values())}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
