"""Implicit Runge–Kutta steps: against nodepy, direct linear algebra, the exact flow, and what a refusal leaves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nodepy.runge_kutta_method import loadRKM
from training import Evaluations, FixedScale, assert_close, assert_same, exact_flow, first_update, trajectory, types

import rk_optax
from rk_optax import IMPLICIT_TABLEAUS, ButcherTableau, Implicit, Reason, VectorField
from rk_optax.solver import as_solver
from rk_optax.solver._linear import conjugate_gradients, shifted_lanczos

pytestmark = pytest.mark.latest

named = pytest.mark.parametrize("name", IMPLICIT_TABLEAUS)


# One method of each kind of program: a stage, an explicit one before it, several, coupled ones.
KINDS = ["backward_euler", "trapezoid", "sdirk3", "radau3"]

kinds = pytest.mark.parametrize("name", KINDS)
one_of_each = pytest.mark.parametrize("name", ["sdirk3", "radau3"])  # stages one by one, and coupled
L_STABLE = ["backward_euler", "sdirk2", "sdirk3", "radau3"]


ORDERS = {
    "backward_euler": 1,
    "implicit_midpoint": 2,
    "trapezoid": 2,
    "sdirk2": 2,
    "sdirk3": 3,
    "radau3": 3,
    "gauss4": 4,
}

THETA = np.array([0.9, -0.4, 0.7])


# Symmetric, with eigenvalues of both signs: h·λ stays above −1 in what follows.
MATRIX = np.array([[2.0, 0.7, -0.4], [0.7, 1.0, 0.9], [-0.4, 0.9, -0.1]])


def loss_fn(w):
    """Nonlinear, coupled, with a Hessian that changes along the step."""
    return jnp.sum(w**4) / 4 + jnp.sin(w[0] * w[1]) + jnp.prod(w) + jnp.sum((w - 0.3) ** 2)


def quadratic(w):
    return 0.5 * w @ jnp.asarray(MATRIX) @ w


def direct_step(tableau, matrix, theta, h):
    """One step on dθ/dt = −matrix·θ, all stages in one linear system."""
    s, n = len(tableau.a), len(theta)
    system = np.eye(s * n) + h * np.kron(tableau.a, matrix)
    ks = np.linalg.solve(system, np.tile(matrix @ theta, s)).reshape(s, n)
    return theta - h * tableau.b @ ks


def tight(name, tolerance=1e-13):
    return Implicit(IMPLICIT_TABLEAUS[name], tolerance)


# --- Coefficients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("backward_euler", "BE"), ("trapezoid", "LobattoIIIA2"), ("radau3", "RadauIIA2"), ("gauss4", "GL2")],
)
def test_tableaus_are_nodepys(name, theirs):
    tableau, peer = IMPLICIT_TABLEAUS[name], loadRKM(theirs)
    np.testing.assert_allclose(tableau.a, np.array(peer.A, float), rtol=0, atol=1e-15)
    np.testing.assert_allclose(tableau.b, np.array(peer.b, float), rtol=0, atol=1e-15)


def test_declared_orders_which_construction_proves_are_the_known_ones():
    assert {name: tableau.order for name, tableau in IMPLICIT_TABLEAUS.items()} == ORDERS
    assert {t.name: t.order_hat for t in IMPLICIT_TABLEAUS.values() if t.order_hat} == {"sdirk2": 1, "sdirk3": 2}


def stability(tableau, z):
    s = len(tableau.a)
    return 1 + z * tableau.b @ np.linalg.solve(np.eye(s) - z * tableau.a, np.ones(s))


@named
def test_methods_are_a_stable_and_those_said_so_are_l_stable(name):
    tableau = IMPLICIT_TABLEAUS[name]
    axis = 1j * np.concatenate([np.linspace(0, 20, 200), np.logspace(2, 8, 50)])
    assert max(abs(stability(tableau, z)) for z in axis) <= 1 + 1e-7
    at_infinity = abs(stability(tableau, -1e9))
    assert at_infinity < 1e-8 if name in L_STABLE else abs(at_infinity - 1) < 1e-7


# --- The exact flow --------------------------------------------------------------------------------------------------


@functools.cache
def exact(time):
    return exact_flow(jax.grad(loss_fn), THETA, time)


def observed_order(solver, steps, time=0.6):
    """From the errors at `time` with two step sizes, by one compiled program for both."""
    tx_of = functools.partial(rk_optax.runge_kutta, loss_fn, solver=solver)

    @jax.jit
    def end(h, count):
        tx = tx_of(h)

        def step(_, carry):
            w, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(w), state, w)
            return optax.apply_updates(w, updates), state

        w = jnp.asarray(THETA)
        return jax.lax.fori_loop(0, count, step, (w, tx.init(w)))

    errors = []
    for count in steps:
        w, state = end(time / count, count)
        assert int(state.rejected) == 0
        errors.append(np.abs(w - exact(time)).max())
    return np.log(errors[0] / errors[1]) / np.log(steps[1] / steps[0]), errors


@pytest.mark.covering(most=1)
@named
def test_the_order_on_a_nonlinear_loss_is_the_declared_one(name, x64):
    order, errors = observed_order(tight(name), (16, 32))
    assert errors[1] > 1e-11  # else rounding is what was measured
    assert order == pytest.approx(ORDERS[name], abs=0.15)


@pytest.mark.slow
def test_three_coupled_stages_of_a_tableau_of_ones_own_have_order_5(x64):
    """Radau IIA(5): a real eigenvalue and a complex pair."""
    peer = loadRKM("RadauIIA3")
    radau5 = ButcherTableau("radau5", np.array(peer.A, float), np.array(peer.b, float), np.array(peer.c, float), 5)
    order, _ = observed_order(Implicit(radau5, 1e-13), (4, 8))
    assert order == pytest.approx(5, abs=0.25)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("name", "order"), [("sdirk2", 1), ("sdirk3", 2)])
def test_the_error_estimate_falls_with_the_order_of_the_embedded_method_and_one_more(name, order, x64):
    solver, theta = tight(name), jnp.asarray(THETA)
    assert solver.error_order == order
    problem = hand_made(loss_fn)

    @jax.jit
    def error(h):
        return solver.step(problem, theta, problem(theta), h, solver.init(theta), wants={"error"}).quantities["error"]

    ratio = jnp.linalg.norm(error(0.01)) / jnp.linalg.norm(error(0.005))
    assert np.log2(ratio) == pytest.approx(order + 1, abs=0.1)


def hand_made(loss):
    gradient = jax.grad(loss)
    return VectorField(lambda w, stage: gradient(w), loss, gradient, gradient=gradient)


# --- Linear problems -------------------------------------------------------------------------------------------------


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("name", "scale"),
    [("backward_euler", None), ("radau3", None), *((name, np.array([0.3, 2.0, 0.7])) for name in IMPLICIT_TABLEAUS)],
)
def test_a_step_on_a_quadratic_is_the_direct_solve_with_a_diagonal_preconditioner_too(name, scale, x64):
    preconditioner = None if scale is None else FixedScale(jnp.asarray(scale))
    tx = rk_optax.runge_kutta(quadratic, 0.8, tight(name), preconditioner=preconditioner)
    updates, state = jax.jit(functools.partial(first_update, tx, quadratic))(THETA)
    matrix = MATRIX if scale is None else scale[:, None] * MATRIX
    expected = direct_step(IMPLICIT_TABLEAUS[name], matrix, THETA, 0.8)
    assert bool(state.accepted)
    np.testing.assert_allclose(THETA + updates, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", [[1 / 3, 1 / 3, 1 / 3], [0.2, 0.3, 0.5]], ids=["stiffly accurate", "not"])
def test_an_explicit_first_stage_enters_all_later_ones(weights, x64):
    """The a of TR-BDF2, with an error estimate against other weights."""
    a = np.array([[0, 0, 0], [0.25, 0.25, 0], [1 / 3, 1 / 3, 1 / 3]])
    b_hat = np.array([0.5, 0.2, 0.3])
    tableau = ButcherTableau("esdirk", a, weights, [0, 0.5, 1], 1, b_hat, 1)
    problem, w, h = hand_made(quadratic), jnp.asarray(THETA), 0.8
    solver = Implicit(tableau, 1e-13)
    step = jax.jit(lambda: solver.step(problem, w, problem(w), h, solver.init(w), wants={"error"}))()
    expected = direct_step(tableau, MATRIX, THETA, h)
    np.testing.assert_allclose(w - h * step.direction, expected, rtol=0, atol=1e-12)
    embedded = direct_step(ButcherTableau("embedded", a, b_hat, [0, 0.5, 1], 1), MATRIX, THETA, h)
    np.testing.assert_allclose(step.quantities["error"], embedded - expected, rtol=0, atol=1e-12)


@pytest.mark.covering(most=1)
@named
def test_stiff_modes_decay_in_float32_where_the_method_is_l_stable_and_slow_ones_stay_accurate(name):
    """λh from 1 to 1e6 in a single step: no mode may be lost in the rounding of another."""
    curvature = np.array([1.0, 10.0, 1e6, 1e3], np.float32)

    def loss(w):
        return 0.5 * jnp.sum(curvature * w**2)

    w = np.array([1.0, -1.0, 1.0, 2.0], np.float32)
    updates, state = jax.jit(functools.partial(first_update, rk_optax.runge_kutta(loss, 1.0, name), loss))(w)
    assert bool(state.accepted)
    end = w + updates
    expected = [stability(IMPLICIT_TABLEAUS[name], -float(c)) for c in curvature] * w
    np.testing.assert_allclose(end, expected, rtol=0, atol=2e-5)
    assert abs(end[2]) < 1e-5 if name in L_STABLE else abs(end[2]) > 0.999


@pytest.mark.covering(most=1)
@one_of_each
def test_a_tiny_step_loses_no_digits_in_float32(name):
    w = jnp.asarray(THETA, jnp.float32)
    tx = rk_optax.scale_by_rk(loss_fn, 1e-9, name)
    direction, state = jax.jit(functools.partial(first_update, tx, loss_fn))(w)
    assert bool(state.accepted)
    np.testing.assert_allclose(direction, jax.grad(loss_fn)(w), rtol=2e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_complex_linear_systems_are_solved(scaled, x64):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(12, 12))
    matrix = matrix + matrix.T  # indefinite
    b, scale = rng.normal(size=12), np.exp(rng.normal(size=12)) if scaled else np.ones(12)
    c = 0.7 + 0.4j
    found = shifted_lanczos(
        lambda v: matrix @ v,
        jnp.asarray(c),
        jnp.asarray(b),
        jnp.asarray(scale) if scaled else None,
        tolerance=1e-12,
        max_iterations=40,
    )
    expected = np.linalg.solve(np.eye(12) + c * scale[:, None] * matrix, b)
    np.testing.assert_allclose(found.x[0] + 1j * found.x[1], expected, rtol=1e-9)
    assert 12 <= int(found.iterations) <= 20


def test_with_a_real_shift_they_are_those_of_conjugate_gradients(x64):
    matrix, b = MATRIX @ MATRIX, jnp.asarray(THETA)
    limits = {"tolerance": 1e-13, "max_iterations": 2}  # not the solution yet: the same iterates
    ours = shifted_lanczos(lambda v: matrix @ v, jnp.asarray(0.5 + 0j), b, None, **limits)
    theirs = conjugate_gradients(lambda v: matrix @ v, 0.5, b, None, **limits)
    np.testing.assert_allclose(ours.x[0], theirs.x, rtol=1e-12)
    np.testing.assert_allclose(ours.residual, theirs.residual, rtol=1e-10)
    assert int(ours.iterations) == int(theirs.iterations) == 2


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.covering(most=1)
@one_of_each
def test_stages_that_do_not_converge_refuse_the_step_and_leave_parameters_and_momentum(name):
    solver = Implicit(IMPLICIT_TABLEAUS[name], max_iterations=1)
    schedule = optax.join_schedules([optax.constant_schedule(1e-7), optax.constant_schedule(2.0)], [1])
    tx = rk_optax.runge_kutta(loss_fn, schedule, solver, momentum=0.9)
    _, (w1, one), (w2, two) = trajectory(tx, loss_fn, THETA.astype(np.float32), {}, 2)
    assert (bool(one.accepted), bool(two.accepted)) == (True, False)
    assert int(two.reason) == Reason.NOT_SOLVED
    assert np.any(one.after.trace != 0)
    assert_same((w2, two.after), (w1, one.after))
    # The diagnostics of the refused step are those to look at.
    assert int(two.solver.iterations) == 1 * (3 if name == "sdirk3" else 1)
    assert float(two.solver.residual) > solver.tolerance


def test_descent_control_shortens_a_step_that_cannot_be_solved():
    def rough(w):
        return jnp.sum(w**2 / 20 + jnp.sin(9 * w))

    tx = rk_optax.backward_euler(rough, rk_optax.descent_control(initial_step_size=1e3))
    visited = trajectory(tx, rough, THETA.astype(np.float32), {}, 12)
    reasons = [int(state.reason) for _, state in visited[1:]]
    assert reasons[0] != Reason.ACCEPTED
    assert Reason.ACCEPTED in reasons
    assert rough(visited[-1][0]) < rough(visited[0][0])


@one_of_each
def test_a_stage_that_is_not_finite_refuses_the_step(name):
    """Newton's first iterate lands where the loss is not defined."""

    def loss(w):
        return jnp.sum(-jnp.sqrt(w)) + jnp.sum(w)

    tx = rk_optax.runge_kutta(loss, 30.0, name)
    updates, state = jax.jit(functools.partial(first_update, tx, loss))(np.array([4.0, 0.3], np.float32))
    assert int(state.reason) == Reason.NOT_FINITE
    assert_same(updates, jnp.zeros(2))


