"""The registry of optimizers for `train`, `compare` and `race` alike: those of rk_optax and of Optax, each by its name.

An optimizer of either library is known as soon as the library exports it; what needs more than that stands here.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import rk_optax
from rk_optax.experiment.config import PRECONDITIONERS, RULES, MethodConfig
from rk_optax.experiment.direct import DIRECT
from rk_optax.experiment.errors import UsageError, refusing, require
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


# (loss_fn, learning_rate, steps of the run) -> the optimizer of a loss whose data are passed to `update` by name; an
# entrant that finds its own rate ignores the given one.
Make = Callable[[LossFn, Any, int | None], Transformation]


def _one_gradient(before: Any, after: Any, fresh: int) -> rk_optax.Cost:
    return rk_optax.Cost(gradients=1)


def _lbfgs_cost(before: Any, after: Any, fresh: int) -> rk_optax.Cost:
    """A step of its line search is a loss and a gradient, the last of which is that of the new parameters."""
    spent = fresh + optax.tree_utils.tree_get(after, "num_linesearch_steps")
    if isinstance(after, AdamThenLbfgsState):
        # The line search of the states before has not run yet.
        spent = jnp.where(jnp.isinf(optax.tree_utils.tree_get(after, "value")), 1, spent)
    return rk_optax.Cost(gradients=spent)


def _counted(before: Any, after: Any, fresh: int) -> rk_optax.Cost:
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
    """Resolves the factory of an entrant, and checks that it takes its options and the loss.

    Args:
        where: the name of its configuration, such as optimizers.sgd, for messages.
        config: the configuration.
        probe: a loss of the structure of the one that will be trained; it is not evaluated.
        has_rate: whether a learning rate is given.
        sliced: names of the data arguments that hold a batch.
    """
    name, factories = config.factory, {**DIRECT, **RIVALS, **SOLVERS, **OPTAX}
    if name not in factories:
        close = "".join(f"; did you mean {match!r}?" for match in difflib.get_close_matches(name, factories, n=1))
        raise UsageError(
            f"{where}.factory = {name!r} is no optimizer of Optax, nor one that `rk-optax solvers` lists{close}"
        )
    factory, of_optax, options = factories[name], name in OPTAX, dict[str, Any](config.options)
    refuse = functools.partial(_refuse_unless, where, config)
    refuse("learning_rate" not in options, "options", "must leave out learning_rate")
    _check_rate(where, config, factory, has_rate)
    keeps_gradient = name in ("lbfgs", "adam_then_lbfgs", "ssbroyden")
    cost, gradients_per_step, first_stage = _counted, None, _whole_batch
    if name in SOLVERS:
        gradients_per_step = _fixed_cost(where, config)
        if config.preconditioner is not None:
            options["preconditioner"] = PRECONDITIONERS[config.preconditioner]()
        if config.stage_batches == "split":
            first_stage = _first_slice(refuse, config, sliced)
            options |= {"stage_batches": "split", "batch_argnames": tuple(sliced)}
    else:
        whose = "Optax's" if of_optax else "none"
        for field, default in _SOLVERS_ALONE.items():
            problem = f"is for solvers, and {name} is {whose}: set it to {default!r}"
            refuse(getattr(config, field) == default, field, problem)
    if of_optax:
        cost, gradients_per_step = (_lbfgs_cost, None) if keeps_gradient else (_one_gradient, 1)

    def make(loss_fn: LossFn, learning_rate: Any, steps: int | None) -> Transformation:
        rate = _step_size(where, config, learning_rate, steps) if has_rate or config.rule != "constant" else None
        given = options if rate is None else options | {"learning_rate": rate}
        return _without_data(factory(**given)) if of_optax else factory(loss_fn, **given)

    try:
        make(probe, 0.1, config.warmup_steps + 1)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        given = f"options = {dict(config.options)!r}" if config.options else f"factory = {name!r}"
        hides = isinstance(probe, rk_optax.ModelLoss) and not isinstance(probe, rk_optax.LeastSquares)
        remedy = " Set model.loss = 'squared_error'." if hides and "LeastSquares" in str(error) else ""
        raise UsageError(f"{where}.{given}: {error}{remedy}") from error
    powers, takes_gradient = _powers(config), name not in DIRECT
    return Optimizer(make, gradients_per_step, has_rate, first_stage, cost, keeps_gradient, powers, takes_gradient)


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
    refuse = functools.partial(_refuse_unless, where, config)
    scheduled = config.schedule != "constant" or config.warmup_steps > 0
    if config.rule == "constant":
        rate = inspect.signature(factory).parameters.get("learning_rate")
        needed = rate is not None and rate.default is inspect.Parameter.empty
        refuse(rate is not None or not has_rate, "factory", "takes no learning_rate: leave learning rates out")
        refuse(has_rate or not needed, "factory", "needs a learning_rate")
        refuse(has_rate or not scheduled, "schedule", "needs a learning_rate")
        refuse(not config.rule_options, "rule_options", f"is for a rule: set {where}.rule, to 'dal' say")
    else:
        refuse(not scheduled, "rule", "sets the learning rate itself: leave schedule and warmup_steps out")
        if _is_capped(config.rule):
            refuse(has_rate, "rule", "needs a learning_rate, its largest one")
        else:
            refuse(not has_rate, "rule", "finds the step size: leave learning rates out")


def _is_capped(rule: str) -> bool:
    """Whether the step size is at most the learning rate, which is then the rule's first argument."""
    return next(iter(inspect.signature(RULES[rule]).parameters)) == "max_learning_rate"


