"""Linearly implicit Euler for least squares, by one factorisation in the smaller of the two spaces."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver._base import Cost, Quantity, Solver, Step, check_offers
from rk_optax.solver._linear import real_matmul, solve_in_row_space, solver_of_positive
from rk_optax.solver._path import ParameterPath, RealVectors, least_squares_path
from rk_optax.solver.linearly_implicit import RosenbrockEuler, predicted_fall

PyTree = Any
_ROWS, _PARAMETERS, _PRODUCTS = 0, 1, 2


class ResidualEulerState(NamedTuple):
    """State of `ResidualEuler`: what the latest linear solve looked like."""

    form: jax.Array  # shape=(), int32: 0 for the N×N matrix of the residuals, 1 for the P×P one, 2 for CG without any
    iterations: jax.Array  # shape=(), int32: of CG; 0 where one factor served all step sizes
    residual: jax.Array  # shape=(), float: relative residual of the linear system, by CG's recurrence; 0 likewise


@dataclasses.dataclass(frozen=True)
class ResidualEuler(Solver):
    """Linearly implicit Euler for least squares, its linear system solved directly in the smaller of two spaces.

    With R the Jacobian of the N residuals r by the P parameters, and B = RᵀR + λI, the step solves
    (I + hPB) g* = P∇L. Where N < P that is done in the space of the residuals, with one N×N matrix: Q = P/(1 + hλP),
    g* = Q(Rᵀy + λθ) with (I + hRQRᵀ) y = r − hλRQθ; else with the P×P matrix B itself. `state.solver.form` says which.
    The same step as `RosenbrockEuler("gauss_newton")` with CG run to the end. Costs N Jacobian rows; the gradient that
    comes in is used for the predicted fall alone.

    Under `rk_optax.path_control` the matrix is reduced to tridiagonal form, once for all h; in float32, where the
    matrix keeps too few digits for that, R itself into singular vectors. Under any other rule a Cholesky factor of the
    matrix preconditions the few iterations of CG that make good its rounding (`state.solver.iterations`; one while h is
    small).

    Args:
      max_rows: the largest matrix that is formed, N×N or P×P; where both are larger the system is solved by CG alone,
        as by `RosenbrockEuler`.
      tolerance: relative error of g* at which CG stops, in (0, 1), for a Jacobian of full rank; for CG alone, relative
        residual.
      max_iterations: cap on either CG.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a loss that is no
        `rk_optax.LeastSquares` or a preconditioner that is not diagonal.
    """

    max_rows: int = 4096
    tolerance: float = 1e-4
    max_iterations: int = 100

    def __post_init__(self):
        _checks.count(self.max_rows, "max_rows")
        self._beyond  # noqa: B018 # checks the rest

    @property
    def needs(self) -> frozenset[Capability]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Residuals, and their Gauss–Newton matrix where there are too many; symmetric with a diagonal P alone."""
        return frozenset({"rows", "gauss_newton", "diagonal_scale"})

    @property
    def offers(self) -> frozenset[Quantity]:
        """The fall of the Gauss–Newton model, and the steps of all h."""
        return frozenset({"predicted_fall", "path"})

    def init(self, params: PyTree) -> ResidualEulerState:
        """Nothing has been solved yet."""
        del params
        return _state(_ROWS, jnp.zeros([], jnp.int32), jnp.zeros([]))

    @property
    def _beyond(self) -> RosenbrockEuler:
        return RosenbrockEuler("gauss_newton", self.tolerance, self.max_iterations)

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
        """One step; see `Solver.step`. Where a path is wanted the direction is left to the rule's choice."""
        check_offers(self, wants, "This step")
        count = field.count_rows(params)
        size = _real_size(params)
        if "path" in wants:
            # With both, the N×N matrix would change with h.
            parameters = size <= count or (field.l2 is not None and field.scale is not None)
            if (size if parameters else count) > self.max_rows:
                return self._by_products(self._beyond.step(field, params, k1, h, (), wants=wants))
            path = least_squares_path(field, params, parameters=parameters)
            new = _state(_PARAMETERS if parameters else _ROWS, jnp.zeros([], jnp.int32), jnp.zeros([]))
            return Step(k1, Cost(gradients=1, rows=count), quantities={"path": path}, state=new, refused_state=new)
        if min(count, size) > self.max_rows:
            return self._by_products(self._beyond.step(field, params, k1, h, (), wants=wants))
        solve = _in_parameter_space if size <= count else _in_row_space
        direction, left, form, iterations, relative, solved = solve(
            field, params, h, tolerance=self.tolerance, max_iterations=self.max_iterations
        )
        new = _state(form, iterations, relative)
        # An h so large that numbers of g* are below the smallest one would otherwise be a step without them, or of 0.
        before, after = _tree.norm(k1), _tree.norm(direction)
        least = float(jnp.finfo(after.dtype).tiny) * 1e4
        lost = (before > least) & (after < least)
        return Step(
            direction,
            Cost(gradients=1, rows=count),
            solved=solved & ~lost,
            quantities={"predicted_fall": predicted_fall(field, k1, h, direction) + left},
            state=new,
            refused_state=new,
        )

    def _by_products(self, step: Step) -> Step:
        new = _state(_PRODUCTS, step.state.iterations, step.state.residual)
        return step._replace(state=new, refused_state=new)


def _state(form: int, iterations: jax.Array, residual: jax.Array) -> ResidualEulerState:
    return ResidualEulerState(jnp.full([], form, jnp.int32), iterations, residual.astype(_tree.default_float()))


def _real_size(params: PyTree) -> int:
    return sum(leaf.size * (2 if jnp.iscomplexobj(leaf) else 1) for leaf in jax.tree.leaves(params))


