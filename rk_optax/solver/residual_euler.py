"""Linearly implicit Euler for least squares, by one factorisation in the smaller of the two spaces."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax._vectors import RealVectors
from rk_optax.field import Capability, VectorField
from rk_optax.rows import Rows
from rk_optax.solver._base import Cost, Quantity, Solver, Step, check_offers
from rk_optax.solver._linear import (
    preconditioned_gradients,
    solve_in_row_space,
    solver_of_positive,
)
from rk_optax.solver._path import Factored, least_squares_path
from rk_optax.solver.linearly_implicit import RosenbrockEuler, predicted_fall

PyTree = Any
_ROWS, _PARAMETERS, _PRODUCTS = 0, 1, 2


class ResidualEulerState(NamedTuple):
    """State of `ResidualEuler`: what the latest linear solve looked like."""

    form: jax.Array  # shape=(), int32: 0 for the N×N matrix of the residuals, 1 for the P×P one, 2 for CG without any
    iterations: jax.Array  # shape=(), int32: of CG; 0 where one factor served all step sizes
    residual: jax.Array  # shape=(), float: ‖(I + hPB) g* − P∇L‖/‖P∇L‖, of g* itself; 0 likewise
    moved: PyTree = ()  # like params, with inertia: the latest step, 0 after a refused one


@dataclasses.dataclass(frozen=True)
class ResidualEuler(Solver):
    """Linearly implicit Euler for least squares, its linear system solved directly in the smaller of two spaces.

    With R the Jacobian of the N residuals r by the P parameters, and B = RᵀR + λI, the step solves
    (I + hPB) g* = P∇L. Where N < P that is done in the space of the residuals, with one N×N matrix: Q = P/(1 + hλP),
    g* = Q(Rᵀy + λθ) with (I + hRQRᵀ) y = r − hλRQθ; else with the P×P matrix B itself. `state.solver.form` says which.
    The same step as `RosenbrockEuler("gauss_newton")` with CG run to the end. Costs N Jacobian rows; the gradient that
    comes in is used for the predicted fall alone, and `value_and_update` makes it of the rows, unless a path may be of
    fewer.

    Under `rk_optax.path_control` the matrix is formed in float64, for an R in float32 too, and reduced to tridiagonal
    form, once for all h. Under any other rule a Cholesky factor of the matrix preconditions the few iterations of CG
    that make good its rounding (`state.solver.iterations`; one while h is small).

    It has no `linear_solver`: B is symmetric and not negative, and what no factor solves is what CG is made for.

    `state.solver.residual` is evaluated from g* itself, which takes as long as one iteration; of CG alone it is the one
    that CG carries along. It does not bound the error of g*: where rows or columns of R are linearly dependent, what
    rounding adds to g* in the directions that R does not see is not damped by h, and for a long step it may exceed the
    rest (in float32 and at h = 1e6, a residual of 1e-4 and an error as large as g*).

    Args:
      max_rows: the largest matrix that is formed, N×N or P×P; where both are larger the system is solved by CG alone,
        as by `RosenbrockEuler`.
      tolerance: relative error of g* at which CG stops, in (0, 1), for a Jacobian of full rank; for CG alone, relative
        residual.
      max_iterations: cap on either CG.
      inertia: μ in [0, 1): the step d minimises the model, ½‖r + Rd‖² + (λ/2)‖θ + d‖², plus ‖d − μd₋₁‖²/(2h), the
        square in the metric of P⁻¹, with d₋₁ the step before, which is made 0 where one is refused: the whole step, of
        which `rk_optax.line_search` or `after` may have taken a part. At a constant h that is SPRING with damping 1/h,
        whose learning rate then goes into `after=optax.scale(...)`. For random points: it averages over them. There is
        no path then, nor CG alone, which raises at the first update.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a loss that is no
        `rk_optax.LeastSquares` or a preconditioner that is not diagonal.

    Source: Goldshlager, Abrahamsen and Lin (2024), arXiv 2401.10190, for the inertia.
    """

    max_rows: int = 4096
    tolerance: float = 1e-4
    max_iterations: int = 100
    inertia: float = dataclasses.field(default=0.0, kw_only=True)

    def __post_init__(self):
        _checks.count(self.max_rows, "max_rows")
        _checks.number(self.inertia, "inertia", "decay")
        self._matrix_free  # noqa: B018 # its construction checks tolerance and max_iterations

    @property
    def needs(self) -> frozenset[Capability]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Residuals, and their Gauss–Newton matrix where there are too many; symmetric with a diagonal P alone."""
        return frozenset({"rows", "gauss_newton", "diagonal_scale"})

    @property
    def offers(self) -> frozenset[Quantity]:
        """The fall of the Gauss–Newton model, and without inertia the steps of all h."""
        return frozenset({"predicted_fall"} if self.inertia else {"predicted_fall", "path"})

    def init(self, params: PyTree) -> ResidualEulerState:
        """Nothing has been solved yet."""
        state = _state(_ROWS, jnp.zeros([], jnp.int32), jnp.zeros([]))
        return state._replace(moved=jax.tree.map(_nothing_moved, params)) if self.inertia else state

    def start(
        self, field: VectorField, params: PyTree, *, wants: frozenset[Quantity] = frozenset()
    ) -> tuple[PyTree, VectorField]:
        """Stage 1 and the loss at params from the rows, which the step needs unless its path is of fewer points."""
        needed = "path" not in wants or field.fewer_points is None
        by_rows = needed and min(field.count_rows(params), _real_size(params)) <= self.max_rows
        return field.started(params, by_rows=by_rows)

    @property
    def _matrix_free(self) -> RosenbrockEuler:
        """The same step by CG alone, where either matrix would be too large."""
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
        cost = Cost(gradients=0 if field.knows_rows(params) else 1, rows=count)
        if "path" in wants:
            return self._path(field, params, k1)
        if min(count, size) > self.max_rows:
            if self.inertia:
                raise ValueError(
                    f"inertia needs the rows, and neither {count} residuals nor {size} parameters are within max_rows="
                    f"{self.max_rows}: raise max_rows, take fewer points, or leave inertia out."
                )
            return self._by_products(self._matrix_free.step(field, params, k1, h, (), wants=wants))
        system = _System.at(field, params)
        before = _tree.norm(k1)
        shifted, more, right = system, jnp.zeros([], system.rows.dtype), before
        if self.inertia:
            shifted, more = system.shifted(
                jnp.asarray(self.inertia, more.dtype) * system.rows.vectors.flatten(state.moved)
            )
            right = _tree.norm(shifted.scale * shifted.gradient(shifted.residual, shifted.theta))
        solve = _in_parameter_space if size <= count else _in_row_space
        solution = solve(shifted, h, tolerance=self.tolerance, max_iterations=self.max_iterations)
        vector = solution.direction
        if self.inertia:
            inverse = _tree.ratio(jnp.ones_like(more), jnp.asarray(h, more.dtype))
            vector = solution.direction - inverse * (shifted.theta - system.theta)
        direction = system.rows.vectors.tree(vector)
        fall = shifted.fall(h, solution.direction) if self.inertia else predicted_fall(field, k1, h, direction)
        defect = _tree.norm(shifted.residual_of(solution.direction, h))
        new = _state(solution.form, solution.iterations, _tree.ratio(defect, right))
        refused = new
        if self.inertia:
            refused = new._replace(moved=jax.tree.map(jnp.zeros_like, state.moved))
            new = new._replace(moved=_tree.cast_like(_tree.scale(-h, direction), state.moved))
        # An h so large that numbers of g* are below the smallest one would otherwise be a step without them, or of 0.
        after = _tree.norm(vector)
        least = float(jnp.finfo(after.dtype).tiny) * 1e4
        lost = (before > least) & (after < least)
        return Step(
            direction,
            cost,
            solved=solution.solved & ~lost,
            quantities={"predicted_fall": fall + solution.left + more},
            state=new,
            refused_state=refused,
        )

    def _path(self, field: VectorField, params: PyTree, k1: PyTree) -> Step:
        """The direction is not computed: it is the rule's choice."""
        size = _real_size(params)
        by_products = self._matrix_free.step(field, params, k1, 0.0, (), wants=frozenset({"path"})).quantities["path"]

        def form(field: VectorField) -> tuple[bool, bool]:
            """Whether the matrix is that of the parameters, and whether it is small enough."""
            count = field.count_rows(params)
            # With both, the N×N matrix would change with h.
            parameters = size <= count or (field.l2 is not None and field.scale is not None)
            return parameters, (size if parameters else count) <= self.max_rows

        def path(field: VectorField, *, precise: bool = False) -> Factored:
            parameters, fits = form(field)
            if not fits:
                found = by_products(field)
                return found._replace(state=_state(_PRODUCTS, found.state.iterations, found.state.residual))
            new = _state(_PARAMETERS if parameters else _ROWS, jnp.zeros([], jnp.int32), jnp.zeros([]))
            found = least_squares_path(field, params, parameters=parameters, precise=precise)
            return Factored(found, Cost(rows=field.count_rows(params)), new)

        quantities: dict[Quantity, Any] = {"path": path}
        if form(field)[1] and all(jnp.finfo(leaf.dtype).bits >= 64 for leaf in jax.tree.leaves(params)):
            quantities["precise_path"] = functools.partial(path, precise=True)
        return Step(k1, Cost(gradients=0 if field.knows_rows(params) else 1), quantities=quantities)

    def _by_products(self, step: Step) -> Step:
        new = _state(_PRODUCTS, step.state.iterations, step.state.residual)
        return step._replace(state=new, refused_state=new)


