"""Ready optimizers: each is `runge_kutta` with one tableau."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar, Unpack, cast

import jax
import optax

from rk_optax import methods
from rk_optax._options import Options, with_options_of
from rk_optax.control import descent_control, trust_ratio_control
from rk_optax.line_search import line_search
from rk_optax.solver import (
    Etd,
    LinearSolver,
    ResidualEuler,
    Ros2,
    RosenbrockEuler,
    Stabilized,
    as_solver,
)
from rk_optax.solver.exponential import LinearPart
from rk_optax.solver.linear_solvers import CONJUGATE_GRADIENTS
from rk_optax.solver.linearly_implicit import BY_SECANTS, Curvature
from rk_optax.step_size import LearningRate
from rk_optax.tableau import ButcherTableau
from rk_optax.transform import RungeKutta, runge_kutta

Loss = Callable[..., Any] | None
Momentum = float | jax.Array | None
Transformation = RungeKutta
_F = TypeVar("_F", bound=Callable[..., Any])


class AliasOptions(Options, total=False):
    """Keywords of every ready optimizer beside momentum."""

    nesterov: bool
    after: optax.GradientTransformation | None
    weight_decay: float | jax.Array | None


class ReadyOptimizer(Protocol):
    """What `ready` makes of a tableau: the signature that type checkers see."""

    __name__: str

    def __call__(
        self,
        loss_fn: Loss,
        learning_rate: LearningRate,
        *,
        momentum: Momentum = None,
        **options: Unpack[AliasOptions],
    ) -> Transformation:
        """Makes the optimizer."""
        ...


_SHARED_DOC = """

    Args:
      loss_fn: `loss_fn(params, *data) -> scalar`; data reach it as keywords of `update`.
      learning_rate: the step size h, in the units of a gradient-descent learning rate: a positive number, a JAX
        scalar or an Optax schedule.
      momentum: decay of an `optax.trace` between solver and step size, in [0, 1), or None.
      **options: `nesterov`, `after` and `weight_decay` as for `rk_optax.runge_kutta`; `grad_fn`, `has_aux`, `mask`,
        `reuse_updates`, `argnames`, `stage_dtype`, `skip_nonfinite`, `finite_derivatives`, `preconditioner`, `l2`,
        `stage_batches` and `batch_argnames` as for `rk_optax.scale_by_rk`.

    Returns:
      A `rk_optax.RungeKutta`: an Optax transformation whose `update(updates, state, params, **data)` takes the
      gradient at params and emits the update to add, in the structure, shapes and dtypes of params, and whose
      `value_and_update(state, params, **data)` needs no gradient and returns the loss too.

    Raises:
      TypeError, ValueError: as `rk_optax.runge_kutta` and `rk_optax.scale_by_rk` say.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rk_optax
      >>> {loss}
      >>> tx = rk_optax.{name}(loss_fn, learning_rate=0.1)
      >>> w, x = jnp.array([1.0, 3.0]), jnp.array([0.0, 2.0])
      >>> updates, state = jax.jit(tx.update)(jax.grad(loss_fn)(w, x), tx.init(w), w, x=x)
      >>> bool(loss_fn(optax.apply_updates(w, updates), x) < loss_fn(w, x))
      True
    """


_ANY_LOSS = "def loss_fn(w, x): return jnp.sum((w - x) ** 2)"
_LEAST_SQUARES = "loss_fn = rk_optax.LeastSquares(lambda w, x: w - x)"


def _documented(alias: _F, loss: str = _ANY_LOSS) -> _F:
    """Completes the docstring of an alias and spells out its options."""
    alias.__doc__ = (alias.__doc__ or "") + _SHARED_DOC.format(name=alias.__name__, loss=loss)
    return with_options_of(runge_kutta)(alias)


def _documented_for_structure(alias: _F) -> _F:
    """`_documented`, for a solver that needs to see the loss's structure."""
    return _documented(alias, _LEAST_SQUARES)


def ready(method: ButcherTableau) -> Callable[[Callable[[], None]], ReadyOptimizer]:
    """Makes an optimizer of a tableau, with the name and docstring of what it decorates."""
    solver = as_solver(method)

    def decorate(described: Callable[[], None]) -> ReadyOptimizer:
        def alias(
            loss_fn: Loss,
            learning_rate: LearningRate,
            *,
            momentum: Momentum = None,
            **options: Unpack[AliasOptions],
        ) -> Transformation:
            return runge_kutta(loss_fn, learning_rate, solver, momentum=momentum, **options)

        alias.__doc__, alias.__name__, alias.__qualname__ = (
            described.__doc__,
            described.__name__,
            described.__qualname__,
        )
        return cast(ReadyOptimizer, _documented(alias))

    return decorate


@ready(methods.EULER)
def euler() -> None:
    """Gradient descent: Euler's method. One gradient a step, order 1, real stability interval 2."""


