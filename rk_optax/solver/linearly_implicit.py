"""Linearly implicit (Rosenbrock) methods: one or two linear systems a step instead of many short steps."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax._vectors import RealVectors
from rk_optax.field import Capability, Linear, VectorField
from rk_optax.solver._base import Cost, Quantity, Solver, Step, check_offers
from rk_optax.solver._diagonal import DiagonalCurvature
from rk_optax.solver._limited_secant import LimitedSecantState
from rk_optax.solver._linear import Solution
from rk_optax.solver._path import Factored, krylov_path
from rk_optax.solver._secant import SecantState
from rk_optax.solver.linear_solvers import CONJUGATE_GRADIENTS, LinearSolver, check_linear_solver

PyTree = Any
Curvature = Literal["hessian", "gauss_newton", "diagonal", "secant", "limited_secant", "zero"] | DiagonalCurvature
BY_SECANTS = ("secant", "limited_secant")
_Solve = Callable[[Any, PyTree], Solution]
_MOST_OF_DENSE_SECANTS = 4096  # parameters: beyond, the factor of such a matrix takes longer than a hundred gradients


class LinearState(NamedTuple):
    """State of the linearly implicit solvers: what the latest linear solve looked like."""

    iterations: jax.Array  # shape=(), int32: CG iterations of the step; 0 for a diagonal curvature
    residual: jax.Array  # shape=(), float: relative residual of the last linear system
    negative_curvature: jax.Array  # shape=(), bool: whether CG stopped at a direction of negative curvature
    diagonal: PyTree = ()  # a `DiagonalState` where the curvature is such an estimate
    secant: PyTree = ()  # a `SecantState` likewise: P² numbers; of more parameters a `LimitedSecantState`


def _initial_state(diagonal: PyTree = (), secant: PyTree = ()) -> LinearState:
    zero, none, no = jnp.zeros([], _tree.default_float()), jnp.zeros([], jnp.int32), jnp.zeros([], bool)
    return LinearState(none, zero, no, diagonal, secant)


@dataclasses.dataclass(frozen=True)
class _Rosenbrock(Solver):
    """What both methods share: B, and how to solve with it."""

    curvature: Curvature = "gauss_newton"
    tolerance: float = 1e-3
    max_iterations: int = 50
    linear_solver: LinearSolver = dataclasses.field(default=CONJUGATE_GRADIENTS, kw_only=True)

    def __post_init__(self):
        named = self.curvature in ("hessian", "gauss_newton", "diagonal", *BY_SECANTS, "zero")
        if not (named or isinstance(self.curvature, DiagonalCurvature)):
            raise ValueError(
                "curvature must be 'hessian', 'gauss_newton', 'diagonal', 'secant', 'limited_secant', 'zero' or a "
                f"DiagonalCurvature, got {self.curvature!r}."
            )
        if not 0 < _checks.number(self.tolerance, "tolerance", "positive") < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance}.")
        _checks.count(self.max_iterations, "max_iterations")
        check_linear_solver(self.linear_solver)

    @property
    def needs(self) -> frozenset[Capability]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What B is made of and what the linear solver asks of it; a division is for diagonal ones."""
        if self._estimator is not None:
            return frozenset({"product", "diagonal_scale"})
        if self.curvature == "hessian":
            return self.linear_solver.needs.union(("product", "diagonal_scale"))
        if self.curvature in BY_SECANTS:  # of gradients, whose changes show curvature and not noise
            return frozenset({"symmetric", "diagonal_scale", "deterministic"})
        if self.curvature == "zero":
            return frozenset({"diagonal_scale"})
        return frozenset({"gauss_newton", "diagonal_scale"})

    def init(self, params: PyTree) -> LinearState:
        """Nothing has been solved yet."""
        if self.curvature in BY_SECANTS:
            size = RealVectors(params, None).size
            dense = self.curvature == "secant" and size <= _MOST_OF_DENSE_SECANTS
            form = SecantState if dense else LimitedSecantState
            return _initial_state(secant=form.empty(size, _real_dtype(params)))
        return _initial_state(() if self._estimator is None else self._estimator.init(params))

    @property
    def _estimator(self) -> DiagonalCurvature | None:
        if isinstance(self.curvature, DiagonalCurvature):
            return self.curvature
        return DiagonalCurvature() if self.curvature == "diagonal" else None

    def _product(self, field: VectorField, params: PyTree) -> Linear:
        if self.curvature == "hessian":
            return self.linear_solver.linearized(field, params)
        return field.gauss_newton(params)

    def _system(
        self, field: VectorField, params: PyTree, k1: PyTree, state: LinearState
    ) -> tuple[_Solve, dict[str, PyTree], Cost]:
        """`solve(c, b)` for (I + c·PB) x = b, what changes in the state by the estimate of B, and what B cost."""
        if self._estimator is not None:
            rate, diagonal, cost = self._estimator.update(field, params, state.diagonal)
            if field.scale is not None:
                rate = jax.tree.map(jnp.multiply, rate, field.scale)
            return functools.partial(_divide, rate), {"diagonal": diagonal}, cost
        if self.curvature == "zero":
            return functools.partial(_divide, None), {}, Cost()
        if self.curvature in BY_SECANTS:
            vectors = RealVectors(params, state.secant.params.dtype)  # which stage_dtype may exceed
            scale = None if field.scale is None else vectors.diagonal(field.scale)
            k1 = vectors.flatten(k1)
            secant = state.secant.updated(vectors.flatten(params), k1 if scale is None else k1 / scale)

            def by_secants(c: Any, b: PyTree) -> Solution:
                x = secant.solve(c, scale, vectors.flatten(b))
                return _solved(vectors.tree(x))

            return by_secants, {"secant": secant}, Cost()
        # Linearising runs the gradient once more; the iteration then calls its linear part alone.
        product = self._product(field, params)

        def solve(c: Any, b: PyTree) -> Solution:
            return self.linear_solver.solve(
                product, c, b, field.scale, tolerance=self.tolerance, max_iterations=self.max_iterations
            )

        return solve, {}, Cost(gradients=1)


