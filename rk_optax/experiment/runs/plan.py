"""Who takes part in a comparison, and what each may spend."""

import math
from typing import NamedTuple

import numpy as np

from rk_optax.experiment.config import CompareConfig, checked
from rk_optax.experiment.entrants import Optimizer, build_optimizer, check_slices
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.loop import refinements
from rk_optax.experiment.tasks.supervised import Supervised, probe_loss


class Entrant(NamedTuple):
    """An optimizer of the comparison and its share of the budget.

    Where the cost of a step varies, a run ends after its budget of gradients, and after so many steps at most.
    """

    name: str
    optimizer: Optimizer
    steps: int
    tuning_steps: int
    timed_steps: int
    timed_chunk: int  # steps from one point of a timed run to the next
    rates: tuple[float | None, ...]  # the trials, lowest first; None alone where the entrant finds its own
    budget: float = math.inf  # gradients after which a run ends
    tuning_budget: float = math.inf
    refine_at: tuple[int, ...] = ()  # steps after which the network's grid is refined
    tuning_refine_at: tuple[int, ...] = ()


def make_plan(config: CompareConfig) -> tuple[Entrant, ...]:
    """Checks a configuration and shares out the budget: equally much, and equally many trials, for every entrant.

    Raises:
        UsageError: if a value is impossible or the budget cannot be spent equally.
    """
    checked(config)
    probe = probe_loss(config.model)
    optimizers = {
        name: build_optimizer(
            f"optimizers.{name}", entrant, probe, has_rate=entrant.learning_rates is not None, sliced=Supervised.sliced
        )
        for name, entrant in config.optimizers.items()
    }
    for name, entrant in config.optimizers.items():
        check_slices(name, entrant, config.data.batch_size)
    # The most steps that a budget lasts for where the cost of a step varies.
    steps, timed_chunks = _share(config, [optimizer.gradients_per_step or 1 for optimizer in optimizers.values()])
    entrants = []
    for (name, optimizer), total, chunk in zip(optimizers.items(), steps, timed_chunks, strict=True):
        rates = config.optimizers[name].learning_rates
        varies = optimizer.gradients_per_step is None and config.budget.gradients is not None
        budget = float(config.budget.gradients or 0) if varies else math.inf
        if varies and config.model.refine_at:
            raise UsageError(
                f"model.refine_at = {config.model.refine_at} are fractions of a run's steps, which {name} has no fixed "
                "number of: set budget.updates instead of budget.gradients"
            )
        tuning_steps = _tuning_steps(config, total)
        refine_at, every = config.model.refine_at, config.budget.evaluate_every
        for length in (total, tuning_steps):
            optimizer.make(probe, 0.1, length)  # does its schedule fit?
        entrants.append(
            Entrant(
                name,
                optimizer,
                total,
                tuning_steps,
                config.timed_updates or total,
                config.timed_updates or (every if varies or refine_at else chunk),
                (None,) if rates is None else tuple(np.geomspace(*rates, config.tuning.trials).tolist()),
                budget,
                budget * config.tuning.fraction,
                refinements(refine_at, total, every),
                refinements(refine_at, tuning_steps, every),
            )
        )
    return tuple(entrants)


def _share(config: CompareConfig, costs: list[int]) -> tuple[list[int], list[int]]:
    """The steps of every entrant, and how many of them a timed run takes from point to point."""
    every, gradients, updates = config.budget.evaluate_every, config.budget.gradients, config.budget.updates
    if updates is not None:
        if updates % every:
            raise UsageError(
                f"budget.updates = {updates} must be a multiple of budget.evaluate_every = {every}: "
                f"take {max(1, round(updates / every)) * every}"
            )
        return [updates] * len(costs), [every] * len(costs)
    assert gradients is not None  # by the configuration's own check
    # The least number of gradients after which every entrant is at an evaluation point.
    unit = every * math.lcm(*costs)
    if gradients % unit:
        raise UsageError(
            f"budget.gradients = {gradients} must be a multiple of {unit}, which is "
            f"budget.evaluate_every = {every} times the least common "
            "multiple of the entrants' gradients per step, so that all spend exactly the same: "
            f"take {max(1, round(gradients / unit)) * unit}"
        )
    # Chunks of equally many gradients: the cost of launching one then favours nobody.
    return [gradients // cost for cost in costs], [unit // cost for cost in costs]


def _tuning_steps(config: CompareConfig, steps: int) -> int:
    """The length of a tuning run, a multiple of evaluate_every like the length of a compared one."""
    every, fraction = config.budget.evaluate_every, config.tuning.fraction
    tuning_steps = round(fraction * steps)
    if tuning_steps % every or not math.isclose(tuning_steps, fraction * steps):
        raise UsageError(
            f"tuning.fraction = {fraction} of {steps} steps must be a multiple of budget.evaluate_every = {every}"
        )
    return tuning_steps
