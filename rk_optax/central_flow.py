"""Flows that gradient descent follows more closely than the gradient flow does.

Each is what `rk_optax.gradient_flow` integrates instead of, or by, something of the package's own: two of them change
the field (`field=`), the central flow is a solver (`solver=`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from rk_optax import _checks, _lanczos, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost, Quantity, Solver, Step

PyTree = Any


def implicit_gradient_regularization(learning_rate: float) -> Callable[[VectorField], VectorField]:
    """The modified flow of gradient descent, dθ/dt = −(g + (h/2)Hg): that of L + (h/4)‖∇L‖².

    Gradient descent with rate h stays within O(h²) of it, and within O(h) of the gradient flow. An evaluation costs a
    gradient and a Hessian product.

    >>> import jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return 0.5 * jnp.sum(w ** 2)
    >>> field = rk_optax.implicit_gradient_regularization(0.1)
    >>> flow = rk_optax.gradient_flow(loss_fn, jnp.ones(1), [0.0, 1.0], field=field)
    >>> print(f"{float(flow.params[0]):.4f}, ten steps of gradient descent {0.9 ** 10:.4f}")
    0.3499, ten steps of gradient descent 0.3487

    Args:
      learning_rate: h of gradient descent, positive.

    Raises:
      ValueError: a rate that is not positive; in `gradient_flow`, a `grad_fn` without a loss.

    Source: Barrett and Dherin, "Implicit gradient regularization" (2021).
    """
    h = _checks.number(learning_rate, "learning_rate", "positive")

    def modify(field: VectorField) -> VectorField:
        gradient = _smooth(field)

        def modified(params: PyTree) -> PyTree:
            g = gradient(params)
            return _tree.add_scaled(g, h / 2, jax.jvp(gradient, (params,), (g,))[1])

        return _instead(field, modified)

    return modify


def principal_flow(learning_rate: float, max_parameters: int = 1000) -> Callable[[VectorField], VectorField]:
    """The principal flow, dθ/dt = Σ_i log|1 − hλ_i|/(hλ_i)·⟨∇L, u_i⟩ u_i: exact for gradient descent on a quadratic.

    At t = nh it is at the n-th iterate, as long as every hλ < 1; for hλ > 1 the flow proper is complex (the iterates
    change sign at each step), and this one follows their size. The Hessian is formed and diagonalised at every
    evaluation, which costs a product for each parameter: an oracle for small problems.

    >>> import jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return 0.5 * jnp.sum(jnp.array([1.0, 5.0]) * w ** 2)
    >>> flow = rk_optax.gradient_flow(loss_fn, jnp.ones(2), [0.0, 1.0], field=rk_optax.principal_flow(0.1), rtol=1e-6)
    >>> [f"{x:.4f}" for x in flow.params], [f"{(1 - 0.1 * a) ** 10:.4f}" for a in (1, 5)]
    (['0.3487', '0.0010'], ['0.3487', '0.0010'])

    Args:
      learning_rate: h of gradient descent, positive.
      max_parameters: refuse to form a larger Hessian.

    Raises:
      ValueError: a rate that is not positive; in `gradient_flow`, too many parameters or a `grad_fn` without a loss.

    Source: Rosca, Wu, Qin and Dherin (2023), arXiv 2302.01952.
    """
    h = _checks.number(learning_rate, "learning_rate", "positive")
    most = _checks.count(max_parameters, "max_parameters")

    def modify(field: VectorField) -> VectorField:
        gradient = _smooth(field)

        def modified(params: PyTree) -> PyTree:
            flat, unravel = jax.flatten_util.ravel_pytree(params)
            if flat.size > most or jnp.iscomplexobj(flat):
                raise ValueError(
                    f"principal_flow forms the Hessian of real parameters, at most {most}; got {flat.size} of dtype "
                    f"{flat.dtype}. Raise max_parameters, or use implicit_gradient_regularization."
                )

            def of_flat(w: jax.Array) -> jax.Array:
                return jax.flatten_util.ravel_pytree(gradient(unravel(w)))[0]

            values, vectors = jnp.linalg.eigh(jax.jacfwd(of_flat)(flat))
            x = h * values
            small = jnp.abs(x) < 1e-4
            factor = jnp.where(small, 1 + x / 2, -jnp.log(jnp.abs(1 - x)) / jnp.where(small, 1, x))
            return unravel(vectors @ (factor * (vectors.T @ of_flat(flat))))

        return _instead(field, modified)

    return modify


def _smooth(field: VectorField) -> Callable[[PyTree], PyTree]:
    if field.smooth_field is None:
        raise ValueError(
            "This flow needs Hessian products: pass loss_fn (a grad_fn is not known to be differentiable)."
        )
    return field.smooth_field


def _instead(field: VectorField, modified: Callable[[PyTree], PyTree]) -> VectorField:
    """`field` with another right-hand side: what is left of the loss's structure would be wrong."""
    return dataclasses.replace(
        field,
        evaluate=lambda params, stage: modified(params),
        smooth_field=modified,
        gradient=modified,
        structure=None,
    )


