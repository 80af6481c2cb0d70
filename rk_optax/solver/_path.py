"""All step sizes from one factorisation: the steps of linearly implicit Euler along h, and how to correct them.

g*(h) = (I + hPB)⁻¹P∇L for every h costs one factorisation of B, in the space of the parameters or of the residuals,
whichever is smaller. The same factor serves the further iterations of simplified Newton that turn the
linearly implicit step into one of backward Euler.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax import _precision, _tree
from rk_optax._vectors import RealVectors, length, real_matmul
from rk_optax.field import Linear, VectorField
from rk_optax.rows import DenseRows, Rows
from rk_optax.solver._base import Cost
from rk_optax.solver._factor import Eigenvectors, ShiftedFactor, Tridiagonal

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from rk_optax._tree import Tree


class Trial(NamedTuple):
    """What is seen at a trial point."""

    loss: Float[Array, ""]
    response: Float[Array, " n"]  # the residuals, of which `Path.corrected` makes the next iterate


class Path(abc.ABC):
    """The steps θ − h·g*(h) of all h, from one factorisation at θ.

    A step is carried by its coordinates in the basis of the factorisation. Everything is for k step sizes at once: `h`
    has shape (k,), and coordinates, directions and trials have a leading axis of that length.

    Attributes:
      correctable: whether `corrected` improves anything: where the loss is least squares and its rows are at hand.
      precise: whether by the singular values of the rows and not by their Gram matrix, of which rounding hides the
        eigenvalues below that of the largest.
    """

    correctable: ClassVar[bool] = False
    precise: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """Of its numbers; where that is float64 and `jax_enable_x64` is off, they are for `_precision.doubled`."""

    @property
    @abc.abstractmethod
    def typical(self) -> Float[Array, ""]:
        """A step size to begin with: one at which the larger eigenvalues are stiff and the others are not."""

    @property
    def largest(self) -> Float[Array, ""]:
        """An upper bound of the Gram matrix's largest eigenvalue; 0 where there is none."""
        return jnp.zeros([])

    @abc.abstractmethod
    def start(self, h: Float[Array, " k"]) -> Float[Array, "k m"]:
        """The coordinates of the linearly implicit steps, shape (k, n)."""

    @abc.abstractmethod
    def direction(self, h: Float[Array, " k"], coordinates: Float[Array, "k m"]) -> Tree:
        """g* like params, each leaf with a leading axis of length k."""

    @abc.abstractmethod
    def predicted_fall(self, h: Float[Array, " k"], coordinates: Float[Array, "k m"]) -> Float[Array, " k"]:
        """Of the loss, by the quadratic model, for linearly implicit steps; shape (k,)."""

    @abc.abstractmethod
    def evaluate(self, params: Tree) -> Trial:
        """What one trial point shows. Costs one loss."""

    def loss_at_start(self, params: Tree) -> Float[Array, ""]:
        """The loss at θ, which is `params`."""
        return self.evaluate(params).loss

    def corrected(
        self, h: Float[Array, " k"], coordinates: Float[Array, "k m"], response: Float[Array, "k n"]
    ) -> Float[Array, "k m"]:
        """One more iteration towards backward Euler, from what the trial points θ − h·g* showed, shape (k, N)."""
        del h, response
        return coordinates


class Factored(NamedTuple):
    """What a solver makes of one factorisation."""

    path: Path
    cost: Cost  # of the factorisation, in plain integers
    state: Tree  # of the solver, if a step of it is made


