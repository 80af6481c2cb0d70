"""Preconditioners of the vector field: dθ/dt = −P(θ)∇L(θ), with P frozen within a step.

A preconditioner sees the stage-1 gradient once per step, and what it makes of it is applied to every stage. So a step
still integrates one smooth field, and the solver keeps its order; a scale that moved between stages would not let it.

Sums and means of squares are kept as their roots, in the units of a gradient (or a curvature), whose squares float32
does not hold.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rk_optax import _checks, _returned, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.parameter_view import check_like_params
from rk_optax.solver import Cost, DiagonalCurvature
from rk_optax.solver._diagonal import DiagonalState, hypotenuse

PyTree = Any
Number = float | jax.Array
_FLOOR = "it bounds the scale of a stage"


class Preconditioner(abc.ABC):
    """A frozen scaling P of the field. Subclasses are frozen dataclasses that check their fields in `__post_init__`.

    >>> import dataclasses, jax, jax.numpy as jnp, rk_optax
    >>> @dataclasses.dataclass(frozen=True)
    ... class Halved(rk_optax.Preconditioner):
    ...     def update(self, gradient, state, params, field):
    ...         return 0.5, state, rk_optax.Cost()
    ...     def apply(self, gradient, frozen):
    ...         return jax.tree.map(lambda g: frozen * g, gradient)
    >>> tx = rk_optax.euler(lambda w: jnp.sum(w**2), 0.1, preconditioner=Halved())
    >>> w = jnp.ones(1)
    >>> tx.update(2 * w, tx.init(w), w)[0]
    Array([-0.1], dtype=float32)

    Attributes:
      needs: what it asks of the field; checked when a transformation is built.
      offers: {"diagonal_scale"} where applying is a product with `diagonal(frozen)`, which solvers of symmetric linear
        systems ask for; see `DiagonalPreconditioner`.
    """

    needs: ClassVar[frozenset[Capability]] = frozenset()
    offers: ClassVar[frozenset[Capability]] = frozenset()

    def init(self, params: PyTree) -> PyTree:
        """The state; `params` may be abstract and hold the moving leaves only."""
        del params
        return ()

    @abc.abstractmethod
    def update(
        self, gradient: PyTree, state: PyTree, params: PyTree, field: VectorField
    ) -> tuple[PyTree, PyTree, Cost]:
        """`(frozen, state, cost)`, once per step; the state is kept if the step is taken.

        Args:
          gradient: the raw stage-1 gradient at params, in the stage dtype.
          state: what `init` or the last step that was taken returned.
          params: θ, in the stage dtype.
          field: the field before preconditioning.

        Returns:
          What `apply` needs, the new state, and what was spent.
        """

    @abc.abstractmethod
    def apply(self, gradient: PyTree, frozen: PyTree) -> PyTree:
        """P times a stage's gradient."""

    def diagonal(self, frozen: PyTree) -> PyTree | None:
        """P's diagonal, like params and positive; None for P = I, and where P is not known to be a diagonal."""
        del frozen
        return None


class DiagonalPreconditioner(Preconditioner):
    """A preconditioner whose `update` returns the diagonal of P as `frozen`: a positive tree like params."""

    offers: ClassVar[frozenset[Capability]] = frozenset({"diagonal_scale"})

    def apply(self, gradient: PyTree, frozen: PyTree) -> PyTree:
        """The product, leaf by leaf."""
        return jax.tree.map(lambda g, p: g * p, gradient, frozen)

    def diagonal(self, frozen: PyTree) -> PyTree | None:
        """What `update` froze."""
        return frozen


def frozen_by(
    preconditioner: Preconditioner, gradient: PyTree, state: PyTree, params: PyTree, field: VectorField
) -> tuple[PyTree, PyTree, Cost]:
    """`preconditioner.update`, with what it returns checked: the state is in the dtypes of `init`.

    Raises:
      TypeError, ValueError: it is no `(frozen, state, cost)`, or a state of another form, or a diagonal or a scaled
        gradient that is not like params.
    """
    who = f"{type(preconditioner).__name__}.update"
    returned = preconditioner.update(gradient, state, params, field)
    if not isinstance(returned, tuple) or len(returned) != 3:
        raise TypeError(f"{who} must return (frozen, state, cost), got {returned!r}.")
    frozen, new, cost = returned
    _returned.cost(cost, Cost, who)
    diagonal = preconditioner.diagonal(frozen)
    if diagonal is not None:
        check_like_params(diagonal, gradient, f"The diagonal of {type(preconditioner).__name__}")
    return frozen, _returned.state(new, state, who), cost


