"""What a block can say of its own steps: how exact they are, how stiff its layer is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax.solver import Cost
from rk_optax.traced_tableau import TracedTableau

PyTree = Any
Quantity = Literal["states", "error", "stiffness", "variation", "energy"]
QUANTITIES: tuple[Quantity, ...] = ("states", "error", "stiffness", "variation", "energy")


class Report(NamedTuple):
    """What `integrate` and `local_report` return beside the features; what was not asked for is None.

    All are differentiable: a regulariser is `loss + weight * report.error.mean()`.

    Attributes:
      cost: the whole block's; `gradients` are evaluations of the layer.
      states: the features at every time of the grid, a tree like y with a leading axis of length n + 1.
      error: E of each step and example, shape (n, batch): the root mean square over the features of the estimated local
        error / (atol + rtol·max(|y|, |y_next|)). An adaptive solver with these tolerances accepts where E ≤ 1.
      stiffness: S of each step and example, shape (n, batch): ‖k_i − k_j‖/‖y_i − y_j‖ of two stages at the same time
        where the method has such (rk4, tsit5, dopri5, dopri8), else of the first two, whose times differ. On y' = λy it
        is |λ|; a step is stable about where h·S is at most the method's `real_stability_interval`.
      variation: `controls.total_variation()`.
      energy: H = p · y' at each time of the grid and for each example, shape (n + 1, batch), with p = ∂loss/∂y; see
        `momentum`. Where the layer does not depend on t it drifts only by the errors of the method.
    """

    cost: Cost
    states: PyTree = None
    error: jax.Array | None = None
    stiffness: jax.Array | None = None
    variation: jax.Array | None = None
    energy: jax.Array | None = None


def scaled_error(error: PyTree, before: PyTree, after: PyTree, atol: float, rtol: float) -> jax.Array:
    """E of each example of one step: shape (batch,)."""
    return _rms(
        jax.tree.map(lambda e, a, b: e / (atol + rtol * jnp.maximum(jnp.abs(a), jnp.abs(b))), error, before, after)
    )


def stiffness(method: TracedTableau, ks: Sequence[PyTree], h: Any) -> jax.Array:
    """S of each example of one step, from all its stages: shape (batch,)."""
    later, earlier = _pair(method.c)
    rows = [[], *method.rows]
    # y_i − y_j by the coefficients: the difference of the positions has no digits for a short step.
    weights = [a - (rows[earlier][j] if j < earlier else 0) for j, a in enumerate(rows[later])]
    apart = jax.tree.map(lambda *k: h * sum(w * x for w, x in zip(weights, k, strict=True)), *ks[:later])
    change = _rms(jax.tree.map(jnp.subtract, ks[later], ks[earlier]))
    distance = _rms(apart)
    nowhere = distance == 0  # at rest, or h = 0: nothing is seen of the layer
    return jnp.where(nowhere, 0, change / jnp.where(nowhere, 1, distance))


def _pair(c: Sequence[Any]) -> tuple[int, int]:
    """The last two stages at the same time, else the first two."""
    for later in reversed(range(1, len(c))):
        for earlier in reversed(range(later)):
            known = all(isinstance(c[i], int | float) for i in (later, earlier))
            if known and abs(c[later] - c[earlier]) < 1e-12:
                return later, earlier
    return 1, 0


def _rms(tree: PyTree) -> jax.Array:
    """The root mean square over all axes but the first, and over leaves; its slope is 0 where it is 0."""
    leaves = [jnp.abs(x.reshape(x.shape[0], -1)) for x in jax.tree.leaves(tree)]
    # Scaled before it is squared: an error of 1e-25 squares to 0 in float32.
    size = jax.lax.stop_gradient(jnp.max(jnp.stack([x.max(axis=1) for x in leaves]), axis=0))
    usable = jnp.isfinite(size) & (size > 0)
    scale = jnp.where(usable, size, 1)
    count = sum(x.shape[1] for x in leaves)
    mean = sum((x / scale[:, None]).__pow__(2).sum(axis=1) for x in leaves) / count
    return scale * jnp.where(mean == 0, 0, jnp.sqrt(jnp.where(mean == 0, 1, mean)))
