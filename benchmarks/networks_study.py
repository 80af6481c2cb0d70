"""Is a trained network an ordinary differential equation at all? Digits and MNIST, three seeds.

    python benchmarks/networks_study.py --part digits --json benchmarks/results/networks_digits.json
    python benchmarks/networks_study.py --part mnist --data-dir DIRECTORY_OF_THE_IDX_FILES \
        --json benchmarks/results/networks_mnist.json

Every network is: features (the 64 pixels of a digit; 128 linear features of an MNIST image), one block of
`rk_optax.networks`, a linear layer. Adam, rate 2e-3 with cosine decay, batches of 128, weights at the nodes 0 to 4 (or
the same for all t), trained through the block's own grid: 60 epochs of 1,437 digits, four epochs of MNIST. Then, with
the weights as they are, on 360 digits or the 10,000 test images:

own       test accuracy on the grid and with the method of the training;
fine      the same weights with RK4 on 64 steps; own minus fine is the transfer gap;
half      the same weights with Euler's method on half the training's steps;
NFE       evaluations that an adaptive solver (diffrax's Tsit5, tolerances 1e-6, the test images as one system) needs.

Accuracies in percent, mean over the seeds and half their range. Rows are written to the file as they come; with a file
that has rows of as many epochs and seeds, only the missing ones are run.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from rk_optax.networks import Controls, double_sym, families, initial, integrate, local_report, single

Params = dict[str, Any]
DEPTH = 4
FINE = np.linspace(0, DEPTH, 65)
U0, SIGMA = 1 / 3, 0.05


def digits() -> tuple[np.ndarray, ...]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


def mnist(folder: pathlib.Path) -> tuple[np.ndarray, ...]:
    def read(name: str, start: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=start)

    parts = []
    for name in ("train", "t10k"):
        images = read(f"{name}-images-idx3-ubyte.gz", 16).reshape(-1, 784)
        parts += [(images / 255 - 0.1307).astype(np.float32) / 0.3081, read(f"{name}-labels-idx1-ubyte.gz", 8)]
    return tuple(parts)


def node_layer(theta: Any, y: jax.Array, t: Any) -> jax.Array:
    """The layer of the neural ODEs: one hidden layer and the time beside the features."""
    return jnp.tanh(y @ theta["kernel1"] + theta["time"] * t + theta["bias1"]) @ theta["kernel2"] + theta["bias2"]


class Network:
    """Features, a block, a linear layer; `solver`, `steps` and penalty are those of the training."""

    def __init__(
        self,
        solver: Any,
        steps: int,
        layer: Callable[..., Any] = double_sym,
        *,
        moving: bool = True,
        penalty: Callable[..., jax.Array] | None = None,
        report: Sequence[Any] = (),
        family: Callable[[Any], Any] | None = None,
        inputs: int = 64,
        width: int = 64,
    ):
        self.layer, self.moving, self.inputs, self.width = layer, moving, inputs, width
        self.depth = DEPTH if moving else 1
        self.solver, self.grid = solver, np.linspace(0, self.depth, steps + 1)
        self.penalty, self.report, self.family = penalty, tuple(report), family

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        keys = jax.random.split(key, 4)
        nodes = tuple(range(DEPTH + 1)) if self.moving else (0,)
        if self.layer is node_layer:
            w = jax.random.normal(keys[0], (2, self.width, self.width)) / np.sqrt(self.width)
            zero = jnp.zeros(self.width)
            theta = {"kernel1": w[0], "kernel2": w[1], "bias1": zero, "bias2": zero, "time": zero}
        else:
            theta = initial(keys[0], self.layer, self.width)
        params = {
            "block": Controls.constant_in_time(theta, nodes),
            "head": jax.random.normal(keys[1], (self.width, 10)) / np.sqrt(self.width),
            "bias": jnp.zeros(10),
        }
        if self.inputs != self.width:
            params["first"] = jax.random.normal(keys[2], (self.inputs, self.width)) / np.sqrt(self.inputs)
        return jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def features(self, params: Params, x: jax.Array) -> jax.Array:
        """What the block starts from."""
        return x @ params["first"] if "first" in params else x

    def logits(self, params: Params, x: jax.Array, solver: Any, grid: Any) -> jax.Array:
        """The network by any method on any grid."""
        y = integrate(self.layer, params["block"], self.features(params, x), grid, solver, allow_kinks=True)
        return y @ params["head"] + params["bias"]

    def loss(self, params: Params, x: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        """Cross-entropy and penalty, by the block's own method on its own grid."""
        solver = self.solver if self.family is None else self.family(families.smoothed(key, U0, SIGMA))
        y0 = self.features(params, x)
        out = integrate(self.layer, params["block"], y0, self.grid, solver, report=self.report, remat=False, unroll=1)
        y, report = out if self.report else (out, None)
        loss = optax.softmax_cross_entropy_with_integer_labels(y @ params["head"] + params["bias"], labels).mean()
        return loss if self.penalty is None else loss + self.penalty(self, params, report, key)


