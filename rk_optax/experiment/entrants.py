"""The registry of optimizers for `train`, `compare` and `race` alike: those of rk_optax and of Optax, each by its name.

An optimizer of either library is known as soon as the library exports it; what needs more than that stands here.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

import rk_optax
from rk_optax.experiment.config import PRECONDITIONERS, RULES, MethodConfig
from rk_optax.experiment.direct import DIRECT
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.rivals import RIVALS
from rk_optax.experiment.tasks.task import Data
from rk_optax.methods import TABLEAUS

LossFn = Callable[..., jax.Array]
Transformation = optax.GradientTransformationExtraArgs


def _factories(module: Any, *first: str) -> dict[str, Callable[..., Any]]:
    """The public functions of a module whose first parameters are called so."""
    public = {name: getattr(module, name) for name in dir(module) if not name.startswith(("_", "scale_by_"))}
    return {
        name: member
        for name, member in public.items()
        if inspect.isfunction(member) and tuple(inspect.signature(member).parameters)[: len(first)] == first
    }


class AdamThenLbfgsState(NamedTuple):
    """State of `adam_then_lbfgs`."""

    step: jax.Array  # how many there have been
    adam: Any
    lbfgs: Any


def adam_then_lbfgs(learning_rate: Any, adam_steps: int, **options: Any) -> Transformation:
    """Adam with a cosine decay over the first `adam_steps`, then L-BFGS from where it stopped.

    Args:
        learning_rate: Adam's, at the start.
        adam_steps: how many of the steps are Adam's.
        **options: those of `optax.lbfgs`.
    """
    decay = optax.cosine_decay_schedule(1.0, adam_steps)
    adam = optax.adam(lambda count: learning_rate * decay(count))
    lbfgs = optax.lbfgs(**options)

    def init(params: Any) -> AdamThenLbfgsState:
        return AdamThenLbfgsState(jnp.zeros([], jnp.int32), adam.init(params), lbfgs.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, AdamThenLbfgsState]:
        def with_adam() -> Any:
            moves, new = adam.update(updates, state.adam, params)
            return moves, new, state.lbfgs

        def with_lbfgs() -> Any:
            moves, new = lbfgs.update(updates, state.lbfgs, params, **extra)
            return moves, state.adam, new

        moves, *parts = jax.lax.cond(state.step < adam_steps, with_adam, with_lbfgs)
        return moves, AdamThenLbfgsState(state.step + 1, *parts)

    return optax.GradientTransformationExtraArgs(init, update)


OPTAX = _factories(optax, "learning_rate") | {
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "nesterov": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "adam_then_lbfgs": adam_then_lbfgs,
}
_ALIASES = _factories(rk_optax, "loss_fn", "learning_rate")
SOLVERS = {name: functools.partial(rk_optax.runge_kutta, solver=name) for name in TABLEAUS} | {
    name: alias for name, alias in _ALIASES.items() if name not in ("runge_kutta", "scale_by_rk")
}
_SOLVERS_ALONE = {"preconditioner": None, "rule": "constant", "rule_options": {}, "stage_batches": "same"}


class Make(Protocol):
    """Builds an optimizer of a loss whose data are passed to `update` by name."""

    def __call__(self, loss_fn: LossFn, learning_rate: Any, steps: int | None) -> Transformation:
        """Returns the optimizer of a run of so many steps; an entrant that finds its own rate ignores the given one."""
        ...


def _one_gradient(before: Any, after: Any, fresh: int) -> rk_optax.Cost:
    del before, after, fresh
    return rk_optax.Cost(gradients=1)


def _lbfgs_cost(before: Any, after: Any, fresh: int) -> rk_optax.Cost:
    """A step of its line search is a loss and a gradient, the last of which is that of the new parameters."""
    spent = fresh + optax.tree_utils.tree_get(after, "num_linesearch_steps")
    if isinstance(after, AdamThenLbfgsState):
        # The line search of the states before has not run yet.
        spent = jnp.where(jnp.isinf(optax.tree_utils.tree_get(after, "value")), 1, spent)
    return rk_optax.Cost(gradients=spent)


def _counted(before: Any, after: Any, fresh: int) -> rk_optax.Cost:
    del fresh
    return jax.tree.map(jnp.subtract, after.cost, before.cost)


def _whole_batch(data: Data) -> Data:
    return data


class Optimizer(NamedTuple):
    """How to build an entrant, and what one of its steps costs."""

    make: Make
    gradients_per_step: int | None  # over a whole batch; None where steps differ
    takes_rate: bool = True
    first_stage: Callable[[Data], Data] = _whole_batch  # what the gradient given to `update` is evaluated on
    # Of one step, from the states before and after it and from whether its first gradient was evaluated for it.
    cost: Callable[[Any, Any, int], rk_optax.Cost] = _one_gradient
    keeps_gradient: bool = False  # whether the state holds value and gradient at the new parameters
    # Of the gradient, by the name of a field of the state: what `rk_optax.networks.refine_state` cannot know.
    powers: Mapping[str, int] = MappingProxyType({})
    takes_gradient: bool = True  # whether `update` reads the gradient that it is given


def build_optimizer(
    where: str, config: MethodConfig, probe: LossFn, *, has_rate: bool, sliced: Sequence[str] = ()
) -> Optimizer:
    """Resolves the factory of an entrant.

    Args:
        where: the name of its configuration, such as optimizers.sgd, for messages.
        config: the configuration.
        probe: a loss of the structure of the one that will be trained; it is not evaluated.
        has_rate: whether a learning rate is given.
        sliced: names of the data arguments that hold a batch.

    Raises:
        UsageError: if there is no such factory, or it does not take the options or the loss.
    """
    factories = {**DIRECT, **RIVALS, **SOLVERS, **OPTAX}
    factory = factories.get(config.factory)
    if factory is None:
        close = difflib.get_close_matches(config.factory, factories, n=1)
        raise UsageError(
            f"{where}.factory = {config.factory!r} is no optimizer of Optax, nor one that `rk-optax solvers` lists"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    options: dict[str, Any] = dict(config.options)
    _refuse_unless("learning_rate" not in options, f"{where}.options", options, "must leave out learning_rate")
    _check_rate(where, config, factory, has_rate)
    of_optax = config.factory in OPTAX
    first_stage, keeps_gradient = _whole_batch, config.factory in ("lbfgs", "adam_then_lbfgs", "ssbroyden")
    if config.factory not in SOLVERS:
        for field, default in _SOLVERS_ALONE.items():
            value = getattr(config, field)
            whose = "Optax's" if of_optax else "none"
            problem = f"is for solvers, and {config.factory} is {whose}: set it to {default!r}"
            _refuse_unless(value == default, f"{where}.{field}", value, problem)
    if of_optax:
        cost, gradients_per_step = (_lbfgs_cost, None) if keeps_gradient else (_one_gradient, 1)
    elif config.factory in RIVALS:
        cost, gradients_per_step = _counted, None
    else:
        cost, gradients_per_step = _counted, _fixed_cost(where, config)
        if config.preconditioner is not None:
            options["preconditioner"] = PRECONDITIONERS[config.preconditioner]()
        if config.stage_batches == "split":
            first_stage = _first_slice(where, config, sliced)
            options |= {"stage_batches": "split", "batch_argnames": tuple(sliced)}

    def make(loss_fn: LossFn, learning_rate: Any, steps: int | None) -> Transformation:
        rate = _step_size(where, config, learning_rate, steps) if has_rate or config.rule != "constant" else None
        given = options if rate is None else options | {"learning_rate": rate}
        if of_optax:
            return _without_data(factory(**given))
        return factory(loss_fn, **given)

    try:
        make(probe, 0.1, config.warmup_steps + 1)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        given = f"options = {dict(config.options)!r}" if config.options else f"factory = {config.factory!r}"
        hides = isinstance(probe, rk_optax.ModelLoss) and not isinstance(probe, rk_optax.LeastSquares)
        remedy = " Set model.loss = 'squared_error'." if hides and "LeastSquares" in str(error) else ""
        raise UsageError(f"{where}.{given}: {error}{remedy}") from error
    return Optimizer(
        make,
        gradients_per_step,
        has_rate,
        first_stage,
        cost,
        keeps_gradient,
        _powers(config),
        takes_gradient=config.factory not in DIRECT,
    )


def _powers(config: MethodConfig) -> dict[str, int]:
    if config.factory in ("adamax", "adamaxw"):
        return {"nu": 1}  # a largest absolute value
    # Where it follows a normalisation, a trace does not shrink with the gradient.
    normalised = config.factory in ("rmsprop", "lars") or config.preconditioner is not None
    return {"trace": 0} if normalised else {}


def _without_data(tx: optax.GradientTransformation) -> Transformation:
    """An optimizer of Optax that ignores the data, so that no caller has to tell it from a solver."""
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        of_loss = {name: extra[name] for name in ("value", "grad", "value_fn") if name in extra}
        return tx.update(updates, state, params, **of_loss)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _check_rate(where: str, config: MethodConfig, factory: Callable[..., Any], has_rate: bool) -> None:
    """Checks that a learning rate is given where one is needed, and only there."""
    scheduled = config.schedule != "constant" or config.warmup_steps > 0
    if config.rule == "constant":
        rate = inspect.signature(factory).parameters.get("learning_rate")
        needed = rate is not None and rate.default is inspect.Parameter.empty
        takes = rate is not None or not has_rate
        _refuse_unless(takes, f"{where}.factory", config.factory, "takes no learning_rate: leave learning rates out")
        _refuse_unless(has_rate or not needed, f"{where}.factory", config.factory, "needs a learning_rate")
        _refuse_unless(has_rate or not scheduled, f"{where}.schedule", config.schedule, "needs a learning_rate")
        options = dict(config.rule_options)
        _refuse_unless(not options, f"{where}.rule_options", options, f"is for a rule: set {where}.rule, to 'dal' say")
    else:
        _refuse_unless(
            not scheduled,
            f"{where}.rule",
            config.rule,
            "sets the learning rate itself: leave schedule and warmup_steps out",
        )
        if _is_capped(config.rule):
            _refuse_unless(has_rate, f"{where}.rule", config.rule, "needs a learning_rate, its largest one")
        else:
            _refuse_unless(not has_rate, f"{where}.rule", config.rule, "finds the step size: leave learning rates out")


def _is_capped(rule: str) -> bool:
    """Whether the step size is at most the learning rate, which is then the rule's first argument."""
    return next(iter(inspect.signature(RULES[rule]).parameters)) == "max_learning_rate"


