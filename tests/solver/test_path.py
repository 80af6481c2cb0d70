"""The steps of all step sizes from one factorisation: against dense solves, and backward Euler by scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.flatten_util import ravel_pytree

from rk_optax import LeastSquares, ResidualEuler, RosenbrockEuler, _precision, _tree
from rk_optax.objective import Objective
from rk_optax.parameter_view import ParameterView

THETA = {"a": np.array([0.7, -0.4]), "b": np.array([[0.3], [0.9]])}
P = np.array([0.5, 2.0, 0.1, 3.0])
SIZES = np.array([1e-3, 0.2, 5.0, 1e3])


def many(params):
    """Nine residuals of four parameters."""
    x = np.linspace(-1, 1, 7)  # a new array: JAX keeps a constant's buffer whatever the precision is later
    fit = jnp.tanh(params["a"][0] * x + params["a"][1]) * params["b"][0, 0] + params["b"][1, 0] * x**2 - np.sin(2 * x)
    return {"fit": fit, "pull": 0.5 * params["a"]}


def few(params):
    """Three."""
    return many(params)["fit"][1:4]


RESIDUALS = {"parameters": many, "rows": few}


def path_of(residuals, look, solver=None, *, l2=None, scale=None, params=THETA, form="path"):
    """`look(found, field)` of the path and the field, all in one program; params flat, and what makes trees of them."""
    solver = ResidualEuler() if solver is None else solver
    params = jax.tree.map(jnp.asarray, params)
    loss = residuals if isinstance(residuals, LeastSquares) else LeastSquares(residuals)
    theta, unravel = ravel_pytree(params)

    @jax.jit
    def seen(params):
        field = Objective(loss, needs=solver.needs, l2=l2).bind({}, ParameterView.of(params, stage_dtype=None))
        if scale is not None:
            tree = unravel(jnp.array(np.array(scale)))
            field = field.preconditioned(lambda g: jax.tree.map(jnp.multiply, tree, g), tree)
        step = solver.step(field, params, field(params), 0.0, solver.init(params), wants=frozenset({"path"}))
        found = step.quantities[form](field)
        with _precision.doubled(found.path.dtype):
            seen = look(found, field)
        return jax.tree.map(lambda x: x if isinstance(x, int) else _in_default_precision(x), seen)

    return seen(params), np.asarray(theta, np.result_type(theta.dtype, float)), unravel


def _in_default_precision(x):
    return jax.lax.convert_element_type(x, float) if jnp.issubdtype(x.dtype, jnp.floating) else x


def directions_at(sizes, *more):
    """A look at the directions of linearly implicit steps, and at `more(found, coordinates)`."""

    def look(found, field):
        h = jnp.asarray(np.array(sizes))
        coordinates = found.path.start(h)
        return found.path.direction(h, coordinates), *(part(found, coordinates) for part in more)

    return look


def dense(residuals, theta, unravel):
    flat = jax.jit(lambda t: ravel_pytree(residuals(unravel(t)))[0])
    return flat, np.asarray(jax.jit(jax.jacfwd(flat))(theta), float), np.asarray(flat(theta), float)


def rows_of(tree):
    return np.concatenate([np.reshape(leaf, (len(leaf), -1)) for leaf in jax.tree.leaves(tree)], axis=1)


@pytest.fixture(params=["64", "32", "32 alone"])
def eps(request, monkeypatch):
    """The rounding of the numbers around: in float32 with a Gram matrix in float64, or without by singular values."""
    if request.param == "64":
        request.getfixturevalue("x64")
    if request.param == "32 alone":
        monkeypatch.setattr(_precision, "widest_float", _tree.default_float)
    return float(jnp.finfo(jnp.zeros(1).dtype).eps)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("l2", "scale"), [(None, None), (0.3, None), (None, P), (0.3, P)])
@pytest.mark.parametrize("form", RESIDUALS)
def test_one_factorisation_has_the_steps_and_falls_of_all_step_sizes(form, l2, scale, eps):
    look = directions_at(
        SIZES,
        lambda found, coordinates: found.path.predicted_fall(jnp.asarray(np.array(SIZES)), coordinates),
        lambda found, _: (found.state.form, found.path.factor.size),
    )
    (directions, falls, (found_form, size)), theta, unravel = path_of(RESIDUALS[form], look, l2=l2, scale=scale)
    _, jacobian, residual = dense(RESIDUALS[form], theta, unravel)
    matrix = jacobian.T @ jacobian + (l2 or 0) * np.eye(4)
    gradient = jacobian.T @ residual + (l2 or 0) * theta
    diagonal = np.ones(4) if scale is None else scale
    for h, direction, fall in zip(SIZES, rows_of(directions), falls, strict=True):
        expected = np.linalg.solve(np.eye(4) + h * diagonal[:, None] * matrix, diagonal * gradient)
        np.testing.assert_allclose(direction, expected, rtol=1e4 * eps, atol=100 * eps * np.abs(expected).max())
        wanted = h * gradient @ expected - 0.5 * h**2 * expected @ matrix @ expected
        assert fall == pytest.approx(wanted, rel=2e4 * eps)
    # With both a preconditioner and l2 the matrix of the residuals would change with h.
    by_parameters = form == "parameters" or (l2 and scale is not None)
    assert int(found_form) == bool(by_parameters)
    assert size == (4 if by_parameters else 3)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("l2", "scale"), [(None, None), (0.3, None), (0.3, P)])
@pytest.mark.parametrize("form", RESIDUALS)
def test_corrections_lead_to_backward_euler_with_the_jacobian_of_its_start(form, l2, scale, eps):
    def look(found, field):
        path, h = found.path, jnp.array([0.3])

        def iterate(coordinates, _):
            direction = jax.tree.map(lambda leaf: leaf[0], path.direction(h, coordinates))
            point = jax.tree.map(lambda p, d: jnp.asarray(np.array(p), d.dtype) - 0.3 * d, THETA, direction)
            trial = path.evaluate(point)
            return path.corrected(h, coordinates, trial.response[None]), (point, trial.loss, field.loss(point))

        return jax.lax.scan(iterate, path.start(h), None, length=8)[1]

    (points, losses, of_field), theta, unravel = path_of(RESIDUALS[form], look, l2=l2, scale=scale)
    flat, jacobian, _ = dense(RESIDUALS[form], theta, unravel)
    diagonal = np.ones(4) if scale is None else scale

    def left(t):
        return t - theta + 0.3 * diagonal * (jacobian.T @ np.asarray(flat(t)) + (l2 or 0) * t)

    end = scipy.optimize.root(left, theta, tol=1e-13).x
    np.testing.assert_allclose(losses, of_field, rtol=100 * eps)
    errors = np.linalg.norm(rows_of(points) - end, axis=1)
    assert errors[0] > 1e-4
    assert errors[1] < 0.4 * errors[0]
    assert errors[-1] < 1e-3 * errors[0] + 20 * eps


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("form", ["parameters", "rows"])
def test_singular_values_have_the_digits_that_the_gram_matrix_lost(form, eps):
    """In float64 as the precise path, by the side of the usual one; in float32 as the Gram matrix in float64, too."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 6)))[0] for n in ((9, 6) if form == "parameters" else (6, 9)))
    least, real = (-5, np.float32) if eps > 1e-10 else (-10, np.float64)
    matrix, h = ((left * np.logspace(0, least, 6)) @ right.T).astype(real), 10.0 ** (1 - 2 * least)
    theta = {"a": rng.normal(size=matrix.shape[1]).astype(real)}
    wide, flat = matrix.astype(float), theta["a"].astype(float)
    expected = np.linalg.lstsq(np.vstack([wide, np.eye(len(flat)) * h**-0.5]), np.append(wide @ flat, 0 * flat))[0]

    def error(quantity):
        look = directions_at([h], lambda found, _: found.path.largest)
        (direction, largest), *_ = path_of(lambda p: matrix @ p["a"], look, params=theta, form=quantity)
        assert largest == pytest.approx(1, rel=0.5)  # the bound of the usual one is by the circles of Gershgorin
        return np.abs(h * np.asarray(direction["a"][0], float) - expected).max() / np.abs(expected).max()

    # The rounding of a singular value of 1e-5 itself is 0.006 of it; of its square, 600 times that.
    if real == np.float32:
        assert error("path") < 0.02
    else:
        assert error("precise_path") < 1e-4
        assert error("path") > 0.1


