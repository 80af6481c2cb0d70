"""Anderson acceleration of fixed-point iterations, several side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax._vectors import length

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class History(NamedTuple):
    """The last m iterates of each of k iterations and what the map changed there, the latest first."""

    iterates: Float[Array, "m k n"]
    changes: Float[Array, "m k n"]

    @classmethod
    def of(cls, iterate: Float[Array, "k n"], length: int) -> History:
        """Room for `length` of them."""
        empty = jnp.zeros((length, *iterate.shape), iterate.dtype)
        return cls(empty, empty)


def anderson(
    iterate: Float[Array, "k n"], change: Float[Array, "k n"], history: History, count: jax.Array
) -> tuple[Float[Array, "k n"], History]:
    """The next iterates x of x = G(x), and the history with these, of which `count` went before.

    With f = G(x) − x, it is G at the point of the span of the latest iterates where a linear f would be least (Anderson
    1965; Walker and Ni 2011, with the differences of f made orthogonal, the latest first). Where G is linear in a space
    of m dimensions, m + 1 evaluations find the fixed point, whether or not the iteration itself converges.

    Args:
      iterate: x.
      change: f.
      history: of the iterates before.
      count: how many there were, an integer.
    """
    result, left, basis = iterate + change, change, []
    for i, (old, old_change) in enumerate(zip(history.iterates, history.changes, strict=True)):
        moved, difference = iterate - old, change - old_change
        size = jax.vmap(length)(difference)[:, None]
        known = (i < count) & jnp.isfinite(size)
        image = jnp.where(known, moved + difference, 0)
        difference = jnp.where(known, difference, 0)
        for unit, its_image in basis:
            share = jnp.sum(unit * difference, axis=1, keepdims=True)
            difference, image = difference - share * unit, image - share * its_image
        rest = jax.vmap(length)(difference)[:, None]
        # What is left by rounding alone would lead anywhere.
        new = known & (rest > 1e-5 * size)
        unit = jnp.where(new, _tree.ratio(difference, rest), 0)
        image = jnp.where(new, _tree.ratio(image, rest), 0)
        share = jnp.sum(unit * left, axis=1, keepdims=True)
        left, result = left - share * unit, result - share * image
        basis.append((unit, image))
    shifted = (
        jnp.concatenate([new[None], old[:-1]]) if len(old) else old
        for new, old in ((iterate, history.iterates), (change, history.changes))
    )
    return result, History(*shifted)