@dataclasses.dataclass(frozen=True, eq=False)
class LeastSquaresPath(Path):
    """By a factor WDWᵀ of a Gram matrix of R, the Jacobian of the residuals r.

    With z the coordinates, backward Euler with Rᵀ frozen at θ is z = response(z), and each iteration is
    z ← z − (I + hD)⁻¹(z − response(z)), from the linearly implicit z = (I + hD)⁻¹start.
    """

    field: VectorField
    theta: Float[Array, " p"]
    rows: Rows
    scale: Float[Array, " p"]  # P, the preconditioner
    residual: Float[Array, " n"]
    factor: ShiftedFactor
    started: Float[Array, "j m"] = dataclasses.field(init=False)  # Wᵀ of what `start` solves for, once for all h
    correctable: ClassVar[bool] = True

    def __post_init__(self):
        object.__setattr__(self, "started", self.factor.coordinates(self._wanted()))

    @abc.abstractmethod
    def _wanted(self) -> Float[Array, "j m"]:
        """The right-hand side of a linearly implicit step, or what it is combined of for each h."""

    @property
    def dtype(self) -> np.dtype:
        """See `Path.dtype`."""
        return self.rows.dtype

    @property
    def typical(self) -> Float[Array, ""]:
        """The reciprocal of the mean eigenvalue."""
        mean = self.factor.mean
        return jnp.where(mean > 0, _tree.ratio(jnp.ones_like(mean), mean), 1)

    @property
    def largest(self) -> Float[Array, ""]:
        """See `Path.largest`."""
        return self.factor.norm

    @property
    def l2(self) -> Float[Array, ""]:
        """λ, 0 where there is none."""
        return jnp.asarray(0.0 if self.field.l2 is None else self.field.l2, self.rows.dtype)

    def direction(self, h: Float[Array, " k"], coordinates: Float[Array, "k m"]) -> Tree:
        """See `Path.direction`."""
        return self.rows.vectors.unflatten(self._vectors(h, coordinates))

    def predicted_fall(self, h: Float[Array, " k"], coordinates: Float[Array, "k m"]) -> Float[Array, " k"]:
        """See `Path.predicted_fall`: h(⟨∇L, g*⟩ + ⟨g*, P⁻¹g*⟩)/2."""
        direction = self._vectors(h, coordinates)
        gradient = self.rows.rmv(self.residual) + self.l2 * self.theta
        # h·g* first: the product of two gradients may be out of range, in the units of the loss, where the fall is not.
        slope = gradient[None] + _tree.ratio(direction, self.scale[None])
        return 0.5 * jnp.sum((h[:, None] * direction) * slope, axis=1)

    def loss_at_start(self, params: Tree) -> Float[Array, ""]:
        """See `Path.loss_at_start`; of the residuals that came with the rows."""
        del params
        return 0.5 * (jnp.sum(self.residual * self.residual) + self.l2 * jnp.sum(self.theta * self.theta))

    @abc.abstractmethod
    def _vectors(self, h: Float[Array, " k"], coordinates: Float[Array, "k m"]) -> Float[Array, "k p"]:
        """The directions as vectors, shape (k, P)."""

    def evaluate(self, params: Tree) -> Trial:
        """The loss and the residuals at one point."""
        with _precision.callers():
            residual = self.field.residual(params)
            loss = 0.5 * _tree.inner(residual, residual)
            if self.field.l2 is not None:
                square = _tree.inner(params, params).astype(loss.dtype)
                loss = loss + 0.5 * jnp.asarray(self.field.l2, loss.dtype) * square
        return Trial(loss, residual.astype(self.rows.dtype))


class ParameterPath(LeastSquaresPath):
    """In the space of the P parameters: P^½(RᵀR + λI)P^½ = WDWᵀ, and g* = P^½Wz."""

    def _wanted(self) -> Float[Array, "j m"]:
        return ((self.rows.rmv(self.residual) + self.l2 * self.theta) * jnp.sqrt(self.scale))[None]

    def start(self, h: Float[Array, " k"]) -> Float[Array, "k m"]:
        """See `Path.start`."""
        return self.factor.solve(h, self.started)

    def corrected(
        self, h: Float[Array, " k"], coordinates: Float[Array, "k m"], response: Float[Array, "k n"]
    ) -> Float[Array, "k m"]:
        """See `Path.corrected`."""
        moved = self.theta[None] - h[:, None] * self._vectors(h, coordinates)
        pulled = (self.rows.rmv(response) + self.l2 * moved) * jnp.sqrt(self.scale)[None]
        return coordinates - self.factor.solve(h, coordinates - self.factor.coordinates(pulled))

    def _vectors(self, h: Float[Array, " k"], coordinates: Float[Array, "k m"]) -> Float[Array, "k p"]:
        del h
        return self.factor.vectors(coordinates) * jnp.sqrt(self.scale)[None]


class RowPath(LeastSquaresPath):
    """In the space of the N residuals: RPRᵀ = WDWᵀ, and g* = (PRᵀWz + λθ)/(1 + hλ), with P = I where λ is not 0."""

    def _wanted(self) -> Float[Array, "j m"]:
        without_decay = self.residual[None]
        if self.field.l2 is None:
            return without_decay
        return jnp.concatenate([without_decay, self.rows.mv(self.theta)[None]])

    def start(self, h: Float[Array, " k"]) -> Float[Array, "k m"]:
        """See `Path.start`."""
        wanted = self.started[:1]
        if len(self.started) > 1:
            wanted = wanted - (self._short(h) * self.l2)[:, None] * self.started[1:]
        return self.factor.solve(self._short(h), wanted)

    def corrected(
        self, h: Float[Array, " k"], coordinates: Float[Array, "k m"], response: Float[Array, "k n"]
    ) -> Float[Array, "k m"]:
        """See `Path.corrected`."""
        return coordinates - self.factor.solve(self._short(h), coordinates - self.factor.coordinates(response))

    def _vectors(self, h: Float[Array, " k"], coordinates: Float[Array, "k m"]) -> Float[Array, "k p"]:
        return (self._pulled(coordinates) + (self.l2 * self.theta)[None]) / (1 + h * self.l2)[:, None]

    def _pulled(self, coordinates: Float[Array, "k m"]) -> Float[Array, "k p"]:
        """PRᵀWz."""
        return self.rows.rmv(self.factor.vectors(coordinates)) * self.scale[None]

    def _short(self, h: Float[Array, " k"]) -> Float[Array, " k"]:
        return h / (1 + h * self.l2)


