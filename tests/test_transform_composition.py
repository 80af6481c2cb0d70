"""What one update is: composition, against steps by hand in NumPy, Optax and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import network, network_loss
from training import (
    PARAMS,
    H,
    X,
    assert_close,
    assert_same,
    first_update,
    loss_fn,
    make_step,
    numpy_update,
    train,
)

import rk_optax


# --- Other transformations around and inside -----------------------------------------------------------------------
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.partition({"rk": tx, "sgd": optax.sgd(0.1)}, {"w": "rk", "b": "sgd"}),
        lambda tx: optax.multi_transform({"rk": tx, "sgd": optax.sgd(0.1)}, {"w": "rk", "b": "sgd"}),
    ],
    ids=["masked", "partition", "multi_transform"],
)
@pytest.mark.parametrize("make", [rk_optax.rk4, rk_optax.scale_by_rk])
def test_wrappers_that_hide_leaves_are_refused_and_pointed_to_the_mask(wrap, make):
    with pytest.raises(ValueError, match=r"MaskedNode.*optax\.masked and optax\.partition.*mask="):
        wrap(make(loss_fn, 0.1)).init(PARAMS)


def test_masked_nodes_that_reach_update_alone_are_refused_too():
    tx = rk_optax.rk4(loss_fn, 0.1)
    hidden = {"w": jnp.ones(3), "b": optax.MaskedNode()}
    for updates, params in [(PARAMS, hidden), (hidden, PARAMS)]:
        with pytest.raises(ValueError, match=r"MaskedNode.*mask="):
            tx.update(updates, tx.init(PARAMS), params, x=X)


INJECTIONS = {
    "optax": functools.partial(optax.inject_hyperparams, static_args=("loss_fn",)),
    "rk_optax": rk_optax.inject_hyperparams,
}


@pytest.fixture(params=list(INJECTIONS))
def inject(request):
    return INJECTIONS[request.param]


def test_an_injected_rate_can_be_changed_in_state_without_a_retrace(inject):
    params, data = network()
    tx = inject(rk_optax.rk4)(network_loss, learning_rate=0.1, momentum=0.5)
    traces = []

    def step(params, state, data):
        traces.append(1)
        return make_step(tx, network_loss)(params, state, data)

    step = jax.jit(step)
    state = tx.init(params)
    rates, seen = [0.1, 0.02, 0.3], params
    for rate in rates:
        state.hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
        seen, state = step(seen, state, data)
        np.testing.assert_allclose(state.inner_state.step_size, rate, rtol=1e-6)
    scheduled = rk_optax.rk4(network_loss, lambda count: jnp.asarray(rates)[count], momentum=0.5)
    expected, _ = train(scheduled, network_loss, params, data, 3)
    assert_close(seen, expected, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_an_injected_momentum_can_be_changed_in_state(inject):
    tx = inject(rk_optax.rk4)(loss_fn, learning_rate=H, momentum=0.9)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    step = jax.jit(make_step(tx, loss_fn))
    _, state = step(params, tx.init(params), {"x": X})
    state.hyperparams["momentum"] = jnp.float32(0.0)
    without, _ = step(params, state, {"x": X})
    assert_close(jax.tree.map(jnp.subtract, without, params), numpy_update(PARAMS, X), rtol=1e-4, atol=1e-6)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("jit", [True, False])
def test_an_injected_warm_up_from_zero_works(inject, jit):
    params, data = network()
    schedule = optax.linear_schedule(0.0, 0.4, 4)
    tx = inject(rk_optax.heun)(network_loss, learning_rate=schedule)
    step = make_step(tx, network_loss)
    step = jax.jit(step) if jit else step
    state = tx.init(params)
    still, state = step(params, state, data)
    assert_same(still, params)
    trained = still
    for _ in range(3):
        trained, state = step(trained, state, data)
    expected, _ = train(rk_optax.heun(network_loss, schedule), network_loss, params, data, 4)
    assert_close(trained, expected, rtol=1e-5, atol=1e-6)


def test_the_shipped_injection_leaves_functions_alone_and_takes_further_static_args():
    tx = rk_optax.inject_hyperparams(rk_optax.rk4, static_args=("momentum",))(
        loss_fn,
        learning_rate=H,
        grad_fn=jax.grad(loss_fn),
        mask=lambda params: {"w": True, "b": False},
        momentum=0.9,
        stage_dtype=jnp.float32,
    )
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    updates, state = first_update(tx, loss_fn, params, x=X)
    assert set(state.hyperparams) == {"learning_rate"}
    assert_same(updates["b"], jnp.zeros(2))
    assert np.all(updates["w"] != 0)


def test_the_layout_of_the_state_is_the_public_one():
    state = rk_optax.rk4(loss_fn, 0.1, momentum=0.9).init(PARAMS)
    assert type(state) is rk_optax.RungeKuttaState
    assert state._fields == (
        *("count", "step_size", "time", "time_rounding", "cost", "accepted", "reason", "rejected"),
        *("solver", "after", "rule", "preconditioner"),
    )
    assert state.cost._fields == ("gradients", "losses", "products", "rows")
    assert (state.solver, state.rule, state.preconditioner) == ((), (), ())
    assert type(state.after) is optax.TraceState


def test_state_holds_no_name_that_inject_hyperparams_or_a_line_search_owns():
    fields = set(rk_optax.RungeKuttaState._fields)
    assert fields.isdisjoint({"learning_rate", "value", "grad", "hyperparams"})
    assert fields >= {"count", "step_size", "cost", "accepted", "reason"}


@pytest.mark.slow
def test_an_after_with_a_random_key_in_its_state_is_selected_like_any_other():
    tx = rk_optax.rk4(loss_fn, H, after=optax.add_noise(0.1, 0.5, key=jax.random.key(0)))
    updates, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, x=X)
    assert bool(state.accepted)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
