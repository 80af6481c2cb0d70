"""Forward gradients on the digits: test error by reverse mode, weight and activity perturbation, and local losses.

    python benchmarks/forward_gradients.py [--json FILE] [--smoke]

Four estimates of the gradient of one network (64-128-128-10, relu, layer norm), each trained by Adam for as many
steps, its rate the best of three by the validation error of one seed; then three other seeds. The paper is Ren et
al., arXiv 2210.03310; network, data and settings are ours.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rk_optax
from rk_optax.linen import LocalLoss, activity_forward_gradient

RESULT = pathlib.Path(__file__).parent / "results" / "forward_gradients.json"
METHODS = ("back-propagation", "FG-W", "FG-A", "LG-FG-A")
RATES = (3e-4, 1e-3, 3e-3)


class Net(nn.Module):
    """A multilayer perceptron; with `local` a loss at the end of each hidden layer, by a linear head of its own."""

    local: bool = False
    widths: tuple[int, ...] = (128, 128)

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The loss of each example, and the logits."""
        for i, width in enumerate(self.widths):
            x = nn.relu(nn.LayerNorm(name=f"norm_{i}")(nn.Dense(width, name=f"hidden_{i}")(x)))
            if self.local and i < len(self.widths) - 1:
                x = LocalLoss(name=f"end_{i}")(x, cross_entropy(nn.Dense(10, name=f"head_{i}")(x), y))
        logits = nn.Dense(10, name="readout")(x)
        return cross_entropy(logits, y), logits


def evaluated(net: Net, params: Any, x: jax.Array, y: jax.Array) -> Any:
    return net.apply({"params": params}, x, y)


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def data() -> dict[str, tuple[jax.Array, jax.Array]]:
    """Training, validation and test part of the digits, 70, 10 and 20 %."""
    digits: Any = load_digits()
    x, y = digits.data / 16, digits.target
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.125, random_state=0, stratify=y)
    parts = {"train": (x, y), "validation": (x_valid, y_valid), "test": (x_test, y_test)}
    return {name: (jnp.asarray(a, jnp.float32), jnp.asarray(b)) for name, (a, b) in parts.items()}


def field_of(method: str, net: Net) -> Any:
    """`field(params, x, y, key=key)`: an estimate of the gradient of the mean loss (of all losses, with local ones)."""

    def losses_fn(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        losses, _ = evaluated(net, params, x, y)
        return losses

    def mean_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return losses_fn(params, x, y).mean()

    if method == "back-propagation":
        return lambda params, x, y, key: jax.grad(mean_loss)(params, x, y)
    if method == "FG-W":
        return rk_optax.forward_gradient(mean_loss)
    return activity_forward_gradient(losses_fn, perturbed=lambda layer: str(layer.name).startswith("hidden"))


def trained(method: str, steps: int, batch: int, parts: Any) -> Any:
    """`run(seed, rate) -> (validation error, test error)`, compiled once."""
    net = Net(local=method == "LG-FG-A")
    field = field_of(method, net)
    x, y = parts["train"]

    def error(params: Any, part: str) -> jax.Array:
        _, logits = evaluated(net, params, *parts[part])
        return jnp.mean(jnp.argmax(logits, axis=1) != parts[part][1])

    @jax.jit
    def run(seed: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        start, run_key = jax.random.split(jax.random.key(seed))
        params = net.init(start, x[:2], y[:2])["params"]
        tx = optax.adam(optax.cosine_decay_schedule(1.0, steps))

        def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
            params, state = carry
            chosen_key, key = jax.random.split(jax.random.fold_in(run_key, i))
            chosen = jax.random.randint(chosen_key, (batch,), 0, len(x))
            gradient = field(params, x[chosen], y[chosen], key=key)
            updates, state = tx.update(gradient, state)
            updates = jax.tree.map(lambda u: rate * u, updates)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))
        return error(params, "validation"), error(params, "test")

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, default=RESULT)
    parser.add_argument("--smoke", action="store_true", help="a few steps: do all parts run?")
    arguments = parser.parse_args()
    steps, batch = (20, 32) if arguments.smoke else (3000, 128)
    settings = {"steps": steps, "batch": batch, "rates": RATES, "widths": Net.widths, "optimizer": "adam, cosine"}
    settings = json.loads(json.dumps(settings))
    rows = found["methods"] if (found := _read(arguments.json)).get("settings") == settings else []
    parts = data()
    for method in METHODS[len(rows) :]:
        began = time.process_time()
        run = trained(method, steps, batch, parts)
        validation = [float(run(100, rate)[0]) for rate in RATES]
        rate = RATES[int(np.argmin(validation))]
        errors = [100 * float(run(seed, rate)[1]) for seed in (0, 1, 2)]
        row = {"method": method, "rate": rate, "validation": validation, "test_error": errors}
        rows.append({**row, "cpu_seconds": time.process_time() - began})
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        versions = {"jax": jax.__version__, "rk_optax": rk_optax.__version__}
        content = {"settings": settings, "versions": versions, "methods": rows}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


def _read(path: pathlib.Path) -> dict[str, Any]:
    """An earlier result, which goes on where it stopped if its settings are the same."""
    return json.loads(path.read_text()) if path.exists() else {}


def table(rows: list[dict[str, Any]]) -> str:
    """The table of RESULTS.md."""
    lines = ["| gradient | test error, %, three seeds | rate | CPU s, all six runs |", "|---|---|---|---|"]
    for row in rows:
        mean, low, high = (f(row["test_error"]) for f in (np.mean, min, max))
        cells = (row["method"], f"{mean:.1f} [{low:.1f}, {high:.1f}]", f"{row['rate']:g}", f"{row['cpu_seconds']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
