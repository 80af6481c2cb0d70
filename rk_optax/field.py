"""What is solved: a loss (or a `grad_fn`) becomes the vector field of a gradient flow on one update's data.

An `Objective` is read once, when the transformation is built: it checks what it was given and knows which keywords
of `update` are its data. Each update binds it to that update's data, as a `VectorField`: the field a solver integrates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax._arguments import DataFunction, read_data_function
from rk_optax.structured_loss import LeastSquares, ModelLoss, Rows

PyTree = Any
Linear = Callable[[PyTree], PyTree]
Capability = Literal["loss", "product", "gauss_newton", "rows"]

_REMEDIES: dict[str, str] = {
    "loss": "pass loss_fn (a grad_fn alone has no loss to evaluate)",
    "product": "pass loss_fn (a grad_fn alone is not known to be differentiable)",
    "gauss_newton": "pass a loss_fn whose structure is known: rk_optax.ModelLoss(model_fn, output_loss) or "
    "rk_optax.LeastSquares(residual_fn)",
    "rows": "pass a least-squares loss: rk_optax.LeastSquares(residual_fn)",
}


@dataclasses.dataclass(frozen=True)
class BoundStructure:
    """A `ModelLoss` on one update's data, as functions of the moving leaves."""

    outputs: Callable[[PyTree], PyTree]
    of_outputs: Callable[[PyTree], jax.Array]
    rows: Callable[[PyTree], Rows] | None = None  # of least squares
    count_rows: Callable[[PyTree], int] | None = None


@dataclasses.dataclass(frozen=True)
class VectorField:
    """The field of one update: bound to its data, random keys, fixed leaves and stage dtype.

    Trees that go in and come out hold the moving leaves only (`None` in place of fixed ones), in the stage dtype.

    Attributes:
      evaluate: `evaluate(params, stage) -> gradient`.
      objective: `objective(params) -> scalar loss`, or None where there is only a `grad_fn`.
      smooth_field: `smooth_field(params) -> gradient`, the field of stage 1 where it is known to be differentiable, or
        None likewise.
      rounding: relative rounding error of stage 1 as it came in, where that is coarser than the stage dtype.
      gradient: like `smooth_field`, but never preconditioned: ∇L on the data of stage 1.
      structure: the structured loss as functions of params alone, or None.
      l2: λ of the loss's term (λ/2)‖θ‖², or None; `rows` are without it.
      scale: the diagonal of the preconditioner P, like params; None for P = I or where P has none.
    """

    evaluate: Callable[[PyTree, Any], PyTree]
    objective: Callable[[PyTree], jax.Array] | None = None
    smooth_field: Callable[[PyTree], PyTree] | None = None
    rounding: float = 0.0
    gradient: Callable[[PyTree], PyTree] | None = None
    structure: BoundStructure | None = None
    l2: Any = None
    scale: PyTree | None = None

    def __call__(self, params: PyTree, stage: int | jax.Array = 0) -> PyTree:
        """The gradient at `params`: what the flow follows downhill. `stage` may be traced. Costs one gradient."""
        return self.evaluate(params, stage)

    def loss(self, params: PyTree) -> jax.Array:
        """The loss at `params`, a scalar, on the data of stage 1. Costs one loss."""
        if self.objective is None:
            raise ValueError(f"This field has no loss: {_REMEDIES['loss']}.")
        return self.objective(params)

    def product(self, params: PyTree, vector: PyTree) -> PyTree:
        """The field's Jacobian at `params` times `vector`, on the data of stage 1. Costs one product."""
        if self.smooth_field is None:
            raise ValueError(f"This field has no Hessian-vector product: {_REMEDIES['product']}.")
        return jax.jvp(self.smooth_field, (params,), (vector,))[1]

    def hessian(self, params: PyTree) -> Linear:
        """V ↦ ∇²L v at `params`, without preconditioner, linearised once. Costs one gradient; each call one product."""
        if self.gradient is None:
            raise ValueError(f"This field has no Hessian: {_REMEDIES['product']}.")
        return jax.linearize(self.gradient, params)[1]

    def gauss_newton(self, params: PyTree) -> Linear:
        """V ↦ (Jᵀ(∇²output_loss)J + λI) v, without preconditioner, linearised once. Each call costs one product."""
        structure = self._structured("gauss_newton")
        outputs, push = jax.linearize(structure.outputs, params)
        pull = jax.linear_transpose(push, params)
        curve = jax.linearize(jax.grad(structure.of_outputs), outputs)[1]

        def product(v: PyTree) -> PyTree:
            # The transpose of a complex linear map is not its adjoint.
            result = jax.tree.map(jnp.conj, pull(curve(push(v)))[0])
            return result if self.l2 is None else _tree.add_scaled(result, self.l2, v)

        return product

    def rows(self, params: PyTree) -> Rows:
        """Residuals and their Jacobian, without preconditioner and without the L2 term. Costs N rows."""
        structure = self._structured("rows")
        if structure.rows is None:
            raise ValueError(f"This field has no residuals: {_REMEDIES['rows']}.")
        return structure.rows(params)

    def count_rows(self, params: PyTree) -> int:
        """N, the number of residuals, an integer also under jit. Costs nothing."""
        structure = self._structured("rows")
        return 0 if structure.count_rows is None else structure.count_rows(params)

    def _structured(self, capability: str) -> BoundStructure:
        if self.structure is None:
            raise ValueError(f"This field has no {capability!r}: {_REMEDIES[capability]}.")
        return self.structure

    def preconditioned(self, apply: Callable[[PyTree], PyTree], scale: PyTree | None = None) -> VectorField:
        """The field that is `apply` of this one, and whose products are those of that field."""
        smooth = self.smooth_field
        return dataclasses.replace(
            self,
            scale=scale,
            evaluate=lambda params, stage: apply(self.evaluate(params, stage)),
            smooth_field=None if smooth is None else lambda params: apply(smooth(params)),
        )


