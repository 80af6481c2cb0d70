"""Factors of a symmetric matrix A with which (I + hA) x = b costs little for every h."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax._vectors import real_matmul

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class ShiftedFactor(abc.ABC):
    """A = WDWᵀ with orthonormal columns W and a D whose shifted systems are cheap. Vectors are rows."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """Of D."""

    @property
    @abc.abstractmethod
    def mean(self) -> Float[Array, ""]:
        """The mean eigenvalue of A."""

    @property
    @abc.abstractmethod
    def norm(self) -> Float[Array, ""]:
        """The largest eigenvalue of A, or a little more."""

    @abc.abstractmethod
    def coordinates(self, x: Float[Array, "k m"]) -> Float[Array, "k n"]:
        """Wᵀx."""

    @abc.abstractmethod
    def vectors(self, z: Float[Array, "k n"]) -> Float[Array, "k m"]:
        """Wz."""

    @abc.abstractmethod
    def solve(self, h: Float[Array, " k"], z: Float[Array, "#k n"]) -> Float[Array, "k n"]:
        """(I + hD)⁻¹z for each h; z has one row where it is the same for all."""


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenvectors(ShiftedFactor):
    """D is diagonal."""

    eigenvalues: Float[Array, " n"]  # not negative
    basis: Float[Array, "m n"]  # the eigenvectors are its columns

    @property
    def size(self) -> int:
        """See `ShiftedFactor.size`."""
        return len(self.eigenvalues)

    @property
    def mean(self) -> Float[Array, ""]:
        """See `ShiftedFactor.mean`."""
        return jnp.mean(self.eigenvalues) if self.eigenvalues.size else jnp.zeros([], self.eigenvalues.dtype)

    @property
    def norm(self) -> Float[Array, ""]:
        """See `ShiftedFactor.norm`."""
        return jnp.max(self.eigenvalues, initial=0)

    def coordinates(self, x: Float[Array, "k m"]) -> Float[Array, "k n"]:
        """See `ShiftedFactor.coordinates`."""
        return real_matmul(x, self.basis)

    def vectors(self, z: Float[Array, "k n"]) -> Float[Array, "k m"]:
        """See `ShiftedFactor.vectors`."""
        return real_matmul(z, self.basis.T)

    def solve(self, h: Float[Array, " k"], z: Float[Array, "#k n"]) -> Float[Array, "k n"]:
        """See `ShiftedFactor.solve`."""
        return z / (1 + h[:, None] * self.eigenvalues[None])


@dataclasses.dataclass(frozen=True, eq=False)
class Tridiagonal(ShiftedFactor):
    """D is tridiagonal, by Householder reflections: 0.4 of the time of the eigenvectors, and a solve is O(n).

    W is kept as the blocked reflections I − VTVᵀ (Schreiber and Van Loan 1989), for V of 64 columns: to form it would
    take as long as the reduction.
    """

    diagonal: Float[Array, " n"]
    off: Float[Array, " n-1"]
    reflectors: Float[Array, "blocks n 64"]  # V
    triangles: Float[Array, "blocks 64 64"]  # T

    @classmethod
    def of(cls, lower: Float[Array, "n n"]) -> Tridiagonal:
        """From the lower triangle of A, n ≥ 1."""
        n, width = len(lower), 64
        packed, diagonal, off, scales = jax.lax.linalg.tridiagonal(lower, lower=True)
        # Column j has the vector of reflection j below the subdiagonal, where a 1 is understood.
        v = jnp.tril(packed[:, : n - 1], -2) + jnp.eye(n, n - 1, -1, dtype=lower.dtype)
        idle = scales == 0  # the identity
        v = jnp.pad(jnp.where(idle[None], 0, v), ((0, 0), (0, -(n - 1) % width)))
        inverse = jnp.pad(1 / jnp.where(idle, 1, scales), (0, v.shape[1] - n + 1), constant_values=1)
        v, inverse = v.reshape(n, -1, width).transpose(1, 0, 2), inverse.reshape(-1, width)
        products = jax.lax.batch_matmul(v.transpose(0, 2, 1), v, precision="highest")
        identity = jnp.broadcast_to(jnp.eye(width, dtype=lower.dtype), products.shape)
        triangles = jax.scipy.linalg.solve_triangular(
            jnp.triu(products, 1) + identity * inverse[:, None], identity, unit_diagonal=False
        )
        return cls(diagonal, off, v, triangles)

    @property
    def size(self) -> int:
        """See `ShiftedFactor.size`."""
        return len(self.diagonal)

    @property
    def mean(self) -> Float[Array, ""]:
        """See `ShiftedFactor.mean`."""
        return jnp.mean(self.diagonal)

    @property
    def norm(self) -> Float[Array, ""]:
        """See `ShiftedFactor.norm`: by the circles of Gershgorin."""
        beside = jnp.pad(jnp.abs(self.off), 1)
        return jnp.max(jnp.abs(self.diagonal) + beside[:-1] + beside[1:])

    def coordinates(self, x: Float[Array, "k m"]) -> Float[Array, "k n"]:
        """See `ShiftedFactor.coordinates`."""
        return jax.lax.scan(self._reflect, x, (self.reflectors, self.triangles))[0]

    def vectors(self, z: Float[Array, "k n"]) -> Float[Array, "k m"]:
        """See `ShiftedFactor.vectors`."""
        transposed = self.triangles.transpose(0, 2, 1)
        return jax.lax.scan(self._reflect, z, (self.reflectors, transposed), reverse=True)[0]

    @staticmethod
    def _reflect(
        x: Float[Array, "k n"], block: tuple[Float[Array, "n 64"], Float[Array, "64 64"]]
    ) -> tuple[Float[Array, "k n"], None]:
        v, triangle = block
        return x - real_matmul(real_matmul(real_matmul(x, v), triangle), v.T), None

    def solve(self, h: Float[Array, " k"], z: Float[Array, "#k n"]) -> Float[Array, "k n"]:
        """See `ShiftedFactor.solve`. Of (I/m + (h/m)D) x = z/m with m = max(1, h‖D‖), in which nothing overflows."""
        norm = self.norm
        inverse = _tree.ratio(jnp.ones_like(norm), norm)
        # Rounding may have made the least eigenvalues a little negative.
        shift = 0.5 * float(jnp.finfo(norm.dtype).eps)
        part = jnp.where(h * norm > 1, inverse, h)[:, None]
        whole = jnp.where(h * norm > 1, inverse / h, 1)[:, None]
        main = whole + part * (self.diagonal + shift * norm)[None]
        beside = jnp.pad(part * self.off[None], ((0, 0), (1, 1)))
        right = (whole * z)[..., None]
        return jax.lax.linalg.tridiagonal_solve(beside[:, :-1], main, beside[:, 1:], right)[..., 0]