def _rows(field: VectorField, params: PyTree) -> tuple[RealVectors, jax.Array, jax.Array, jax.Array]:
    """Vectors in one dtype for the linear algebra, the residuals, their rows, and the preconditioner's diagonal."""
    # Without the barrier XLA fuses the rows into their products, which then cost twice as much.
    residual, rows = jax.lax.optimization_barrier(field.rows(params))
    leaves = [residual, *jax.tree.leaves(params)]
    real = _tree.common_dtype(*(jnp.finfo(leaf.dtype).dtype for leaf in leaves), jnp.float32)
    vectors = RealVectors(params, real)
    matrix = vectors.flatten(rows, lead=1) if jax.tree.leaves(rows) else jnp.zeros((len(residual), 0), real)
    # Nor is it to put the rows together again for each of the products.
    return vectors, residual.astype(real), jax.lax.optimization_barrier(matrix), vectors.diagonal(field.scale)


def _in_row_space(
    field: VectorField, params: PyTree, h: Any, *, tolerance: float, max_iterations: int
) -> tuple[PyTree, jax.Array, int, jax.Array, jax.Array, jax.Array]:
    """G*, what the predicted fall lacks because CG was cut short, form, iterations, relative residual, and success."""
    vectors, residual, matrix, scale = _rows(field, params)
    h, theta = jnp.asarray(h, residual.dtype), vectors.flatten(params)
    pull, wanted = jnp.zeros_like(theta), residual
    if field.l2 is not None:
        l2 = jnp.asarray(field.l2, residual.dtype)
        scale, pull = scale / (1 + h * l2 * scale), l2 * theta
        wanted = residual - h * real_matmul(matrix, scale * pull)
    solution = solve_in_row_space(matrix, scale, h, wanted, tolerance=tolerance, max_iterations=max_iterations)
    direction = jax.tree.map(lambda leaf: leaf[0], vectors.unflatten((scale * (solution.x + pull))[None]))
    relative = _tree.ratio(_tree.norm(solution.left), _tree.norm(wanted))
    left = 0.5 * jnp.sum((residual - solution.left) * solution.left)
    return direction, left, _ROWS, solution.iterations, relative, solution.error <= 1


def _in_parameter_space(
    field: VectorField, params: PyTree, h: Any, *, tolerance: float, max_iterations: int
) -> tuple[PyTree, jax.Array, int, jax.Array, jax.Array, jax.Array]:
    """As `_in_row_space`, by the P×P matrix: (I + hA) z = P^½∇L with A = P^½BP^½ and g* = P^½z.

    As there, the factor is one of (1/h + δ)I + A, with δ the rounding of A, and CG makes good for δ.
    """
    vectors, residual, matrix, scale = _rows(field, params)
    h, root = jnp.asarray(h, residual.dtype), jnp.sqrt(scale)
    l2 = jnp.asarray(0.0 if field.l2 is None else field.l2, residual.dtype)
    wanted = root * (real_matmul(residual, matrix) + l2 * vectors.flatten(params))
    a = ParameterPath.matrix(matrix, scale, l2)
    # In units in which the largest numbers are about 1; powers of two, so nothing is rounded.
    of_a, of_b = (_tree.magnitude(x).astype(a.dtype) for x in (a, wanted))
    a, wanted, h = a / of_a, wanted / of_b, h * of_a
    rounding = 0.5 * float(jnp.finfo(a.dtype).eps)
    trace = jnp.maximum(jnp.trace(a), jnp.finfo(a.dtype).tiny)
    # Beyond either bound 1/h changes no digit, and its square, or that of A beside it, would soon be lost.
    inverse_h = jnp.maximum(1 / jnp.maximum(h, rounding / trace), rounding**2 * trace)
    shift = inverse_h + 9 * rounding * trace
    precondition = solver_of_positive(a + shift * jnp.eye(len(a), dtype=a.dtype))

    def operate(x: jax.Array) -> jax.Array:
        pushed = real_matmul(matrix, root * x)
        return inverse_h * x + (root * real_matmul(pushed, matrix) + l2 * scale * x) / of_a

    def iterate(carry: Any) -> Any:
        x, r, p, rz, i = carry
        moved = operate(p)
        step = _tree.ratio(rz, jnp.sum(p * moved))
        r = r - step * moved
        z = precondition(r)
        new = jnp.sum(r * z)
        return x + step * p, r, z + _tree.ratio(new, rz) * p, new, i + 1

    def go_on(carry: Any) -> jax.Array:
        x, _, _, rz, i = carry
        # ‖error of x‖² ≤ r·A⁻¹r/a ≤ (shift/a²) r·M⁻¹r
        return (rz * shift > (tolerance * inverse_h) ** 2 * jnp.sum(x * x)) & (rz > 0) & (i < max_iterations)

    # (I/h + A) y = P^½∇L, and z = y/h only in the end: squares of what is already divided by a large h would be 0.
    z = precondition(wanted)
    start = jnp.zeros_like(wanted), wanted, z, jnp.sum(wanted * z), jnp.zeros([], jnp.int32)
    x, r, _, rz, iterations = jax.lax.while_loop(go_on, iterate, start)
    # What is not finite ends the loop: with x = 0 it must not pass for a solution.
    x = jnp.where(jnp.isfinite(rz) & jnp.isfinite(trace), x, jnp.nan)
    per_h = jnp.minimum(inverse_h, 1 / h)
    direction = jax.tree.map(lambda leaf: leaf[0], vectors.unflatten((root * (per_h * x) * of_b)[None]))
    left = (0.5 * of_b / of_a) * (h * per_h * jnp.sum(x * r) * of_b)
    relative = _tree.ratio(_tree.norm(r), _tree.norm(wanted))
    return direction, left, _PARAMETERS, iterations, relative, relative <= 1