def _step_size(where: str, config: MethodConfig, learning_rate: Any, steps: int | None) -> Any:
    """The learning rate, its schedule, or the rule that makes a step size of it."""
    if config.rule != "constant":
        options = dict(config.rule_options)
        rule: Any = RULES[config.rule]
        try:
            return rule(learning_rate, **options) if _is_capped(config.rule) else rule(**options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{where}.rule_options = {options!r}: {error}") from error
    warmup = config.warmup_steps
    if config.schedule == "constant" and not warmup:
        return learning_rate
    if steps is None:
        raise UsageError(f"{where}.schedule = {config.schedule!r} needs steps, over which the rate goes down")
    if warmup >= steps:
        raise UsageError(f"{where}.warmup_steps = {warmup} must be less than the {steps} steps of the run")
    after = {
        "constant": lambda: optax.constant_schedule(1.0),
        "cosine": lambda: optax.cosine_decay_schedule(1.0, steps - warmup),
        "linear": lambda: optax.linear_schedule(1.0, 0.0, steps - warmup),
    }[config.schedule]()
    factor = optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup])
    return lambda count: learning_rate * factor(count)


def _fixed_cost(where: str, config: MethodConfig) -> int | None:
    """Gradients of every step of a solver, or None where that depends on the step."""
    if config.factory not in TABLEAUS or config.rule not in ("constant", "dal") or "every" in config.rule_options:
        return None
    own = 1 if config.stage_batches == "split" else TABLEAUS[config.factory].effective_stages
    if config.rule == "constant":
        return own
    estimate = _step_size(where, config, 1.0, None).cost_per_estimate
    return own + estimate.gradients + 2 * estimate.products  # a product takes about as long as two gradients


