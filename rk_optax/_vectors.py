"""Trees as real vectors, and products of real matrices in full precision."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from rk_optax import _tree

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Inexact, PyTree, Shaped


@dataclasses.dataclass(frozen=True, eq=False)
class RealVectors:
    """Trees like params as real vectors of one dtype: complex leaves are pairs, their real parts first."""

    like: PyTree[Shaped[Array, ...]]
    dtype: Any

    @property
    def size(self) -> int:
        """The length of a vector: how many real numbers a tree holds."""
        return sum(leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in jax.tree.leaves(self.like))

    def flatten(self, tree: PyTree, lead: int = 0) -> Float[Array, "*lead p"]:
        """The leaves side by side, after their `lead` leading axes."""
        return self.beside(_tree.replicated(tree), lead)

    def beside(self, tree: PyTree, lead: int = 0) -> Float[Array, "*lead p"]:
        """`flatten` of leaves that lie where they are to stay."""
        parts = []
        for leaf in jax.tree.leaves(tree):
            for part in (jnp.real(leaf), jnp.imag(leaf)) if jnp.iscomplexobj(leaf) else (leaf,):
                shape = *part.shape[:lead], math.prod(part.shape[lead:])
                parts.append(part.reshape(shape).astype(self.dtype))
        return jnp.concatenate(parts, axis=-1) if parts else jnp.zeros((0,), self.dtype)

    def diagonal(self, tree: PyTree | None) -> Float[Array, " p"]:
        """A diagonal operator, one real number for each parameter, as a vector; None is the identity."""
        if tree is None:
            tree = jax.tree.map(lambda x: jnp.ones(x.shape, self.dtype), self.like)
        return self.flatten(jax.tree.map(lambda d, x: d * (1 + 1j) if jnp.iscomplexobj(x) else d, tree, self.like))

    def unflatten(self, vectors: Float[Array, "k p"]) -> PyTree[Inexact[Array, "k ..."]]:
        """Trees like params, in their dtypes, from vectors of shape (k, n)."""
        leaves, treedef = jax.tree.flatten(self.like)
        sizes = [part for leaf in leaves for part in [leaf.size] * (2 if jnp.iscomplexobj(leaf) else 1)]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        parts = iter(jnp.split(vectors, ends[:-1], axis=1)) if leaves else iter(())
        trees = []
        for leaf in leaves:
            part = next(parts)
            if jnp.iscomplexobj(leaf):
                part = jax.lax.complex(part, next(parts))
            trees.append(part.reshape(len(vectors), *leaf.shape).astype(leaf.dtype))
        return _tree.placed_like(treedef.unflatten(trees), self.like)

    def tree(self, vector: Float[Array, " p"]) -> PyTree[Inexact[Array, ...]]:
        """`unflatten` of one vector."""
        return jax.tree.map(lambda leaf: leaf[0], self.unflatten(vector[None]))


jax.tree_util.register_dataclass(RealVectors, ["like"], ["dtype"])


def lower_gram(rows: Inexact[Array, "n p"], scale: Float[Array, " p"] | None = None) -> Float[Array, "n n"]:
    """The lower triangle of Re(R Q Rᴴ), block by block: two thirds of the products of the whole."""
    blocks = 3 if len(rows) >= 512 else 1  # to copy the parts of fewer rows takes longer than the products it saves
    cuts = [len(rows) * i // blocks for i in range(blocks + 1)]
    strips = []
    for start, end in itertools.pairwise(cuts):
        strip = real_matmul(rows[start:end], (rows[:end] if scale is None else scale[None] * rows[:end]).T)
        strips.append(jnp.pad(strip, ((0, 0), (0, len(rows) - end))))
    return jnp.concatenate(strips)


def real_matmul(a: Inexact[Array, ...], b: Inexact[Array, ...]) -> Float[Array, ...]:
    """Re(a̅ b) of vectors, matrices or stacks of matrices, in full precision.

    Accelerators multiply in bfloat16 or TF32 unless told not to.
    Not `jnp.matmul`, whose explicit dtype of the result `jax.vmap` would ask for out of `_precision.doubled`, too.
    """
    product = jax.lax.dot if a.ndim <= 2 else jax.lax.batch_matmul
    return jnp.real(product(jnp.conj(a), b, precision="highest"))


def length(vector: Float[Array, " n"]) -> Float[Array, ""]:
    """The 2-norm of a real vector of any size: scaled before it is squared."""
    largest = jnp.max(jnp.abs(vector), initial=0)
    scaled = _tree.ratio(vector, largest)
    return largest * jnp.sqrt(jnp.sum(scaled * scaled))
