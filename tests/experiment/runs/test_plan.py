import dataclasses

import numpy as np
import pytest

from rk_optax.experiment.config import BudgetConfig, OptimizerConfig
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.plan import make_plan


def test_everybody_spends_the_same(smoke_config):
    plan = make_plan(smoke_config)
    assert {e.whole.steps * e.optimizer.gradients_per_step for e in plan} == {smoke_config.budget.gradients}
    assert {len(e.rates) for e in plan} == {smoke_config.tuning.trials}
    steps = {e.name: e.whole.steps for e in plan}
    assert steps["sgd"] == 2 * steps["heun"] == 4 * steps["rk4"]


def test_rates_are_log_spaced_over_the_whole_range(smoke_config):
    rates = make_plan(smoke_config)[0].rates
    np.testing.assert_allclose(rates, [0.05, 0.05 * 10**0.5, 0.5])


def test_unit_serves_every_entrant(smoke_config):
    optimizers = {name: OptimizerConfig(name, (0.1, 1.0)) for name in ("sgd", "rk4", "ssprk3")}
    config = dataclasses.replace(
        smoke_config, optimizers=optimizers, budget=BudgetConfig(gradients=120, evaluate_every=5)
    )
    plan = make_plan(config)
    assert {e.timed.chunk * e.optimizer.gradients_per_step for e in plan} == {5 * 12}
    assert [e.whole.steps for e in plan] == [120, 30, 40]


@pytest.mark.parametrize(("gradients", "nearest"), [(50, 48), (3, 16), (60, 64)])
def test_a_budget_that_cannot_be_shared_is_refused(smoke_config, gradients, nearest):
    config = dataclasses.replace(smoke_config, budget=BudgetConfig(gradients, evaluate_every=4))
    with pytest.raises(UsageError, match=rf"budget\.gradients = {gradients} .*take {nearest}$"):
        make_plan(config)


def in_updates(config, updates=40, **changes):
    return dataclasses.replace(config, budget=BudgetConfig(updates=updates, evaluate_every=4), **changes)


def test_a_budget_in_updates_is_the_same_steps_for_everybody(smoke_config):
    tuning = dataclasses.replace(smoke_config.tuning, fraction=0.3)
    plan = make_plan(in_updates(smoke_config, tuning=tuning, timed_updates=5))
    assert {(e.whole.steps, e.tuning.steps, e.timed.steps, e.timed.chunk) for e in plan} == {(40, 12, 5, 5)}
    assert {len(e.rates) for e in plan} == {smoke_config.tuning.trials}


def test_timed_runs_are_whole_unless_told(smoke_config):
    for config in (smoke_config, in_updates(smoke_config)):
        assert all(e.timed.steps == e.whole.steps and e.timed.steps % e.timed.chunk == 0 for e in make_plan(config))


def test_updates_must_end_at_an_evaluation(smoke_config):
    with pytest.raises(UsageError, match=r"budget\.updates = 41 .* budget\.evaluate_every = 4: take 40$"):
        make_plan(in_updates(smoke_config, 41))


@pytest.mark.parametrize("fraction", [0.25, 0.51])
def test_tuning_must_end_at_an_evaluation(smoke_config, fraction):
    config = in_updates(smoke_config, tuning=dataclasses.replace(smoke_config.tuning, fraction=fraction))
    with pytest.raises(UsageError, match=rf"tuning\.fraction = {fraction} of 40 steps must be a multiple of .* = 4"):
        make_plan(config)


@pytest.mark.parametrize("batch_size", [None, 30])
def test_slices_must_divide_the_batch(smoke_config, batch_size):
    config = in_updates(
        smoke_config,
        optimizers={"cut": OptimizerConfig("rk4", (0.1, 1.0), stage_batches="split")},
        data=dataclasses.replace(smoke_config.data, batch_size=batch_size),
    )
    with pytest.raises(UsageError, match=rf"data\.batch_size = {batch_size} must be a multiple of 4, because cut"):
        make_plan(config)


def test_methods_whose_steps_differ_end_with_their_budget(smoke_config):
    optimizers = {"rkc": OptimizerConfig("rkc"), "backward_euler": OptimizerConfig("backward_euler", (0.1, 1.0))}
    tuning = dataclasses.replace(smoke_config.tuning, fraction=0.5)
    config = dataclasses.replace(smoke_config, optimizers=optimizers, tuning=tuning)
    rkc, backward_euler = make_plan(config)
    assert (rkc.rates, len(backward_euler.rates)) == ((None,), 3)
    for entrant in (rkc, backward_euler):
        assert (entrant.whole.budget, entrant.tuning.budget, entrant.whole.steps) == (48, 24, 48)
    rkc, _ = make_plan(in_updates(config))
    assert (rkc.whole.budget, rkc.whole.steps) == (np.inf, 40)


def test_a_schedule_must_fit_the_tuning_runs_too(smoke_config):
    optimizers = {"sgd": OptimizerConfig("sgd", (0.1, 1.0), warmup_steps=20)}
    tuning = dataclasses.replace(smoke_config.tuning, fraction=0.3)
    with pytest.raises(UsageError, match=r"optimizers\.sgd\.warmup_steps = 20 must be less than the 12 steps"):
        make_plan(in_updates(smoke_config, optimizers=optimizers, tuning=tuning))
