import dataclasses

import numpy as np
import pytest

from rk_optax.experiment.config import BudgetConfig, OptimizerConfig
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.plan import make_plan


def test_everybody_spends_the_same(smoke_config):
    plan = make_plan(smoke_config)
    assert {e.steps * e.gradients_per_step for e in plan.entrants} == {smoke_config.budget.gradients}
    assert {len(e.rates) for e in plan.entrants} == {smoke_config.tuning.trials}
    steps = {e.name: e.steps for e in plan.entrants}
    assert steps["sgd"] == 2 * steps["heun"] == 4 * steps["rk4"]


def test_rates_are_log_spaced_over_the_whole_range(smoke_config):
    rates = make_plan(smoke_config).entrants[0].rates
    np.testing.assert_allclose(rates, [0.05, 0.05 * 10**0.5, 0.5])


def test_unit_serves_every_entrant(smoke_config):
    optimizers = {name: OptimizerConfig(name, (0.1, 1.0)) for name in ("sgd", "rk4", "ssprk3")}
    config = dataclasses.replace(
        smoke_config, optimizers=optimizers, budget=BudgetConfig(gradients=120, evaluate_every=5)
    )
    plan = make_plan(config)
    assert plan.unit == 5 * 12
    assert [e.steps for e in plan.entrants] == [120, 30, 40]


@pytest.mark.parametrize(("gradients", "nearest"), [(50, 48), (3, 16), (60, 64)])
def test_a_budget_that_cannot_be_shared_is_refused(smoke_config, gradients, nearest):
    config = dataclasses.replace(smoke_config, budget=BudgetConfig(gradients, evaluate_every=4))
    with pytest.raises(UsageError, match=rf"budget\.gradients = {gradients} .*take {nearest}$"):
        make_plan(config)