def error(weight: float) -> Callable[..., jax.Array]:
    # E is scaled by tolerances of 1e-6; the weights below are for those of 1e-2.
    return lambda network, params, report, key: weight * 1e-4 * report.error.mean()


def stiffness(weight: float) -> Callable[..., jax.Array]:
    return lambda network, params, report, key: weight * report.stiffness.mean()


def local(times: Any) -> Callable[..., jax.Array]:
    def penalty(network: Network, params: Params, report: Any, key: jax.Array) -> jax.Array:
        seen = local_report(
            network.layer, params["block"], report.states, network.grid, key, network.solver, times=times
        )
        assert seen.error is not None
        return 10.0 * 1e-4 * seen.error.mean()

    return penalty


def train(network: Network, data: tuple[np.ndarray, ...], epochs: int, seeds: int) -> Params:
    """Parameters with a leading axis of seeds."""
    images, labels = jnp.asarray(data[0]), jnp.asarray(data[1], jnp.int32)
    batch, steps = 128, len(labels) // 128
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, epochs * steps))

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def epoch(carry: Any, key: jax.Array, first: jax.Array) -> Any:
        order = jax.random.permutation(key, len(labels))[: steps * batch].reshape(steps, batch)

        def step(carry: Any, indices: jax.Array) -> Any:
            params, state, i = carry
            gradient = jax.grad(network.loss)(params, images[indices], labels[indices], jax.random.fold_in(key, i))
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state, i + 1), None

        return jax.lax.scan(step, carry, order)[0]

    keys = jax.random.split(jax.random.key(0), seeds)
    params = jax.vmap(network.init)(keys)
    carry = params, jax.vmap(tx.init)(params), jnp.zeros(seeds, jnp.int32)
    for e in range(epochs):
        carry = epoch(carry, jax.vmap(lambda key, e=e: jax.random.fold_in(key, e))(keys), jnp.asarray(e))
    return carry[0]


def accuracies(network: Network, params: Params, data: tuple[np.ndarray, ...], solver: Any, grid: Any) -> list[float]:
    right = jax.jit(
        jax.vmap(lambda p: jnp.mean(network.logits(p, jnp.asarray(data[2]), solver, grid).argmax(-1) == data[3]))
    )
    return [round(100 * float(a), 2) for a in right(params)]


def adaptive(network: Network, params: Params, data: tuple[np.ndarray, ...]) -> list[int]:
    """Evaluations of the layer by an adaptive solver, for each seed, in double precision."""

    @jax.jit
    def evaluations(params: Params) -> jax.Array:
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        controls = params["block"]
        term = diffrax.ODETerm(lambda t, y, args: network.layer(controls.at(t), y, t))
        solution = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, float(network.depth), None,
            network.features(params, jnp.asarray(data[2], jnp.float64)), saveat=diffrax.SaveAt(t1=True),
            stepsize_controller=diffrax.PIDController(1e-6, 1e-6), max_steps=None, adjoint=diffrax.DirectAdjoint(),
        )  # fmt: skip
        return 6 * solution.stats["num_steps"]

    return [int(evaluations(jax.tree.map(lambda x, s=s: x[s], params))) for s in range(len(params["bias"]))]


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"


