"""DAL and SGD-G2: against their equations in NumPy, dense Hessians, limits and exact quadratics."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import network, network_loss
from jax.flatten_util import ravel_pytree
from training import Evaluations, assert_close, assert_same, first_update, trajectory, types

import rk_optax
from rk_optax import Cost, Reason, dal, sgd_g2

pytestmark = pytest.mark.latest

C = 0.4
ESTIMATES = ["product", "difference", "free"]


def numpy_dal(c, r, p, form):
    """The rate from the curvature, as the two papers print it."""
    return min(2 / r**p, c) if form == "clipped" else c / (1 + c / 2 * r**p)


@functools.lru_cache
def dense(loss):
    """The gradient and the whole Hessian over flattened parameters, of `(params, data)`."""

    def both(params, data):
        flat, unravel = ravel_pytree(params)

        def flat_loss(theta):
            return loss(unravel(theta), **data)

        return jax.grad(flat_loss)(flat), jax.hessian(flat_loss)(flat)

    return jax.jit(both)


def exact_ratio(loss, params, data=None, scale=None):
    """‖PHPg‖/‖Pg‖ by a dense Hessian."""
    gradient, hessian = (np.asarray(a) for a in dense(loss)(params, data or {}))
    p = 1.0 if scale is None else np.asarray(ravel_pytree(scale)[0])
    field = p * gradient
    return np.linalg.norm(p * (hessian @ field)) / np.linalg.norm(field)


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

    def rate(c, curvature):
        tx = rk_optax.heun(quadratic, dal(c, power, form=form))
        return float(first_update(tx, quadratic, np.ones(3), curvature=curvature)[1].step_size)

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
    gradient = jax.grad(network_loss)(params, **data)
    _, state = tx.update(gradient, tx.init(params), params, **data)
    reach = rk_optax.TABLEAUS[solver].a[1, 0] * C / 100
    second = jax.grad(network_loss)(jax.tree.map(lambda p, g: p - reach * g, params, gradient), **data)
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
    gradient, state, update = jax.grad(network_loss)(params, **data), tx.init(params), jax.jit(tx.update)
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
    frozen = jax.tree.map(scale, jax.grad(network_loss)(params, **data))
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
        gradient = jax.grad(network_loss)(unravel(theta), **data)
        return ravel_pytree(adapted.update(gradient, adapted.init(params), params)[0])[0]

    k1 = field(flat)
    r = np.linalg.norm(jax.jacobian(field)(flat) @ k1) / np.linalg.norm(k1)
    np.testing.assert_allclose(state.rule.ratio, r, rtol=1e-2)


# --- Cost ------------------------------------------------------------------------------------------------------------

RULES = {
    "constant": (0.1, 0, 0),
    "product": (dal(C), 0, 1),
    "difference": (dal(C, estimate="difference"), 1, 0),
    "free": (dal(C, estimate="free"), 0, 0),
    "sgd_g2": (sgd_g2(), 1, 0),
}


COUNTED = [
    *((rule, "euler", True) for rule in ("product", "difference", "sgd_g2")),
    *((rule, solver, True) for rule in ("constant", "product", "difference", "free") for solver in ("rk4", "dopri5")),
    ("free", "bogacki_shampine", True),
    *((rule, "heun", False) for rule in ("product", "difference", "free")),
    ("sgd_g2", "euler", False),
]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("rule", "solver", "jit"), COUNTED)
def test_what_is_charged_is_what_is_evaluated(rule, solver, jit):
    rate, gradients, products = RULES[rule]
    counted = Evaluations(network_loss)
    params, data = network()
    tx = rk_optax.runge_kutta(counted.function, rate, solver)
    update = jax.jit(tx.update) if jit else tx.update
    gradient, state = jax.grad(network_loss)(params, **data), tx.init(params)
    for _ in range(2):
        before = state.cost
        _, state = update(gradient, state, params, **data)
        spent = Cost(*(int(now - then) for now, then in zip(state.cost, before, strict=True)))
        assert spent == Cost(rk_optax.TABLEAUS[solver].effective_stages + gradients, 0, products, 0)
        assert counted.take() == spent.gradients + spent.products - 1  # the incoming gradient is the caller's


@pytest.mark.parametrize("estimate", ["product", "difference"])
def test_every_k_makes_no_estimate_between(estimate):
    counted = Evaluations(network_loss)
    params, data = network()
    tx = rk_optax.euler(counted.function, dal(C, estimate=estimate, every=3))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(network_loss)(params, **data), state, params, **data)
        return optax.apply_updates(params, updates), state

    state, evaluated, charged, ratios, rates = tx.init(params), [], [], [], []
    for _ in range(8):
        before = state.cost
        params, state = step(params, state)
        evaluated.append(counted.take())
        charged.append(int(sum(now - then for now, then in zip(state.cost, before, strict=True))) - 1)
        ratios.append(float(state.rule.ratio))
        rates.append(float(state.step_size))
    assert evaluated == charged == [1, 0, 0, 1, 0, 0, 1, 0]
    assert ratios[0] == ratios[1] == ratios[2] != ratios[3] == ratios[4] == ratios[5] != ratios[6] == ratios[7]
    np.testing.assert_allclose(rates, [numpy_dal(C, r, 1, "rescaled") for r in ratios], rtol=1e-5)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("rule", RULES)
def test_an_update_traces_the_loss_once_whatever_the_number_of_steps(rule):
    traces = []

    def loss(params, x, y):
        traces.append(1)
        return network_loss(params, x, y)

    params, data = network()
    tx = rk_optax.runge_kutta(loss, RULES[rule][0], "euler" if rule == "sgd_g2" else "rk4")
    update = jax.jit(tx.update)
    state, seen = tx.init(params), []
    for i in range(4):
        _, state = update(params, state, params, x=data["x"] + i, y=data["y"])
        seen.append(len(traces))
    assert len(set(seen)) == 1
    assert seen[0] <= 4


# --- Zero, nothing and NaN -------------------------------------------------------------------------------------------


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("form", ["rescaled", "clipped"])
def test_a_gradient_of_zero_is_a_step_that_stays(estimate, form):
    tx = rk_optax.rk4(lambda w: jnp.sum(w**4), dal(C, form=form, estimate=estimate))
    w = jnp.zeros(3)
    state = tx.init(w)
    for i in range(3):
        updates, state = tx.update(w, state, w)
        assert_same(updates, jnp.zeros(3))
        assert bool(state.accepted)
        assert float(state.step_size) == pytest.approx(C / 100 if estimate == "free" else C)
        assert float(state.rule.ratio) == 0.0, i
        assert bool(state.rule.seen) == (estimate != "free"), i  # a free one has still seen nothing


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_a_rate_of_zero_is_a_step_that_stays_and_the_next_one_moves(estimate):
    params, data = network()
    schedule = optax.linear_schedule(0.0, 0.2, 2)
    tx = rk_optax.rk4(network_loss, dal(schedule, estimate=estimate), momentum=0.9)
    visited = trajectory(tx, network_loss, params, data, 4)
    assert_same(visited[1][0], params)
    assert all(bool(state.accepted) for _, state in visited)
    assert float(visited[1][1].step_size) == 0.0
    losses = [float(network_loss(theta, **data)) for theta, _ in visited[1:]]
    assert losses[-1] < losses[0]
    rates = [float(state.step_size) for _, state in visited[2:]]
    ratios = [float(state.rule.ratio) for _, state in visited[1:]]
    if estimate == "free":
        expected = [0.001, *(numpy_dal(0.2, r, 1, "rescaled") for r in ratios[1:-1])]
    else:
        expected = [numpy_dal(c, r, 1, "rescaled") for c, r in zip((0.1, 0.2, 0.2), ratios[1:], strict=True)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


def poisoned_loss(params, x, y, poison=False):
    return jnp.where(poison, jnp.nan, 1.0) * network_loss(params, x, y)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("when", [0, 2])
def test_a_step_that_is_not_finite_leaves_the_last_r_and_keeps_nothing_else(estimate, when):
    params, data = network()
    tx = rk_optax.rk4(poisoned_loss, dal(C, estimate=estimate), momentum=0.9)
    gradient, state = jax.grad(network_loss)(params, **data), tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(when):
        _, state = update(gradient, state, params, **data, poison=False)
    updates, refused = update(gradient, state, params, **data, poison=True)
    assert_same(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(refused.reason) == Reason.NOT_FINITE
    assert_same((refused.rule, refused.after), (state.rule, state.after))
    assert int(refused.count) == int(refused.rejected) + when == when + 1
    cost = Cost(4, 0, 1, 0) if estimate == "product" else Cost(4 + (estimate == "difference"), 0, 0, 0)
    assert [int(now - then) for now, then in zip(refused.cost, state.cost, strict=True)] == list(cost)
    # The next good step sees the curvature again.
    updates, state = update(gradient, refused, params, **data, poison=False)
    assert bool(state.accepted)
    np.testing.assert_allclose(state.rule.ratio, exact_ratio(network_loss, params, data), rtol=0.1)


def test_the_free_estimate_of_a_step_refused_for_another_reason_is_kept(x64):
    """The last stage left the domain; the first two did not, and saw the curvature."""

    def loss(w):
        return jnp.where(w < 0.9985, jnp.nan, 1.0) * w**2

    tx = rk_optax.rk4(loss, dal(0.1, estimate="free"))
    w = jnp.array(1.0)
    _, state = tx.update(2 * w, tx.init(w), w)
    assert int(state.reason) == Reason.NOT_FINITE
    np.testing.assert_allclose(state.rule.ratio, 2.0, rtol=1e-9)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("incoming", [np.nan, np.inf])
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_an_incoming_gradient_that_is_not_finite_poisons_no_state(incoming, estimate):
    tx = rk_optax.rk4(lambda w: jnp.sum(w**2), dal(C, estimate=estimate))
    w = jnp.ones(2)
    _, state = tx.update(2 * w, tx.init(w), w)
    updates, refused = tx.update(jnp.array([incoming, 1.0]), state, w)
    assert_same(updates, jnp.zeros(2))
    assert_same(refused.rule, state.rule)
    assert np.isfinite(refused.rule.ratio)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_an_empty_tree_works(estimate):
    tx = rk_optax.rk4(lambda params: jnp.zeros([]), dal(C, estimate=estimate))
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert bool(state.accepted)
    assert np.isfinite(state.step_size)


# --- SGD-G2 ----------------------------------------------------------------------------------------------------------


def numpy_g2(gradient, theta, h, beta, steps):
    """SGD-G2 as its equations stand: the path, the rates, and which branch each step took."""
    path, rates, branches = [theta], [], []
    for _ in range(steps):
        g = gradient(theta)
        change = g - gradient(theta - h * g)
        inner = np.vdot(change, g)
        optimal = 2 * h * inner / np.vdot(change, change) if inner > 0 else h
        branches.append("kept" if inner <= 0 else "grown" if optimal >= h else "shrunk")
        h = beta * h + (1 - beta) * optimal if optimal >= h else (1 - beta) * optimal
        theta = theta - h * g
        path.append(theta)
        rates.append(h)
    return path, rates, branches


def wavy_loss(w):
    return jnp.sum(1 - jnp.cos(w)) + 0.05 * jnp.sum(w) ** 2


def wavy_gradient(w):
    return np.sin(w) + 0.1 * np.sum(w)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("start", "initial", "beta", "branches"),
    [
        ([2.0, -1.0, 0.5], 0.05, 0.9, {"grown"}),
        ([1.3, -1.0, 0.5], 6.0, 0.6, {"grown", "shrunk"}),
        ([2.9, 2.8, 3.0], 0.3, 0.5, {"grown", "shrunk", "kept"}),
        ([1.3, -1.0, 0.5], 0.5, 0.0, {"grown", "shrunk"}),
    ],
)
def test_sgd_g2_is_its_equations(start, initial, beta, branches, x64):
    path, rates, taken = numpy_g2(wavy_gradient, np.array(start), initial, beta, 20)
    assert set(taken) == branches
    tx = rk_optax.euler(wavy_loss, sgd_g2(initial, beta))
    visited = trajectory(tx, wavy_loss, np.array(start), {}, 20)
    for (theta, state), expected, rate in zip(visited[1:], path[1:], rates, strict=True):
        np.testing.assert_allclose(theta, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(state.step_size, rate, rtol=1e-9)
        np.testing.assert_allclose(state.rule.last_step_size, rate, rtol=1e-9)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("curvature", [0.1, 1.0, 30.0])
def test_the_optimal_rate_on_a_quadratic_of_one_dimension_is_the_stability_limit(curvature, x64):
    tx = rk_optax.euler(lambda w: curvature * w**2 / 2, sgd_g2(1e-3))
    for _, state in trajectory(tx, lambda w: curvature * w**2 / 2, 1.0, {}, 5)[1:]:
        np.testing.assert_allclose(state.rule.optimal, 2 / curvature, rtol=1e-9)


def test_sgd_g2_takes_both_gradients_of_the_preconditioned_field(x64):
    start, h, beta = np.array([2.0, -1.0, 0.5]), 0.3, 0.8
    tx = rk_optax.euler(wavy_loss, sgd_g2(h, beta), preconditioner=rk_optax.precondition_by_adagrad())
    theta, total = start, np.zeros(3)
    for seen, state in trajectory(tx, wavy_loss, start, {}, 6)[1:]:
        total = total + wavy_gradient(theta) ** 2
        scale = (1 + total) ** -0.5
        path, rates, _ = numpy_g2(lambda w, scale=scale: scale * wavy_gradient(w), theta, h, beta, 1)
        theta, h = path[1], rates[0]
        np.testing.assert_allclose(seen, theta, rtol=1e-10)
        np.testing.assert_allclose(state.step_size, h, rtol=1e-10)


@pytest.mark.parametrize("w", [0.0, 1.0])
def test_sgd_g2_keeps_its_rate_where_there_is_no_gradient_or_no_curvature(w):
    loss = {0.0: lambda w: w**2, 1.0: lambda w: w}[w]
    tx = rk_optax.euler(loss, sgd_g2(0.1))
    updates, state = first_update(tx, loss, np.float32(w))
    assert bool(state.accepted)
    assert np.isfinite(updates)
    np.testing.assert_allclose([state.step_size, state.rule.last_step_size], 0.1, rtol=1e-6)


def test_a_refused_step_leaves_sgd_g2s_rate(x64):
    params, data = network(np.float64)
    tx = rk_optax.euler(poisoned_loss, sgd_g2(0.1))
    gradient = jax.grad(network_loss)(params, **data)
    _, state = tx.update(gradient, tx.init(params), params, **data)
    for how in ({"poison": True}, {}):
        nan = jax.tree.map(lambda g, how=how: g if how else g * jnp.nan, gradient)
        updates, refused = tx.update(nan, state, params, **data, **how)
        np.testing.assert_allclose(refused.rule.last_step_size, state.rule.last_step_size, rtol=1e-12)
        if not how:
            assert int(refused.reason) == Reason.NOT_FINITE
            assert_same(updates, jax.tree.map(jnp.zeros_like, params))


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
    gradient = jax.grad(network_loss)(params, **data)
    r = exact_ratio(network_loss, params, data)
    for cap in (0.1, 2.0, 0.5):
        state.hyperparams["cap"] = jnp.asarray(cap)
        _, state = update(gradient, state, params, **data)
        np.testing.assert_allclose(state.inner_state.step_size, numpy_dal(cap, r, 1, "rescaled"), rtol=1e-9)
        seen = len(traces)
    assert seen == len(traces) <= 3


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("rule", [r for r in RULES if r != "constant"])
def test_state_has_fixed_types_and_can_be_donated(rule):
    params, data = network()
    tx = rk_optax.runge_kutta(network_loss, RULES[rule][0], "euler" if rule == "sgd_g2" else "rk4", momentum=0.9)
    *_, (expected, last) = trajectory(tx, network_loss, params, data, 3)
    assert types(last) == types(tx.init(params))
    assert types(tx.init(jax.eval_shape(lambda: params))) == types(tx.init(params))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(jax.grad(network_loss)(params, **data), state, params, **data)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert_close(params, expected, rtol=1e-5, atol=1e-6)


def test_the_rates_names_in_state_are_not_those_of_injected_hyperparameters():
    fields = {*rk_optax.dal(1.0).init(None)._fields, *rk_optax.sgd_g2().init(None)._fields}
    assert not fields & {"learning_rate", "initial_learning_rate", "max_learning_rate", "decay", "power", "step_size"}


# --- Data of several stages ------------------------------------------------------------------------------------------


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("policy", ["split", "fresh"])
@pytest.mark.parametrize("estimate", ["product", "difference"])
def test_r_is_of_the_first_stages_data(policy, estimate, x64):
    params, data = network(np.float64)
    data = jax.tree.map(lambda a: a.reshape(4, 2, -1) if policy == "fresh" else a, data)
    first = rk_optax.first_stage_batch(data, 4, policy, ["x", "y"])
    tx = rk_optax.rk4(network_loss, dal(C, estimate=estimate), stage_batches=policy, batch_argnames=["x", "y"])
    _, state = tx.update(jax.grad(network_loss)(params, **first), tx.init(params), params, **data)
    np.testing.assert_allclose(state.rule.ratio, exact_ratio(network_loss, params, first), rtol=1e-5)


@pytest.mark.parametrize("policy", ["split", "fresh"])
def test_the_free_estimate_is_refused_where_the_stages_see_different_data(policy):
    """Two stages on two batches differ by their noise, whatever h is: noise over h is no curvature."""
    with pytest.raises(ValueError, match=r"free.*stage_batches|stage_batches.*free"):
        rk_optax.rk4(network_loss, dal(C, estimate="free"), stage_batches=policy, batch_argnames=["x", "y"])


# --- Refusals --------------------------------------------------------------------------------------------------------


class OneStage(rk_optax.Solver):
    """A solver of one's own, without a second stage."""

    def step(self, problem, params, k1, h, state, *, wants=frozenset()):
        return rk_optax.Step(k1, Cost(gradients=1), state=state)


