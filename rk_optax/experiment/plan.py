"""Who takes part in a comparison, and what each may spend."""

import math
from typing import NamedTuple

import numpy as np

from rk_optax.experiment.config import CompareConfig, OptimizerConfig, check
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.optimizers import Optimizer, build_optimizer
from rk_optax.tableau import TABLEAUS


class Entrant(NamedTuple):
    """An optimizer of the comparison and its share of the budget."""

    name: str
    optimizer: Optimizer
    steps: int
    tuning_steps: int
    timed_steps: int
    timed_chunk: int  # steps from one point of a timed run to the next
    rates: tuple[float, ...]  # the trials, lowest first

    @property
    def gradients_per_step(self) -> int:
        """What a step costs."""
        return self.optimizer.gradients_per_step


def make_plan(config: CompareConfig) -> tuple[Entrant, ...]:
    """Checks a configuration and shares out the budget: equally much, and equally many trials, for every entrant.

    Raises:
        UsageError: if a value is impossible or the budget cannot be spent equally.
    """
    check(config)
    optimizers = {name: build_optimizer(f"optimizers.{name}", entrant) for name, entrant in config.optimizers.items()}
    for name, entrant in config.optimizers.items():
        check_slices(name, entrant, config.data.batch_size)
    steps, timed_chunks = _share(config, [optimizer.gradients_per_step for optimizer in optimizers.values()])
    return tuple(
        Entrant(
            name,
            optimizer,
            total,
            _tuning_steps(config, total),
            config.timed_updates or total,
            config.timed_updates or chunk,
            tuple(np.geomspace(*config.optimizers[name].learning_rates, config.tuning.trials).tolist()),
        )
        for (name, optimizer), total, chunk in zip(optimizers.items(), steps, timed_chunks, strict=True)
    )


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
    assert gradients is not None  # by check()
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


def check_slices(name: str, optimizer: OptimizerConfig, batch_size: int | None) -> None:
    """Checks that a batch can be cut into a slice per stage, if it has to be.

    Raises:
        UsageError: if it cannot.
    """
    stages = TABLEAUS[optimizer.factory].effective_stages if optimizer.stage_batches == "split" else 1
    if stages > 1 and (batch_size is None or batch_size % stages):
        raise UsageError(
            f"data.batch_size = {batch_size} must be a multiple of {stages}, because {name} cuts a batch into a "
            f"slice for each of its {stages} stages"
        )
