"""What a refused step leaves alone, under every rule that refuses steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import attempts

import rk_optax
from rk_optax import (
    LeastSquares,
    Reason,
    descent_control,
    error_control,
    trust_ratio_control,
)


def solvers():
    """Each rule with a solver that it goes with, and momentum where it may have it."""
    loss = LeastSquares(lambda theta, x: x * theta)
    return {
        "error": rk_optax.heun(loss, error_control(0.1, 0.1, initial_step_size=0.1), momentum=0.9),
        "descent": rk_optax.rkc(loss, descent_control(0.1), momentum=0.9, max_stages=20),
        "descent, fixed": rk_optax.rkc(loss, descent_control(0.1), momentum=0.9, stages=4),
        "trust ratio": rk_optax.residual_euler(loss, trust_ratio_control(0.1)),
    }


rules = pytest.mark.parametrize("name", ["error", "descent", "descent, fixed", "trust ratio"])


@functools.lru_cache
def compiled(name):
    """One of these solvers, and its update where stage 1 sees a batch of its own."""
    tx = solvers()[name]
    return tx, jax.jit(lambda theta, state, x, x1: tx.update(x1**2 * theta, state, theta, x=x))


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("first_stage", [True, False], ids=["stage 1 too", "later stages"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@rules
def test_what_is_not_finite_is_refused_and_leaves_all_but_the_step_size_bit_for_bit(name, poison, first_stage):
    """A stage 1 that is not finite says nothing about h; where a later one is not, h was too long."""
    (tx, step), theta = compiled(name), jnp.array([1.0, -2.0])
    good, bad = jnp.ones(2), jnp.array([1.0, poison])
    change, before = step(theta, tx.init(theta), good, good)
    assert bool(before.accepted)
    theta = theta + change
    stays, after = step(theta, before, bad, bad if first_stage else good)
    np.testing.assert_array_equal(stays, 0)
    assert not bool(after.accepted)
    assert int(after.rejected) == 1
    for kept in ("after", "preconditioner"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, kept), getattr(before, kept))
    if first_stage:
        jax.tree.map(np.testing.assert_array_equal, after.rule, before.rule)
        return
    assert 0 < float(after.rule.next_step_size) < float(before.rule.next_step_size)
    for _ in range(3):  # and it goes on as if nothing had been
        change, after = step(theta, after, good, good)
        theta = theta + change
    assert bool(after.accepted)
    assert np.isfinite(theta).all()


@pytest.mark.covering(most=2)
@rules
def test_repeated_refusals_end_at_the_smallest_step_and_say_so(name):
    """Against a gradient of the wrong sign no step helps; nothing loops inside an update."""

    def residual(theta, x):
        return 1.0 + x * theta

    bounds = {"initial_step_size": 1e-2, "min_step_size": 1e-3}
    loss = LeastSquares(residual)
    tx = {
        "error": rk_optax.heun(loss, error_control(0.0, 1e-12, **bounds)),
        "descent": rk_optax.rkc(loss, descent_control(**bounds), max_stages=20),
        "descent, fixed": rk_optax.rkc(loss, descent_control(**bounds), stages=3),
        "trust ratio": rk_optax.rosenbrock_euler(loss, trust_ratio_control(**bounds)),
    }[name]
    theta = jnp.array([1.0, 2.0])
    wrong = -jax.grad(loss)(theta, jnp.ones(2))
    tx_state, seen = tx.init(theta), []
    if "descent" in name:  # the stages' own gradients point downhill: only a wrong field is refused for ever
        tx = rk_optax.runge_kutta(
            loss, descent_control(**bounds), rk_optax.Stabilized("rkc1", 3), grad_fn=lambda theta, x: -theta - 1
        )
        tx_state = tx.init(theta)
    step = jax.jit(lambda state: tx.update(wrong, state, theta, x=jnp.ones(2)))
    for _ in range(5):
        _, tx_state = step(tx_state)
        seen.append((bool(tx_state.accepted), float(tx_state.step_size), int(tx_state.reason)))
    assert not any(accepted for accepted, *_ in seen)
    assert seen[-1][1] == pytest.approx(1e-3)
    # The wrong sign shows in a rise in proportion to h; an error estimate does not tell it from stiffness.
    assert seen[-1][2] == (Reason.SMALLEST_STEP if name == "error" else Reason.NOT_DOWNHILL)
    assert seen[0][2] in (Reason.LOSS_ROSE, Reason.ERROR_TOO_LARGE)


def test_the_candidate_that_is_judged_has_the_momentum_in_it():
    def loss(theta):
        return 0.5 * jnp.sum(theta**2)

    tx = rk_optax.euler(loss, descent_control(0.1), momentum=0.9)
    theta = jnp.ones(1)
    state = tx.init(theta)
    state = state._replace(after=optax.TraceState(jnp.full(1, -100.0)))  # 1 − 0.1·(1 − 90) = 9.9
    change, after = tx.update(theta, state, theta)
    assert int(after.reason) == Reason.LOSS_ROSE
    assert float(after.rule.fall) == pytest.approx(0.5 - 0.5 * 9.9**2, rel=1e-5)
    np.testing.assert_array_equal(after.after.trace, -100)
    np.testing.assert_array_equal(change, 0)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["descent", "trust ratio"])
def test_both_losses_are_those_of_the_steps_own_batch(name):
    """A batch of far greater loss than the last one is no rise of the loss."""
    loss = LeastSquares(lambda theta, x: x * theta)
    tx = (
        rk_optax.rkc(loss, max_stages=20) if name == "descent" else rk_optax.residual_euler(loss, trust_ratio_control())
    )
    theta = jnp.array([1.0, 1.0])
    state = tx.init(theta)
    for scale in (1e-2, 3.0, 1e-2):
        x = jnp.full(2, scale)
        change, state = tx.update(x**2 * theta, state, theta, x=x)
        assert bool(state.accepted)
        theta = theta + change


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    "rule",
    [
        error_control(1e-1, 1.0, initial_step_size=0.02, max_step_size=0.05, min_step_size=0.01),
        descent_control(0.02, max_step_size=0.05, min_step_size=0.01),
        trust_ratio_control(0.02, max_step_size=0.05, min_step_size=0.01),
    ],
    ids=["error", "descent", "trust ratio"],
)
def test_the_step_size_stays_between_its_bounds(rule):
    loss = LeastSquares(lambda theta: theta - 3.0)
    if isinstance(rule, type(trust_ratio_control())):
        tx = rk_optax.residual_euler(loss, rule)
    else:
        tx = rk_optax.heun(loss, rule)
    (sizes, accepted, _), _ = attempts(tx, loss, np.zeros(2, np.float32), 8)
    assert accepted.all()
    assert sizes.max() == pytest.approx(0.05)
    assert sizes.min() >= 0.01


# --- programs ---


@pytest.mark.covering
@pytest.mark.parametrize("double", [False, True], ids=["float32", "x64"])
@rules
def test_state_and_updates_keep_their_types_so_that_nothing_retraces(name, double, request):
    if double:
        request.getfixturevalue("x64")
    tx = solvers()[name]
    params = jax.ShapeDtypeStruct((2,), jnp.float32)

    def init_and_update(params):
        state = tx.init(params)
        return state, *tx.update(params, state, params, x=params)

    before, change, after = jax.eval_shape(init_and_update, params)
    assert (change.shape, change.dtype) == (params.shape, params.dtype)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, old.weak_type)
