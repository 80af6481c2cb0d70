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
from rk_optax._explanations import explained, linearized
from rk_optax.parameter_view import ParameterView, check_kinds, check_like_params
from rk_optax.stage_batches import StageBatches
from rk_optax.stochastic_field import StochasticField
from rk_optax.structured_loss import LeastSquares, ModelLoss, Rows

PyTree = Any
Linear = Callable[[PyTree], PyTree]
Capability = Literal["loss", "product", "symmetric", "diagonal_scale", "gauss_newton", "rows", "decay", "deterministic"]
"""What a solver, a rule or a preconditioner may need beside the values of a field:

loss: the loss whose gradient the field is.
product: products with the field's Jacobian.
symmetric: that Jacobian is symmetric before preconditioning, as a Hessian is.
diagonal_scale: the preconditioner multiplies by a positive diagonal, or there is none.
gauss_newton: products with the generalised Gauss–Newton matrix.
rows: residuals and the rows of their Jacobian.
decay: the diagonal of a linear part of the field's own, as a layer of `rk_optax.networks` may have it.
deterministic: the same value at the same place whatever the stage, which a `StochasticField` has not.
"""

_REMEDIES: dict[Capability, str] = {
    "loss": "pass loss_fn (a grad_fn alone has no loss to evaluate); in a game, whose players have no loss in common, "
    "take a number, dal(...) or error_control()",
    "product": "pass loss_fn (a grad_fn alone is not known to be differentiable; rk_optax.SmoothField(grad_fn) says "
    "that it is)",
    "symmetric": "pass loss_fn, or rk_optax.SmoothField(grad_fn, symmetric=True) where the field is a gradient; for "
    "one that is none, as in a game, pass linear_solver=rk_optax.Gmres() to the solver, or use an explicit one",
    "diagonal_scale": "its linear systems are symmetric only with a diagonal preconditioner, such as "
    "rk_optax.precondition_by_adagrad(); precondition_by(...) promises no diagonal",
    "gauss_newton": "pass a loss_fn whose structure is known: rk_optax.ModelLoss(model_fn, output_loss) or "
    "rk_optax.LeastSquares(residual_fn)",
    "rows": "pass a least-squares loss: rk_optax.LeastSquares(residual_fn)",
    "decay": "it is for layers of rk_optax.networks; for a loss, Etd(linear='l2') or 'diagonal'",
    "deterministic": "the noise of a StochasticField, as rk_optax.forward_gradient is one, is drawn anew at every "
    "stage, and would be taken for an error, a curvature or a slope; use a constant or scheduled learning rate with an "
    "explicit method, or with rkc(..., stages=5)",
}


_WHO = "This solver, learning rate or preconditioner"


def check_capabilities(needs: frozenset[Capability], offers: frozenset[Capability], who: str) -> None:
    """Raises a ValueError, with the remedy, where `who` needs what a field does not offer."""
    for capability in sorted(needs - offers):
        raise ValueError(f"{who} needs a {capability!r}: {_REMEDIES[capability]}.")


@dataclasses.dataclass(frozen=True)
class SmoothField:
    """A `grad_fn` that JAX can differentiate: a field with products, though it need not be the gradient of anything.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def payoff(z): return z["x"] * z["y"]  # x descends, y ascends
    >>> def field(z):
    ...     g = jax.grad(payoff)(z)
    ...     return {"x": g["x"], "y": -g["y"]}
    >>> tx = rk_optax.rk4(None, rk_optax.dal(0.5), grad_fn=rk_optax.SmoothField(field))
    >>> z = {"x": jnp.array(1.0), "y": jnp.array(0.0)}
    >>> _, state = tx.update(field(z), tx.init(z), z)
    >>> float(state.rule.ratio)
    1.0

    Args:
      grad_fn: `grad_fn(params, *data) -> field`, like params and in the convention of the `updates` of `update`.
      symmetric: whether its Jacobian is symmetric, as that of a gradient is. Solvers that solve linear systems by
        conjugate gradients need that, and are refused at construction without it; those that have a `linear_solver`
        do without, by `rk_optax.Gmres()`.

    Raises:
      TypeError: `grad_fn` is not callable.
    """

    grad_fn: Callable[..., Any]
    symmetric: bool = False

    def __post_init__(self):
        if not callable(self.grad_fn):
            raise TypeError(f"grad_fn must be callable, got {type(self.grad_fn).__name__}.")
        object.__setattr__(self, "__wrapped__", self.grad_fn)  # its signature names the data

    def __call__(self, params: PyTree, *args: Any, **data: Any) -> PyTree:
        """The field at `params`."""
        return self.grad_fn(params, *args, **data)


