"""Ready optimizers: each is `runge_kutta` with one tableau."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, Unpack

import jax
import optax

from rk_optax import tableau
from rk_optax.step_size import LearningRate
from rk_optax.transform import Options, runge_kutta, with_options_of

Loss = Callable[..., Any] | None
Momentum = float | jax.Array | None
Transformation = optax.GradientTransformationExtraArgs
_F = TypeVar("_F", bound=Callable[..., Any])


class AliasOptions(Options, total=False):
    """Keywords of every ready optimizer beside momentum."""

    nesterov: bool
    after: optax.GradientTransformation | None
    weight_decay: float | jax.Array | None


_SHARED_DOC = """

    Args:
      loss_fn: `loss_fn(params, *data) -> scalar`; data reach it as keywords of `update`.
      learning_rate: the step size h, in the units of a gradient-descent learning rate: a positive number, a JAX
        scalar or an Optax schedule.
      momentum: decay of an `optax.trace` between solver and step size, in [0, 1), or None.
      **options: `nesterov`, `after` and `weight_decay` as for `rk_optax.runge_kutta`; `grad_fn`, `has_aux`, `mask`,
        `reuse_updates`, `argnames`, `stage_dtype`, `skip_nonfinite`, `preconditioner`, `l2`, `stage_batches`
        and `batch_argnames` as for `rk_optax.scale_by_rk`.

    Returns:
      A transformation whose `update(updates, state, params, **data)` takes the gradient at params and emits the
      update to add, in the structure, shapes and dtypes of params.

    Raises:
      TypeError, ValueError: as `rk_optax.runge_kutta` and `rk_optax.scale_by_rk` say.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rk_optax
      >>> def loss_fn(w, x): return jnp.sum((w - x) ** 2)
      >>> tx = rk_optax.{name}(loss_fn, learning_rate=0.1)
      >>> w, x = jnp.array([1.0, 3.0]), jnp.array([0.0, 2.0])
      >>> updates, state = jax.jit(tx.update)(jax.grad(loss_fn)(w, x), tx.init(w), w, x=x)
      >>> bool(loss_fn(optax.apply_updates(w, updates), x) < loss_fn(w, x))
      True
    """


def _ready(alias: _F) -> _F:
    """Completes the docstring of an alias and spells out its options."""
    alias.__doc__ = (alias.__doc__ or "") + _SHARED_DOC.format(name=alias.__name__)
    return with_options_of(runge_kutta)(alias)


@_ready
def euler(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Gradient descent: Euler's method. One gradient a step, order 1, real stability interval 2."""
    return runge_kutta(loss_fn, learning_rate, tableau.EULER, momentum=momentum, **options)


@_ready
def heun(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Heun's method, the explicit trapezoid: two gradients a step, order 2, real stability interval 2."""
    return runge_kutta(loss_fn, learning_rate, tableau.HEUN, momentum=momentum, **options)


@_ready
def midpoint(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """The explicit midpoint method: two gradients a step, order 2, real stability interval 2."""
    return runge_kutta(loss_fn, learning_rate, tableau.MIDPOINT, momentum=momentum, **options)


@_ready
def ralston(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Ralston's second-order method of least error bound: two gradients a step, real stability interval 2."""
    return runge_kutta(loss_fn, learning_rate, tableau.RALSTON, momentum=momentum, **options)


@_ready
def kutta3(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Kutta's third-order method: three gradients a step, real stability interval 2.513."""
    return runge_kutta(loss_fn, learning_rate, tableau.KUTTA3, momentum=momentum, **options)


@_ready
def ssprk3(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Shu and Osher's strong-stability-preserving method of order 3: three gradients a step, interval 2.513."""
    return runge_kutta(loss_fn, learning_rate, tableau.SSPRK3, momentum=momentum, **options)


@_ready
def bogacki_shampine(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Bogacki and Shampine's 3(2) pair: three gradients a step, order 3, real stability interval 2.513."""
    return runge_kutta(loss_fn, learning_rate, tableau.BOGACKI_SHAMPINE, momentum=momentum, **options)


@_ready
def rk4(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Classical fourth-order Runge–Kutta: four gradients a step, real stability interval 2.785."""
    return runge_kutta(loss_fn, learning_rate, tableau.RK4, momentum=momentum, **options)


@_ready
def rk38(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Kutta's 3/8 rule: four gradients a step, order 4, real stability interval 2.785."""
    return runge_kutta(loss_fn, learning_rate, tableau.RK38, momentum=momentum, **options)


@_ready
def dopri5(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Dormand and Prince's 5(4) pair: six gradients a step, order 5, real stability interval 3.307."""
    return runge_kutta(loss_fn, learning_rate, tableau.DOPRI5, momentum=momentum, **options)


@_ready
def tsit5(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Tsitouras' 5(4) pair: six gradients a step, order 5, real stability interval 3.507."""
    return runge_kutta(loss_fn, learning_rate, tableau.TSIT5, momentum=momentum, **options)


@_ready
def dopri8(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Prince and Dormand's 8(7) pair: thirteen gradients a step, order 8."""
    return runge_kutta(loss_fn, learning_rate, tableau.DOPRI8, momentum=momentum, **options)
