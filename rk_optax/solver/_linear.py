"""Linear systems (I + c·PB) x = P b of the linearly implicit and implicit solvers, by short capped iterations.

And those of least squares in the space of the residuals, (I + hRQRᵀ) y = c, by a factorisation that CG refines.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax import _tree
from rk_optax._vectors import real_matmul
from rk_optax.field import Linear
from rk_optax.rows import Rows

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Inexact, Int

    from rk_optax._tree import Tree

Scalar = float | jax.Array  # a number or a real scalar array


class Solution(NamedTuple):
    """What the iteration found."""

    x: Tree  # of `conjugate_gradients`; of `shifted_lanczos` the pair of its real and imaginary parts
    iterations: Int[Array, ""]  # products with B
    residual: Float[Array, ""]  # relative to the right-hand side, 2-norm in the metric of P
    converged: Bool[Array, ""]  # residual within the tolerance
    usable: Bool[Array, ""]  # a step, if short of converged; of CG where finite and ⟨b, x⟩ > 0 unless b = 0
    negative: Bool[Array, ""]  # stopped at a direction of negative curvature of I + c·PB (CG)
    size: Float[Array, ""]  # ‖b‖ in that metric
    overlap: Float[Array, ""]  # ⟨x, b − (I + c·PB) x⟩/‖b‖² in that metric: 0 for an iterate of CG


def combined(row: Any, stacked: Tree) -> Tree:
    """Σ_j row_j x_j of stacked trees; one that is not finite shows, even with weight 0."""
    # No dot product, which accelerators round to bfloat16 or TF32.
    return jax.tree.map(lambda x: sum(jnp.asarray(row[j], _tree.real_dtype(x)) * x[j] for j in range(len(x))), stacked)


def mixed(matrix: np.ndarray, stacked: Tree) -> Tree:
    """Σ_j matrix_ij x_j of stacked trees for each i, stacked."""
    return jax.tree.map(lambda *rows: jnp.stack(rows), *(combined(row, stacked) for row in matrix))


def conjugate_gradients(
    product: Linear, c: Scalar, b: Tree, scale: Tree | None, *, tolerance: float, max_iterations: int
) -> Solution:
    """Solves (I + c·PB) x = b for symmetric B and diagonal P > 0 (`scale`; None for I), from x = 0.

    With a diagonal P the operator is symmetric only in the metric of P^(−1), so CG runs on I + c·P^(1/2)BP^(1/2), and
    on b/‖b‖, whose squares stay within the range of the floats whatever the units of the loss are. It stops at a
    relative residual of `tolerance`, after `max_iterations`, or where the curvature along the search direction is not
    positive (Steihaug): x is then the last iterate, or b itself at the first. One product an iteration; the library
    versions evaluate the operator more often and report success on indefinite systems.
    """
    times, b, size = _symmetric_form(b, scale)

    def operator(x: Tree) -> Tree:
        return _tree.add_scaled(x, c, times(product(times(x))))

    square = _tree.inner(b, b)  # 1, or 0

    def iterate(carry: Any) -> Any:
        x, r, p, rr, i, _, _ = carry
        moved = operator(p)
        curvature = _tree.inner(p, moved)
        # Not "> 0 fails": a NaN must go on into x, where it is seen.
        negative = curvature <= 0
        step = jnp.where(negative, 0, rr / jnp.where(negative, 1, curvature))
        x = _tree.add_scaled(x, step, p)
        r = _tree.add_scaled(r, -step, moved)
        new = _tree.inner(r, r)
        p = _tree.add_scaled(r, _tree.ratio(new, rr), p)
        return x, r, p, new, i + 1, negative, curvature

    def unsolved(rr: jax.Array) -> jax.Array:
        return rr > tolerance**2 * square

    def go_on(carry: Any) -> jax.Array:
        *_, rr, i, negative, _ = carry
        return unsolved(rr) & (i < max_iterations) & ~negative

    x = jax.tree.map(jnp.zeros_like, b)
    start = (x, b, b, square, jnp.zeros([], jnp.int32), jnp.zeros([], bool), square)
    x, _, _, rr, iterations, negative, curvature = jax.lax.while_loop(go_on, iterate, start)
    at_once = negative & (iterations == 1)
    x = _tree.select(at_once, b, x)
    # NaN ends the loop at once, with x = 0: it must not pass for a solution.
    finite = jnp.isfinite(rr) & jnp.isfinite(size)
    usable = finite & ((_tree.inner(b, x) > 0) | (square == 0))
    x = times(_tree.scale(jnp.where(finite, size, jnp.nan), x))
    residual = jnp.where(finite, jnp.sqrt(_tree.ratio(rr, square)), jnp.nan)
    overlap = jnp.where(at_once, square - curvature, 0)
    return Solution(x, iterations, residual, finite & ~unsolved(rr), usable, negative, size, overlap)


def shifted_lanczos(
    product: Linear, c: jax.Array, b: Tree, scale: Tree | None, *, tolerance: float, max_iterations: int
) -> Solution:
    """Solves (I + c·PB) x = b for symmetric B, diagonal P > 0 (`scale`; None for I) and a complex scalar c.

    The Krylov space of a real b is that of B alone: a Lanczos vector and one product an iteration, as for CG, and the
    tridiagonal systems are never singular where c is not real. Stops at a relative residual of `tolerance` or after
    `max_iterations`. (CG's form of it is due to Freund, 1990; libraries have only GMRES, which keeps every vector, and
    BiCGSTAB, which takes two products and may break down.)
    """
    times, b, size = _symmetric_form(b, scale)
    one = jnp.ones_like(c)

    def iterate(carry: Any) -> Any:
        (re, im), (p_re, p_im), v_old, v, beta, eta, zeta, i, _ = carry
        w = _tree.add_scaled(times(product(times(v))), -beta, v_old)
        alpha = _tree.inner(v, w)
        w = _tree.add_scaled(w, -alpha, v)
        off = c * beta.astype(c.dtype)
        below = off / eta  # of L in the factors L·U of the tridiagonal matrix
        eta = 1 + c * alpha.astype(c.dtype) - below * off
        zeta = jnp.where(i == 0, one, -below * zeta)
        # p ← (v − cβ p)/η and x ← x + ζp in complex numbers, as pairs: a leaf may be complex by itself.
        inverse, back = 1 / eta, -off / eta
        p_re, p_im = (
            _sum((inverse.real, v), (back.real, p_re), (-back.imag, p_im)),
            _sum((inverse.imag, v), (back.imag, p_re), (back.real, p_im)),
        )
        re, im = (
            _sum((1, re), (zeta.real, p_re), (-zeta.imag, p_im)),
            _sum((1, im), (zeta.imag, p_re), (zeta.real, p_im)),
        )
        v_new, new = _tree.unit(w)
        left = (jnp.abs(c * zeta / eta) * new).astype(first.dtype)
        return (re, im), (p_re, p_im), v, v_new, new, eta, zeta, i + 1, left

    def unsolved(left: jax.Array) -> jax.Array:
        return left > tolerance

    def go_on(carry: Any) -> jax.Array:
        *_, i, left = carry
        return unsolved(left) & (i < max_iterations)

    zero = jax.tree.map(jnp.zeros_like, b)
    first = jnp.where(size == 0, size, 1)  # relative residual of x = 0; NaN stays
    first = jnp.where(jnp.isfinite(size), first, jnp.nan)
    start = (zero, zero), (zero, zero), zero, b, jnp.zeros_like(size), one, one, jnp.zeros([], jnp.int32), first
    x, *_, iterations, left = jax.lax.while_loop(go_on, iterate, start)
    # NaN ends the loop at once, with x = 0: it must not pass for a solution.
    finite = jnp.isfinite(left)
    x = tuple(times(_tree.scale(jnp.where(finite, size, jnp.nan), part)) for part in x)
    no, zero = jnp.zeros([], bool), jnp.zeros_like(size)
    return Solution(x, iterations, left, finite & ~unsolved(left), finite, no, size, zero)


def gmres(
    increment: Linear, b: Tree, scale: Tree | None, *, restart: int, tolerance: float, max_iterations: int
) -> Solution:
    """Solves (I + PC) x = b for any linear C (`increment`) and diagonal P > 0 (`scale`; None for I), from x = 0.

    Restarted GMRES in the metric of P^(−1), on b/‖b‖ as CG here: the iterates of least residual, from an Arnoldi basis
    that is orthogonalised twice, which float32 needs. Stops at a relative residual of `tolerance`, after
    `max_iterations` products, or where the Krylov space ends without a solution, as for a singular system. A last
    product, beyond these, makes sure of the residual: the recurrence alone would take the huge x of a nearly singular
    system for a solution. (JAX's own does not say whether it converged.)
    """
    times, b, size = _symmetric_form(b, scale)

    def operator(x: Tree) -> Tree:
        return jax.tree.map(jnp.add, x, times(increment(times(x))))

    numbers = sum(x.size * (1 + jnp.iscomplexobj(x)) for x in jax.tree.leaves(b))
    most = max(min(restart, max_iterations, numbers), 1)
    dtype = size.dtype
    rounding = 0.5 * float(jnp.finfo(dtype).eps)

    def onto(basis: Tree, v: Tree) -> jax.Array:
        return jax.vmap(_tree.inner, (0, None))(basis, v).astype(dtype)

    def combine(weights: jax.Array, basis: Tree) -> Tree:
        def of_leaf(x: jax.Array) -> jax.Array:
            return jnp.tensordot(weights.astype(_tree.real_dtype(x)).astype(x.dtype), x, 1, precision="highest")

        return jax.tree.map(of_leaf, basis)

    def extend(carry: Any) -> Any:
        """One more vector v_(j+1) of the basis, and its column of the triangle R in QH = R, H = VᵀAV."""
        basis, q, r, largest, j, _, _ = carry
        v = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False), basis)
        w = operator(v)
        column = jnp.zeros(most + 1, dtype)
        for _ in range(2):
            part = onto(basis, w)  # zero for the vectors to come
            w = _tree.add_scaled(w, -1, combine(part, basis))
            column = column + part
        v, length = _tree.unit(w)
        column = jnp.matmul(q, column.at[j + 1].set(length.astype(dtype)), precision="highest")
        largest = jnp.maximum(largest, jnp.max(jnp.abs(column)))
        above, below = column[j], column[j + 1]
        pivot = jnp.hypot(above, below)
        ended = pivot <= 4 * rounding * largest
        turn = jnp.array([[above, below], [-below, above]]) / jnp.where(ended, 1, pivot)
        rows = jax.lax.dynamic_slice_in_dim(q, j, 2)
        q_new = jax.lax.dynamic_update_slice_in_dim(q, jnp.matmul(turn, rows, precision="highest"), j, 0)
        r_new = r.at[:, j].set(column[:most].at[j].set(pivot))
        put = jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, j + 1, 0), basis, v)
        q, r = jnp.where(ended, q, q_new), jnp.where(ended, r, r_new)
        left = jnp.where(ended, jnp.abs(q[j, 0]), jnp.abs(q[j + 1, 0]))
        return put, q, r, largest, j + jnp.where(ended, 0, 1), left, ended

    def cycle(carry: Any) -> Any:
        x, residual, before, i, _, _ = carry
        v, length = _tree.unit(residual)
        length = length.astype(dtype)
        basis = jax.tree.map(lambda x: jnp.stack([x] + [jnp.zeros_like(x)] * most), v)

        def go_on(inner: Any) -> jax.Array:
            *_, j, left, ended = inner
            return (j < most) & (i + j < max_iterations) & (length * left > tolerance) & ~ended

        start = (basis, jnp.eye(most + 1, dtype=dtype), jnp.eye(most, dtype=dtype), jnp.zeros([], dtype))
        start += (jnp.zeros([], jnp.int32), jnp.ones([], dtype), jnp.zeros([], bool))
        basis, q, r, largest, j, left, ended = jax.lax.while_loop(go_on, extend, start)
        y = jax.scipy.linalg.solve_triangular(r, jnp.where(jnp.arange(most) < j, q[:most, 0], 0))
        x = jax.tree.map(jnp.add, x, combine(length * jnp.pad(y, (0, 1)), basis))
        check = length * left <= tolerance
        residual = jax.lax.cond(
            check,
            lambda: jax.tree.map(jnp.subtract, b, operator(x)),
            lambda: combine(length * q[j, 0] * q[j], basis),
        )
        left = _tree.norm(residual).astype(dtype)
        # What rounding in the operator does to a vector as long as b need not be solved for.
        unsolved = left > jnp.maximum(tolerance, 8 * rounding * largest * jnp.minimum(_tree.norm(x), 1))
        spent = j + ended.astype(j.dtype) + check.astype(j.dtype)
        return x, residual, left, i + spent, unsolved, ended | (left >= before)

    def go_on(carry: Any) -> jax.Array:
        *_, i, unsolved, ended = carry
        return unsolved & (i < max_iterations) & ~ended

    first = jnp.where(jnp.isfinite(size), jnp.where(size == 0, 0, 1), jnp.nan).astype(dtype)
    zero, count, no = jax.tree.map(jnp.zeros_like, b), jnp.zeros([], jnp.int32), jnp.zeros([], bool)
    start = zero, b, first, count, first > tolerance, no
    x, residual, left, iterations, unsolved, _ = jax.lax.while_loop(go_on, cycle, start)
    # NaN ends the loops at once: it must not pass for a solution.
    finite = jnp.isfinite(left)
    overlap = _tree.inner(x, residual)
    x = times(_tree.scale(jnp.where(finite, size, jnp.nan), x))
    solved = finite & ~unsolved
    return Solution(x, iterations, left, solved, solved, jnp.zeros([], bool), size, overlap)


def _symmetric_form(b: Tree, scale: Tree | None) -> tuple[Linear, Tree, jax.Array]:
    """V ↦ P^(1/2) v, and of P^(−1/2) b the direction and the length."""
    if scale is None:
        return lambda v: v, *_tree.unit(b)
    root = jax.tree.map(jnp.sqrt, scale)
    return functools.partial(jax.tree.map, jnp.multiply, root), *_tree.unit(jax.tree.map(jnp.divide, b, root))


def preconditioned_gradients(
    operate: Callable[[Float[Array, " n"]], tuple[Float[Array, " n"], Float[Array, ""], Inexact[Array, " m"]]],
    precondition: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    b: Float[Array, " n"],
    zero: Inexact[Array, " m"],
    unsolved: Callable[[Inexact[Array, " m"], Float[Array, ""], Int[Array, ""]], Bool[Array, ""]],
) -> tuple[Inexact[Array, " m"], Float[Array, " n"], Float[Array, ""], Int[Array, ""]]:
    """Conjugate gradients for A y = b in one real vector, y = Σ αp, with M ≈ A for a preconditioner.

    Args:
      operate: p ↦ (Ap, p·Ap, what is summed up in place of p: p itself, or a linear function of it).
      precondition: r ↦ M⁻¹r.
      b: the right-hand side.
      zero: the empty sum.
      unsolved: whether to go on, of (the sum, r·M⁻¹r, the iterations so far).

    Returns:
      The sum, the residual r = b − Ay, r·M⁻¹r, and the iterations.
    """

    def iterate(carry: Any) -> Any:
        x, r, p, rz, i = carry
        moved, energy, part = operate(p)
        step = _tree.ratio(rz, energy)
        r = r - step * moved
        z = precondition(r)
        new = jnp.sum(r * z)
        return x + step * part, r, z + _tree.ratio(new, rz) * p, new, i + 1

    def go_on(carry: Any) -> jax.Array:
        x, _, _, rz, i = carry
        return unsolved(x, rz, i)

    z = precondition(b)
    start = zero, b, z, jnp.sum(b * z), jnp.zeros([], jnp.int32)
    x, r, _, rz, iterations = jax.lax.while_loop(go_on, iterate, start)
    return x, r, rz, iterations


class RowSolution(NamedTuple):
    """What `solve_in_row_space` found."""

    x: Float[Array, " p"]  # Rᵀy
    left: Float[Array, " n"]  # c − (I + hRQRᵀ) y
    iterations: Int[Array, ""]
    error: Float[Array, ""]  # a bound on the relative error of x, in the metric of Q


def solve_in_row_space(
    rows: Rows,
    scale: Float[Array, " p"] | None,
    h: Float[Array, ""],
    c: Float[Array, " n"],
    *,
    tolerance: float,
    max_iterations: int,
) -> RowSolution:
    """Rᵀy for (I + hRQRᵀ) y = c, of R with N rows, diagonal Q ≥ 0 (`scale`; None: I), h ≥ 0.

    The rounding of K = RQRᵀ, of the size δ = ε·trace, swallows the identity where hδ > 1: in float32 a plain
    factorisation then fails, or its y lacks what makes large steps worth taking. So the factor is one of
    (1/h + δ) I + K, and preconditions CG on the system itself, whose operator goes through R and Rᵀ and keeps the
    digits that their product lost. One iteration where δ does not matter, some √(hδ) where it does. The sum of the
    Rᵀp is carried instead of y, as in CGLS: Rᵀy of the final y would bring the rounding back. All in one real dtype.
    """
    # In units in which the largest number of R, of Q and of c is about 1; powers of two, so nothing is rounded.
    of_rows, of_scale, of_c = (x.astype(c.dtype) for x in (rows.magnitude(), *map(_tree.magnitude, (scale, c))))
    # Where no square of R leaves the range it stays as it is, which saves a copy.
    plain = (of_rows > 2.0**-32) & (of_rows < 2.0**32)
    of_rows = jnp.where(plain, 1, of_rows)
    scale, c = None if scale is None else scale / of_scale, c / of_c
    weights = 1 if scale is None else scale
    h = h * of_rows * of_scale * of_rows
    gram = jax.lax.cond(plain, lambda: rows.gram("residuals", scale), lambda: rows.gram("residuals", scale, of_rows))
    rounding = 0.5 * float(jnp.finfo(gram.dtype).eps)
    trace = jnp.maximum(jnp.trace(gram), jnp.finfo(gram.dtype).tiny)
    # With h = 0, or so small that hK is below rounding, y = c whatever h is.
    a = 1 / jnp.maximum(h, rounding / trace)
    # An entry of K is off by some roundings of its row, and K itself by that over √N: little, or all for few rows.
    shift = a + (1 + 8 / math.sqrt(max(len(c), 1))) * rounding * trace
    precondition = solver_of_positive(gram + shift * jnp.eye(len(c), dtype=c.dtype))

    def size(pulled: jax.Array) -> jax.Array:  # squared, in the metric of Q
        return jnp.sum(weights * (pulled * pulled))

    def operate(p: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, ""], Float[Array, " p"]]:
        pulled = rows.rmv(p) / of_rows
        return a * p + rows.mv(weights * pulled) / of_rows, a * jnp.sum(p * p) + size(pulled), pulled

    def bounds(x: jax.Array, rz: jax.Array) -> tuple[jax.Array, jax.Array]:
        # ‖error of x‖² is at most that of y in the energy norm, r·A⁻¹r ≤ (shift/a) r·M⁻¹r: no pass over the rows.
        return rz * (shift / a), size(x)

    def unsolved(x: jax.Array, rz: jax.Array, i: jax.Array) -> jax.Array:
        error, whole = bounds(x, rz)
        # c may be orthogonal to all that R reaches: then x stays 0, and no error is small beside it.
        return (error > tolerance**2 * whole) & ((whole > 0) | (i == 0)) & (i < max_iterations)

    zero = jnp.zeros(rows.shape[1], rows.dtype)
    x, r, rz, iterations = preconditioned_gradients(operate, precondition, c, zero, unsolved)
    error = jnp.sqrt(_tree.ratio(*bounds(x, rz)))
    # What is not finite ends the loop: with x = 0 it must not pass for a solution.
    x = jnp.where(jnp.isfinite(rz) & jnp.isfinite(trace), a * x, jnp.nan)
    return RowSolution(x * of_c * of_rows, r * of_c, iterations, error)


def solver_of_positive(lower: Float[Array, "n n"]) -> Callable[[Float[Array, " n"]], Float[Array, " n"]]:
    """`solve(b)` for A x = b, from the lower triangle of a positive definite A; NaN where it is not one, to rounding.

    Block by block rather than by one call of the library. On CPUs that call runs in the BLAS's own threads, which go
    on spinning for some 20 ms, on the cores that XLA's threads then want: a step of 1,020 rows on two cores takes 51 ms
    this way and 62 that way in float32, 104 and 116 in float64. (On one core the call is the faster one: 73 ms and 65,
    160 and 136.) Blocks of this size stay in the calling thread.
    """
    block = 128 if lower.dtype == jnp.float32 else 64
    size = len(lower)
    if size <= block:
        factor = jnp.linalg.cholesky(lower, symmetrize_input=False)
        return lambda b: jax.scipy.linalg.cho_solve((factor, True), b)
    padding = -size % block
    left = jnp.pad(lower, ((0, padding), (0, padding)))
    left = left + jnp.diag((jnp.arange(size + padding) >= size).astype(lower.dtype))
    # Else XLA fuses what made the matrix into each of its three parts below.
    left = jax.lax.optimization_barrier(left)
    columns = []  # of L: the inverse of the block on the diagonal, and the blocks below it
    for _ in range(0, size, block):
        inverse = _inverse_of_triangular(jnp.linalg.cholesky(left[:block, :block], symmetrize_input=False))
        below = real_matmul(left[block:, :block], inverse.T)
        left = left[block:, block:] - real_matmul(below, below.T)
        columns.append((inverse, below))

    def solve(b: jax.Array) -> jax.Array:
        b = jnp.pad(b, (0, padding))
        forward = []
        for inverse, below in columns:
            y = real_matmul(inverse, b[:block])
            b = b[block:] - real_matmul(below, y)
            forward.append(y)
        x = b  # of no length by now
        for (inverse, below), y in zip(reversed(columns), reversed(forward), strict=True):
            x = jnp.concatenate([real_matmul(inverse.T, y - real_matmul(below.T, x)), x])
        return x[:size]

    return solve


@jax.jit  # of the many blocks of a matrix it is traced once
def _inverse_of_triangular(factor: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """L⁻¹ of a lower triangular L whose size is a power of two: of blocks of one, two, four ... on the diagonal."""
    inverse = 1 / jnp.diag(factor)[:, None, None]
    size = 1
    while size < len(factor):
        index = jnp.arange(len(factor) // (2 * size))
        blocks = factor.reshape(len(index), 2 * size, len(index), 2 * size)[index, :, index, :]
        first, second = inverse[0::2], inverse[1::2]
        corner = -real_matmul(real_matmul(second, blocks[:, size:, :size]), first)
        inverse = jnp.block([[first, jnp.zeros_like(first)], [corner, second]])
        size *= 2
    return inverse[0]


def _sum(*terms: tuple[Scalar, Tree]) -> Tree:
    """Σ factor · tree, in one pass, each factor cast to the precision of each leaf."""
    factors = [factor for factor, _ in terms]

    def add(*leaves: jax.Array) -> Any:
        return sum(jnp.asarray(f, _tree.real_dtype(x)) * x for f, x in zip(factors, leaves, strict=True))

    return jax.tree.map(add, *(tree for _, tree in terms))
