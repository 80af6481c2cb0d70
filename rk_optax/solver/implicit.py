"""Implicit Runge–Kutta methods by a capped Newton–Krylov iteration: references, and stable steps of any length."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax import _checks, _tree
from rk_optax.field import Capability, Linear, VectorField
from rk_optax.solver._base import Cost, Quantity, Solver, Step, check_offers
from rk_optax.solver._linear import combined, mixed
from rk_optax.solver.linear_solvers import CONJUGATE_GRADIENTS, LinearSolver, check_linear_solver
from rk_optax.tableau import ButcherTableau

PyTree = Any


class ImplicitState(NamedTuple):
    """State of `Implicit`: how the latest step was solved."""

    iterations: jax.Array  # shape=(), int32: Newton iterations, all stages together
    linear_iterations: jax.Array  # shape=(), int32: products with the Hessian in their linear systems
    residual: jax.Array  # shape=(), float: of the stage equations, relative to the displacements; the largest


class _Solved(NamedTuple):
    """How Newton's iteration ended."""

    iterations: jax.Array  # corrections
    linearisations: jax.Array
    evaluations: jax.Array  # of the residual
    linear_iterations: jax.Array
    residual: jax.Array
    converged: jax.Array

    def then(self, other: _Solved) -> _Solved:
        """Both, one after the other."""
        return _Solved(
            self.iterations + other.iterations,
            self.linearisations + other.linearisations,
            self.evaluations + other.evaluations,
            self.linear_iterations + other.linear_iterations,
            jnp.maximum(self.residual, other.residual),
            self.converged & other.converged,
        )


class _Correction(NamedTuple):
    """An approximate solution of Newton's linear system."""

    change: PyTree
    products: jax.Array
    left: jax.Array  # relative residual of the linear system
    sound: jax.Array  # bool: no negative curvature was met


# From a right-hand side and the relative residual to reach.
_Correct = Callable[[PyTree, jax.Array], _Correction]