def _first_slice(where: str, config: MethodConfig, sliced: Sequence[str]) -> Callable[[Data], Data]:
    """What stage 1 sees of a batch that is cut into a slice per stage."""
    name, value = f"{where}.stage_batches", config.stage_batches
    stages = TABLEAUS[config.factory].effective_stages if config.factory in TABLEAUS else None
    _refuse_unless(
        config.rule == "constant",
        name,
        value,
        "does not go with a rule, which measures the curvature of the whole batch: set one of them back",
    )
    _refuse_unless(bool(sliced), name, value, "needs batches, and this loss sees all of its data at every step")
    if stages is None:
        raise UsageError(f"{name} = {value!r} needs a fixed number of stages, which {config.factory} does not have")
    return lambda data: rk_optax.first_stage_batch(data, stages, "split", sliced)


def check_slices(where: str, config: MethodConfig, batch_size: int | None) -> None:
    """Checks that a batch can be cut into a slice per stage, if it has to be.

    Raises:
        UsageError: if it cannot.
    """
    stages = TABLEAUS[config.factory].effective_stages if config.stage_batches == "split" else 1
    if stages > 1 and (batch_size is None or batch_size % stages):
        raise UsageError(
            f"data.batch_size = {batch_size} must be a multiple of {stages}, because {where} cuts a batch into a "
            f"slice for each of its {stages} stages"
        )


def _refuse_unless(condition: bool, name: str, value: Any, message: str) -> None:
    if not condition:
        raise UsageError(f"{name} = {value!r} {message}")
