"""A curve fitted by least squares, on which linearly implicit methods are tested."""

import jax
import jax.numpy as jnp
import numpy as np
from training import first_update

import rk_optax


def abscissae():
    """Where the curve is fitted: a new array, because JAX keeps a constant's buffer whatever the precision is later."""
    return np.linspace(-1, 1, 7)


def values():
    return np.sin(2 * abscissae())


THETA = {"a": np.array([0.7, -0.4]), "b": np.array([[0.3], [0.9]])}


def curve(params, x):
    """A model that is nonlinear in its parameters."""
    return jnp.tanh(params["a"][0] * x + params["a"][1]) * params["b"][0, 0] + params["b"][1, 0] * x**2


def misfit(params):
    """Residuals of which there are more than parameters."""
    return {"fit": curve(params, abscissae()) - values(), "pull": 0.5 * params["a"]}


def effective_gradient(loss, h, solver, params=THETA, **options):
    """g* at params, flat, and the state."""
    tx = rk_optax.scale_by_rk(loss, h, solver, stage_dtype=None, **options)
    direction, state = first_update(tx, loss, params)
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(direction)]), state
