"""What is solved: the vector field of a gradient flow on one update's data, and what it offers beside its values.

An `rk_optax.objective.Objective` is read once, when the transformation is built, and knows which keywords of `update`
are its data. Each update binds it to that update's data, as a `VectorField`: the field a solver integrates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax._explanations import Linear, linearized
from rk_optax.rows import Rows

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from rk_optax._tree import Tree

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


def check_capabilities(needs: frozenset[Capability], offers: frozenset[Capability], who: str) -> None:
    """Raises a ValueError, with the remedy, where `who` needs what a field does not offer, or no field has."""
    for capability in sorted(needs - offers):
        if capability not in _REMEDIES:
            raise ValueError(f"needs has {capability!r}, which no field has; there are {', '.join(_REMEDIES)}.")
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
      ValueError: `symmetric` is no bool.
    """

    grad_fn: Callable[..., Any]
    symmetric: bool = False

    def __post_init__(self):
        if not callable(self.grad_fn):
            raise TypeError(f"grad_fn must be callable, got {type(self.grad_fn).__name__}.")
        _checks.flags(self, "symmetric")
        object.__setattr__(self, "__wrapped__", self.grad_fn)  # its signature names the data

    def __call__(self, params: Tree, *args: Any, **data: Any) -> Tree:
        """The field at `params`."""
        return self.grad_fn(params, *args, **data)


@dataclasses.dataclass(frozen=True)
class BoundStructure:
    """A `ModelLoss` on one update's data, as functions of the moving leaves."""

    outputs: Callable[[Tree], Tree]
    of_outputs: Callable[[Tree], Float[Array, ""]]
    rows: Callable[[Tree], Rows] | None = None  # of least squares
    count_rows: Callable[[Tree], int] | None = None
    residual: Callable[[Tree], Float[Array, " n"]] | None = None


