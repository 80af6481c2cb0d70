"""Losses that show a solver their structure: a loss of a model's outputs, and least squares.

Both are called like any loss. What a solver gets from them beyond that is the generalised Gauss–Newton matrix, and of
least squares the rows of the residuals' Jacobian.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rk_optax import _checks, _tree
from rk_optax._arguments import DataFunction, read_data_function
from rk_optax.rows import BlockedRows, Blocks, Rows, mesh_of, rows_of, vectors_of

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from rk_optax._tree import Tree

PyTree = Any


class ModelLoss:
    """A loss `output_loss(model_fn(params))`, whose generalised Gauss–Newton matrix is Jᵀ(∇²output_loss)J.

    That matrix has no negative eigenvalue where `output_loss` is convex (cross-entropy of logits, squared error).

    >>> import jax, jax.numpy as jnp, optax, rk_optax
    >>> def model(params, x): return x @ params
    >>> def cross_entropy(logits, y): return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    >>> loss_fn = rk_optax.ModelLoss(model, cross_entropy)
    >>> print(f"{loss_fn(jnp.zeros((3, 2)), x=jnp.ones((4, 3)), y=jnp.zeros(4, int)):.4f}")
    0.6931

    Args:
      model_fn: `model_fn(params, *data) -> outputs`, a pytree of arrays.
      output_loss: `output_loss(outputs, *data) -> scalar`.

    Raises:
      TypeError, ValueError: a function whose arguments cannot be read by name, or is not callable.
    """

    def __init__(self, model_fn: Callable[..., PyTree], output_loss: Callable[..., Float[Array, ""]]):
        self._model = read_data_function(model_fn, "model_fn")
        self._output_loss = read_data_function(output_loss, "output_loss")
        self.__signature__ = _joint_signature([self._model, self._output_loss])

    def outputs(self, params: PyTree, data: Mapping[str, Any]) -> PyTree:
        """The model's outputs."""
        return self._model(params, _pick(self._model, data))

    def of_outputs(self, outputs: PyTree, data: Mapping[str, Any]) -> Float[Array, ""]:
        """The loss as a function of the outputs."""
        return self._output_loss(outputs, _pick(self._output_loss, data))

    def __call__(self, params: PyTree, *args: Any, **data: Any) -> Float[Array, ""]:
        """The loss, a scalar."""
        try:
            bound = self.__signature__.bind(params, *args, **data).arguments
        except TypeError as error:
            names = list(self.__signature__.parameters)[1:]
            example = ", ".join(f"{name}=..." for name in names)
            raise TypeError(f"{error}; pass data by name: loss_fn(params{', ' if names else ''}{example}).") from None
        del bound["params"]
        return self.of_outputs(self.outputs(params, bound), bound)


