"""Preconditioners of the vector field: dθ/dt = −P(θ)∇L(θ), with P frozen within a step.

A preconditioner sees the stage-1 gradient once per step, and what it makes of it is applied to every stage. So a step
still integrates one smooth field, and the solver keeps its order; a scale that moved between stages would not let it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rk_optax import _checks, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost

PyTree = Any


class Preconditioner(NamedTuple):
    """A frozen scaling of the field, as three pure functions.

    Attributes:
      init: `init(params) -> state`; params may be abstract and hold the moving leaves only.
      update: `update(gradient, state, params, field) -> (frozen, state, cost)`, once per step, with the raw stage-1
        gradient at params; `field` is the field before preconditioning. `frozen` is what `apply` needs.
      apply: `apply(gradient, frozen) -> gradient`, at every stage.
      needs: what it asks of the field; checked when a transformation is built.
      diagonal: `diagonal(frozen) -> P`, like params and positive (None for P = I), where applying is a product with it;
        None where it is not, which the linearly implicit and implicit solvers refuse.
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, PyTree, PyTree, VectorField], tuple[PyTree, PyTree, Cost]]
    apply: Callable[[PyTree, PyTree], PyTree]
    needs: frozenset[Capability] = frozenset()
    diagonal: Callable[[PyTree], PyTree | None] | None = None


def no_preconditioner() -> Preconditioner:
    """P = I."""
    return Preconditioner(
        lambda params: (),
        lambda g, state, params, field: ((), state, Cost()),
        lambda g, _: g,
        diagonal=lambda _: None,
    )


class AdagradState(NamedTuple):
    """State of `precondition_by_adagrad`."""

    sum_of_squares: PyTree  # like params, real


class MomentState(NamedTuple):
    """State of `precondition_by_rms` and `precondition_by_adam`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] # shape=(), int32: steps taken
    second_moment: PyTree  # like params, real


class HutchinsonState(NamedTuple):
    """State of `precondition_by_hutchinson`."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] # shape=(), int32: steps taken
    key: jax.Array  # of the probes
    curvature: PyTree  # like params, real: the running mean of the squared Hessian diagonal


def precondition_by_adagrad(floor: float = 1.0) -> Preconditioner:
    """The paper's modified AdaGrad: P = (floor + Σ g²)^(−1/2) leaf by leaf, the sum running over all steps.

    The current gradient is in the sum. With Euler's method and floor 1 this is exactly
    `optax.scale_by_rss(initial_accumulator_value=1.0, eps=0.0)`.

    >>> import jax.numpy as jnp, rk_optax
    >>> p = rk_optax.precondition_by_adagrad()
    >>> g = jnp.array([0.0, 1.0])
    >>> frozen, state, _ = p.update(g, p.init(g), g, None)
    >>> p.apply(g, frozen)
    Array([0.        , 0.70710677], dtype=float32)

    Args:
      floor: the paper's "1 +", positive. It bounds the scale by floor^(−1/2): with a tiny floor, a weight whose
        gradient is 0 at stage 1 and not at stage 2 is thrown far away.

    Raises:
      ValueError: floor is not positive and finite.

    Source: Dherin et al., "Learning by solving differential equations", arXiv 2505.13397.
    """
    floor = _checks.number(floor, "floor", "positive", _FLOOR)

    def init(params: PyTree) -> AdagradState:
        return AdagradState(_real_zeros(params))

    def update(gradient: PyTree, state: AdagradState, params: PyTree, field: VectorField) -> Any:
        del params, field
        total = jax.tree.map(lambda s, g: _wide(s) + _abs_sq(g), state.sum_of_squares, gradient)
        frozen = jax.tree.map(lambda s, g: _finite_or_nan(s, jax.lax.rsqrt(s + floor), g), total, gradient)
        return frozen, AdagradState(_tree.cast_like(total, state.sum_of_squares)), Cost()

    return Preconditioner(init, update, _multiply, diagonal=_itself)


