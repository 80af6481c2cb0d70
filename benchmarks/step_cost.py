"""What one training step costs: rk_optax beside s gradients, hand-written Runge-Kutta steps and diffrax.

    python benchmarks/step_cost.py                    # an MLP 784-512-512-10 on batches of 128, about a minute
    python benchmarks/step_cost.py --json FILE        # the same, and the figures as JSON
    python benchmarks/step_cost.py --methods rk4 --deep 0 --clock cpu  # RK4's ingredients, on a busy machine

Every program is a whole jitted training step: the gradient that the training loop takes anyway (stage 1), the later
stages, the new parameters, with parameters and state donated. Columns:

time      seconds of a step over seconds of s calls of value_and_grad, s the gradients the method needs. The calls
          are timed right before each step and the programs take turns in random order, so that whatever else the
          machine does falls on both; each timing follows an untimed run of the same thing. Median and quartiles over
          the rounds; "best" divides the fastest step by s times the fastest value_and_grad. The row
          "s x value_and_grad" times the same calls once more: how far it is from 1 is the noise of the machine.
          Ingredients are timed against the gradients of the plain method, so that what a row has above that of plain
          rk_optax, times s, is what the ingredient costs in calls of value_and_grad. DAL's product is one
          Hessian-vector product a step, which is not counted among the gradients.
ms        median of a step, in milliseconds.
memory    temporaries of the compiled step over the bytes of the parameters, without and with donation. Without, one
          further copy of the parameters is allocated, as output; with, the parameters' own buffers take the output,
          but must be kept until the last stage is done.
compile   seconds to trace and compile, median of several, all caches cleared.
traces    how often Python runs the loss while a step is traced, the one in the caller's value_and_grad included.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import rk_optax

PyTree = Any
TrainingStep = Callable[..., tuple[jax.Array, PyTree, PyTree]]  # (params, state, *batch) -> loss, params, state

STEP_SIZE = 0.01
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# --- the problem ---


class Network:
    """A tanh MLP with cross-entropy on random data, which counts how often its loss is traced."""

    def __init__(self, widths: Sequence[int], batch: int, seed: int = 0):
        rng = np.random.default_rng(seed)
        self._params = [
            {"w": rng.normal(size=(i, o)) / np.sqrt(i), "b": np.zeros(o)} for i, o in itertools.pairwise(widths)
        ]
        images = rng.normal(size=(batch, widths[0]))
        labels = rng.integers(0, widths[-1], size=batch)
        self.batch = jnp.asarray(images, jnp.float32), jnp.asarray(labels)
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params()))
        self.traces = 0

    def params(self) -> PyTree:
        """Fresh parameters: a step donates those it is given."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), self._params)

    def loss(self, params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        """The mean cross-entropy."""
        self.traces += 1
        *hidden, last = params
        for layer in hidden:
            images = jnp.tanh(images @ layer["w"] + layer["b"])
        logits = images @ last["w"] + last["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# --- the competitors: each builds a training step and its first state ---


def with_optax(network: Network, tx: optax.GradientTransformationExtraArgs) -> tuple[TrainingStep, PyTree]:
    def step(params, state, images, labels):
        loss, grads = jax.value_and_grad(network.loss)(params, images, labels)
        updates, state = tx.update(grads, state, params, images=images, labels=labels)
        return loss, optax.apply_updates(params, updates), state

    return step, tx.init(network.params())


def hand_written_rk4(network: Network) -> tuple[TrainingStep, PyTree]:
    h, grad = STEP_SIZE, jax.grad(network.loss)

    def moved(params, h, k):
        return jax.tree.map(lambda p, g: p - h * g, params, k)

    def step(params, state, *batch):
        loss, k1 = jax.value_and_grad(network.loss)(params, *batch)
        k2 = grad(moved(params, h / 2, k1), *batch)
        k3 = grad(moved(params, h / 2, k2), *batch)
        k4 = grad(moved(params, h, k3), *batch)
        mean = jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)
        return loss, moved(params, h, mean), state

    return step, ()


def hand_written_rk4_scan(network: Network) -> tuple[TrainingStep, PyTree]:
    h = STEP_SIZE

    def step(params, state, *batch):
        def stage(carry, coefficients):
            k, total = carry
            a, b = coefficients
            k = jax.grad(network.loss)(jax.tree.map(lambda p, g: p - h * a * g, params, k), *batch)
            return (k, jax.tree.map(lambda t, g: t + b * g, total, k)), None

        loss, k1 = jax.value_and_grad(network.loss)(params, *batch)
        coefficients = jnp.array([1 / 2, 1 / 2, 1]), jnp.array([1 / 3, 1 / 3, 1 / 6])
        (_, total), _ = jax.lax.scan(stage, (k1, jax.tree.map(lambda g: g / 6, k1)), coefficients)
        return loss, jax.tree.map(lambda p, g: p - h * g, params, total), state

    return step, ()


def unrolled(network: Network, name: str) -> tuple[TrainingStep, PyTree]:
    """Any tableau, stage after stage in Python: as fast as it gets, and compiled s times."""
    tableau = rk_optax.TABLEAUS[name]
    stages = tableau.needed_stages(with_error=False)

    def moved(params, row, ks):
        used = [i for i in ks if row[i] != 0]

        def leaf(p, *gs):
            return p - STEP_SIZE * sum(float(row[i]) * g for i, g in zip(used, gs, strict=True))

        return jax.tree.map(leaf, params, *(ks[i] for i in used))

    def step(params, state, *batch):
        loss, k1 = jax.value_and_grad(network.loss)(params, *batch)
        ks = {0: k1}
        for i in stages[1:]:
            ks[i] = jax.grad(network.loss)(moved(params, tableau.a[i], ks), *batch)
        return loss, moved(params, tableau.b, ks), state

    return step, ()


class DiffraxRK4(diffrax.AbstractERK):
    """Classical RK4, which diffrax does not ship."""

    tableau: ClassVar[Any] = diffrax.ButcherTableau(
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.zeros(4),
        c=np.array([0.5, 0.5, 1.0]),
    )
    interpolation_cls: ClassVar[Callable[..., Any]] = diffrax.LocalLinearInterpolation

    def order(self, terms: Any) -> int:
        """Of convergence."""
        return 4


DIFFRAX: dict[str, Any] = {
    "rk4": DiffraxRK4(),
    "dopri5": diffrax.Dopri5(),
    "dopri8": diffrax.Dopri8(),
}


def with_diffrax(network: Network, solver: Any) -> tuple[TrainingStep, PyTree]:
    """`solver.step`; a first-same-as-last method is given stage 1, others evaluate it themselves (but no loss)."""

    def field(t, params, batch):
        return jax.tree.map(jnp.negative, jax.grad(network.loss)(params, *batch))

    terms = diffrax.ODETerm(field)

    def step(params, state, *batch):
        loss, solver_state = jnp.zeros([]), None
        if solver.tableau.fsal:
            loss, grads = jax.value_and_grad(network.loss)(params, *batch)
            solver_state = jnp.asarray(False), jax.tree.map(jnp.negative, grads)
        new, *_ = solver.step(terms, 0.0, STEP_SIZE, params, batch, solver_state, made_jump=False)
        return loss, new, state

    return step, ()


# --- measuring ---


@dataclasses.dataclass
class Row:
    """The figures of one program; `stages` gradients of the method are what its time is compared with."""

    method: str
    program: str
    stages: int
    gradients: int
    compile_s: float
    traces: int
    temporaries: float = float("nan")
    temporaries_donated: float = float("nan")
    time: float = float("nan")
    time_quartiles: tuple[float, float] = (float("nan"), float("nan"))
    time_best: float = float("nan")
    milliseconds: float = float("nan")


@dataclasses.dataclass
class Program:
    """A compiled step and what it runs on."""

    row: Row
    run: Callable[..., Any]
    params: PyTree
    state: PyTree

    def step(self, batch: tuple[jax.Array, ...]) -> None:
        """One step, finished when it returns."""
        _, self.params, self.state = jax.block_until_ready(self.run(self.params, self.state, *batch))


def build(
    network: Network,
    method: str,
    program: str,
    gradients: tuple[int, int],
    build_step: tuple[TrainingStep, PyTree],
    compiles: int,
    *,
    memory: bool = True,
) -> Program:
    step, state = build_step
    arguments = network.params(), state, *network.batch

    def compiled(*donated: int) -> Any:
        return jax.jit(step, donate_argnums=donated).lower(*arguments).compile()

    seconds, run = [], None
    for _ in range(compiles):
        jax.clear_caches()
        network.traces = 0
        start = time.perf_counter()
        run = compiled(0, 1)
        seconds.append(time.perf_counter() - start)
    assert run is not None
    row = Row(method, program, *gradients, float(np.median(seconds)), network.traces)
    if memory:
        row.temporaries, row.temporaries_donated = _temporaries(network, compiled()), _temporaries(network, run)
    return Program(row, run, *arguments[:2])


def _temporaries(network: Network, executable: Any) -> float:
    return executable.memory_analysis().temp_size_in_bytes / network.bytes


def rk4_with_ingredients(loss: Callable[..., jax.Array]) -> list[tuple[str, int, Any]]:
    """RK4 with one ingredient each: a name, the gradients of a step, the optimizer."""
    adagrad = rk_optax.precondition_by_adagrad()
    # A cap so small that the steps stay as harmless as those of the others.
    by_product, free = (rk_optax.dal(STEP_SIZE, estimate=estimate) for estimate in ("product", "free"))
    return [
        ("rk_optax, AdaGrad", 4, rk_optax.rk4(loss, STEP_SIZE, preconditioner=adagrad)),
        ("rk_optax, momentum", 4, rk_optax.rk4(loss, STEP_SIZE, momentum=0.9)),
        ("rk_optax, DAL free", 4, rk_optax.rk4(loss, free)),
        ("rk_optax, DAL product", 4, rk_optax.rk4(loss, by_product)),
    ]


def competitors(network: Network, methods: Sequence[str], compiles: int) -> list[Program]:
    loss, h = network.loss, STEP_SIZE
    sgd = optax.with_extra_args_support(optax.sgd(h))
    programs = [
        build(network, "euler", "optax.sgd", (1, 1), with_optax(network, sgd), compiles),
        build(network, "euler", "rk_optax", (1, 1), with_optax(network, rk_optax.euler(loss, h)), compiles),
    ]
    for name in methods:
        solver = DIFFRAX[name]
        s = rk_optax.TABLEAUS[name].effective_stages
        tx = getattr(rk_optax, name)(loss, h)
        entries = [("rk_optax", s, with_optax(network, tx)), ("unrolled", s, unrolled(network, name))]
        if name == "rk4":
            entries[1:] = [
                *((label, n, with_optax(network, tx)) for label, n, tx in rk4_with_ingredients(loss)),
                ("hand-written", s, hand_written_rk4(network)),
                ("hand-written scan", s, hand_written_rk4_scan(network)),
            ]
        entries.append(("diffrax", solver.tableau.num_stages, with_diffrax(network, solver)))
        programs += [build(network, name, label, (s, n), entry, compiles) for label, n, entry in entries]
    return programs


def time_steps(
    network: Network, programs: list[Program], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[Row]:
    """Fills in the times; returns the rows, those that time the unit itself included."""
    unit = jax.jit(jax.value_and_grad(network.loss))
    params = network.params()

    def gradients(count: int) -> float:
        start = 0.0
        for call in range(-2, count):  # two first: what ran before has filled the caches with its own data
            if call == 0:
                start = clock()
            jax.block_until_ready(unit(params, *network.batch))
        return clock() - start

    def step(program: Program) -> float:
        program.step(network.batch)
        start = clock()
        program.step(network.batch)
        return clock() - start

    share = _temporaries(network, unit.lower(params, *network.batch).compile())
    nan = float("nan")
    stages = {p.row.method: p.row.stages for p in programs}
    units = [Row(name, "s x value_and_grad", s, s, nan, 1, share) for name, s in stages.items()]
    runs: list[tuple[Row, Callable[[], float]]] = [(p.row, lambda p=p: step(p)) for p in programs]
    runs += [(row, lambda row=row: gradients(row.stages)) for row in units]
    seconds: list[list[tuple[float, float]]] = [[] for _ in runs]
    rng = np.random.default_rng(0)
    for turn in range(rounds + 1):
        for i in rng.permutation(len(runs)):
            row, run = runs[i]
            pair = gradients(row.stages), run()
            if turn > 0:  # the first round warms up
                seconds[i].append(pair)
    fastest = min(
        reference / row.stages for (row, _), pairs in zip(runs, seconds, strict=True) for reference, _ in pairs
    )
    for (row, _), pairs in zip(runs, seconds, strict=True):
        reference, own = np.array(pairs).T
        q1, median, q3 = np.percentile(own / reference, [25, 50, 75])
        row.time, row.time_quartiles = float(median), (float(q1), float(q3))
        row.time_best = float(own.min() / (row.stages * fastest))
        row.milliseconds = 1e3 * float(np.median(own))
    rows = [row for row, _ in runs]
    order = list(dict.fromkeys(row.method for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.method), row.program != "s x value_and_grad"))


def compile_deep(layers: int, width: int, methods: Sequence[str]) -> list[Row]:
    """Compile times on a deep, narrow network, where unrolling hurts most; one compilation each."""
    network = Network([width] * layers + [10], batch=32)
    rows = []
    for name in methods:
        s = rk_optax.TABLEAUS[name].effective_stages
        tx = getattr(rk_optax, name)(network.loss, STEP_SIZE)
        for label, entry in (("rk_optax", with_optax(network, tx)), ("unrolled", unrolled(network, name))):
            rows.append(build(network, name, label, (s, s), entry, compiles=1, memory=False).row)
    return rows


# --- reporting ---


def table(rows: list[Row], title: str) -> str:
    head = [
        "method",
        "program",
        "gradients",
        "time",
        "quartiles",
        "best",
        "ms",
        "memory",
        "donated",
        "compile",
        "traces",
    ]

    def number(value: float, form: str) -> str:
        return "" if np.isnan(value) else format(value, form)

    def cells(row: Row) -> list[str]:
        q1, q3 = (number(q, ".3f") for q in row.time_quartiles)
        return [
            row.method,
            row.program,
            str(row.gradients),
            number(row.time, ".3f"),
            f"{q1}-{q3}" if q1 else "",
            number(row.time_best, ".3f"),
            number(row.milliseconds, ".1f"),
            number(row.temporaries, ".2f"),
            number(row.temporaries_donated, ".2f"),
            number(row.compile_s, ".2f"),
            str(row.traces),
        ]

    lines = [head, *map(cells, rows)]
    kept = [i for i in range(len(head)) if any(line[i] for line in lines[1:])]
    widths = [max(len(line[i]) for line in lines) for i in kept]
    text, last = [title, ""], ""
    for line in lines:
        if last and line[0] != last:
            text.append("-" * (sum(widths) + 2 * len(widths) - 2))
        last = line[0]
        aligned = (line[i].ljust(w) if i < 2 else line[i].rjust(w) for i, w in zip(kept, widths, strict=True))
        text.append("  ".join(aligned).rstrip())
    return "\n".join(text)


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "cpu_cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("jax", "jaxlib", "optax", "diffrax")},
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 512, 512, 10], help="of the layers, input first")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=list(DIFFRAX), choices=list(DIFFRAX), help="beside Euler's")
    parser.add_argument("--rounds", type=int, default=40, help="timed turns of every program")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=list(CLOCKS),
        help="cpu: processor time of this process, for a machine that is busy with other work",
    )
    parser.add_argument("--compiles", type=int, default=3, help="compilations to take the median of")
    parser.add_argument("--deep", type=int, default=20, help="layers of the network of the second table, 0 for none")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--smoke", action="store_true", help="tiny and quick: its figures mean nothing")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.widths, options.batch, options.methods = [6, 8, 3], 4, ["rk4", "dopri5"]
        options.rounds, options.compiles, options.deep = 1, 1, 2
    if min(options.widths) < 1 or len(options.widths) < 2:
        parser.error("--widths needs at least two positive numbers: inputs and outputs")
    if min(options.batch, options.rounds, options.compiles) < 1 or options.deep < 0:
        parser.error("--batch, --rounds and --compiles must be positive, --deep not negative")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    network = Network(options.widths, options.batch)
    programs = competitors(network, options.methods, options.compiles)
    rows = time_steps(network, programs, options.rounds, CLOCKS[options.clock])
    layers = "-".join(map(str, options.widths))
    print(table(rows, f"MLP {layers}, batch {options.batch}, float32, {jax.devices()[0].device_kind}: one step"))
    deep = []
    if options.deep:
        deep = compile_deep(options.deep, 8 if options.smoke else 64, options.methods)
        print()
        print(table(deep, f"MLP of {options.deep} layers: compilation"))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        result = {
            "machine": machine(),
            "settings": settings,
            "steps": [_plain(row) for row in rows],
            "deep": [_plain(row) for row in deep],
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _plain(row: Row) -> dict[str, Any]:
    """A row for JSON: four significant digits, no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(v) for v in value]
        if isinstance(value, float):
            return None if np.isnan(value) else float(f"{value:.4g}")
        return value

    return {name: plain(value) for name, value in dataclasses.asdict(row).items()}


if __name__ == "__main__":
    main()
