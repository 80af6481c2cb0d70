"""Small blocks that several test files share."""

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax.networks import Controls

NODES = (0.0, 0.5, 1.25, 2.0)


def layer(theta, y, t):
    """A layer that moves with its weights and with time."""
    return jnp.tanh(y @ theta["kernel"] + theta["bias"] + 0.1 * t)


def controls(nodes=NODES, width=3, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    kernel, bias = rng.normal(size=(len(nodes), width, width)), rng.normal(size=(len(nodes), width))
    return Controls({"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(bias, dtype)}, nodes)


def features(batch=4, width=3, seed=1, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, width)), dtype)


def order(error_at, steps):
    """The order from the errors with two numbers of steps."""
    coarse, fine = (error_at(n) for n in steps)
    return float(np.log(coarse / fine) / np.log(steps[1] / steps[0]))


def largest_difference(x, y):
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))
