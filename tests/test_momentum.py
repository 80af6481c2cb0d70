"""What stands between solver and step size, and the two decays of the weights: against chains of Optax's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import network, network_gradient, network_loss, poisoned_loss
from training import assert_close, assert_same, descent_gradient, first_update, trajectory, types

import rk_optax
from rk_optax import Reason, dal, sgd_g2

H = 0.3


def network64():
    return network(np.float64)


def compare(tx, chain, steps=8, loss=network_loss, rtol=1e-12):
    """Both walk the same path."""
    params, data = network64()
    ours, theirs = (trajectory(t, loss, params, data, steps) for t in (tx, chain))
    for (mine, _), (expected, _) in zip(ours, theirs, strict=True):
        assert_close(mine, expected, rtol=rtol, atol=1e-13)
    assert np.max(np.abs(ours[-1][0]["w1"] - params["w1"])) > 0.01
    return ours, theirs


RATES = {"constant": H, "scheduled": optax.cosine_decay_schedule(0.5, 10, 0.1)}
BETWEEN = {
    "momentum": ({"momentum": 0.9}, optax.trace(0.9)),
    "no momentum": ({"momentum": 0.0}, optax.trace(0.0)),
    "nesterov": ({"momentum": 0.8, "nesterov": True}, optax.trace(0.8, nesterov=True)),
    "adam": ({"after": optax.scale_by_adam()}, optax.scale_by_adam()),
    "chain": (
        {"after": optax.chain(optax.clip_by_global_norm(0.5), optax.trace(0.5))},
        optax.chain(optax.clip_by_global_norm(0.5), optax.trace(0.5)),
    ),
    "decay of one's own": ({"after": optax.add_decayed_weights(0.1)}, optax.add_decayed_weights(0.1)),
}


# --- Momentum and after ----------------------------------------------------------------------------------------------


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("between", "rate"), [*((name, "constant") for name in BETWEEN), ("momentum", "scheduled"), ("chain", "scheduled")]
)
def test_it_is_the_transformation_between_solver_and_step_size(between, rate, x64):
    keywords, transformation = BETWEEN[between]
    h = RATES[rate]
    tx = rk_optax.rk4(network_loss, h, **keywords)
    chain = optax.chain(rk_optax.scale_by_rk(network_loss, h, "rk4"), transformation, optax.scale_by_learning_rate(h))
    ours, theirs = compare(tx, chain)
    assert_close(ours[-1][1].after, theirs[-1][1][1], rtol=1e-12, atol=1e-13)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("rule", [dal(0.4), dal(0.4, estimate="free"), dal(0.4, 2.0, form="clipped"), sgd_g2(0.05)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_so_it_is_for_adaptive_rates(rule, nesterov, x64):
    """With the rates that a run chose, the chain written out walks the same path."""
    params, data = network64()
    solver = "euler" if isinstance(rule, rk_optax.SgdG2) else "rk4"
    tx = rk_optax.runge_kutta(network_loss, rule, solver, momentum=0.9, nesterov=nesterov)
    ours = trajectory(tx, network_loss, params, data, 8)
    rates = jnp.array([state.step_size for _, state in ours[1:]])
    assert np.ptp(rates) > 0.01 * np.max(rates)
    trace = optax.trace(0.9, nesterov=nesterov)

    def schedule(count):
        return rates[count]

    chain = optax.chain(
        rk_optax.scale_by_rk(network_loss, schedule, solver), trace, optax.scale_by_learning_rate(schedule)
    )
    for (mine, _), (expected, _) in zip(ours, trajectory(chain, network_loss, params, data, 8), strict=True):
        assert_close(mine, expected, rtol=1e-11, atol=1e-13)


def test_euler_with_momentum_is_optaxs_sgd(x64):
    for nesterov in (False, True):
        tx = rk_optax.euler(network_loss, H, momentum=0.9, nesterov=nesterov)
        compare(tx, optax.sgd(H, momentum=0.9, nesterov=nesterov), steps=12)


def test_momentum_is_the_papers_recursion(x64):
    """m ← βm + g*, θ ← θ − hm, g* of the textbook; the stages probe at h, not at h/(1 − β)."""
    target = np.array([0.1, 0.2, -0.4])

    def gradient(w):
        return (w - target) ** 3

    w, m = np.array([0.5, -0.3, 0.8]), np.zeros(3)
    tx = rk_optax.rk4(lambda w: jnp.sum((w - target) ** 4) / 4, H, momentum=0.7)
    for seen, _ in trajectory(tx, lambda w: jnp.sum((w - target) ** 4) / 4, w, {}, 6):
        np.testing.assert_allclose(seen, w, rtol=1e-12)
        k1 = gradient(w)
        k2 = gradient(w - H / 2 * k1)
        k3 = gradient(w - H / 2 * k2)
        k4 = gradient(w - H * k3)
        m = 0.7 * m + (k1 + 2 * k2 + 2 * k3 + k4) / 6
        w = w - H * m


def test_a_constant_slope_is_descended_at_h_over_one_minus_beta(x64):
    tx = rk_optax.rk4(lambda w: 2.0 * w, H, momentum=0.9)
    path = np.array([float(w) for w, _ in trajectory(tx, lambda w: 2.0 * w, 1.0, {}, 300)])
    np.testing.assert_allclose(np.diff(path)[[0, -1]], [-2 * H, -2 * H / (1 - 0.9)], rtol=1e-9)


@pytest.mark.slow
def test_after_sees_params_and_the_keywords_of_update(x64):
    def update(updates, state, params, *, gain, **_):
        return jax.tree.map(lambda u, p: gain * u + p, updates, params), state

    after = optax.GradientTransformationExtraArgs(lambda params: (), update)
    params, data = network64()
    tx = rk_optax.rk4(network_loss, H, after=after)
    gradient = network_gradient(params, **data)
    updates, _ = tx.update(gradient, tx.init(params), params, gain=3.0, **data)
    plain, _ = first_update(rk_optax.scale_by_rk(network_loss, H), network_loss, params, **data)
    assert_close(updates, jax.tree.map(lambda d, p: -H * (3 * d + p), plain, params))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("keywords", [{"momentum": 0.9}, {"after": optax.scale_by_adam()}], ids=["trace", "adam"])
def test_a_refused_step_does_not_coast_and_restores_the_momentum(keywords):
    params, data = network()
    tx = rk_optax.rk4(poisoned_loss, H, weight_decay=0.1, **keywords)
    gradient = network_gradient(params, **data)
    _, state = jax.jit(tx.update)(gradient, tx.init(params), params, **data)
    updates, refused = jax.jit(tx.update)(gradient, state, params, **data, poison=True)
    assert int(refused.reason) == Reason.NOT_FINITE
    assert_same(updates, jax.tree.map(jnp.zeros_like, params))
    assert_same(refused.after, state.after)
    assert_same(
        jax.jit(tx.update)(gradient, refused, params, **data)[0], jax.jit(tx.update)(gradient, state, params, **data)[0]
    )


# --- Decoupled weight decay ------------------------------------------------------------------------------------------


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("between", "rate"),
    [("none", "constant"), ("nesterov", "constant"), ("adam", "constant"), ("momentum", "scheduled")],
)
def test_weight_decay_stands_where_adamw_has_it(between, rate, x64):
    """After momentum, before the step size, outside the stages."""
    keywords, transformation = BETWEEN.get(between, ({}, optax.identity()))
    h = RATES[rate]
    tx = rk_optax.rk4(network_loss, h, weight_decay=0.2, **keywords)
    chain = optax.chain(
        rk_optax.scale_by_rk(network_loss, h, "rk4"),
        transformation,
        optax.add_decayed_weights(0.2),
        optax.scale_by_learning_rate(h),
    )
    compare(tx, chain)


def test_euler_after_adam_with_weight_decay_is_optaxs_adamw(x64):
    tx = rk_optax.euler(network_loss, 0.05, after=optax.scale_by_adam(), weight_decay=0.3)
    compare(tx, optax.adamw(0.05, weight_decay=0.3), steps=12)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("rule", [H, dal(H), dal(H, estimate="free")], ids=["constant", "dal", "free"])
def test_weight_decay_shrinks_by_h_times_itself_and_stays_out_of_the_field(rule, x64):
    params, data = network64()
    options = {"momentum": 0.9, "preconditioner": rk_optax.precondition_by_adagrad()}
    decayed, state = first_update(
        rk_optax.rk4(network_loss, rule, weight_decay=0.2, **options), network_loss, params, **data
    )
    plain, other = first_update(rk_optax.rk4(network_loss, rule, **options), network_loss, params, **data)
    h = float(other.step_size)
    assert float(state.step_size) == h
    assert_same(state.preconditioner, other.preconditioner)
    assert_close(decayed, jax.tree.map(lambda u, p: u - h * 0.2 * p, plain, params))


def test_no_weight_decay_adds_nothing_to_the_state_and_zero_changes_nothing(x64):
    params, data = network64()
    without, with_none, with_zero = (
        rk_optax.rk4(network_loss, H, momentum=0.9, **options)
        for options in ({}, {"weight_decay": None}, {"weight_decay": 0.0})
    )
    assert types(with_none.init(params)) == types(without.init(params))
    zero, none = (first_update(tx, network_loss, params, **data)[0] for tx in (with_zero, with_none))
    assert_same(zero, none)


# --- L2 in the field -------------------------------------------------------------------------------------------------


def penalised(params, x, y, l2=0.4):
    squares = sum(jnp.sum(jnp.abs(p) ** 2) for p in jax.tree.leaves(params))
    return network_loss(params, x, y) + l2 / 2 * squares


L2_OPTIONS = {
    "plain": {},
    "recomputed stage 1": {"reuse_updates": False},
    "momentum": {"momentum": 0.9},
    "preconditioned": {"preconditioner": rk_optax.precondition_by_adagrad()},
    "curvature": {"preconditioner": rk_optax.precondition_by_hutchinson(floor=1.0)},
    "clipped stages": {"preconditioner": rk_optax.precondition_by(optax.clip_by_global_norm(0.5))},
}


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("name", "solver"), [*((name, "rk4") for name in L2_OPTIONS), ("plain", "euler"), ("preconditioned", "dopri5")]
)
def test_l2_is_half_its_square_added_to_the_loss_at_every_stage(name, solver, x64):
    params, data = network64()
    options = L2_OPTIONS[name]
    inside = trajectory(rk_optax.runge_kutta(network_loss, H, solver, l2=0.4, **options), network_loss, params, data, 3)
    added = trajectory(rk_optax.runge_kutta(penalised, H, solver, **options), penalised, params, data, 3)
    for (mine, state), (expected, other) in zip(inside, added, strict=True):
        assert_close(mine, expected, rtol=1e-10, atol=1e-12)
        assert_same(state.cost, other.cost)
    assert np.max(np.abs(inside[-1][0]["w1"] - params["w1"])) > 0.01


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("rule", [dal(H), dal(H, estimate="difference"), dal(H, estimate="free"), sgd_g2(H)])
def test_learning_rate_rules_see_the_l2_term(rule, x64):
    params, data = network64()
    solver = "euler" if isinstance(rule, rk_optax.SgdG2) else "heun"
    inside = trajectory(rk_optax.runge_kutta(network_loss, rule, solver, l2=0.4), network_loss, params, data, 3)
    added = trajectory(rk_optax.runge_kutta(penalised, rule, solver), penalised, params, data, 3)
    for (_, state), (_, other) in zip(inside, added, strict=True):
        np.testing.assert_allclose(state.step_size, other.step_size, rtol=1e-6)


def test_l2_acts_on_the_moving_leaves_of_a_grad_fn_too(x64):
    params, data = network64()
    mask = {"w1": True, "b1": False, "w2": True}

    def penalised_part(params, x, y):
        return network_loss(params, x, y) + 0.2 * sum(jnp.sum(params[key] ** 2) for key in ("w1", "w2"))

    tx = rk_optax.rk4(None, H, grad_fn=jax.grad(network_loss), l2=0.4, mask=mask)
    updates, _ = first_update(tx, network_loss, params, **data)
    expected, _ = first_update(rk_optax.rk4(penalised_part, H, mask=mask), penalised_part, params, **data)
    assert_close(updates, expected)
    assert_same(updates["b1"], jnp.zeros(5))


def test_l2_of_complex_leaves_pulls_towards_zero(x64):
    params = jnp.array([0.5 + 0.2j, -0.4j])

    def loss(w):
        return jnp.sum(jnp.abs(w - (0.1 + 0.3j)) ** 4) / 4

    def both(w):
        return loss(w) + 0.2 * jnp.sum(jnp.abs(w) ** 2)

    updates, _ = first_update(rk_optax.rk4(loss, H, l2=0.4), loss, params)
    expected, _ = first_update(rk_optax.rk4(both, H), both, params)
    np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_l2_under_a_stage_batch_policy_is_in_every_stage_whole(x64):
    params, data = network64()
    options = {"stage_batches": "split", "batch_argnames": ["x", "y"]}
    first = rk_optax.first_stage_batch(data, 4, "split", ["x", "y"])
    inside = rk_optax.rk4(network_loss, H, l2=0.4, **options)
    added = rk_optax.rk4(penalised, H, **options)
    mine, _ = jax.jit(inside.update)(network_gradient(params, **first), inside.init(params), params, **data)
    expected, _ = jax.jit(added.update)(
        jax.jit(jax.grad(penalised))(params, **first), added.init(params), params, **data
    )
    assert_close(mine, expected)


@pytest.mark.slow
def test_the_two_decays_agree_for_gradient_descent_and_part_for_everything_else(x64):
    params, data = network64()

    def moved(make, steps=1, **options):
        return trajectory(make(network_loss, H, **options), network_loss, params, data, steps)[-1][0]["w1"]

    euler, rk4 = rk_optax.euler, rk_optax.rk4
    np.testing.assert_allclose(moved(euler, l2=0.4), moved(euler, weight_decay=0.4), rtol=1e-12)
    assert np.max(np.abs(moved(rk4, l2=0.4) - moved(rk4, weight_decay=0.4))) > 1e-4
    with_momentum = [moved(euler, 3, momentum=0.9, **{name: 0.4}) for name in ("l2", "weight_decay")]
    assert np.max(np.abs(with_momentum[0] - with_momentum[1])) > 1e-4


# --- Types, tracing and injection ------------------------------------------------------------------------------------


VALUES = {"a Python float": float, "a NumPy scalar": np.float64, "a JAX scalar": jnp.float32}


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("kind", VALUES)
def test_updates_and_states_keep_the_dtypes_of_params(dtype, kind, x64):
    number = VALUES[kind]
    params, data = network(dtype)
    tx = rk_optax.rk4(network_loss, H, momentum=number(0.9), weight_decay=number(0.1), l2=number(0.1))
    updates, state = first_update(tx, network_loss, params, **data)
    assert types(updates) == types(params)
    assert types(state) == types(tx.init(params))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["momentum", "weight_decay", "l2"])
def test_values_may_be_traced_and_injected_and_changed_in_state(name, x64):
    params, data = network64()
    gradient = network_gradient(params, **data)

    def of(value):
        tx = rk_optax.rk4(network_loss, H, **{name: value})
        state = tx.update(gradient, tx.init(params), params, **data)[1]
        return tx.update(gradient, state, params, **data)[0]

    expected = jax.jit(lambda: of(0.3))()
    assert_close(jax.jit(of)(0.3), expected)
    tx = rk_optax.inject_hyperparams(rk_optax.rk4)(network_loss, learning_rate=H, **{name: 0.9})
    state = tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(2):
        state.hyperparams[name] = jnp.asarray(0.3)
        updates, state = update(gradient, state, params, **data)
    assert_close(updates, expected)


def test_injection_may_leave_them_all_at_their_defaults(x64):
    params, data = network64()
    tx = rk_optax.inject_hyperparams(rk_optax.rk4)(network_loss, learning_rate=H)
    updates, state = first_update(tx, network_loss, params, **data)
    expected, _ = first_update(rk_optax.rk4(network_loss, H), network_loss, params, **data)
    assert_close(updates, expected)
    assert "learning_rate" in state.hyperparams


# --- Bad input -------------------------------------------------------------------------------------------------------

rk4 = functools.partial(rk_optax.rk4, network_loss, H)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1\.0"),
        ({"momentum": -0.1}, ValueError, r"momentum must be in \[0, 1\), got -0\.1"),
        ({"momentum": np.nan}, ValueError, r"momentum must be in \[0, 1\), got nan"),
        ({"momentum": True}, ValueError, r"momentum must be in \[0, 1\), got True"),
        ({"momentum": 0.9, "after": optax.identity()}, ValueError, r"two ways to say.*after=optax\.chain"),
        ({"nesterov": True}, ValueError, r"nesterov=True does nothing without momentum: pass momentum=0\.9"),
        ({"nesterov": True, "after": optax.trace(0.9)}, ValueError, "nesterov=True does nothing without momentum"),
        ({"after": 0.9}, TypeError, r"after must be an optax\.GradientTransformation, got float"),
        ({"after": optax.trace}, TypeError, r"after must be an optax\.GradientTransformation, got function"),
        ({"weight_decay": -0.1}, ValueError, r"weight_decay must be finite and not negative, got -0\.1"),
        ({"weight_decay": np.inf}, ValueError, "weight_decay must be finite and not negative, got inf"),
        ({"weight_decay": np.nan}, ValueError, "weight_decay must be finite and not negative, got nan"),
        ({"l2": -0.1}, ValueError, r"l2 must be finite and not negative, got -0\.1"),
        ({"l2": np.inf}, ValueError, "l2 must be finite and not negative, got inf"),
        ({"l2": np.nan}, ValueError, "l2 must be finite and not negative, got nan"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_with_a_remedy(options, error, message):
    with pytest.raises(error, match=message):
        rk4(**options)


@pytest.mark.parametrize("value", [np.float32(-1.0), np.array(-1.0), jnp.array(-1.0), "1", [0.1]], ids=repr)
@pytest.mark.parametrize("name", ["momentum", "weight_decay", "l2"])
def test_concrete_numbers_of_any_kind_are_checked_at_construction(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        rk4(**{name: value})


def test_scale_by_rk_has_no_place_for_what_comes_after_it():
    for option in ("momentum", "nesterov", "after", "weight_decay"):
        with pytest.raises(TypeError, match=option):
            rk_optax.scale_by_rk(network_loss, H, "rk4", **{option: None})


def test_scale_by_rk_takes_l2(x64):
    params, data = network64()
    direction, _ = first_update(rk_optax.scale_by_rk(network_loss, H, l2=0.4), network_loss, params, **data)
    updates, _ = first_update(rk_optax.rk4(penalised, H), penalised, params, **data)
    assert_close(jax.tree.map(lambda d: -H * d, direction), updates)
    assert descent_gradient(network_loss, params, **data).keys() == direction.keys()