def precondition_by_rms(decay: float = 0.9, floor: float = 1e-3) -> Preconditioner:
    """RMSProp's scale: P = 1/(√ν + floor), ν ← decay·ν + (1 − decay)·g².

    With Euler's method and floor = eps this is exactly `optax.scale_by_rms(decay, eps, eps_in_sqrt=False)`.

    Args:
      decay: of the second moment, in [0, 1).
      floor: added to the root; Optax's 1e-8 is far too small for several stages, see `precondition_by_adagrad`.

    Raises:
      ValueError: decay outside [0, 1), or floor not positive and finite.
    """
    return _by_second_moment(decay, floor, debias=False)


def precondition_by_adam(decay: float = 0.999, floor: float = 1e-3) -> Preconditioner:
    """Adam's scale: P = 1/(√ν̂ + floor), ν̂ = ν/(1 − decay^t), ν ← decay·ν + (1 − decay)·g².

    With Euler's method and floor = eps this is exactly `optax.scale_by_adam(b1=0.0, b2=decay, eps=eps)`.

    Args:
      decay: of the second moment, in [0, 1).
      floor: added to the root; Optax's 1e-8 is far too small for several stages, see `precondition_by_adagrad`.

    Raises:
      ValueError: decay outside [0, 1), or floor not positive and finite.
    """
    return _by_second_moment(decay, floor, debias=True)


def _by_second_moment(decay: float, floor: float, *, debias: bool) -> Preconditioner:
    decay = _checks.number(decay, "decay", "decay")
    floor = _checks.number(floor, "floor", "positive", _FLOOR)

    def init(params: PyTree) -> MomentState:
        return MomentState(jnp.zeros([], jnp.int32), _real_zeros(params))

    def update(gradient: PyTree, state: MomentState, params: PyTree, field: VectorField) -> Any:
        del params, field
        count = state.count + 1

        def moment(v: jax.Array, g: jax.Array) -> jax.Array:
            return decay * _wide(v) + (1 - decay) * _abs_sq(g)

        def scale(v: jax.Array, g: jax.Array) -> jax.Array:
            correction = 1 - jnp.asarray(decay, v.dtype) ** count if debias else 1
            return _finite_or_nan(v, 1 / (jnp.sqrt(v / correction) + floor), g)

        second = jax.tree.map(moment, state.second_moment, gradient)
        frozen = jax.tree.map(scale, second, gradient)
        return frozen, MomentState(count, _tree.cast_like(second, state.second_moment)), Cost()

    return Preconditioner(init, update, _multiply, diagonal=_itself)


def precondition_by_hutchinson(
    decay: float = 0.99, floor: float = 1e-2, every: int = 10, seed: int = 0
) -> Preconditioner:
    """A diagonal Hessian estimate: P = 1/(√D + floor), D the running mean of (z ⊙ Hz)², z random signs.

    Each estimate costs one Hessian-vector product (about two gradients) every `every` steps; between estimates the
    scale stays. At the first step one is always made.

    Args:
      decay: of the running mean, in [0, 1); the mean is bias-corrected.
      floor: added to the root, positive: it bounds the scale where the curvature vanishes.
      every: steps between estimates, at least 1.
      seed: of the probes.

    Raises:
      ValueError: an argument out of its range.

    Source: Yao et al., "AdaHessian", arXiv 2006.00719, without its spatial averaging.
    """
    decay = _checks.number(decay, "decay", "decay")
    floor = _checks.number(floor, "floor", "positive", _FLOOR)
    every = _checks.count(every, "every")

    def init(params: PyTree) -> HutchinsonState:
        return HutchinsonState(jnp.zeros([], jnp.int32), jax.random.key_data(jax.random.key(seed)), _real_zeros(params))

    def update(gradient: PyTree, state: HutchinsonState, params: PyTree, field: VectorField) -> Any:
        due = state.count % every == 0
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)

        def estimate() -> PyTree:
            signs = _tree.random_signs(key, params)
            product = field.product(params, signs)

            def mean(d: jax.Array, z: jax.Array, hz: jax.Array) -> jax.Array:
                return decay * _wide(d) + (1 - decay) * _wide(jnp.real(jnp.conj(z) * hz)) ** 2

            return jax.tree.map(mean, state.curvature, signs, product)

        curvature = jax.lax.cond(due, estimate, lambda: jax.tree.map(_wide, state.curvature))
        estimates = state.count // every + 1

        def scale(d: jax.Array, g: jax.Array) -> jax.Array:
            root = jnp.sqrt(d / (1 - jnp.asarray(decay, d.dtype) ** estimates))
            return _finite_or_nan(d, 1 / (root + floor), g)

        frozen = jax.tree.map(scale, curvature, gradient)
        new_state = HutchinsonState(state.count + 1, state.key, _tree.cast_like(curvature, state.curvature))
        return frozen, new_state, Cost(products=due.astype(jnp.int32))

    return Preconditioner(init, update, _multiply, frozenset({"product"}), _itself)


