"""Lanczos's method with full re-orthogonalisation on pytrees, restarted by keeping the best vectors (thick restart)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax import _tree

PyTree = Any
Product = Callable[[PyTree], PyTree]  # a symmetric operator: Re⟨x, Ay⟩ = Re⟨Ax, y⟩


class Krylov(NamedTuple):
    """An orthonormal basis V of m vectors with AV = VT + β·r·eₘᵀ."""

    basis: PyTree  # like the vectors, each leaf with a leading axis of length m + 1; the last row is r
    projected: jax.Array  # shape=(m, m): T = VᵀAV
    coupling: jax.Array  # shape=(): β


class Pairs(NamedTuple):
    """Eigenpairs of both ends of the spectrum."""

    values: jax.Array  # shape=(top + bottom,): descending
    vectors: PyTree  # each leaf with a leading axis of length top + bottom; orthonormal
    residuals: jax.Array  # shape=(top + bottom,): ‖Av − λv‖
    products: jax.Array  # shape=(), int32
    converged: jax.Array  # shape=(), bool


def dimension(like: PyTree) -> int:
    """The number of real unknowns of a tree: complex numbers count twice."""
    return sum(x.size * (2 if jnp.iscomplexobj(x) else 1) for x in jax.tree.leaves(like))


def real_dtype(like: PyTree) -> np.dtype:
    """The dtype of the projected matrix: that of the leaves, at least float32."""
    return jnp.finfo(jnp.result_type(jnp.float32, *jax.tree.leaves(like))).dtype


def random_vector(key: jax.Array, like: PyTree) -> PyTree:
    """Random signs for every real unknown: a complex number has two."""
    real, imaginary = (_tree.random_signs(k, like) for k in jax.random.split(key))
    return jax.tree.map(lambda a, b: a + 1j * b if jnp.iscomplexobj(a) else a, real, imaginary)


def _another(seed: jax.Array, like: PyTree) -> PyTree:
    """Numbers in [−1, 1) that depend on `seed`: any vector will do, and the usual random ones take long to compile.

    No signs: in a few dimensions there are so few that a new one may lie in the space of the old ones.
    """

    def numbers(stream: int, x: jax.Array) -> jax.Array:
        mixed = jnp.arange(x.size, dtype=jnp.uint32) + jnp.asarray(seed + 7919 * stream, jnp.uint32) * np.uint32(
            0x9E3779B9
        )
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
            mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
        return ((mixed >> 8).astype(jnp.float32) / 2**23 - 1).reshape(x.shape).astype(_tree.real_dtype(x))

    def of(leaf: int, x: jax.Array) -> jax.Array:
        real = numbers(2 * leaf, x)
        return jax.lax.complex(real, numbers(2 * leaf + 1, x)) if jnp.iscomplexobj(x) else real

    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten([of(i, x) for i, x in enumerate(leaves)])


def combined(basis: PyTree, weights: jax.Array) -> PyTree:
    """Σ_i weights[..., i] basis[i], in full precision on accelerators too."""

    def of(rows: jax.Array) -> jax.Array:
        cast = weights.astype(rows.dtype)
        return jnp.tensordot(cast, rows[: weights.shape[-1]], axes=1, precision=jax.lax.Precision.HIGHEST)

    return jax.tree.map(of, basis)


def extend(product: Product, krylov: Krylov, first: int | jax.Array, seed: int | jax.Array = 0) -> Krylov:
    """Fills rows `first` + 1 to m of the basis and columns `first` to m − 1 of T; costs m − `first` products.

    Each new vector is made orthogonal to all earlier ones twice, after which it is so to rounding.
    """
    size = len(krylov.projected)
    dtype = krylov.projected.dtype

    def overlaps(basis: PyTree, w: PyTree) -> jax.Array:
        def of(rows: jax.Array, x: jax.Array) -> jax.Array:
            flat = jnp.conj(rows).reshape(size + 1, -1)
            return jnp.real(jnp.matmul(flat, x.reshape(-1), precision=jax.lax.Precision.HIGHEST)).astype(dtype)

        return sum(jax.tree.leaves(jax.tree.map(of, basis, w)), jnp.zeros(size + 1, dtype))

    def orthogonal(basis: PyTree, w: PyTree) -> tuple[PyTree, jax.Array]:
        def once(_: Any, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
            w, total = carry
            h = overlaps(basis, w)  # rows not filled yet are zero, and so are their overlaps
            return jax.tree.map(jnp.subtract, w, combined(basis, h)), total + h

        return jax.lax.fori_loop(0, 2, once, (w, jnp.zeros(size + 1, dtype)))

    def column(j: jax.Array, carry: Krylov) -> Krylov:
        basis, projected, _ = carry
        w = product(jax.tree.map(lambda rows: rows[j], basis))
        before = _tree.norm(w).astype(dtype)
        w, h = orthogonal(basis, w)
        beta = _tree.norm(w).astype(dtype)
        # Where the space is invariant, nothing is left but rounding: go on from anywhere else, uncoupled.
        ended = beta <= 10 * jnp.finfo(dtype).eps * before
        w = jax.lax.cond(ended, lambda: orthogonal(basis, _another(seed + j, w))[0], lambda: w)
        w = _tree.unit(w)[0]
        basis = jax.tree.map(lambda rows, x: rows.at[j + 1].set(x), basis, w)
        h = h[:size]
        return Krylov(basis, projected.at[:, j].set(h).at[j, :].set(h), jnp.where(ended, 0, beta))

    return jax.lax.fori_loop(first, size, column, krylov)


def start(vector: PyTree, size: int) -> Krylov:
    """A basis of `size` + 1 rows whose first is `vector`, normalised, and nothing else yet."""
    dtype = real_dtype(vector)
    basis = jax.tree.map(lambda x: jnp.zeros((size + 1, *x.shape), x.dtype).at[0].set(x), _tree.unit(vector)[0])
    return Krylov(basis, jnp.zeros((size, size), dtype), jnp.zeros([], dtype))


def eigenpairs(
    product: Product,
    vector: PyTree,
    top: int,
    bottom: int,
    *,
    size: int,
    tolerance: float,
    max_products: int,
) -> Pairs:
    """The `top` largest and the `bottom` smallest eigenvalues of a symmetric operator, with their vectors.

    Memory: `size` + 1 vectors. Restarts keep the wanted Ritz vectors and as many of the best others as fill half of
    what is free, until every wanted residual is at most `tolerance` times the largest Ritz value in size.
    """
    spare = (size - top - bottom) // 2
    kept_bottom = bottom + (spare * bottom) // (top + bottom)
    kept_top = top + bottom + spare - kept_bottom
    kept = np.r_[np.arange(kept_bottom), np.arange(size - kept_top, size)]  # of the Ritz values, ascending
    wanted = np.r_[len(kept) - 1 - np.arange(top), np.arange(bottom)[::-1]]  # of those kept, descending

    def cycle(carry: Any) -> Any:
        krylov, first, products, _, _ = carry
        krylov = extend(product, krylov, first, products)
        values, vectors = jnp.linalg.eigh(krylov.projected)
        residuals = jnp.abs(krylov.coupling * vectors[-1])[kept]
        # A residual of the size of rounding is as good as it gets.
        goal = max(tolerance, 16 * float(jnp.finfo(values.dtype).eps)) * jnp.max(jnp.abs(values))
        basis = jax.tree.map(
            lambda rows, new: jnp.zeros_like(rows).at[: len(kept)].set(new).at[len(kept)].set(rows[-1]),
            krylov.basis,
            combined(krylov.basis, vectors[:, kept].T),
        )
        diagonal = jnp.zeros_like(krylov.projected).at[np.arange(len(kept)), np.arange(len(kept))].set(values[kept])
        products = products + (size - first).astype(jnp.int32)
        first = jnp.asarray(len(kept))
        return Krylov(basis, diagonal, krylov.coupling), first, products, residuals, jnp.all(residuals[wanted] <= goal)

    def go_on(carry: Any) -> jax.Array:
        _, first, products, _, converged = carry
        room = (first < size) & (products + (size - first) <= max_products)
        return (products == 0) | (~converged & room)

    krylov = start(vector, size)
    nothing = jnp.zeros(len(kept), krylov.projected.dtype)
    carry = (krylov, jnp.asarray(0), jnp.zeros([], jnp.int32), nothing, jnp.zeros([], bool))
    krylov, _, products, residuals, converged = jax.lax.while_loop(go_on, cycle, carry)
    vectors = jax.tree.map(lambda rows: rows[wanted], krylov.basis)
    return Pairs(jnp.diagonal(krylov.projected)[wanted], vectors, residuals[wanted], products, converged)
