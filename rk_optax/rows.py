"""Residuals and their Jacobian as an operator: in one array, split over the devices of a mesh, or block by block."""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from rk_optax import _precision, _tree
from rk_optax._vectors import RealVectors, lower_gram, real_matmul

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Inexact, PyTree

    from rk_optax._tree import Tree

Side = Literal["residuals", "parameters"]


class Rows(abc.ABC):
    """Residuals r and their Jacobian R, a row for each: ½‖r‖² is the loss, and Rᵀr its gradient.

    What `LeastSquares.rows` and the `rows` of a field return. R acts on real vectors, which `vectors` makes of trees
    like params, and trees of them; complex parameters are pairs. R is one array, or split over the points where
    these are on a mesh of devices, or formed block by block (`points_at_once`): who uses it does not see which.

    >>> import jax.numpy as jnp, rk_optax
    >>> loss_fn = rk_optax.LeastSquares(lambda w: jnp.array([w[0] - 1, 10 * (w[1] - w[0] ** 2)]))
    >>> rows = loss_fn.rows(jnp.zeros(2), {})
    >>> print(rows.mv(jnp.ones(2)), rows.rmv(rows.residual))
    [ 1. 10.] [-1.  0.]

    Attributes:
      vectors: trees like params as vectors of length P, in the dtype of R: float32 at least.
      residual: r, shape (N,), weights folded in, in its own dtype.
      in_one_array: whether `matrix` costs no memory, and no exchange between devices.
    """

    vectors: RealVectors
    residual: Float[Array, " n"]
    in_one_array: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, int]:
        """N, the number of residuals, and P, of real parameters."""
        return self.residual.size, self.vectors.size

    @property
    def dtype(self) -> Any:
        """Of R and of what its products return."""
        return self.vectors.dtype

    @abc.abstractmethod
    def mv(self, v: Float[Array, " p"]) -> Float[Array, " n"]:
        """Rv."""

    @abc.abstractmethod
    def rmv(self, y: Float[Array, "*k n"]) -> Float[Array, "*k p"]:
        """Rᵀy, of one vector or of several, one in a row."""

    @abc.abstractmethod
    def gram(
        self, side: Side, scale: Float[Array, " p"] | None = None, unit: Float[Array, ""] | None = None
    ) -> Float[Array, "m m"]:
        """The lower triangle of RQRᵀ/unit², N×N, or of Q^½RᵀRQ^½/unit², P×P; what is above it is not defined.

        Args:
          side: whose space it is in.
          scale: the diagonal of Q, not negative; None for the identity.
          unit: a positive number by which R is divided before it is squared; None for 1.
        """

    @abc.abstractmethod
    def magnitude(self) -> Float[Array, ""]:
        """A power of two near the largest number of R; see `_tree.magnitude`."""

    @abc.abstractmethod
    def matrix(self) -> Float[Array, "n p"]:
        """R in one array, whole on every device."""

    @abc.abstractmethod
    def astype(self, dtype: Any) -> Rows:
        """The same in vectors of another dtype."""

    @property
    def gradient(self) -> Tree:
        """Rᵀr, like params."""
        return self.vectors.tree(self.rmv(self.residual.astype(self.dtype)))

    @property
    def jacobian(self) -> PyTree[Inexact[Array, "n ..."]]:
        """R as a tree like params, each leaf with a leading axis of length N; conjugated for complex leaves."""
        return self.vectors.unflatten(self.matrix())


@dataclasses.dataclass(frozen=True, eq=False)
class DenseRows(Rows):
    """R in one array."""

    vectors: RealVectors
    residual: Float[Array, " n"]
    array: Float[Array, "n p"]
    in_one_array: ClassVar[bool] = True

    @classmethod
    def of(cls, array: Float[Array, "n p"]) -> DenseRows:
        """Of a Jacobian alone, with residuals of zero and one vector for parameters."""
        return cls(RealVectors(array[0], array.dtype), jnp.zeros(len(array), array.dtype), array)

    def mv(self, v: Float[Array, " p"]) -> Float[Array, " n"]:
        """See `Rows.mv`."""
        return real_matmul(self.array, v)

    def rmv(self, y: Float[Array, "*k n"]) -> Float[Array, "*k p"]:
        """See `Rows.rmv`."""
        return real_matmul(y, self.array)

    def gram(
        self, side: Side, scale: Float[Array, " p"] | None = None, unit: Float[Array, ""] | None = None
    ) -> Float[Array, "m m"]:
        """See `Rows.gram`."""
        if side == "residuals":
            return lower_gram(self.array if unit is None else self.array / unit, scale)
        return lower_gram(_scaled(self.array, scale, unit).T)

    def magnitude(self) -> Float[Array, ""]:
        """See `Rows.magnitude`."""
        return _tree.magnitude(self.array)

    def matrix(self) -> Float[Array, "n p"]:
        """See `Rows.matrix`."""
        return self.array

    def astype(self, dtype: Any) -> DenseRows:
        """See `Rows.astype`."""
        if dtype == self.dtype:
            return self
        array = jax.lax.optimization_barrier(self.array.astype(dtype))  # once, and not for each of the products
        return DenseRows(RealVectors(self.vectors.like, dtype), self.residual, array)


