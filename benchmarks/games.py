"""Games: a GAN on a ring of eight Gaussians, by Runge–Kutta steps of one flow and by what Optax has for games.

    python benchmarks/games.py                   # five seeds, about ten minutes of processor time
    python benchmarks/games.py --json FILE       # the same, and the figures as JSON
    python benchmarks/games.py --smoke           # a few steps of everything

Every entrant has the same networks, the same batches, the same number of gradients (one of each player) and the same
number of trials for its learning rate (five, on a seed of their own; the best by modes, then by share). All stages of a
step see the batch of the step. Columns:

modes    of the eight, that at least 2 % of 1,024 samples lie within three standard deviations of: mean and range.
share    of the samples that lie that near to any mode.
seconds  processor time of the whole run, from compiled steps of one seed: the entrants take turns, best of five.
at equal seconds: the same two when the cheapest entrant's seconds are spent.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rk_optax

PyTree = Any
MODES = jnp.asarray(2 * np.exp(2j * np.pi * np.arange(8) / 8)[:, None].view(float), jnp.float32)
DEVIATION, BATCH, LATENT, WIDTH = 0.1, 64, 8, 32
FLOW_RATES, ADAM_RATES = (0.025, 0.05, 0.1, 0.2, 0.4), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
EXTRAGRADIENT = rk_optax.ButcherTableau(
    "extragradient", [[0, 0], [1, 0]], [0, 1], [0, 1], 1, source="G. M. Korpelevich, Matecon 12 (1976)"
)


def network(params: PyTree, x: jax.Array) -> jax.Array:
    *hidden, last = params
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def discriminator_loss(params: PyTree, real: jax.Array, noise: jax.Array) -> jax.Array:
    fake = network(params["generator"], noise)
    scores = [network(params["discriminator"], x) for x in (real, fake)]
    return jnp.mean(jax.nn.softplus(-scores[0])) + jnp.mean(jax.nn.softplus(scores[1]))


def generator_loss(params: PyTree, noise: jax.Array) -> jax.Array:
    return jnp.mean(jax.nn.softplus(-network(params["discriminator"], network(params["generator"], noise))))


LOSSES = {"discriminator": discriminator_loss, "generator": generator_loss}


def initial(key: jax.Array) -> PyTree:
    def layers(key: jax.Array, *sizes: int) -> PyTree:
        keys = jax.random.split(key, len(sizes))
        return [
            {"w": jax.random.normal(k, (i, o)) / jnp.sqrt(i), "b": jnp.zeros(o)}
            for k, (i, o) in zip(keys, itertools.pairwise(sizes), strict=False)
        ]

    one, other = jax.random.split(key)
    return {"generator": layers(one, LATENT, WIDTH, WIDTH, 2), "discriminator": layers(other, 2, WIDTH, WIDTH, 1)}


def batch(key: jax.Array) -> dict[str, jax.Array]:
    which, where, noise = jax.random.split(key, 3)
    modes = MODES[jax.random.randint(which, (BATCH,), 0, 8)]
    real = modes + DEVIATION * jax.random.normal(where, (BATCH, 2))
    return {"real": real, "noise": jax.random.normal(noise, (BATCH, LATENT))}


def covered(params: PyTree) -> tuple[jax.Array, jax.Array]:
    """How many modes, and the share of samples near any of them."""
    samples = network(params["generator"], jax.random.normal(jax.random.key(99), (1024, LATENT)))
    near = jnp.linalg.norm(samples[:, None] - MODES, axis=-1) < 3 * DEVIATION
    return jnp.sum(jnp.sum(near, axis=0) >= 21), jnp.mean(jnp.any(near, axis=1))


@dataclasses.dataclass(frozen=True)
class Entrant:
    """An optimizer by its learning rate, the gradients of a step, and the rates that are tried, as many as seeds."""

    make: Callable[[Any], optax.GradientTransformation]
    gradients: int
    rates: tuple[float, ...]


def of_game(solver: Any, gradients: int, rates: tuple[float, ...] = FLOW_RATES, **options: Any) -> Entrant:
    return Entrant(lambda h: rk_optax.game(LOSSES, h, solver, **options), gradients, rates)


PENALTY = {"discriminator": 0.02}
ENTRANTS = {
    "gradient descent": of_game("euler", 1),
    "alternating": of_game("euler", 2, alternating=("discriminator", "generator")),
    "heun": of_game("heun", 2),
    "rk4": of_game("rk4", 4),
    "heun, penalty": of_game("heun", 2, gradient_penalty=PENALTY),
    "rk4, penalty": of_game("rk4", 4, gradient_penalty=PENALTY),
    "extragradient": of_game(EXTRAGRADIENT, 2),
    "heun, Adam's scale": of_game("heun", 2, ADAM_RATES, preconditioner=rk_optax.precondition_by_adam()),
    "optax.optimistic_gradient_descent": Entrant(optax.optimistic_gradient_descent, 1, FLOW_RATES),
    "optax.adam": Entrant(lambda h: optax.adam(h, b1=0.5), 1, ADAM_RATES),
    "optax.optimistic_adam_v2": Entrant(lambda h: optax.optimistic_adam_v2(h, b1=0.5), 1, ADAM_RATES),
}
PLAIN = rk_optax.game(LOSSES, 0.1)


def take(tx: optax.GradientTransformation, carry: Any, key: jax.Array) -> Any:
    """One step on the batch of `key`."""
    params, state = carry
    data = batch(key)
    if isinstance(tx, rk_optax.Game):
        updates, state = tx.update(tx.grad(params, **data), state, params, **data)
    else:
        updates, state = tx.update(PLAIN.field(params, **data), state, params)
    return optax.apply_updates(params, updates), state


@functools.partial(jax.jit, static_argnames=("name", "steps", "looks"))
def train(name: str, rate: jax.Array, key: jax.Array, steps: int, looks: int) -> tuple[jax.Array, jax.Array]:
    """Modes and share at `looks` equal distances, for each of several rates and keys."""

    def run(rate: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        tx = ENTRANTS[name].make(rate)
        start, keys = jax.random.split(key)
        params = initial(start)

        def part(carry: Any, keys: jax.Array) -> Any:
            carry, _ = jax.lax.scan(lambda c, k: (take(tx, c, k), None), carry, keys)
            return carry, covered(carry[0])

        keys = jax.random.split(keys, steps).reshape(looks, steps // looks)
        return jax.lax.scan(part, (params, tx.init(params)), keys)[1]

    return jax.vmap(run)(rate, key)


def seconds_per_step(names: list[str], steps: int) -> dict[str, float]:
    """Processor time of a compiled step of one seed, the best of five turns."""
    runs = {}
    for name in names:
        tx = ENTRANTS[name].make(ENTRANTS[name].rates[0])

        def run(key: jax.Array, tx: optax.GradientTransformation = tx) -> Any:
            params = initial(key)
            keys = jax.random.split(key, steps)
            return jax.lax.scan(lambda c, k: (take(tx, c, k), None), (params, tx.init(params)), keys)[0]

        runs[name] = jax.jit(run)
        jax.block_until_ready(runs[name](jax.random.key(0)))
    best = dict.fromkeys(names, np.inf)
    for turn, name in itertools.product(range(5), names):
        start = time.process_time()
        jax.block_until_ready(runs[name](jax.random.key(turn)))
        best[name] = min(best[name], (time.process_time() - start) / steps)
    return best


def summary(values: np.ndarray) -> dict[str, Any]:
    return {
        "mean": float(values.mean()),
        "min": float(values.min()),
        "max": float(values.max()),
        "all": values.tolist(),
    }


def measure(name: str, gradients: int, looks: int) -> dict[str, Any]:
    """One entrant's rate, and what it covers with it on the seeds."""
    entrant = ENTRANTS[name]
    steps = gradients // entrant.gradients // looks * looks
    rates = jnp.asarray(entrant.rates, jnp.float32)
    trial = jax.random.split(jax.random.key(1000), 1)[jnp.zeros(len(rates), jnp.int32)]  # one seed for all
    modes, share = (np.asarray(x)[:, -1] for x in train(name, rates, trial, steps, looks))
    best = max(range(len(rates)), key=lambda i: (modes[i], share[i]))
    seeds = jax.random.split(jax.random.key(0), len(rates))
    history = train(name, jnp.full_like(rates, rates[best]), seeds, steps, looks)
    return {
        "name": name,
        "rate": entrant.rates[best],
        "trials": {"modes": modes.tolist(), "share": share.round(4).tolist()},
        "steps": steps,
        "gradients_per_step": entrant.gradients,
        "history": {key: np.asarray(x).round(4).tolist() for key, x in zip(("modes", "share"), history, strict=True)},
    }


