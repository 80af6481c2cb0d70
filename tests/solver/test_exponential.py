"""Exponential steps and the diagonal curvature: φ-functions, exact decay, orders, the estimate itself."""

import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import Evaluations, FixedScale, assert_close, assert_same, exact_flow, first_update, trajectory, types

import rk_optax
from rk_optax import DiagonalCurvature, Etd, Reason, Ros2, RosenbrockEuler
from rk_optax.field import VectorField
from rk_optax.solver.exponential import phi1, phi2

ONCE = DiagonalCurvature(every=10**6)  # D of the start for good, so that nothing but h changes
THETA = np.array([0.9, -0.4, 0.7])
CURVATURE = np.array([1.0, 5.0, 20.0])


def loss_fn(w):
    return jnp.sum(w**4) / 4 + jnp.sin(w[0] * w[1]) + jnp.prod(w) + jnp.sum((w - 0.3) ** 2)


def separable(w):
    """A loss with a diagonal Hessian, which one probe shows exactly."""
    return jnp.sum(jnp.cosh(w) * CURVATURE)


def flat(w):
    return 0.0 * jnp.sum(w)


def jitted_first_update(tx, loss, params, **data):
    return jax.jit(functools.partial(first_update, tx, loss))(params, **data)


# --- φ-functions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_phi_functions_are_right_to_rounding_for_any_argument(dtype, x64):
    """Against a hundred decimal digits: tiny, around the switch of formulas at ±1, huge and negative."""
    sizes = np.concatenate([np.logspace(-30, 2, 120), np.linspace(0.9, 1.1, 41), [1e6, 1e30]])
    x = np.concatenate([-sizes, sizes[sizes <= 80]]).astype(dtype)
    with decimal.localcontext() as context:
        context.prec = 100
        exact = [decimal.Decimal(float(v)) for v in x]
        first = np.array([float((v.exp() - 1) / v) for v in exact])
        second = np.array([float((v.exp() - 1 - v) / v**2) for v in exact])
    rounding = np.finfo(dtype).eps
    with jax.numpy_dtype_promotion("strict"):
        ours = jax.jit(lambda v: (phi1(v), phi2(v)))(jnp.asarray(x))
    for values, expected in zip(ours, (first, second), strict=True):
        assert values.dtype == dtype
        # 1/x² leaves float32 below 1e-38, where 0 will do.
        np.testing.assert_allclose(values, expected, rtol=6 * rounding, atol=np.finfo(dtype).tiny)
    assert [float(f(jnp.zeros([], dtype))) for f in (phi1, phi2)] == [1.0, 0.5]


# --- What is exact ---------------------------------------------------------------------------------------------------


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scale", [None, np.array([0.3, 2.0, 7.0])], ids=["P = I", "diagonal P"])
@pytest.mark.parametrize("linear", ["l2", "diagonal"])
def test_pure_decay_is_exact(order, scale, linear, x64):
    h, rate = 3.0, 1.7
    preconditioner = None if scale is None else FixedScale(scale)
    tx = rk_optax.runge_kutta(flat, h, Etd(order, linear), l2=rate, preconditioner=preconditioner)
    updates, _ = jitted_first_update(tx, flat, THETA)
    exact = THETA * np.exp(-h * rate * (1 if scale is None else scale))
    np.testing.assert_allclose(THETA + updates, exact, rtol=0, atol=2e-15)


@pytest.mark.parametrize("order", [1, 2])
def test_a_diagonal_quadratic_is_followed_exactly_in_float32_however_stiff(order):
    """λh from 1e-6 to 1e6, the minimum away from 0."""
    curvature = np.logspace(-6, 6, 13).astype(np.float32)

    def loss(w):
        return 0.5 * jnp.sum(curvature * (w - 1) ** 2)

    w = np.full(13, 3.0, np.float32)
    updates, _ = jitted_first_update(rk_optax.runge_kutta(loss, 1.0, Etd(order)), loss, w)
    exact = 2 * np.expm1(-curvature.astype(float))
    np.testing.assert_allclose(updates, exact, rtol=3e-6)


