"""What is solved, as it is given: a loss or a `grad_fn`, read once, and bound to each update's data as a field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax._arguments import DataFunction, read_data_function
from rk_optax._explanations import explained
from rk_optax.field import BoundStructure, Capability, SmoothField, VectorField, check_capabilities
from rk_optax.parameter_view import ParameterView, check_kinds, check_like_params
from rk_optax.stage_batches import StageBatches
from rk_optax.stochastic_field import StochasticField
from rk_optax.structured_loss import LeastSquares, ModelLoss

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from rk_optax._tree import Tree

PyTree = Any
_WHO = "This solver, learning rate or preconditioner"


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
        l2: float | Float[Array, ""] | None = None,
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
          ValueError: `has_aux` is no bool, data arguments that cannot be read, or a needed capability is missing.
        """
        if loss_fn is None and grad_fn is None:
            raise TypeError("loss_fn is None: pass loss_fn, or grad_fn= for a gradient of your own.")
        self._has_aux = has_aux = _checks.flag(has_aux, "has_aux")
        self._argnames = argnames
        self._loss = None if loss_fn is None else read_data_function(loss_fn, "loss_fn", argnames)
        self._gradient = None if grad_fn is None else self._read_grad_fn(grad_fn)
        self._l2 = l2
        self._batches = StageBatches() if stage_batches is None else stage_batches
        for function in filter(None, (self._loss, self._gradient)):
            for name in set(self._batches.names) - {*function.required, *function.optional}:
                raise ValueError(f"batch_argnames has {name!r}, which {function.role} does not take.")
        if isinstance(loss_fn, ModelLoss) and has_aux:
            raise ValueError(f"has_aux=True: a {type(loss_fn).__name__} returns its loss alone, without aux.")
        self.offers = _offers(loss_fn, grad_fn)
        needs = needs - {"diagonal_scale"}  # what a preconditioner offers is compared where there is one
        check_capabilities(needs, self.offers, _WHO)
        self._needs = needs - {"deterministic"}  # of the loss
        self._deterministic = needs & {"deterministic"}

    def bind(self, extra_args: Mapping[str, Any], view: ParameterView, *, with_loss: bool = False) -> VectorField:
        """The field of one update.

        Args:
          extra_args: the keywords of `update`: data by name, and possibly `grad_fn`.
          view: the parameters: which of them move, and in which precision the functions see them.
          with_loss: whether the loss is needed also where a `grad_fn` makes the field and nothing else needs it.

        Raises:
          TypeError: missing or misspelt data; a loss that is not a real scalar.
          ValueError: a `grad_fn` whose result does not have the structure and shapes of params.
        """
        extra_args = dict(extra_args)
        override = extra_args.pop("grad_fn", None)
        gradient = self._gradient if override is None else self._read_grad_fn(override)
        if override is not None:
            check_capabilities(self._deterministic, _offers(None, override), f"grad_fn of update: {_WHO}")
        field = None
        if self._loss is not None and (gradient is None or self._needs or with_loss):
            field = self._field_of_loss(self._loss, self._loss.select(extra_args), view)
        if gradient is not None:
            field = self._field_of_gradient(gradient, gradient.select(extra_args), view, field)
        assert field is not None  # for the type checker: the constructor saw to it
        return field.decayed(self._l2)

    def _field_of_loss(self, loss: DataFunction, data: Mapping[str, Any], view: ParameterView) -> VectorField:
        def value(moving: Tree, stage: Any = 0) -> Float[Array, ""]:
            return scalar_loss(_evaluated(loss, view, moving, self._batches.at(data, stage)), self._has_aux)

        def field(moving: Tree, stage: Any = 0) -> Tree:
            # Optax's convention: descent follows the conjugate of what jax.grad returns.
            return jax.tree.map(jnp.conj, jax.grad(value)(moving, stage))

        def both(moving: Tree) -> tuple[Float[Array, ""], Tree]:
            loss, gradient = jax.value_and_grad(value)(moving)
            return loss, jax.tree.map(jnp.conj, gradient)

        structure, fewer, function = None, None, loss.function
        if isinstance(function, ModelLoss):
            structure = _bound_structure(function, self._batches.at(data, 0), view)
        if isinstance(function, LeastSquares) and function.has_points and not self._batches.names:

            def fewer_points(divisor: int) -> VectorField | None:
                found = function.on_fewer_points(data, divisor)
                if found is None:
                    return None
                return self._field_of_loss(dataclasses.replace(loss, function=found[0]), found[1], view)

            fewer = fewer_points
        return VectorField(
            field,
            value,
            field,
            gradient=field,
            structure=structure,
            value_and_gradient=both,
            fewer_points=fewer,
        )

    def _field_of_gradient(
        self, gradient: DataFunction, data: Mapping[str, Any], view: ParameterView, of_loss: VectorField | None
    ) -> VectorField:
        own = gradient.function.data_of_stage if isinstance(gradient.function, StochasticField) else None

        def field(moving: Tree, stage: Any = 0) -> Tree:
            seen = self._batches.at(data, stage)
            result = _evaluated(gradient, view, moving, seen if own is None else own(seen, stage))
            return _tree.cast_like(view.moving(_checked_gradient(result, view.params, self._has_aux)), moving)

        known = VectorField(field)
        if of_loss is not None:
            loss = of_loss.loss
            known = dataclasses.replace(
                of_loss,
                evaluate=field,
                value_and_gradient=lambda p: (loss(p), field(p)),
                losses_beside=1,
                fewer_points=None,
            )
        if not isinstance(gradient.function, SmoothField):
            return known
        return dataclasses.replace(known, smooth_field=field, gradient=field, symmetric=gradient.function.symmetric)

    def _read_grad_fn(self, grad_fn: Callable[..., Any]) -> DataFunction:
        # argnames names what loss_fn takes; a grad_fn may well have a signature that can be read without it.
        try:
            return read_data_function(grad_fn, "grad_fn")
        except ValueError:
            if self._argnames is None:
                raise
            return read_data_function(grad_fn, "grad_fn", self._argnames)