def run(
    name: str, network: Network, data: tuple[np.ndarray, ...], epochs: int, seeds: int, *, members: Any = (),
    count: bool = False,
) -> dict[str, Any]:  # fmt: skip
    start = time.process_time()
    params = jax.block_until_ready(train(network, data, epochs, seeds))
    seconds = time.process_time() - start
    steps = len(network.grid) - 1
    score = functools.partial(accuracies, network, params, data)
    fine = np.linspace(0, network.depth, 65)
    row: dict[str, Any] = {"network": name, "steps": steps, "cpu_seconds_of_training": round(seconds, 1)}
    row["own"] = score(network.solver, network.grid)
    row["fine"] = score("rk4", fine)
    if steps > 1:
        row["half"] = score("euler", np.linspace(0, network.depth, max(steps // 2, 1) + 1))
    if count:
        row["nfe"] = adaptive(network, params, data)
    for u in members:
        row.setdefault("members", {})[f"{u:.3g}"] = score(families.rk4_u2(u), network.grid)
    print(f"{name:44}", *(f"{k} {spread(row[k]):14}" for k in ("own", "fine", "half", "nfe") if k in row), flush=True)
    for u, values in row.get("members", {}).items():
        print(f"{'':8}u = {u:6} {spread(values)}", flush=True)
    return row


class Study:
    """Rows that are written as they come; a study that was cut short goes on with the rows that it has."""

    def __init__(self, head: dict[str, Any], file: pathlib.Path | None):
        self.results, self._file, self._old = dict(head), file, {}
        if file is not None and file.exists():
            old = json.loads(file.read_text(encoding="utf-8"))
            if all(old.get(key) == head[key] for key in ("epochs", "seeds")):
                self._old = {
                    (name, row["network"]): row for name, rows in old.items() if isinstance(rows, list) for row in rows
                }

    def ask(self, section: str, name: str, network: Network, data: tuple[np.ndarray, ...], **options: Any) -> None:
        """One row."""
        row = self._old.get((section, name))
        if row is None:
            row = run(name, network, data, self.results["epochs"], self.results["seeds"], **options)
        else:
            print(f"{name:44} has its row", flush=True)
        self.results.setdefault(section, []).append(row)
        if self._file is not None:
            self._file.write_text(json.dumps(self.results | self._waiting(), indent=1) + "\n", encoding="utf-8")

    def _waiting(self) -> dict[str, list[Any]]:
        """The sections with the old rows whose turn is still to come."""
        done = {(name, row["network"]) for name, rows in self.results.items() if isinstance(rows, list) for row in rows}
        sections: dict[str, list[Any]] = {}
        for (section, name), row in self._old.items():
            rows = sections.setdefault(section, list(self.results.get(section, [])))
            if (section, name) not in done:
                rows.append(row)
        return sections


def study_of_digits(study: Study) -> None:
    ask = functools.partial(study.ask, data=digits())
    node = functools.partial(Network, "tsit5", 2, node_layer, moving=False)
    members = (0.15, 0.25, 1 / 3, 0.5, 0.8)
    with_error = functools.partial(Network, "bogacki_shampine", 4, report=["error"])
    ask("methods", "Euler x 4", Network("euler", 4))
    ask("methods", "Euler x 16", Network("euler", 16))
    ask("methods", "Heun x 8", Network("heun", 8))
    ask("methods", "RK4 x 4", Network("rk4", 4))
    ask("methods", "RK4 x 4, single tanh layer", Network("rk4", 4, single))
    ask("methods", "Bogacki-Shampine x 4", Network("bogacki_shampine", 4))
    for w in (0.1, 1.0, 10.0):
        ask("methods", f"Bogacki-Shampine x 4, error term, weight {w}", with_error(penalty=error(w)))
    ask("neural ODE", "none", node(), count=True)
    for w in (1.0, 10.0, 100.0):
        ask("neural ODE", f"error, weight {w}", node(penalty=error(w), report=["error"]), count=True)
    for which, times in (("random step", "grid"), ("step at a random time", "random")):
        one = node(penalty=local(times), report=["states"])
        ask("neural ODE", f"error of one {which}, weight 10.0", one, count=True)
    ask("neural ODE", "stiffness, weight 0.1", node(penalty=stiffness(0.1), report=["stiffness"]), count=True)
    ask("u2 family", "RK4 (u = 1/3)", Network("rk4", 4), members=members)
    ask("u2 family", "u smoothed, width 0.05", Network("rk4", 4, family=families.rk4_u2), members=members)


def study_of_mnist(study: Study, folder: pathlib.Path) -> None:
    network = functools.partial(Network, inputs=784, width=128)
    ask = functools.partial(study.ask, "methods", data=mnist(folder))
    ask("Euler x 4", network("euler", 4))
    ask("Heun x 4", network("heun", 4))
    ask("RK4 x 4", network("rk4", 4))
    ask("RK4 x 4, single tanh layer", network("rk4", 4, single))
    for w in (0.1, 10.0):
        penalised = network("bogacki_shampine", 4, penalty=error(w), report=["error"])
        ask(f"Bogacki-Shampine x 4, error term, weight {w}", penalised)


def main() -> None:
    jax.config.update("jax_enable_x64", True)  # for the adaptive solver; training is in float32
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["digits", "mnist"], required=True)
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    epochs = options.epochs or {"digits": 60, "mnist": 4}[options.part]
    head = {
        "command": f"python benchmarks/networks_study.py --part {options.part}",
        "epochs": epochs,
        "seeds": options.seeds,
        "versions": {name: metadata.version(name) for name in ("jax", "optax", "diffrax", "rk-optax")},
    }
    study = Study(head, options.json)
    if options.part == "digits":
        study_of_digits(study)
    else:
        study_of_mnist(study, options.data_dir)


if __name__ == "__main__":
    main()
