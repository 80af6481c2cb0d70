"""Constraints on parameters, kept by a last link in the chain of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

PyTree = Any


def project(projection: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """Turns a projection of parameters into a transformation of updates: params + updates ends in the constraint set.

    Put it last in the chain, after the learning rate; with this package's optimizers in `optax.chain(rk4(...),
    project(...))`, which moves the end of each step and none of its stages. Only the step's end is in the set to the
    last bit or the one before: `params + (projected − params)` is rounded.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(optax.sgd(1.0), project(optax.projections.projection_non_negative))
    >>> params = jnp.array([0.5, 2.0])
    >>> updates, _ = tx.update(jnp.array([1.0, 1.0]), tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    Array([0., 1.], dtype=float32)

    Args:
      projection: a function from parameters to the nearest ones in the set, such as those of `optax.projections`.

    Raises:
      ValueError: at the update, where params are not passed.
    """

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("project needs the parameters: call tx.update(grads, state, params).")
        ends = projection(optax.apply_updates(params, updates))
        return jax.tree.map(lambda end, p, u: (end - p).astype(u.dtype), ends, params, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def project_to_box(lower: PyTree, upper: PyTree) -> optax.GradientTransformation:
    """Keeps every parameter in [lower, upper]; see `project`.

    >>> import jax.numpy as jnp
    >>> tx = optax.chain(optax.sgd(1.0), project_to_box(-0.5, 0.5))
    >>> params = jnp.array([0.0, 0.4])
    >>> updates, _ = tx.update(jnp.array([3.0, 0.1]), tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    Array([-0.5,  0.3], dtype=float32)

    Args:
      lower: a number, or a tree that params' tree begins with (`{"kernel": -0.5, "bias": -1.5}`), of numbers or arrays.
      upper: likewise.

    Raises:
      ValueError: a number in `lower` above that in `upper`; at the update, bounds that do not fit params.
    """
    if jax.tree.structure(lower) == jax.tree.structure(upper):
        for low, high in zip(jax.tree.leaves(lower), jax.tree.leaves(upper), strict=True):
            if isinstance(low, int | float) and isinstance(high, int | float) and not low <= high:
                raise ValueError(f"lower must not exceed upper, got {low!r} and {high!r}.")

    def projection(params: PyTree) -> PyTree:
        def spread(bound: PyTree) -> PyTree:
            return jax.tree.map(
                lambda b, sub: jax.tree.map(lambda p: jax.numpy.asarray(b, p.dtype), sub), bound, params
            )

        return optax.projections.projection_box(params, spread(lower), spread(upper))

    return project(projection)
