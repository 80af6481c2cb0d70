"""Gradients that gradient descent and `rkc` need on logistic regressions of growing condition number.

    python benchmarks/stiffness.py

Deterministic, in float64: gradients until ‖w − w*‖ ≤ 1e-4 ‖w*‖, w from 0, seed 0 of the problem. Gradient descent has
the best constant rate, 2/(λ_min + λ_max) at the optimum; `rkc` has nothing tuned. Writes
benchmarks/results/stiffness.json.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rk_optax
from rk_optax.experiment.tasks.full_batch import FullBatch
from rk_optax.experiment.tasks.problems import logistic

CONDITIONS = (1e2, 1e3, 1e4, 1e5, 1e6)
TARGET = 1e-4


def gradients_needed(problem: FullBatch, tx: Any, limit: int) -> int | None:
    """Gradients until the error is at the target; None where the limit comes first."""

    def unfinished(carry: Any) -> jax.Array:
        w, state = carry
        return (problem.error(w) > TARGET) & (state.cost.gradients < limit)

    def step(carry: Any) -> Any:
        w, state = carry
        updates, state = tx.update(jax.grad(problem.loss_fn)(w, **problem.source), state, w, **problem.source)
        return w + updates, state

    w, state = jax.jit(lambda carry: jax.lax.while_loop(unfinished, step, carry))(
        (problem.params, tx.init(problem.params))
    )
    return int(state.cost.gradients) if problem.error(w) <= TARGET else None


def best_rate(problem: FullBatch) -> float:
    """2/(λ_min + λ_max) of the Hessian at the optimum, which Newton's method finds."""
    w = problem.params
    newton: Callable[[Any], Any] = jax.jit(
        lambda w: jax.numpy.linalg.solve(
            jax.hessian(problem.loss_fn)(w, **problem.source), jax.grad(problem.loss_fn)(w, **problem.source)
        )
    )
    for _ in range(100):
        step = newton(w)
        w = w - step * min(1.0, max(5.0, float(jax.numpy.linalg.norm(w))) / float(jax.numpy.linalg.norm(step)))
    eigenvalues = np.linalg.eigvalsh(jax.hessian(problem.loss_fn)(w, **problem.source))
    return float(2 / (eigenvalues[0] + eigenvalues[-1]))


def main() -> None:
    rows = []
    jax.config.update("jax_enable_x64", True)
    for condition in CONDITIONS:
        problem = logistic(0, condition=condition)
        descent = rk_optax.euler(problem.loss_fn, best_rate(problem))
        row = {
            "condition": condition,
            "gradient_descent": gradients_needed(problem, descent, 1_000_000) if condition <= 1e5 else None,
            "rkc": gradients_needed(problem, rk_optax.rkc(problem.loss_fn), 300_000),
        }
        print(row, flush=True)
        rows.append(row)
    exponent = np.polyfit(np.log(CONDITIONS), np.log([row["rkc"] for row in rows]), 1)[0]
    print(f"rkc's gradients grow like κ^{exponent:.2f}")
    path = Path(__file__).parent / "results" / "stiffness.json"
    path.write_text(
        json.dumps({"target": TARGET, "rows": rows, "exponent": round(float(exponent), 3)}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
