"""A closure for the two-scale Lorenz 96 system: the known coarse dynamics, and a network for what they leave out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rk_optax
from rk_optax.experiment.tasks.full_batch import FullBatch
from rk_optax.experiment.tasks.pinn import initial_network, network
from rk_optax.experiment.tasks.task import Params
from rk_optax.networks import Controls, integrate

_SLOW, _FAST, _FORCING, _COUPLING, _RATIO = 8, 8, 20.0, 1.0, 10.0  # K, J, F, h, b = c
_STEP = 0.01  # of the coarse model; the whole system takes a tenth


def lorenz96(seed: int, windows: int = 400, rollout: int = 5, horizon: float = 0.5, width: int = 16) -> FullBatch:
    """u_k' = −u_{k−1}(u_{k−2} − u_{k+1}) − u_k + F + N(u_k) with a tanh network N, 1-width-1, trained by RK4 rollouts.

    The data are slow variables of the whole system, generated from the seed; a residual is the difference after each of
    `rollout` steps of 0.01. The error is the root mean square difference after `horizon` time units, from 64 states
    that were not trained on; the coarse dynamics alone have 1.8 at 0.5.

    Source: Kang and Constantinescu, arXiv 2212.09967; the system is that of Wilks, Q. J. R. Meteorol. Soc. 131 (2005).
    """
    ahead = round(horizon / _STEP)
    if windows < 1 or rollout < 1 or ahead < 1:
        raise ValueError(f"windows, rollout and horizon/{_STEP} must be at least 1, got {windows, rollout, horizon}.")
    spread = 5  # steps between two windows
    path = _slow_path(seed, spread * (windows + 64) + max(ahead, rollout) + 1)
    starts = spread * np.arange(windows)
    u, targets = path[starts], jnp.stack([path[starts + i] for i in range(1, rollout + 1)], axis=1)
    unseen = spread * (windows + np.arange(64))
    first, last = path[unseen], path[unseen + ahead]

    def rolled(params: Params, u: jax.Array, steps: int) -> Any:
        closure = Controls(jax.tree.map(lambda x: x[None], params), (0,))
        return integrate(_slope, closure, u, _STEP * np.arange(steps + 1), report=["states"], unroll=1)

    def residuals(params: Params, u: jax.Array, targets: jax.Array) -> jax.Array:
        states = rolled(params, u, rollout)[1].states
        return jnp.moveaxis(states[1:], 0, 1) - targets

    def error(params: Params) -> jax.Array:
        return jnp.sqrt(jnp.mean((rolled(params, first, ahead)[0] - last) ** 2))

    return FullBatch(
        rk_optax.LeastSquares(residuals, reduction="mean"),
        initial_network(jax.random.key(seed), (1, width, 1)),
        {"u": u, "targets": targets},
        error,
        f"RMS error after {horizon:g} time units",
    )


def coarse(u: jax.Array) -> jax.Array:
    """The dynamics of the slow variables alone, along the last axis."""
    return -jnp.roll(u, 1, -1) * (jnp.roll(u, 2, -1) - jnp.roll(u, -1, -1)) - u + _FORCING


def _slope(params: Params, u: jax.Array, t: Any) -> jax.Array:
    # Scaled to about 1, in and out.
    return coarse(u) + 10 * jax.vmap(jax.vmap(lambda x: network(params, x[None] / 10)))(u)


def _whole(theta: Any, state: Any, t: Any) -> Any:
    u, v = state
    pull = _COUPLING * _RATIO / _RATIO
    fast = v.reshape(*u.shape[:-1], _SLOW * _FAST)  # neighbours across the slow variables' borders
    turn = -_RATIO * _RATIO * jnp.roll(fast, -1, -1) * (jnp.roll(fast, -2, -1) - jnp.roll(fast, 1, -1))
    du = coarse(u) - pull * v.sum(axis=-1)
    return du, (turn - _RATIO * fast).reshape(v.shape) + pull * u[..., None]


def _slow_path(seed: int, length: int) -> jax.Array:
    """The slow variables (time, variable) every _STEP, after five time units to forget the start."""
    rng = np.random.default_rng(seed)
    u, v = rng.normal(size=(1, _SLOW)) + 3, 0.1 * rng.normal(size=(1, _SLOW, _FAST))
    none = Controls(jnp.zeros((1, 1)), (0,))
    steps = 500 + length - 1

    def run(state: Any) -> Any:
        def interval(state: Any, _: Any) -> Any:
            after = integrate(_whole, none, state, _STEP / 10 * np.arange(11), unroll=1)
            return after, after[0][0]

        return jax.lax.scan(interval, state, None, length=steps)[1]

    return jax.jit(run)((jnp.asarray(u, float), jnp.asarray(v, float)))[499:]
