"""Weights that move along the depth of a network: θ(t) on a time grid of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

PyTree = Any
Matrix = tuple[tuple[float, ...], ...]
Basis = Literal["linear", "constant", "legendre"] | Matrix
# θ at a moment of one step: from the step's piece of the controls, the fraction of the step that is over, and t.
OnStep = Callable[[PyTree, jax.Array, jax.Array], PyTree]


@dataclasses.dataclass(frozen=True, eq=False)
class Controls:
    """θ(t) = Σ_j φ_j(t) θ_j: the parameters of a layer as a function of depth, on nodes that need not be equidistant.

    A pytree whose leaves are those of `theta`, so that it can be differentiated, trained by Optax and stored as it is;
    nodes and basis are static.

    >>> controls = Controls({"w": jnp.array([[0.0], [1.0], [5.0]])}, nodes=(0, 1, 3))
    >>> controls.at(2.0)["w"]
    Array([3.], dtype=float32)
    >>> controls.refine((0, 0.5, 1, 3)).theta["w"].ravel()
    Array([0. , 0.5, 1. , 5. ], dtype=float32)

    Args:
      theta: a pytree whose leaves have a leading axis of length m, one entry for each basis function.
      nodes: strictly increasing times. "linear": the m knots of θ; "constant": the m times from which θ_j holds;
        "legendre": the two ends of the interval; a matrix: the knots, one for each of its rows.
      basis: "linear": hat functions, constant outside the nodes; "constant": piecewise constant; "legendre": the first
        m Legendre polynomials on the interval; or a matrix (knots × m), array-like: θ at the knots is the matrix times
        the θ_j, and linear in between. A block of Meganet with weights of its own for midpoints has the identity on a
        grid of nodes and midpoints.

    Raises:
      TypeError: leaves that are not floating-point arrays.
      ValueError: nodes that do not increase or do not fit the leaves or the basis.

    Source: DynamicBlocks (Onken and Ruthotto) for hat functions, Meganet (Haber, Ruthotto et al.) for the matrix.
    """

    theta: PyTree
    nodes: tuple[float, ...]
    basis: Basis = "linear"

    def __post_init__(self):
        nodes = np.asarray(self.nodes, np.float64)
        if nodes.ndim != 1 or nodes.size == 0 or not np.isfinite(nodes).all() or (np.diff(nodes) <= 0).any():
            raise ValueError(f"nodes must be strictly increasing finite times, got {self.nodes!r}.")
        object.__setattr__(self, "nodes", tuple(nodes.tolist()))
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.theta):
            if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)):
                raise TypeError(f"theta{jax.tree_util.keystr(path)} must be a floating-point array, got {leaf!r}.")
        sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(self.theta)}
        if not isinstance(self.basis, str):
            matrix = np.asarray(self.basis, np.float64)
            if matrix.ndim != 2 or len(matrix) != len(nodes):
                raise ValueError(
                    f"A matrix basis needs one row for each of the {len(nodes)} nodes, got shape {matrix.shape}."
                )
            object.__setattr__(self, "basis", tuple(map(tuple, matrix.tolist())))
            expected, what = {matrix.shape[1]}, "column of the basis"
        elif self.basis == "legendre":
            if len(nodes) != 2:
                raise ValueError(f"A Legendre basis has two nodes, the ends of its interval, got {self.nodes!r}.")
            expected, what = sizes - {0}, "Legendre polynomial"
        elif self.basis in ("linear", "constant"):
            expected, what = {len(nodes)}, "node"
        else:
            raise ValueError(f"basis must be 'linear', 'constant', 'legendre' or a matrix, got {self.basis!r}.")
        if sizes != expected or len(sizes) != 1:
            wanted = f" of length {min(expected)}" if len(expected) == 1 else ""
            raise ValueError(
                f"Every leaf of theta needs a leading axis{wanted}, one entry for each {what}; got lengths "
                f"{sorted(sizes)}."
            )

    @classmethod
    def constant_in_time(cls, theta: PyTree, nodes: Sequence[float], basis: Any = "linear", size: int = 1) -> Self:
        """Controls that start as θ(t) = `theta` for all t, the usual initial value.

        >>> Controls.constant_in_time(jnp.ones(2), (0, 1), "legendre", size=3).at(0.7)
        Array([1., 1.], dtype=float32)

        Args:
          theta: a pytree without the leading axis.
          nodes: as for the class.
          basis: as for the class.
          size: m, the number of polynomials, of "legendre" alone.

        Raises:
          ValueError: a matrix whose columns do not combine to a constant.
        """
        weights = np.eye(size)[0] if isinstance(basis, str) and basis == "legendre" else np.ones(len(nodes))
        chosen: Any = basis
        if not isinstance(basis, str):
            matrix = np.asarray(basis, np.float64)
            weights = np.linalg.lstsq(matrix, np.ones(len(matrix)), rcond=None)[0]
            if not np.allclose(matrix @ weights, 1, atol=1e-9):
                raise ValueError("No combination of the basis matrix's columns is constant in time.")
        return cls(jax.tree.map(lambda x: _outer(weights, jnp.asarray(x)), theta), tuple(nodes), chosen)

    @property
    def size(self) -> int:
        """m, the number of basis functions."""
        return jax.tree.leaves(self.theta)[0].shape[0]

    @property
    def kinks(self) -> tuple[float, ...]:
        """The times at which θ is not smooth."""
        if self.basis == "legendre":
            return ()
        # Constant outside its nodes, θ has a kink at the ends too; a constant piece has none at its start or end.
        if self.basis == "constant":
            return self.nodes[1:]
        return self.nodes if len(self.nodes) > 1 else ()

    @property
    def order_across_kinks(self) -> float:
        """The highest order that a method keeps which steps over a kink."""
        if not isinstance(self.basis, str):
            return 2
        return {"legendre": math.inf, "constant": 1, "linear": 2}[self.basis]

    def at(self, t: Any) -> PyTree:
        """θ(t), for a scalar or an array of times: leaves of shape `t.shape + leaf.shape[1:]`."""
        t = t if isinstance(t, jax.Array) else np.asarray(t, np.float64)
        if self.basis == "legendre":
            start, end = self.nodes
            weights = _legendre((2 * t - (start + end)) / (end - start), self.size)
            return jax.tree.map(lambda x: sum(_outer(w, x[j]) for j, w in enumerate(weights)), self.theta)
        if self.basis == "constant":
            i = _interval(self.nodes[1:], t)
            return jax.tree.map(lambda x: x[i], self.theta)
        if len(self.nodes) == 1:
            return jax.tree.map(lambda x: x[t.astype(np.int32) * 0], self._knots)
        i = _interval(self.nodes[1:-1], t)
        xp = jnp if isinstance(t, jax.Array) else np
        nodes = xp.asarray(self.nodes, t.dtype)
        w = xp.clip((t - nodes[i]) / (nodes[i + 1] - nodes[i]), 0, 1)
        return jax.tree.map(lambda x: _interpolated(x[i], x[i + 1], w), self._knots)

    def along(self, grid: Any) -> tuple[PyTree, OnStep]:
        """θ step by step: pieces with a leading axis, one for each step of `grid`, and how to read one.

        Where no kink lies inside a step the two ends say everything, and the steps share their work.
        """
        if isinstance(grid, jax.core.Tracer) or self.basis == "legendre" or self.kinks_inside(grid):
            return (), lambda piece, fraction, t: self.at(t)
        if len(self.nodes) == 1:  # weights that do not move: one copy for all steps
            return (), lambda piece, fraction, t: self.at(np.asarray(self.nodes[0]))
        grid = np.asarray(grid, np.float64)
        if self.basis == "constant":
            # At its end a step still has the value of its own piece.
            return self.at((grid[1:] + grid[:-1]) / 2), lambda piece, fraction, t: piece
        knots = self._knots if np.array_equal(grid, self.nodes) else self.at(grid)
        ends = jax.tree.map(lambda x: x[:-1], knots), jax.tree.map(lambda x: x[1:], knots)

        def between(piece: PyTree, fraction: jax.Array, t: Any) -> PyTree:
            return jax.tree.map(
                lambda left, right: _of_step(left, right, fraction.astype(jnp.finfo(left.dtype).dtype)), *piece
            )

        return ends, between

    def kinks_inside(self, grid: Any) -> tuple[float, ...]:
        """The kinks that lie inside a step of `grid`, which is concrete and monotone."""
        grid = np.sort(np.asarray(grid, np.float64))
        tolerance = 1e-9 * max(1.0, float(np.abs(grid).max()))
        inside = [t for t in self.kinks if grid[0] + tolerance < t < grid[-1] - tolerance]
        return tuple(t for t in inside if np.abs(grid - t).min() > tolerance)

    def refine(self, nodes: Sequence[float] | int, power: int = 0) -> Self:
        """The same function of time on more nodes.

        Args:
          nodes: the new nodes, the old ones among them; of "legendre", the new number of polynomials.
          power: 0 for θ itself. The gradient of a loss with respect to θ_j is an integral over φ_j, so it shrinks with
            the support: 1 refines a gradient (or a momentum), 2 its square (Adam's `nu`), each as a density in time.
            `refine_state` does so for a whole optimizer state.

        Raises:
          ValueError: nodes without some of the old ones, or beyond their ends for "constant" ones: another function.
        """
        if self.basis == "legendre":
            if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < self.size:
                raise ValueError(f"nodes must be a number of polynomials of at least {self.size}, got {nodes!r}.")
            more = nodes - self.size  # a polynomial's gradient does not depend on how many there are
            padded = jax.tree.map(lambda x: jnp.pad(x, [(0, more)] + [(0, 0)] * (x.ndim - 1)), self.theta)
            return dataclasses.replace(self, theta=padded)
        if isinstance(nodes, int):
            raise ValueError(f"nodes must be the new times, got {nodes!r}.")
        new = tuple(np.asarray(nodes, np.float64).tolist())
        missing = sorted(set(self.nodes) - set(new))
        if missing:
            raise ValueError(f"nodes must keep the old nodes, or θ would be another function of time; {missing} miss.")
        if not isinstance(self.basis, str):  # more rows; the θ_j stay
            rows = dataclasses.replace(self, theta=jnp.asarray(self.basis), basis="linear").at(np.asarray(new))
            return dataclasses.replace(self, nodes=new, basis=tuple(map(tuple, np.asarray(rows, np.float64).tolist())))
        if self.basis == "constant" and new[0] < self.nodes[0]:
            raise ValueError(f"Piecewise constant controls begin at {self.nodes[0]}; nodes begin earlier, at {new[0]}.")
        old_support, new_support = (_supports(n, self.basis) ** power for n in (self.nodes, new))
        density = dataclasses.replace(self, theta=jax.tree.map(lambda x: _rows(1 / old_support, x), self.theta))
        finer = density.at(np.asarray(new))
        return dataclasses.replace(self, theta=jax.tree.map(lambda x: _rows(new_support, x), finer), nodes=new)

    def total_variation(self, p: Literal[1, 2] = 1) -> jax.Array:
        """∫ ‖θ'(t)‖_p^p dt over all leaves: a regulariser for weights that are to be smooth in time.

        For "linear" Σ_k h_k ‖(θ_{k+1} − θ_k)/h_k‖_p^p, with p = 1 the total variation, whatever the nodes. A piecewise
        constant θ has its jumps for p = 1 and no square-integrable derivative; for Legendre polynomials p = 2 is exact
        and p = 1 a quadrature on 4m points.

        Raises:
          ValueError: another p, or p = 2 for "constant".
        """
        if p not in (1, 2):
            raise ValueError(f"p must be 1 or 2, got {p!r}.")
        if self.basis == "legendre":
            return self._legendre_variation(p)
        if self.basis == "constant" and p == 2:
            raise ValueError("Piecewise constant controls have no square-integrable derivative: p must be 1.")
        h = np.diff(self.nodes)
        knots = self.theta if self.basis == "constant" else self._knots
        return _sum(jax.tree.map(lambda x: jnp.sum(_rows(h ** (1 - p), jnp.abs(jnp.diff(x, axis=0)) ** p)), knots))

    def _legendre_variation(self, p: int) -> jax.Array:
        points, quadrature = np.polynomial.legendre.leggauss(4 * self.size)
        slopes = np.stack([np.polynomial.legendre.Legendre.basis(j).deriv()(points) for j in range(self.size)], axis=1)
        length = self.nodes[1] - self.nodes[0]
        slopes, quadrature = slopes * 2 / length, quadrature * length / 2

        def of_leaf(x: jax.Array) -> jax.Array:
            slope = jnp.tensordot(jnp.asarray(slopes, x.dtype), x, 1, precision="highest")
            return jnp.sum(_rows(quadrature, jnp.abs(slope) ** p))

        return _sum(jax.tree.map(of_leaf, self.theta))

    @property
    def _knots(self) -> PyTree:
        """θ at the nodes."""
        if isinstance(self.basis, str):
            return self.theta
        matrix = np.asarray(self.basis)
        if matrix.shape[0] == matrix.shape[1] and np.array_equal(matrix, np.eye(len(matrix))):
            return self.theta
        return jax.tree.map(
            lambda x: jnp.tensordot(jnp.asarray(matrix, x.dtype), x, 1, precision="highest"), self.theta
        )


def refine(
    tree: PyTree, nodes: Sequence[float] | int, power: int = 0, *, old: Sequence[float] = (), basis: Any = "linear"
) -> PyTree:
    """`tree` with every `Controls` in it refined; see `Controls.refine`.

    Args:
      tree: parameters or a part of them.
      nodes: the new nodes.
      power: 0 for parameters, 1 for gradients, 2 for their squares.
      old: the nodes of `RKBlock` modules, whose stacked parameters lie in plain trees under the key "controls".
      basis: of those modules.
    """
    return _refined(tree, nodes, lambda path: power, old, basis)


# How what an optimizer keeps under a field of this name goes with the gradient: as it is, or as its square. The last
# four are rk_optax's: scales of a preconditioner, a direction, and Hutchinson's mean of the Hessian's diagonal.
_POWERS = {
    **dict.fromkeys(("mu", "trace", "ema", "previous_gradient", "acc_grads"), 1),
    **dict.fromkeys(("nu", "nu_max", "sum_of_squares", "e_g"), 2),
    **{"root_of_sum": 1, "root_of_moment": 1, "eigenvector": 1, "mean": 2},
}


def refine_state(
    opt_state: PyTree,
    nodes: Sequence[float] | int,
    *,
    old: Sequence[float] = (),
    basis: Any = "linear",
    powers: Mapping[str, int] | None = None,
) -> PyTree:
    """An optimizer state for refined controls: momenta as gradients, second moments as their squares.

    >>> import optax
    >>> tx, params = optax.adam(1e-3), {"block": Controls(jnp.zeros((2, 3)), (0, 1))}
    >>> state = refine_state(tx.init(params), (0, 0.5, 1))
    >>> params = refine(params, (0, 0.5, 1))
    >>> updates, state = tx.update(params, state, params)

    Args:
      opt_state: of an Optax optimizer.
      nodes: the new nodes.
      old: as for `refine`.
      basis: as for `refine`.
      powers: by the name of a field of the state, the power of the gradient that it holds, where it is not `mu`,
        `trace`, `nu` or the like, or is not what that name says: {"nu": 1} for `optax.adamax`, whose `nu` is a largest
        absolute value, {"trace": 0} where a trace follows a normalisation.

    Raises:
      ValueError: a field that is not known, such as the memory of `optax.lbfgs`, whose old gradients are of other
        parameters.
    """
    known = _POWERS | dict(powers or {})

    def power(path: tuple[Any, ...]) -> int:
        # Fields alone, the outermost first: a parameter may be called "nu" too.
        fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        found = [known[name] for name in fields if name in known]
        if not found:
            raise ValueError(
                f"refine_state does not know how {jax.tree_util.keystr(path)} goes with the gradient: start the "
                "optimizer anew with tx.init, or name the field in powers, with 0 for a quantity like the parameters, "
                "1 like their gradient, 2 like its square."
            )
        return found[0]

    return _refined(opt_state, nodes, power, old, basis)


def _refined(
    tree: PyTree,
    nodes: Sequence[float] | int,
    power: Callable[[tuple[Any, ...]], int],
    old: Sequence[float],
    basis: Any,
) -> PyTree:
    def of(path: tuple[Any, ...], x: Any) -> Any:
        if isinstance(x, Controls):
            return x.refine(nodes, power(path))
        if old and any(getattr(key, "name", getattr(key, "key", None)) == "controls" for key in path):
            return Controls(x, tuple(old), basis).refine(nodes, power(path)).theta
        return x

    return jax.tree_util.tree_map_with_path(of, tree, is_leaf=lambda x: isinstance(x, Controls))


def _flatten(controls: Controls) -> tuple[Any, Any]:
    return [(jax.tree_util.GetAttrKey("theta"), controls.theta)], (controls.nodes, controls.basis)


def _unflatten(static: Any, children: Any) -> Controls:
    controls = object.__new__(Controls)  # unchecked: transformations put placeholders and batches of leaves there
    for name, value in zip(("theta", "nodes", "basis"), (*children, *static), strict=True):
        object.__setattr__(controls, name, value)
    return controls


jax.tree_util.register_pytree_with_keys(Controls, _flatten, _unflatten)


def _interval(inner: Sequence[float], t: Any) -> Any:
    """The number of `inner` nodes at or before t."""
    if isinstance(t, jax.Array):
        return (t[..., None] >= jnp.asarray(inner, t.dtype)).sum(-1)
    return (t[..., None] >= np.asarray(inner)).sum(-1)


def _interpolated(left: jax.Array, right: jax.Array, w: Any) -> jax.Array:
    """(1 − w) left + w right, w of the leading axes: exact at both ends."""
    w = jnp.asarray(w, jnp.finfo(left.dtype).dtype)
    w = w.reshape(w.shape + (1,) * (left.ndim - w.ndim))
    return (1 - w) * left + w * right


@jax.custom_jvp
def _of_step(left: jax.Array, right: jax.Array, w: jax.Array) -> jax.Array:
    """`_interpolated` for a scalar w, without arithmetic at both ends.

    Where steps are compiled side by side, w is a constant there and XLA drops the choice; so neighbouring steps share
    the node between them, as hand-written code does.
    """
    return _chosen(left, right, w)


@_of_step.defjvp
def _of_step_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    (left, right, w), (d_left, d_right, d_w) = primals, tangents
    # The choice alone would say that θ does not move with w at the ends.
    return _chosen(left, right, w), _chosen(d_left, d_right, w) + d_w * (right - left)


def _chosen(left: jax.Array, right: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.where(w == 0, left, jnp.where(w == 1, right, _interpolated(left, right, w)))


def _rows(weights: np.ndarray, x: jax.Array) -> jax.Array:
    """`x` with its i-th entry along the first axis times weights[i]."""
    return jnp.asarray(weights, jnp.finfo(x.dtype).dtype).reshape((-1,) + (1,) * (x.ndim - 1)) * x


def _outer(weights: Any, x: jax.Array) -> jax.Array:
    weights = jnp.asarray(weights, jnp.finfo(x.dtype).dtype)
    return weights.reshape(weights.shape + (1,) * x.ndim) * x


def _supports(nodes: Sequence[float], basis: Any) -> np.ndarray:
    """∫ φ_j dt between the first node and the last; the last constant piece counts as long as the one before it."""
    if len(nodes) == 1:
        return np.ones(1)
    h = np.diff(nodes)
    if basis == "constant":
        return np.append(h, h[-1])
    return np.append(h, 0) / 2 + np.append(0, h) / 2


def _legendre(x: Any, size: int) -> list[Any]:
    values = [x * 0 + 1, x]
    for n in range(1, size - 1):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return values[:size]


def _sum(tree: PyTree) -> jax.Array:
    return sum(jax.tree.leaves(tree), start=jnp.zeros([]))
