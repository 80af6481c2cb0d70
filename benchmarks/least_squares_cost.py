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
path                 `value_and_update` under path_control, with its trials and the corrections of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import rk_optax  # noqa: E402

SIZES = (1020, 3500, 8000)
WIDTHS = (2, 32, 32, 32, 1)


def network(params: Any, x: jax.Array) -> jax.Array:
    *hidden, (w, b) = params
    for v, c in hidden:
        x = jnp.tanh(x @ v + c)
    return (x @ w + b)[0]


def equation(params: Any, x: jax.Array) -> jax.Array:
    def second(unit: jax.Array) -> jax.Array:
        def first(y: jax.Array) -> jax.Array:
            return jax.jvp(lambda z: network(params, z), (y,), (unit,))[1]

        return jax.jvp(first, (x,), (unit,))[1]

    force = 5 * jnp.pi**2 * jnp.sin(jnp.pi * x[0]) * jnp.sin(2 * jnp.pi * x[1])
    return jnp.sum(jax.vmap(second)(jnp.eye(2, dtype=x.dtype))) + force


LOSS = rk_optax.LeastSquares(
    {"equation": equation, "boundary": lambda params, edge: network(params, edge)},
    weights={"equation": 1.0, "boundary": 100.0},
    pointwise=["x", "edge"],
    reduction="mean",
)


def problem(count: int, dtype: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Parameters and data, an eighth of the points on the boundary."""
    rng = np.random.default_rng(0)
    params = [
        (jnp.asarray(rng.normal(size=(i, o)) / np.sqrt(i), dtype), jnp.zeros(o, dtype))
        for i, o in itertools.pairwise(WIDTHS)
    ]
    edge = rng.uniform(size=(count // 8, 2))
    edge[np.arange(len(edge)), rng.integers(2, size=len(edge))] = rng.integers(2, size=len(edge))
    inside = rng.uniform(size=(count - len(edge), 2))
    return params, {"x": jnp.asarray(inside, dtype), "edge": jnp.asarray(edge, dtype)}


def programs(count: int, dtype: Any, with_path: bool) -> dict[str, Callable[[], Any]]:
    """From the name of a column to what is timed."""
    params, data = problem(count, dtype)

    def matrix(params: Any) -> jax.Array:
        jacobian = jax.tree.leaves(LOSS.rows(params, data).jacobian)
        return jnp.concatenate([leaf.reshape(count, -1) for leaf in jacobian], axis=1)

    def smaller(rows: jax.Array) -> jax.Array:
        return rows @ rows.T if rows.shape[0] <= rows.shape[1] else rows.T @ rows

    rows = jax.jit(matrix)(params)
    gram = jax.jit(smaller)(rows)
    shifted = gram + 1e-3 * jnp.trace(gram) / len(gram) * jnp.eye(len(gram), dtype=dtype)
    of_rows, of_gram = jax.jit(LOSS.rows), jax.jit(smaller)
    gradient, factor = jax.jit(jax.value_and_grad(LOSS)), jax.jit(jnp.linalg.cholesky)
    trust = rk_optax.residual_euler(LOSS)
    path = rk_optax.residual_euler(LOSS, rk_optax.path_control())

    @jax.jit
    def update(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(LOSS)(params, **data)
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
            found = measured(programs(count, precision, not options.no_path), options.rounds)
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
