"""DAL: against its equations in NumPy, dense Hessians and limits; three ways to the same r, and the cap."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import network, network_gradient, network_loss
from jax.flatten_util import ravel_pytree
from training import assert_close, exact_ratio, first_update, numpy_dal, trajectory, types

import rk_optax
from rk_optax import dal

C = 0.4
ESTIMATES = ["product", "difference", "free"]


def seen_and_exact(tx, steps, dtype=np.float64, loss=network_loss):
    """The r that each of some steps saw, and the true one at its start."""
    params, data = network(dtype)
    visited = trajectory(tx, loss, params, data, steps)
    exact = []
    for theta, _ in visited[:-1]:
        widest = jax.tree.map(lambda a: jnp.asarray(a, float), (theta, data))
        exact.append(exact_ratio(loss, *widest))
    return np.array([float(state.rule.ratio) for _, state in visited[1:]]), np.array(exact)


# --- The formula -----------------------------------------------------------------------------------------------------


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("form", "power", "solver"),
    [
        ("rescaled", 1.0, "euler"),
        ("rescaled", 1.0, "rk4"),
        ("rescaled", 2, "dopri5"),
        ("clipped", 1.0, "rk4"),
        ("clipped", 0.5, "euler"),
    ],
)
def test_h_is_the_formula_of_the_true_curvature_and_the_step_is_the_solvers(form, power, solver, x64):
    params, data = network(np.float64)
    tx = rk_optax.runge_kutta(network_loss, dal(C, power, form=form), solver)

    @jax.jit
    def constant(h, theta):
        return first_update(rk_optax.runge_kutta(network_loss, h, solver), network_loss, theta, **data)[0]

    for (theta, _), (after, state) in itertools.pairwise(trajectory(tx, network_loss, params, data, 4)):
        r = exact_ratio(network_loss, theta, data)
        np.testing.assert_allclose(state.rule.ratio, r, rtol=1e-10)
        np.testing.assert_allclose(state.step_size, numpy_dal(C, r, power, form), rtol=1e-10)
        assert_close(after, optax.apply_updates(theta, constant(state.step_size, theta)), rtol=1e-12)


@pytest.mark.slow
def test_both_sides_of_the_clip_are_met(x64):
    def rate(c):
        tx = rk_optax.euler(lambda w: 2.0 * w**2, dal(c, form="clipped"))  # r = 4, 2/r = 0.5
        return float(first_update(tx, lambda w: 2.0 * w**2, 1.0)[1].step_size)

    assert [rate(0.3), rate(0.7)] == [0.3, 0.5]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("form", ["rescaled", "clipped"])
@pytest.mark.parametrize("power", [0.5, 1, 2.0])
def test_limits(form, power, x64):
    """No curvature: h = c. No cap: h = 2/r^p."""

    def quadratic(w, curvature):
        return jnp.sum(curvature * w**2) / 2 + jnp.sum(w)

    @jax.jit
    def rate(c, curvature):
        tx = rk_optax.heun(quadratic, dal(c, power, form=form))
        return first_update(tx, quadratic, np.ones(3), curvature=curvature)[1].step_size

    assert rate(0.7, 0.0) == 0.7
    np.testing.assert_allclose(rate(0.7, 1e-9), 0.7, rtol=1e-4)
    np.testing.assert_allclose(rate(1e14, 3.0), 2 / 3.0**power, rtol=1e-10)
    np.testing.assert_allclose(rate(0.7, 1e9), 2 / 1e9**power, rtol=1e-3)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("curvature", [0.3, 1.0, 20.0])
def test_r_is_lambda_on_a_quadratic(estimate, curvature, x64):
    def quadratic(w):
        return curvature * jnp.sum((w - 0.5) ** 2) / 2

    tx = rk_optax.rk4(quadratic, dal(0.01, estimate=estimate))
    for _, state in trajectory(tx, quadratic, np.array([1.0, -2.0, 3.0]), {}, 4)[1:]:
        np.testing.assert_allclose(state.rule.ratio, curvature, rtol=1e-6)


def test_r_weighs_the_curvatures_by_the_gradient(x64):
    curvature, w = np.array([1.0, 10.0, -4.0]), np.array([3.0, 0.1, 1.0])
    gradient = curvature * w
    tx = rk_optax.euler(lambda w: jnp.sum(curvature * w**2) / 2, dal(C))
    _, state = tx.update(jnp.asarray(gradient), tx.init(w), w)
    np.testing.assert_allclose(
        state.rule.ratio, np.linalg.norm(curvature * gradient) / np.linalg.norm(gradient), rtol=1e-12
    )


# --- Three ways to the same r ----------------------------------------------------------------------------------------


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("dtype", "product", "difference"), [(np.float64, 1e-10, 1e-6), (np.float32, 1e-4, 1e-2)])
def test_product_and_difference_find_the_true_r(dtype, product, difference, request):
    if dtype == np.float64:
        request.getfixturevalue("x64")
    for estimate, tolerance in (("product", product), ("difference", difference)):
        tx = rk_optax.rk4(network_loss, dal(C, estimate=estimate))
        seen, exact = seen_and_exact(tx, 10, dtype)
        np.testing.assert_allclose(seen, exact, rtol=tolerance)
        assert np.ptp(exact) > 0.1 * exact.max()  # it moves


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("solver", ["heun", "ssprk3", "rk4", "dopri5"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_free_estimate_is_within_ten_percent_at_small_h(solver, dtype, request):
    """Chained stages (heun, rk4) and stored ones; of the step it was read off, and used in the next."""
    if dtype == np.float64:
        request.getfixturevalue("x64")
    tx = rk_optax.runge_kutta(network_loss, dal(0.03, estimate="free"), solver)
    seen, exact = seen_and_exact(tx, 15, dtype)
    np.testing.assert_allclose(seen, exact, rtol=0.1)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_the_error_of_the_free_estimate_falls_with_h(solver, x64):
    errors = []
    for c in (0.04, 0.02, 0.01):
        tx = rk_optax.runge_kutta(network_loss, dal(c, estimate="free"), solver)
        seen, exact = seen_and_exact(tx, 2)
        errors.append(abs(seen[1] / exact[1] - 1))  # the first step is a hundredth of c
    slopes = np.diff(np.log(errors)) / np.log(0.5)
    assert np.all(slopes > 0.85)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("solver", ["heun", "rk4", "dopri5"])
def test_the_free_estimate_serves_the_next_step_and_the_first_is_a_hundredth_of_the_cap(solver, x64):
    params, data = network(np.float64)
    tx = rk_optax.runge_kutta(network_loss, dal(C, 2.0, estimate="free"), solver)
    visited = trajectory(tx, network_loss, params, data, 5)
    assert not bool(visited[0][1].rule.seen)
    np.testing.assert_allclose(visited[1][1].step_size, C / 100, rtol=1e-12)
    for (_, before), (_, state) in itertools.pairwise(visited[1:]):
        np.testing.assert_allclose(state.step_size, numpy_dal(C, float(before.rule.ratio), 2.0, "rescaled"), rtol=1e-12)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("solver", ["heun", "rk4", "dopri5"])
def test_the_free_estimate_is_the_change_from_the_first_stage_to_the_second(solver, x64):
    params, data = network(np.float64)
    tx = rk_optax.runge_kutta(network_loss, dal(C, estimate="free"), solver)
    gradient = network_gradient(params, **data)
    _, state = jax.jit(tx.update)(gradient, tx.init(params), params, **data)
    reach = rk_optax.TABLEAUS[solver].a[1, 0] * C / 100
    second = network_gradient(jax.tree.map(lambda p, g: p - reach * g, params, gradient), **data)
    first, second = (np.asarray(ravel_pytree(k)[0]) for k in (gradient, second))
    r = np.linalg.norm(first - second) / (reach * np.linalg.norm(first))
    np.testing.assert_allclose(state.rule.ratio, r, rtol=1e-9)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_float32_parameters_under_x64_are_differenced_in_their_own_precision(estimate, x64):
    tx = rk_optax.rk4(network_loss, dal(0.03, estimate=estimate))
    seen, exact = seen_and_exact(tx, 4, np.float32)
    np.testing.assert_allclose(seen, exact, rtol=0.1)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("recomputed", [True, False])
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_bfloat16_parameters_are_differenced_in_float32(estimate, recomputed):
    """A stage 1 that comes in is rounded to bfloat16: what is differenced with it must differ by more than that."""
    params, data = network(jnp.bfloat16)
    tx = rk_optax.rk4(network_loss, dal(0.3, estimate=estimate), reuse_updates=not recomputed)
    gradient, state, update = network_gradient(params, **data), tx.init(params), jax.jit(tx.update)
    for _ in range(2):  # the first free estimate is of a step that is a hundredth of the cap
        updates, state = update(gradient, state, params, **data)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), (params, data))
    np.testing.assert_allclose(state.rule.ratio, exact_ratio(network_loss, *wide), rtol=0.15)
    assert types(updates) == types(params)
    assert state.rule.ratio.dtype == state.step_size.dtype == jnp.float32


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("estimate", ["product", "difference"])
def test_stages_in_bfloat16_are_differenced_over_a_distance_that_bfloat16_sees(estimate):
    def quadratic(w):
        return 2.0 * w[0] ** 2 + 3.0 * w[1] ** 2

    w = jnp.array([3.0, 2.0], jnp.bfloat16)
    tx = rk_optax.rk4(quadratic, dal(0.03, estimate=estimate), stage_dtype=None)
    _, state = first_update(tx, quadratic, w)
    np.testing.assert_allclose(state.rule.ratio, exact_ratio(quadratic, w.astype(jnp.float32)), rtol=0.3)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_complex_leaves_count_as_pairs_of_reals(estimate, x64):
    def loss(w):
        return jnp.sum(jnp.real(w - 0.3) ** 4 + 2 * jnp.imag(w) ** 2 + jnp.real(w) * jnp.imag(w))

    params = jnp.array([0.5 + 0.2j, -0.4j])
    pairs = jnp.stack([params.real, params.imag])
    tx = rk_optax.rk4(loss, dal(1e-3, estimate=estimate))
    _, state = first_update(tx, loss, params)
    np.testing.assert_allclose(state.rule.ratio, exact_ratio(lambda p: loss(p[0] + 1j * p[1]), pairs), rtol=1e-3)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_r_is_of_the_moving_leaves_with_the_l2_term(estimate, x64):
    params, data = network(np.float64)
    tx = rk_optax.rk4(network_loss, dal(1e-4, estimate=estimate), l2=0.7, mask={"w1": True, "b1": False, "w2": True})
    _, state = first_update(tx, network_loss, params, **data)

    def whole(moving, x, y):
        return network_loss({**moving, "b1": params["b1"]}, x, y) + 0.35 * sum(jnp.sum(p**2) for p in moving.values())

    moving = {key: params[key] for key in ("w1", "w2")}
    np.testing.assert_allclose(state.rule.ratio, exact_ratio(whole, moving, data), rtol=1e-3)


@pytest.mark.parametrize("estimate", ["difference", "free"])
def test_a_bare_grad_fn_is_enough_for_differences(estimate, x64):
    params, data = network(np.float64)
    tx = rk_optax.rk4(None, dal(1e-3, estimate=estimate), grad_fn=jax.grad(network_loss))
    _, state = first_update(tx, network_loss, params, **data)
    np.testing.assert_allclose(state.rule.ratio, exact_ratio(network_loss, params, data), rtol=1e-2)


# --- With a preconditioner -------------------------------------------------------------------------------------------

SCALES = {
    "adagrad": (rk_optax.precondition_by_adagrad(), lambda g: (1 + g**2) ** -0.5),
    "adam": (rk_optax.precondition_by_adam(floor=0.5), lambda g: 1 / (np.abs(g) + 0.5)),
}


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("name", SCALES)
def test_r_is_of_the_preconditioned_field(name, estimate, x64):
    """r = ‖P∇²L P∇L‖/‖P∇L‖: P on g and on H; not ‖Hg‖/‖g‖ and not ‖PHg‖/‖Pg‖."""
    preconditioner, scale = SCALES[name]
    params, data = network(np.float64)
    tx = rk_optax.rk4(network_loss, dal(1e-3, estimate=estimate), preconditioner=preconditioner)
    _, state = first_update(tx, network_loss, params, **data)
    frozen = jax.tree.map(scale, network_gradient(params, **data))
    r = exact_ratio(network_loss, params, data, frozen)
    np.testing.assert_allclose(state.rule.ratio, r, rtol=1e-3)
    assert abs(exact_ratio(network_loss, params, data) / r - 1) > 0.05


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("adapted", [optax.clip_by_global_norm(0.1), optax.scale_by_rss(1.0)], ids=["clip", "rss"])
def test_r_is_of_the_field_that_an_adapted_transformation_makes(adapted, estimate, x64):
    """Such a field is not linear in ∇L: clipped, it turns but does not grow, and its Jacobian is no clipped product."""
    params, data = network(np.float64)
    tx = rk_optax.rk4(network_loss, dal(1e-3, estimate=estimate), preconditioner=rk_optax.precondition_by(adapted))
    _, state = first_update(tx, network_loss, params, **data)
    flat, unravel = ravel_pytree(params)

    def field(theta):
        gradient = network_gradient(unravel(theta), **data)
        return ravel_pytree(adapted.update(gradient, adapted.init(params), params)[0])[0]

    k1, jacobian = jax.jit(lambda theta: (field(theta), jax.jacobian(field)(theta)))(flat)
    r = np.linalg.norm(jacobian @ k1) / np.linalg.norm(k1)
    np.testing.assert_allclose(state.rule.ratio, r, rtol=1e-2)


# --- The cap ---------------------------------------------------------------------------------------------------------


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_the_cap_may_be_a_schedule(estimate, x64):
    params, data = network(np.float64)
    schedule = optax.exponential_decay(0.5, 1, 0.5)
    tx = rk_optax.rk4(network_loss, dal(schedule, estimate=estimate))
    visited = trajectory(tx, network_loss, params, data, 4)
    for i, ((_, before), (_, state)) in enumerate(itertools.pairwise(visited)):
        r = before.rule.ratio if estimate == "free" else state.rule.ratio
        expected = 0.5 / 100 if estimate == "free" and i == 0 else numpy_dal(0.5 / 2**i, float(r), 1, "rescaled")
        np.testing.assert_allclose(state.step_size, expected, rtol=1e-10)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("transform", ["jit", "vmap"])
def test_the_cap_may_be_traced(transform, x64):
    params, data = network(np.float64)

    def rate(c):
        return first_update(rk_optax.rk4(network_loss, dal(c)), network_loss, params, **data)[1].step_size

    caps = np.array([0.1, 0.5, 3.0])
    compiled = jax.jit(rate)
    traced = jax.vmap(rate)(caps) if transform == "vmap" else np.array([compiled(c) for c in caps])
    r = exact_ratio(network_loss, params, data)
    np.testing.assert_allclose(traced, [numpy_dal(c, r, 1, "rescaled") for c in caps], rtol=1e-10)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("cap", [jnp.float32(C), np.float32(C), np.array(C, np.float32), 1], ids=repr)
def test_the_cap_may_be_any_number_and_promotes_nothing(cap):
    params, data = network()
    updates, state = first_update(rk_optax.rk4(network_loss, dal(cap)), network_loss, params, **data)
    assert types(updates) == types(params)
    r = exact_ratio(network_loss, params, data)
    np.testing.assert_allclose(state.step_size, numpy_dal(float(cap), r, 1, "rescaled"), rtol=1e-4)


def test_the_cap_can_be_injected_and_changed_without_a_retrace(x64):
    params, data = network(np.float64)
    traces = []

    def make(cap):
        traces.append(1)
        return rk_optax.rk4(network_loss, dal(cap))

    tx = optax.inject_hyperparams(make)(cap=0.1)
    state = tx.init(params)
    update = jax.jit(tx.update)
    gradient = network_gradient(params, **data)
    r = exact_ratio(network_loss, params, data)
    for cap in (0.1, 2.0, 0.5):
        state.hyperparams["cap"] = jnp.asarray(cap)
        _, state = update(gradient, state, params, **data)
        np.testing.assert_allclose(state.inner_state.step_size, numpy_dal(cap, r, 1, "rescaled"), rtol=1e-9)
        seen = len(traces)
    assert seen == len(traces) <= 3


# --- Data of several stages ------------------------------------------------------------------------------------------


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("policy", ["split", "fresh"])
@pytest.mark.parametrize("estimate", ["product", "difference"])
def test_r_is_of_the_first_stages_data(policy, estimate, x64):
    params, data = network(np.float64)
    data = jax.tree.map(lambda a: a.reshape(4, 2, -1) if policy == "fresh" else a, data)
    first = rk_optax.first_stage_batch(data, 4, policy, ["x", "y"])
    tx = rk_optax.rk4(network_loss, dal(C, estimate=estimate), stage_batches=policy, batch_argnames=["x", "y"])
    _, state = jax.jit(tx.update)(network_gradient(params, **first), tx.init(params), params, **data)
    np.testing.assert_allclose(state.rule.ratio, exact_ratio(network_loss, params, first), rtol=1e-5)


@pytest.mark.parametrize("policy", ["split", "fresh"])
def test_the_free_estimate_is_refused_where_the_stages_see_different_data(policy):
    """Two stages on two batches differ by their noise, whatever h is: noise over h is no curvature."""
    with pytest.raises(ValueError, match=r"free.*stage_batches|stage_batches.*free"):
        rk_optax.rk4(network_loss, dal(C, estimate="free"), stage_batches=policy, batch_argnames=["x", "y"])
