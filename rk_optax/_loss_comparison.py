"""The losses before and after an attempt, compared: what rules by the loss decide from, to the rounding of its sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax.solver import Cost
from rk_optax.step_size import Attempt, Reason


class Losses(NamedTuple):
    """The losses before and after an attempt, compared."""

    fall: jax.Array  # of the loss
    accepted: jax.Array  # it did not rise
    tie: jax.Array  # neither their difference nor the fall to be expected is above their rounding
    refused: jax.Array  # it rose, and more than by rounding
    clear: jax.Array  # by far more
    shows_fall: jax.Array  # it fell, and more than by rounding
    usable: jax.Array  # as of the attempt; one that is not shows nothing
    step_size: jax.Array
    cost: Cost

    @classmethod
    def of(cls, attempt: Attempt, foretold: jax.Array) -> Losses:
        """Evaluates both losses; `foretold` is the fall to be expected of a short step.

        Where neither tells anything all has converged, or h is far too short. The difference of two losses carries the
        rounding of the sums that they are, some units in the last place, and counts as a difference only beyond that.
        """
        before, after = attempt.field.loss(attempt.params), attempt.field.loss(attempt.candidate)
        dtype = foretold.dtype
        rounding = (2 * jnp.finfo(before.dtype).eps * jnp.abs(before)).astype(dtype)
        fall = (before - after).astype(dtype)
        accepted = attempt.usable & (fall >= 0)  # ∞ − ∞ is no fall
        tie = attempt.usable & (jnp.abs(fall) <= 8 * rounding) & (foretold <= rounding)
        refused = attempt.usable & ~accepted & ~tie
        clear, shows_fall = refused & (-fall > 100 * rounding), accepted & (fall > 8 * rounding)
        h, cost = attempt.step_size.astype(dtype), Cost(losses=1 + attempt.field.losses_at(attempt.params))
        return cls(fall, accepted, tie, refused, clear, shows_fall, attempt.usable, h, cost)

    def seen(self, state: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`fall`, `tried` and `uphill` of the next state.

        With the loss's own gradient a step that is shorter by some factor rises by less than that factor, since the
        curvature alone can make it rise; against a gradient that is not the loss's it rises in proportion.
        """
        shorter = _tree.ratio(self.step_size, state.tried)
        comparable = (state.fall < 0) & (shorter > 0) & (shorter < 1)
        in_proportion = _tree.ratio(self.fall, state.fall) >= 0.5 * shorter * (1 + shorter)
        uphill = jnp.where(self.clear & comparable, in_proportion, state.uphill) & (self.refused | self.tie)
        shows = ~self.tie & jnp.isfinite(self.fall) & self.usable
        return jnp.where(shows, self.fall, state.fall), jnp.where(shows, self.step_size, state.tried), uphill

    def reason(self, uphill: jax.Array, at_smallest: jax.Array) -> jax.Array:
        """Why, read where the attempt was usable."""
        shortest = jnp.where(uphill, Reason.NOT_DOWNHILL, jnp.where(self.tie, Reason.UNRESOLVED, Reason.SMALLEST_STEP))
        refused = jnp.where(at_smallest | self.tie, shortest, Reason.LOSS_ROSE)
        return jnp.where(self.accepted, Reason.ACCEPTED, refused)


def root_of_slope(attempt: Attempt) -> jax.Array:
    """√⟨∇L, P∇L⟩, the root of the loss's slope along k1 = P∇L; ‖k1‖ for a P that is not known to be a diagonal."""
    scale = attempt.field.scale
    if scale is None:
        return _tree.norm(attempt.k1)
    return _tree.norm(jax.tree.map(lambda k, p: k * jax.lax.rsqrt(p), attempt.k1, scale))
