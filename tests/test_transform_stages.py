"""What one update is: stages, against steps by hand in NumPy, Optax and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import network, network_gradient, network_loss
from training import (
    PARAMS,
    H,
    X,
    assert_close,
    assert_same,
    dtypes,
    exact_flow,
    first_update,
    loss_fn,
    loss_gradient,
    numpy_rk4,
    numpy_update,
    observed_order,
    train,
)

import rk_optax
from rk_optax import Cost


# --- Stages --------------------------------------------------------------------------------------------------------
def test_an_update_is_the_step_of_the_textbook(x64):
    updates, _ = first_update(rk_optax.rk4(loss_fn, H), loss_fn, PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X))


def test_the_incoming_updates_serve_as_stage_one(x64):
    k1 = {"w": np.array([1.0, 2.0, -1.0]), "b": np.array([0.5, 3.0])}  # not the gradient: it must show
    tx = rk_optax.rk4(loss_fn, H)
    updates, _ = tx.update(k1, tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X, k1=k1))


def test_without_reuse_the_incoming_updates_do_not_matter(x64):
    nonsense = jax.tree.map(lambda p: np.full_like(p, 7.0), PARAMS)
    tx = rk_optax.rk4(loss_fn, H, reuse_updates=False)
    updates, _ = tx.update(nonsense, tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X))


@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_reusing_stage_one_changes_no_bit_when_both_sides_are_jitted(name):
    params, data = network()
    runs = [
        train(rk_optax.runge_kutta(network_loss, 0.1, name, reuse_updates=reuse), network_loss, params, data, 10)[0]
        for reuse in (True, False)
    ]
    assert_same(*runs)


@pytest.mark.slow
def test_reusing_stage_one_changes_only_rounding_in_eager_mode():
    params, data = network()
    jitted = train(rk_optax.rk4(network_loss, 0.1), network_loss, params, data, 2)[0]
    eager = train(rk_optax.rk4(network_loss, 0.1, reuse_updates=False), network_loss, params, data, 2, jit=False)[0]
    assert_close(eager, jitted, rtol=1e-5, atol=1e-6)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("solver", "gradients"),
    [("euler", 1), ("heun", 2), ("bogacki_shampine", 3), ("rk4", 4), ("dopri5", 6), ("tsit5", 6), ("dopri8", 13)],
)
@pytest.mark.parametrize("reuse", [True, False])
def test_a_step_evaluates_one_gradient_per_effective_stage_less_the_one_that_came_in(
    solver, gradients, reuse, evaluations
):
    tx = rk_optax.runge_kutta(evaluations.of(loss_fn), 0.1, solver, reuse_updates=reuse)
    _, state = jax.jit(tx.update)(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert evaluations.number == gradients - reuse
    assert state.cost == Cost(gradients=gradients, losses=0, products=0, rows=0)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("solver", "gradients"),
    [
        *(("dopri5", 7), ("bogacki_shampine", 4), ("tsit5", 7), ("heun", 2), ("fehlberg45", 6)),
        (rk_optax.Stabilized("rkc2", 5), 6),
    ],
    ids=str,
)
def test_a_step_that_error_control_measures_evaluates_what_the_table_of_costs_says(solver, gradients, evaluations):
    """docs/cost.md: where the error weighs the gradient at the end of the step, that is one more."""
    rule = rk_optax.error_control(0.1, 0.1, initial_step_size=0.1)
    tx = rk_optax.runge_kutta(evaluations.of(loss_fn), rule, solver)
    _, state = jax.jit(tx.update)(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert bool(state.accepted)
    assert evaluations.number == gradients - 1
    assert state.cost == Cost(gradients=gradients)


def test_an_eager_step_evaluates_as_many_gradients_as_a_jitted_one(evaluations):
    tx = rk_optax.rk4(evaluations.of(loss_fn), 0.1)
    tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert evaluations.number == 3


def test_the_cost_in_state_adds_up_over_updates():
    _, state = train(rk_optax.rk4(loss_fn, 0.1), loss_fn, PARAMS, {"x": X}, 5)
    assert state.cost == Cost(gradients=20)
    assert (state.count, state.rejected, bool(state.accepted)) == (5, 0, True)
    assert dtypes((state.count, state.cost)) == [jnp.int32] * 5


def test_init_never_evaluates_the_loss():
    def refuses(params):
        raise AssertionError("evaluated")

    state = rk_optax.rk4(refuses, 0.1, momentum=0.9).init(PARAMS)
    assert state.cost == Cost()


# --- One step, one field -------------------------------------------------------------------------------------------
def dropout_loss(params, x, y, rng):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    hidden = jnp.where(jax.random.bernoulli(rng, 0.5, hidden.shape), hidden / 0.5, 0.0)
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


@pytest.mark.slow
def test_rk4_keeps_its_order_through_a_dropout_network_with_one_key(x64):
    params, data = network(np.float64)
    data = {**data, "rng": jax.random.key(3)}
    exact = exact_flow(lambda p: jax.grad(dropout_loss)(p, **data), params, 2.0)
    slope = observed_order(
        lambda h: rk_optax.rk4(dropout_loss, h), dropout_loss, params, data, exact, 2.0, [10, 20, 40, 80]
    )
    assert 3.85 <= slope <= 4.6


def test_aux_of_the_loss_is_discarded_by_the_stages(x64):
    def with_aux(params, x):
        return loss_fn(params, x), {"mean": jnp.mean(params["w"])}

    tx = rk_optax.rk4(with_aux, H, has_aux=True)
    updates, _ = tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X))


# --- A gradient of the caller's own --------------------------------------------------------------------------------
def test_grad_fn_replaces_the_gradient_of_the_loss_at_later_stages(x64, evaluations):
    gradient = evaluations.of(jax.grad(loss_fn))
    tx = rk_optax.rk4(None, H, grad_fn=gradient)
    updates, state = tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X))
    assert evaluations.number == 3
    assert state.cost.gradients == 4


def test_grad_fn_wins_over_the_loss_even_where_they_disagree(x64):
    def doubled(params, x):
        return jax.tree.map(lambda g: 2 * g, jax.grad(loss_fn)(params, x))

    def twice(params):
        return jax.tree.map(lambda g: 2 * g, loss_gradient(params, X))

    tx = rk_optax.rk4(loss_fn, H, grad_fn=doubled)
    updates, _ = tx.update(twice(PARAMS), tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, jax.tree.map(lambda g: -H * g, numpy_rk4(twice, PARAMS, H)))


def test_grad_fn_of_one_update_wins_over_the_one_given_at_construction(x64):
    def wrong(params):
        return jax.tree.map(jnp.zeros_like, params)

    tx = rk_optax.rk4(loss_fn, H, grad_fn=wrong)

    @jax.jit
    def update(x):
        return tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss_fn), x=x)[0]

    assert_close(update(X), numpy_update(PARAMS, X))


def test_grad_fn_may_return_aux(x64):
    tx = rk_optax.rk4(None, H, grad_fn=lambda params, x: (jax.grad(loss_fn)(params, x), "aux"), has_aux=True)
    updates, _ = tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("per_update", [False, True])
def test_a_micro_batched_grad_fn_is_the_full_batch(x64, per_update):
    params, data = network(np.float64)

    def micro_batched(params, x, y):
        parts = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), (x, y))
        gradients = jax.lax.map(lambda part: network_gradient(params, *part), parts)
        return jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)

    grads = micro_batched(params, **data)
    tx = rk_optax.rk4(network_loss, 0.5, grad_fn=None if per_update else micro_batched)
    extra = {"grad_fn": micro_batched} if per_update else {}
    updates, _ = tx.update(grads, tx.init(params), params, **extra, **data)
    expected, _ = first_update(rk_optax.rk4(network_loss, 0.5), network_loss, params, **data)
    assert_close(updates, expected)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda p: {"w": p["w"]}, "tree structure of params"),
        (lambda p: {"w": p["w"][:2], "b": p["b"]}, r"params\['w'\] got \(2,\), expected \(3,\)"),
        (lambda p: (0.0, p), "tree structure of params"),
    ],
)
def test_a_grad_fn_whose_result_is_unlike_params_is_refused(result, message):
    tx = rk_optax.rk4(None, H, grad_fn=result)
    with pytest.raises(ValueError, match=f"result of grad_fn must have the .*{message}"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
