"""How implicit and linearly implicit solvers solve their linear systems: the classes behind `linear_solver=`."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax import _checks, _tree
from rk_optax.field import Capability, Linear, VectorField
from rk_optax.solver._linear import Scalar, Solution, conjugate_gradients, gmres, mixed, shifted_lanczos

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

PyTree = Any


class CoupledSolution(NamedTuple):
    """What a solver of coupled systems found."""

    x: PyTree  # stacked
    products: Int[Array, ""]
    residual: Float[Array, ""]  # relative; where there are several systems, a bound on that of all


class LinearSolver(abc.ABC):
    """Solves (I + c·PB) x = b by products with B. How exactly, and by how many products, the caller says.

    Attributes:
      needs: what it asks of the field whose Jacobian B is.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset()

    @abc.abstractmethod
    def solve(
        self, product: Linear, c: Scalar, b: PyTree, scale: PyTree | None, *, tolerance: float, max_iterations: int
    ) -> Solution:
        """The solution for a real c ≥ 0, from x = 0.

        Args:
          product: v ↦ Bv.
          c: a number or a real scalar.
          b: the right-hand side.
          scale: the positive diagonal of P, like b; None for I.
          tolerance: relative residual to reach, in the norm of P^(−1).
          max_iterations: cap on the products.
        """

    def linearized(self, field: VectorField, params: PyTree) -> Linear:
        """V ↦ Bv for the field's Jacobian at `params`, without preconditioner; a ValueError for one it cannot solve."""
        return field.hessian(params) if "symmetric" in self.needs else field.jacobian(params)

    @abc.abstractmethod
    def solve_coupled(
        self,
        product: Linear,
        h: Scalar,
        matrix: Float[np.ndarray, "s s"],
        b: PyTree,
        scale: PyTree | None,
        *,
        tolerance: float,
        max_iterations: int,
    ) -> CoupledSolution:
        """The solution of (I + h·A ⊗ PB) x = b for a small A (`matrix`, shape (s, s)) and b of s stacked trees.

        `max_iterations` caps the products of each of the s parts.
        """


@dataclasses.dataclass(frozen=True)
class ConjugateGradients(LinearSolver):
    """Conjugate gradients, for the symmetric B of a loss: the default. Three trees of memory, whatever the iterations.

    It stops where the curvature of I + c·PB along its direction is not positive. Coupled systems are turned into
    complex shifts of symmetric ones by the eigenvalues of A, and solved by the Lanczos process, its relative.

    >>> import rk_optax
    >>> rk_optax.RosenbrockEuler("hessian").linear_solver
    ConjugateGradients()

    Raises:
      ValueError: at construction of the optimizer, a field whose Jacobian need not be symmetric: use `Gmres`.

    Cost: a product for each iteration. Source: M. R. Hestenes and E. Stiefel, J. Res. Natl. Bur. Stand. 49 (1952).
    """

    needs: ClassVar[frozenset[Capability]] = frozenset({"symmetric"})

    def solve(
        self, product: Linear, c: Scalar, b: PyTree, scale: PyTree | None, *, tolerance: float, max_iterations: int
    ) -> Solution:
        """See `LinearSolver.solve`."""
        return conjugate_gradients(product, c, b, scale, tolerance=tolerance, max_iterations=max_iterations)

    def solve_coupled(
        self,
        product: Linear,
        h: Scalar,
        matrix: Float[np.ndarray, "s s"],
        b: PyTree,
        scale: PyTree | None,
        *,
        tolerance: float,
        max_iterations: int,
    ) -> CoupledSolution:
        """See `LinearSolver.solve_coupled`."""
        eigenvalues, vectors = np.linalg.eig(matrix)
        inverse = np.linalg.inv(vectors)
        dtype = _tree.common_dtype(_tree.default_float(), jnp.complex64)
        x, products, left = jax.tree.map(jnp.zeros_like, b), jnp.zeros([], jnp.int32), jnp.zeros([])
        for e in np.flatnonzero(np.imag(eigenvalues) >= 0):
            solve = functools.partial(
                shifted_lanczos, product, jnp.asarray(h, dtype) * eigenvalues[e], scale=scale, tolerance=tolerance
            )
            found = jax.lax.map(lambda part, solve=solve: solve(part, max_iterations=max_iterations), b)
            # Of a conjugate pair the other solution is the conjugate one.
            weights = (2 if np.imag(eigenvalues[e]) else 1) * np.outer(vectors[:, e], inverse[e])
            for part, y in zip((np.real(weights), -np.imag(weights)), found.x, strict=True):
                x = jax.tree.map(jnp.add, x, mixed(part, y))
            products += jnp.sum(found.iterations, dtype=jnp.int32)
            left += jnp.max(found.residual)
        return CoupledSolution(x, products, left)


