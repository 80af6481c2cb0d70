"""What one update is: guard, against steps by hand in NumPy, Optax and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import (
    STAYS,
    assert_same,
)

import rk_optax
from rk_optax import Cost, Reason, Step


# --- Non-finite values in later stages -----------------------------------------------------------------------------
def edge_loss(params, edge):
    """Finite with a finite gradient above the edge, NaN below it."""
    return jnp.sum(jnp.sqrt(params - edge))


SAFE, NEAR = -100.0, 0.99  # from params of about 1, a step of size 1 stays finite or crosses the edge


@pytest.fixture(params=["momentum", "adam", "scale_by_rk"])
def guarded(request):
    """A transformation, and how its constructor is called again without the guard."""
    make = {
        "momentum": functools.partial(rk_optax.rk4, edge_loss, 1.0, momentum=0.9),
        "adam": functools.partial(rk_optax.rk4, edge_loss, 1.0, after=optax.scale_by_adam()),
        "scale_by_rk": functools.partial(rk_optax.scale_by_rk, edge_loss, 1.0, "rk4"),
    }[request.param]
    return make


@pytest.mark.covering(most=2)
def test_a_later_stage_that_is_not_finite_leaves_parameters_and_momentum_where_they_were(guarded):
    tx = guarded()
    update = jax.jit(tx.update)
    params = jnp.ones(2)
    grads = {edge: jax.grad(edge_loss)(params, edge) for edge in (SAFE, NEAR)}
    assert np.all(np.isfinite(grads[NEAR]))

    first, before = update(grads[SAFE], tx.init(params), params, edge=SAFE)
    assert bool(before.accepted)
    refused, state = update(grads[NEAR], before, params, edge=NEAR)
    assert_same(refused, jnp.zeros(2))
    assert_same((state.after, state.solver), (before.after, before.solver))
    assert (state.count, state.cost.gradients, state.rejected) == (2, 8, 1)
    assert not bool(state.accepted)
    assert int(state.reason) == Reason.NOT_FINITE
    assert "not finite" in Reason(int(state.reason)).message

    # The next good step is the one that would have come without the bad one.
    with_gap, state = update(grads[SAFE], state, params, edge=SAFE)
    without, _ = update(grads[SAFE], before, params, edge=SAFE)
    assert_same(with_gap, without)
    assert (state.count, state.rejected, bool(state.accepted), int(state.reason)) == (3, 1, True, Reason.ACCEPTED)
    assert np.all(first != 0)


def test_the_guard_can_be_switched_off(guarded):
    tx = guarded(skip_nonfinite=False)
    params = jnp.ones(2)
    updates, _ = tx.update(jax.grad(edge_loss)(params, NEAR), tx.init(params), params, edge=NEAR)
    assert np.all(np.isnan(updates))


def test_apply_if_finite_cannot_see_what_the_guard_sees():
    params = jnp.ones(2)
    grads = jax.grad(edge_loss)(params, NEAR)
    for skip, outcome in [(False, np.isnan), (True, lambda u: u == 0)]:
        tx = optax.apply_if_finite(rk_optax.rk4(edge_loss, 1.0, skip_nonfinite=skip), max_consecutive_errors=5)
        updates, _ = tx.update(grads, tx.init(params), params, edge=NEAR)
        assert np.all(outcome(updates))


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("after", [optax.clip(1.0), optax.zero_nans()], ids=["clip", "zero_nans"])
def test_a_later_stage_that_is_not_finite_is_seen_through_an_after_that_hides_it(bad, after):
    def gradient(params):  # 1 at params, not finite at later stages
        return jnp.where(params < 1, bad, 1.0)

    tx = rk_optax.rk4(None, 0.5, grad_fn=gradient, after=after)
    params = jnp.ones(2)
    updates, state = tx.update(gradient(params), tx.init(params), params)
    assert_same(updates, jnp.zeros(2))
    assert int(state.reason) == Reason.NOT_FINITE


@pytest.mark.covering
@pytest.mark.parametrize(("name", "weightless_stage"), [("dopri5", 2), ("dopri8", 3), ("heun3", 2)])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_later_stage_that_is_not_finite_is_seen_even_where_its_weight_is_zero(name, weightless_stage, bad):
    def gradient(params):  # bad at that stage alone; at the parameters that follow from it, finite again
        there = 1 - rk_optax.TABLEAUS[name].c[weightless_stage - 1]
        return jnp.where(jnp.abs(params - there) < 1e-5, bad, 1.0)

    tx = rk_optax.runge_kutta(None, 1.0, name, grad_fn=gradient)
    params = jnp.ones(2)
    updates, state = tx.update(gradient(params), tx.init(params), params)
    assert_same(updates, jnp.zeros(2))
    assert int(state.reason) == Reason.NOT_FINITE


@pytest.mark.parametrize("incoming", [np.nan, np.inf])
def test_an_incoming_gradient_that_is_not_finite_is_refused_even_where_its_weight_is_zero(incoming):
    tx = rk_optax.midpoint(lambda params: jnp.sum(params**2), 0.1)
    params = jnp.ones(2)
    updates, state = tx.update(jnp.array([incoming, 1.0]), tx.init(params), params)
    assert_same(updates, jnp.zeros(2))
    assert int(state.reason) == Reason.NOT_FINITE


def test_an_update_that_overflows_in_the_dtype_of_params_is_refused():
    tx = rk_optax.euler(lambda params: jnp.sum(params), 1000.0)
    params = jnp.ones(2, jnp.float16)
    updates, state = tx.update(jnp.full(2, 1000.0, jnp.float16), tx.init(params), params)
    assert_same(updates, jnp.zeros(2, jnp.float16))
    assert int(state.reason) == Reason.NOT_FINITE


def test_a_schedule_that_returns_nan_is_refused_and_the_next_step_is_taken():
    tx = rk_optax.rk4(lambda params: jnp.sum(params**2) / 2, lambda count: jnp.where(count == 0, jnp.nan, 1.0))
    params = jnp.ones(2)
    updates, state = tx.update(params, tx.init(params), params)
    assert_same(updates, jnp.zeros(2))
    assert int(state.reason) == Reason.BAD_STEP_SIZE
    updates, state = tx.update(params, state, params)
    np.testing.assert_allclose(updates, STAYS - 1, rtol=1e-6)


def test_a_step_size_that_is_not_finite_is_seen_even_where_the_direction_does_not_use_it():
    tx = rk_optax.scale_by_rk(lambda params: jnp.sum(params), lambda count: jnp.nan, "euler")
    params = jnp.ones(2)
    updates, state = tx.update(params, tx.init(params), params)
    assert_same(updates, jnp.zeros(2))
    assert int(state.reason) == Reason.BAD_STEP_SIZE


def test_a_gradient_that_is_not_finite_in_a_fixed_leaf_stops_nothing():
    tx = rk_optax.euler(lambda params: jnp.sum(params["w"]), 0.5, mask={"w": True, "fixed": False})
    params = {"w": jnp.ones(2), "fixed": jnp.ones(2)}
    updates, state = tx.update({"w": jnp.ones(2), "fixed": jnp.full(2, jnp.nan)}, tx.init(params), params)
    assert_same(updates, {"w": jnp.full(2, -0.5), "fixed": jnp.zeros(2)})
    assert bool(state.accepted)


class Failing(rk_optax.Solver):
    """Counts its steps in its state, and says that every second one failed."""

    def init(self, params):
        return jnp.zeros([], jnp.int32)

    def step(self, problem, params, k1, h, state, *, wants=frozenset()):
        odd = self.attempts % 2 == 1
        self.attempts += 1
        return Step(k1, Cost(gradients=1, products=5), solved=jnp.asarray(not odd), state=state + 1)

    attempts = 0


def test_a_step_that_its_solver_gave_up_restores_solver_and_momentum_but_not_the_cost():
    tx = rk_optax.runge_kutta(lambda params: jnp.sum(params), 0.1, Failing(), momentum=0.5)
    params = jnp.ones(2)
    updates, good = tx.update(jnp.ones(2), tx.init(params), params)
    np.testing.assert_allclose(updates, -0.1)
    updates, state = tx.update(jnp.ones(2), good, params)
    assert_same(updates, jnp.zeros(2))
    assert_same((state.solver, state.after), (good.solver, good.after))
    assert state.solver == 1
    assert state.cost == Cost(gradients=2, products=10)
    assert int(state.reason) == Reason.NOT_SOLVED