def _state(form: int, iterations: jax.Array, residual: jax.Array) -> ResidualEulerState:
    return ResidualEulerState(jnp.full([], form, jnp.int32), iterations, residual.astype(_tree.default_float()))


def _nothing_moved(leaf: jax.Array) -> jax.Array:
    return jnp.zeros_like(leaf, _tree.common_dtype(leaf.dtype, jnp.float32))


def _real_size(params: PyTree) -> int:
    return RealVectors(params, None).size


class _System(NamedTuple):
    """(I + hP(RᵀR + λI)) g* = P(Rᵀr + λθ), in vectors of one dtype."""

    theta: jax.Array  # shape=(P,)
    residual: jax.Array  # shape=(N,): r
    rows: Rows  # R
    scale: jax.Array  # shape=(P,): P
    l2: jax.Array | None  # λ
    scaled: bool  # whether P is not I

    @classmethod
    def at(cls, field: VectorField, params: PyTree) -> _System:
        """The system at `params`. Costs the rows."""
        rows = field.rows(params)
        vectors, residual = rows.vectors, rows.residual.astype(rows.dtype)
        l2 = None if field.l2 is None else jnp.asarray(field.l2, rows.dtype)
        scaled = field.scale is not None
        return cls(vectors.flatten(params), residual, rows, vectors.diagonal(field.scale), l2, scaled)

    def gradient(self, residual: jax.Array, theta: jax.Array) -> jax.Array:
        """Rᵀr + λθ."""
        pulled = self.rows.rmv(residual)
        return pulled if self.l2 is None else pulled + self.l2 * theta

    def shifted(self, move: jax.Array) -> tuple[_System, jax.Array]:
        """The same model from θ + move on, and by how much that move alone makes it fall."""
        pushed = self.rows.mv(move)
        fall = -jnp.sum((self.residual + 0.5 * pushed) * pushed)
        if self.l2 is not None:
            fall = fall - self.l2 * jnp.sum((self.theta + 0.5 * move) * move)
        return self._replace(residual=self.residual + pushed, theta=self.theta + move), fall

    def fall(self, h: Any, direction: jax.Array) -> jax.Array:
        """Of the model, by the solution of the system."""
        gradient = self.gradient(self.residual, self.theta)
        unscaled = _tree.ratio(direction, self.scale)
        return 0.5 * jnp.sum((gradient + unscaled) * (jnp.asarray(h, direction.dtype) * direction))

    def residual_of(self, direction: jax.Array, h: Any) -> jax.Array:
        """(I + hPB) g* − P∇L, in which no product of R with itself is formed."""
        step = jnp.asarray(h, direction.dtype) * direction
        return direction - self.scale * self.gradient(self.residual - self.rows.mv(step), self.theta - step)


