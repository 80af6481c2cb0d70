"""Linear systems (I + c·PB) x = P b of the linearly implicit and implicit solvers, by short capped iterations."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax.problem import Linear

PyTree = Any


class Solution(NamedTuple):
    """What the iteration found."""

    x: PyTree  # of `conjugate_gradients`; of `shifted_lanczos` the pair of its real and imaginary parts
    iterations: jax.Array  # shape=(), int32: products with B
    residual: jax.Array  # shape=(), relative to the right-hand side, 2-norm in the metric of P
    negative: jax.Array  # shape=(), bool: stopped at a direction of negative curvature of I + c·PB (CG)
    overlap: jax.Array | float = 0.0  # ⟨x, b − (I + c·PB) x⟩ in that metric: 0 for an iterate of CG


def conjugate_gradients(
    product: Linear, c: Any, b: PyTree, scale: PyTree | None, *, tolerance: float, max_iterations: int
) -> Solution:
    """Solves (I + c·PB) x = b for symmetric B and diagonal P > 0 (`scale`; None for I), from x = 0.

    With a diagonal P the operator is symmetric only in the metric of P^(−1), so CG runs on I + c·P^(1/2)BP^(1/2). It
    stops at a relative residual of `tolerance`, after `max_iterations`, or where the curvature along the search
    direction is not positive (Steihaug): x is then the last iterate, or b itself at the first. One product an
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
        x, r, p, rr, i, _, _ = carry
        moved = operator(p)
        curvature = _tree.inner(p, moved)
        # Not "> 0 fails": a NaN must go on into x, where it is seen.
        negative = curvature <= 0
        step = jnp.where(negative, 0, rr / jnp.where(negative, 1, curvature))
        x = _tree.add_scaled(x, step, p)
        r = _tree.add_scaled(r, -step, moved)
        new = _tree.inner(r, r)
        p = _tree.add_scaled(r, _tree.ratio(new, rr), p)
        return x, r, p, new, i + 1, negative, curvature

    def go_on(carry: Any) -> jax.Array:
        *_, rr, i, negative, _ = carry
        return (rr > tolerance**2 * square) & (i < max_iterations) & ~negative

    x = jax.tree.map(jnp.zeros_like, b)
    start = (x, b, b, square, jnp.zeros([], jnp.int32), jnp.zeros([], bool), square)
    x, _, _, rr, iterations, negative, curvature = jax.lax.while_loop(go_on, iterate, start)
    at_once = negative & (iterations == 1)
    x = _tree.select(at_once, b, x)
    # NaN ends the loop at once, with x = 0: it must not pass for a solution.
    x = _tree.select(jnp.isfinite(rr), x, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), x))
    overlap = jnp.where(at_once, square - curvature, 0)
    return Solution(times(x), iterations, jnp.sqrt(_tree.ratio(rr, square)), negative, overlap)


def shifted_lanczos(
    product: Linear, c: jax.Array, b: PyTree, scale: PyTree | None, *, tolerance: float, max_iterations: int
) -> Solution:
    """Solves (I + c·PB) x = b for symmetric B, diagonal P > 0 (`scale`; None for I) and a complex scalar c.

    The Krylov space of a real b is that of B alone: a Lanczos vector and one product an iteration, as for CG, and the
    tridiagonal systems are never singular where c is not real. Stops at a relative residual of `tolerance` or after
    `max_iterations`. (CG's form of it is due to Freund, 1990; libraries have only GMRES, which keeps every vector, and
    BiCGSTAB, which takes two products and may break down.)
    """
    root = None if scale is None else jax.tree.map(jnp.sqrt, scale)

    def times(x: PyTree) -> PyTree:
        return x if root is None else jax.tree.map(jnp.multiply, root, x)

    b = b if root is None else jax.tree.map(jnp.divide, b, root)
    size = _tree.norm(b)

    def iterate(carry: Any) -> Any:
        (re, im), (p_re, p_im), v_old, v, beta, eta, zeta, i, _ = carry
        w = _tree.add_scaled(times(product(times(v))), -beta, v_old)
        alpha = _tree.inner(v, w)
        w = _tree.add_scaled(w, -alpha, v)
        below = c * beta / eta  # of L in the factors L·U of the tridiagonal matrix
        eta = 1 + c * alpha - below * c * beta
        zeta = jnp.where(i == 0, size, -below * zeta)
        # p ← (v − cβ p)/η and x ← x + ζp in complex numbers, as pairs: a leaf may be complex by itself.
        one, back = 1 / eta, -c * beta / eta
        p_re, p_im = (
            _sum((one.real, v), (back.real, p_re), (-back.imag, p_im)),
            _sum((one.imag, v), (back.imag, p_re), (back.real, p_im)),
        )
        re, im = (
            _sum((1, re), (zeta.real, p_re), (-zeta.imag, p_im)),
            _sum((1, im), (zeta.imag, p_re), (zeta.real, p_im)),
        )
        new = _tree.norm(w)
        left = jnp.abs(c * zeta / eta) * new
        return (
            (re, im),
            (p_re, p_im),
            v,
            _tree.scale(_tree.ratio(jnp.ones_like(new), new), w),
            new,
            eta,
            zeta,
            i + 1,
            left,
        )

    def go_on(carry: Any) -> jax.Array:
        *_, i, left = carry
        return (left > tolerance * size) & (i < max_iterations)

    zero = jax.tree.map(jnp.zeros_like, b)
    one = jnp.ones_like(c)
    first = _tree.scale(_tree.ratio(jnp.ones_like(size), size), b)
    start = (zero, zero), (zero, zero), zero, first, jnp.zeros_like(size), one, one, jnp.zeros([], jnp.int32), size
    x, *_, iterations, left = jax.lax.while_loop(go_on, iterate, start)
    # NaN ends the loop at once, with x = 0: it must not pass for a solution.
    x = _tree.select(jnp.isfinite(left), x, jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), x))
    x = times(x[0]), times(x[1])
    return Solution(x, iterations, _tree.ratio(left, size), jnp.zeros([], bool))


def _sum(*terms: tuple[Any, PyTree]) -> PyTree:
    """Σ factor · tree, in one pass, each factor cast to the precision of each leaf."""
    factors = [factor for factor, _ in terms]

    def add(*leaves: jax.Array) -> Any:
        return sum(jnp.asarray(f, _tree.real_dtype(x)) * x for f, x in zip(factors, leaves, strict=True))

    return jax.tree.map(add, *(tree for _, tree in terms))