@pytest.mark.parametrize("unit", [1e12, 1e-12])
@pytest.mark.parametrize("solver", [ResidualEuler(), RosenbrockEuler(max_iterations=9)], ids=["rows", "krylov"])
def test_a_fall_is_foretold_in_units_in_which_the_square_of_a_gradient_is_no_number(solver, unit):
    def fall(weight):
        h = jnp.array([0.3 / weight], jnp.float32)
        look = lambda found, field: found.path.predicted_fall(h, found.path.start(h))  # noqa: E731
        return float(path_of(LeastSquares(many, weights=weight), look, solver)[0][0])

    assert fall(unit**2) / unit**2 == pytest.approx(fall(1.0), rel=1e-4)


def test_the_loss_of_a_trial_is_summed_in_float32_where_parameters_are_of_half_precision():
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), THETA)
    look = lambda found, field: (found.path.evaluate(half).loss, field.loss(half))  # noqa: E731
    (trial, loss), *_ = path_of(LeastSquares(lambda p: p["a"] - p["b"][:, 0]), look, params=half)
    assert trial.dtype == jnp.float32
    assert float(trial) == float(loss)


def test_complex_leaves_are_pairs_of_reals_on_the_path(x64):
    z = np.array([1.0 + 0.5j, -0.3 + 2.0j])

    def residuals(params):
        u, v = params["z"]
        return jnp.stack([jnp.real(u * v), jnp.imag(u) - 0.5, jnp.abs(v) ** 2])

    (direction,), *_ = path_of(residuals, directions_at([0.7]), params={"z": z})
    pairs = np.concatenate([z.real, z.imag])
    of_pairs = lambda t: residuals({"z": t[:2] + 1j * t[2:]})  # noqa: E731
    jacobian, r = map(np.asarray, jax.jit(lambda t: (jax.jacfwd(of_pairs)(t), of_pairs(t)))(pairs))
    expected = np.linalg.solve(np.eye(4) + 0.7 * jacobian.T @ jacobian, jacobian.T @ r)
    np.testing.assert_allclose(direction["z"][0], expected[:2] + 1j * expected[2:], rtol=1e-10)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