def _step_size(where: str, config: MethodConfig, learning_rate: Any, steps: int | None) -> Any:
    """The learning rate, its schedule, or the rule that makes a step size of it."""
    if config.rule != "constant":
        options: dict[str, Any] = dict(config.rule_options)
        rule: Any = RULES[config.rule]
        with refusing(f"{where}.rule_options = {options!r}", TypeError, ValueError):
            return rule(learning_rate, **options) if _is_capped(config.rule) else rule(**options)
    warmup = config.warmup_steps
    if config.schedule == "constant" and not warmup:
        return learning_rate
    if steps is None:
        raise UsageError(f"{where}.schedule = {config.schedule!r} needs steps, over which the rate goes down")
    require(warmup < steps, f"{where}.warmup_steps = {warmup} must be less than the {steps} steps of the run")
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


def _first_slice(refuse: Callable[..., None], config: MethodConfig, sliced: Sequence[str]) -> Callable[[Data], Data]:
    """What stage 1 sees of a batch that is cut into a slice per stage."""
    refuse(
        config.rule == "constant",
        "stage_batches",
        "does not go with a rule, which measures the curvature of the whole batch: set one of them back",
    )
    refuse(sliced, "stage_batches", "needs batches, and this loss sees all of its data at every step")
    needs = f"needs a fixed number of stages, which {config.factory} does not have"
    refuse(config.factory in TABLEAUS, "stage_batches", needs)
    stages = TABLEAUS[config.factory].effective_stages
    return lambda data: rk_optax.first_stage_batch(data, stages, "split", sliced)


def check_slices(where: str, config: MethodConfig, batch_size: int | None) -> None:
    """Checks that a batch can be cut into a slice per stage, if it has to be."""
    stages = TABLEAUS[config.factory].effective_stages if config.stage_batches == "split" else 1
    require(
        stages == 1 or (batch_size and batch_size % stages == 0),
        f"data.batch_size = {batch_size} must be a multiple of {stages}, because {where} cuts a batch into a slice for "
        f"each of its {stages} stages",
    )


def _refuse_unless(where: str, config: MethodConfig, condition: object, field: str, message: str) -> None:
    require(condition, f"{where}.{field} = {getattr(config, field)!r} {message}")