CONJUGATE_GRADIENTS = ConjugateGradients()


@dataclasses.dataclass(frozen=True)
class Gmres(LinearSolver):
    """Restarted GMRES, for any B: games, and other fields that are the gradient of nothing.

    The iterates are those of the least residual, and need neither symmetry nor a transposed product. Each of the
    `restart` vectors of the basis takes as much memory as the parameters (for s coupled stages, s times as much), and
    a restart forgets it, which may slow convergence or end it: a system that `max_iterations` products do not solve is
    reported as not solved.

    >>> import jax.numpy as jnp, rk_optax
    >>> midpoint = rk_optax.Implicit(rk_optax.IMPLICIT_TABLEAUS["implicit_midpoint"], linear_solver=Gmres())
    >>> tx = rk_optax.game(
    ...     {"x": lambda p: p["x"] * p["y"], "y": lambda p: -p["x"] * p["y"]}, learning_rate=2.0, solver=midpoint)
    >>> params = {"x": jnp.array(0.6), "y": jnp.array(0.8)}
    >>> updates, _ = tx.update(tx.grad(params), tx.init(params), params)
    >>> print(f"{(params['x'] + updates['x']) ** 2 + (params['y'] + updates['y']) ** 2:.4f}")  # what the flow conserves
    1.0000

    Args:
      restart: products after which the basis is given up for a new one, at least 1.

    Raises:
      ValueError: `restart` is no integer of at least 1.

    Cost: a product for each iteration, and one more for each restart to make sure of the residual. Source: Y. Saad and
    M. H. Schultz, SIAM J. Sci. Stat. Comput. 7 (1986).
    """

    restart: int = 30

    def __post_init__(self):
        _checks.count(self.restart, "restart")

    def solve(
        self, product: Linear, c: Scalar, b: PyTree, scale: PyTree | None, *, tolerance: float, max_iterations: int
    ) -> Solution:
        """See `LinearSolver.solve`."""
        return gmres(
            lambda x: _tree.scale(c, product(x)),
            b,
            scale,
            restart=self.restart,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )

    def solve_coupled(
        self,
        product: Linear,
        h: Scalar,
        matrix: Float[np.ndarray, "s s"],
        b: PyTree,
        scale: PyTree | None,
        *,
        tolerance: float,
        max_iterations: int,
    ) -> CoupledSolution:
        """See `LinearSolver.solve_coupled`. One system of all stages, whose products take a product with B for each."""
        found = gmres(
            lambda x: _tree.scale(h, mixed(matrix, jax.lax.map(product, x))),
            b,
            None if scale is None else jax.tree.map(lambda p: p[None], scale),
            restart=self.restart,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )
        return CoupledSolution(found.x, found.iterations * len(matrix), found.residual)


def check_linear_solver(linear_solver: Any) -> None:
    """Raises a TypeError for anything but an instance of a `LinearSolver`."""
    if not isinstance(linear_solver, LinearSolver):
        name = linear_solver.__name__ if isinstance(linear_solver, type) else type(linear_solver).__name__
        raise TypeError(
            "linear_solver must be a LinearSolver, such as rk_optax.ConjugateGradients() or rk_optax.Gmres(), got "
            + name
            + ("; pass an instance, not the class." if isinstance(linear_solver, type) else ".")
        )