@dataclasses.dataclass(frozen=True)
class NoPreconditioner(DiagonalPreconditioner):
    """P = I."""

    def update(
        self, gradient: PyTree, state: PyTree, params: PyTree, field: VectorField
    ) -> tuple[PyTree, PyTree, Cost]:
        """Nothing to freeze."""
        del gradient, params, field
        return None, state, Cost()

    def apply(self, gradient: PyTree, frozen: PyTree) -> PyTree:
        """The gradient."""
        del frozen
        return gradient


class AdagradState(NamedTuple):
    """State of `AdagradPreconditioner`."""

    root_of_sum: PyTree  # like params, real: √Σ g²


class MomentState(NamedTuple):
    """State of `RmsPreconditioner` and `AdamPreconditioner`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] # shape=(), int32: steps taken
    root_of_moment: PyTree  # like params, real: √ν


@dataclasses.dataclass(frozen=True)
class AdagradPreconditioner(DiagonalPreconditioner):
    """The paper's modified AdaGrad: P = (floor + Σ g²)^(−1/2) leaf by leaf, the sum running over all steps.

    The current gradient is in the sum. With Euler's method and floor 1 this is exactly
    `optax.scale_by_rss(initial_accumulator_value=1.0, eps=0.0)`. `rk_optax.precondition_by_adagrad` is this class.

    >>> import jax.numpy as jnp, rk_optax
    >>> p = rk_optax.precondition_by_adagrad()
    >>> g = jnp.array([0.0, 1.0])
    >>> frozen, state, _ = p.update(g, p.init(g), g, None)
    >>> p.apply(g, frozen)
    Array([0.        , 0.70710677], dtype=float32)

    Args:
      floor: the paper's "1 +", positive, in the units of g². It bounds the scale by floor^(−1/2): with a tiny floor, a
        weight whose gradient is 0 at stage 1 and not at stage 2 is thrown far away. It may be traced.

    Raises:
      ValueError: floor is not positive and finite.

    Source: Dherin et al., "Learning by solving differential equations", arXiv 2505.13397.
    """

    floor: Number = 1.0

    def __post_init__(self):
        _checks.numbers(self, _FLOOR, floor="positive")

    def init(self, params: PyTree) -> AdagradState:
        """No gradient seen."""
        return AdagradState(_real_zeros(params))

    def update(
        self, gradient: PyTree, state: AdagradState, params: PyTree, field: VectorField
    ) -> tuple[PyTree, AdagradState, Cost]:
        """Costs nothing."""
        del params, field
        total = jax.tree.map(lambda s, g: hypotenuse(_wide(s), _size(g)), state.root_of_sum, gradient)

        def scale(s: jax.Array, g: jax.Array) -> jax.Array:
            # A concrete floor by its root in double precision: in the units of g² float32 may not hold it.
            root = jnp.sqrt(self.floor) if _checks.is_traced(self.floor) else math.sqrt(self.floor)
            floor = jnp.full_like(s, root)
            return _finite_or_nan(s, 1 / hypotenuse(s, floor), g)

        frozen = jax.tree.map(scale, total, gradient)
        return frozen, AdagradState(_tree.cast_like(total, state.root_of_sum)), Cost()


@dataclasses.dataclass(frozen=True)
class RmsPreconditioner(DiagonalPreconditioner):
    """RMSProp's scale: P = 1/(√ν + floor), ν ← decay·ν + (1 − decay)·g².

    With Euler's method and floor = eps this is exactly `optax.scale_by_rms(decay, eps, eps_in_sqrt=False)`.
    `rk_optax.precondition_by_rms` is this class.

    Args:
      decay: of the second moment, in [0, 1). It may be traced.
      floor: added to the root, in the units of g; Optax's 1e-8 is far too small for several stages, see
        `precondition_by_adagrad`. It may be traced.

    Raises:
      ValueError: decay outside [0, 1), or floor not positive and finite.
    """

    decay: Number = 0.9
    floor: Number = 1e-3
    debiased: ClassVar[bool] = False

    def __post_init__(self):
        _checks.numbers(self, decay="decay")
        _checks.numbers(self, _FLOOR, floor="positive")

    def init(self, params: PyTree) -> MomentState:
        """No gradient seen."""
        return MomentState(jnp.zeros([], jnp.int32), _real_zeros(params))

    def update(
        self, gradient: PyTree, state: MomentState, params: PyTree, field: VectorField
    ) -> tuple[PyTree, MomentState, Cost]:
        """Costs nothing."""
        del params, field
        count = jnp.asarray(optax.safe_increment(state.count))

        def moment(m: jax.Array, g: jax.Array) -> jax.Array:
            decay = jnp.asarray(self.decay, _wide(m).dtype)
            return hypotenuse(jnp.sqrt(decay) * _wide(m), jnp.sqrt(1 - decay) * _size(g).astype(decay.dtype))

        def scale(m: jax.Array, g: jax.Array) -> jax.Array:
            correction = _correction(self.decay, count, m.dtype) if self.debiased else 1
            return _finite_or_nan(m, 1 / (m / correction + jnp.asarray(self.floor, m.dtype)), g)

        root = jax.tree.map(moment, state.root_of_moment, gradient)
        frozen = jax.tree.map(scale, root, gradient)
        return frozen, MomentState(count, _tree.cast_like(root, state.root_of_moment)), Cost()


@dataclasses.dataclass(frozen=True)
class AdamPreconditioner(RmsPreconditioner):
    """Adam's scale: P = 1/(√ν̂ + floor), ν̂ = ν/(1 − decay^t), ν ← decay·ν + (1 − decay)·g².

    With Euler's method and floor = eps this is exactly `optax.scale_by_adam(b1=0.0, b2=decay, eps=eps)`.
    `rk_optax.precondition_by_adam` is this class.

    Args:
      decay: of the second moment, in [0, 1). It may be traced.
      floor: added to the root, in the units of g; Optax's 1e-8 is far too small for several stages, see
        `precondition_by_adagrad`. It may be traced.

    Raises:
      ValueError: decay outside [0, 1), or floor not positive and finite.
    """

    decay: Number = 0.999
    debiased: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class HutchinsonPreconditioner(DiagonalPreconditioner):
    """A diagonal Hessian estimate: P = 1/(√D + floor), D the running mean of (z ⊙ Hz)², z random signs.

    Each estimate costs one Hessian-vector product (about two gradients) every `every` steps; between estimates the
    scale stays, and one that is not finite is dropped. At the first step one is always made.
    `rk_optax.precondition_by_hutchinson` is this class.

    Args:
      decay: of the running mean, in [0, 1); the mean is bias-corrected. It may be traced.
      floor: added to the root, positive, in the units of a curvature: it bounds the scale where the curvature vanishes.
        It may be traced.
      every: steps between estimates, at least 1.
      seed: of the probes.

    Raises:
      ValueError: an argument out of its range.

    Source: Yao et al., "AdaHessian", arXiv 2006.00719, without its spatial averaging.
    """

    decay: Number = 0.99
    floor: Number = 1e-2
    every: int = 10
    seed: int = 0
    needs: ClassVar[frozenset[Capability]] = frozenset({"product"})

    def __post_init__(self):
        _checks.numbers(self, _FLOOR, floor="positive")
        object.__setattr__(self, "decay", self._estimator.decay)

    @property
    def _estimator(self) -> DiagonalCurvature:
        return DiagonalCurvature(self.decay, self.every, self.seed)

    def init(self, params: PyTree) -> DiagonalState:
        """Nothing estimated."""
        return self._estimator.init(params)

    def update(
        self, gradient: PyTree, state: DiagonalState, params: PyTree, field: VectorField
    ) -> tuple[PyTree, DiagonalState, Cost]:
        """Costs a product where an estimate is due."""
        root, new, cost = self._estimator.root_mean_square(field, params, state)

        def scale(d: jax.Array, g: jax.Array) -> jax.Array:
            # Without any estimate the floor alone would be the scale, which it is not meant for.
            d = jnp.where(new.estimates > 0, d, jnp.inf)
            return _finite_or_nan(d, 1 / (d + jnp.asarray(self.floor, d.dtype)), g)

        return jax.tree.map(scale, root, gradient), new, cost


@dataclasses.dataclass(frozen=True)
class OptaxPreconditioner(Preconditioner):
    """Applies any Optax transformation to every stage, each time from the state at the start of the step.

    Only the state after stage 1 is kept. `precondition_by(optax.clip_by_global_norm(1.0))` clips each stage. A frozen
    *state* is not a frozen *scale*: `optax.scale_by_rss` scales stage 2 by its own square too. So nothing is promised
    of the order of the method, nor that the preconditioner is a symmetric operator. `rk_optax.precondition_by` is this
    class.

    >>> import optax, rk_optax
    >>> def loss_fn(w): return (w ** 2).sum()
    >>> clip = rk_optax.precondition_by(optax.clip_by_global_norm(1.0))
    >>> tx = rk_optax.rk4(loss_fn, 0.1, preconditioner=clip)

    Args:
      transformation: it sees stage gradients and params; keywords of `update` do not reach it.

    Raises:
      TypeError: not an Optax transformation.
    """

    transformation: optax.GradientTransformation

    def __post_init__(self):
        given = self.transformation
        if isinstance(given, type) or not (hasattr(given, "init") and hasattr(given, "update")):
            raise TypeError(f"precondition_by takes an optax.GradientTransformation, got {type(given).__name__}.")

    def init(self, params: PyTree) -> PyTree:
        """The transformation's."""
        return self.transformation.init(params)

    def update(
        self, gradient: PyTree, state: PyTree, params: PyTree, field: VectorField
    ) -> tuple[PyTree, PyTree, Cost]:
        """Costs nothing."""
        del field
        _, new_state = self.transformation.update(gradient, state, params)
        like = jax.tree.map(jnp.asarray, state)
        return (state, params), _tree.cast_like(new_state, like), Cost()

    def apply(self, gradient: PyTree, frozen: PyTree) -> PyTree:
        """The transformed gradient, from the frozen state."""
        state, params = frozen
        scaled, _ = self.transformation.update(gradient, state, params)
        return _tree.cast_like(scaled, gradient)