@dataclasses.dataclass(frozen=True, eq=False)
class SingularPath(RowPath):
    """By the singular values and vectors of R itself, RP^½ = US^½Vᵀ, for a precision in which RRᵀ has too few digits.

    The step of a large h is a small difference of large terms in PRᵀUz, and a sum of the terms that stay in P^½VS^½z.
    """

    singular: Float[Array, " m"]  # S^½
    right: Float[Array, "p m"]  # V
    decayed: bool = False  # whether λ is in further rows, √λ I, with the residuals √λ θ
    precise: ClassVar[bool] = True

    @property
    def l2(self) -> Float[Array, ""]:
        """See `LeastSquaresPath.l2`: 0 where the rows see to it."""
        return jnp.zeros([], self.rows.dtype) if self.decayed else super().l2

    def evaluate(self, params: Tree) -> Trial:
        """See `LeastSquaresPath.evaluate`."""
        trial = super().evaluate(params)
        if not self.decayed:
            return trial
        return trial._replace(response=self.with_decay(trial.response, self.rows.vectors.flatten(params), super().l2))

    @staticmethod
    def with_decay(
        rows: Float[Array, "n ..."], further: Float[Array, "p ..."], l2: Float[Array, ""]
    ) -> Float[Array, "n+p ..."]:
        """Residuals or their rows, with those of (λ/2)‖θ‖²."""
        return jnp.concatenate([rows, jnp.sqrt(l2) * further])

    def _pulled(self, coordinates: Float[Array, "k m"]) -> Float[Array, "k p"]:
        return real_matmul(coordinates * self.singular[None], self.right.T) * jnp.sqrt(self.scale)[None]


def least_squares_path(
    field: VectorField, params: Tree, *, parameters: bool, precise: bool = False
) -> LeastSquaresPath:
    """The path at `params`, in the space of the `parameters` or of the residuals. Costs the rows.

    In float64, also where `jax_enable_x64` is off: then its numbers are for `_precision.doubled`. Without either it is
    by singular values in float32, and so it is in float64 if `precise`, wherever all rows are in one array.
    """
    real = _precision.widest_float()
    rows = field.rows(params)
    with _precision.doubled(real):
        return _factored(field, params, rows.astype(real), parameters=parameters, precise=precise)


def _factored(field: VectorField, params: Tree, rows: Rows, *, parameters: bool, precise: bool) -> LeastSquaresPath:
    real, vectors, residual = rows.dtype, rows.vectors, rows.residual.astype(rows.dtype)
    theta, scale = vectors.flatten(params), vectors.diagonal(field.scale)
    l2 = jnp.asarray(0.0 if field.l2 is None else field.l2, real)
    if (jnp.finfo(real).bits < 64 or (precise and rows.in_one_array)) and min(rows.shape) > 0:
        matrix, decayed = rows.matrix(), parameters and field.l2 is not None
        if decayed:
            matrix = SingularPath.with_decay(matrix, jnp.eye(len(theta), dtype=real), l2)
            residual = SingularPath.with_decay(residual, theta, l2)
        singular, left, right = _singular(matrix * jnp.sqrt(scale)[None])
        factor = Eigenvectors(singular * singular, left)
        rows = DenseRows(vectors, residual, matrix)
        return SingularPath(field, theta, rows, scale, residual, factor, singular, right, decayed)
    lower = rows.gram("parameters" if parameters else "residuals", None if field.scale is None else scale)
    if parameters:
        lower = lower + jnp.diag(l2 * scale)
    lower = underivable(lower)  # JAX would say that the reduction has no derivative, and not what to do
    factor = Tridiagonal.of(lower) if lower.size else Eigenvectors(jnp.zeros(0, real), jnp.zeros((0, 0), real))
    return (ParameterPath if parameters else RowPath)(field, theta, rows, scale, residual, factor)


@jax.custom_jvp
def underivable(tree: Tree) -> Tree:
    """`tree`. Derivatives would be those of the factorisation, NaN where two eigenvalues agree, if it has any."""
    return tree


