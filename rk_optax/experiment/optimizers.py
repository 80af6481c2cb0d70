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


Data: TypeAlias = dict[str, Any]  # the keywords of `update`


def _whole_batch(data: Data) -> Data:
    return data


class Optimizer(NamedTuple):
    """How to build an entrant, and what one of its steps costs in gradients over a whole batch."""

    make: Make
    gradients_per_step: int
    first_stage: Callable[[Data], Data] = _whole_batch  # what the gradient given to `update` has to be evaluated on


_OPTAX: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": lambda learning_rate, momentum=0.9, nesterov=False: optax.sgd(learning_rate, momentum, nesterov),
    "adam": optax.adam,
}
# Hutchinson's is missing: its Hessian-vector products are no whole number of gradients per step.
_PRECONDITIONERS = {
    "adagrad": rk_optax.precondition_by_adagrad,
    "rms": rk_optax.precondition_by_rms,
    "adam": rk_optax.precondition_by_adam,
}
_BATCHES = ("images", "labels")
# Gradients per step beside the solver's own; a Hessian-vector product takes about as long as two gradients.
_DAL_GRADIENTS = {"free": 0, "difference": 1, "product": 2}
_WITHOUT_INGREDIENTS = {"preconditioner": None, "rule": "constant", "rule_options": {}, "stage_batches": "same"}


class _Rule(NamedTuple):
    """How a learning-rate rule comes from the number that is searched."""

    of: Callable[[float | jax.Array], Any]
    gradients_per_step: int  # beside the solver's own


def build_optimizer(where: str, config: OptimizerConfig) -> Optimizer:
    """Resolves the factory of an entrant.

    Args:
        where: the name of its configuration, such as optimizers.sgd, for messages.
        config: the configuration.

    Raises:
        UsageError: if there is no such factory, or it does not take the options.
    """
    options: dict[str, Any] = dict(config.options)
    factory, first_stage = config.factory, _whole_batch
    if factory in _OPTAX:
        gradients_per_step = 1
        for field, default in _WITHOUT_INGREDIENTS.items():
            _refuse_unless(
                getattr(config, field) == default,
                f"{where}.{field}",
                getattr(config, field),
                f"is for solvers, and {factory} is Optax's: set it to {default!r}",
            )

        def make(loss_fn: LossFn, learning_rate: float | jax.Array) -> optax.GradientTransformationExtraArgs:
            del loss_fn
            # Optax's optimizers ignore the data this way, so that no caller has to tell them apart.
            return optax.with_extra_args_support(_OPTAX[factory](learning_rate, **options))

    elif factory in TABLEAUS:
        stages = TABLEAUS[factory].effective_stages
        rule = _rule(where, config)
        gradients_per_step = (1 if config.stage_batches == "split" else stages) + rule.gradients_per_step
        if config.preconditioner is not None:
            options["preconditioner"] = _PRECONDITIONERS[config.preconditioner]()
        if config.stage_batches == "split":
            options |= {"stage_batches": "split", "batch_argnames": _BATCHES}

            def first_stage(data: Data) -> Data:
                return rk_optax.first_stage_batch(data, stages, "split", _BATCHES)

        def make(loss_fn: LossFn, learning_rate: float | jax.Array) -> optax.GradientTransformationExtraArgs:
            return rk_optax.runge_kutta(loss_fn, rule.of(learning_rate), factory, **options)

    else:
        close = difflib.get_close_matches(factory, [*_OPTAX, *TABLEAUS], n=1)
        raise UsageError(
            f"{where}.factory = {factory!r} is neither of {', '.join(_OPTAX)} nor a "
            "solver listed by `rk-optax solvers`" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    try:
        make(_probe_loss, 0.1)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}.options = {dict(config.options)!r}: {error}") from error
    return Optimizer(make, gradients_per_step, first_stage)


def _rule(where: str, config: OptimizerConfig) -> _Rule:
    """The learning-rate rule of an entrant.

    Raises:
        UsageError: if its options are wrong, or its cost is no whole number of gradients per step.
    """
    options: dict[str, Any] = dict(config.rule_options)
    name = f"{where}.rule_options"
    if config.rule == "constant":
        _refuse_unless(not options, name, options, f"is for a rule: set {where}.rule to 'dal'")
        return _Rule(lambda learning_rate: learning_rate, 0)
    _refuse_unless(
        config.stage_batches == "same",
        f"{where}.stage_batches",
        config.stage_batches,
        "does not go with a rule, which measures the curvature of the whole batch: set one of them back",
    )
    # Estimating in some of the steps only would make a step cost a fraction of a gradient.
    _refuse_unless("every" not in options, name, options, "must leave out every: each step has to cost the same")
    try:
        rk_optax.dal(1.0, **options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} = {options!r}: {error}") from error
    estimate = options.get("estimate", "product")
    return _Rule(lambda learning_rate: rk_optax.dal(learning_rate, **options), _DAL_GRADIENTS[estimate])


def _refuse_unless(condition: bool, name: str, value: Any, message: str) -> None:
    if not condition:
        raise UsageError(f"{name} = {value!r} {message}")


def _probe_loss(params: Params, images: Array, labels: Array) -> jax.Array:
    """Stands in for the loss while a factory's arguments are checked; it is never evaluated."""
    raise NotImplementedError