@pytest.mark.parametrize("solver", ["euler", OneStage()], ids=["euler", "own"])
def test_the_free_estimate_needs_a_second_stage(solver):
    with pytest.raises(ValueError, match=r"first two stages.*does not offer.*'product' or 'difference'.*'heun'"):
        rk_optax.runge_kutta(network_loss, dal(C, estimate="free"), solver)


def test_the_free_estimate_needs_a_second_stage_that_is_not_the_first_again():
    """a21 = 0 puts the second stage where the first one was: there is no curvature to see."""
    again = rk_optax.ButcherTableau("again", [[0, 0, 0], [0, 0, 0], [0, 1, 0]], [0.25, 0.25, 0.5], [0, 0, 1], order=2)
    with pytest.raises(ValueError, match="free"):
        rk_optax.runge_kutta(network_loss, dal(C, estimate="free"), again)


@pytest.mark.parametrize("solver", [*sorted(set(rk_optax.TABLEAUS) - {"euler"}), OneStage()])
def test_sgd_g2_is_for_eulers_method(solver):
    with pytest.raises(ValueError, match=r"gradient-descent step.*rk_optax\.euler, or dal\(\)"):
        rk_optax.runge_kutta(network_loss, sgd_g2(), solver)


@pytest.mark.parametrize("rule", [dal(C), dal(C, estimate="free"), sgd_g2()], ids=["dal", "free", "sgd_g2"])
def test_scale_by_rk_refuses_a_rate_that_could_not_reach_the_caller(rule):
    with pytest.raises(ValueError, match=r"adaptive one cannot reach you.*runge_kutta"):
        rk_optax.scale_by_rk(network_loss, rule, "euler")


