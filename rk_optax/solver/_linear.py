"""Linear systems (I + c·PB) x = P b of the linearly implicit and implicit solvers, by a short capped CG."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax.problem import Linear

PyTree = Any


class Solution(NamedTuple):
    """What CG found."""

    x: PyTree
    iterations: jax.Array  # shape=(), int32: products with B
    residual: jax.Array  # shape=(), relative to the right-hand side, 2-norm in the metric of P
    negative: jax.Array  # shape=(), bool: stopped at a direction of negative curvature of I + c·PB


def conjugate_gradients(
    product: Linear, c: Any, b: PyTree, scale: PyTree | None, *, tolerance: float, max_iterations: int
) -> Solution:
    """Solves (I + c·PB) x = b for symmetric B and diagonal P > 0 (`scale`; None for I), from x = 0.

    With a diagonal P the operator is symmetric only in the metric of P^(−1), so CG runs on I + c·P^(1/2)BP^(1/2). It
    stops at a relative residual of `tolerance`, after `max_iterations`, or where the curvature along the search
    direction is not positive (Steihaug): x is then the last iterate, or b itself at the first. One product per
    iteration; the library versions evaluate the operator more often and report success on indefinite systems.
    """
    root = None if scale is None else jax.tree.map(jnp.sqrt, scale)

    def times(x: PyTree) -> PyTree:
        return x if root is None else jax.tree.map(jnp.multiply, root, x)

    def operator(x: PyTree) -> PyTree:
        return _tree.add_scaled(x, c, times(product(times(x))))

    b = b if root is None else jax.tree.map(jnp.divide, b, root)
    square = _tree.inner(b, b)

    def iterate(carry: Any) -> Any:
        x, r, p, rr, i, _ = carry
        moved = operator(p)
        curvature = _tree.inner(p, moved)
        # Not "> 0 fails": a NaN must go on into x, where it is seen.
        negative = curvature <= 0
        step = jnp.where(negative, 0, rr / jnp.where(negative, 1, curvature))
        x = _tree.add_scaled(x, step, p)
        r = _tree.add_scaled(r, -step, moved)
        new = _tree.inner(r, r)
        p = _tree.add_scaled(r, _tree.ratio(new, rr), p)
        return x, r, p, new, i + 1, negative

    def go_on(carry: Any) -> jax.Array:
        *_, rr, i, negative = carry
        return (rr > tolerance**2 * square) & (i < max_iterations) & ~negative

    x = jax.tree.map(jnp.zeros_like, b)
    start = (x, b, b, square, jnp.zeros([], jnp.int32), jnp.zeros([], bool))
    x, _, _, rr, iterations, negative = jax.lax.while_loop(go_on, iterate, start)
    x = _tree.select(negative & (iterations == 1), b, x)
    # NaN ends the loop at once, with x = 0: it must not pass for a solution.
    x = _tree.select(jnp.isfinite(rr), x, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), x))
    return Solution(times(x), iterations, jnp.sqrt(_tree.ratio(rr, square)), negative)