def test_etdrk2_is_cox_and_matthews_formula(x64):
    """In positions and powers of exp(−hD), as it is printed."""
    h, w = 0.3, THETA
    gradient = np.sinh(w) * CURVATURE
    d = np.cosh(w) * CURVATURE
    z = h * d
    e = np.exp(-z)

    def nonlinear(w):
        return -(np.sinh(w) * CURVATURE - d * w)

    a = e * w + (1 - e) / d * nonlinear(w)
    expected = a + (e - 1 + z) / (h * d**2) * (nonlinear(a) - nonlinear(w))
    tx = rk_optax.etdrk2(separable, h)
    updates, state = jitted_first_update(tx, separable, w)
    np.testing.assert_allclose(w + updates, expected, rtol=1e-13)
    assert_close(state.solver.mean, 0.01 * d)  # one estimate, in a mean with decay 0.99
    one, _ = jitted_first_update(rk_optax.etd1(separable, h), separable, w)
    np.testing.assert_allclose(one, -(1 - e) / d * gradient, rtol=1e-13)


@pytest.mark.parametrize("solver", [RosenbrockEuler("diagonal"), Ros2("diagonal")], ids=["RosenbrockEuler", "ROS2"])
def test_linearly_implicit_methods_divide_by_one_plus_their_diagonal(solver, x64):
    h, scale, w = 0.7, np.array([0.3, 2.0, 7.0]), THETA
    tx = rk_optax.runge_kutta(separable, h, solver, preconditioner=FixedScale(scale))
    updates, state = jitted_first_update(tx, separable, w)
    rate = scale * CURVATURE * np.cosh(w)

    def field(w):
        return -scale * np.sinh(w) * CURVATURE

    if isinstance(solver, RosenbrockEuler):
        expected = h * field(w) / (1 + h * rate)
    else:
        gamma = 1 + 1 / np.sqrt(2)
        k1 = field(w) / (1 + gamma * h * rate)
        k2 = (field(w + h * k1) - 2 * k1) / (1 + gamma * h * rate)
        expected = h * (1.5 * k1 + 0.5 * k2)
    np.testing.assert_allclose(updates, expected, rtol=1e-12)
    assert int(state.cost.products) == 1
    assert int(state.cost.gradients) == (1 if isinstance(solver, RosenbrockEuler) else 2)
    assert int(state.solver.iterations) == 0
    assert_close(state.solver.diagonal.mean, 0.01 * CURVATURE * np.cosh(w))


# --- Orders ----------------------------------------------------------------------------------------------------------


@functools.cache
def exact(time, l2):
    return exact_flow(lambda w: jax.grad(loss_fn)(w) + l2 * w, THETA, time)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (Etd(1, "l2"), 1),
        (Etd(2, "l2"), 2),
        (Etd(1, ONCE), 1),
        (Etd(2, ONCE), 2),
        (RosenbrockEuler(ONCE), 1),
        (Ros2(ONCE), 2),
        (Ros2(ONCE, gamma=1 - 1 / np.sqrt(2)), 2),
    ],
    ids=str,
)
def test_the_order_is_kept_with_a_diagonal_that_is_not_the_hessian(solver, order, x64):
    time, l2, errors = 0.5, 0.8, []

    @jax.jit
    def end(h, count):
        tx = rk_optax.runge_kutta(loss_fn, h, solver, l2=l2)

        def step(_, carry):
            w, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(w), state, w)
            return optax.apply_updates(w, updates), state

        w = jnp.asarray(THETA)
        return jax.lax.fori_loop(0, count, step, (w, tx.init(w)))[0]

    for count in (64, 128):
        errors.append(np.abs(end(time / count, count) - exact(time, l2)).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


@pytest.mark.slow
def test_the_error_estimate_of_etdrk2_is_its_distance_from_etd1(x64):
    problem = VectorField(lambda w, stage: jax.grad(loss_fn)(w) + 0.8 * w, l2=0.8)
    w, h = jnp.asarray(THETA), 0.2
    one, two = (
        Etd(order, "l2").step(problem, w, problem(w), h, (), wants={"error"} if order == 2 else set())
        for order in (1, 2)
    )
    np.testing.assert_allclose(two.quantities["error"], h * (two.direction - one.direction), rtol=1e-12)
    tx = rk_optax.etdrk2(loss_fn, rk_optax.error_control(rtol=1e-4))
    _, state = jitted_first_update(tx, loss_fn, THETA)
    assert 0 < float(state.rule.error) < np.inf


# --- The estimate ----------------------------------------------------------------------------------------------------


def estimates(estimator, loss, w, steps):
    """D, state and cost of each of some steps at the same place."""
    gradient = jax.grad(loss)
    problem = VectorField(lambda w, stage: gradient(w), loss, gradient, gradient=gradient)
    update = jax.jit(lambda state: estimator.update(problem, w, state))
    state, seen = estimator.init(w), []
    for _ in range(steps):
        d, state, cost = update(state)
        seen.append((d, state, int(cost.products)))
    return seen


def test_the_mean_of_many_probes_is_the_diagonal_without_its_negative_part(x64):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(4, 4))
    matrix = matrix + matrix.T + np.diag([3.0, -3.0, 6.0, 0.5])

    def loss(w):
        return 0.5 * w @ matrix @ w

    *_, (d, state, _) = estimates(DiagonalCurvature(decay=0.999, every=1), loss, jnp.ones(4), 2000)
    spread = np.sqrt(2 * np.sum((matrix - np.diag(np.diag(matrix))) ** 2, axis=1) / 1000)
    assert np.all(np.abs(d - np.maximum(np.diag(matrix), 0)) < 4 * spread)
    assert d[1] == 0
    assert float(state.mean[1]) < 0  # kept as it is: cut off sample by sample the mean would be too large
    assert int(state.estimates) == 2000