def compared(rows: list[dict[str, Any]], each: dict[str, float], looks: int) -> list[dict[str, Any]]:
    """The rows with what they had at equal gradients and, where a step's seconds are known, at equal seconds."""
    for row in rows:
        row["seconds"] = row["steps"] * each[row["name"]] if each else None
    budget = min(row["seconds"] for row in rows) if each else 0.0
    for row in rows:
        modes, share = (np.array(row["history"][key]) for key in ("modes", "share"))
        looked = {"equal_gradients": looks - 1}
        looked["equal_seconds"] = min(int(looks * budget / row["seconds"]), looks) - 1 if each else -1
        for equal, look in looked.items():
            row[equal] = None if look < 0 else {"modes": summary(modes[:, look]), "share": summary(share[:, look])}
    return rows


def cells(row: dict[str, Any]) -> str:
    """The row of a table in Markdown."""
    texts = [f"`{row['name']}`" if "." in row["name"] else row["name"], f"{row['rate']:g}"]
    for equal in ("equal_gradients", "equal_seconds"):
        found = row[equal]
        modes, share = (found["modes"], found["share"]) if found else (None, None)
        texts.append(f"{modes['mean']:.1f} [{modes['min']:.0f}, {modes['max']:.0f}]" if modes else "–")
        texts.append(f"{100 * share['mean']:.0f} %" if share else "–")
    texts.insert(4, f"{row['seconds']:.1f}" if row["seconds"] else "–")
    return "| " + " | ".join(texts) + " |"


def show(rows: list[dict[str, Any]]) -> str:
    header = ("entrant", "rate", "modes", "share", "seconds", "modes at equal seconds", "share")
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *map(cells, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    gradients, looks, timed = (16, 2, 2) if arguments.smoke else (4000, 20, 50)
    rows = [measure(name, gradients, looks) for name in ENTRANTS]
    rows = compared(rows, seconds_per_step(list(ENTRANTS), timed), looks)
    print(show(rows))
    if arguments.json:
        about = {"python": platform.python_version(), "clock": "process_time", "gradients": gradients, "batch": BATCH}
        about |= {name: metadata.version(name) for name in ("jax", "optax")}
        arguments.json.write_text(json.dumps({"about": about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
