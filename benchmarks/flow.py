"""What following the gradient flow costs: rk_optax.gradient_flow beside diffrax's diffeqsolve, on a network's loss.

    python benchmarks/flow.py                   # an MLP 64-64-64-10 on 256 of scikit-learn's digits, and wider ones
    python benchmarks/flow.py --json FILE       # the same, and the figures as JSON
    python benchmarks/flow.py --solver bogacki_shampine --tolerance 1e-8

Both take the same pair, by default Tsitouras's 5(4), with the same tolerances, and save a functional at the same times.
Columns:

gradients     evaluations of the field; both use the last stage of a step as the first of the next.
per gradient  processor time of a whole compiled flow over its gradients, ours over diffrax's. The two take turns, so
              that whatever else the machine does falls on both; median and quartiles over the rounds.
error         the largest difference of the saved parameters, in tolerances, to a solution with a tolerance 1e-4 times
              as large (float64). The tolerance is that of a step; over all steps it comes to some ten of them, in
              both libraries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import rk_optax

PEERS = {"tsit5": diffrax.Tsit5, "dopri5": diffrax.Dopri5, "bogacki_shampine": diffrax.Bosh3}

PyTree = Any
Run = Callable[[PyTree, dict[str, jax.Array]], tuple[PyTree, jax.Array]]  # the saved, and the gradients it took


def problem(rows: int, width: int, dtype: Any) -> tuple[PyTree, dict[str, jax.Array]]:
    """Parameters and data of a tanh network on digits."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    chosen = rng.permutation(len(images))[:rows]
    data = {"x": (images[chosen] - images.mean(0)) / 16, "y": np.eye(10)[digits[chosen]]}
    sizes = [64, width, width, 10]
    params = [{"w": rng.normal(size=(i, o)) / np.sqrt(i), "b": np.zeros(o)} for i, o in itertools.pairwise(sizes)]
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, data))


def loss_fn(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return 0.5 * jnp.mean(jnp.sum((x @ last["w"] + last["b"] - y) ** 2, axis=-1))


def ours(solver: str, ts: Any, tolerance: float, save: Any) -> Run:
    def run(params: PyTree, data: dict[str, jax.Array]) -> tuple[PyTree, jax.Array]:
        options: dict[str, Any] = {"solver": solver, "rtol": tolerance, "atol": tolerance, "save": save}
        flow = rk_optax.gradient_flow(loss_fn, params, ts, data=data, **options)
        return flow.values, flow.cost.gradients

    return jax.jit(run)


def theirs(solver: str, ts: Any, tolerance: float, save: Any) -> Run:
    pair = PEERS[solver]()
    new_stages = len(pair.tableau.b_sol) - 1  # the last is the next first one

    def field(t: Any, params: PyTree, data: dict[str, jax.Array]) -> PyTree:
        return jax.tree.map(jnp.negative, jax.grad(loss_fn)(params, **data))

    def run(params: PyTree, data: dict[str, jax.Array]) -> tuple[PyTree, jax.Array]:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            pair,
            float(ts[0]),
            float(ts[-1]),
            None,
            params,
            data,
            saveat=diffrax.SaveAt(ts=jnp.asarray(ts), fn=lambda t, y, args: y if save == "params" else save(t, y)),
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
            adjoint=diffrax.ForwardMode(),
            max_steps=100_000,
        )
        # Three evaluations to start with: two for the size of the first step, and stage 1.
        return solution.ys, 3 + new_stages * solution.stats["num_steps"]

    return jax.jit(run)


def total(t: Any, params: PyTree) -> jax.Array:
    """A functional to save."""
    return sum((jnp.sum(leaf) for leaf in jax.tree.leaves(params)), jnp.zeros([]))


def distance(a: PyTree, b: PyTree) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def measure(rows: int, width: int, end: float, solver: str, tolerance: float, rounds: int) -> dict[str, Any]:
    params, data = problem(rows, width, jnp.float64)
    ts = np.linspace(0, end, 11)
    truth, _ = ours("tsit5", ts, max(1e-4 * tolerance, 1e-12), "params")(params, data)
    figures: dict[str, Any] = {"solver": solver, "rows": rows, "width": width, "end": end, "tolerance": tolerance}
    figures["rounds"] = rounds
    runs: dict[str, Run] = {}
    for name, build in (("rk_optax", ours), ("diffrax", theirs)):
        values, gradients = build(solver, ts, tolerance, "params")(params, data)
        figures[name] = {"gradients": int(gradients), "error": distance(values, truth) / tolerance}
        runs[name] = build(solver, ts, tolerance, total)
        jax.block_until_ready(runs[name](params, data))  # compiles
    figures["gradients_ratio"] = figures["rk_optax"]["gradients"] / figures["diffrax"]["gradients"]
    if not rounds:
        return figures
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds):
        for name in sorted(runs, reverse=bool(index % 2)):
            start = time.process_time()
            jax.block_until_ready(runs[name](params, data))
            spent[name].append((time.process_time() - start) / figures[name]["gradients"])
    for name, seconds in spent.items():
        figures[name]["milliseconds_per_gradient"] = 1e3 * float(np.median(seconds))
    ratios = np.array(spent["rk_optax"]) / np.array(spent["diffrax"])
    quartiles = map(float, np.quantile(ratios, (0.25, 0.5, 0.75)))
    figures["per_gradient_ratio"] = dict(zip(("25%", "median", "75%"), quartiles, strict=True))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of timed runs; 0 for none")
    parser.add_argument("--solver", choices=tuple(PEERS), default="tsit5")
    parser.add_argument("--end", type=float, default=40.0)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256], help="widths of the hidden layers")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--json", type=pathlib.Path)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    results = [
        measure(arguments.rows, width, arguments.end, arguments.solver, arguments.tolerance, arguments.rounds)
        for width in arguments.sizes
    ]
    for r in results:
        line = (
            f"{r['solver']} at {r['tolerance']:g}, width {r['width']}: gradients {r['rk_optax']['gradients']} against "
            f"{r['diffrax']['gradients']} ({r['gradients_ratio']:.3f}), errors {r['rk_optax']['error']:.2f} and "
            f"{r['diffrax']['error']:.2f} tolerances"
        )
        if arguments.rounds:
            ratio = r["per_gradient_ratio"]
            line += (
                f", processor time per gradient {ratio['median']:.3f} ({ratio['25%']:.3f} to {ratio['75%']:.3f}) of "
                "diffrax's"
            )
        print(line)
    if arguments.json:
        about = {"python": platform.python_version(), "clock": "process_time", "dtype": "float64"}
        about |= {name: metadata.version(name) for name in ("jax", "diffrax")}
        arguments.json.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
