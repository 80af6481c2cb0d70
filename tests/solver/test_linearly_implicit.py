"""Linearly implicit steps: against direct solves, scipy's flow and the closed form on quadratics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from curve_fit import THETA, abscissae, curve, effective_gradient, misfit, values
from jax.flatten_util import ravel_pytree
from training import FixedScale

import rk_optax
from rk_optax import LeastSquares, ModelLoss, Reason, ResidualEuler, Ros2, RosenbrockEuler
from rk_optax.objective import Objective
from rk_optax.parameter_view import ParameterView

pytestmark = pytest.mark.latest


def softplus_misfit(outputs):
    """Convex in the outputs, and not quadratic."""
    return jnp.sum(jnp.logaddexp(outputs - values(), values() - outputs))


LOSSES = {
    "least squares": LeastSquares(misfit),
    "split": ModelLoss(lambda params: curve(params, abscissae()), softplus_misfit),
}


def flat(params=THETA):
    return ravel_pytree(jax.tree.map(jnp.asarray, params))


@functools.lru_cache
def derivatives(loss):
    """Gradient, Hessian and Gauss–Newton matrix as a compiled function of params and l2."""

    def found(params, l2):
        theta, unravel = ravel_pytree(params)

        def outputs(t):
            params = unravel(t)
            return ravel_pytree(misfit(params))[0] if isinstance(loss, LeastSquares) else curve(params, abscissae())

        of_outputs = (lambda r: 0.5 * r @ r) if isinstance(loss, LeastSquares) else softplus_misfit
        jacobian = jax.jacfwd(outputs)(theta)

        def full(t):
            return of_outputs(outputs(t)) + 0.5 * l2 * t @ t

        gauss_newton = jacobian.T @ jax.hessian(of_outputs)(outputs(theta)) @ jacobian + l2 * jnp.eye(len(theta))
        return jax.grad(full)(theta), jax.hessian(full)(theta), gauss_newton

    return jax.jit(found)


def matrices(loss, l2=0.0):
    """Gradient, Hessian and Gauss–Newton matrix at THETA, from jacobians of the flattened loss."""
    return [np.asarray(m, np.float64) for m in derivatives(loss)(jax.tree.map(jnp.asarray, THETA), l2)]


def bound(loss, solver, params=THETA, l2=None):
    """The problem and its gradient at params."""
    params = jax.tree.map(jnp.asarray, params)
    problem = Objective(loss, needs=solver.needs, l2=l2).bind({}, ParameterView.of(params, stage_dtype=None))
    return problem, params, problem(params)


def scaled_by(diagonal):
    """A preconditioner with this P, a flat vector in the order of THETA."""
    return FixedScale(flat()[1](jnp.asarray(diagonal)))


P = np.array([0.5, 2.0, 0.1, 3.0])
exact = functools.partial(dict, tolerance=1e-13, max_iterations=40)


# --- linearly implicit Euler is the direct solve ---


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("l2", [None, 0.3])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("which", ["hessian", "gauss_newton", "split gauss_newton", "residual"])
def test_a_step_solves_the_linear_system(which, preconditioned, l2, x64):
    loss = LOSSES["split" if "split" in which else "least squares"]
    gradient, hessian, gauss_newton = matrices(loss, l2 or 0.0)
    matrix = hessian if which == "hessian" else gauss_newton
    scale = P if preconditioned else np.ones(4)
    solver = ResidualEuler() if which == "residual" else RosenbrockEuler(which.split()[-1], **exact())
    options = {"preconditioner": scaled_by(P)} if preconditioned else {}
    params = jax.tree.map(jnp.asarray, THETA)

    @jax.jit
    def step(h):
        tx = rk_optax.scale_by_rk(loss, lambda count: h, solver, l2=l2, **options)
        return ravel_pytree(tx.update(jax.grad(loss)(params), tx.init(params), params)[0])[0]

    compared = 0
    for h in (0.0, 0.03, 0.2, 1.0, 40.0):
        system = np.eye(4) + h * scale[:, None] * matrix
        if np.linalg.eigvals(system).real.min() > 0:  # an indefinite one is not CG's to solve
            np.testing.assert_allclose(step(h), np.linalg.solve(system, scale * gradient), rtol=1e-9, atol=1e-10)
            compared += 1
    assert compared == 5 or which == "hessian"
    assert compared >= 2


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("h", [1e6, 1e12])
def test_a_very_long_step_is_gauss_newtons(h, x64):
    loss = LOSSES["least squares"]
    gradient, _, gauss_newton = matrices(loss)
    found, _ = effective_gradient(loss, h, ResidualEuler())
    np.testing.assert_allclose(h * found, np.linalg.solve(gauss_newton, gradient), rtol=1e-3 if h < 1e9 else 1e-4)


@pytest.mark.slow
def test_more_residuals_than_rows_allowed_are_solved_by_cg(x64):
    loss = LOSSES["least squares"]
    direct, state = effective_gradient(loss, 2.0, ResidualEuler(max_rows=4))  # of the four parameters
    assert (int(state.cost.rows), int(state.cost.products), int(state.solver.iterations)) == (9, 0, 1)  # a check
    assert int(state.solver.form) == 1
    by_cg, state = effective_gradient(loss, 2.0, ResidualEuler(max_rows=3, tolerance=1e-12))
    assert (int(state.cost.rows), int(state.solver.form)) == (0, 2)
    assert int(state.cost.products) == int(state.solver.iterations) > 0
    np.testing.assert_allclose(by_cg, direct, rtol=1e-9)


@pytest.mark.covering
@pytest.mark.parametrize("h", [1.0, 1e6])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30)], ids=["rows", "parameters"])
def test_the_residual_in_the_state_is_that_of_the_step_also_where_the_rows_depend_on_each_other(shape, h):
    """Of rank 10 in float32, where the one that CG carries along ends a thousand times below it."""
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(shape[0], 10)) @ rng.normal(size=(10, shape[1]))).astype(np.float32)
    values = rng.normal(size=shape[0]).astype(np.float32)
    loss = LeastSquares(lambda params: rows @ params["w"] + values)
    found, state = effective_gradient(loss, h, ResidualEuler(), {"w": np.zeros(shape[1], np.float32)})
    matrix, right = rows.astype(float), rows.T.astype(float) @ values
    wrong = np.linalg.norm(found + h * matrix.T @ (matrix @ found.astype(float)) - right) / np.linalg.norm(right)
    assert 0.5 * wrong < float(state.solver.residual) < 2 * wrong + 1e-6


@pytest.mark.covering
@pytest.mark.parametrize("reached", [0.0, 1.0], ids=["no Jacobian", "orthogonal to its range"])
@pytest.mark.parametrize("count", [3, 8], ids=["rows", "parameters"])
def test_where_no_step_lowers_the_residuals_cg_leaves_at_once(count, reached):
    rows = np.zeros((count, 5), np.float32)
    rows[0] = reached * np.arange(1, 6)
    values = np.eye(count, dtype=np.float32)[1]
    loss = LeastSquares(lambda params: rows @ params["w"] + values)
    found, state = effective_gradient(loss, 10.0, ResidualEuler(), {"w": np.zeros(5, np.float32)})
    np.testing.assert_array_equal(found, 0)
    assert int(state.solver.iterations) <= 1


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("solver", [ResidualEuler(), RosenbrockEuler(**exact())], ids=["rows", "cg"])
def test_complex_leaves_are_pairs_of_reals(solver, x64):
    z = np.array([1.0 + 0.5j, -0.3 + 2.0j])

    def residuals(params):
        u, v = params["z"]
        return jnp.stack([jnp.real(u * v), jnp.imag(u) - 0.5, jnp.abs(v) ** 2, jnp.real(u) + jnp.imag(v)])

    def of_pairs(t):
        return residuals({"z": t[:2] + 1j * t[2:]})

    pairs = np.concatenate([z.real, z.imag])
    jacobian, r = map(np.asarray, jax.jit(lambda t: (jax.jacfwd(of_pairs)(t), of_pairs(t)))(pairs))
    expected = np.linalg.solve(np.eye(4) + 0.7 * jacobian.T @ jacobian, jacobian.T @ r)
    found, _ = effective_gradient(LeastSquares(residuals), 0.7, solver, {"z": z})
    np.testing.assert_allclose(found, expected[:2] + 1j * expected[2:], rtol=1e-10)


def test_fixed_leaves_stay_out_of_the_system(x64):
    loss, mask = LOSSES["least squares"], {"a": True, "b": False}
    gradient, _, gauss_newton = matrices(loss)
    expected = np.linalg.solve(np.eye(2) + 2.0 * gauss_newton[:2, :2], gradient[:2])
    for solver in (ResidualEuler(), RosenbrockEuler(**exact())):
        found, _ = effective_gradient(loss, 2.0, solver, mask=mask)
        np.testing.assert_allclose(found, [*expected, 0, 0], rtol=1e-9)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_stiff_modes_decay_at_once(curvature):
    rates = jnp.array([1e-2, 1.0, 1e6])
    loss = LeastSquares(lambda theta: jnp.sqrt(rates) * theta)
    theta = jnp.ones(3)
    for solver in (RosenbrockEuler(curvature, 1e-6), ResidualEuler()):
        direction, _ = effective_gradient(loss, 1.0, solver, theta)
        np.testing.assert_allclose(theta - direction, 1 / (1 + rates), atol=1e-2)  # relative to a gradient of 1e6
        assert abs(theta[2] - direction[2]) < 2e-5


# --- the quadratic model ---


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("l2", [None, 0.3])
@pytest.mark.parametrize(
    "solver",
    [
        RosenbrockEuler("gauss_newton", **exact()),
        RosenbrockEuler("gauss_newton", 1e-13, 1),
        RosenbrockEuler("gauss_newton", 1e-13, 2),
        RosenbrockEuler("gauss_newton", 0.5),
        ResidualEuler(),
    ],
    ids=["solved", "one iteration", "two iterations", "loosely", "rows"],
)
@pytest.mark.parametrize("scale", [None, P], ids=["", "preconditioned"])
def test_the_predicted_fall_is_that_of_the_quadratic_model_also_when_cg_is_cut_short(solver, l2, scale, x64):
    loss, h = LOSSES["least squares"], 3.0
    problem, params, k1 = bound(loss, solver, l2=l2)
    if scale is not None:
        tree = flat()[1](jnp.asarray(scale))
        problem = problem.preconditioned(lambda g: jax.tree.map(jnp.multiply, tree, g), tree)
        k1 = problem(params)
    step = jax.jit(lambda params, k1: solver.step(problem, params, k1, h, solver.init(params)))(params, k1)
    gradient, _, matrix = matrices(loss, l2 or 0.0)
    moved = h * np.asarray(ravel_pytree(step.direction)[0])
    assert float(step.quantities["predicted_fall"]) == pytest.approx(
        gradient @ moved - 0.5 * moved @ matrix @ moved, rel=1e-8
    )


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("most", [1, 2, 100])
@pytest.mark.parametrize("l2", [None, 1e-7])
def test_the_predicted_fall_in_float32_is_that_of_the_step_where_rounding_swallows_the_identity(most, l2):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, 20)))[0] for size in (20, 30))
    rows, target = (left * np.geomspace(1, 1e-5, 20) @ right.T).astype(np.float32), np.ones(20, np.float32)
    loss, h = LeastSquares(lambda theta: rows @ theta - target), np.float32(1e8)
    solver = ResidualEuler(max_iterations=most)
    problem, theta, k1 = bound(loss, solver, jnp.zeros(30), l2=l2)
    step = jax.jit(lambda theta: solver.step(problem, theta, k1, h, solver.init(theta)))(theta)
    moved = float(h) * np.asarray(step.direction, float)
    fall = (
        0.5 * target @ target
        - 0.5 * np.sum((rows.astype(float) @ -moved - target) ** 2)
        - 0.5 * (l2 or 0) * moved @ moved
    )
    assert float(step.quantities["predicted_fall"]) == pytest.approx(fall, rel=2e-3)
    assert int(step.state.iterations) <= most


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("l2", [None, 1e-3])
@pytest.mark.parametrize("low", ["residuals", "parameters"])
def test_rows_of_less_precision_than_the_step_size(low, l2, x64):
    """The rule's h is float64 here, the parameters float32, or the residuals of a mixed-precision model bfloat16."""
    cast = jnp.bfloat16 if low == "residuals" else jnp.float32
    loss, theta = LeastSquares(lambda theta: (theta - 1).astype(cast)), jnp.zeros(3, jnp.float32)
    tx = rk_optax.residual_euler(loss, rk_optax.trust_ratio_control(), l2=l2)
    updates, state = jax.jit(tx.update)(jax.grad(loss)(theta), tx.init(theta), theta)
    assert updates.dtype == theta.dtype
    assert bool(state.accepted)
    np.testing.assert_allclose(updates, np.full(3, 1 / (2 + (l2 or 0))), rtol=1e-2)