@pytest.mark.covering(most=1)
@one_of_each
def test_a_gradient_that_is_not_finite_refuses_the_step(name):
    w = jnp.asarray(THETA, jnp.float32)
    tx = rk_optax.runge_kutta(loss_fn, 0.1, name)
    updates, state = jax.jit(tx.update)(w.at[1].set(jnp.nan), tx.init(w), w)
    assert int(state.reason) == Reason.NOT_FINITE
    assert_same(updates, jnp.zeros(3))


@pytest.mark.covering(most=1)
@one_of_each
def test_nothing_moves_at_a_minimum_or_with_a_step_of_zero(name):
    w = jnp.asarray(THETA, jnp.float32)
    tx = rk_optax.runge_kutta(loss_fn, lambda count: jnp.where(count == 0, 0.0, 0.1), name)
    updates, state = jax.jit(functools.partial(first_update, tx, loss_fn))(w)
    assert bool(state.accepted)
    assert_same(updates, jnp.zeros(3))
    tx = rk_optax.runge_kutta(lambda w: jnp.sum(w**2), 0.1, name)
    updates, state = jax.jit(tx.update)(jnp.zeros(3), tx.init(jnp.zeros(3)), jnp.zeros(3))
    assert bool(state.accepted)
    assert_same(updates, jnp.zeros(3))
    assert int(state.solver.iterations) == 0