def precondition_by(transformation: optax.GradientTransformation) -> Preconditioner:
    """Applies any Optax transformation to every stage, each time from the state at the start of the step.

    Only the state after stage 1 is kept. `precondition_by(optax.clip_by_global_norm(1.0))` clips each stage. A frozen
    *state* is not a frozen *scale*: `optax.scale_by_rss` scales stage 2 by its own square too. So nothing is promised
    of the order of the method, nor that the preconditioner is a symmetric operator.

    >>> import optax, rk_optax
    >>> def loss_fn(w): return (w ** 2).sum()
    >>> clip = rk_optax.precondition_by(optax.clip_by_global_norm(1.0))
    >>> tx = rk_optax.rk4(loss_fn, 0.1, preconditioner=clip)

    Args:
      transformation: it sees stage gradients and params; keywords of `update` do not reach it.

    Raises:
      TypeError: not an Optax transformation.
    """
    if not (hasattr(transformation, "init") and hasattr(transformation, "update")):
        raise TypeError(f"precondition_by takes an optax.GradientTransformation, got {type(transformation).__name__}.")

    def update(gradient: PyTree, state: PyTree, params: PyTree, field: VectorField) -> Any:
        del field
        _, new_state = transformation.update(gradient, state, params)
        like = jax.tree.map(jnp.asarray, state)
        return (state, params), _tree.cast_like(new_state, like), Cost()

    def apply(gradient: PyTree, frozen: PyTree) -> PyTree:
        state, params = frozen
        scaled, _ = transformation.update(gradient, state, params)
        return _tree.cast_like(scaled, gradient)

    return Preconditioner(transformation.init, update, apply)


def _multiply(gradient: PyTree, frozen: PyTree) -> PyTree:
    return jax.tree.map(lambda g, p: g * p, gradient, frozen)


def _itself(frozen: PyTree) -> PyTree:
    return frozen


def _wide(x: jax.Array) -> jax.Array:
    """In float32 at least: a decay of 0.999 is 1 in bfloat16."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _abs_sq(x: jax.Array) -> jax.Array:
    return _wide(jnp.real(x)) ** 2 + _wide(jnp.imag(x)) ** 2 if jnp.iscomplexobj(x) else _wide(x) ** 2


def _finite_or_nan(statistic: jax.Array, scale: jax.Array, like: jax.Array) -> jax.Array:
    """The scale, or NaN where its statistic overflowed: a scale of 0 would hide that and freeze the weight for good."""
    return jnp.where(jnp.isfinite(statistic), scale, jnp.nan).astype(_tree.real_dtype(like))


def _real_zeros(params: PyTree) -> PyTree:
    # zeros_like keeps shardings; its real part drops the imaginary axis of complex leaves.
    return jax.tree.map(lambda x: jnp.real(jnp.zeros_like(x)), params)


_FLOOR = "it bounds the scale of a stage"