@pytest.mark.slow
def test_nothing_moves_where_all_is_fixed():
    tx = rk_optax.residual_euler(LOSSES["least squares"], mask=False)
    params = jax.tree.map(jnp.asarray, THETA)
    updates, state = jax.jit(tx.update)(jax.jit(jax.grad(LOSSES["least squares"]))(params), tx.init(params), params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    assert bool(state.accepted)


def test_at_a_first_direction_of_negative_curvature_the_step_is_the_gradient_and_the_state_says_so(x64):
    def saddle(theta):
        return 0.5 * (theta[0] ** 2 - 4 * theta[1] ** 2)

    theta = jnp.array([0.1, 1.0])
    direction, state = effective_gradient(saddle, 1.0, RosenbrockEuler("hessian"), theta)
    np.testing.assert_allclose(direction, [0.1, -4.0])
    assert bool(state.solver.negative_curvature)
    _, state = effective_gradient(saddle, 0.2, RosenbrockEuler("hessian", 1e-10), theta)  # 1 − 0.2·4 > 0
    assert not bool(state.solver.negative_curvature)


@pytest.mark.slow
def test_the_error_estimate_of_ros2_is_its_distance_from_linearly_implicit_euler(x64):
    loss, h = LOSSES["least squares"], 0.4
    solver = Ros2(tolerance=1e-13)
    problem, params, k1 = bound(loss, solver)
    step = solver.step(problem, params, k1, h, solver.init(params), wants={"error"})
    gradient, _, matrix = matrices(loss)
    first = np.linalg.solve(np.eye(4) + (1 + 0.5**0.5) * h * matrix, gradient)
    expected = h * (np.asarray(ravel_pytree(step.direction)[0]) - first)  # θ̂ − θ₁, as for explicit pairs
    np.testing.assert_allclose(ravel_pytree(step.quantities["error"])[0], expected, rtol=1e-8, atol=1e-12)


# --- what it costs, and what the state says ---


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("solver", "gradients"),
    [(RosenbrockEuler("hessian"), 2), (RosenbrockEuler(), 2), (RosenbrockEuler("zero"), 1), (Ros2(), 3)],
    ids=["hessian", "gauss_newton", "zero", "ros2"],
)
def test_costs_are_gradients_and_a_product_for_each_iteration(solver, gradients, x64):
    _, state = effective_gradient(LOSSES["least squares"], 0.5, solver)
    products = 0 if solver.curvature == "zero" else int(state.solver.iterations)
    assert (int(state.cost.gradients), int(state.cost.products), int(state.cost.rows)) == (gradients, products, 0)
    assert float(state.solver.residual) <= solver.tolerance