class _Solved(NamedTuple):
    """What either solve found."""

    direction: jax.Array  # shape=(P,): g*
    left: jax.Array  # shape=(): what the predicted fall lacks because CG was cut short
    form: int
    iterations: jax.Array
    solved: jax.Array  # shape=(), bool


def _in_row_space(system: _System, h: Any, *, tolerance: float, max_iterations: int) -> _Solved:
    """By the N×N matrix, see `ResidualEuler`."""
    theta, residual, rows, scale, l2, scaled = system
    h, pull, wanted = jnp.asarray(h, residual.dtype), jnp.zeros_like(theta), residual
    shorter = h
    if l2 is not None:
        scale, pull = scale / (1 + h * l2 * scale), l2 * theta
        wanted = residual - h * rows.mv(scale * pull)
        shorter = h if scaled else h / (1 + h * l2)
    weights = scale if scaled else None
    solution = solve_in_row_space(rows, weights, shorter, wanted, tolerance=tolerance, max_iterations=max_iterations)
    left = 0.5 * jnp.sum((residual - solution.left) * solution.left)
    return _Solved(scale * (solution.x + pull), left, _ROWS, solution.iterations, solution.error <= 1)


def _in_parameter_space(system: _System, h: Any, *, tolerance: float, max_iterations: int) -> _Solved:
    """By the P×P matrix: (I + hA) z = P^½∇L with A = P^½BP^½ and g* = P^½z.

    As in the other, the factor is one of (1/h + δ)I + A, with δ the rounding of A, and CG makes good for δ.
    """
    theta, residual, rows, scale, *_ = system
    h, root = jnp.asarray(h, residual.dtype), jnp.sqrt(scale)
    l2 = jnp.zeros([], residual.dtype) if system.l2 is None else system.l2
    wanted = root * system.gradient(residual, theta)
    a = rows.gram("parameters", scale if system.scaled else None) + jnp.diag(l2 * scale)
    # In units in which the largest numbers are about 1; powers of two, so nothing is rounded.
    of_a, of_b = (_tree.magnitude(x).astype(a.dtype) for x in (a, wanted))
    a, wanted, h = a / of_a, wanted / of_b, h * of_a
    rounding = 0.5 * float(jnp.finfo(a.dtype).eps)
    trace = jnp.maximum(jnp.trace(a), jnp.finfo(a.dtype).tiny)
    # Beyond either bound 1/h changes no digit, and its square, or that of A beside it, would soon be lost.
    inverse_h = jnp.maximum(1 / jnp.maximum(h, rounding / trace), rounding**2 * trace)
    shift = inverse_h + 9 * rounding * trace
    precondition = solver_of_positive(a + shift * jnp.eye(len(a), dtype=a.dtype))

    def operate(p: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        pulled = rows.rmv(rows.mv(root * p))
        moved = inverse_h * p + (root * pulled + l2 * scale * p) / of_a
        return moved, jnp.sum(p * moved), p

    def unsolved(x: jax.Array, rz: jax.Array, i: jax.Array) -> jax.Array:
        # ‖error of x‖² ≤ r·A⁻¹r/a ≤ (shift/a²) r·M⁻¹r
        return (rz * shift > (tolerance * inverse_h) ** 2 * jnp.sum(x * x)) & (rz > 0) & (i < max_iterations)

    # (I/h + A) y = P^½∇L, and z = y/h only in the end: squares of what is already divided by a large h would be 0.
    zero = jnp.zeros_like(wanted)
    x, r, rz, iterations = preconditioned_gradients(operate, precondition, wanted, zero, unsolved)
    # What is not finite ends the loop: with x = 0 it must not pass for a solution.
    x = jnp.where(jnp.isfinite(rz) & jnp.isfinite(trace), x, jnp.nan)
    per_h = jnp.minimum(inverse_h, 1 / h)
    left = (0.5 * of_b / of_a) * (h * per_h * jnp.sum(x * r) * of_b)
    direction = root * (per_h * x) * of_b
    return _Solved(direction, left, _PARAMETERS, iterations, _tree.norm(r) <= _tree.norm(wanted))