def test_a_hessian_vector_product_needs_the_loss_and_says_so_at_construction():
    with pytest.raises(ValueError, match=r"learning rate.*needs a 'product': pass loss_fn"):
        rk_optax.rk4(None, dal(C), grad_fn=jax.grad(network_loss))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dal(0.0), ValueError, r"max_learning_rate must be finite and positive, got 0\.0"),
        (lambda: dal(-1), ValueError, r"max_learning_rate must be finite and positive, got -1"),
        (lambda: dal(np.nan), ValueError, "max_learning_rate must be finite and positive, got nan"),
        (lambda: dal(np.inf), ValueError, "max_learning_rate must be finite and positive, got inf"),
        (lambda: dal(jnp.array(-1.0)), ValueError, "max_learning_rate must be finite and positive"),
        (lambda: dal("1"), TypeError, "max_learning_rate must be a positive number.*'1'"),
        (lambda: dal(None), TypeError, "max_learning_rate must be a positive number.*None"),
        (lambda: dal(jnp.ones(2)), ValueError, r"max_learning_rate must be a real scalar.*\(2,\)"),
        (lambda: dal(1.0, 0.0), ValueError, r"power must be positive and finite, got 0\.0"),
        (lambda: dal(1.0, -1), ValueError, "power must be positive and finite, got -1"),
        (lambda: dal(1.0, np.nan), ValueError, "power must be positive and finite, got nan"),
        (lambda: dal(1.0, np.float32(-1)), ValueError, "power must be positive and finite"),
        (lambda: dal(1.0, jnp.array(-1.0)), ValueError, "power must be positive and finite"),
        (lambda: dal(1.0, "2"), (TypeError, ValueError), "power must be"),
        (lambda: dal(1.0, form="scaled"), ValueError, "form must be 'rescaled' or 'clipped', got 'scaled'"),
        (lambda: dal(1.0, estimate="hvp"), ValueError, "estimate must be 'product', 'difference' or 'free', got 'hvp'"),
        (lambda: dal(1.0, every=0), ValueError, "every must be an integer of at least 1, got 0"),
        (lambda: dal(1.0, every=1.5), ValueError, r"every must be an integer of at least 1, got 1\.5"),
        (lambda: dal(1.0, every=True), ValueError, "every must be an integer of at least 1, got True"),
        (
            lambda: dal(1.0, estimate="free", every=2),
            ValueError,
            "every has no use with estimate='free'.*leave it",
        ),
        (lambda: sgd_g2(0.0), ValueError, r"initial_learning_rate must be positive and finite, got 0\.0"),
        (lambda: sgd_g2(np.inf), ValueError, "initial_learning_rate must be positive and finite, got inf"),
        (lambda: sgd_g2("1"), (TypeError, ValueError), "initial_learning_rate must be"),
        (lambda: sgd_g2(optax.constant_schedule(0.1)), (TypeError, ValueError), "initial_learning_rate must be"),
        (lambda: sgd_g2(0.1, 1.0), ValueError, r"decay must be in \[0, 1\), got 1\.0"),
        (lambda: sgd_g2(0.1, -0.5), ValueError, r"decay must be in \[0, 1\), got -0\.5"),
        (lambda: sgd_g2(0.1, np.float32(1.5)), ValueError, r"decay must be in \[0, 1\)"),
        (lambda: sgd_g2(0.1, "0.9"), (TypeError, ValueError), "decay must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
