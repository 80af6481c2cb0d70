"""What is solved: a loss (or a `grad_fn`) becomes the vector field of a gradient flow on one update's data.

An `Objective` is read once, when the transformation is built: it checks what it was given and knows which keywords
of `update` are its data. Each update binds it to that update's data, as a `Problem`: the field a solver integrates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax._arguments import DataFunction, read_data_function

PyTree = Any
Capability = Literal["loss"]

_REMEDIES: dict[str, str] = {"loss": "pass loss_fn (a grad_fn alone has no loss to evaluate)"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """The field of one update: bound to its data, random keys, fixed leaves and stage dtype.

    Trees that go in and come out hold the moving leaves only (`None` in place of fixed ones), in the stage dtype.

    Attributes:
      field: `field(params, stage) -> gradient`.
      objective: `objective(params) -> scalar loss`, or None where there is only a `grad_fn`.
    """

    field: Callable[[PyTree, Any], PyTree]
    objective: Callable[[PyTree], jax.Array] | None = None

    def __call__(self, params: PyTree, stage: int | jax.Array = 0) -> PyTree:
        """The gradient at `params`: what the flow follows downhill. `stage` may be traced. Costs one gradient."""
        return self.field(params, stage)

    def loss(self, params: PyTree) -> jax.Array:
        """The loss at `params`, a scalar on the data of this update. Costs one loss."""
        if self.objective is None:
            raise ValueError(f"This problem has no loss: {_REMEDIES['loss']}.")
        return self.objective(params)


class Objective:
    """A loss or a `grad_fn`, checked and with its data arguments read."""

    def __init__(
        self,
        loss_fn: Callable[..., Any] | None,
        *,
        grad_fn: Callable[..., Any] | None = None,
        has_aux: bool = False,
        argnames: Sequence[str] | None = None,
        needs: frozenset[Capability] = frozenset(),
    ):
        """Reads the functions.

        Args:
          loss_fn: `loss_fn(params, *data) -> scalar`, or `(scalar, aux)` with `has_aux`.
          grad_fn: `grad_fn(params, *data) -> gradient`, in the convention of the `updates` that `update` receives
            (conjugated for complex leaves); `(gradient, aux)` with `has_aux`.
          has_aux: whether the functions also return auxiliary data, which the stages discard.
          argnames: names of the data arguments, where a signature cannot be read.
          needs: the capabilities that the solver requires.

        Raises:
          TypeError: a function is not callable or takes no parameters; neither function is given.
          ValueError: data arguments that cannot be read, or a needed capability is missing.
        """
        if loss_fn is None and grad_fn is None:
            raise TypeError("loss_fn is None: pass loss_fn, or grad_fn= for a gradient of your own.")
        self._has_aux = has_aux
        self._argnames = argnames
        self._loss = None if loss_fn is None else read_data_function(loss_fn, "loss_fn", argnames)
        self._gradient = None if grad_fn is None else self._read_grad_fn(grad_fn)
        available = {"loss"} if self._loss is not None else set()
        for capability in sorted(needs - available):
            raise ValueError(f"The solver needs {capability!r}: {_REMEDIES[capability]}.")
        self._needs = needs

    def bind(self, extra_args: Mapping[str, Any], params: PyTree, part: _tree.Partition, stage_dtype: Any) -> Problem:
        """The problem of one update.

        Args:
          extra_args: the keywords of `update`: data by name, and possibly `grad_fn`.
          params: the whole parameters; fixed leaves keep these values at every stage.
          part: which leaves move.
          stage_dtype: the least precision in which the functions see floating-point leaves, or None.

        Raises:
          TypeError: missing or misspelt data; a loss that is not a real scalar.
          ValueError: a `grad_fn` whose result does not have the structure and shapes of params.
        """
        extra_args = dict(extra_args)
        override = extra_args.pop("grad_fn", None)
        gradient = self._gradient if override is None else self._read_grad_fn(override)
        whole = promote(params, stage_dtype)

        def merged(moving: PyTree) -> PyTree:
            return part.merge(moving, whole)

        objective: Callable[[PyTree], jax.Array] | None = None
        if self._loss is not None and (gradient is None or "loss" in self._needs):
            loss, loss_data = self._loss, self._loss.select(extra_args)

            def scalar_loss(moving: PyTree) -> jax.Array:
                return _scalar_loss(loss(merged(moving), loss_data), self._has_aux)

            objective = scalar_loss

        if gradient is not None:
            gradient_data = gradient.select(extra_args)

            def field(moving: PyTree, stage: Any) -> PyTree:
                del stage
                result = gradient(merged(moving), gradient_data)
                result = _checked_gradient(result, whole, self._has_aux)
                return _tree.cast_like(part.moving(result), moving)

        else:

            def field(moving: PyTree, stage: Any) -> PyTree:
                del stage
                assert objective is not None  # for the type checker: the constructor asked for a loss or a grad_fn
                # Optax's convention: descent follows the conjugate of what jax.grad returns.
                return jax.tree.map(jnp.conj, jax.grad(objective)(moving))

        return Problem(field, objective)

    def _read_grad_fn(self, grad_fn: Callable[..., Any]) -> DataFunction:
        # argnames names what loss_fn takes; a grad_fn may well have a signature that can be read without it.
        try:
            return read_data_function(grad_fn, "grad_fn")
        except ValueError:
            if self._argnames is None:
                raise
            return read_data_function(grad_fn, "grad_fn", self._argnames)


def promote(params: PyTree, stage_dtype: Any) -> PyTree:
    """`params` with floating-point leaves in at least the precision of `stage_dtype` (None: as they are)."""
    if stage_dtype is None:
        return params

    def cast(leaf: jax.Array) -> jax.Array:
        if not _tree.is_inexact(leaf):
            return leaf
        return leaf.astype(jnp.promote_types(leaf.dtype, stage_dtype))

    return jax.tree.map(cast, params)


def _scalar_loss(result: Any, has_aux: bool) -> jax.Array:
    if has_aux:
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(f"With has_aux=True, loss_fn must return (loss, aux), got {type(result).__name__}.")
        result = result[0]
    elif isinstance(result, tuple | list):
        raise TypeError(f"loss_fn returned a {type(result).__name__}; if it is (loss, aux), pass has_aux=True.")
    try:
        shape, dtype = jnp.shape(result), jnp.result_type(result)
    except TypeError:
        raise TypeError(f"loss_fn must return a real floating-point scalar, got {type(result).__name__}.") from None
    if shape != ():
        raise TypeError(f"loss_fn must return a scalar, got shape {shape}: reduce it, for example with jnp.mean.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"loss_fn must return a real floating-point scalar, got {dtype}: only a real loss has a gradient "
            "to descend."
        )
    return jnp.asarray(result)


def _checked_gradient(result: Any, params: PyTree, has_aux: bool) -> PyTree:
    if has_aux:
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(f"With has_aux=True, grad_fn must return (gradient, aux), got {type(result).__name__}.")
        result = result[0]
    check_like_params(result, params, "The result of grad_fn")
    return result


def check_like_params(tree: PyTree, params: PyTree, what: str) -> None:
    """Raises a ValueError unless `tree` has the structure and the leaf shapes of `params`."""
    if jax.tree.structure(tree) != jax.tree.structure(params):
        raise ValueError(
            f"{what} must have the tree structure of params: got {jax.tree.structure(tree)}, expected "
            f"{jax.tree.structure(params)}."
        )
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), other in zip(paths, jax.tree.leaves(tree), strict=True):
        if jnp.shape(other) != jnp.shape(leaf):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"{what} must have the leaf shapes of params: at params{name} got {jnp.shape(other)}, expected "
                f"{jnp.shape(leaf)}."
            )
