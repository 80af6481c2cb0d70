"""`linear_solver=`: GMRES against dense algebra, and implicit solvers on fields whose Jacobian is not symmetric."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate

import rk_optax
from rk_optax import IMPLICIT_TABLEAUS, ConjugateGradients, Gmres, Implicit, Ros2, RosenbrockEuler
from rk_optax.solver._linear import gmres

# --- GMRES against dense algebra -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("restart", "tolerance", "most"))
def solved(matrix, b, scale, restart, tolerance, most):
    def product(x):  # on a tree of two leaves
        moved = matrix @ jnp.concatenate([x["a"], x["b"].ravel()])
        return {"a": moved[:3], "b": moved[3:].reshape(x["b"].shape)}

    tree, scale = ({"a": v[:3], "b": v[3:].reshape(2, -1)} for v in (b, scale))
    found = gmres(product, tree, scale, restart=restart, tolerance=tolerance, max_iterations=most)
    return found._replace(x=jnp.concatenate([found.x["a"], found.x["b"].ravel()]))


def systems(size=9, seed=0):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(size, size))
    return (
        {
            "skew": 5 * (root - root.T),
            "monotone": root @ root.T + 3 * (root - root.T),
            "any": root,
        },
        rng.normal(size=size),
        rng.uniform(0.2, 3.0, size=size),
    )


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["skew", "monotone", "any"])
@pytest.mark.parametrize("precondition", [False, True])
def test_gmres_solves_as_numpy_does(name, precondition, x64):
    matrices, b, scale = systems()
    scale = scale if precondition else np.ones(9)
    whole = np.eye(9) + scale[:, None] * matrices[name]
    found = solved(matrices[name], b, scale, 9, 1e-12, 9)
    np.testing.assert_allclose(found.x, np.linalg.solve(whole, b), rtol=1e-9, atol=1e-11)
    assert bool(found.converged)
    assert bool(found.usable)
    assert int(found.iterations) == 10  # one of them to make sure
    # Stopped before, it reports what is left: the least residual of the Krylov space, by dense least squares.
    root = np.sqrt(scale)
    inner, start = np.eye(9) + root[:, None] * matrices[name] * root, b / root
    space = np.stack([np.linalg.matrix_power(inner, k) @ start for k in range(4)], axis=1)
    least = np.linalg.lstsq(inner @ space, start, rcond=None)[0]
    short = solved(matrices[name], b, scale, 9, 1e-12, 4)
    np.testing.assert_allclose(short.x, root * (space @ least), rtol=1e-7, atol=1e-9)
    left = np.linalg.norm(start - inner @ (short.x / root)) / np.linalg.norm(start)
    assert float(short.residual) == pytest.approx(left, rel=1e-9)
    assert int(short.iterations) == 4
    assert not bool(short.converged)
    assert not bool(short.usable)
    # ⟨x, b − Ax⟩/‖b‖² in the metric, which a model of the loss's fall corrects by.
    overlap = (short.x / root) @ (start - inner @ (short.x / root)) / (start @ start)
    assert float(short.overlap) == pytest.approx(float(overlap), rel=1e-6, abs=1e-12)


def test_restarts_converge_on_a_monotone_system_and_count_every_product(x64):
    matrices, b, _ = systems()
    matrix = 0.1 * matrices["monotone"]
    found = solved(matrix, b, np.ones(9), 3, 1e-8, 500)
    np.testing.assert_allclose(found.x, np.linalg.solve(np.eye(9) + matrix, b), rtol=1e-6)
    assert bool(found.converged)
    assert 9 < int(found.iterations) < 500


def test_a_singular_system_is_not_solved_and_one_that_has_a_solution_is():
    """I + C with C = −1 on the first number: b must not have that part."""
    matrix = np.diag(np.r_[-1.0, np.linspace(0.5, 2, 8)]).astype(np.float32)
    without, b = np.ones(9, np.float32), np.ones(9, np.float32)
    without[0] = 0
    for seen in (False, True):
        found = solved(matrix, b if seen else without, np.ones(9, np.float32), 9, 1e-4, 60)
        assert bool(found.converged) != seen
        assert int(found.iterations) < 60  # the space ends, and so does the iteration
        if seen:
            left = np.linalg.norm(b - (1 + np.diag(matrix)) * found.x) / 3
            assert float(found.residual) == pytest.approx(float(left), rel=0.1)
            assert left > 0.3
        else:
            np.testing.assert_allclose(found.x[1:], 1 / (1 + np.diag(matrix)[1:]), rtol=1e-3)


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_in_float32_the_units_of_the_right_hand_side_do_not_matter(unit):
    matrices, b, scale = systems()
    b = b.astype(np.float32)
    matrix = (1e3 * matrices["monotone"]).astype(np.float32)  # stiff: a condition number of some 1e4
    found = solved(matrix, np.float32(unit) * b, scale.astype(np.float32), 9, 1e-4, 9)
    exact = np.linalg.solve(np.eye(9) + scale[:, None] * matrix.astype(float), b.astype(float))
    np.testing.assert_allclose(found.x / np.float32(unit), exact, rtol=3e-2, atol=1e-6)
    assert bool(found.converged)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_does_not_pass_for_a_solution(bad):
    b = np.ones(9, np.float32)
    identity, ones = np.eye(9, dtype=np.float32), np.ones(9, np.float32)
    broken = identity.copy()
    broken[0, 0] = bad
    for matrix, right in ((broken, b), (identity, bad * b)):
        found = solved(matrix, right, ones, 9, 1e-4, 60)
        assert not bool(found.converged)
    nothing = solved(identity, 0 * b, ones, 9, 1e-4, 60)
    np.testing.assert_array_equal(nothing.x, 0)
    assert bool(nothing.converged)


# --- Solvers ---------------------------------------------------------------------------------------------------------

GMRES = Gmres()
SOLVERS = {
    **{
        name: Implicit(tableau, tolerance=1e-12, max_linear_iterations=40, linear_solver=GMRES)
        for name, tableau in IMPLICIT_TABLEAUS.items()
    },
    "rosenbrock_euler": RosenbrockEuler("hessian", 1e-12, linear_solver=GMRES),
    "ros2": Ros2("hessian", 1e-12, linear_solver=GMRES),
}
ORDERS = {name: t.order for name, t in IMPLICIT_TABLEAUS.items()} | {"rosenbrock_euler": 1, "ros2": 2}


def stability(name, z):
    """R(z) of the method, from the tableau's own matrix, or of the two linearly implicit ones by their formulas."""
    if name == "rosenbrock_euler":
        return 1 / (1 - z)
    if name == "ros2":
        gamma = 1 - 1 / np.sqrt(2)
        return (1 + (1 - 2 * gamma) * z + (0.5 - 2 * gamma + gamma**2) * z**2) / (1 - gamma * z) ** 2
    tableau = IMPLICIT_TABLEAUS[name]
    return 1 + z * tableau.b @ np.linalg.solve(np.eye(len(tableau.b)) - z * tableau.a, np.ones(len(tableau.b)))