precondition_by = OptaxPreconditioner
precondition_by_adagrad = AdagradPreconditioner
precondition_by_rms = RmsPreconditioner
precondition_by_adam = AdamPreconditioner
precondition_by_hutchinson = HutchinsonPreconditioner
no_preconditioner = NoPreconditioner


def _wide(x: jax.Array) -> jax.Array:
    """In float32 at least: a decay of 0.999 is 1 in bfloat16."""
    return x.astype(_tree.common_dtype(x.dtype, jnp.float32))


def _size(x: jax.Array) -> jax.Array:
    return _wide(jnp.abs(x))


def _correction(decay: Number, count: jax.Array, dtype: Any) -> jax.Array:
    """√(1 − decay^count), by which the root of a mean that started at 0 is too small."""
    return jnp.sqrt(1 - jax.lax.pow(jnp.asarray(decay, dtype), count))


def _finite_or_nan(statistic: jax.Array, scale: jax.Array, like: jax.Array) -> jax.Array:
    """The scale, or NaN where its statistic overflowed: a scale of 0 would hide that and freeze the weight for good."""
    return jnp.where(jnp.isfinite(statistic), scale, jnp.nan).astype(_tree.real_dtype(like))


def _real_zeros(params: PyTree) -> PyTree:
    # zeros_like keeps shardings; its real part drops the imaginary axis of complex leaves.
    return jax.tree.map(lambda x: jnp.real(jnp.zeros_like(x)), params)