def _real_dtype(params: PyTree) -> Any:
    """The dtype of a vector of all parameters: float32 at least."""
    dtypes = (_tree.real_dtype(leaf) for leaf in jax.tree.leaves(params))
    return _tree.common_dtype(*dtypes, jnp.float32)


def _solved(x: PyTree) -> Solution:
    """A solution that no iteration has found."""
    zero, no = jnp.zeros([], _tree.default_float()), jnp.zeros([], bool)
    return Solution(x, jnp.zeros([], jnp.int32), zero, ~no, ~no, no, zero, zero)


def _divide(rate: PyTree | None, c: Any, b: PyTree) -> Solution:
    """The solution for a diagonal PB."""
    if rate is not None:
        b = jax.tree.map(lambda d, x: x / (1 + jnp.asarray(c, d.dtype) * d), rate, b)
    return _solved(b)


def _total(cost: Cost, gradients: int, *solutions: Solution) -> Cost:
    return cost._replace(
        gradients=cost.gradients + gradients, products=cost.products + sum(s.iterations for s in solutions)
    )


@dataclasses.dataclass(frozen=True)
class RosenbrockEuler(_Rosenbrock):
    """Linearly implicit Euler: (I + hPB) g* = P∇L, θ ← θ − h·g*. Order 1 for any B, L-stable with the exact one.

    As h → ∞ the step becomes Newton's or Gauss–Newton's: h runs from gradient descent to it (pseudo-transient
    continuation), and `rk_optax.trust_ratio_control()` drives it. Costs one gradient beside k1 (to linearise) and a
    Hessian or Gauss–Newton product for each CG iteration.

    CG that stops before `tolerance`, at `max_iterations` or, where B is indefinite as a network's Hessian is, at the
    first direction of negative curvature of I + hB (`state.solver.negative_curvature`), has by then a direction that
    its model descends: that is the step, the truncated Newton method's and not this one's, and `state.solver.residual`
    says how far it is from it. Never use it with a fixed h without watching. A direction that is not finite or does not
    descend is refused (NOT_SOLVED), and with `rk_optax.Gmres()` every one that does not reach `tolerance`.

    Args:
      curvature: B, "gauss_newton" (of a `ModelLoss` or `LeastSquares`; never negative), "hessian" (of any loss; with
        `rk_optax.Gmres()` the Jacobian of any smooth field) or an estimate of its diagonal, "diagonal" or a
        `DiagonalCurvature`, which needs no CG: a product each `every` steps. "secant" is what the steps so far say of
        the Hessian: any loss, no product; its rule is `rk_optax.line_search(first=True)`, and the data are to stay.
        Up to 4,096 parameters it is the self-scaled Broyden method, with P×P numbers; beyond, BFGS of the latest 20
        steps, with 40·P numbers, whose direction for h → ∞ is that of L-BFGS. "limited_secant" is the latter of fewer
        parameters, too: where a gradient takes less time than a P×P matrix.
      tolerance: relative residual at which the linear solver stops, in (0, 1).
      max_iterations: cap on it, in products.
      linear_solver: `rk_optax.ConjugateGradients()`, for symmetric systems, or `rk_optax.Gmres()`, for any.

    Raises:
      TypeError: `linear_solver` is no LinearSolver.
      ValueError: an argument out of its range; at construction of the optimizer, a loss without that structure or a
        preconditioner that is not diagonal.
    """

    @property
    def offers(self) -> frozenset[Quantity]:
        """The fall of the quadratic model with B for its Hessian; where B is a symmetric matrix, the steps of all h."""
        matrix = self.curvature in ("hessian", "gauss_newton") and "symmetric" in self.linear_solver.needs
        return frozenset({"predicted_fall", "path"}) if matrix else frozenset({"predicted_fall"})

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
        """One step; see `Solver.step`."""
        check_offers(self, wants, "This step")
        if "path" in wants:
            return self._path(field, params, k1)
        solve, estimate, cost = self._system(field, params, k1, state)
        solution = solve(h, k1)
        residual = solution.residual.astype(_tree.default_float())
        # In this order no square of a gradient is formed, which in the loss's units may be out of range.
        left = (h * solution.size) * (solution.overlap * solution.size)
        fall = predicted_fall(field, k1, h, solution.x) + 0.5 * left
        new = LinearState(solution.iterations, residual, solution.negative, **estimate)
        return Step(
            solution.x,
            _total(cost, 1, solution),
            solved=solution.usable,
            quantities={"predicted_fall": fall},
            state=new,
            refused_state=new,
        )

    def _path(self, field: VectorField, params: PyTree, k1: PyTree) -> Step:
        """The direction is not computed: it is the rule's choice."""

        def path(of: VectorField) -> Factored:
            own = of is field
            found = krylov_path(of, params, k1 if own else of(params), self._product(of, params), self.max_iterations)
            count = len(found.space)
            new = _initial_state()._replace(
                iterations=jnp.full([], count, jnp.int32), negative_curvature=jnp.any(found.eigenvalues < 0)
            )
            return Factored(found, Cost(gradients=1 if own else 2, products=count), new)

        return Step(k1, Cost(gradients=1), quantities={"path": path})


