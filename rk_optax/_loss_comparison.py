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
    tie: jax.Array  # neither what is compared nor the fall to be expected is above its rounding
    refused: jax.Array  # it rose, and more than by rounding
    clear: jax.Array  # by far more
    shows_fall: jax.Array  # it fell, and more than by rounding
    hidden: jax.Array  # the losses themselves show no fall, and no rise that could not be rounding
    usable: jax.Array  # as of the attempt; one that is not shows nothing
    step_size: jax.Array
    cost: Cost

    @classmethod
    def of(cls, attempt: Attempt, foretold: jax.Array) -> Losses:
        """Evaluates both losses; `foretold` is the fall to be expected of a short step.

        A loss that is a sum of large terms of both signs carries the rounding of those, which nobody knows and which
        may be hundreds of its units in the last place. Where the losses show no fall, and no rise beyond that, the fall
        is the mean of the slopes at both ends of the step, which is exact for a quadratic, and the step is taken under
        the approximate Wolfe condition of Hager and Zhang (2005), doi 10.1137/030601880, with their δ = 0.1. Where the
        slopes tell nothing either, all has converged, or h is far too short. Slopes that foretell a fall which the
        losses would then show are those of no quadratic, and the losses decide. A step that rounding has made 0 is a
        tie.
        """
        before, after = attempt.field.loss(attempt.params), attempt.field.loss(attempt.candidate)
        dtype = foretold.dtype
        eps = float(jnp.finfo(before.dtype).eps)
        rounding = (2 * eps * jnp.abs(before)).astype(dtype)
        fall = (before - after).astype(dtype)  # ∞ − ∞ is no fall
        most = min(1000.0, max(8.0, 1e-3 / (2 * eps))) * rounding  # of a loss in half precision less: no rise is small
        hidden = attempt.usable & (fall <= 8 * rounding) & (-fall <= most)
        # A tie is hidden, so what it needs is asked for here alone.
        nothing = jnp.zeros(2, dtype), jnp.zeros([], bool)
        slopes, unmoved = jax.lax.cond(hidden, lambda: (_slopes(attempt, dtype), _unmoved(attempt)), lambda: nothing)
        start, end = slopes
        by_slopes, tiny = 0.5 * (start + end), (foretold <= rounding) | unmoved
        spent, hidden = hidden, hidden & ~(by_slopes - fall > most)
        rounding = jnp.where(hidden, eps * (jnp.abs(start) + jnp.abs(end)), rounding)
        fall = jnp.where(hidden, by_slopes, fall)
        accepted = attempt.usable & (fall >= 0) & (~hidden | (by_slopes >= 0.1 * start))
        tie = attempt.usable & (jnp.abs(fall) <= 8 * rounding) & tiny
        refused = attempt.usable & ~accepted & ~tie
        clear, shows_fall = refused & (-fall > 100 * rounding), accepted & (fall > 8 * rounding)
        h = attempt.step_size.astype(dtype)
        cost = Cost(losses=1 + attempt.field.losses_at(attempt.params), gradients=jnp.where(spent, 2, 0))
        return cls(fall, accepted, tie, refused, clear, shows_fall, hidden, attempt.usable, h, cost)

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
        shortest = jnp.where(self.hidden, Reason.UNRESOLVED, Reason.SMALLEST_STEP)
        refused = jnp.where(
            at_smallest | self.hidden, jnp.where(uphill, Reason.NOT_DOWNHILL, shortest), Reason.LOSS_ROSE
        )
        return jnp.where(self.accepted, Reason.ACCEPTED, refused)


def _unmoved(attempt: Attempt) -> jax.Array:
    """Whether the step is below the rounding of the parameters."""
    same = jax.tree.map(lambda a, b: jnp.all(a == b), attempt.params, attempt.candidate)
    return jnp.stack([jnp.array(True), *jax.tree.leaves(same)]).all()


def _slopes(attempt: Attempt, dtype: Any) -> jax.Array:
    """By how much the loss would fall over the step with the slope at its start, and with that at its end."""
    step, length = _tree.unit(jax.tree.map(jnp.subtract, attempt.params, attempt.candidate))

    def slope(at_end: jax.Array) -> jax.Array:
        gradient, size = _tree.unit(
            attempt.field.unpreconditioned(_tree.select(at_end, attempt.candidate, attempt.params))
        )
        return (_tree.inner(gradient, step).astype(dtype) * size.astype(dtype)) * length.astype(dtype)

    return jax.lax.map(slope, jnp.array([False, True]))  # in turn, so that the loss is traced once


def root_of_slope(attempt: Attempt) -> jax.Array:
    """√⟨∇L, P∇L⟩, the root of the loss's slope along k1 = P∇L; ‖k1‖ for a P that is not known to be a diagonal."""
    scale = attempt.field.scale
    if scale is None:
        return _tree.norm(attempt.k1)
    return _tree.norm(jax.tree.map(lambda k, p: k * jax.lax.rsqrt(p), attempt.k1, scale))
