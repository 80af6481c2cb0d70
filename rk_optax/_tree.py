"""The little arithmetic on pytrees that every room shares: each leaf keeps its own dtype and sharding."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import jaxtyping

    Tree = jaxtyping.PyTree[jaxtyping.Inexact[jaxtyping.Array, ...]]  # real and complex leaves, as params have them

PyTree = Any
Scalar = Any  # a Python or NumPy number, or a scalar jax.Array


def default_float() -> np.dtype:
    """The dtype of a float scalar held in state: float32, or float64 with `jax_enable_x64`."""
    return jnp.zeros([], float).dtype


def unit_roundoff(tree: Tree) -> float:
    """The largest relative error of rounding a number to the dtype of a leaf, over the leaves."""
    return max((float(jnp.finfo(jnp.asarray(x).dtype).eps) / 2 for x in jax.tree.leaves(tree)), default=0.0)


def real_dtype(leaf: jax.Array) -> np.dtype:
    """The dtype of a real number that scales `leaf` without promoting it."""
    return jnp.finfo(leaf.dtype).dtype


def scale(factor: Scalar, tree: Tree) -> Tree:
    """`factor * tree`, the factor cast to the precision of each leaf."""
    return jax.tree.map(lambda x: jnp.asarray(factor, real_dtype(x)) * x, tree)


def add_scaled(x: Tree, factor: Scalar, y: Tree) -> Tree:
    """`x + factor * y`, the factor cast to the precision of each leaf."""
    return jax.tree.map(lambda a, b: a + jnp.asarray(factor, real_dtype(b)) * b, x, y)


def common_dtype(*dtypes: Any) -> np.dtype:
    """The dtype that holds the numbers of all, also where `jax_numpy_dtype_promotion` forbids implicit ones."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes)


def cast_like(tree: Tree, like: Tree) -> Tree:
    """`tree` in the dtypes of `like`."""
    # A leaf of the right dtype passes as it is: a typed random key knows no astype.
    return jax.tree.map(lambda x, y: x if getattr(x, "dtype", None) == y.dtype else jnp.asarray(x, y.dtype), tree, like)


def all_finite(tree: Tree) -> jax.Array:
    """Whether every number in `tree` is finite: a boolean scalar."""
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, flags) if flags else jnp.asarray(True)


def select(condition: jax.Array, on_true: Tree, on_false: Tree) -> Tree:
    """`on_true` where `condition` (a boolean scalar) holds, else `on_false`, leaf by leaf."""
    return jax.tree.map(lambda t, f: jnp.where(condition, t, f), on_true, on_false)


def inner(x: Tree, y: Tree) -> jax.Array:
    """Re⟨x, y⟩ over all leaves, complex leaves as pairs of reals: a real scalar, of at least float32.

    Squares of numbers below 1e-19 or above 1e19 are beyond float32: use `norm`, or `unit` first.
    """
    products = [
        jnp.sum(_wide(jnp.real(jnp.conj(a) * b) if jnp.iscomplexobj(a) or jnp.iscomplexobj(b) else jnp.asarray(a) * b))
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    ]
    return _reduced(jnp.add, products)


