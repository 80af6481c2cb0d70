"""Every rule and preconditioner: at any scale, in strict modes, in reverse mode, whatever came before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import first_update, steps

import rk_optax
from rk_optax import LeastSquares, Reason

pytestmark = pytest.mark.latest

CURVATURE = np.array([1.0, 3.0], np.float32)


def quadratic(w, c=1.0):
    return c * 0.5 * jnp.sum(CURVATURE.astype(w.dtype) * w**2)


def residuals(w):
    return jnp.stack([w[0] - 1, 2 * (w[1] - 0.3 * w[0] ** 2)])


def optimizer(name, loss=quadratic, unit=1.0, **options):
    """A solver with each rule, whose numbers with the units of h are multiplied by `unit`."""
    if name == "trust_ratio":
        return rk_optax.rosenbrock_euler(LeastSquares(residuals), rk_optax.trust_ratio_control(0.3 * unit), **options)
    make, rule = {
        "dal": (rk_optax.heun, lambda: rk_optax.dal(0.3 * unit)),
        "dal, clipped": (rk_optax.heun, lambda: rk_optax.dal(0.3 * unit, form="clipped", estimate="difference")),
        "dal, free": (rk_optax.heun, lambda: rk_optax.dal(0.3 * unit, estimate="free")),
        "sgd_g2": (rk_optax.euler, lambda: rk_optax.sgd_g2(0.3 * unit)),
        "error": (rk_optax.heun, lambda: rk_optax.error_control(0.1, 0.1, initial_step_size=0.3 * unit)),
        "descent": (rk_optax.heun, lambda: rk_optax.descent_control(0.3 * unit)),
    }[name]
    return make(loss, rule(), **options)


NAMES = ["dal", "dal, clipped", "dal, free", "sgd_g2", "error", "descent", "trust_ratio"]
every_rule = pytest.mark.parametrize("name", NAMES)


PRECONDITIONERS = {
    "adagrad": rk_optax.precondition_by_adagrad(),
    "rms": rk_optax.precondition_by_rms(),
    "adam": rk_optax.precondition_by_adam(),
    "hutchinson": rk_optax.precondition_by_hutchinson(),
}


def loss_of(name):
    return LeastSquares(residuals) if name in ("trust_ratio", "search") else quadratic


# --- scale ---


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "trust_ratio"])
def test_a_multiple_of_the_loss_with_h_in_its_units_changes_nothing(name):
    @jax.jit
    @jax.vmap
    def run(c):
        loss = functools.partial(quadratic, c=c)
        w, state = steps(optimizer(name, loss, unit=1 / c), loss, jnp.array([1.0, -2.0]))
        return w, state.step_size * c, state.accepted

    w, h, accepted = run(jnp.array([1.0, 1e-25, 1e-12, 1e12, 1e25]))
    assert accepted.all()
    assert not np.allclose(w[0], [1.0, -2.0], rtol=0.05)
    np.testing.assert_allclose(w, np.broadcast_to(w[0], w.shape), rtol=1e-4)
    np.testing.assert_allclose(h, np.broadcast_to(h[0], h.shape), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("trust_ratio", "error")])
def test_a_multiple_of_the_parameters_with_h_in_its_units_changes_nothing(name):
    """θ = s·v: the gradient is divided by s, and h is in units of s²."""

    @jax.jit
    @jax.vmap
    def run(s):
        def loss(w):
            return quadratic(w / s)

        w, state = steps(optimizer(name, loss, unit=s * s), loss, s * jnp.array([1.0, -2.0]))
        return w / s, state.accepted

    w, accepted = run(jnp.array([1.0, 1e-12, 1e-6, 1e6, 1e12]))
    assert accepted.all()
    np.testing.assert_allclose(w, np.broadcast_to(w[0], w.shape), rtol=1e-3)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("name", ["dal", "dal, clipped", "dal, free", "sgd_g2", "error", "descent"])
def test_an_inert_leaf_of_any_size_changes_nothing(name):
    def loss(params):
        return quadratic(params["w"])

    tx = optimizer(name, loss)

    @jax.jit
    @jax.vmap
    def run(size):
        params, state = steps(tx, loss, {"w": jnp.array([1.0, -2.0]), "inert": jnp.full(50, size)}, 2)
        return params["w"], state.step_size

    w, h = run(jnp.array([0.0, 1e-20, 1.0, 1e6, 1e20]))
    alone, state = steps(optimizer(name), quadratic, jnp.array([1.0, -2.0]), 2)
    np.testing.assert_allclose(w, np.broadcast_to(alone, w.shape), rtol=1e-5)
    np.testing.assert_allclose(h, state.step_size, rtol=1e-4)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("c", [1e-25, 1e-12, 1e12, 1e25])
def test_a_preconditioner_with_its_floor_in_units_of_the_gradient_makes_the_gradient_a_pure_number(name, c):
    make = getattr(rk_optax, f"precondition_by_{name}")
    expected = []
    for unit in (1.0, c):
        p = make(floor=0.1 * unit ** (2 if name == "adagrad" else 1))
        w = jnp.array([1.0, -2.0])
        loss = functools.partial(quadratic, c=unit)
        field = rk_optax.VectorField(lambda w, _: jax.grad(loss)(w), gradient=jax.grad(loss))
        state, g = p.init(w), jax.grad(loss)(w)
        for _ in range(2):
            frozen, state, _ = p.update(g, state, w, field)
        expected.append(p.apply(g, frozen))
    np.testing.assert_allclose(*expected, rtol=1e-5)


# --- whatever has happened before ---


def test_error_control_keeps_h_on_batches_without_a_gradient_and_stays_finite_without_curvature():
    def loss(w, slope, curvature):
        return slope * jnp.sum(w) + 0.5 * curvature * jnp.sum(w**2)

    tx = rk_optax.heun(loss, rk_optax.error_control(1e-2, 1e-2, initial_step_size=0.1))
    w = jnp.ones(2)

    @functools.partial(jax.jit, static_argnames="count")
    def run(state, slope, curvature, count):
        def step(carry, _):
            w, state = carry
            gradient = jax.grad(loss)(w, slope, curvature)
            _, state = tx.update(gradient, state, w, slope=slope, curvature=curvature)
            return (w, state), (state.rule.next_step_size, state.accepted)  # always from the same place

        (_, state), seen = jax.lax.scan(step, (w, state), length=count)
        return state, *seen

    state, h, accepted = run(tx.init(w), 0.0, 0.0, 200)
    np.testing.assert_allclose(h, 0.1, rtol=1e-6)
    assert accepted.all()
    state, h, _ = run(state, 1.0, 0.0, 200)  # h may grow, to where the step overflows
    assert np.isfinite(h).all()
    assert h.max() > 1e30
    state, h, accepted = run(state, 0.0, 5.0, 200)
    assert accepted[-1]
    assert 1e-3 < h[-1] < 1


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("name", ["error", "descent", "trust_ratio"])
@pytest.mark.parametrize("first", [1e-37, 1e37])
def test_a_rule_recovers_from_any_h(name, first):
    tx, loss = optimizer(name), loss_of(name)
    if name == "trust_ratio":  # whose own numbers underflow at such an h
        tx = rk_optax.residual_euler(loss, rk_optax.trust_ratio_control())
    w = jnp.array([0.5, -2.0])
    state = tx.init(w)
    state = state._replace(rule=state.rule._replace(next_step_size=jnp.full([], first)))

    @jax.jit
    def run(w, state):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (w + updates, state), None

        return jax.lax.scan(step, (w, state), length=400)[0]

    end, state = run(w, state)
    assert np.isfinite(state.rule.next_step_size)
    assert loss(end) < 1e-3 * loss(w)


@pytest.mark.covering
@pytest.mark.parametrize("rate", [-0.1, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("skip", [True, False])
def test_a_step_size_that_is_negative_or_not_finite_is_refused_with_a_reason_of_its_own(rate, skip):
    w = jnp.array([1.0, -2.0])

    @jax.jit
    def update(rate):
        tx = rk_optax.rk4(quadratic, lambda count: rate, skip_nonfinite=skip, momentum=0.9)
        return first_update(tx, quadratic, w)

    updates, state = update(rate)
    np.testing.assert_array_equal(updates, 0)
    np.testing.assert_array_equal(state.step_size, np.float32(rate))
    assert (int(state.reason), int(state.rejected)) == (Reason.BAD_STEP_SIZE, 1)
    assert "negative or not finite" in Reason.BAD_STEP_SIZE.message
    updates, state = update(0.1)
    assert bool(state.accepted)


def test_the_shortest_step_says_whether_the_curvature_or_the_gradient_is_to_blame():
    def stiff(w):
        return 0.5e13 * jnp.sum(w**2)

    w = jnp.ones(2)
    seen = {}
    for name, rule, gradient in (
        ("floor", rk_optax.descent_control(1e-10, min_step_size=1e-12), 1e13 * w),
        ("no floor", rk_optax.descent_control(1e-10), 1e13 * w),
        ("wrong sign", rk_optax.descent_control(1e-10), -1e13 * w),
    ):
        tx = rk_optax.euler(stiff, rule)
        update, state, reasons = jax.jit(tx.update), tx.init(w), []
        for _ in range(30):
            _, state = update(gradient, state, w)
            reasons.append(Reason(int(state.reason)))
        seen[name] = reasons
    assert seen["floor"][-1] == Reason.SMALLEST_STEP  # hλ = 10 there
    assert "lower min_step_size" in seen["floor"][-1].message
    assert Reason.ACCEPTED in seen["no floor"]
    # However short; in the end only steps that change no digit of the loss are taken.
    assert Reason.NOT_DOWNHILL in seen["wrong sign"]
    assert sum(reason == Reason.ACCEPTED for reason in seen["wrong sign"]) < 15


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("factory", ["rk4", "ros2", pytest.param("rkc", marks=pytest.mark.slow)])
def test_descent_control_does_not_stay_where_the_losses_resolve_nothing(factory):
    """Least squares in units in which the first h is 10⁷ times too short, from 60 draws; the optimum is NumPy's."""
    make = {
        "rk4": lambda loss: rk_optax.rk4(loss, rk_optax.descent_control()),
        "ros2": lambda loss: rk_optax.ros2(loss, rk_optax.descent_control()),
        "rkc": rk_optax.rkc,
    }[factory]
    loss = LeastSquares(lambda w, a, b: 1e-3 * (a @ w - b))
    tx = make(loss)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 20, 6)), rng.normal(size=(60, 20))

    @jax.jit
    @jax.vmap
    def run(a, b):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w, a, b), state, w, a=a, b=b)
            return (w + updates, state), None

        w = jnp.zeros(6)
        return jax.lax.scan(step, (w, tx.init(w)), length=400)[0][0]

    w = run(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    left = np.einsum("nij,nj->ni", a, w) - b
    best = [np.linalg.lstsq(a, b, rcond=None)[1][0] for a, b in zip(a, b, strict=True)]
    np.testing.assert_allclose(np.sum(left**2, axis=1), best, rtol=1e-5)


def test_after_convergence_a_step_costs_little():
    """In float32, in a matrix whose rounding shows in the gradient: h does not grow until the losses show something."""
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))[0].astype(np.float32)
    matrix = jnp.asarray((axes * np.geomspace(0.01, 1, 40).astype(np.float32)) @ axes.T)

    def loss(w):
        return 1 + 0.5 * jnp.sum((w - 1) * (matrix @ (w - 1)))

    tx = rk_optax.rkc(loss)

    @jax.jit
    def run(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (w + updates, state), (loss(w), state.cost.gradients)

        return jax.lax.scan(step, (w, tx.init(w)), length=1000)[1]

    losses, gradients = map(np.asarray, run(jnp.zeros(40)))
    assert losses[50] == 1
    assert gradients[-1] - gradients[400] < 10 * 599  # 220 a step, were h to grow until the losses show something


@pytest.mark.parametrize(("name", "count", "least"), [("rkc", 150, 2e-4), ("rk4", 15_000, 2e-3)])
def test_where_losses_drown_in_rounding_the_slopes_at_both_ends_decide(name, count, least):
    """A quadratic whose terms are far larger than itself. By the losses alone, ends were at 5e-4 and 0.2."""
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(60, 2))
    matrix = np.exp(-10 * np.sum((points[:, None] - points[None]) ** 2, axis=-1)) + 0.003 * np.eye(60)
    b = np.sin(6 * points[:, 0]) + 0.1 * rng.normal(size=60)
    best = np.linalg.solve(matrix, b)
    a, y = jnp.asarray(matrix, jnp.float32), jnp.asarray(b, jnp.float32)

    def loss(w):
        return 0.5 * w @ (a @ w) - y @ w

    tx = getattr(rk_optax, name)(loss, rk_optax.descent_control())

    @jax.jit
    def run(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (w + updates, state), None

        return jax.lax.scan(step, (w, tx.init(w)), length=count)[0][0]

    gap = np.asarray(run(jnp.zeros(60)), float) - best
    assert np.sqrt(gap @ matrix @ gap / (best @ matrix @ best)) < least


# --- strict modes ---


@pytest.mark.covering(most=2)
@every_rule
def test_no_state_and_no_step_holds_a_nan_and_nothing_is_promoted(name):
    w = jnp.array([1.0, -2.0])
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        tx, loss = optimizer(name), loss_of(name)
        state = tx.init(w)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        for gradient in (jax.grad(loss)(w), jnp.zeros(2)):
            updates, state = jax.jit(tx.update)(gradient, state, w)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioners_promote_nothing(name):
    w = jnp.array([1.0, -2.0])
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        tx = rk_optax.heun(quadratic, 0.1, preconditioner=PRECONDITIONERS[name])
        for gradient in (jax.grad(quadratic)(w), jnp.zeros(2)):
            updates, _ = jax.jit(tx.update)(gradient, tx.init(w), w)
            assert np.isfinite(updates).all()


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("name", ["rms", "adam", "hutchinson"])
def test_counters_saturate(name):
    w, most = jnp.ones(2), jnp.iinfo(jnp.int32).max
    tx = rk_optax.euler(quadratic, 0.1, preconditioner=PRECONDITIONERS[name])
    state = jax.tree.map(lambda x: jnp.full_like(x, most) if x.dtype == jnp.int32 else x, tx.init(w).preconditioner)
    _, after = jax.jit(tx.update)(jax.grad(quadratic)(w), tx.init(w)._replace(preconditioner=state), w)
    counters = [leaf for leaf in jax.tree.leaves(after.preconditioner) if leaf.dtype == jnp.int32]
    assert counters
    assert all(int(leaf) == most for leaf in counters)


def test_counts_of_updates_and_costs_stay_at_the_largest_integer():
    w, most = jnp.ones(2), jnp.iinfo(jnp.int32).max
    tx = rk_optax.rkc(quadratic)
    state = jax.tree.map(lambda x: jnp.full_like(x, most) if x.dtype == jnp.int32 else x, tx.init(w))
    state = state._replace(rule=state.rule._replace(next_step_size=jnp.float32(1e6)))  # which is refused
    _, after = jax.jit(tx.update)(jax.grad(quadratic)(w), state, w)
    assert not bool(after.accepted)
    assert [int(n) for n in (after.count, after.rejected, *after.cost)] == [most] * 6


# --- reverse mode ---


def check_gradient(function, at):
    """Reverse mode against central differences, in float64."""
    found = jax.jit(jax.grad(function))(at)
    assert np.isfinite(found).all()
    value, h = jax.jit(function), 1e-5
    differences = [(value(at + h * e) - value(at - h * e)) / (2 * h) for e in np.eye(len(at))]
    np.testing.assert_allclose(found, differences, rtol=1e-6, atol=1e-8)


def bent(w):
    """One number that it does not see."""
    return jnp.sum(CURVATURE * w[:2] ** 2) + w[0] ** 3 / 3 + jnp.cos(w[1])


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("trust_ratio", "dal, clipped")])
def test_the_gradient_through_two_updates_is_right(name, x64):
    def end(x):
        w, state = steps(optimizer(name, bent, unit=x[3]), bent, x[:3], 2)
        return jnp.sum(jnp.sin(w)) + state.step_size

    check_gradient(end, jnp.array([0.4, -0.3, 0.2, 0.2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_the_gradient_through_a_preconditioner_is_right_where_a_coordinate_has_no_gradient(name, x64):
    tx = rk_optax.heun(bent, 0.1, preconditioner=PRECONDITIONERS[name])

    def end(w):
        return jnp.sum(jnp.sin(steps(tx, bent, w, 2)[0]))

    check_gradient(end, jnp.array([0.4, -0.3, 0.2]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "trust_ratio"])
def test_the_gradient_is_finite_where_the_losses_is_zero(name, x64):
    """At the minimum each update is 0 for any h, and so has the derivative −h·H there."""
    tx = optimizer(name)
    found = jax.jit(jax.jacobian(lambda w: first_update(tx, quadratic, w)[0]))(jnp.zeros(2))
    h = float(first_update(tx, quadratic, jnp.zeros(2))[1].step_size)
    z = h * CURVATURE.astype(float)
    expected = -z if name == "sgd_g2" else -z + z**2 / 2
    np.testing.assert_allclose(found, np.diag(expected), rtol=1e-9, atol=1e-12)