@pytest.mark.slow
def test_a_bad_residual_is_refused_and_leaves_everything_as_it_was():
    loss = LeastSquares(lambda theta, x: theta - x)
    for factory in (rk_optax.residual_euler, rk_optax.rosenbrock_euler):
        tx = factory(loss)
        theta = jnp.ones(2)
        bad = jnp.array([0.0, jnp.nan])
        change, state = jax.jit(tx.update)(theta - bad, tx.init(theta), theta, x=bad)
        np.testing.assert_array_equal(change, 0)
        assert int(state.reason) == Reason.NOT_FINITE
        change, state = jax.jit(tx.update)(theta, state, theta, x=jnp.zeros(2))
        assert bool(state.accepted)


@pytest.mark.slow
def test_a_solver_is_vectorised_over_the_step_size(x64):
    loss = LOSSES["least squares"]
    for solver in (ResidualEuler(), RosenbrockEuler(**exact())):
        problem, params, k1 = bound(loss, solver)
        take = jax.jit(lambda h: solver.step(problem, params, k1, h, ()).direction["a"])
        sizes = jnp.array([0.1, 5.0])
        np.testing.assert_allclose(jax.vmap(take)(sizes), [take(h) for h in sizes], rtol=1e-8)


@pytest.mark.slow
def test_products_are_those_of_the_explicit_matrices(x64):
    for loss in LOSSES.values():
        for l2 in (None, 0.3):
            problem, params, k1 = bound(loss, RosenbrockEuler(), l2=l2)
            gradient, hessian, gauss_newton = matrices(loss, l2 or 0.0)
            np.testing.assert_allclose(ravel_pytree(k1)[0], gradient, rtol=1e-12)
            unravel, eye = flat()[1], jnp.eye(4)
            for product, matrix in (
                (problem.gauss_newton(params), gauss_newton),
                (problem.hessian(params), hessian),
            ):
                columns = [ravel_pytree(product(unravel(unit)))[0] for unit in eye]
                np.testing.assert_allclose(columns, matrix, rtol=1e-10, atol=1e-12)