@pytest.mark.parametrize("scale", [None, P])
def test_a_krylov_space_of_full_dimension_has_the_exact_steps_with_absolute_eigenvalues(curvature, scale, x64):
    look = directions_at(SIZES, lambda found, _: found.state.negative_curvature, lambda found, _: found.cost.products)
    solver = RosenbrockEuler(curvature, max_iterations=9)
    (directions, negative, products), theta, unravel = path_of(many, look, solver, scale=scale)
    flat, jacobian, residual = dense(many, theta, unravel)
    matrix = jacobian.T @ jacobian
    if curvature == "hessian":
        matrix = np.asarray(jax.jit(jax.hessian(lambda t: 0.5 * jnp.sum(flat(t) ** 2)))(jnp.asarray(theta)))
    root = np.sqrt(np.ones(4) if scale is None else scale)
    s, v = np.linalg.eigh(root[:, None] * matrix * root)
    assert (s.min() < -1e-3) == (curvature == "hessian") == bool(negative)
    for h, direction in zip(SIZES, rows_of(directions), strict=True):
        inner = v.T @ (root * (jacobian.T @ residual)) / (1 + h * np.abs(s))
        np.testing.assert_allclose(direction, root * (v @ inner), rtol=1e-7, atol=1e-12)
    assert int(products) == 4


@pytest.mark.slow
def test_a_matrix_beyond_max_rows_is_replaced_by_a_krylov_space_and_the_state_says_so(x64):
    look = directions_at(SIZES, lambda found, _: found.state.form, lambda found, _: found.cost)
    (direct, form, _), *_ = path_of(many, look)
    (products, other, cost), *_ = path_of(many, look, ResidualEuler(max_rows=3, max_iterations=4))
    assert (int(form), int(other)) == (1, 2)
    assert (int(cost.rows), int(cost.products)) == (0, 4)
    np.testing.assert_allclose(rows_of(direct), rows_of(products), rtol=1e-7)


@pytest.mark.slow
def test_an_invariant_krylov_space_ends_early():
    look = directions_at([0.0, 2.0])
    (found,), *_ = path_of(
        lambda params: 3.0 * params["a"], look, RosenbrockEuler(), params={"a": np.ones(5, np.float32)}
    )
    np.testing.assert_allclose(found["a"][1], 9 / (1 + 2 * 9), rtol=1e-5)