def test_an_estimate_is_paid_for_every_so_often_with_a_new_probe(x64):
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(6, 6))

    def loss(w):
        return 0.5 * jnp.sum((matrix @ w) ** 2)

    seen = estimates(DiagonalCurvature(decay=0.0, every=3), loss, jnp.ones(6), 7)
    assert [products for *_, products in seen] == [1, 0, 0, 1, 0, 0, 1]
    ds = [d for d, *_ in seen]
    assert_same(ds[0], ds[2])
    assert np.any(ds[2] != ds[3])
    other_seed = estimates(DiagonalCurvature(decay=0.0, every=3, seed=1), loss, jnp.ones(6), 1)
    assert np.any(other_seed[0][0] != ds[0])


def test_an_estimate_that_is_not_finite_is_dropped():
    def loss(w):  # a gradient, but no second derivative at 0
        return jnp.sum(jnp.abs(w) ** 1.5 + w**2)

    (d, state, products), _ = estimates(DiagonalCurvature(), loss, jnp.array([0.0, 1.0]), 2)
    assert products == 1
    assert int(state.estimates) == 0
    assert_same(d, jnp.zeros(2))


def test_a_refused_step_keeps_the_estimate_it_paid_for():
    def loss(w):
        return jnp.sum(jnp.sqrt(w)) + jnp.sum(w)

    tx = rk_optax.etdrk2(loss, 30.0, momentum=0.9)
    updates, state = jitted_first_update(tx, loss, np.array([4.0, 0.3], np.float32))
    assert int(state.reason) == Reason.NOT_FINITE
    assert_same((updates, state.after.trace), (jnp.zeros(2), jnp.zeros(2)))
    assert (int(state.solver.estimates), int(state.cost.products)) == (1, 1)


# --- Cost, trees, types, programs ------------------------------------------------------------------------------------


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("order", [1, 2])
def test_a_step_costs_one_gradient_for_each_order_and_a_product_now_and_then(order):
    counted = Evaluations(loss_fn)
    tx = rk_optax.runge_kutta(counted.function, 0.01, Etd(order, DiagonalCurvature(every=2)))
    w, costs, seen = jnp.asarray(THETA, jnp.float32), [], []
    gradient, state, step = jax.jit(jax.grad(loss_fn))(w), tx.init(w), jax.jit(tx.update)
    for _ in range(3):
        _, state = jax.block_until_ready(step(gradient, state, w))
        costs.append((int(state.cost.gradients), int(state.cost.products)))
        seen.append(counted.take())
    assert costs == [(order, 1), (2 * order, 1), (3 * order, 2)]
    assert seen == [order, order - 1, order]  # k1 came in; a product evaluates the loss once


def tree_loss(params, x):
    total = sum(jnp.sum(jnp.abs(leaf) ** 2) for leaf in jax.tree.leaves(params))
    return total**2 / 4 + jnp.sum((params["w"] - x) ** 2)


