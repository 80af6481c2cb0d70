"""A curved valley, its gradient by hand, and trees as vectors, for the tests of secants."""

import jax
import jax.numpy as jnp
import numpy as np


def rosenbrock(w):
    return 50 * (w["a"][1] - w["a"][0] ** 2) ** 2 + 0.5 * (1 - w["a"][0]) ** 2 + 0.5 * jnp.sum(w["b"] ** 4)


def gradient(theta):
    """By hand, in the order of the leaves."""
    a, b, c = theta[0], theta[1], theta[2:]
    return np.r_[-200 * a * (b - a * a) - (1 - a), 100 * (b - a * a), 2 * c**3]


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