# --- Cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.covering(most=1)
@kinds
def test_every_gradient_is_counted_and_every_product(name):
    losses, products = Evaluations(loss_fn), Evaluations(lambda v: v)

    class Counted(VectorField):
        def hessian(self, params):
            product = super().hessian(params)
            return lambda v: product(products.function(v))

    gradient = jax.grad(losses.function)
    problem = Counted(lambda w, stage: gradient(w), losses.function, gradient, gradient=gradient)
    w, k1, solver = jnp.asarray(THETA, jnp.float32), jax.grad(loss_fn)(THETA.astype(np.float32)), as_solver(name)
    step = jax.block_until_ready(jax.jit(lambda: solver.step(problem, w, k1, 0.3, solver.init(w)))())
    assert int(step.cost.gradients) == losses.take() + 1  # k1 came in
    assert int(step.cost.products) == products.take() == int(step.state.linear_iterations)
    assert int(step.state.iterations) >= 2


def test_backward_euler_on_a_quadratic_takes_one_newton_iteration(x64):
    """k1, the linearisation and the residual; a product for each of the three eigenvalues."""
    tx = rk_optax.backward_euler(quadratic, 0.5)
    _, state = jax.jit(functools.partial(first_update, tx, quadratic))(THETA)
    assert int(state.solver.iterations) == 1
    assert (int(state.cost.gradients), int(state.cost.products)) == (3, 3)


