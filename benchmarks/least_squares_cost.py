"""What a step of residual_euler costs beside what no such step can do without: the rows, their Gram matrix, its factor.

    python benchmarks/least_squares_cost.py                          # some minutes
    python benchmarks/least_squares_cost.py --json FILE --only 1020  # some sizes; those in FILE are kept

The 2-D Poisson network of `configs/race_poisson.py`, of 2,241 weights, with N points in all. Figures are processor
milliseconds of one thread, which hardly depend on what else the machine does; each is the least of several, each
program takes its turn, and compiling is not counted. Columns:

rows, Gram, factor   in isolation: the residuals and their Jacobian; the smaller of RRᵀ and RᵀR; LAPACK's Cholesky
                     factor of it. Their sum is the floor.
gradient             one value_and_grad, which a caller of `update` takes beside the step and one of `value_and_update`
                     does not.
update               value_and_grad and `update`, under trust_ratio_control.
in one               `value_and_update`, likewise; and over the floor.
path                 `value_and_update` under path_control on all points, with its trials and the corrections of each.
of a 16th            the same on one of 16 points, as it begins.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

# Before JAX and NumPy load what reads these.
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import rk_optax  # noqa: E402
from rk_optax.experiment.tasks.pinn import poisson  # noqa: E402

SIZES = (1020, 3500, 8000)


def programs(count: int, with_path: bool) -> dict[str, Callable[[], Any]]:
    """From the name of a column to what is timed."""
    side = count // 34  # as many of all points as in the race
    problem = poisson(0, inside=count - 4 * side, side=side)
    loss, params, data = problem.loss_fn, problem.params, problem.source
    assert isinstance(loss, rk_optax.LeastSquares)  # for the type checker

    def matrix(params: Any) -> jax.Array:
        return loss.rows(params, data).matrix()

    def smaller(rows: jax.Array) -> jax.Array:
        return rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows

    rows = jax.jit(matrix)(params)
    gram = jax.jit(smaller)(rows)
    shifted = gram + 1e-3 * jnp.trace(gram) / len(gram) * jnp.eye(len(gram))
    of_rows, of_gram = jax.jit(loss.rows), jax.jit(smaller)
    gradient, factor = jax.jit(jax.value_and_grad(loss)), jax.jit(jnp.linalg.cholesky)
    trust = rk_optax.residual_euler(loss)
    path, on_fewer = (rk_optax.residual_euler(loss, rk_optax.path_control(subsets=s)) for s in ((), (16,)))

    @jax.jit
    def update(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, **data)
        return value, trust.update(grads, state, params, **data)

    def settled(tx: Any) -> tuple[Callable[[], Any], Any, Any]:
        """The step as it is after three, when h is no longer the first one."""
        step = jax.jit(lambda state, params: tx.value_and_update(state, params, **data))
        at, state = params, tx.init(params)
        for _ in range(3):
            _, updates, state = step(state, at)
            at = jax.tree.map(jnp.add, at, updates)
        return (lambda: step(state, at)), at, state

    in_one, at, state = settled(trust)
    found: dict[str, Callable[[], Any]] = {
        "rows": lambda: of_rows(params, data),
        "Gram": lambda: of_gram(rows),
        "factor": lambda: factor(shifted),
        "gradient": lambda: gradient(params, **data),
        "update": lambda: update(at, state),
        "in one": in_one,
    }
    if with_path:
        found["path"] = settled(path)[0]
        found["of a 16th"] = settled(on_fewer)[0]
    return found


def measured(columns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least processor milliseconds of each."""
    best = dict.fromkeys(columns, float("inf"))
    for program in columns.values():
        jax.block_until_ready(program())
    for _ in range(rounds):
        for name, program in columns.items():
            start = time.process_time()
            jax.block_until_ready(program())
            best[name] = min(best[name], 1e3 * (time.process_time() - start))
    return best


def main() -> None:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", default=SIZES, help="numbers of residuals")
    parser.add_argument("--precision", nargs="+", default=["float32", "float64"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-path", action="store_true", help="leave path_control out, which takes longest")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    stored: dict[str, Any] = {}
    if options.json and options.json.exists():
        stored = json.loads(options.json.read_text())["steps"]
    for precision in options.precision:
        jax.config.update("jax_enable_x64", precision == "float64")
        for count in options.only:
            found = measured(programs(count, not options.no_path), options.rounds)
            floor = found["rows"] + found["Gram"] + found["factor"]
            key = f"{precision}, N = {count}"
            stored[key] = {name: round(value, 1) for name, value in found.items()} | {"floor": round(floor, 1)}
            print(f"{key:20}", *(f"{name} {value:.0f}" for name, value in found.items()), f"floor {floor:.0f}")
            print(
                f"{'':20} over the floor:", *(f"{n} {found[n] / floor:.2f}" for n in ("in one", "path") if n in found)
            )
            if options.json:
                about = {"jax": metadata.version("jax"), "machine": platform.machine(), "parameters": 2241}
                options.json.write_text(json.dumps({"about": about, "steps": stored}, indent=1) + "\n")


if __name__ == "__main__":
    main()
