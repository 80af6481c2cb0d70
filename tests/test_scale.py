"""Nothing but units: scaling the loss, the parameters or a leaf that the loss does not see changes no step.

In float32, over every optimizer and every rule. h goes with the inverse of the loss, and so does what a rule measures.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from registry import ALIASES, RULES

import rk_optax

pytestmark = pytest.mark.latest

POINTS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
TARGETS = np.linspace(-1, 1, 6).astype(np.float32)
START = np.array([0.5, -0.3, 0.8, 0.1], np.float32)
H = 0.1
SCALES = (1e-25, 1e-12, 1e12, 1e25)


def residuals(params, unit, length):
    return unit * (jnp.tanh(POINTS @ (params["w"] / length)) - TARGETS)


LOSS = rk_optax.LeastSquares(residuals)


# And what an optimizer does by another way.
OPTIMIZERS = ALIASES | {
    f"{name}, {way}": functools.partial(ALIASES[name], **options)
    for name, way, options in (
        ("rosenbrock_euler", "hessian", {"curvature": "hessian"}),
        ("rosenbrock_euler", "secant", {"curvature": "secant"}),
        ("rosenbrock_euler", "diagonal", {"curvature": "diagonal"}),
        ("rosenbrock_euler", "gmres", {"curvature": "hessian", "linear_solver": rk_optax.Gmres()}),
        ("ros2", "secant", {"curvature": "secant"}),
        ("residual_euler", "products", {"max_rows": 1}),
        ("residual_euler", "inertia", {"inertia": 0.5}),
        ("rkc", "order 2", {"order": 2}),
    )
}


def builds(optimizer, rule):
    try:
        OPTIMIZERS[optimizer](LOSS, RULES[rule](H))
    except ValueError:
        return False
    return True


HIGH_ORDER = ("dopri5", "tsit5", "dopri8")

# A solver of each kind, and each rule; the others are slow.
QUICK = {("heun", rule) for rule in ("constant", "dal, difference", "dal, free")} | {
    *(("rosenbrock_euler", "trust"), ("ros2", "error"), ("euler", "sgd_g2"), ("residual_euler", "path")),
    *(("rkc", "descent"), ("backward_euler", "descent"), ("etdrk2", "dal"), ("rosenbrock_euler, secant", "search")),
}
COMBINATIONS = [
    pytest.param(*both, marks=[] if both in QUICK else pytest.mark.slow)
    for both in itertools.product(OPTIMIZERS, RULES)
    if builds(*both)
]


@functools.cache
def three_updates(optimizer, rule):
    """A compiled function of the loss's scale, the parameters' scale and the size of a leaf that the loss ignores."""

    @jax.jit
    def run(c, length, inert):
        # The error estimates of high order are above rounding where the steps are longer.
        longer = 4 if rule == "error" and optimizer in HIGH_ORDER else 1
        h = jnp.float32(longer * H) / c * length * length
        data = {"unit": jnp.sqrt(c), "length": length}
        tx = OPTIMIZERS[optimizer](LOSS, RULES[rule](h))
        params = {"w": length * START, "inert": inert * jnp.ones(2)}
        state = tx.init(params)

        def update(carry, _):
            params, state = carry
            change, state = tx.update(jax.grad(LOSS)(params, **data), state, params, **data)
            params = jax.tree.map(jnp.add, params, change)
            return (params, state), (change["w"] / length, change["inert"], state.accepted)

        return jax.lax.scan(update, (params, state), length=3)[1]

    return run


def tolerance(optimizer, rule):
    """1e-4, or as much as the rounding ε of gradients does to an h that comes from their difference.

    The free estimate r of the first step, of c/100, is the difference of stages that are a21·c/100 apart, and no other
    two are apart along the gradient alone. Its error is ε/(a21·c/100), and that of h = c/(1 + cr/2) is at most 50ε/a21.
    """
    if rule == "dal, difference":
        return 1e-3  # √ε
    if rule == "dal, free":
        return max(1e-4, 2.5 * 50 * float(np.finfo(np.float32).eps) / rk_optax.TABLEAUS[optimizer].a[1, 0])
    return 1e-4


@pytest.mark.parametrize(("optimizer", "rule"), COMBINATIONS)
def test_units_and_inert_leaves_change_no_step(optimizer, rule):
    """In the strict modes that are seen in the compiled function, too."""
    cases = [(c, 1.0, 1.0) for c in SCALES]
    cases += [(1.0, length, length) for length in (1e-12, 1e12)]
    cases += [(c, c, 1.0) for c in (1e-25, 1e25)]  # h is then a number of float32 too
    cases += [(1.0, 1.0, inert) for inert in (1e-20, 1e20)]
    run = three_updates(optimizer, rule)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        (expected, _, accepted), *results = (run(*case) for case in [(1.0, 1.0, 1.0), *cases])
    assert np.abs(expected[0]).max() > 1e-3
    wrong = []
    for case, (found, inert, taken) in zip(cases, results, strict=True):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        if not (error < tolerance(optimizer, rule) and np.all(taken == accepted) and not np.any(inert)):
            wrong.append((case, float(error), taken))
    assert not wrong, (
        f"The steps change with the units (of the loss, of the parameters, size of an inert leaf): {wrong}. Where the "
        "first of the three is 1e25 or 1e-25, a product of two gradients, or of a gradient and a direction, has left "
        "float32: take rk_optax._tree.norm, or unit before inner. A rule with an argument in units of its own belongs "
        "in no line of RULES in tests/registry.py, see CONTRIBUTING.md."
    )


# --- Closed forms ----------------------------------------------------------------------------------------------------


def first_update(tx, loss, params):
    return jax.jit(lambda p: tx.update(jax.grad(loss)(p), tx.init(p), p))(params)


@pytest.mark.parametrize("solver", ["backward_euler", rk_optax.RosenbrockEuler("hessian")])
def test_a_linear_system_whose_squares_underflow_is_solved(solver):
    def loss(w):
        return 1e-22 * jnp.sum((w - 1) ** 2)

    w = jnp.array([3.0, -1.0, 0.5])
    update, state = first_update(rk_optax.runge_kutta(loss, 1e22, solver), loss, w)
    assert bool(state.accepted)
    np.testing.assert_allclose(update, -2 / 3 * (w - 1), rtol=1e-5)


def test_a_row_space_system_of_small_residuals_is_solved():
    rng = np.random.default_rng(0)
    rows = 1e4 * np.linalg.qr(rng.normal(size=(20, 20)))[0] * np.geomspace(1, 1e-3, 20)
    residual, h = 1e-12 * rng.normal(size=20), 1e-3
    expected = -h * rows.T @ np.linalg.solve(np.eye(20) + h * rows @ rows.T, residual)
    assert 1e-14 < np.linalg.norm(expected) < 1e-13
    loss = rk_optax.LeastSquares(lambda w: rows.astype(np.float32) @ w + residual.astype(np.float32))
    # CG leaves a residual of 1e-3, in a matrix of condition 1e5.
    by_products = (rk_optax.ResidualEuler(max_rows=1), rk_optax.RosenbrockEuler())
    for solver, close in ((rk_optax.ResidualEuler(), 1e-3), *((solver, 0.05) for solver in by_products)):
        update, state = first_update(rk_optax.runge_kutta(loss, h, solver), loss, jnp.zeros(20))
        assert bool(state.accepted)
        assert np.linalg.norm(update - expected) < close * np.linalg.norm(expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_step_however_long_is_the_gauss_newton_step_or_refused(count):
    """In the space of the residuals and in that of the parameters."""
    w = jnp.array([0.5, -2.0])

    def residuals(w):
        return jnp.stack([w[0] - 1, 2 * (w[1] - 0.3 * w[0] ** 2), w[0] + w[1]])[:count]

    loss = rk_optax.LeastSquares(residuals)

    @jax.jit
    def update(h):
        return first_update(rk_optax.residual_euler(loss, h), loss, w)

    jacobian, residual = jax.jit(lambda w: (jax.jacobian(residuals)(w), residuals(w)))(w)
    expected = -np.linalg.lstsq(jacobian, residual, rcond=None)[0]
    for h in (1e10, 1e20, 1e31):
        found, state = update(h)
        assert bool(state.accepted)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    found, state = update(1e37)  # g* is the step over h, and no number of float32 any more
    assert int(state.reason) == rk_optax.Reason.NOT_SOLVED
    assert not np.any(found)


@pytest.mark.parametrize("kind", ["rkc1", "rkc2", "rkl2"])
def test_the_spectral_radius_does_not_depend_on_what_the_loss_does_not_see(kind):
    """1.2 of the largest curvature, 229.5, beside an inert leaf of 1e6, for parameters of size 1e-6, and so on.

    That of Σ λ s² log cosh(w/s), for parameters of size s, is λ at 0 and gone at some lengths of s from there.
    """
    rates = jnp.array([1.0, 30.0, 191.25])

    @jax.jit
    @jax.vmap
    def radius(size, inert):
        def loss(params):
            w = params["w"] / size
            return jnp.sum(rates * (jnp.logaddexp(w, -w) - jnp.log(2))) * size**2

        params = {"w": size * jnp.array([0.03, -0.03, 0.03]), "inert": jnp.full(5, inert)}
        tx = rk_optax.runge_kutta(loss, 1e-3, rk_optax.Stabilized(kind))
        return tx.update(jax.grad(loss)(params), tx.init(params), params)[1].solver.spectral_radius

    found = radius(jnp.array([1.0, 1e-6, 1.0, 1.0, 1e-15, 1e15]), jnp.array([1e6, 1.0, 0.0, 1e20, 1e20, 1.0]))
    np.testing.assert_allclose(found, 1.2 * 191.25, rtol=0.05)


IMPLICIT = {
    "backward_euler": ([[1.0]], [1.0]),
    "gauss4": ([[0.25, 0.25 - np.sqrt(3) / 6], [0.25 + np.sqrt(3) / 6, 0.25]], [0.5, 0.5]),
}


@pytest.mark.parametrize("solver", IMPLICIT)
def test_newtons_iteration_is_not_cut_short_by_what_the_loss_does_not_see(solver):
    """Of Σ λ log cosh(w - 1), for which it takes several corrections; scipy solves for the stages of each number."""
    a, b = map(np.array, IMPLICIT[solver])
    rates, start, h = np.array([1.0, 20.0, 100.0]), np.array([3.0, -0.2, 1.6]), 0.1

    def loss(params):
        w = params["w"] - 1
        return jnp.sum(jnp.asarray(rates, jnp.float32) * (jnp.logaddexp(w, -w)))

    @jax.jit
    @jax.vmap
    def update(inert):
        params = {"w": jnp.asarray(start, jnp.float32), "inert": jnp.full(2, inert)}
        tx = rk_optax.runge_kutta(loss, h, solver)
        change, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
        return change["w"], state.accepted, state.solver.iterations

    expected = []
    for rate, w in zip(rates, start, strict=True):

        def defect(k, rate=rate, w=w):
            return k - rate * np.tanh(w - h * a @ k - 1)

        expected.append(-h * b @ scipy.optimize.root(defect, 0 * b, tol=1e-13).x)
    found, accepted, iterations = update(jnp.array([0.0, 1e4, 1e20]))
    assert accepted.all()
    assert (iterations > 1).all()
    assert (np.linalg.norm(found - np.array(expected), axis=1) < 1e-4 * np.linalg.norm(expected)).all()


@pytest.mark.parametrize("estimate", ["product", "difference"])
def test_the_curvature_that_dal_sees_has_the_unit_of_the_loss_alone(estimate):
    """Of c·Σ λ log cosh w, which is c·Σ λw²/2 near 0, beside an inert leaf; 2c, as of c·Σw², for λ = 2 near 0."""
    several, w = np.array([[1.0, 30.0, 300.0], [2.0, 2.0, 2.0]]), np.array([0.02, -0.04, 0.01])
    gradient, curvature = several * np.tanh(w), several / np.cosh(w) ** 2
    expected = np.linalg.norm(curvature * gradient, axis=1) / np.linalg.norm(gradient, axis=1)
    assert expected[1] == pytest.approx(2, rel=2e-3)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def ratio(rates, c, inert):
        def loss(params):
            return c * jnp.sum(rates * (jnp.logaddexp(params["w"], -params["w"]) - jnp.log(2)))

        params = {"w": jnp.asarray(w, jnp.float32), "inert": jnp.full(5, inert)}
        tx = rk_optax.rk4(loss, rk_optax.dal(0.1 / c, estimate=estimate))
        return tx.update(jax.grad(loss)(params), tx.init(params), params)[1].rule.ratio / c

    units, inert = jnp.array([1.0, 1e-11, 1e10, 1e-25, 1e25, 1.0, 1.0]), jnp.array([1.0] * 5 + [1e6, 1e20])
    found = ratio(jnp.asarray(several, jnp.float32), units, inert)
    expected = np.broadcast_to(expected, found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5 if estimate == "product" else 1e-2)


def test_what_a_leaf_of_another_size_hides_is_still_solved():
    """The loss sees both leaves; the one of size 1e4 has next to no curvature."""

    def loss(params):
        return 0.5 * jnp.sum(300 * params["w"] ** 2) + 0.5e-8 * jnp.sum(params["v"] ** 2)

    params = {"w": jnp.array([1e-3, -2e-3]), "v": jnp.full(2, 1e4)}
    tx = rk_optax.runge_kutta(loss, 0.1, rk_optax.Stabilized("rkc1"))
    assert float(first_update(tx, loss, params)[1].solver.spectral_radius) == pytest.approx(360, rel=0.05)
    update, state = first_update(rk_optax.backward_euler(loss, 0.1), loss, params)
    assert bool(state.accepted)
    np.testing.assert_allclose(update["w"], -30 / 31 * params["w"], rtol=1e-4)