def test_a_second_correction_that_ends_it_costs_no_new_hessian():
    """k1, one linearisation and a residual after each, and the stage is as exact as it has to be."""

    @jax.jit
    def step(h):
        return first_update(rk_optax.backward_euler(loss_fn, lambda count: h), loss_fn, jnp.asarray(THETA, jnp.float32))

    gradient, shared = jax.jit(jax.grad(loss_fn)), 0
    for h in (0.003, 0.01, 0.03, 0.1):
        updates, state = step(jnp.float32(h))
        expected = THETA
        for _ in range(60):  # which contracts
            expected = THETA - h * np.asarray(gradient(jnp.asarray(expected, jnp.float32)), float)
        rounding = 8 * 2.0**-24 * np.linalg.norm(THETA)  # what θ − hd cannot show is not solved for
        error = np.linalg.norm(updates - (expected - THETA))
        assert error < 2e-5 * np.linalg.norm(expected - THETA) + rounding
        shared += int(state.solver.iterations) == 2 and int(state.cost.gradients) == 4
    assert shared > 0


# --- Trees, types, programs ------------------------------------------------------------------------------------------


def tree_loss(params, x):
    """Complex, real and missing leaves that all enter each other's gradients."""
    total = sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(params))
    return total**2 / 4 + jnp.sum((params["w"] - x) ** 2) + jnp.real(params["z"][0] * jnp.conj(params["z"][1]))