@dataclasses.dataclass(frozen=True)
class StageBatches:
    """Which part of the data each stage sees.

    Attributes:
      policy: "same": all of it; "fresh": stage i sees `x[i]` of data with a leading axis of length `stages`; "split":
        stage i sees the i-th of `stages` equal slices along the first axis.
      names: the data arguments that are cut; the others are the same for all stages.
      stages: gradients of one step.
    """

    policy: Literal["same", "fresh", "split"] = "same"
    names: tuple[str, ...] = ()
    stages: int = 1

    @classmethod
    def of(cls, policy: Any, names: Sequence[str] | str, stages: int) -> StageBatches:
        """A policy that cuts.

        Raises:
          ValueError: an unknown policy, or no names.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        if policy not in ("fresh", "split"):
            raise ValueError(f"stage_batches must be 'same', 'fresh' or 'split', got {policy!r}.")
        if not names:
            raise ValueError(f"stage_batches={policy!r} needs batch_argnames, the data arguments that hold batches.")
        return cls(policy, names, stages)

    def at(self, data: Mapping[str, Any], stage: int | jax.Array) -> dict[str, Any]:
        """The data of one stage.

        Raises:
          ValueError: a leading axis that is not `stages` long ("fresh") or does not divide into `stages` ("split").
        """
        if self.policy == "same":
            return dict(data)
        cut = {
            name: jax.tree.map(lambda x, name=name: self._slice(x, name, stage), data[name])
            for name in self.names
            if name in data
        }
        return {**data, **cut}

    def _slice(self, x: jax.Array, name: str, stage: int | jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        length = x.shape[0] if x.ndim else None
        if self.policy == "fresh" and length != self.stages:
            raise ValueError(
                f"stage_batches='fresh' needs a batch per stage: data argument {name!r} must have a leading axis of "
                f"length {self.stages}, got shape {x.shape}. Stack {self.stages} batches with jnp.stack."
            )
        if self.policy == "split":
            if length is None or length % self.stages:
                raise ValueError(
                    f"stage_batches='split' cuts a batch into {self.stages} equal parts, and data argument {name!r} "
                    f"of shape {x.shape} does not divide. Use a batch size that is a multiple of {self.stages}."
                )
            x = x.reshape((self.stages, length // self.stages, *x.shape[1:]))
        return jax.lax.dynamic_index_in_dim(x, stage, keepdims=False)


def first_stage_batch(
    data: Mapping[str, Any], stages: int, policy: Literal["fresh", "split"], batch_argnames: Sequence[str]
) -> dict[str, Any]:
    """The data on which to evaluate the gradient that `update` takes as stage 1, under a stage-batch policy.

    >>> import jax.numpy as jnp, rk_optax
    >>> rk_optax.first_stage_batch({"x": jnp.arange(8)}, 4, "split", ["x"])
    {'x': Array([0, 1], dtype=int32)}

    Args:
      data: the keywords of `update`.
      stages: gradients per step of the solver: 4 for RK4; `rk_optax.TABLEAUS[name].effective_stages`.
      policy: the optimizer's `stage_batches`.
      batch_argnames: the optimizer's.

    Raises:
      ValueError: sizes that do not divide.
    """
    batches = StageBatches.of(policy, batch_argnames, stages)
    for name in set(batches.names) - set(data):
        raise ValueError(f"batch_argnames has {name!r}, which is not in data: {sorted(data)!r}.")
    return batches.at(data, 0)


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
        l2: float | jax.Array | None = None,
        stage_batches: StageBatches | None = None,
    ):
        """Reads the functions.

        Args:
          loss_fn: `loss_fn(params, *data) -> scalar`, or `(scalar, aux)` with `has_aux`.
          grad_fn: `grad_fn(params, *data) -> gradient`, in the convention of the `updates` that `update` receives
            (conjugated for complex leaves); `(gradient, aux)` with `has_aux`.
          has_aux: whether the functions also return auxiliary data, which the stages discard.
          argnames: names of the data arguments, where a signature cannot be read.
          needs: the capabilities that solver, step-size rule and preconditioner require.
          l2: λ of a term (λ/2)‖θ‖² of the loss, over the moving leaves; None for no such term.
          stage_batches: which part of the data each stage sees.

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
        self._l2 = l2
        self._batches = StageBatches() if stage_batches is None else stage_batches
        for function in filter(None, (self._loss, self._gradient)):
            for name in set(self._batches.names) - {*function.required, *function.optional}:
                raise ValueError(f"batch_argnames has {name!r}, which {function.role} does not take.")
        self._structure = loss_fn if isinstance(loss_fn, ModelLoss) else None
        if self._structure is not None and has_aux:
            raise ValueError(f"has_aux=True: a {type(loss_fn).__name__} returns its loss alone, without aux.")
        available: set[Capability] = set()
        if self._loss is not None:
            available.update(("loss", "product"))
        if self._structure is not None:
            available.add("gauss_newton")
        if isinstance(loss_fn, LeastSquares):
            available.add("rows")
        for capability in sorted(needs - available):
            raise ValueError(
                f"This solver, learning rate or preconditioner needs a {capability!r}: {_REMEDIES[capability]}."
            )
        self._needs = needs

    def bind(
        self, extra_args: Mapping[str, Any], params: PyTree, part: _tree.Partition, stage_dtype: Any
    ) -> VectorField:
        """The field of one update.

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

        of_loss = None
        if self._loss is not None and (gradient is None or self._needs):
            of_loss = self._field_of_loss(self._loss, self._loss.select(extra_args), merged)
        if gradient is None:
            assert of_loss is not None  # for the type checker: the constructor saw to it
            return of_loss
        gradient_data = gradient.select(extra_args)

        def field(moving: PyTree, stage: Any) -> PyTree:
            result = gradient(merged(moving), self._batches.at(gradient_data, stage))
            result = part.moving(_checked_gradient(result, whole, self._has_aux))
            return self.with_l2(_tree.cast_like(result, moving), moving)

        return VectorField(field, l2=self._l2) if of_loss is None else dataclasses.replace(of_loss, evaluate=field)

    def _field_of_loss(
        self, loss: DataFunction, data: Mapping[str, Any], merged: Callable[[PyTree], PyTree]
    ) -> VectorField:
        def value(moving: PyTree, stage: Any) -> jax.Array:
            return _scalar_loss(loss(merged(moving), self._batches.at(data, stage)), self._has_aux)

        def field(moving: PyTree, stage: Any) -> PyTree:
            # Optax's convention: descent follows the conjugate of what jax.grad returns.
            return self.with_l2(jax.tree.map(jnp.conj, jax.grad(value)(moving, stage)), moving)

        def objective(moving: PyTree) -> jax.Array:
            if self._l2 is None:
                return value(moving, 0)
            return value(moving, 0) + 0.5 * self._l2 * _tree.inner(moving, moving)

        def gradient(moving: PyTree) -> PyTree:
            return field(moving, 0)

        return VectorField(
            field, objective, gradient, gradient=gradient, structure=self._bound_structure(data, merged), l2=self._l2
        )

    def _bound_structure(self, data: Mapping[str, Any], merged: Callable[[PyTree], PyTree]) -> BoundStructure | None:
        loss = self._structure
        if loss is None:
            return None
        data = self._batches.at(data, 0)

        def outputs(moving: PyTree) -> PyTree:
            return loss.outputs(merged(moving), data)

        def of_outputs(values: PyTree) -> jax.Array:
            return loss.of_outputs(values, data)

        if not isinstance(loss, LeastSquares):
            return BoundStructure(outputs, of_outputs)
        return BoundStructure(
            outputs,
            of_outputs,
            lambda moving: loss.rows(moving, data, merged),
            lambda moving: loss.count_rows(merged(moving), data),
        )

    def with_l2(self, gradient: PyTree, params: PyTree) -> PyTree:
        """The gradient of the whole objective from the gradient of the loss."""
        return gradient if self._l2 is None else _tree.add_scaled(gradient, self._l2, params)

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
    if not hasattr(result, "dtype") and not isinstance(result, bool | int | float | complex):
        raise TypeError(f"loss_fn must return a real floating-point scalar, got {type(result).__name__}.")
    shape, dtype = jnp.shape(result), jnp.result_type(result)
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
    check_kinds(result, params, "The leaves that grad_fn returned")
    return result


def check_kinds(tree: PyTree, params: PyTree, what: str) -> None:
    """Raises a ValueError where `tree` is complex and `params` real: a cast would drop the imaginary part."""
    for leaf, like in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(like):
            raise ValueError(f"{what} are complex where params are real; pass the gradient at params.")


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