class CentralFlowState(NamedTuple):
    """State of `CentralFlow`, of the latest step."""

    sharpness: jax.Array  # shape=(k,), float: the largest eigenvalues of the Hessian, descending
    oscillation: jax.Array  # shape=(k,), float: eigenvalues of Σ, the covariance of the oscillation, ascending
    guess: PyTree  # like params: where Lanczos starts the next time
    converged: jax.Array  # shape=(), bool: whether its eigenvectors did


@dataclasses.dataclass(frozen=True)
class CentralFlow(Solver):
    """The central flow of gradient descent: the path that it follows on average at the edge of stability.

    dθ/dt = −(∇L + ½∇⟨Σ, H⟩), where Σ ⪰ 0, in the span of the top k eigenvectors of the Hessian H, is the covariance of
    gradient descent's oscillation: it is what holds their eigenvalues at or below 2/η, and 0 where they are below. A
    step of the flow is an Euler step whose Σ solves that complementarity problem for the Hessian at its end, so h has
    to be a fraction of η.

    >>> import jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return 0.5 * w[0] ** 2 * w[1] - w[1]  # sharpness w[1] grows, up to 2/η
    >>> solver = rk_optax.CentralFlow(learning_rate=0.5, k=1)
    >>> flow = rk_optax.gradient_flow(loss_fn, jnp.array([0.0, 3.0]), [0.0, 3.0], solver=solver, step_size=0.1)
    >>> print(f"{float(flow.params[1]):.3f}, {float(flow.state.solver.oscillation[0]):.3f}")  # 2/η, and 2 by hand
    4.000, 2.000

    Use it with `rk_optax.gradient_flow(..., solver=CentralFlow(eta), step_size=eta / 4)`, forward in time and without a
    preconditioner.

    Args:
      learning_rate: η of gradient descent.
      k: eigenvalues that may be at the edge at once, with room to spare.
      basis: vectors of the Krylov space that finds them; by default 2k + 8.
      tolerance: of the eigenvectors, as in `rk_optax.spectrum.eigenpairs`.
      max_products: bound on the Hessian products of a step.

    Raises:
      ValueError: an argument out of its range; in `gradient_flow`, a preconditioner or a `grad_fn` without a loss.

    Cost of a step: the products of Lanczos's method (some 10, started from the last step's eigenvectors) and k(k + 1)/2
    third derivatives of about four gradients, counted as products. Memory: as many vectors like params.

    Source: Cohen, Damian, Talwalkar, Kolter and Lee, "Understanding optimization in deep learning with central flows"
      (ICLR 2025), arXiv 2410.24206.
    """

    learning_rate: float
    k: int = 3
    basis: int | None = None
    tolerance: float = 1e-3
    max_products: int = 200
    needs: ClassVar[frozenset[Capability]] = frozenset({"product"})

    def __post_init__(self):
        _checks.number(self.learning_rate, "learning_rate", "positive")
        _checks.count(self.k, "k")
        if self.basis is not None and _checks.count(self.basis, "basis") <= self.k:
            raise ValueError(f"basis must be larger than k = {self.k}, got {self.basis}.")
        _checks.number(self.tolerance, "tolerance", "positive")
        _checks.count(self.max_products, "max_products")

    def init(self, params: PyTree) -> CentralFlowState:
        """Nothing seen yet; Lanczos starts from random signs."""
        k = min(self.k, _lanczos.dimension(params))
        zero = jnp.zeros([k], _tree.default_float())
        guess = jax.tree.map(jnp.zeros_like, params)
        return CentralFlowState(zero, jnp.zeros_like(zero), guess, jnp.ones([], bool))

    def step(
        self,
        field: VectorField,
        params: PyTree,
        k1: PyTree,
        h: Any,
        state: CentralFlowState,
        *,
        wants: frozenset[Quantity] = frozenset(),
    ) -> Step:
        """One step; see `Solver.step`."""
        del wants
        if field.scale is not None:
            raise ValueError("CentralFlow is that of gradient descent: it takes no preconditioner.")
        gradient = _smooth(field)
        k = len(state.sharpness)
        unknowns = _lanczos.dimension(params)
        size = min(2 * k + 8 if self.basis is None else self.basis, unknowns)
        fresh = _lanczos.random_vector(jax.random.key(0), params)
        # A little of everything, or an eigenvector that becomes important would be seen by rounding alone.
        start = _tree.add_scaled(state.guess, 1e-2 / np.sqrt(unknowns), fresh)
        pairs = _lanczos.eigenpairs(
            field.hessian(params), start, k, 0, size=size, tolerance=self.tolerance, max_products=self.max_products
        )
        i, j = np.triu_indices(k)

        def third(indices: tuple[jax.Array, jax.Array]) -> PyTree:
            """∇(u_iᵀHu_j), the second derivative of the gradient along u_i and u_j, by forward mode alone."""
            u, v = (jax.tree.map(lambda rows, n=n: rows[n], pairs.vectors) for n in indices)

            def along(theta: PyTree) -> PyTree:
                return jax.jvp(gradient, (theta,), (u,))[1]

            return jax.jvp(along, (params,), (v,))[1]

        thirds = jax.lax.map(third, (jnp.asarray(i), jnp.asarray(j)))
        entries = np.zeros((k, k), int)
        entries[i, j] = entries[j, i] = np.arange(len(i))
        dtype = pairs.values.dtype
        overlaps = _gram(thirds, dtype)[entries][:, :, entries]  # [i, j, k, l]
        falls = _overlaps(thirds, k1, dtype)[entries]
        h = jnp.asarray(h, dtype)
        room = (2 / self.learning_rate) * jnp.eye(k, dtype=dtype) - jnp.diag(pairs.values) + h * falls
        # Those far below the edge cannot oscillate, and their couplings would only slow the iteration down.
        near = jnp.diagonal(room) < 0.2 / self.learning_rate
        both = near[:, None] & near
        room = jnp.where(both, room, jnp.eye(k, dtype=dtype))
        overlaps = jnp.where(both[:, :, None, None] & both, overlaps, 0)
        covariance = complementary(room, 0.5 * h * overlaps)
        weights = covariance[i, j] * np.where(i == j, 0.5, 1.0)  # ½Σ over both triangles
        direction = jax.tree.map(jnp.add, k1, _lanczos.combined(thirds, weights))
        known = _tree.default_float()
        new = CentralFlowState(
            pairs.values.astype(known),
            jnp.linalg.eigvalsh(covariance).astype(known),
            _tree.cast_like(jax.tree.map(lambda rows: jnp.sum(rows, axis=0), pairs.vectors), params),
            pairs.converged,
        )
        products = pairs.products + 2 * len(i)
        return Step(
            direction, Cost(gradients=1, products=products), solved=jnp.all(jnp.isfinite(covariance)), state=new
        )


