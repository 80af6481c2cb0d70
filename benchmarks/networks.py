"""What a block of RK4 steps costs: rk_optax.networks beside hand-written code and diffrax.

    python benchmarks/networks.py                 # a block of 4 steps, batches of 128, 64 and 256 features
    python benchmarks/networks.py --json FILE     # the same, and the figures as JSON

The layer is tanh(K2 tanh(K1 y + b1) + b2); its weights move linearly between nodes, one node at each time of the grid.
"forward" evaluates the block, "backward" its value and the gradient with respect to weights and features. Programs are
compiled before; then they take turns in random order, each timed call after an untimed one, by the CPU time of this
process on one thread, which other processes of the machine disturb little. Figures are medians over the rounds.

time      over that of the hand-written program with the same policy: "plain" stores what it needs; "checkpointed"
          evaluates each step anew in the backward pass.
memory    temporaries of the compiled backward program, from XLA, in kB; and how they grow with each further step, from
          16 to 64 steps, over the size of the features.
"""

import os

# One thread, so that CPU time is the time of the program.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import argparse
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

from rk_optax.networks import (
    Controls,
    double,
    hamiltonian,
    hamiltonian_y,
    hamiltonian_z,
    initial,
    integrate,
    reversible,
)

Run = Callable[[Any, Any], Any]  # (theta, y) -> y


def layer(theta: Any, y: jax.Array) -> jax.Array:
    """`rk_optax.networks.double`, written out."""
    inner = jnp.tanh(y @ theta["kernel1"] + theta["bias1"])
    return jnp.tanh(inner @ theta["kernel2"] + theta["bias2"])


def hand_step(left: Any, right: Any, y: jax.Array) -> jax.Array:
    middle = jax.tree.map(lambda a, b: (a + b) / 2, left, right)
    k1 = layer(left, y)
    k2 = layer(middle, y + k1 / 2)
    k3 = layer(middle, y + k2 / 2)
    k4 = layer(right, y + k3)
    return y + (k1 + 2 * k2 + 2 * k3 + k4) / 6


def hand_unrolled(steps: int) -> Run:
    def run(theta: Any, y: jax.Array) -> jax.Array:
        for k in range(steps):
            left, right = (jax.tree.map(lambda x, i=i: x[i], theta) for i in (k, k + 1))
            y = hand_step(left, right, y)
        return y

    return run


def hand_checkpointed(steps: int) -> Run:
    """A scan: XLA merges the repeated evaluations of unrolled code with the first ones, and saves nothing."""

    def run(theta: Any, y: jax.Array) -> jax.Array:
        def step(y: jax.Array, ends: Any) -> tuple[jax.Array, None]:
            left, right = ends
            return hand_step(left, right, y), None

        ends = jax.tree.map(lambda x: x[:-1], theta), jax.tree.map(lambda x: x[1:], theta)
        return jax.lax.scan(jax.checkpoint(step, prevent_cse=False), y, ends)[0]

    return run


def ours(steps: int, **options: Any) -> Run:
    grid = np.arange(steps + 1.0)
    return lambda theta, y: integrate(double, Controls(theta, tuple(grid)), y, grid, "rk4", **options)


class RK4(diffrax.AbstractERK):
    """diffrax has no classical RK4."""

    tableau = diffrax.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.zeros(4),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k
    term_structure = diffrax.ODETerm

    def order(self, terms: Any) -> int:
        """The order of a step."""
        return 4


def of_diffrax(steps: int, adjoint: Any) -> Run:
    grid = jnp.arange(steps + 1.0)

    def run(theta: Any, y: jax.Array) -> jax.Array:
        path = diffrax.LinearInterpolation(grid, theta)
        term = diffrax.ODETerm(lambda t, y, args: layer(path.evaluate(t), y))
        solution = diffrax.diffeqsolve(
            term, RK4(), 0.0, float(steps), 1.0, y, stepsize_controller=diffrax.ConstantStepSize(), adjoint=adjoint,
            max_steps=steps,
        )  # fmt: skip
        assert solution.ys is not None
        return solution.ys[0]

    return run


PROGRAMS: dict[str, tuple[str, Callable[[int], Run]]] = {
    "hand-written, unrolled": ("plain", hand_unrolled),
    "rk_optax, remat=False": ("plain", lambda n: ours(n, remat=False)),
    "diffrax, DirectAdjoint": ("plain", lambda n: of_diffrax(n, diffrax.DirectAdjoint())),
    "hand-written, scan": ("checkpointed", hand_checkpointed),
    "rk_optax, remat=True": ("checkpointed", lambda n: ours(n)),
    "diffrax, RecursiveCheckpointAdjoint": (
        "checkpointed",
        lambda n: of_diffrax(n, diffrax.RecursiveCheckpointAdjoint()),
    ),
}


def inputs(steps: int, batch: int, width: int) -> tuple[Any, jax.Array]:
    theta = Controls.constant_in_time(initial(jax.random.key(0), double, width), tuple(range(steps + 1))).theta
    return theta, jax.random.normal(jax.random.key(1), (batch, width))


def compiled(run: Run, arguments: tuple[Any, jax.Array]) -> tuple[Any, Any]:
    backward = jax.value_and_grad(lambda theta, y: jnp.sum(run(theta, y) ** 2), argnums=(0, 1))
    return jax.jit(run).lower(*arguments).compile(), jax.jit(backward).lower(*arguments).compile()


