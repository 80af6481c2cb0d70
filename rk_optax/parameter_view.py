"""The parameters of one update as a solver sees them, and the way back to what the caller gets.

A solver moves the leaves that the mask marks, in at least the stage dtype; the loss and the caller know whole trees in
dtypes of their own. Whatever crosses between the two is cast once, here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rk_optax import _tree

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree] | None


@dataclasses.dataclass(frozen=True, eq=False)
class ParameterView:
    """Which leaves of `params` move, and in which dtypes.

    Attributes:
      params: the whole tree, in arrays.
      part: which leaves move.
      stage_dtype: the least precision of a moving floating-point leaf within a step; None for its own.
    """

    params: PyTree
    part: _tree.Partition
    stage_dtype: Any = "float32"

    @classmethod
    def of(cls, params: PyTree, mask: Mask = None, stage_dtype: Any = "float32") -> ParameterView:
        """The view of one update's parameters.

        Raises:
          ValueError: leaves that a wrapper has hidden; a mask that does not fit.
          TypeError: a moving leaf that has no gradient.
        """
        refuse_masked_nodes(params)
        params = jax.tree.map(jnp.asarray, params)
        view = cls(params, _tree.partition(mask, params), stage_dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(view.moving(params)):
            if not _tree.is_inexact(leaf):
                raise TypeError(
                    f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, which has no gradient; keep it fixed "
                    "with the solver's mask= (False for that leaf)."
                )
        return view

    @functools.cached_property
    def theta(self) -> PyTree:
        """θ, where the solver starts: the moving leaves in the stage dtype, None in place of the others."""
        return self.moving(self._wide)

    @functools.cached_property
    def _wide(self) -> PyTree:
        return promote(self.params, self.stage_dtype)

    def moving(self, tree: PyTree) -> PyTree:
        """The moving leaves of a tree like params, as they are."""
        return self.part.moving(tree)

    def whole(self, moving: PyTree) -> PyTree:
        """What the loss sees at `moving`: all leaves in the stage dtype, the fixed ones at their values."""
        return self.part.merge(moving, self._wide)

    def taken_in(self, tree: PyTree, what: str) -> PyTree:
        """The moving leaves of a gradient of the caller's, in the dtypes of `theta`.

        Raises:
          ValueError: a tree that is not like params, or complex where params are real; `what` it is.
        """
        check_like_params(tree, self.params, what)
        moving = self.moving(tree)
        check_kinds(moving, self.theta, what)
        return _tree.cast_like(moving, self.theta)

    def handed_out(self, moving: PyTree) -> PyTree:
        """`moving` in the dtypes of params."""
        return _tree.cast_like(moving, self.moving(self.params))

    def after(self, emitted: PyTree) -> PyTree:
        """θ once `emitted`, in the dtypes of params, has been added there, as `optax.apply_updates` does it."""
        # Without the barrier XLA leaves out the rounding of a sum in half precision that is made wider afterwards.
        rounded = jax.lax.optimization_barrier(jax.tree.map(jnp.add, self.moving(self.params), emitted))
        return promote(rounded, self.stage_dtype)

    def update(self, emitted: PyTree) -> PyTree:
        """What the caller gets: `emitted` for the leaves that move, zeros for the others."""
        return self.part.merge(emitted, jax.tree.map(jnp.zeros_like, self.params))


def check_stage_dtype(stage_dtype: Any) -> None:
    """Raises a ValueError unless `stage_dtype` is None or a real floating-point dtype that JAX can hold now."""
    if stage_dtype is None:
        return
    try:
        floating = jnp.issubdtype(jnp.dtype(stage_dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"stage_dtype must be a real floating-point dtype or None, got {stage_dtype!r}.")
    if jnp.dtype(stage_dtype) == jnp.float64 and _tree.default_float() != jnp.float64:
        raise ValueError("stage_dtype float64 needs jax.config.update('jax_enable_x64', True) first.")


def promote(params: PyTree, stage_dtype: Any) -> PyTree:
    """`params` with floating-point leaves in at least the precision of `stage_dtype` (None: as they are)."""
    if stage_dtype is None:
        return params

    def cast(leaf: jax.Array) -> jax.Array:
        if not _tree.is_inexact(leaf):
            return leaf
        return leaf.astype(_tree.common_dtype(leaf.dtype, stage_dtype))

    return jax.tree.map(cast, params)


def refuse_masked_nodes(tree: PyTree) -> None:
    """Raises a ValueError where `optax.masked`, `partition` or `multi_transform` have hidden leaves of `tree`."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    if any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked))):
        raise ValueError(
            "params hold optax.MaskedNode: optax.masked and optax.partition hand down a tree that the loss cannot "
            "read. Use the solver's own mask= instead: rk_optax.rk4(loss_fn, learning_rate, mask=mask) moves only "
            "the leaves marked True, at every stage. To give layers rates of their own (optax.multi_transform), use a "
            "scale of the field at every stage: preconditioner=rk_optax.precondition_by(optax.multi_transform({'slow': "
            "optax.scale(0.1), 'fast': optax.identity()}, labels))."
        )


def check_kinds(tree: PyTree, params: PyTree, what: str) -> None:
    """Raises a ValueError where `tree` is complex and `params` real: a cast would drop the imaginary part."""
    for leaf, like in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(like):
            raise ValueError(f"{what} are complex where params are real; pass the gradient at params.")


def check_like_params(tree: PyTree, params: PyTree, what: str, whose: str = "params") -> None:
    """Raises a ValueError unless `tree` has the structure and the leaf shapes of `params`, or of what is `whose`."""
    if jax.tree.structure(tree) != jax.tree.structure(params):
        raise ValueError(
            f"{what} must have the tree structure of {whose}: got {jax.tree.structure(tree)}, expected "
            f"{jax.tree.structure(params)}."
        )
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), other in zip(paths, jax.tree.leaves(tree), strict=True):
        if jnp.shape(other) != jnp.shape(leaf):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"{what} must have the leaf shapes of {whose}: at {whose}{name} got {jnp.shape(other)}, expected "
                f"{jnp.shape(leaf)}."
            )