# --- what is refused ---


@pytest.mark.parametrize(
    "make",
    [
        lambda loss, **o: rk_optax.runge_kutta(loss, 0.1, RosenbrockEuler(), **o),
        lambda loss, **o: rk_optax.runge_kutta(loss, 0.1, Ros2(), **o),
        lambda loss, **o: rk_optax.runge_kutta(loss, 0.1, ResidualEuler(), **o),
    ],
    ids=["rosenbrock", "ros2", "residual"],
)
def test_a_preconditioner_that_is_no_diagonal_and_a_loss_without_structure_are_refused(make):
    clip = rk_optax.precondition_by(optax.clip_by_global_norm(1.0))
    with pytest.raises(ValueError, match="symmetric only with a diagonal"):
        make(LOSSES["least squares"], preconditioner=clip)
    with pytest.raises(ValueError, match=r"rk_optax\.(ModelLoss|LeastSquares)"):
        make(lambda theta: jnp.sum(theta**2))


def test_rows_need_least_squares_and_a_hessian_a_loss():
    with pytest.raises(ValueError, match="pass a least-squares loss"):
        rk_optax.residual_euler(LOSSES["split"])
    rk_optax.rosenbrock_euler(lambda theta: theta**2, curvature="hessian")
    with pytest.raises(ValueError, match="'product': pass loss_fn"):
        rk_optax.rosenbrock_euler(None, 0.1, curvature="hessian", grad_fn=lambda theta: theta)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RosenbrockEuler("exact"), "curvature must be"),  # pyright: ignore[reportArgumentType]
        (lambda: RosenbrockEuler(tolerance=0.0), "tolerance"),
        (lambda: RosenbrockEuler(tolerance=1.0), r"tolerance must be in \(0, 1\)"),
        (lambda: RosenbrockEuler(max_iterations=0), "max_iterations"),
        (lambda: Ros2(gamma=-1.0), "gamma must be positive"),
        (lambda: Ros2(tolerance=2.0), "tolerance"),
        (lambda: ResidualEuler(max_rows=0), "max_rows"),
        (lambda: ResidualEuler(tolerance=-1.0), "tolerance"),
        (lambda: ResidualEuler(max_iterations=-1), "max_iterations"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("solver", [RosenbrockEuler(), ResidualEuler()])
def test_euler_has_no_error_estimate(solver):
    problem, params, k1 = bound(LOSSES["least squares"], solver)
    with pytest.raises(ValueError, match=r"error estimate, which .* does not offer"):
        solver.step(problem, params, k1, 0.1, (), wants={"error"})