@dataclasses.dataclass(frozen=True)
class Ros2(_Rosenbrock):
    """ROS2, a two-stage W-method: order 2 for any B, even a wrong one.

    (I + γhPB) k₁ = F(θ), (I + γhPB) k₂ = F(θ + hk₁) − 2k₁, θ ← θ + (3/2)hk₁ + (1/2)hk₂, with F = −P∇L. Costs three
    gradients, k1 and the linearisation included, and a product for each CG iteration. Accuracy needs CG to be accurate:
    `tolerance` is tighter here, and a step one of whose systems does not reach it, by `max_iterations` or for a
    direction of negative curvature, is refused (NOT_SOLVED). A shorter h makes both systems easier.

    Order is not stability: with half of the true curvature, the γ = 1 − 1/√2 that is best for an exact B lets modes
    grow tenfold, and γ = 1 + 1/√2 does not.

    Args:
      curvature: B: "gauss_newton", "hessian", "diagonal" or a `DiagonalCurvature`, "secant", "limited_secant", or
        "zero" (Heun's method).
      tolerance: as for `RosenbrockEuler`.
      max_iterations: as for `RosenbrockEuler`, for each of the two systems.
      gamma: γ; by default 1 − 1/√2 for the Hessian and 1 + 1/√2 for anything less exact.
      linear_solver: as for `RosenbrockEuler`.

    Raises:
      TypeError, ValueError: as for `RosenbrockEuler`.

    Source: Verwer, Spee, Blom and Hundsdorfer (1999).
    """

    tolerance: float = 1e-6
    gamma: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.gamma is not None:
            _checks.number(self.gamma, "gamma", "positive")

    @property
    def error_order(self) -> int:
        """Of the embedded linearly implicit Euler method θ + hk₁."""
        return 1

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
        """One step; see `Solver.step`. Directions are −k of the docstring, so that θ ← θ − h·g*."""
        root = 1 / math.sqrt(2)
        gamma = self.gamma if self.gamma is not None else 1 - root if self.curvature == "hessian" else 1 + root
        solve, estimate, cost = self._system(field, params, k1, state)
        first = solve(gamma * h, k1)
        k2 = field(_tree.add_scaled(params, -h, first.x), 1)
        second = solve(gamma * h, _tree.add_scaled(k2, -2, first.x))
        direction = jax.tree.map(lambda a, b: 1.5 * a + 0.5 * b, first.x, second.x)
        quantities: dict[Quantity, Any] = {}
        if "error" in wants:
            quantities["error"] = _tree.scale(h, jax.tree.map(lambda a, b: 0.5 * (a + b), first.x, second.x))
        residual = jnp.maximum(first.residual, second.residual).astype(_tree.default_float())
        negative = first.negative | second.negative
        new = LinearState(first.iterations + second.iterations, residual, negative, **estimate)
        return Step(
            direction,
            _total(cost, 2, first, second),
            solved=first.converged & second.converged,
            quantities=quantities,
            state=new,
            refused_state=new,
        )


def predicted_fall(field: VectorField, k1: PyTree, h: Any, direction: PyTree) -> jax.Array:
    """L(θ) − m(θ − h·g*) = h(⟨∇L, g*⟩ + ⟨g*, P⁻¹g*⟩)/2 for g* that solves (I + hPB) g* = P∇L, m with Hessian B.

    Exact also for an iterate of CG on that system, whose residual is orthogonal to it; else h⟨g*, residual⟩/2 comes on
    top.
    """
    if field.scale is not None:
        k1, unscaled = (jax.tree.map(jnp.divide, tree, field.scale) for tree in (k1, direction))
    else:
        unscaled = direction
    # h·g* first: the product of two gradients may be out of range, in the units of the loss, where the fall is not.
    return 0.5 * _tree.inner(jax.tree.map(jnp.add, k1, unscaled), _tree.scale(h, direction))
