"""A full data set in pieces: losses, gradients and products as exact means over micro-batches.

What a step keeps in memory is that of one micro-batch, however many rows there are.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax import _checks, _tree
from rk_optax.field import Linear, VectorField
from rk_optax.objective import Objective
from rk_optax.parameter_view import ParameterView

PyTree = Any


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class HostRows:
    """Rows that stay in host memory, or in a file, and come to the device a micro-batch at a time.

    A data argument of `rk_optax.gradient_flow` or of a function of `rk_optax.spectrum`, with `batches`. Build it once
    and use it again: what is compiled holds it, and another one compiles anew. The rows must not change.

    >>> import jax.numpy as jnp, numpy as np, rk_optax
    >>> x = rk_optax.HostRows(np.linspace(0.5, 1.5, 1001))  # or np.load("x.npy", mmap_mode="r")
    >>> def loss_fn(w, x): return 0.5 * jnp.mean(x) * w**2
    >>> flow = rk_optax.gradient_flow(loss_fn, jnp.array(1.0), [0.0, 1.0], data={"x": x}, batches=300)
    >>> print(f"{float(flow.params):.4f}")  # exp(-1): the last 101 rows count as many as they are
    0.3679

    Args:
      rows: what has a `shape`, a `dtype` and slices of its first axis, `rows[i:j]`: a NumPy array, a `np.memmap`, a
        data set of an HDF5 file. Its dtype on the device is that which JAX gives such an array.

    Raises:
      TypeError: rows without a shape, a dtype or a first axis.

    Cost: every evaluation of the field reads all rows, and waits for them. For one process and one device.
    """

    rows: Any

    def __post_init__(self):
        if not (hasattr(self.rows, "dtype") and getattr(self.rows, "shape", ())):
            raise TypeError(
                "rows must have a shape with a first axis, a dtype and slices rows[i:j], as a NumPy array has; got "
                f"{type(self.rows).__name__}."
            )

    def piece(self, start: Any, length: int) -> jax.Array:
        """Rows `start` to `start + length`, on the device; `start` may be traced."""
        dtype = jax.dtypes.canonicalize_dtype(self.rows.dtype)

        def read(start: Any) -> np.ndarray:
            first = int(start)
            return np.ascontiguousarray(self.rows[first : first + length], dtype)

        shape = jax.ShapeDtypeStruct((length, *self.rows.shape[1:]), dtype)
        return jax.pure_callback(read, shape, start, vmap_method="sequential")


def _on_host(x: Any) -> bool:
    return isinstance(x, HostRows)


@dataclasses.dataclass(frozen=True)
class MicroBatches:
    """How data are cut into micro-batches.

    Attributes:
      size: rows of a micro-batch; the last one may have fewer. None: everything at once.
      names: the data arguments whose first axis runs over the rows; None: all of them.
    """

    size: int | None = None
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, batches: int | None, batch_argnames: Sequence[str] | str | None) -> MicroBatches:
        """From the arguments of a public function.

        Raises:
          ValueError: a size that is no positive integer, or names without a size.
        """
        if batches is None:
            if batch_argnames is not None:
                raise ValueError("batch_argnames does nothing without batches, the number of rows of a micro-batch.")
            return cls()
        names = (batch_argnames,) if isinstance(batch_argnames, str) else batch_argnames
        return cls(_checks.count(batches, "batches"), None if names is None else tuple(names))

    def rows(self, data: Mapping[str, Any]) -> int | None:
        """The number of rows, or None where nothing is cut.

        Raises:
          ValueError: no rows, arrays of different lengths, a name that is not in data.
        """
        cut = self._cut(data)
        lengths = {name: {_length(x) for x in jax.tree.leaves(cut[name], is_leaf=_on_host)} for name in cut}
        for name, value in data.items():
            if name not in cut and any(map(_on_host, jax.tree.leaves(value, is_leaf=_on_host))):
                raise ValueError(
                    f"The HostRows of data[{name!r}] come to the device a micro-batch at a time: say how many rows "
                    "it has, batches=1000, and where you name batch_argnames, name them all."
                )
        if self.size is not None and not any(lengths.values()):
            raise ValueError(
                f"batches={self.size} cuts data into micro-batches, and there are none: pass the loss's data by name, "
                "data={'x': x, 'y': y}."
            )
        found = set().union(*lengths.values())
        if None in found or len(found) > 1:
            raise ValueError(
                "The data arguments that batches cuts must have one number of rows, their first axis; got "
                f"{ {name: sorted(map(str, n)) for name, n in lengths.items()} }. Name those to cut in batch_argnames."
            )
        (count,) = found or {None}
        if count == 0:
            raise ValueError("The data set is empty: its arrays have no rows, so there is no mean to take.")
        return count

    def mean(self, function: Callable[[dict[str, Any]], PyTree], data: Mapping[str, Any]) -> PyTree:
        """The mean over the rows of a function that is itself a mean over the rows it is given, such as a loss.

        Exact whatever the last micro-batch's size. Only forward-mode derivatives of it are flat in memory.
        """
        count = self.rows(data)
        if self.size is None or count is None:
            return function(dict(data))
        size, cut = min(self.size, count), self._cut(data)
        whole = count // size

        def rows(x: Any, start: Any, length: int) -> jax.Array:
            return x.piece(start, length) if _on_host(x) else jax.lax.dynamic_slice_in_dim(x, start, length)

        def part(start: Any, length: int) -> PyTree:
            piece = jax.tree.map(lambda x: rows(x, start, length), cut, is_leaf=_on_host)
            return _tree.scale(length / count, function({**data, **piece}))

        def add(total: PyTree, index: jax.Array) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, part(index * size, size)), None

        shape = jax.eval_shape(lambda: part(0, size))
        total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape)
        total, _ = jax.lax.scan(add, total, jnp.arange(whole))
        rest = count - whole * size
        return jax.tree.map(jnp.add, total, part(whole * size, rest)) if rest else total

    def _cut(self, data: Mapping[str, Any]) -> dict[str, Any]:
        if self.size is None:
            return {}
        names = tuple(data) if self.names is None else self.names
        for name in names:
            if name not in data:
                raise ValueError(f"batch_argnames has {name!r}, which is not in data: {sorted(data)!r}.")
        arrays = functools.partial(jax.tree.map, lambda x: x if _on_host(x) else jnp.asarray(x), is_leaf=_on_host)
        return {name: arrays(data[name]) for name in names}


def _length(x: Any) -> int | None:
    shape = x.rows.shape if _on_host(x) else jnp.shape(x)
    return shape[0] if shape else None


@dataclasses.dataclass(frozen=True)
class _StreamedField(VectorField):
    """A field on a data set in pieces: its products are not linearised, which would keep every micro-batch."""

    curve: Callable[[PyTree, PyTree], PyTree] | None = None

    def jacobian(self, params: PyTree) -> Linear:
        """V ↦ ∇²L v at `params`; each call costs a product."""
        gradient = self.gradient
        if gradient is None:
            return super().jacobian(params)
        return lambda v: jax.jvp(gradient, (params,), (v,))[1]

    def gauss_newton(self, params: PyTree) -> Linear:
        """V ↦ the generalised Gauss–Newton matrix times v at `params`; each call costs a product."""
        curve = self.curve
        return super().gauss_newton(params) if curve is None else lambda v: curve(params, v)


def bind(objective: Objective, data: Mapping[str, Any], view: ParameterView, batches: MicroBatches) -> VectorField:
    """The field on all of `data`, each evaluation a mean over micro-batches where `batches` cuts them."""
    count = batches.rows(data)
    whole = objective.bind(data, view)
    host = any(map(_on_host, jax.tree.leaves(dict(data), is_leaf=_on_host)))
    if count is None or batches.size is None or (count <= batches.size and not host):
        return whole

    def over(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        def mean(*args: Any) -> PyTree:
            return batches.mean(lambda piece: function(objective.bind(piece, view), *args), data)

        return mean

    gradient = None if whole.gradient is None else over(lambda f, theta: f.gradient(theta))
    return _StreamedField(
        evaluate=over(lambda f, theta, stage: f(theta, stage)),
        objective=None if whole.objective is None else over(lambda f, theta: f.loss(theta)),
        smooth_field=gradient,
        gradient=gradient,
        rounding=whole.rounding,
        symmetric=whole.symmetric,
        curve=None if whole.structure is None else over(lambda f, theta, v: f.gauss_newton(theta)(v)),
    )