@dataclasses.dataclass(frozen=True)
class Implicit(Solver):
    """The implicit Runge–Kutta method of a tableau: g* = Σ b_i k_i, k_i = g(θ − h d_i), d_i = Σ_j a_ij k_j, g = P∇L.

    Stages that depend on earlier ones and themselves alone (a lower triangular) are solved one after the other, by
    Newton's method with conjugate gradients, which I + h·a_ii·P∇²L is made for. Coupled stages are solved together,
    with one Hessian, at the centre of the stages: the eigenvalues μ of a turn the system into (I + hμP∇²L) y = b, which
    is complex, but a shift of a symmetric one. Where the field is the gradient of no loss, as in a game, the linear
    systems are not symmetric, and `linear_solver=rk_optax.Gmres()` solves them. The unknowns are the d_i: positions
    would lose the digits of a tiny h, and the k_i of a stiff field cancel. A stage has converged where its residual, or
    the last correction of a well-solved linear system, is within `tolerance` of d in the norm of P^(−1), or below eight
    times what rounding of θ does to each number of θ − hd; or the residual below eight times what it does to the field,
    for which one Hessian product is spent where the residual has stopped to fall. On a convex loss that bounds the
    error. One Hessian serves two corrections where the rate of convergence says that the second will do.

    A step whose stages do not converge is refused (NOT_SOLVED), and at a fixed h it will be refused again: shorten h,
    or let `rk_optax.descent_control()` do so. On a loss that is not convex the equations of a long step may have
    several solutions or none.

    Cost: k1, for each Newton iteration at most two gradients (the linearisation and the residual; for s coupled stages
    s + 1), and a Hessian product for each linear iteration. Memory: the s stages and a few trees, whatever the
    iterations.

    Args:
      tableau: an implicit tableau, such as `rk_optax.IMPLICIT_TABLEAUS["sdirk3"]`: lower triangular and explicit at
        most in its first stage, or with an a that can be inverted and diagonalised.
      tolerance: of the stage equations, in (0, 1); never tighter than 32 units of rounding.
      max_iterations: cap on Newton's iterations, for each stage.
      max_linear_iterations: cap on the products of one linear system.
      linear_solver: `rk_optax.ConjugateGradients()`, for symmetric Jacobians, or `rk_optax.Gmres()`, for any.

    Raises:
      TypeError: `tableau` is not a ButcherTableau, or `linear_solver` no LinearSolver.
      ValueError: the tableau is explicit or of none of these forms; an argument out of its range; at construction of
        the optimizer, a `grad_fn` without a loss or a preconditioner that is not diagonal; a field whose Jacobian is
        not symmetric, with a linear solver that needs that.

    Source: Hairer and Wanner, "Solving Ordinary Differential Equations II" (1996), IV.6 and IV.8.
    """

    tableau: ButcherTableau
    tolerance: float = 1e-5
    max_iterations: int = 10
    max_linear_iterations: int = 100
    linear_solver: LinearSolver = CONJUGATE_GRADIENTS

    def __post_init__(self):
        tableau = self.tableau
        if not isinstance(tableau, ButcherTableau):
            raise TypeError(f"tableau must be a ButcherTableau, got {type(tableau).__name__}.")
        if tableau.is_explicit:
            raise ValueError(
                f"The tableau {tableau.name!r} is explicit, so there is nothing to solve: use rk_optax.Explicit."
            )
        if self._one_by_one and not np.diagonal(tableau.a)[1:].all():
            raise ValueError(
                f"The tableau {tableau.name!r} has an explicit stage after the first (a zero on the diagonal of a), "
                "which Implicit does not solve. Use another, such as sdirk3 in rk_optax.IMPLICIT_TABLEAUS."
            )
        if not self._one_by_one and not max(np.linalg.cond(m) for m in (tableau.a, np.linalg.eig(tableau.a)[1])) < 1e6:
            raise ValueError(
                f"The tableau {tableau.name!r} has coupled stages and an a that cannot be inverted and diagonalised, "
                "as Implicit does. Use another method, such as radau3 in rk_optax.IMPLICIT_TABLEAUS."
            )
        if not 0 < _checks.number(self.tolerance, "tolerance", "positive") < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance}.")
        for name in ("max_iterations", "max_linear_iterations"):
            _checks.count(getattr(self, name), name)
        check_linear_solver(self.linear_solver)

    @property
    def needs(self) -> frozenset[Capability]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Products with the Jacobian, and what the linear solver asks of it."""
        return self.linear_solver.needs.union(("product", "diagonal_scale", "deterministic"))

    @property
    def error_order(self) -> int | None:
        """The lower of the orders of the two methods, where the tableau has two."""
        order = self.tableau.order_hat
        return None if order is None else min(order, self.tableau.order)

    def init(self, params: PyTree) -> ImplicitState:
        """Nothing has been solved yet."""
        del params
        return ImplicitState(*(jnp.zeros([], dtype) for dtype in (jnp.int32, jnp.int32, _tree.default_float())))

    def step(
        self,
        field: VectorField,
        params: PyTree,
        k1: PyTree,
        h: Any,
        state: PyTree,
        *,
        wants: frozenset[Quantity] = frozenset(),
    ) -> Step:
        """One step; see `Solver.step`. `h` may be zero or traced."""
        del state
        tableau = self.tableau
        check_offers(self, wants, "This step")
        solve = self._sequential if self._one_by_one else self._coupled
        ds, solved = solve(field, params, k1, h)
        new = ImplicitState(solved.iterations, solved.linear_iterations, solved.residual)
        gradients = solved.linearisations + solved.evaluations * (1 if self._one_by_one else tableau.stages)
        quantities: dict[Quantity, Any] = {}
        if "error" in wants and tableau.b_hat is not None:
            quantities["error"] = _tree.scale(h, self._weighted(tableau.b - tableau.b_hat, k1, ds))
        return Step(
            self._weighted(tableau.b, k1, ds),
            Cost(gradients=1 + gradients, products=solved.linear_iterations),
            finite=jnp.isfinite(solved.residual),
            solved=solved.converged,
            quantities=quantities,
            state=new,
            refused_state=new,
        )

    @property
    def _one_by_one(self) -> bool:
        return not np.triu(self.tableau.a, 1).any()

    @property
    def _blocks(self) -> tuple[np.ndarray, np.ndarray | None]:
        """The rows and columns of a that belong to implicit stages, and their column of an explicit first stage."""
        a = self.tableau.a
        return (a, None) if a[0].any() else (a[1:, 1:], a[1:, 0])

    def _weighted(self, weights: np.ndarray, k1: PyTree, ds: PyTree) -> PyTree:
        """Σ w_i k_i from the displacements: w·a⁻¹ of them, which is the last one for a stiffly accurate method."""
        a, explicit = self._blocks
        of_ds = np.linalg.solve(a.T, weights[-len(a) :])
        # Zeros but for rounding must be zeros: in a stiff field k1 is huge.
        of_ds = np.where(np.abs(of_ds) < 1e-14, 0, of_ds)
        total = combined(of_ds, ds)
        if explicit is None:
            return total
        of_k1 = weights[0] - of_ds @ explicit
        return total if abs(of_k1) < 1e-14 else _tree.add_scaled(total, of_k1, k1)

    def _sequential(self, field: VectorField, params: PyTree, k1: PyTree, h: Any) -> tuple[PyTree, _Solved]:
        """The displacements of a lower triangular tableau, stacked; the loss is traced once, whatever s is."""
        a, explicit = self._blocks
        explicit = np.zeros(len(a)) if explicit is None else explicit
        # What the earlier stages contribute to d_i, in terms of their own displacements and k1.
        of_ds = np.tril(np.tril(a, -1) @ np.linalg.inv(a), -1)
        of_k1 = explicit - of_ds @ explicit

        def stage(carry: tuple[PyTree, _Solved], inputs: Any) -> tuple[tuple[PyTree, _Solved], None]:
            ds, before = carry
            i, own, row, first = inputs
            known = _tree.add_scaled(combined(row, ds), first, k1)

            def residual(d: PyTree) -> PyTree:
                k = field(_tree.add_scaled(params, -h, d), i + len(self.tableau.a) - len(a))
                return jax.tree.map(jnp.subtract, d, _tree.add_scaled(known, own, k))

            def linearize(d: PyTree) -> tuple[Linear, _Correct]:
                product = self.linear_solver.linearized(field, _tree.add_scaled(params, -h, d))

                def correct(defect: PyTree, tolerance: jax.Array) -> _Correction:
                    limits = {"tolerance": tolerance, "max_iterations": self.max_linear_iterations}
                    found = self.linear_solver.solve(product, h * own, defect, field.scale, **limits)
                    return _Correction(found.x, found.iterations, found.residual, ~found.negative)

                return product, correct

            defect = _tree.scale(-1, _tree.add_scaled(known, own, k1))
            d, solved = self._newton(defect, residual, linearize, own, params, h, field.scale)
            ds = jax.tree.map(lambda slots, new: jax.lax.dynamic_update_index_in_dim(slots, new, i, 0), ds, d)
            return (ds, before.then(solved)), None

        inputs = jax.tree.map(jnp.asarray, (np.arange(len(a)), np.diagonal(a), of_ds, of_k1))
        return jax.lax.scan(stage, (_stacked(jax.tree.map(jnp.zeros_like, k1), len(a)), _nothing_solved()), inputs)[0]

    def _coupled(self, field: VectorField, params: PyTree, k1: PyTree, h: Any) -> tuple[PyTree, _Solved]:
        """The displacements of any tableau, stacked, by Newton's method with one Hessian for all of them."""
        a = self.tableau.a

        def residual(ds: PyTree) -> PyTree:
            ks = jax.lax.map(lambda d: field(_tree.add_scaled(params, -h, d), 0), ds)
            return jax.tree.map(jnp.subtract, ds, mixed(a, ks))

        def linearize(ds: PyTree) -> tuple[Linear, _Correct]:
            centre = _tree.add_scaled(params, -h, combined(np.full(len(a), 1 / len(a)), ds))
            product = self.linear_solver.linearized(field, centre)

            def correct(defect: PyTree, tolerance: jax.Array) -> _Correction:
                limits = {"tolerance": tolerance, "max_iterations": self.max_linear_iterations}
                found = self.linear_solver.solve_coupled(product, h, a, defect, field.scale, **limits)
                return _Correction(found.x, found.products, found.residual, jnp.ones([], bool))

            return product, correct

        defect = _tree.scale(-1, mixed(a, _stacked(k1, len(a))))
        return self._newton(defect, residual, linearize, np.linalg.norm(a), params, h, field.scale)

    def _newton(
        self,
        defect: PyTree,
        residual: Callable[[PyTree], PyTree],
        linearize: Callable[[PyTree], tuple[Linear, _Correct]],
        weight: Any,
        params: PyTree,
        h: Any,
        scale: PyTree | None,
    ) -> tuple[PyTree, _Solved]:
        """Solves residual(d) = 0 from d = 0, whose residual is `defect`; `weight` is that of the field in it.

        From θ, that is, where the residual is known: h·k of an earlier stage may lead anywhere on a stiff loss.
        """

        def size(x: PyTree) -> jax.Array:
            # The inverse of I + haP∇²L of a convex loss shrinks what is measured in this norm.
            return _tree.norm(_over_root(x, scale))

        rounding = _tree.unit_roundoff(defect)
        tolerance = max(self.tolerance, 32 * rounding)
        # Near a minimum d is as small as the rounding of the field. What θ − hd cannot show need not be solved for.
        reach = 8 * rounding * _tree.ratio(jnp.ones([]), jnp.asarray(h))

        def visible(x: PyTree) -> PyTree:
            def beyond(leaf: jax.Array, theta: jax.Array) -> jax.Array:
                # A stage more than θ has axes, where the stages are stacked.
                theta = jnp.abs(theta).reshape((1,) * (leaf.ndim - theta.ndim) + theta.shape)
                return jnp.maximum(jnp.abs(leaf) - reach.astype(theta.dtype) * theta, 0)

            return jax.tree.map(beyond, x, params)

        def with_one_hessian(carry: Any) -> Any:
            """Corrections with the Hessian at d: one, and further ones where it will do for them."""
            d, defect, new, solved, stalled, _ = carry
            product, correct = linearize(d)
            noise, spent = _noise(product, params, scale, stalled)
            solved = solved._replace(
                linear_iterations=solved.linear_iterations + spent, linearisations=solved.linearisations + 1
            )
            rate = jnp.ones_like(new)  # nothing is known of it
            carry = d, defect, new, solved, rate, jnp.ones([], bool)
            d, defect, new, solved, rate, _ = jax.lax.while_loop(
                lambda carry: go_on(carry) & carry[-1], functools.partial(correction, correct, weight * noise), carry
            )
            return d, defect, new, solved, rate > 0.1, jnp.ones([], bool)

        def correction(correct: _Correct, noise: jax.Array, carry: Any) -> Any:
            d, defect, old, before, rate, _ = carry
            # No more exactly than the stage is wanted: as exactly as it is at first, where Newton may end at once.
            least = 0.1 * self.tolerance
            found = correct(defect, jnp.clip(least * _tree.ratio(size(d), old), least, 0.1))
            d = jax.tree.map(jnp.subtract, d, found.change)
            length = size(d)
            wanted = tolerance * length + 8 * noise
            left = found.left * old
            # Evaluated and not foreseen by the rate: that may be small by chance, where two effects cancel.
            defect = residual(d)
            new = size(defect).astype(old.dtype)
            # Rounding in a stiff field keeps the residual up. A small correction then says the same, if well solved;
            # not one that is small beside that rounding alone, which grows with the field, as with an exponential.
            settled = found.sound & (size(visible(found.change)) + left <= tolerance * length)
            relative = _tree.ratio(new, length).astype(before.residual.dtype)
            solved = _Solved(
                before.iterations + 1,
                before.linearisations,
                before.evaluations + 1,
                before.linear_iterations + found.products,
                relative,
                (size(visible(defect)) <= wanted) | (settled & jnp.isfinite(relative)),
            )
            rate = _tree.ratio(new, old)
            return d, defect, new, solved, rate, 10 * rate * new <= wanted

        def go_on(carry: Any) -> jax.Array:
            solved = carry[3]
            return ~solved.converged & (solved.iterations < self.max_iterations) & jnp.isfinite(solved.residual)

        first = size(defect)
        # NaN in k1 is no residual, and is not solved.
        known = _nothing_solved()._replace(converged=first == 0)
        start = jax.tree.map(jnp.zeros_like, defect), defect, first, known, jnp.zeros([], bool), jnp.ones([], bool)
        d, _, _, solved, _, _ = jax.lax.while_loop(go_on, with_one_hessian, start)
        return d, solved