@ready(methods.HEUN)
def heun() -> None:
    """Heun's method, the explicit trapezoid: two gradients a step, order 2, real stability interval 2."""


@ready(methods.MIDPOINT)
def midpoint() -> None:
    """The explicit midpoint method: two gradients a step, order 2, real stability interval 2."""


@ready(methods.RALSTON)
def ralston() -> None:
    """Ralston's second-order method of least error bound: two gradients a step, real stability interval 2."""


@ready(methods.KUTTA3)
def kutta3() -> None:
    """Kutta's third-order method: three gradients a step, real stability interval 2.513."""


@ready(methods.SSPRK3)
def ssprk3() -> None:
    """Shu and Osher's strong-stability-preserving method of order 3: three gradients a step, interval 2.513."""


@ready(methods.BOGACKI_SHAMPINE)
def bogacki_shampine() -> None:
    """Bogacki and Shampine's 3(2) pair: three gradients a step, order 3, real stability interval 2.513."""


@ready(methods.RK4)
def rk4() -> None:
    """Classical fourth-order Runge–Kutta: four gradients a step, real stability interval 2.785."""


@ready(methods.RK38)
def rk38() -> None:
    """Kutta's 3/8 rule: four gradients a step, order 4, real stability interval 2.785."""


@ready(methods.DOPRI5)
def dopri5() -> None:
    """Dormand and Prince's 5(4) pair: six gradients a step, order 5, real stability interval 3.307."""


@ready(methods.TSIT5)
def tsit5() -> None:
    """Tsitouras' 5(4) pair: six gradients a step, order 5, real stability interval 3.507."""


@ready(methods.DOPRI8)
def dopri8() -> None:
    """Prince and Dormand's 8(7) pair: thirteen gradients a step, order 8."""


@_documented
def rkc(
    loss_fn: Loss,
    learning_rate: LearningRate | None = None,
    *,
    stages: int | Literal["auto"] = "auto",
    order: Literal[1, 2] = 1,
    damping: float | None = None,
    max_stages: int = 500,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Runge–Kutta–Chebyshev: s gradients a step, order 1 or 2, real stability interval about 1.93 s² or 0.65 s².

    By default it needs no learning rate: `rk_optax.descent_control()` finds one, and as many stages are taken as that h
    and the curvature ask for. `stages`, `damping` and `max_stages` are those of `rk_optax.Stabilized`.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}.")
    solver = Stabilized("rkc1" if order == 1 else "rkc2", stages, damping, max_stages)
    return runge_kutta(loss_fn, _given_or(learning_rate, descent_control), solver, momentum=momentum, **options)


