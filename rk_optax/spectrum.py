"""The spectrum of a loss's curvature: sharpness, eigenpairs at both ends, and the spectral density.

The matrix is the Hessian ∇²L or the generalised Gauss–Newton matrix of the loss at `params`, and is never formed: all
is made of its products with vectors, each an exact mean over micro-batches where `batches` cuts the data. A product
costs about two gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _lanczos, _tree
from rk_optax.field import Linear
from rk_optax.micro_batches import MicroBatches, bind
from rk_optax.objective import Objective
from rk_optax.parameter_view import ParameterView, check_stage_dtype

PyTree = Any
Matrix = Literal["hessian", "gauss_newton"]
Product = Callable[[PyTree], PyTree]


class Eigenpairs(NamedTuple):
    """Eigenvalues and orthonormal eigenvectors at the ends of a spectrum."""

    values: jax.Array  # shape=(k + bottom,): descending; the last `bottom` are the smallest of the whole spectrum
    vectors: PyTree  # like params, each leaf with a leading axis of length k + bottom
    residuals: jax.Array  # shape=(k + bottom,): ‖Hv − λv‖, which bounds the error of an eigenvalue
    products: jax.Array  # shape=(), int32: products with the matrix
    converged: jax.Array  # shape=(), bool: whether every residual is within the tolerance


class Density(NamedTuple):
    """A spectral density as point masses: n_probes Gauss quadratures of `steps` nodes each."""

    nodes: jax.Array  # shape=(probes, steps): where the masses are
    weights: jax.Array  # shape=(probes, steps): the masses; together they are 1

    def at(self, points: jax.Array, width: float) -> jax.Array:
        """The density at `points`, each mass smeared out to a normal distribution of standard deviation `width`.

        Args:
          points: real numbers, any shape.
          width: positive, in the units of the eigenvalues; a hundredth of their range is usual.
        """
        width = _checks.number(width, "width", "positive")
        offset = (jnp.asarray(points)[..., None] - self.nodes.reshape(-1)) / width
        normal = jnp.exp(-0.5 * offset**2) / (width * math.sqrt(2 * math.pi))
        return jnp.sum(self.weights.reshape(-1) * normal, axis=-1)

    def moment(self, power: int) -> jax.Array:
        """An estimate of trace(Hᵖ)/n, n the number of parameters; the spread over probes tells its error."""
        return jnp.sum(self.weights * self.nodes**power)


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What a product is made of, besides params and data."""

    loss_fn: Callable[..., Any]
    matrix: Matrix
    batches: MicroBatches
    has_aux: bool
    argnames: tuple[str, ...] | None
    stage_dtype: Any

    def __post_init__(self):
        if self.matrix not in ("hessian", "gauss_newton"):
            raise ValueError(f"matrix must be 'hessian' or 'gauss_newton', got {self.matrix!r}.")
        check_stage_dtype(self.stage_dtype)
        self.objective()

    def objective(self) -> Objective:
        return Objective(
            self.loss_fn,
            has_aux=self.has_aux,
            argnames=self.argnames,
            needs=frozenset({"gauss_newton"} if self.matrix == "gauss_newton" else {"product", "symmetric"}),
        )

    def product(self, params: PyTree, data: Mapping[str, Any]) -> tuple[Linear, PyTree]:
        """The matrix as a function, and what it acts on."""
        view = ParameterView.of(params, stage_dtype=self.stage_dtype)
        field = bind(self.objective(), data, view, self.batches)
        return field.hessian(view.theta) if self.matrix == "hessian" else field.gauss_newton(view.theta), view.theta


def matrix_product(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *,
    data: Mapping[str, Any] | None = None,
    matrix: Matrix = "hessian",
    batches: int | None = None,
    batch_argnames: Sequence[str] | str | None = None,
    has_aux: bool = False,
    argnames: Sequence[str] | None = None,
    stage_dtype: Any = "float32",
) -> Product:
    """V ↦ Hv at `params`: the operator of which this module finds the spectrum.

    >>> import jax.numpy as jnp
    >>> from rk_optax import spectrum
    >>> product = spectrum.matrix_product(lambda w: w[0] ** 2 + 3 * w[0] * w[1], jnp.zeros(2))
    >>> print(product(jnp.array([1.0, 0.0])))
    [2. 3.]

    Args:
      loss_fn: `loss_fn(params, *data) -> scalar`; for "gauss_newton" a `rk_optax.ModelLoss` or `LeastSquares`.
      params: where the matrix is taken; a pytree of floating-point leaves, complex ones counting as pairs of reals.
      data: the loss's data by name.
      matrix: "hessian", or "gauss_newton" for Jᵀ(∇²output_loss)J.
      batches: rows of a micro-batch, for data that are too many at once: the loss must then be a mean over the rows.
        The products are the same up to rounding whatever the size, the last micro-batch's included.
      batch_argnames: the data arguments whose first axis runs over the rows; by default all.
      has_aux: `loss_fn` returns `(loss, aux)`.
      argnames: names of the data arguments, for a loss whose signature cannot be read.
      stage_dtype: the least precision of what the loss sees, as for `rk_optax.scale_by_rk`.

    Raises:
      TypeError, ValueError: an argument out of its range; data that are missing, empty or of different lengths; a loss
        without the structure that "gauss_newton" needs.
    """
    setting = _setting(loss_fn, matrix, batches, batch_argnames, has_aux, argnames, stage_dtype)
    return setting.product(params, _data(setting, data))[0]