def timed(programs: dict[str, Any], arguments: Any, rounds: int, calls: int) -> dict[str, np.ndarray]:
    rng, seconds = np.random.default_rng(0), {name: [] for name in programs}
    for _ in range(rounds):
        for name in rng.permutation(list(programs)):
            program = programs[name]
            jax.block_until_ready(program(*arguments))
            start = time.process_time()
            for _ in range(calls):
                jax.block_until_ready(program(*arguments))
            seconds[name].append((time.process_time() - start) / calls)
    return {name: np.array(values) for name, values in seconds.items()}


def of_blocks(steps: int, batch: int, width: int, rounds: int, calls: int) -> list[dict[str, Any]]:
    arguments = inputs(steps, batch, width)
    pairs = {name: compiled(make(steps), arguments) for name, (_, make) in PROGRAMS.items()}
    expected = pairs["hand-written, unrolled"][0](*arguments)
    for name, (forward, _) in pairs.items():
        np.testing.assert_allclose(forward(*arguments), expected, rtol=2e-4, atol=2e-5, err_msg=name)
    rows = []
    times = [timed({n: p[i] for n, p in pairs.items()}, arguments, rounds, calls) for i in (0, 1)]
    for name, (policy, _) in PROGRAMS.items():
        base = next(n for n, (p, _) in PROGRAMS.items() if p == policy)
        row: dict[str, Any] = {"program": name, "policy": policy, "width": width}
        for label, seconds in zip(("forward", "backward"), times, strict=True):
            # Of the medians, not the median of ratios: what disturbs one round need not disturb its neighbour.
            row[f"{label}_ms"] = round(float(np.median(seconds[name])) * 1e3, 4)
            row[f"{label}_ratio"] = round(float(np.median(seconds[name]) / np.median(seconds[base])), 3)
            row[f"{label}_best_ratio"] = round(float(seconds[name].min() / seconds[base].min()), 3)
        row["temporaries_kb"] = round(_temporaries(pairs[name][1]) / 1e3, 1)
        rows.append(row)
    return rows


def _temporaries(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def growth(make: Callable[[int], Run], arguments: Callable[[int], Any], features: int) -> float:
    """Bytes of temporaries that a further step costs, over those of the features; θ is given, not counted."""
    temporaries = []
    for steps in (16, 64):
        theta, y = arguments(steps)
        gradient = jax.grad(lambda y, theta=theta, steps=steps: jnp.sum(jax.tree.leaves(make(steps)(theta, y))[0] ** 2))
        temporaries.append(_temporaries(jax.jit(gradient).lower(y).compile()))
    return (temporaries[1] - temporaries[0]) / 48 / features


def of_depth(batch: int, width: int) -> dict[str, float]:
    features = batch * width * 4
    figures = {
        name: growth(make, lambda steps: _one_theta(steps, batch, width), features)
        for name, make in {
            "rk_optax, remat=False": lambda n: lambda th, y: _shared(n, th, y, remat=False, unroll=1),
            "rk_optax, remat=True": lambda n: lambda th, y: _shared(n, th, y, remat=True),
        }.items()
    }

    def hamiltonian_inputs(steps: int) -> Any:
        del steps
        theta = initial(jax.random.key(0), hamiltonian, width // 2)
        y = jax.random.normal(jax.random.key(1), (batch, width))
        return theta, (y[:, : width // 2], y[:, width // 2 :])

    def back_and_forth(steps: int) -> Run:
        grid = np.arange(steps + 1.0) / steps
        return lambda theta, state: reversible(
            hamiltonian_y, hamiltonian_z, Controls.constant_in_time(theta, (0,)), state, grid
        )

    figures["rk_optax, reversible"] = growth(back_and_forth, hamiltonian_inputs, features)
    return {name: round(value, 3) for name, value in figures.items()}


def _one_theta(steps: int, batch: int, width: int) -> Any:
    del steps
    return initial(jax.random.key(0), double, width), jax.random.normal(jax.random.key(1), (batch, width))


def _shared(steps: int, theta: Any, y: jax.Array, **options: Any) -> jax.Array:
    return integrate(double, Controls.constant_in_time(theta, (0,)), y, np.arange(steps + 1.0) / steps, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"command": "python benchmarks/networks.py", "blocks": [], "depth": {}}
    results["arguments"] = {k: v for k, v in vars(options).items() if k != "json"}
    results["versions"] = {name: metadata.version(name) for name in ("jax", "diffrax", "rk-optax")}
    results["machine"] = platform.machine()
    for width in options.widths:
        rows = of_blocks(options.steps, options.batch, width, options.rounds, options.calls)
        results["blocks"] += rows
        print(f"\n{options.steps} RK4 steps, batch {options.batch}, width {width}")
        print(f"{'':38}{'forward ms':>11}{'ratio':>7}{'best':>7}{'backward ms':>13}{'ratio':>7}{'best':>7}{'kB':>9}")
        for r in rows:
            print(
                f"{r['program']:38}{r['forward_ms']:11.3f}{r['forward_ratio']:7.2f}{r['forward_best_ratio']:7.2f}"
                f"{r['backward_ms']:13.3f}{r['backward_ratio']:7.2f}{r['backward_best_ratio']:7.2f}"
                f"{r['temporaries_kb']:9.0f}"
            )
    results["depth"] = of_depth(options.batch, options.widths[0])
    print("\ntemporaries of the backward pass for each further step, over the size of the features")
    for name, value in results["depth"].items():
        print(f"{name:38}{value:8.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