# So that rows may go in and out of `jax.jit`.
jax.tree_util.register_dataclass(DenseRows, ["vectors", "residual", "array"], [])


@dataclasses.dataclass(frozen=True, eq=False)
class SplitRows(Rows):
    """R split over the points, each device of a mesh with the rows of its own: what is formed of them is added up.

    The P×P matrix is a sum over the devices, one all-reduce of it. For the N×N one, first each device is sent its share
    of the columns, for which the devices exchange the N×P numbers once (padded, where they do not divide P), and then
    that is a sum too. Vectors and matrices come out whole on every device.
    """

    vectors: RealVectors
    residual: Float[Array, " n"]
    parts: tuple[Float[Array, "_ p"], ...]  # in the order of the residuals
    mesh: jax.sharding.AbstractMesh

    def mv(self, v: Float[Array, " p"]) -> Float[Array, " n"]:
        """See `Rows.mv`."""

        def pushed(parts: tuple[jax.Array, ...], v: jax.Array) -> jax.Array:
            # Else XLA may send the rows around and not these.
            return jnp.concatenate([self._split(real_matmul(part, v), 0) for part in parts])

        return self._whole(pushed, v)

    def rmv(self, y: Float[Array, "*k n"]) -> Float[Array, "*k p"]:
        """See `Rows.rmv`."""

        def pulled(parts: tuple[jax.Array, ...], y: jax.Array) -> jax.Array:
            ends = list(itertools.accumulate(map(len, parts)))
            pairs = zip(jnp.split(y, ends[:-1], axis=-1), parts, strict=True)
            return functools.reduce(jnp.add, (real_matmul(*pair) for pair in pairs))

        return self._whole(pulled, y)

    def gram(
        self, side: Side, scale: Float[Array, " p"] | None = None, unit: Float[Array, ""] | None = None
    ) -> Float[Array, "m m"]:
        """See `Rows.gram`."""
        form = self._of_residuals if side == "residuals" else self._of_parameters

        def product(parts: tuple[jax.Array, ...], scale: jax.Array | None, unit: jax.Array | None) -> jax.Array:
            return form([_scaled(part, scale, unit) for part in parts])

        return self._whole(product, scale, unit)

    def _of_parameters(self, parts: Sequence[jax.Array]) -> jax.Array:
        sums = [real_matmul(part.T, part) for part in parts if len(part) % self._devices]
        shares = [part.reshape(self._devices, -1, part.shape[1]) for part in parts if len(part) % self._devices == 0]
        if shares:
            # Each device's share by itself: one sum over the devices in the end, and not one for each part.
            products = (jnp.einsum("dnp,dnq->dpq", share, share, precision="highest") for share in shares)
            sums.append(jnp.sum(self._split(functools.reduce(jnp.add, products), 0), axis=0))
        return functools.reduce(jnp.add, sums)

    def _of_residuals(self, parts: Sequence[jax.Array]) -> jax.Array:
        padding = -parts[0].shape[1] % self._devices
        matrix = jnp.concatenate([self._split(jnp.pad(part, ((0, 0), (0, padding))), 1) for part in parts])
        return real_matmul(matrix, matrix.T)

    def magnitude(self) -> Float[Array, ""]:
        """See `Rows.magnitude`."""
        return self._whole(_tree.magnitude)

    def matrix(self) -> Float[Array, "n p"]:
        """See `Rows.matrix`."""
        return self._whole(jnp.concatenate)

    def astype(self, dtype: Any) -> SplitRows:
        """See `Rows.astype`."""
        if dtype == self.dtype:
            return self
        parts = jax.lax.optimization_barrier(tuple(part.astype(dtype) for part in self.parts))
        return SplitRows(RealVectors(self.vectors.like, dtype), self.residual, parts, self.mesh)

    @property
    def _devices(self) -> int:
        return self.mesh.size

    def _split(self, x: jax.Array, axis: int) -> jax.Array:
        if x.shape[axis] % self._devices:
            return x
        inside = jax.sharding.get_abstract_mesh()  # whose axes are automatic here, also where they are explicit outside
        mesh = self.mesh if inside.empty else inside
        spec = PartitionSpec(*[None] * axis, mesh.axis_names)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def _whole(self, function: Callable[..., jax.Array], *args: jax.Array | None) -> jax.Array:
        return _partitioned(function, self.mesh, PartitionSpec())(self.parts, *args)


