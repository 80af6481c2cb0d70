"""Who takes part in a comparison, and what each may spend."""

import math
from typing import NamedTuple

import numpy as np

from rk_optax.experiment.config import CompareConfig, check
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.optimizers import Make, build_optimizer


class Entrant(NamedTuple):
    """An optimizer of the comparison and its share of the budget."""

    name: str
    make: Make
    gradients_per_step: int
    steps: int
    rates: tuple[float, ...]  # the trials, lowest first


class Plan(NamedTuple):
    """Equal budgets and equally many trials for every entrant."""

    entrants: tuple[Entrant, ...]
    # The least number of gradients after which every entrant is at an evaluation point; the budget
    # is a multiple of it.
    unit: int


def make_plan(config: CompareConfig) -> Plan:
    """Checks a configuration and shares out the budget.

    Raises:
        UsageError: if a value is impossible or the budget cannot be spent equally.
    """
    check(config)
    optimizers = {name: build_optimizer(name, entrant) for name, entrant in config.optimizers.items()}
    costs = [optimizer.gradients_per_step for optimizer in optimizers.values()]
    unit = config.budget.evaluate_every * math.lcm(*costs)
    gradients = config.budget.gradients
    if gradients % unit:
        raise UsageError(
            f"budget.gradients = {gradients} must be a multiple of {unit}, which is "
            f"budget.evaluate_every = {config.budget.evaluate_every} times the least common "
            "multiple of the entrants' gradients per step, so that all spend exactly the same: "
            f"take {max(1, round(gradients / unit)) * unit}"
        )
    trials = config.tuning.trials
    entrants = [
        Entrant(
            name,
            optimizer.make,
            optimizer.gradients_per_step,
            gradients // optimizer.gradients_per_step,
            tuple(np.geomspace(*config.optimizers[name].learning_rates, trials).tolist()),
        )
        for name, optimizer in optimizers.items()
    ]
    return Plan(tuple(entrants), unit)
