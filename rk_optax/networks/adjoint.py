"""The gradient along depth as the momentum of a Hamiltonian system."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rk_optax.networks.block import Block, Layer, Method
from rk_optax.networks.controls import Controls

PyTree = Any


class Momentum(NamedTuple):
    """Features, momenta and energy at every time of the grid, along leading axes of length n + 1."""

    states: PyTree  # y_k, like y
    momenta: PyTree  # p_k = ∂loss/∂y_k, like y
    energy: jax.Array  # shape=(n + 1, batch): H_k = p_k · layer(θ(t_k), y_k, t_k), summed over the features


def momentum(
    layer: Layer,
    controls: Controls,
    y: PyTree,
    grid: Any,
    loss: Callable[[PyTree], jax.Array],
    solver: Method = "rk4",
) -> Momentum:
    """P = ∂loss/∂y and H = p · y' along the depth of a block.

    Along an exact solution p' = −(∂f/∂y)ᵀp, and H is constant where the layer does not depend on t (its controls
    neither). Backpropagation keeps p · δy exactly, for every perturbation δy of a block; H drifts with the order of the
    method, so that its drift says whether the grid resolves the depth.

    >>> import jax, jax.numpy as jnp
    >>> from rk_optax.networks import Controls, initial, momentum, single
    >>> controls = Controls.constant_in_time(initial(jax.random.key(0), single, channels=3), nodes=(0,))
    >>> along = momentum(single, controls, jnp.ones((5, 3)), (0, 0.5, 1), jnp.sum)
    >>> along.momenta.shape, along.energy.shape
    ((3, 5, 3), (3, 5))

    Args:
      layer: as for `integrate`.
      controls: as for `integrate`.
      y: features with a leading batch axis.
      grid: as for `integrate`.
      loss: a scalar function of the features at the end.
      solver: as for `integrate`.

    Raises:
      TypeError: as for `integrate`.
      ValueError: as for `integrate`.

    Source: Ruseckas, "Differential equations as models of deep neural networks", arXiv 1909.03767.
    """
    block = Block.of(layer, controls, grid, solver, remat=False, report=("states",))
    end, report = block.run(y)
    return Momentum(report.states, *block.back(report.states, jax.grad(loss)(end)))