def _offers(loss_fn: Any, grad_fn: Any) -> frozenset[Capability]:
    """What the field of these functions can do beside giving values."""
    offers: set[Capability] = set() if isinstance(grad_fn, StochasticField) else {"deterministic"}
    if loss_fn is not None:
        offers.update(("loss", "product", "symmetric"))
    if isinstance(loss_fn, ModelLoss):
        offers.add("gauss_newton")
    if isinstance(loss_fn, LeastSquares):
        offers.add("rows")
    if isinstance(grad_fn, SmoothField):
        offers.add("product")
        (offers.add if grad_fn.symmetric else offers.discard)("symmetric")
    return frozenset(offers)


def _bound_structure(loss: ModelLoss, data: Mapping[str, Any], view: ParameterView) -> BoundStructure:
    def outputs(moving: Tree) -> PyTree:
        with explained("the model of loss_fn", view, data):
            return loss.outputs(view.whole(moving), data)

    def of_outputs(values: PyTree) -> Float[Array, ""]:
        return loss.of_outputs(values, data)

    if not isinstance(loss, LeastSquares):
        return BoundStructure(outputs, of_outputs)
    return BoundStructure(
        outputs,
        of_outputs,
        lambda moving: loss.rows(moving, data, view.whole),
        lambda moving: loss.count_rows(view.whole(moving), data),
        lambda moving: loss.residual(view.whole(moving), data),
    )


def _evaluated(function: DataFunction, view: ParameterView, moving: Tree, data: Mapping[str, Any]) -> Any:
    with explained(function.role, view, data):
        return function(view.whole(moving), data)


def scalar_loss(result: Any, has_aux: bool, role: str = "loss_fn") -> Float[Array, ""]:
    """What a loss returned, without aux: a real scalar, or a TypeError that says what it is instead."""
    if has_aux:
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(f"With has_aux=True, {role} must return (loss, aux), got {type(result).__name__}.")
        result = result[0]
    elif isinstance(result, tuple | list):
        raise TypeError(f"{role} returned a {type(result).__name__}; if it is (loss, aux), pass has_aux=True.")
    if not hasattr(result, "dtype") and not isinstance(result, bool | int | float | complex):
        raise TypeError(f"{role} must return a real floating-point scalar, got {type(result).__name__}.")
    shape, dtype = jnp.shape(result), jnp.result_type(result)
    if shape != ():
        raise TypeError(f"{role} must return a scalar, got shape {shape}: reduce it, for example with jnp.mean.")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{role} must return a real floating-point scalar, got {dtype}: only a real loss has a gradient to descend."
        )
    return jnp.asarray(result)


def _checked_gradient(result: Any, params: PyTree, has_aux: bool) -> Tree:
    if has_aux:
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(f"With has_aux=True, grad_fn must return (gradient, aux), got {type(result).__name__}.")
        result = result[0]
    check_like_params(result, params, "The result of grad_fn")
    check_kinds(result, params, "The leaves that grad_fn returned")
    return result