@_documented
def rkl(
    loss_fn: Loss,
    learning_rate: LearningRate | None = None,
    *,
    stages: int | Literal["auto"] = "auto",
    order: Literal[1, 2] = 1,
    max_stages: int = 500,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Runge–Kutta–Legendre: s gradients a step, order 1 or 2, real stability interval s² + s or (s² + s − 2)/2.

    By default it needs no learning rate, see `rk_optax.rkc`. No damping parameter.
    """
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2, got {order!r}.")
    solver = Stabilized("rkl1" if order == 1 else "rkl2", stages, None, max_stages)
    return runge_kutta(loss_fn, _given_or(learning_rate, descent_control), solver, momentum=momentum, **options)


@_documented_for_structure
def rosenbrock_euler(
    loss_fn: Loss,
    learning_rate: LearningRate | None = None,
    *,
    curvature: Curvature = "gauss_newton",
    tolerance: float = 1e-3,
    max_iterations: int = 50,
    linear_solver: LinearSolver = CONJUGATE_GRADIENTS,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Linearly implicit Euler, by CG: order 1, no stability limit; two gradients and a product per CG iteration.

    By default `rk_optax.trust_ratio_control()` finds h, and the loss is a `rk_optax.ModelLoss` or `LeastSquares`; any
    loss goes with `curvature="hessian"`, and with `"secant"`, a quasi-Newton method for data that stay, by default
    under `rk_optax.line_search(first=True)`: of more than 4,096 parameters with a limited memory, with
    `"limited_secant"` of fewer, too. See `rk_optax.RosenbrockEuler`.
    """
    solver = RosenbrockEuler(curvature, tolerance, max_iterations, linear_solver=linear_solver)
    control = _search_for_secants if curvature in BY_SECANTS else trust_ratio_control
    return runge_kutta(loss_fn, _given_or(learning_rate, control), solver, momentum=momentum, **options)


@_documented_for_structure
def ros2(
    loss_fn: Loss,
    learning_rate: LearningRate | None = None,
    *,
    curvature: Curvature = "gauss_newton",
    tolerance: float = 1e-6,
    max_iterations: int = 50,
    gamma: float | None = None,
    linear_solver: LinearSolver = CONJUGATE_GRADIENTS,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """ROS2, by CG: order 2 for any curvature, no stability limit; three gradients and a product per CG iteration.

    By default `rk_optax.descent_control()` finds h. See `rk_optax.Ros2`.
    """
    solver = Ros2(curvature, tolerance, max_iterations, gamma, linear_solver=linear_solver)
    return runge_kutta(loss_fn, _given_or(learning_rate, descent_control), solver, momentum=momentum, **options)


@_documented_for_structure
def residual_euler(
    loss_fn: Loss,
    learning_rate: LearningRate | None = None,
    *,
    max_rows: int = 4096,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    inertia: float = 0.0,
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Linearly implicit Euler for least squares, solved directly in residual space: the one for PINNs.

    Order 1, no stability limit; one factorisation of an N×N or P×P matrix for N residuals and P parameters, whichever
    is smaller. By default `rk_optax.trust_ratio_control()` finds h; `rk_optax.path_control()` costs more a step and
    ends far lower, on data that stay, and `rk_optax.line_search()` is for new data in every step. `inertia` is momentum
    within the linear system, of which these rules know. The loss is a `rk_optax.LeastSquares`. See
    `rk_optax.ResidualEuler`.
    """
    solver = ResidualEuler(max_rows, tolerance, max_iterations, inertia=inertia)
    return runge_kutta(loss_fn, _given_or(learning_rate, trust_ratio_control), solver, momentum=momentum, **options)


@ready(methods.BACKWARD_EULER)
def backward_euler() -> None:
    """Backward Euler: order 1, L-stable, no stability limit. On a convex loss g* is a proximal step of length h.

    Newton's method with Krylov solvers, at the defaults of `rk_optax.Implicit`; for others, pass one to `runge_kutta`.
    """


@ready(methods.IMPLICIT_MIDPOINT)
def implicit_midpoint() -> None:
    """The implicit midpoint method: order 2, A-stable; symmetric, so that stiff modes hardly decay at a large h.

    Newton's method with Krylov solvers, at the defaults of `rk_optax.Implicit`; for others, pass one to `runge_kutta`.
    """


@ready(methods.TRAPEZOID)
def trapezoid() -> None:
    """The trapezoid method of Crank and Nicolson: order 2, A-stable; stiff modes hardly decay at a large h.

    Newton's method with Krylov solvers, at the defaults of `rk_optax.Implicit`; for others, pass one to `runge_kutta`.
    """


@ready(methods.SDIRK2)
def sdirk2() -> None:
    """Alexander's SDIRK2: two stages, one after the other, order 2(1), L-stable.

    Newton's method with Krylov solvers, at the defaults of `rk_optax.Implicit`; for others, pass one to `runge_kutta`.
    """


@ready(methods.SDIRK3)
def sdirk3() -> None:
    """Alexander's SDIRK3: three stages, one after the other, order 3(2), L-stable.

    Newton's method with Krylov solvers, at the defaults of `rk_optax.Implicit`; for others, pass one to `runge_kutta`.
    """


@ready(methods.RADAU3)
def radau3() -> None:
    """Radau IIA with two coupled stages: order 3, L-stable.

    Newton's method with Krylov solvers, at the defaults of `rk_optax.Implicit`; for others, pass one to `runge_kutta`.
    """


@ready(methods.GAUSS4)
def gauss4() -> None:
    """Gauss with two coupled stages: order 4, A-stable; stiff modes hardly decay at a large h.

    Newton's method with Krylov solvers, at the defaults of `rk_optax.Implicit`; for others, pass one to `runge_kutta`.
    """


@_documented
def etd1(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    linear: LinearPart = "diagonal",
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """Exponential Euler: one gradient a step, order 1, exact for a diagonal linear part of the field.

    `linear` is "l2" (the decay of `l2=`, exactly), "diagonal" or a `rk_optax.DiagonalCurvature` (an estimate of the
    Hessian's diagonal, one product every ten steps). See `rk_optax.Etd`.
    """
    return runge_kutta(loss_fn, learning_rate, Etd(1, linear), momentum=momentum, **options)


@_documented
def etdrk2(
    loss_fn: Loss,
    learning_rate: LearningRate,
    *,
    linear: LinearPart = "diagonal",
    momentum: Momentum = None,
    **options: Unpack[AliasOptions],
) -> Transformation:
    """ETDRK2: two gradients a step, order 2(1), exact for a diagonal linear part of the field.

    `linear` is "l2" (the decay of `l2=`, exactly), "diagonal" or a `rk_optax.DiagonalCurvature` (an estimate of the
    Hessian's diagonal, one product every ten steps). See `rk_optax.Etd`.
    """
    return runge_kutta(loss_fn, learning_rate, Etd(2, linear), momentum=momentum, **options)


def _search_for_secants() -> LearningRate:
    # How far the first step goes is a guess: it may have to be far shorter.
    return line_search(first=True, parts=24)


def _given_or(learning_rate: LearningRate | None, control: Callable[[], LearningRate]) -> LearningRate:
    return control() if learning_rate is None else learning_rate