SOLVERS = {
    "etd1": Etd(1, "l2"),
    "etdrk2": Etd(2),
    "rosenbrock_euler": RosenbrockEuler("diagonal"),
    "ros2": Ros2("diagonal"),
}


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_trees_keep_their_types_and_masked_leaves_their_values(solver, x64):
    params = {
        "w": np.array([0.4, -0.3], np.float32),
        "z": np.array([0.2 + 0.5j, 0.1j], np.complex64),
        "low": jnp.asarray([0.25, 0.5], jnp.bfloat16),
        "double": np.array([0.1]),
        "none": None,
        "fixed": np.array(0.6),
    }
    mask = {**dict.fromkeys(params, True), "fixed": False}
    traces = []

    def loss(params, x):
        traces.append(1)
        return tree_loss(params, x)

    options = {"l2": 0.1, "preconditioner": rk_optax.precondition_by_adagrad(), "mask": mask}
    tx = rk_optax.runge_kutta(loss, 0.1, solver, **options)

    @jax.jit
    def step(params, state, x):
        updates, state = tx.update(jax.tree.map(jnp.conj, jax.grad(tree_loss)(params, x)), state, params, x=x)
        return optax.apply_updates(params, updates), state

    start = jax.tree.map(jnp.asarray, params)
    state = tx.init(start)
    end, new = step(start, state, jnp.zeros(2))
    traced = len(traces)
    assert bool(new.accepted)
    assert types(end) == types(start)
    assert types(new) == types(state)
    assert all(np.any(start[key] != end[key]) for key in ("w", "z", "low", "double"))
    assert end["fixed"] == start["fixed"]
    _, last = step(end, new, jnp.ones(2))
    assert len(traces) == traced
    assert int(last.rejected) == 0


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("solver", [SOLVERS["etdrk2"], SOLVERS["ros2"]], ids=["etdrk2", "ros2"])
def test_a_step_of_zero_stays_and_lanes_of_a_vmap_are_single_steps(solver):
    ws = jnp.asarray(np.stack([THETA, THETA[::-1]]), jnp.float32)

    def update(h, w):
        return first_update(rk_optax.runge_kutta(loss_fn, h, solver, l2=0.1), loss_fn, w)

    hs = jnp.array([0.0, 0.1])
    updates, state = jax.jit(jax.vmap(update))(hs, ws)
    assert_same(updates[0], jnp.zeros(3))
    assert np.all(state.accepted)
    single, _ = jax.jit(update)(hs[1], ws[1])
    np.testing.assert_allclose(updates[1], single, rtol=2e-6)


def test_stages_can_see_batches_of_their_own():
    def loss(w, x):
        return 0.5 * jnp.sum((w - x) ** 2)

    tx = rk_optax.runge_kutta(loss, 0.5, Etd(2, "l2"), l2=1.0, stage_batches="fresh", batch_argnames=["x"])
    w, x = np.float32(1.0), np.array([2.0, -1.0], np.float32)
    updates, _ = jax.jit(tx.update)(jnp.asarray(w - x[0]), tx.init(w), w, x=x)
    k1 = 2 * w - x[0]
    first = -np.expm1(-0.5) / 0.5 * k1
    a = w - 0.5 * first
    expected = first + (np.exp(-0.5) - 0.5) / 0.25 * ((2 * a - x[1]) - np.exp(-0.5) * k1)
    np.testing.assert_allclose(updates, -0.5 * expected, rtol=1e-5)


# --- Construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Etd(3), "order must be 1 or 2, got 3"),  # pyright: ignore
        (lambda: Etd(1, "hessian"), "linear must be 'l2', 'diagonal', 'given' or a DiagonalCurvature"),  # pyright: ignore
        (lambda: DiagonalCurvature(decay=1.0), r"decay must be in \[0, 1\)"),
        (lambda: DiagonalCurvature(every=0), "every must be an integer of at least 1"),
        (lambda: Ros2("exact"), "curvature must be 'hessian', 'gauss_newton', 'diagonal'"),  # pyright: ignore
        (lambda: first_update(rk_optax.etd1(loss_fn, 0.1, linear="l2"), loss_fn, THETA), "pass l2="),
        (lambda: rk_optax.etd1(loss_fn, rk_optax.error_control()), "Etd does not offer"),
        (lambda: rk_optax.etdrk2(None, 0.1, grad_fn=jax.grad(loss_fn)), "'product': pass loss_fn"),
        (
            lambda: rk_optax.etdrk2(loss_fn, 0.1, preconditioner=rk_optax.precondition_by(optax.scale(2.0))),
            "preconditioner: Etd needs a 'diagonal_scale': its linear systems",
        ),
    ],
)
def test_what_does_not_go_says_so_and_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_decay_alone_needs_no_loss():
    tx = rk_optax.etdrk2(None, 0.1, linear="l2", l2=0.5, grad_fn=jax.grad(loss_fn))
    expected = rk_optax.etdrk2(loss_fn, 0.1, linear="l2", l2=0.5)
    w = jnp.asarray(THETA, jnp.float32)
    (_, (one, _)), (_, (other, _)) = (trajectory(t, loss_fn, w, {}, 1) for t in (tx, expected))
    assert_close(one, other, rtol=1e-6)