class LeastSquares(ModelLoss):
    """The loss ½ Σ_k w_k ‖r_k‖² of residuals r_k(params, data).

    Written for one point each and mapped over the points by name, residuals cost little more than a gradient for all
    rows of their Jacobian together. A residual function of the whole batch costs a gradient *per row*.

    >>> import jax.numpy as jnp, rk_optax
    >>> def interior(params, x): return params["a"] * x - jnp.sin(x)  # at one point
    >>> def boundary(params): return params["a"] - 1.0
    >>> loss_fn = rk_optax.LeastSquares(
    ...     {"interior": interior, "boundary": boundary}, weights={"interior": 1.0, "boundary": 10.0},
    ...     pointwise=["x"], reduction="mean")
    >>> print(f"{loss_fn({'a': jnp.array(0.9)}, x=jnp.array([0.1, 0.2])):.6f}")
    0.050111

    Args:
      residual_fn: `residual_fn(params, *data) -> residuals`, a pytree of real arrays; or a dict of such functions.
      weights: w_k ≥ 0, a number for all residuals, or a tree that is a prefix of the residuals (of a dict of functions,
        a dict); None for 1. An array in the place of a number weighs each residual by itself: of the shape of the
        residuals, or of their first axis alone, the points.
      pointwise: names of the data arguments whose first axis runs over points; each function is then written for one
        point of those it takes, and mapped. A function that takes none of them is called once. Where functions differ,
        a dict from the name of a function to its names: `{"equation": ["x"]}` leaves a function `mean` that sees all of
        x at once, for a mean or an integral over the points.
      reduction: "sum", or "mean" for ½ Σ_k w_k mean(r_k²), which does not change its scale with the number of points.
      points_at_once: of how many points the rows are formed at a time, static, for a Jacobian that does not fit into
        memory: it is then formed again for every product (three or more a step), for the N×N matrix as often as there
        are blocks, and nothing larger than a block of it is held, except under `path_control` in float32. None: all.

    Raises:
      TypeError, ValueError: arguments that cannot be read by name, weights that are negative, names in `pointwise`
        that no function takes; when called, a residual function that returns nothing.
    """

    def __init__(
        self,
        residual_fn: Callable[..., PyTree] | Mapping[str, Callable[..., PyTree]],
        *,
        weights: PyTree = None,
        pointwise: Sequence[str] | str | Mapping[str, Sequence[str] | str] = (),
        reduction: Literal["sum", "mean"] = "sum",
        points_at_once: int | None = None,
    ):
        self._single = not isinstance(residual_fn, Mapping)
        functions: dict[str, Callable[..., PyTree]] = {}
        functions.update(residual_fn if isinstance(residual_fn, Mapping) else {"residual_fn": residual_fn})
        if not functions:
            raise ValueError("residual_fn is an empty dict: name at least one residual function.")
        self._terms = {name: read_data_function(function, name) for name, function in functions.items()}
        self._pointwise = self._read_pointwise(pointwise)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}.")
        self._mean = reduction == "mean"
        self._at_once = None if points_at_once is None else _checks.count(points_at_once, "points_at_once")
        if points_at_once is not None and not self.has_points:
            raise ValueError("points_at_once is for functions of single points: name their arguments in pointwise.")
        self._weights = jax.tree.map(_read_weight, weights)
        if isinstance(weights, Mapping) and not self._single and set(weights) != set(self._terms):
            raise ValueError(
                f"weights has {sorted(weights)!r}, and the residual functions are {sorted(self._terms)!r}."
            )
        self.__signature__ = _joint_signature(list(self._terms.values()))

    def _read_pointwise(self, pointwise: Any) -> dict[str, tuple[str, ...]]:
        """The names that each function is mapped over."""
        if not isinstance(pointwise, Mapping):
            names = (pointwise,) if isinstance(pointwise, str) else tuple(pointwise)
            for name in names:
                if not any(name in (*term.required, *term.optional) for term in self._terms.values()):
                    raise ValueError(f"pointwise has {name!r}, which no residual function takes.")
            return dict.fromkeys(self._terms, names)
        if self._single:
            raise ValueError("pointwise is a dict, which is for a dict of residual functions: pass the names alone.")
        read: dict[str, tuple[str, ...]] = dict.fromkeys(self._terms, ())
        for function, names in pointwise.items():
            if function not in self._terms:
                raise ValueError(f"pointwise has {function!r}; the residual functions are {sorted(self._terms)!r}.")
            read[function] = (names,) if isinstance(names, str) else tuple(names)
            term = self._terms[function]
            for name in set(read[function]) - {*term.required, *term.optional}:
                raise ValueError(f"pointwise[{function!r}] has {name!r}, which that function does not take.")
        return read

    def outputs(self, params: PyTree, data: Mapping[str, Any]) -> PyTree:
        """The residuals as a tree, weights folded in."""
        return self._weighted(self._residuals(params, data))

    def of_outputs(self, outputs: PyTree, data: Mapping[str, Any]) -> Float[Array, ""]:
        """Half the sum of squares."""
        del data
        return 0.5 * _tree.inner(outputs, outputs)

    def rows(self, params: Tree, data: Mapping[str, Any], whole: Callable[[Tree], PyTree] = lambda p: p) -> Rows:
        """All residuals and the rows of their Jacobian with respect to `params`, of which `whole` makes the model's."""
        weights = self._row_weights(whole(params), data)
        terms = []
        for name, term in self._terms.items():
            mapped, rest = self._split(term, data)

            def flat(
                p: Tree, points: Mapping[str, Any], term: DataFunction = term, rest: Any = rest
            ) -> Float[Array, " k"]:
                leaves = _tree.replicated(jax.tree.leaves(term(whole(p), {**rest, **points})))
                return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

            of_point = functools.partial(_rows_of, flat, params)
            terms.append((jax.vmap(of_point) if mapped else of_point, mapped, weights[name]))
        if self._at_once is None:
            residuals, jacobians = zip(*(rows_at(points) for rows_at, points, _ in terms), strict=True)
            return rows_of(params, residuals, jacobians, [weight for *_, weight in terms])
        if mesh_of([points for _, points, _ in terms]) is not None:
            raise ValueError("points_at_once is for one device: leave it out where a mesh splits the points.")
        residual = self.residual(whole(params), data)
        blocks = tuple(
            Blocks.of(rows_at, points, weight, self._at_once if points else None)
            for rows_at, points, weight in terms
            if weight.size
        )
        return BlockedRows(vectors_of(params, [residual]), residual, blocks)

    def residual(self, params: PyTree, data: Mapping[str, Any]) -> Float[Array, " n"]:
        """The residuals alone, flat, weights folded in, in the order of `rows`; shape (N,)."""
        trees = self.outputs(params, data)
        trees = {"residual_fn": trees} if self._single else trees
        return jnp.concatenate([self._flat(trees[name], term, data) for name, term in self._terms.items()])

    def count_rows(self, params: PyTree, data: Mapping[str, Any]) -> int:
        """N, the number of residuals, without computing any."""
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: self.outputs(params, data))))

    @property
    def has_points(self) -> bool:
        """Whether a residual function is mapped over points."""
        return any(self._pointwise.values())

    def on_fewer_points(self, data: Mapping[str, Any], divisor: int) -> tuple[LeastSquares, dict[str, Any]] | None:
        """The loss on one of `divisor` points, which estimates the one on all, and its data; None without points.

        The points are the first of a fixed random order, so that those of a larger divisor are among those of a
        smaller one, and points on a grid are not cut into lines. A function that takes an argument whole, over which
        another one is mapped, keeps all of it.
        """
        parts: dict[str, tuple[int, np.ndarray]] = {}
        thinned: dict[str, Any] = {}
        for name, term in self._terms.items():
            mapped, _ = self._split(term, data)
            if mapped:
                count = len(jax.tree.leaves(mapped)[0])
                chosen = np.random.default_rng(0).permutation(count)[: -(-count // divisor)]
                parts[name] = count, chosen
                thinned.update(jax.tree.map(lambda points, c=chosen: _tree.replicated(points)[c], mapped))
        if not any(len(chosen) < count for count, chosen in parts.values()):
            return None
        fewer = copy.copy(self)
        fewer._terms = {name: self._keeping_whole(term, data, thinned) for name, term in self._terms.items()}
        data = {**data, **thinned}
        if self._mean and self._weights is None:
            return fewer, data
        weights = dict.fromkeys(self._terms, 1.0 if self._weights is None else self._weights)
        if isinstance(self._weights, Mapping) and not self._single:
            weights = dict(self._weights)
        for name, (count, chosen) in parts.items():
            more = 1.0 if self._mean or not len(chosen) else count / len(chosen)
            weights[name] = jax.tree.map(
                lambda w, c=chosen, m=more: m * (_tree.replicated(w)[c] if np.ndim(w) else w), weights[name]
            )
        fewer._weights = weights["residual_fn"] if self._single else weights
        return fewer, data

    def _keeping_whole(self, term: DataFunction, data: Mapping[str, Any], thinned: Mapping[str, Any]) -> DataFunction:
        """`term` with those of the `thinned` arguments that it takes whole bound to what they are in `data`."""
        mapped = self._pointwise[term.role]
        kept = {name: value for name, value in _pick(term, data).items() if name in thinned and name not in mapped}
        if not kept:
            return term

        def bound(params: PyTree, **rest: Any) -> PyTree:
            return term(params, {**rest, **kept})

        required, optional = (tuple(n for n in names if n not in kept) for names in (term.required, term.optional))
        return dataclasses.replace(term, function=bound, required=required, optional=optional)

    def _split(self, term: DataFunction, data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What of a term's data is mapped over points, and what is not."""
        data = _pick(term, data)
        mapped = {name: data.pop(name) for name in self._pointwise[term.role] if name in data}
        return mapped, data

    def _residuals(self, params: PyTree, data: Mapping[str, Any]) -> dict[str, PyTree]:
        """The residuals of every function, mapped over its points, without weights."""
        trees = {}
        for name, term in self._terms.items():
            mapped, rest = self._split(term, data)

            def at(points: Mapping[str, Any], term: DataFunction = term, rest: Any = rest) -> PyTree:
                return term(params, {**rest, **points})

            trees[name] = jax.vmap(at)(mapped) if mapped else at({})
            if not jax.tree.leaves(trees[name]):
                raise TypeError(f"The residual function {name!r} returned no residuals: does it lack a `return`?")
        if not any(jnp.size(leaf) for leaf in jax.tree.leaves(trees)):
            names = ", ".join(map(repr, trees))
            raise ValueError(
                f"LeastSquares has no residual on these data (N = 0): {names} got no points. A term without points "
                "contributes nothing, but one at least must have some."
            )
        return trees

    def _weighted(self, trees: PyTree) -> PyTree:
        """Residuals times √w, and over √n for a mean."""
        for leaf in jax.tree.leaves(trees):
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise TypeError(
                    f"Residuals must be real floating-point arrays, got {jnp.result_type(leaf)}; return real and "
                    "imaginary parts as two residuals."
                )

        def scaled(weight: Any, leaf: Any) -> Float[Array, ...]:
            leaf = jnp.asarray(leaf)
            weight = jnp.asarray(weight, leaf.dtype)
            if weight.ndim and weight.shape != leaf.shape:
                if weight.shape != leaf.shape[:1]:
                    raise ValueError(f"an array of weights of shape {weight.shape} for residuals of shape {leaf.shape}")
                weight = weight.reshape(-1, *(1,) * (leaf.ndim - 1))
            return jnp.sqrt(weight / max(leaf.size, 1) if self._mean else weight) * leaf

        if self._single:
            trees = trees["residual_fn"]
        if self._weights is None:
            return jax.tree.map(lambda leaf: scaled(1.0, leaf), trees)
        try:
            return jax.tree.map(lambda w, sub: jax.tree.map(lambda leaf: scaled(w, leaf), sub), self._weights, trees)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"weights must be a number or a prefix of the residuals; they do not fit: {error}"
            ) from None

    def _row_weights(self, params: PyTree, data: Mapping[str, Any]) -> dict[str, Float[Array, " n"]]:
        """The factor of every residual, flat by function and in the order of its rows."""
        shapes = jax.eval_shape(lambda: self._residuals(params, data))
        ones = self._weighted(jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes))
        ones = {"residual_fn": ones} if self._single else ones
        return {name: self._flat(ones[name], term, data) for name, term in self._terms.items()}

    def _flat(self, tree: PyTree, term: DataFunction, data: Mapping[str, Any]) -> Float[Array, " n"]:
        """One function's residuals in the order of its rows: over points first, then over those of a point."""
        leaves = _tree.replicated(jax.tree.leaves(tree))  # leaves split in different ways cannot be put together
        if self._split(term, data)[0]:
            return jnp.concatenate(
                [leaf.reshape(len(leaf), math.prod(leaf.shape[1:])) for leaf in leaves], axis=1
            ).ravel()
        return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


def _read_weight(weight: Any) -> Any:
    if np.ndim(weight) == 0:
        return _checks.number(weight, "weights", "not negative")
    if not isinstance(weight, jax.core.Tracer) and not (np.isfinite(weight) & (np.asarray(weight) >= 0)).all():
        raise ValueError("weights must be finite and not negative, in every entry of an array.")
    return weight


def _rows_of(flat: Callable[..., Float[Array, " k"]], params: Tree, points: Any) -> tuple[Float[Array, " k"], Tree]:
    """The residuals at one point, and for each a tree like params: the leaves of the second have an axis k in front."""
    residual, transpose = jax.vjp(lambda p: flat(p, points), params)
    units = jnp.eye(residual.size, dtype=residual.dtype)
    try:
        return residual, jax.vmap(lambda unit: transpose(unit)[0])(units)
    except ValueError as error:  # no public attribute says on all versions that a value varies over devices
        if "VJP function" not in str(error):
            raise
        raise ValueError(
            "The rows of a Jacobian cannot be formed under jax.shard_map, where each device has points, or parameters, "
            "of its own: leave shard_map out, and put the points on a mesh, jax.device_put(x, NamedSharding(mesh, "
            "PartitionSpec('batch'))), under jax.jit; for several networks side by side use jax.vmap."
        ) from error


def _pick(function: DataFunction, data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in (*function.required, *function.optional) if name in data}


def _joint_signature(functions: Sequence[DataFunction]) -> inspect.Signature:
    """`(params, *data)` with the data of all functions: by position too where there is one function to order them."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if len(functions) == 1 else inspect.Parameter.KEYWORD_ONLY
    required = dict.fromkeys(name for function in functions for name in function.required)
    optional = dict.fromkeys(name for function in functions for name in function.optional if name not in required)
    parameters = [inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(name, kind) for name in required]
    # Their own defaults apply where they are not passed.
    parameters += [inspect.Parameter(name, kind, default=None) for name in optional]
    return inspect.Signature(parameters)