def magnitude(tree: Tree) -> jax.Array:
    """A power of two near the largest |x|, by which a tree can be divided without rounding; 1 for zeros and NaN."""
    parts = [part for x in jax.tree.leaves(tree) if x.size for part in _real_parts(jax.lax.stop_gradient(x))]
    largest = _reduced(jnp.maximum, [_wide(_largest(part)) for part in parts])
    limits = jnp.finfo(largest.dtype)
    # The bits of its exponent alone, which are the power of two below it; the fewest operations, of which an update
    # has many: frexp and ldexp are a hundred.
    integer = np.dtype(f"uint{limits.bits}").type
    bits = jax.lax.bitcast_convert_type(largest, integer) & integer(((1 << limits.nexp) - 1) << limits.nmant)
    power = 2 * jax.lax.bitcast_convert_type(bits, largest.dtype)
    # Within the range whose inverse, and whose numbers' squares after the division, are far from the ends.
    most = limits.dtype.type(2.0 ** (limits.maxexp * 3 // 4))
    return jax.lax.select(largest > 0, jax.lax.clamp(1 / most, power, most), jnp.ones_like(largest))


def _largest(x: jax.Array) -> jax.Array:
    """The largest |x|. Without the barrier XLA fuses the scalar that is made of it into the pass, ten times as slow."""
    return jax.lax.optimization_barrier(jnp.max(jnp.abs(x)))


def norm(tree: Tree) -> jax.Array:
    """The 2-norm over all leaves: a real scalar, of at least float32.

    No square under- or overflows: where their sum nears an end of the range, a second pass first multiplies by a power
    of two that takes every number of that end to the middle. The derivative at 0 is 0.
    """
    leaves = jax.tree.leaves(tree)
    dtype = common_dtype(np.float32, *(real_dtype(x) for x in leaves))
    leaves = [x.astype(common_dtype(x.dtype, dtype)) for x in leaves]
    square = inner(leaves, leaves)
    limits = jnp.finfo(dtype)
    zero, one = (jnp.full_like(square, value) for value in (0, 1))

    def scaled() -> tuple[jax.Array, jax.Array]:
        far = limits.dtype.type(2.0 ** (limits.maxexp * 3 // 4))
        factor = jax.lax.select(square < 1, one * far, one / far)
        # Without the barrier XLA takes the factors of constant leaves together, and their square is what overflows.
        middle = jax.lax.optimization_barrier(scale(factor, leaves))
        return 1 / factor, inner(middle, middle)

    safe = (square > limits.tiny / limits.eps**2) & (square < limits.max)
    unit, square = jax.lax.cond(safe, lambda: (one, square), scaled)
    vanishes = square == 0
    return unit * jax.lax.select(vanishes, zero, jnp.sqrt(jax.lax.select(vanishes, one, square)))


def unit(tree: Tree) -> tuple[Tree, jax.Array]:
    """`tree` divided by its norm, 0 where that is 0, and the norm."""
    size = norm(tree)
    # The barrier as in `norm`, for the squares that will be formed of it.
    return jax.lax.optimization_barrier(scale(ratio(jnp.ones_like(size), size), tree)), size


def sum_with_rounding(total: jax.Array, rounding: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`total + term`, and what rounding has taken from it so far, which the next sum makes good (Kahan's sum).

    In float32 it keeps the sum of 1e5 steps, and it stays finite.
    """
    term = term - rounding
    new = jnp.minimum(total + term, jnp.finfo(total.dtype).max)
    return new, (new - total) - term


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """`numerator / denominator`, and 0 where the denominator is 0."""
    zero = denominator == 0
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def _wide(x: jax.Array) -> jax.Array:
    """Sums in half precision would lose what they sum."""
    return x.astype(common_dtype(x.dtype, jnp.float32))


def _real_parts(x: jax.Array) -> list[jax.Array]:
    return [jnp.real(x), jnp.imag(x)] if jnp.iscomplexobj(x) else [x]


def _reduced(combine: Callable[[jax.Array, jax.Array], jax.Array], scalars: Sequence[jax.Array]) -> jax.Array:
    """One scalar of several, in the widest of their dtypes; 0 of none."""
    dtype = common_dtype(np.dtype(np.float32), *(x.dtype for x in scalars))
    return functools.reduce(combine, [x.astype(dtype) for x in scalars]) if scalars else jnp.zeros([], dtype)


def replicated(tree: Tree) -> Tree:
    """`tree` whole on every device, where its leaves are split along explicit mesh axes; for what has to be cut up."""

    def whole(x: jax.Array) -> jax.Array:
        return _resharded(x, jax.sharding.PartitionSpec(), x) if _explicit_spec(x) else x

    return jax.tree.map(whole, tree)


def placed_like(tree: Tree, like: Tree) -> Tree:
    """`tree` split along explicit mesh axes as `like` is, but for leading axes of its own."""

    def place(x: jax.Array, y: jax.Array) -> jax.Array:
        spec = _explicit_spec(y)
        if spec is not None:
            spec = jax.sharding.PartitionSpec(*[None] * (x.ndim - y.ndim), *spec)
        if spec == _explicit_spec(x):
            return x
        return _resharded(x, spec or jax.sharding.PartitionSpec(), x if spec is None else y)

    return jax.tree.map(place, tree, like)


def _resharded(x: jax.Array, spec: jax.sharding.PartitionSpec, on: jax.Array) -> jax.Array:
    """`x` split along the mesh that `on` is on, whether or not the caller has set one."""
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(jax.typeof(on).sharding.mesh, spec))


def _explicit_spec(x: jax.Array) -> Any:
    """How `x` is split along explicit mesh axes, a `PartitionSpec`, or None where it is not."""
    spec = getattr(getattr(jax.typeof(x), "sharding", None), "spec", ())
    return spec if any(axis is not None for axis in spec) else None


def random_signs(key: jax.Array, like: Tree) -> Tree:
    """Independent numbers +1 and −1, in the shapes and dtypes of `like`."""
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(key, max(len(leaves), 1))
    return treedef.unflatten(
        [jax.random.rademacher(k, x.shape, real_dtype(x)).astype(x.dtype) for k, x in zip(keys, leaves, strict=False)]
    )


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` is a real or complex floating-point array (or abstract array)."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


@dataclasses.dataclass(frozen=True)
class Partition:
    """Splits trees of one structure into the leaves that move and those that stay.

    The moving part keeps the structure with `None` in place of each fixed leaf, so that no stage buffer is ever
    allocated for it.
    """

    treedef: Any
    moves: Sequence[bool]

    def moving(self, tree: Tree) -> Tree:
        """The leaves of `tree` that move."""
        leaves = self.treedef.flatten_up_to(tree)
        return self.treedef.unflatten([x if moves else None for x, moves in zip(leaves, self.moves, strict=True)])

    def merge(self, moving: Tree, whole: Tree) -> Tree:
        """`whole` with its moving leaves replaced by those of `moving`."""
        new, old = self.treedef.flatten_up_to(moving), self.treedef.flatten_up_to(whole)
        return self.treedef.unflatten([n if moves else o for n, o, moves in zip(new, old, self.moves, strict=True)])


def partition(mask: PyTree | Callable[[Tree], PyTree] | None, params: Tree) -> Partition:
    """Reads a mask (as `optax.masked` takes it) against `params`: True moves, False stays.

    Raises:
      ValueError: the mask is neither a tree of booleans with the structure of `params`, nor a prefix of it.
    """
    treedef = jax.tree.structure(params)
    # tree_map_params initialises with a placeholder that has no leaves, which no mask describes.
    if mask is None or treedef.num_leaves == 0:
        return Partition(treedef, (True,) * treedef.num_leaves)
    flags = mask(params) if callable(mask) else mask
    try:
        spread = jax.tree.map(lambda flag, sub: jax.tree.map(lambda _: flag, sub), flags, params)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"mask must be a tree of booleans with the structure of params, a prefix of it, or a function of "
            f"params that returns one; it does not fit: {error}"
        ) from None
    moves = jax.tree.leaves(spread)
    others = [m for m in moves if not isinstance(m, bool | np.bool_)]
    if others:
        raise ValueError(f"mask must hold Python booleans (True: the leaf moves, False: it stays), got {others[0]!r}.")
    return Partition(treedef, tuple(bool(m) for m in moves))