def _over_root(x: PyTree, scale: PyTree | None) -> PyTree:
    """P^(−1/2) x, for one tree or stacked ones."""
    if scale is None:
        return x

    def divided(leaf: jax.Array, p: jax.Array) -> jax.Array:
        return leaf / jnp.sqrt(p).reshape((1,) * (leaf.ndim - p.ndim) + p.shape)

    return jax.tree.map(divided, x, scale)


def _noise(product: Linear, params: PyTree, scale: PyTree | None, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """‖P^(1/2)Hz‖ for z = ±uθ, u the rounding: of the field, where θ is rounded. And the products spent."""

    def measure() -> jax.Array:
        signs = _tree.random_signs(jax.random.key(0), params)
        rounded = _tree.scale(_tree.unit_roundoff(params), jax.tree.map(jnp.multiply, signs, params))
        change = product(rounded)
        return _tree.norm(change if scale is None else jax.tree.map(lambda x, p: jnp.sqrt(p) * x, change, scale))

    nothing = jnp.zeros([], jax.eval_shape(measure).dtype)
    return jax.lax.cond(wanted, measure, lambda: nothing), wanted.astype(jnp.int32)


def _nothing_solved() -> _Solved:
    zero = jnp.zeros([], jnp.int32)
    return _Solved(zero, zero, zero, zero, jnp.zeros([], _tree.default_float()), jnp.ones([], bool))


def _stacked(k: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda x: jnp.stack([x] * count), k)