jax.tree_util.register_dataclass(SplitRows, ["vectors", "residual", "parts"], ["mesh"])


class Blocks(NamedTuple):
    """The rows of one function, so many points at once."""

    rows_at: Callable[[PyTree], tuple[jax.Array, Tree]]  # of points: residuals (b, m), and their Jacobian like params
    points: PyTree  # each leaf of shape (blocks, b, ...), the last block filled up
    weights: Float[Array, "blocks b*m"]  # 0 where filled up
    length: int  # the number of rows that are not

    @classmethod
    def of(
        cls, rows_at: Callable[[PyTree], Any], points: PyTree, weights: Float[Array, " n*m"], size: int | None
    ) -> Blocks:
        """`size` points at once, of n ≥ 1; None for a function that has no points, in one block."""
        if size is None:
            return cls(lambda _: rows_at({}), jnp.zeros(1), weights[None], len(weights))
        number = len(jax.tree.leaves(points)[0])
        size = min(size, number)
        padding = -number % size

        def cut(leaf: jax.Array) -> jax.Array:
            last = jnp.broadcast_to(leaf[-1:], (padding, *leaf.shape[1:]))
            return jnp.concatenate([leaf, last]).reshape(-1, size, *leaf.shape[1:])

        filled = jnp.pad(weights, (0, padding * (len(weights) // number)))
        cut_weights = filled.reshape((number + padding) // size, -1)
        return cls(rows_at, jax.tree.map(lambda x: cut(jnp.asarray(x)), points), cut_weights, len(weights))


@dataclasses.dataclass(frozen=True, eq=False)
class BlockedRows(Rows):
    """R that is never held whole: a block of points at a time, formed again for every product.

    For the N×N matrix the rows are formed once for each block, and once more.
    """

    vectors: RealVectors
    residual: Float[Array, " n"]
    terms: tuple[Blocks, ...]  # in the order of the residuals

    def mv(self, v: Float[Array, " p"]) -> Float[Array, " n"]:
        """See `Rows.mv`."""
        return self._stacked(lambda array: real_matmul(array, v))

    def rmv(self, y: Float[Array, "*k n"]) -> Float[Array, "*k p"]:
        """See `Rows.rmv`."""
        total = jnp.zeros((*y.shape[:-1], self.vectors.size), self.dtype)
        ends = list(itertools.accumulate(term.length for term in self.terms))
        for term, part in zip(self.terms, jnp.split(y, ends[:-1], axis=-1), strict=True):
            filled = jnp.pad(part, [(0, 0)] * (y.ndim - 1) + [(0, term.weights.size - term.length)])
            cut = jnp.moveaxis(filled.reshape(*y.shape[:-1], *term.weights.shape), -2, 0)
            total = self._folded(lambda total, array, y: total + real_matmul(y, array), total, term, cut)
        return total

    def gram(
        self, side: Side, scale: Float[Array, " p"] | None = None, unit: Float[Array, ""] | None = None
    ) -> Float[Array, "m m"]:
        """See `Rows.gram`."""

        def scaled(array: jax.Array) -> jax.Array:
            return _scaled(array, scale, unit)

        if side == "residuals":
            return self._stacked(
                lambda array: self._stacked(lambda other: real_matmul(scaled(other), scaled(array).T)).T
            )
        total = jnp.zeros((self.vectors.size,) * 2, self.dtype)
        for term in self.terms:
            total = self._folded(
                lambda total, array, _: total + real_matmul(scaled(array).T, scaled(array)), total, term
            )
        return total

    def magnitude(self) -> Float[Array, ""]:
        """See `Rows.magnitude`."""
        largest = jnp.zeros([], self.dtype)
        for term in self.terms:
            largest = self._folded(
                lambda largest, array, _: jnp.maximum(largest, jnp.max(jnp.abs(array), initial=0)), largest, term
            )
        return _tree.magnitude(largest)

    def matrix(self) -> Float[Array, "n p"]:
        """See `Rows.matrix`."""
        return self._stacked(lambda array: array)

    def astype(self, dtype: Any) -> BlockedRows:
        """See `Rows.astype`."""
        return dataclasses.replace(self, vectors=RealVectors(self.vectors.like, dtype))

    def _stacked(self, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
        """What `function` makes of the rows of each block, one below the other."""
        found = []
        for term in self.terms:
            each = jax.lax.map(
                lambda block, term=term: function(self._array(term, *block)), (term.points, term.weights)
            )
            found.append(each.reshape(-1, *each.shape[2:])[: term.length])
        return jnp.concatenate(found)

    def _folded(
        self, function: Callable[..., jax.Array], total: jax.Array, term: Blocks, beside: Any = None
    ) -> jax.Array:
        """`total` after `function(total, rows, beside)` of each block."""

        def step(total: jax.Array, block: Any) -> tuple[jax.Array, None]:
            points, weights, other = block
            return function(total, self._array(term, points, weights), other), None

        return jax.lax.scan(step, total, (term.points, term.weights, beside))[0]

    def _array(self, term: Blocks, points: PyTree, weights: jax.Array) -> jax.Array:
        with _precision.callers():
            rows = _weighted(*term.rows_at(points), weights)
        return _in_one_array(self.vectors, *rows)[1]


def rows_of(
    params: Tree,
    residuals: Sequence[Float[Array, "*point m"]],
    jacobians: Sequence[PyTree[Inexact[Array, "*point m ..."]]],
    weights: Sequence[Float[Array, " _"]],
) -> Rows:
    """The rows of several functions, each with its factors, flat: split where the functions' results are on a mesh.

    Args:
      params: the parameters.
      residuals: of each function, over its points first where it is mapped over some.
      jacobians: of each, like params with the axes of its residuals before their own; of complex leaves the conjugate.
      weights: a factor for each residual.
    """
    vectors = vectors_of(params, residuals)
    parts = list(zip(residuals, jacobians, weights, strict=True))
    mesh = mesh_of((residuals, jacobians))
    if mesh is None:
        values, trees = zip(*(_weighted(*part) for part in parts), strict=True)
        tree = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
        return DenseRows(vectors, *_in_one_array(vectors, jnp.concatenate(values), tree))
    found = []
    for part in parts:
        placed = PartitionSpec(), PartitionSpec(jax.typeof(part[0]).sharding.spec[0])
        found.append(_partitioned(lambda *part: _in_one_array(vectors, *_weighted(*part)), mesh, placed)(*part))
    values, arrays = zip(*found, strict=True)
    return SplitRows(vectors, jnp.concatenate(values), arrays, mesh)


def vectors_of(params: Tree, residuals: Sequence[Float[Array, ...]]) -> RealVectors:
    """Of the parameters, in the widest of their dtypes and the residuals': float32 at least."""
    dtypes = [jnp.finfo(x.dtype).dtype for x in (*residuals, *jax.tree.leaves(params))]
    return RealVectors(params, _tree.common_dtype(*dtypes, jnp.float32))


def _weighted(residual: jax.Array, jacobian: Tree, weight: jax.Array) -> tuple[jax.Array, Tree]:
    """Both with one axis of rows, each row times its weight; of complex leaves the conjugate."""
    weight, axes = weight.reshape(residual.shape), residual.ndim

    def of_leaf(rows: jax.Array) -> jax.Array:
        factor = weight.reshape(weight.shape + (1,) * (rows.ndim - axes))
        return jnp.conj(factor * rows).reshape(weight.size, *rows.shape[axes:])

    return jnp.ravel(weight * residual), jax.tree.map(of_leaf, jacobian)


def _in_one_array(vectors: RealVectors, values: jax.Array, tree: Tree) -> tuple[jax.Array, jax.Array]:
    """The residuals, and the Jacobian as vectors."""
    # Without the barriers XLA fuses the rows into their products, which then cost twice as much, and puts them together
    # again for each of these.
    values, tree = jax.lax.optimization_barrier((values, tree))
    if not jax.tree.leaves(tree):
        return values, jnp.zeros((values.size, 0), vectors.dtype)
    return values, jax.lax.optimization_barrier(vectors.beside(tree, lead=1))


def mesh_of(tree: PyTree) -> Any:
    """The mesh on whose devices leaves are, where it splits anything and is not the caller's own matter."""
    for leaf in jax.tree.leaves(tree):
        mesh = getattr(getattr(jax.typeof(leaf), "sharding", None), "mesh", None)
        if mesh is None or mesh.empty or jax.sharding.AxisType.Manual in mesh.axis_types:
            continue
        if mesh.size > 1 or jax.sharding.AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def _partitioned(function: Callable[..., Any], mesh: Any, specs: Any) -> Callable[..., Any]:
    """`function`, partitioned by XLA also where the axes of the mesh are explicit, with results that lie as `specs`."""
    if jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return function
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return jax.sharding.auto_axes(function, out_sharding=placed)


def _scaled(array: jax.Array, scale: jax.Array | None, unit: jax.Array | None) -> jax.Array:
    """RQ^½/unit."""
    factor = None if scale is None else jnp.sqrt(scale)[None]
    if unit is not None:
        factor = (1 if factor is None else factor) / unit
    return array if factor is None else array * factor