@underivable.defjvp
def _(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise ValueError(
        "An update of path_control cannot be differentiated: which trial step is the best jumps with what it depends "
        "on, and its factorisation has no derivative where eigenvalues agree. Differentiate "
        "through an explicit method, or rosenbrock_euler(curvature='diagonal'), with another rule."
    )


def _singular(
    matrix: Float[Array, "n p"],
) -> tuple[Float[Array, " m"], Float[Array, "n m"], Float[Array, "p m"]]:
    """S^½, U and V of M = US^½Vᵀ; of a triangular factor, which takes half the time of M itself."""
    wide = matrix.shape[0] < matrix.shape[1]
    orthogonal, triangle = jnp.linalg.qr(matrix.T if wide else matrix)
    first, singular, second = jnp.linalg.svd(triangle, full_matrices=False)
    long, short = real_matmul(orthogonal, first), second.T
    left, right = (short, long) if wide else (long, short)
    # What the residuals do not depend on would move by rounding.
    right = jnp.where(jnp.any(matrix != 0, axis=0)[:, None], right, 0)
    return singular, left, right


@dataclasses.dataclass(frozen=True, eq=False)
class KrylovPath(Path):
    """In the Krylov space of P^½BP^½ and P^½∇L: the shifted systems of all h share it. g* = P^½VᵀQz, T = QSQᵀ.

    With the absolute eigenvalues of an indefinite B the steps leave saddle points instead of seeking them.
    """

    field: VectorField
    vectors: RealVectors
    root: Float[Array, " p"]  # P^½
    space: Float[Array, "m p"]  # orthonormal rows V, those after an invariant subspace zero
    eigenvalues: Float[Array, " m"]  # Ritz values
    basis: Float[Array, "m m"]
    size: Float[Array, ""]  # ‖P^½∇L‖

    @property
    def dtype(self) -> np.dtype:
        """See `Path.dtype`."""
        return self.vectors.dtype

    @property
    def typical(self) -> Float[Array, ""]:
        """The reciprocal of the largest Ritz value."""
        largest = jnp.max(jnp.abs(self.eigenvalues), initial=0)
        return jnp.where(largest > 0, _tree.ratio(jnp.ones_like(largest), largest), 1)

    def start(self, h: Float[Array, " k"]) -> Float[Array, "k m"]:
        """See `Path.start`."""
        return (self.size * self.basis[0])[None] / (1 + h[:, None] * jnp.abs(self.eigenvalues)[None])

    def direction(self, h: Float[Array, " k"], coordinates: Float[Array, "k m"]) -> Tree:
        """See `Path.direction`."""
        del h
        return self.vectors.unflatten(real_matmul(real_matmul(coordinates, self.basis.T), self.space) * self.root[None])

    def predicted_fall(self, h: Float[Array, " k"], coordinates: Float[Array, "k m"]) -> Float[Array, " k"]:
        """See `Path.predicted_fall`."""
        slope = (self.size * self.basis[0])[None] + coordinates
        return 0.5 * jnp.sum((h[:, None] * coordinates) * slope, axis=1)  # in this order, as for least squares

    def evaluate(self, params: Tree) -> Trial:
        """The loss at one point."""
        return Trial(self.field.loss(params), jnp.zeros((0,), self.space.dtype))


def krylov_path(field: VectorField, params: Tree, k1: Tree, product: Linear, dimension: int) -> KrylovPath:
    """The path at `params` with the matrix whose products are given. Costs `dimension` products."""
    real = _tree.default_float()
    vectors = RealVectors(params, real)
    root = jnp.sqrt(vectors.diagonal(field.scale))
    b = _tree.ratio(vectors.flatten(k1), root)
    size = length(b)
    dimension = max(min(dimension, b.size), 1)

    def operate(v: jax.Array) -> jax.Array:
        return root * vectors.flatten(product(vectors.tree(root * v)))

    def extend(i: Any, carry: Any) -> Any:
        space, diagonal, below = carry
        w = operate(space[i])
        diagonal = diagonal.at[i].set(real_matmul(space[i], w))
        norm = length(w)
        for _ in range(2):  # full orthogonalisation, twice: rounding would bring found directions back
            w = w - real_matmul(real_matmul(space, w), space)
        new = length(w)
        new = jnp.where(new > 10 * jnp.finfo(real).eps * norm, new, 0)
        space = space.at[i + 1].set(_tree.ratio(w, new), mode="drop")
        return space, diagonal, below.at[i].set(new)

    space = jnp.zeros((dimension, b.size), real).at[0].set(_tree.ratio(b, size))
    space, diagonal, below = jax.lax.fori_loop(
        0, dimension, extend, (space, jnp.zeros(dimension, real), jnp.zeros(dimension, real))
    )
    off = below[:-1]
    eigenvalues, basis = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(off, 1) + jnp.diag(off, -1))
    return KrylovPath(field, vectors, root, space, eigenvalues, basis, size)