BILINEAR = {"x": lambda p: p["x"] * p["y"], "y": lambda p: -p["x"] * p["y"]}


def step_of(losses, h, solver, params, **options):
    tx = rk_optax.game(losses, h, solver, **options)
    updates, state = jax.jit(tx.update)(tx.grad(params), tx.init(params), params)
    return optax.apply_updates(params, updates), state


FAST = ("implicit_midpoint", "sdirk3", "radau3", "ros2")
OF_EACH = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in SOLVERS]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", OF_EACH)
def test_a_step_of_the_bilinear_game_is_that_of_the_stability_function(name, x64):
    h = 1.7
    moved, state = step_of(BILINEAR, h, SOLVERS[name], {"x": jnp.array(0.6), "y": jnp.array(-0.8)})
    z = (float(moved["x"]) + 1j * float(moved["y"])) / (0.6 - 0.8j)
    assert z == pytest.approx(stability(name, 1j * h), rel=1e-11)
    assert bool(state.accepted)
    if name in ("implicit_midpoint", "trapezoid", "gauss4"):  # what the flow conserves, to rounding
        assert abs(abs(z) - 1) < 1e-14


def payoff(p):
    return jnp.sum(jnp.sin(p["x"]) * p["y"]) + 0.2 * jnp.sum(p["x"] ** 2) ** 2 - 0.1 * jnp.sum(jnp.cosh(p["y"]))