def eigenpairs(
    loss_fn: Callable[..., Any],
    params: PyTree,
    k: int = 1,
    *,
    bottom: int = 0,
    tolerance: float = 1e-5,
    basis: int | None = None,
    max_products: int = 1000,
    start: PyTree | None = None,
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    matrix: Matrix = "hessian",
    batches: int | None = None,
    batch_argnames: Sequence[str] | str | None = None,
    has_aux: bool = False,
    argnames: Sequence[str] | None = None,
    stage_dtype: Any = "float32",
) -> Eigenpairs:
    """The `k` largest and the `bottom` smallest eigenvalues of the loss's Hessian or Gauss–Newton matrix.

    Lanczos's method with full re-orthogonalisation and thick restarts (Wu and Simon, 2000): memory for `basis` + 1
    vectors like params, whatever the number of products. Copies of a multiple eigenvalue are found only after rounding
    or an exhausted Krylov space shows them: ask for a few more pairs where they matter.

    >>> import jax.numpy as jnp
    >>> from rk_optax import spectrum
    >>> def loss_fn(w): return 0.5 * jnp.sum(jnp.array([5.0, 2.0, -1.0]) * w ** 2)
    >>> found = spectrum.eigenpairs(loss_fn, jnp.zeros(3), 1, bottom=1)
    >>> [f"{x:.3f}" for x in found.values], bool(found.converged)
    (['5.000', '-1.000'], True)

    Args:
      loss_fn: as for `matrix_product`, as are `params`, `data`, `matrix`, `batches`, `batch_argnames`, `has_aux`,
        `argnames` and `stage_dtype`.
      params: where the matrix is taken.
      k: how many of the largest (algebraically).
      bottom: how many of the smallest.
      tolerance: a residual ‖Hv − λv‖ relative to the largest |λ|, in (0, 1). It bounds the relative error of λ,
        which is usually near its square. Never tighter than 16 units of rounding.
      basis: vectors of the Krylov space, more than k + bottom; by default 2(k + bottom) + 20, at most the number of
        parameters.
      max_products: bound on the products; `converged` tells whether it was met.
      start: where to start, like params, such as an eigenvector found a step earlier; by default random.
      seed: of the random start.
      data: the loss's data by name.
      matrix: "hessian" or "gauss_newton".
      batches: rows of a micro-batch.
      batch_argnames: the data arguments that are cut.
      has_aux: `loss_fn` returns `(loss, aux)`.
      argnames: names of the data arguments.
      stage_dtype: the least precision of what the loss sees.

    Raises:
      TypeError, ValueError: as for `matrix_product`; an argument out of its range, or more pairs than parameters.

    Cost: a gradient to linearise and `products` products (without `batches`; with them each product also takes a
    gradient again).
    """
    setting = _setting(loss_fn, matrix, batches, batch_argnames, has_aux, argnames, stage_dtype)
    unknowns = _lanczos.dimension(jax.tree.map(jnp.asarray, params))
    k = 0 if k == 0 and bottom else _checks.count(k, "k")
    bottom = 0 if bottom == 0 else _checks.count(bottom, "bottom")
    if k + bottom > unknowns:
        raise ValueError(f"k + bottom = {k + bottom} eigenpairs are more than the {unknowns} parameters have.")
    size = 2 * (k + bottom) + 20 if basis is None else _checks.count(basis, "basis")
    if size <= k + bottom and size < unknowns:
        raise ValueError(f"basis must be larger than k + bottom = {k + bottom}, got {basis!r}.")
    if not 0 < _checks.number(tolerance, "tolerance", "positive") < 1:
        raise ValueError(f"tolerance must be in (0, 1), got {tolerance}.")
    limits = (k, bottom, min(size, unknowns), float(tolerance), _checks.count(max_products, "max_products"))
    return _eigenpairs(setting, limits, params, _data(setting, data), start, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _eigenpairs(
    setting: _Setting, limits: tuple[int, int, int, float, int], params: PyTree, data: Any, start: PyTree, key: Any
) -> Eigenpairs:
    product, theta = setting.product(params, data)
    k, bottom, size, tolerance, max_products = limits
    vector = _lanczos.random_vector(key, theta) if start is None else _tree.cast_like(start, theta)
    pairs = _lanczos.eigenpairs(product, vector, k, bottom, size=size, tolerance=tolerance, max_products=max_products)
    return Eigenpairs(*pairs)


def sharpness(loss_fn: Callable[..., Any], params: PyTree, **options: Any) -> jax.Array:
    """The largest eigenvalue of the Hessian, a real scalar.

    >>> import jax.numpy as jnp
    >>> from rk_optax import spectrum
    >>> print(f"{spectrum.sharpness(lambda w: jnp.sum(w ** 4), jnp.array([1.0, 0.5])):.4f}")
    12.0000

    Args:
      loss_fn: as for `eigenpairs`.
      params: where the Hessian is taken.
      **options: as for `eigenpairs`.
    """
    return eigenpairs(loss_fn, params, 1, **options).values[0]


def density(
    loss_fn: Callable[..., Any],
    params: PyTree,
    *,
    probes: int = 8,
    steps: int = 64,
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    matrix: Matrix = "hessian",
    batches: int | None = None,
    batch_argnames: Sequence[str] | str | None = None,
    has_aux: bool = False,
    argnames: Sequence[str] | None = None,
    stage_dtype: Any = "float32",
) -> Density:
    """The density of the eigenvalues, by stochastic Lanczos quadrature.

    Each probe, a vector of random signs, gives the Gauss quadrature of its own spectral measure, whose first 2·steps
    moments are exact; the mean over probes is unbiased for the moments trace(Hᵖ)/n.

    >>> import jax.numpy as jnp
    >>> from rk_optax import spectrum
    >>> def loss_fn(w): return 0.5 * jnp.sum(jnp.array([4.0, 1.0, 1.0, 1.0]) * w ** 2)
    >>> found = spectrum.density(loss_fn, jnp.zeros(4), probes=1, steps=2)
    >>> [f"{x:.2f}" for x in found.nodes[0]], [f"{x:.2f}" for x in found.weights[0]]
    (['1.00', '4.00'], ['0.75', '0.25'])

    Args:
      loss_fn: as for `matrix_product`, as are `params`, `data`, `matrix`, `batches`, `batch_argnames`, `has_aux`,
        `argnames` and `stage_dtype`.
      params: where the matrix is taken.
      probes: random vectors; the error of a moment falls with their square root.
      steps: nodes of each quadrature, at most the number of parameters; memory for as many vectors like params.
      seed: of the probes.
      data: the loss's data by name.
      matrix: "hessian" or "gauss_newton".
      batches: rows of a micro-batch.
      batch_argnames: the data arguments that are cut.
      has_aux: `loss_fn` returns `(loss, aux)`.
      argnames: names of the data arguments.
      stage_dtype: the least precision of what the loss sees.

    Raises:
      TypeError, ValueError: as for `matrix_product`.

    Cost: probes × steps products. Source: Ubaru, Chen and Saad (2017); Ghorbani, Krishnan and Xiao (arXiv 1901.10159).
    """
    setting = _setting(loss_fn, matrix, batches, batch_argnames, has_aux, argnames, stage_dtype)
    steps = min(_checks.count(steps, "steps"), _lanczos.dimension(jax.tree.map(jnp.asarray, params)))
    sizes = (_checks.count(probes, "probes"), steps)
    return _density(setting, sizes, params, _data(setting, data), jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _density(setting: _Setting, sizes: tuple[int, int], params: PyTree, data: Any, key: Any) -> Density:
    product, theta = setting.product(params, data)
    probes, steps = sizes

    def quadrature(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        krylov = _lanczos.extend(product, _lanczos.start(_lanczos.random_vector(key, theta), steps), 0)
        nodes, vectors = jnp.linalg.eigh(krylov.projected)
        return nodes, vectors[0] ** 2 / probes

    return Density(*jax.lax.map(quadrature, jax.random.split(key, probes)))


def power_step(product: Product, vector: PyTree) -> tuple[jax.Array, PyTree]:
    """One step of the power method, at one product: the Rayleigh quotient of `vector`, and the next vector.

    Started each time from the vector of the time before it follows the eigenvalue that is largest *in size* through a
    run, for one product a step.

    >>> import jax.numpy as jnp
    >>> from rk_optax import spectrum
    >>> value, vector = spectrum.power_step(lambda v: jnp.array([3.0, 1.0]) * v, jnp.array([1.0, 0.0]))
    >>> print(value, vector)
    3.0 [1. 0.]

    Args:
      product: a symmetric operator, such as `matrix_product` returns.
      vector: not zero; of any length.

    Returns:
      ⟨v, Hv⟩/⟨v, v⟩, and Hv of length 1 (`vector` itself where Hv is zero or not finite).
    """
    moved = product(vector)
    value = _tree.ratio(_tree.inner(vector, moved), _tree.inner(vector, vector))
    unit, size = _tree.unit(moved)
    return value, _tree.select(jnp.isfinite(size) & (size > 0), unit, vector)


def _setting(
    loss_fn: Any, matrix: Any, batches: Any, batch_argnames: Any, has_aux: bool, argnames: Any, stage_dtype: Any
) -> _Setting:
    return _Setting(
        loss_fn,
        matrix,
        MicroBatches.of(batches, batch_argnames),
        has_aux,
        None if argnames is None else tuple(argnames),
        stage_dtype,
    )


def _data(setting: _Setting, data: Mapping[str, Any] | None) -> dict[str, Any]:
    data = {} if data is None else dict(data)
    setting.batches.rows(data)
    return data