class Known(NamedTuple):
    """What has been evaluated where an update starts, so that nobody evaluates it there again."""

    params: Tree  # θ: the very object, since what is traced has no values to compare
    loss: Float[Array, ""]  # L(θ)
    rows: Rows | None  # of least squares, where they were formed


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
      value_and_gradient: the loss and the field of stage 1 in one pass, never preconditioned; None without a loss.
      losses_beside: losses that `value_and_gradient` costs beside the gradient: 1 where a `grad_fn` makes that.
      known: what has been evaluated at the params of the update.
      plain: `evaluate` as it was before preconditioning, or None where there was none.
      fewer_points: see `on_fewer_points`; None where the loss does not know its points.
      landing: `landing(change) -> params`, where an update of the params of stage 1 leads once it is rounded to the
        caller's dtypes; None where nothing is rounded.
    """

    evaluate: Callable[[Tree, Any], Tree]
    objective: Callable[[Tree], Float[Array, ""]] | None = None
    smooth_field: Callable[[Tree], Tree] | None = None
    rounding: float = 0.0
    gradient: Callable[[Tree], Tree] | None = None
    structure: BoundStructure | None = None
    l2: float | Float[Array, ""] | None = None
    scale: Tree | None = None
    symmetric: bool = True
    decay: Callable[[Tree], Tree] | None = None
    value_and_gradient: Callable[[Tree], tuple[Float[Array, ""], Tree]] | None = None
    losses_beside: int = 0
    known: Known | None = None
    plain: Callable[[Tree, Any], Tree] | None = None
    fewer_points: Callable[[int], VectorField | None] | None = None
    landing: Callable[[Tree], Tree] | None = None

    def __post_init__(self):
        _checks.flags(self, "symmetric")

    def __call__(self, params: Tree, stage: int | jax.Array = 0) -> Tree:
        """The gradient at `params`: what the flow follows downhill. `stage` may be traced. Costs one gradient."""
        return self.evaluate(params, stage)

    def unpreconditioned(self, params: Tree) -> Tree:
        """The gradient at `params` without preconditioner, on the data of stage 1. Costs one gradient."""
        return (self.evaluate if self.plain is None else self.plain)(params, 0)

    def loss(self, params: Tree) -> Float[Array, ""]:
        """The loss at `params`, a scalar, on the data of stage 1. Costs one loss, or nothing where it is known."""
        if self.known is not None and params is self.known.params:
            return self.known.loss
        if self.objective is None:
            raise ValueError(f"This field has no loss: {_REMEDIES['loss']}.")
        return self.objective(params)

    def landed(self, params: Tree, change: Tree) -> Tree:
        """Where `change` leads from the `params` of stage 1, to the rounding of the caller's dtypes."""
        return jax.tree.map(jnp.add, params, change) if self.landing is None else self.landing(change)

    def losses_at(self, params: Tree) -> int:
        """What `loss` costs at `params`: 0 where it is known, else 1."""
        return int(self.known is None or params is not self.known.params)

    def started(self, params: Tree, *, by_rows: bool = False) -> tuple[Tree, VectorField]:
        """The field at `params` and this field, which from then on knows the loss there.

        Costs one gradient, or `by_rows` the rows and no gradient: ½‖r‖² and Rᵀr.
        """
        if self.value_and_gradient is None:
            raise ValueError(f"This field has no loss: {_REMEDIES['loss']}.")
        if not by_rows:
            loss, gradient = self.value_and_gradient(params)
            return gradient, dataclasses.replace(self, known=Known(params, loss, None))
        rows = self.rows(params)
        gradient = self.with_l2(rows.gradient, params)
        return gradient, dataclasses.replace(self, known=Known(params, self._loss_of(rows.residual, params), rows))

    def _loss_of(self, residual: Float[Array, " n"], params: Tree) -> Float[Array, ""]:
        loss = 0.5 * _tree.inner(residual, residual)
        if self.l2 is None:
            return loss
        square = _tree.inner(params, params)
        return loss + jnp.asarray(0.5 * self.l2, square.dtype) * square

    def product(self, params: Tree, vector: Tree) -> Tree:
        """The field's Jacobian at `params` times `vector`, on the data of stage 1. Costs one product."""
        if self.smooth_field is None:
            raise ValueError(f"This field has no Hessian-vector product: {_REMEDIES['product']}.")
        return jax.jvp(self.smooth_field, (params,), (vector,))[1]

    def hessian(self, params: Tree) -> Linear:
        """V ↦ ∇²L v at `params`, without preconditioner, linearised once. Costs one gradient; each call one product."""
        if not self.symmetric:
            raise ValueError(f"This field has no Hessian: {_REMEDIES['symmetric']}.")
        return self.jacobian(params)

    def jacobian(self, params: Tree) -> Linear:
        """Like `hessian`, of a field that need not be symmetric."""
        if self.gradient is None:
            raise ValueError(f"This field has no Jacobian: {_REMEDIES['product']}.")
        return linearized(self.gradient, params)[1]

    def gauss_newton(self, params: Tree) -> Linear:
        """V ↦ (Jᵀ(∇²output_loss)J + λI) v, without preconditioner, linearised once. Each call costs one product."""
        structure = self._structured("gauss_newton")
        outputs, push = linearized(structure.outputs, params)
        pull = jax.linear_transpose(push, params)
        curve = jax.linearize(jax.grad(structure.of_outputs), outputs)[1]

        def product(v: Tree) -> Tree:
            # The transpose of a complex linear map is not its adjoint.
            result = jax.tree.map(jnp.conj, pull(curve(push(v)))[0])
            return self.with_l2(result, v)

        return product

    def rows(self, params: Tree) -> Rows:
        """Residuals and their Jacobian, without preconditioner and without the L2 term. Costs N rows, unless known.

        In which form they stand, whole or split over devices, is behind the products that `rk_optax.Rows` has.
        """
        known = self._known_rows(params)
        if known is not None:
            return known
        structure = self._structured("rows")
        if structure.rows is None:
            raise ValueError(f"This field has no residuals: {_REMEDIES['rows']}.")
        return structure.rows(params)

    def residual(self, params: Tree) -> Float[Array, " n"]:
        """The residuals alone, flat, in the order of `rows`. Costs one loss, unless known."""
        known = self._known_rows(params)
        if known is not None:
            return known.residual
        structure = self._structured("rows")
        if structure.residual is None:
            raise ValueError(f"This field has no residuals: {_REMEDIES['rows']}.")
        return structure.residual(params)

    def knows_rows(self, params: Tree) -> bool:
        """Whether the rows at `params` have been formed already."""
        return self._known_rows(params) is not None

    def _known_rows(self, params: Tree) -> Rows | None:
        return self.known.rows if self.known is not None and params is self.known.params else None

    def count_rows(self, params: Tree) -> int:
        """N, the number of residuals, an integer also under jit. Costs nothing."""
        structure = self._structured("rows")
        return 0 if structure.count_rows is None else structure.count_rows(params)

    def on_fewer_points(self, divisor: int) -> VectorField | None:
        """This field on one of `divisor` of the points of its loss, whose scale stays; None where it has no points."""
        return None if self.fewer_points is None else self.fewer_points(divisor)

    def _with_fewer(self, change: Callable[[VectorField], VectorField]) -> Callable[[int], VectorField | None] | None:
        """`fewer_points` of the field that `change` makes of this one."""

        def fewer(divisor: int) -> VectorField | None:
            field = self.on_fewer_points(divisor)
            return None if field is None else change(field)

        return None if self.fewer_points is None else fewer

    def _structured(self, capability: Capability) -> BoundStructure:
        if self.structure is None:
            raise ValueError(f"This field has no {capability!r}: {_REMEDIES[capability]}.")
        return self.structure

    def with_l2(self, gradient: Tree, params: Tree) -> Tree:
        """The gradient of the whole objective from one of the loss without its term (λ/2)‖θ‖²."""
        return gradient if self.l2 is None else _tree.add_scaled(gradient, self.l2, params)

    def decayed(self, l2: float | Float[Array, ""] | None) -> VectorField:
        """This field, of a loss without such a term, with (λ/2)‖θ‖² added: everything but `rows` sees it."""
        if l2 is None:
            return self
        whole = dataclasses.replace(self, l2=l2)

        def plus_decay(field: Callable[..., Tree] | None) -> Any:
            return None if field is None else lambda params, *stage: whole.with_l2(field(params, *stage), params)

        def with_term(loss: jax.Array, params: Tree) -> jax.Array:
            return loss + 0.5 * l2 * _tree.inner(params, params)

        def plus_term(params: Tree) -> jax.Array:
            assert self.objective is not None  # for the type checker
            return with_term(self.objective(params), params)

        def plus_both(params: Tree) -> tuple[Float[Array, ""], Tree]:
            assert self.value_and_gradient is not None  # for the type checker
            loss, gradient = self.value_and_gradient(params)
            return with_term(loss, params), whole.with_l2(gradient, params)

        return dataclasses.replace(
            whole,
            evaluate=plus_decay(self.evaluate),
            smooth_field=plus_decay(self.smooth_field),
            gradient=plus_decay(self.gradient),
            objective=None if self.objective is None else plus_term,
            value_and_gradient=None if self.value_and_gradient is None else plus_both,
            fewer_points=self._with_fewer(lambda field: field.decayed(l2)),
        )

    def preconditioned(self, apply: Callable[[Tree], Tree], scale: Tree | None = None) -> VectorField:
        """The field that is `apply` of this one, and whose products are those of that field."""
        smooth = self.smooth_field
        return dataclasses.replace(
            self,
            scale=scale,
            evaluate=lambda params, stage: apply(self.evaluate(params, stage)),
            smooth_field=None if smooth is None else lambda params: apply(smooth(params)),
            plain=self.evaluate if self.plain is None else self.plain,
            fewer_points=self._with_fewer(lambda field: field.preconditioned(apply, scale)),
        )

    def reversed(self) -> VectorField:
        """The field of the loss −L, whose time runs backward. No structure is left: −L is no sum of squares."""

        def negative(function: Callable[..., Tree] | None) -> Callable[..., Tree] | None:
            return None if function is None else lambda *args: jax.tree.map(jnp.negative, function(*args))

        return dataclasses.replace(
            self,
            evaluate=lambda params, stage: jax.tree.map(jnp.negative, self.evaluate(params, stage)),
            objective=negative(self.objective),
            smooth_field=negative(self.smooth_field),
            gradient=negative(self.gradient),
            plain=negative(self.plain),
            structure=None,
            value_and_gradient=None,
            known=None,
            fewer_points=None,
        )
