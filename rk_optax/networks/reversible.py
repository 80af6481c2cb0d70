"""A block that can be run backwards, so that its backward pass stores no features at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax.field import VectorField
from rk_optax.methods import EULER
from rk_optax.networks.block import Block
from rk_optax.networks.controls import Controls
from rk_optax.solver import Explicit

PyTree = Any
Half = Callable[[PyTree, PyTree, Any], PyTree]


def reversible(
    y_layer: Half, z_layer: Half, controls: Controls, state: tuple[PyTree, PyTree], grid: Any
) -> tuple[PyTree, PyTree]:
    """The features (y, z) at the end of y' = y_layer(θ, z, t), z' = z_layer(θ, y, t), by the symplectic Euler method.

    Each step moves z by the slope at y, then y by the slope at the new z, with θ at the middle of the step: order 1.
    Either half is undone by the same step with −h, so the backward pass reconstructs the features from the end as it
    goes; it needs memory for one step whatever the depth, and one more evaluation of each half. Reconstruction is exact
    to rounding, which a long and expanding flow amplifies.

    >>> from rk_optax.networks import Controls, hamiltonian, hamiltonian_y, hamiltonian_z, initial, reversible
    >>> theta = initial(jax.random.key(0), hamiltonian, channels=3)
    >>> controls = Controls.constant_in_time(theta, nodes=(0, 1))
    >>> y, z = reversible(hamiltonian_y, hamiltonian_z, controls, (jnp.ones((5, 3)), jnp.zeros((5, 3))), (0, 0.5, 1))
    >>> y.shape
    (5, 3)

    Args:
      y_layer: a pure function `y_layer(theta, z, t)`, like y. What it closes over is not differentiated: JAX raises.
      z_layer: a pure function `z_layer(theta, y, t)`, like z.
      controls: θ(t).
      state: (y, z) at `grid[0]`.
      grid: strictly monotone times.

    Raises:
      TypeError: controls that are not `Controls`.
      ValueError: a grid that is not monotone.

    Source: Chang et al., AAAI 2018 (arXiv 1709.03698); the layers of Meganet.
    """
    block = Block.of(y_layer, controls, grid, "euler")
    starts, h, _ = block.intervals
    middles = starts + h / 2
    thetas = controls.at(middles)

    def step(theta: PyTree, state: tuple[PyTree, PyTree], t: Any, h: Any) -> tuple[PyTree, PyTree]:
        y, z = state
        z = _euler(z, z_layer(theta, y, t), h)
        return _euler(y, y_layer(theta, z, t), h), z

    def undo(theta: PyTree, state: tuple[PyTree, PyTree], t: Any, h: Any) -> tuple[PyTree, PyTree]:
        y, z = state
        y = _euler(y, y_layer(theta, z, t), -h)
        return y, _euler(z, z_layer(theta, y, t), -h)

    def forward(thetas: PyTree, state: Any, middles: jax.Array, h: jax.Array) -> Any:
        return jax.lax.scan(lambda state, at: (step(at[0], state, *at[1:]), None), state, (thetas, middles, h))[0]

    run = jax.custom_vjp(forward)

    def keep(*args: Any) -> tuple[Any, Any]:
        end = forward(*args)
        thetas, _, middles, h = args
        return end, (thetas, end, middles, h)

    def backward(kept: Any, cotangent: Any) -> Any:
        thetas, end, middles, h = kept

        def back(carry: Any, at: Any) -> tuple[Any, Any]:
            state, cotangent = carry
            theta, t, h = at
            before = undo(theta, state, t, h)
            theta_bar, before_bar, t_bar, h_bar = jax.vjp(step, theta, before, t, h)[1](cotangent)
            return (before, before_bar), (theta_bar, t_bar, h_bar)

        (_, start_bar), (thetas_bar, middles_bar, h_bar) = jax.lax.scan(
            back, (end, cotangent), (thetas, middles, h), reverse=True
        )
        return thetas_bar, start_bar, middles_bar, h_bar

    run.defvjp(keep, backward)
    return run(thetas, state, middles, h)


def _euler(x: PyTree, slope: PyTree, h: Any) -> PyTree:
    """One half of a step: the other half stands still, so that Euler's method is exact for it."""
    downhill = jax.tree.map(jnp.negative, slope)
    step = Explicit(EULER).step(VectorField(lambda x, stage: downhill), x, downhill, h, ())
    return _tree.add_scaled(x, -h, step.direction)