@dataclasses.dataclass(frozen=True)
class BoundStructure:
    """A `ModelLoss` on one update's data, as functions of the moving leaves."""

    outputs: Callable[[PyTree], PyTree]
    of_outputs: Callable[[PyTree], jax.Array]
    rows: Callable[[PyTree], Rows] | None = None  # of least squares
    count_rows: Callable[[PyTree], int] | None = None
    residual: Callable[[PyTree], jax.Array] | None = None


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
      l2: λ of the loss's term (λ/2)‖θ‖², or None; see `decayed`.
      scale: the diagonal of the preconditioner P, like params; None for P = I or where P has none.
      symmetric: whether the field's Jacobian is symmetric before preconditioning.
      decay: `decay(params) -> D`, real and like params, of a field D(θ)θ + N(θ) that knows its linear part; or None.
      plain: `evaluate` as it was before preconditioning, or None where there was none.
    """

    evaluate: Callable[[PyTree, Any], PyTree]
    objective: Callable[[PyTree], jax.Array] | None = None
    smooth_field: Callable[[PyTree], PyTree] | None = None
    rounding: float = 0.0
    gradient: Callable[[PyTree], PyTree] | None = None
    structure: BoundStructure | None = None
    l2: Any = None
    scale: PyTree | None = None
    symmetric: bool = True
    decay: Callable[[PyTree], PyTree] | None = None
    plain: Callable[[PyTree, Any], PyTree] | None = None

    def __call__(self, params: PyTree, stage: int | jax.Array = 0) -> PyTree:
        """The gradient at `params`: what the flow follows downhill. `stage` may be traced. Costs one gradient."""
        return self.evaluate(params, stage)

    def unpreconditioned(self, params: PyTree) -> PyTree:
        """The gradient at `params` without preconditioner, on the data of stage 1. Costs one gradient."""
        return (self.evaluate if self.plain is None else self.plain)(params, 0)

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
        if not self.symmetric:
            raise ValueError(f"This field has no Hessian: {_REMEDIES['symmetric']}.")
        return self.jacobian(params)

    def jacobian(self, params: PyTree) -> Linear:
        """Like `hessian`, of a field that need not be symmetric."""
        if self.gradient is None:
            raise ValueError(f"This field has no Jacobian: {_REMEDIES['product']}.")
        return linearized(self.gradient, params)[1]

    def gauss_newton(self, params: PyTree) -> Linear:
        """V ↦ (Jᵀ(∇²output_loss)J + λI) v, without preconditioner, linearised once. Each call costs one product."""
        structure = self._structured("gauss_newton")
        outputs, push = linearized(structure.outputs, params)
        pull = jax.linear_transpose(push, params)
        curve = jax.linearize(jax.grad(structure.of_outputs), outputs)[1]

        def product(v: PyTree) -> PyTree:
            # The transpose of a complex linear map is not its adjoint.
            result = jax.tree.map(jnp.conj, pull(curve(push(v)))[0])
            return self.with_l2(result, v)

        return product

    def rows(self, params: PyTree) -> Rows:
        """Residuals and their Jacobian, without preconditioner and without the L2 term. Costs N rows."""
        structure = self._structured("rows")
        if structure.rows is None:
            raise ValueError(f"This field has no residuals: {_REMEDIES['rows']}.")
        return structure.rows(params)

    def residual(self, params: PyTree) -> jax.Array:
        """The residuals alone, flat, in the order of `rows`. Costs one loss."""
        structure = self._structured("rows")
        if structure.residual is None:
            raise ValueError(f"This field has no residuals: {_REMEDIES['rows']}.")
        return structure.residual(params)

    def count_rows(self, params: PyTree) -> int:
        """N, the number of residuals, an integer also under jit. Costs nothing."""
        structure = self._structured("rows")
        return 0 if structure.count_rows is None else structure.count_rows(params)

    def _structured(self, capability: Capability) -> BoundStructure:
        if self.structure is None:
            raise ValueError(f"This field has no {capability!r}: {_REMEDIES[capability]}.")
        return self.structure

    def with_l2(self, gradient: PyTree, params: PyTree) -> PyTree:
        """The gradient of the whole objective from one of the loss without its term (λ/2)‖θ‖²."""
        return gradient if self.l2 is None else _tree.add_scaled(gradient, self.l2, params)

    def decayed(self, l2: Any) -> VectorField:
        """This field, of a loss without such a term, with (λ/2)‖θ‖² added: everything but `rows` sees it."""
        if l2 is None:
            return self
        whole = dataclasses.replace(self, l2=l2)

        def plus_decay(field: Callable[..., PyTree] | None) -> Any:
            return None if field is None else lambda params, *stage: whole.with_l2(field(params, *stage), params)

        def plus_term(params: PyTree) -> jax.Array:
            assert self.objective is not None  # for the type checker
            return self.objective(params) + 0.5 * l2 * _tree.inner(params, params)

        return dataclasses.replace(
            whole,
            evaluate=plus_decay(self.evaluate),
            smooth_field=plus_decay(self.smooth_field),
            gradient=plus_decay(self.gradient),
            objective=None if self.objective is None else plus_term,
        )

    def preconditioned(self, apply: Callable[[PyTree], PyTree], scale: PyTree | None = None) -> VectorField:
        """The field that is `apply` of this one, and whose products are those of that field."""
        smooth = self.smooth_field
        return dataclasses.replace(
            self,
            scale=scale,
            evaluate=lambda params, stage: apply(self.evaluate(params, stage)),
            smooth_field=None if smooth is None else lambda params: apply(smooth(params)),
            plain=self.evaluate if self.plain is None else self.plain,
        )

    def reversed(self) -> VectorField:
        """The field of the loss −L, whose time runs backward. No structure is left: −L is no sum of squares."""

        def negative(function: Callable[..., PyTree] | None) -> Callable[..., PyTree] | None:
            return None if function is None else lambda *args: jax.tree.map(jnp.negative, function(*args))

        return dataclasses.replace(
            self,
            evaluate=lambda params, stage: jax.tree.map(jnp.negative, self.evaluate(params, stage)),
            objective=negative(self.objective),
            smooth_field=negative(self.smooth_field),
            gradient=negative(self.gradient),
            plain=negative(self.plain),
            structure=None,
        )


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
        if isinstance(loss_fn, ModelLoss) and has_aux:
            raise ValueError(f"has_aux=True: a {type(loss_fn).__name__} returns its loss alone, without aux.")
        self.offers = _offers(loss_fn, grad_fn)
        needs = needs - {"diagonal_scale"}  # what a preconditioner offers is compared where there is one
        check_capabilities(needs, self.offers, _WHO)
        self._needs = needs - {"deterministic"}  # of the loss
        self._deterministic = needs & {"deterministic"}

    def bind(self, extra_args: Mapping[str, Any], view: ParameterView) -> VectorField:
        """The field of one update.

        Args:
          extra_args: the keywords of `update`: data by name, and possibly `grad_fn`.
          view: the parameters: which of them move, and in which precision the functions see them.

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
        if self._loss is not None and (gradient is None or self._needs):
            field = self._field_of_loss(self._loss, self._loss.select(extra_args), view)
        if gradient is not None:
            field = self._field_of_gradient(gradient, gradient.select(extra_args), view, field)
        assert field is not None  # for the type checker: the constructor saw to it
        return field.decayed(self._l2)

    def _field_of_loss(self, loss: DataFunction, data: Mapping[str, Any], view: ParameterView) -> VectorField:
        def value(moving: PyTree, stage: Any = 0) -> jax.Array:
            return scalar_loss(_evaluated(loss, view, moving, self._batches.at(data, stage)), self._has_aux)

        def field(moving: PyTree, stage: Any = 0) -> PyTree:
            # Optax's convention: descent follows the conjugate of what jax.grad returns.
            return jax.tree.map(jnp.conj, jax.grad(value)(moving, stage))

        structure = None
        if isinstance(loss.function, ModelLoss):
            structure = _bound_structure(loss.function, self._batches.at(data, 0), view)
        return VectorField(field, value, field, gradient=field, structure=structure)

    def _field_of_gradient(
        self, gradient: DataFunction, data: Mapping[str, Any], view: ParameterView, of_loss: VectorField | None
    ) -> VectorField:
        own = gradient.function.data_of_stage if isinstance(gradient.function, StochasticField) else None

        def field(moving: PyTree, stage: Any = 0) -> PyTree:
            seen = self._batches.at(data, stage)
            result = _evaluated(gradient, view, moving, seen if own is None else own(seen, stage))
            return _tree.cast_like(view.moving(_checked_gradient(result, view.params, self._has_aux)), moving)

        known = VectorField(field) if of_loss is None else dataclasses.replace(of_loss, evaluate=field)
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
    def outputs(moving: PyTree) -> PyTree:
        with explained("the model of loss_fn", view, data):
            return loss.outputs(view.whole(moving), data)

    def of_outputs(values: PyTree) -> jax.Array:
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


def _evaluated(function: DataFunction, view: ParameterView, moving: PyTree, data: Mapping[str, Any]) -> Any:
    with explained(function.role, view, data):
        return function(view.whole(moving), data)


def scalar_loss(result: Any, has_aux: bool, role: str = "loss_fn") -> jax.Array:
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


def _checked_gradient(result: Any, params: PyTree, has_aux: bool) -> PyTree:
    if has_aux:
        if not (isinstance(result, tuple | list) and len(result) == 2):
            raise TypeError(f"With has_aux=True, grad_fn must return (gradient, aux), got {type(result).__name__}.")
        result = result[0]
    check_like_params(result, params, "The result of grad_fn")
    check_kinds(result, params, "The leaves that grad_fn returned")
    return result
