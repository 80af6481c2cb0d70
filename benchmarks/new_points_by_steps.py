"""The 5-D Poisson problem with 3,500 new points in each step, by steps, as published: error and loss after each.

    python benchmarks/new_points_by_steps.py            # seed 0: 20 minutes of a core
    python benchmarks/new_points_by_steps.py --seed 1   # those that are there are kept

In float64, `residual_euler` with `line_search()`, nothing tuned. Guzmán-Cordero et al. (2025, arXiv 2505.12149) have
about 1e-4 at step 67 and 1e-5 at step 172. Ctrl-C keeps the steps so far.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
from importlib import metadata
from typing import Any

import jax
import optax

import rk_optax
from rk_optax.experiment.tasks import pinn

RESULTS = pathlib.Path(__file__).parent / "results" / "new_points_by_steps.json"


def run(seed: int, steps: int) -> dict[str, list[float]]:
    """Losses on the points of each step, before it, and relative errors on other points, after it."""
    problem = pinn.poisson_5d(seed, new_points=True)
    tx = rk_optax.residual_euler(problem.loss_fn, rk_optax.line_search())
    params, state = problem.params, tx.init(problem.params)
    error = jax.jit(problem.error)

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        data = problem.data(problem.source, key, None, jax.random.key_data(key))
        loss, updates, state = tx.value_and_update(state, params, **data)
        return optax.apply_updates(params, updates), state, loss

    seen: dict[str, list[float]] = {"loss": [], "error": []}
    key = jax.random.key(1000 + seed)
    with contextlib.suppress(KeyboardInterrupt):
        for count in range(1, steps + 1):
            key, own = jax.random.split(key)
            params, state, loss = step(params, state, own)
            seen["loss"].append(float(f"{loss:.3g}"))
            seen["error"].append(float(f"{error(params):.4g}"))
            print(f"{count:4d}  loss {loss:.2e}  error {seen['error'][-1]:.3e}", flush=True)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=172)
    given = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    found = run(given.seed, given.steps)
    kept = json.loads(RESULTS.read_text())["seeds"] if RESULTS.exists() else {}
    content = {
        "versions": {name: metadata.version(name) for name in ("rk-optax", "jax", "jaxlib", "optax")},
        "device": {"platform": jax.devices()[0].platform, "kind": jax.devices()[0].device_kind},
        "seeds": {**kept, str(given.seed): found},
    }
    RESULTS.write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
