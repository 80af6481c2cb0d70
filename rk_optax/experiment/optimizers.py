"""One uniform way to build every entrant, an Optax optimizer or one of our solvers."""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import optax

import rk_optax
from rk_optax.experiment.config import OptimizerConfig
from rk_optax.experiment.data import Array
from rk_optax.experiment.errors import UsageError
from rk_optax.tableau import TABLEAUS

Params: TypeAlias = Any  # a pytree of arrays
LossFn: TypeAlias = Callable[[Params, Array, Array], jax.Array]


class Make(Protocol):
    """Builds an optimizer of a loss whose data are called `images` and `labels`."""

    def __call__(self, loss_fn: LossFn, learning_rate: float | jax.Array) -> optax.GradientTransformationExtraArgs:
        """Returns an optimizer whose `update` accepts the data as keyword arguments."""
        ...


class Optimizer(NamedTuple):
    """How to build an entrant, and what one of its steps costs in gradient evaluations."""

    make: Make
    gradients_per_step: int


_OPTAX: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate, momentum=0.9, nesterov=False: optax.sgd(learning_rate, momentum, nesterov),
    "adam": optax.adam,
}


def build_optimizer(name: str, config: OptimizerConfig) -> Optimizer:
    """Resolves the factory of the entrant `name`.

    Raises:
        UsageError: if there is no such factory, or it does not take the options.
    """
    options: dict[str, Any] = dict(config.options)
    factory = config.factory
    if factory in _OPTAX:
        gradients_per_step = 1

        def make(loss_fn: LossFn, learning_rate: float | jax.Array) -> optax.GradientTransformationExtraArgs:
            del loss_fn
            # Optax's optimizers ignore the data this way, so that no caller has to tell them apart.
            return optax.with_extra_args_support(_OPTAX[factory](learning_rate, **options))

    elif factory in TABLEAUS:
        gradients_per_step = TABLEAUS[factory].effective_stages

        def make(loss_fn: LossFn, learning_rate: float | jax.Array) -> optax.GradientTransformationExtraArgs:
            return rk_optax.runge_kutta(loss_fn, learning_rate, factory, **options)

    else:
        close = difflib.get_close_matches(factory, [*_OPTAX, *TABLEAUS], n=1)
        raise UsageError(
            f"optimizers.{name}.factory = {factory!r} is neither of {', '.join(_OPTAX)} nor a "
            "solver listed by `rk-optax solvers`" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    try:
        make(_probe_loss, 0.1)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizers.{name}.options = {options!r}: {error}") from error
    return Optimizer(make, gradients_per_step)


def _probe_loss(params: Params, images: Array, labels: Array) -> jax.Array:
    """Stands in for the loss while a factory's arguments are checked; it is never evaluated."""
    raise NotImplementedError