CURVED = {"x": payoff, "y": lambda p: -payoff(p)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_the_order_is_kept_on_a_game_that_is_not_linear(name, x64):
    start = {"x": jnp.array([0.9, -0.4]), "y": jnp.array([0.3, 1.1])}

    def field(t, z):
        x, y = z[:2], z[2:]
        return np.r_[-(np.cos(x) * y + 0.8 * np.sum(x**2) * x), np.sin(x) - 0.1 * np.sinh(y)]

    errors = []
    for h in (0.05, 0.025):
        moved, _ = step_of(CURVED, h, SOLVERS[name], start)
        begin = np.r_[0.9, -0.4, 0.3, 1.1]
        exact = scipy.integrate.solve_ivp(field, (0, h), begin, method="DOP853", rtol=1e-13, atol=1e-14)
        errors.append(np.linalg.norm(np.r_[moved["x"], moved["y"]] - exact.y[:, -1]))
    assert np.log2(errors[0] / errors[1]) > ORDERS[name] + 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rosenbrock_euler", pytest.param("radau3", marks=pytest.mark.slow)])
def test_on_the_gradient_of_a_loss_both_linear_solvers_make_the_same_step(name, x64):
    def loss(w):
        return jnp.sum(jnp.cosh(jnp.array([1.0, 2.0, 3.0]) * w)) + jnp.sum(w) ** 2

    w = jnp.array([0.5, -0.3, 0.2])
    steps = []
    for linear_solver in (ConjugateGradients(), Gmres()):
        solver = RosenbrockEuler("hessian", 1e-12, linear_solver=linear_solver)
        if name == "radau3":
            solver = Implicit(IMPLICIT_TABLEAUS[name], tolerance=1e-12, linear_solver=linear_solver)
        tx = rk_optax.runge_kutta(loss, 0.7, solver, preconditioner=rk_optax.precondition_by_adagrad())
        updates, state = jax.jit(tx.update)(jax.grad(loss)(w), tx.init(w), w)
        assert bool(state.accepted)
        steps.append(updates)
    np.testing.assert_allclose(*steps, rtol=1e-8)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["backward_euler", "rosenbrock_euler", pytest.param("gauss4", marks=pytest.mark.slow)])
def test_a_system_that_is_not_solved_is_refused(name):
    """Twelve speeds of rotation and two products: the Krylov space is far too small."""
    speeds = jnp.linspace(1.0, 40.0, 12)
    losses = {"x": lambda p: jnp.sum(speeds * p["x"] * p["y"]), "y": lambda p: -jnp.sum(speeds * p["x"] * p["y"])}
    params = {"x": jnp.ones(12), "y": jnp.linspace(-1.0, 1.0, 12)}
    few = Gmres(restart=2)
    solver = RosenbrockEuler("hessian", 1e-4, 2, linear_solver=few)
    if name in IMPLICIT_TABLEAUS:
        solver = Implicit(IMPLICIT_TABLEAUS[name], max_iterations=3, max_linear_iterations=2, linear_solver=few)
    moved, state = step_of(losses, 1.0, solver, params)
    assert rk_optax.Reason(int(state.reason)) is rk_optax.Reason.NOT_SOLVED
    np.testing.assert_array_equal(moved["x"], params["x"])


def test_the_aliases_take_a_linear_solver_and_mistakes_are_named():
    field = rk_optax.SmoothField(lambda p: {"x": p["y"], "y": -p["x"]})
    for alias in (rk_optax.ros2, rk_optax.rosenbrock_euler):
        alias(None, 0.1, curvature="hessian", grad_fn=field, linear_solver=Gmres())
        with pytest.raises(ValueError, match=r"'symmetric'.*linear_solver=rk_optax.Gmres\(\)"):
            alias(None, 0.1, curvature="hessian", grad_fn=field)
    with pytest.raises(TypeError, match=r"linear_solver must be a LinearSolver.*got Gmres; pass an instance"):
        Implicit(IMPLICIT_TABLEAUS["sdirk2"], linear_solver=Gmres)
    with pytest.raises(TypeError, match=r"linear_solver must be a LinearSolver.*got str"):
        Ros2("hessian", linear_solver="gmres")
    with pytest.raises(ValueError, match="restart must be an integer of at least 1"):
        Gmres(restart=0)
    with pytest.raises(ValueError, match="the steps of all h from one factorisation"):
        rk_optax.rosenbrock_euler(lambda w: w**2, rk_optax.path_control(), curvature="hessian", linear_solver=Gmres())