def complementary(constant: jax.Array, linear: jax.Array, iterations: int = 2000) -> jax.Array:
    """The X ⪰ 0 with R = A + B[X] ⪰ 0 and ⟨X, R⟩ = 0, for symmetric A and a positive semidefinite operator B.

    That is the minimum of ½⟨X, B[X]⟩ + ⟨A, X⟩ over X ⪰ 0, found by projected gradients with momentum and restarts, in
    units in which the diagonal of B is at most 1.

    Args:
      constant: A, shape (k, k).
      linear: B, shape (k, k, k, k), B[X]_ij = Σ B_ijkl X_kl.
      iterations: bound on the iterations, each an eigendecomposition of a k × k matrix.
    """
    k = len(constant)
    diagonal = jnp.max(jnp.einsum("ijij->ij", linear), axis=1)
    tiny = jnp.finfo(constant.dtype).tiny
    unit = jnp.where(diagonal > 0, jnp.maximum(diagonal, tiny) ** -0.25, 1)
    a = constant * unit[:, None] * unit
    b = linear * jnp.einsum("i,j,k,l->ijkl", unit, unit, unit, unit)
    if k == 1:
        x = jnp.where(diagonal > 0, jnp.maximum(-a, 0) / jnp.where(diagonal > 0, b[0, 0], 1), 0)
        return x * unit**2
    steepest = jnp.maximum(jnp.linalg.eigvalsh(b.reshape(k * k, k * k))[-1], tiny)
    eps = jnp.finfo(constant.dtype).eps

    def projected(x: jax.Array) -> jax.Array:
        values, vectors = jnp.linalg.eigh(0.5 * (x + x.T))
        return jnp.matmul(vectors * jnp.maximum(values, 0), vectors.T, precision=jax.lax.Precision.HIGHEST)

    def iterate(carry: Any) -> Any:
        x, y, momentum, _, n = carry
        slope = a + jnp.einsum("ijkl,kl->ij", b, y, precision=jax.lax.Precision.HIGHEST)
        new = projected(y - slope / steepest)
        uphill = jnp.sum((y - new) * (new - x)) > 0
        momentum = jnp.where(uphill, 1.0, momentum)
        following = 0.5 * (1 + jnp.sqrt(1 + 4 * momentum**2))
        y = new + jnp.where(uphill, 0, (momentum - 1) / following) * (new - x)
        return new, y, following, jnp.max(jnp.abs(new - x)), n + 1

    def go_on(carry: Any) -> jax.Array:
        x, _, _, change, n = carry
        return (n < iterations) & (change > 4 * eps * jnp.max(jnp.abs(x)))

    zero = jnp.zeros_like(a)
    one = jnp.ones([], a.dtype)
    x, *_ = jax.lax.while_loop(go_on, iterate, (zero, zero, one, jnp.asarray(jnp.inf, a.dtype), jnp.asarray(0)))
    # NaN ends the loop at once with x = 0, and must not pass for a solution.
    return jnp.where(jnp.all(jnp.isfinite(a)), x * unit[:, None] * unit, jnp.nan)


def _overlaps(rows: PyTree, x: PyTree, dtype: Any) -> jax.Array:
    """Re⟨row, x⟩ for every row."""
    parts = jax.tree.map(
        lambda r, y: jnp.real(
            jnp.matmul(jnp.conj(r).reshape(len(r), -1), y.reshape(-1), precision=jax.lax.Precision.HIGHEST)
        ).astype(dtype),
        rows,
        x,
    )
    return functools.reduce(jnp.add, jax.tree.leaves(parts))


def _gram(rows: PyTree, dtype: Any) -> jax.Array:
    """Re⟨row, row⟩ for every pair."""
    parts = []
    for r in jax.tree.leaves(rows):
        flat = r.reshape(len(r), -1)
        parts.append(jnp.real(jnp.matmul(jnp.conj(flat), flat.T, precision=jax.lax.Precision.HIGHEST)).astype(dtype))
    return functools.reduce(jnp.add, parts)