TREE = {"w": np.array([0.4, -0.3]), "z": np.array([0.2 + 0.5j, 0.1 - 0.3j]), "none": None, "fixed": np.array(0.6)}
X = np.array([0.3, 1.0])


@pytest.mark.covering(most=1)
@one_of_each
def test_complex_leaves_are_pairs_of_real_ones_and_masked_ones_stay(name, x64):
    h, mask = 0.4, {"w": True, "z": True, "none": None, "fixed": False}
    tx = rk_optax.runge_kutta(tree_loss, h, tight(name), mask=mask)
    updates, state = jax.jit(functools.partial(first_update, tx, tree_loss))(TREE, x=X)
    assert bool(state.accepted)

    def split_loss(params):
        return tree_loss({"w": params["w"], "z": params["re"] + 1j * params["im"], "fixed": TREE["fixed"]}, X)

    split = {"w": TREE["w"], "re": TREE["z"].real, "im": TREE["z"].imag}
    tx = rk_optax.runge_kutta(split_loss, h, tight(name))
    expected, _ = jax.jit(functools.partial(first_update, tx, split_loss))(split)
    assert_close(updates["w"], expected["w"], rtol=1e-9)
    assert_close(updates["z"], expected["re"] + 1j * expected["im"], rtol=1e-9)
    assert updates["none"] is None
    assert updates["fixed"] == 0


@pytest.mark.covering(most=1)
@kinds
def test_updates_and_states_keep_their_types(name, x64):
    params = {
        "w": np.array([0.4, -0.3], np.float32),
        "z": np.array([0.2 + 0.5j, 0.1j], np.complex64),
        "low": jnp.asarray([0.25, 0.5], jnp.bfloat16),
        "double": np.array([0.1]),
    }
    tx = rk_optax.runge_kutta(tree_loss, 0.1, name, preconditioner=rk_optax.precondition_by_adagrad())
    old = tx.init(params)
    for x in (X.astype(np.float32), X):
        updates, new = jax.eval_shape(functools.partial(first_update, tx, tree_loss), params, x=x)
        assert types(updates) == types(params)
        assert types(new) == types(old)
    if name == "radau3":
        (start, _), (end, new) = trajectory(tx, tree_loss, params, {"x": X}, 1)
        assert bool(new.accepted)
        assert all(np.any(start[key] != end[key]) for key in params)


@pytest.mark.slow
def test_bfloat16_parameters_get_the_float32_step():
    w = jnp.asarray(THETA, jnp.bfloat16)
    wide = w.astype(jnp.float32)
    tx = rk_optax.sdirk2(loss_fn, 0.3)
    updates, _ = jax.jit(functools.partial(first_update, tx, loss_fn))(w)
    expected, _ = jax.jit(functools.partial(first_update, tx, loss_fn))(wide)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(updates.astype(jnp.float32), expected, rtol=5e-3)


@pytest.mark.covering(most=1)
@one_of_each
def test_vmapped_steps_are_the_single_ones(name, x64):
    """Lanes that need different numbers of iterations, one that is not finite among them."""
    tx = rk_optax.runge_kutta(loss_fn, 0.5, name)
    ws = jnp.asarray(np.stack([THETA, 0 * THETA + 0.3, 3 * THETA, np.nan * THETA]))
    many = jax.jit(jax.vmap(lambda w: first_update(tx, loss_fn, w)))(ws)
    single = jax.jit(lambda w: first_update(tx, loss_fn, w))
    for i, w in enumerate(ws):
        updates, state = single(w)
        np.testing.assert_allclose(many[0][i], updates, rtol=1e-9)
        assert many[1].reason[i] == state.reason
        assert many[1].cost.products[i] == state.cost.products
    assert len(set(many[1].solver.linear_iterations.tolist())) > 1


@pytest.mark.covering(most=1)
@one_of_each
def test_new_data_trace_nothing_again(name):
    traces = []

    def loss(params, x):
        traces.append(1)
        return tree_loss(params, x)

    params = {"w": jnp.ones(2), "z": jnp.ones(2)}
    tx = rk_optax.runge_kutta(loss, 0.1, name)
    step = jax.jit(tx.update)
    state, counts = tx.init(params), []
    for x in (jnp.zeros(2), jnp.ones(2), jnp.ones(2) / 2):
        _, state = step(params, state, params, x=x)
        counts.append(len(traces))
    # Once for the residual and once for the linearisation, whatever the number of stages.
    assert counts == [2, 2, 2]
