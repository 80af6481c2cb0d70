"""Who takes part in a comparison, and what each may spend."""

import math
from typing import NamedTuple

import numpy as np

from rk_optax.experiment.config import CompareConfig, checked
from rk_optax.experiment.entrants import Optimizer, build_optimizer, check_slices
from rk_optax.experiment.errors import require
from rk_optax.experiment.runs.loop import refinements
from rk_optax.experiment.runs.protocol import nearest_multiple
from rk_optax.experiment.tasks.supervised import Supervised, probe_loss


class Length(NamedTuple):
    """How far a run goes; where the cost of a step varies, it ends with its budget, and after `steps` at most."""

    steps: int
    chunk: int  # steps from one point to the next
    schedule: int  # steps over which the learning rate goes down
    budget: float = math.inf  # gradients after which a run ends
    refine_at: tuple[int, ...] = ()  # steps after which the network's grid is refined


class Entrant(NamedTuple):
    """An optimizer of the comparison and its share of the budget."""

    name: str
    optimizer: Optimizer
    rates: tuple[float | None, ...]  # the trials, lowest first; None alone where the entrant finds its own
    whole: Length  # of a compared run
    tuning: Length
    timed: Length


def make_plan(config: CompareConfig) -> tuple[Entrant, ...]:
    """Checks a configuration and shares out the budget: equally much, and equally many trials, for every entrant."""
    checked(config)
    probe = probe_loss(config.model)
    optimizers = {}
    for name, entrant in config.optimizers.items():
        has_rate, where = entrant.learning_rates is not None, f"optimizers.{name}"
        optimizers[name] = build_optimizer(where, entrant, probe, has_rate=has_rate, sliced=Supervised.sliced)
        check_slices(name, entrant, config.data.batch_size)
    # The most steps that a budget lasts for where the cost of a step varies.
    steps, timed_chunks = _share(config, [optimizer.gradients_per_step or 1 for optimizer in optimizers.values()])
    refine_at, every, fraction = config.model.refine_at, config.budget.evaluate_every, config.tuning.fraction
    entrants = []
    for (name, optimizer), total, chunk in zip(optimizers.items(), steps, timed_chunks, strict=True):
        varies = optimizer.gradients_per_step is None and config.budget.gradients is not None
        require(
            not (varies and refine_at),
            f"model.refine_at = {refine_at} are fractions of a run's steps, which {name} has no fixed number of: set "
            "budget.updates instead of budget.gradients",
        )
        budget = float(config.budget.gradients or 0) if varies else math.inf

        def length(steps: int, budget: float, optimizer: Optimizer = optimizer) -> Length:
            optimizer.make(probe, 0.1, steps)  # does its schedule fit?
            return Length(steps, every, steps, budget, refinements(refine_at, steps, every))

        whole, tuning = length(total, budget), length(_tuning_steps(config, total), budget * fraction)
        short = config.timed_updates
        timed = whole._replace(steps=short or total, chunk=short or (every if varies or refine_at else chunk))
        ends = config.optimizers[name].learning_rates
        rates = (None,) if ends is None else tuple(np.geomspace(*ends, config.tuning.trials).tolist())
        entrants.append(Entrant(name, optimizer, rates, whole, tuning, timed))
    return tuple(entrants)


def _share(config: CompareConfig, costs: list[int]) -> tuple[list[int], list[int]]:
    """The steps of every entrant, and how many of them a timed run takes from point to point."""
    every, gradients, updates = config.budget.evaluate_every, config.budget.gradients, config.budget.updates
    if updates is not None:
        multiple = f"must be a multiple of budget.evaluate_every = {every}: take {nearest_multiple(updates, every)}"
        require(updates % every == 0, f"budget.updates = {updates} {multiple}")
        return [updates] * len(costs), [every] * len(costs)
    assert gradients is not None  # by the configuration's own check
    # The least number of gradients after which every entrant is at an evaluation point.
    unit = every * math.lcm(*costs)
    require(
        gradients % unit == 0,
        f"budget.gradients = {gradients} must be a multiple of {unit}, which is budget.evaluate_every = {every} times "
        "the least common multiple of the entrants' gradients per step, so that all spend exactly the same: take "
        f"{nearest_multiple(gradients, unit)}",
    )
    # Chunks of equally many gradients: the cost of launching one then favours nobody.
    return [gradients // cost for cost in costs], [unit // cost for cost in costs]


def _tuning_steps(config: CompareConfig, steps: int) -> int:
    """The length of a tuning run, a multiple of evaluate_every like the length of a compared one."""
    every, fraction = config.budget.evaluate_every, config.tuning.fraction
    tuning_steps = round(fraction * steps)
    require(
        tuning_steps % every == 0 and math.isclose(tuning_steps, fraction * steps),
        f"tuning.fraction = {fraction} of {steps} steps must be a multiple of budget.evaluate_every = {every}",
    )
    return tuning_steps
