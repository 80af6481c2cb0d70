"""θ(t) as a function: values, refinement that leaves it unchanged, variation, and life as a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import quad
from scipy.special import eval_legendre

from rk_optax.networks import Controls, refine, refine_state

from .cases import largest_difference

NODES = (0.0, 0.5, 2.0, 3.0)
TIMES = np.array([-1.0, 0.0, 0.2, 0.5, 1.1, 2.0, 2.9, 3.0, 4.0])
MATRIX = np.array([[1, 0], [0.5, 0.5], [0.2, 0.9], [0, 1]])


def some(basis, nodes=NODES, size=4):
    theta = {"w": np.random.default_rng(0).normal(size=(size, 2, 3)), "b": np.arange(size, dtype=float)}
    return Controls(jax.tree.map(jnp.asarray, theta), nodes, basis)


@pytest.mark.usefixtures("x64")
def test_hat_functions_are_numpy_s_interpolation_constant_outside():
    expected = np.interp(TIMES, NODES, np.arange(4.0))
    np.testing.assert_allclose(some("linear").at(TIMES)["b"], expected, atol=1e-15)
    one_by_one = jax.jit(jax.vmap(some("linear").at))(jnp.asarray(TIMES))
    np.testing.assert_allclose(one_by_one["b"], expected, atol=1e-15)
    assert one_by_one["w"].shape == (9, 2, 3)


@pytest.mark.usefixtures("x64")
def test_constant_pieces_hold_from_their_node_on():
    np.testing.assert_array_equal(some("constant").at(TIMES)["b"], [0, 0, 0, 1, 1, 2, 2, 3, 3])


@pytest.mark.usefixtures("x64")
def test_legendre_polynomials_are_scipy_s_and_a_matrix_mixes_the_knots():
    x = (2 * TIMES - 3) / 3
    expected = sum(j * eval_legendre(j, x) for j in range(4))
    np.testing.assert_allclose(some("legendre", (0, 3)).at(TIMES)["b"], expected, atol=1e-12)
    mixed = some(MATRIX, size=2)
    np.testing.assert_allclose(mixed.at(TIMES)["b"], np.interp(TIMES, NODES, MATRIX @ [0, 1]), atol=1e-15)
    np.testing.assert_allclose(some(np.eye(4)).at(TIMES)["w"], some("linear").at(TIMES)["w"], atol=1e-15)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("basis", ["linear", "constant", "legendre", "matrix"])
@pytest.mark.usefixtures("x64")
def test_refining_leaves_the_function_and_its_variation_unchanged(basis):
    coarse = {
        "linear": some("linear"),
        "constant": some("constant"),
        "legendre": some("legendre", (0, 3)),
        "matrix": some(MATRIX, size=2),
    }[basis]
    refine = lambda c: c.refine(7 if basis == "legendre" else (0, 0.1, 0.5, 1, 1.9, 2, 3))  # noqa: E731
    fine = (refine if basis == "matrix" else jax.jit(refine))(coarse)  # a matrix of its own is worked out by NumPy
    assert fine.size > coarse.size or basis == "matrix"
    seen = jax.jit(lambda c: (c.at(TIMES), [c.total_variation(p) for p in ((1,) if basis == "constant" else (1, 2))]))
    (before, (of_before, *square)), (after, (of_after, *of_square)) = seen(coarse), seen(fine)
    assert largest_difference(before, after) < 2e-15
    np.testing.assert_allclose(of_after, of_before, rtol=1e-12 if fine.basis != "legendre" else 1e-2)
    np.testing.assert_allclose(of_square, square, rtol=1e-12)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.usefixtures("x64")
def test_total_variation_is_the_integral_of_the_slope(p):
    kinked = Controls(jnp.array([1.0, 3.0, 2.5, 2.5]), NODES)
    slopes = np.diff([1, 3, 2.5, 2.5]) / np.diff(NODES)
    np.testing.assert_allclose(kinked.total_variation(p), np.sum(np.diff(NODES) * np.abs(slopes) ** p))
    smooth = Controls(jnp.array([0.0, 1.0, 0.5]), (0, 3), "legendre")
    slope = jax.jit(jax.grad(lambda t: smooth.at(t)))
    integral = quad(lambda t: abs(float(slope(t))) ** p, 0, 3, points=[1.0])[0]
    np.testing.assert_allclose(smooth.total_variation(p), integral, rtol=1e-9 if p == 2 else 2e-2)


@pytest.mark.usefixtures("x64")
def test_gradients_and_their_squares_refine_as_densities():
    # d/dθ_j of ∫ θ(t) dt is ∫ φ_j: exactly the densities' claim, on any nodes.
    def integral(controls):
        h = np.diff(controls.nodes)
        return jnp.sum((controls.theta[1:] + controls.theta[:-1]) / 2 * h)

    coarse, finer = Controls(jnp.zeros(4), NODES), (0, 0.25, 0.5, 1, 2, 2.5, 3)

    @jax.jit
    def refined(coarse):
        gradient = jax.grad(integral)
        square = jax.tree.map(jnp.square, gradient(coarse))
        return gradient(coarse.refine(finer)), gradient(coarse).refine(finer, power=1), square.refine(finer, power=2)

    expected, of_gradient, of_square = (np.asarray(controls.theta) for controls in refined(coarse))
    np.testing.assert_allclose(of_gradient, expected, atol=1e-15)
    np.testing.assert_allclose(of_square, expected**2, atol=1e-15)


@pytest.mark.slow
def test_an_optimizer_goes_on_with_refined_controls():
    params = {"head": jnp.ones(2), "block": Controls(jnp.array([0.0, 1.0]), (0, 1))}
    gradient = jax.tree.map(jnp.ones_like, params)
    for tx in (optax.adam(0.1), optax.sgd(0.1, momentum=0.9)):
        _, state = tx.update(gradient, tx.init(params), params)
        finer = refine_state(state, (0, 0.5, 1))
        new = refine(params, (0, 0.5, 1))
        gradient_there = jax.grad(lambda p: p["head"].sum() + _mean(p["block"]))(new)
        updates, _ = jax.jit(tx.update)(gradient_there, finer, new)
        assert jax.tree.structure(updates) == jax.tree.structure(new)
    # Adam's step has the size of its rate at every node, the new one too: its moments fit the smaller gradients.
    state = optax.adam(0.1).update(_halves(params), optax.adam(0.1).init(params), params)[1]
    updates, _ = optax.adam(0.1).update(gradient_there, refine_state(state, (0, 0.5, 1)), new)
    np.testing.assert_allclose(updates["block"].theta, -0.1, rtol=1e-4)


def test_the_state_of_any_optimizer_is_refined_by_what_its_fields_hold_or_refused():
    params = {"nu": Controls(jnp.array([0.0, 1.0]), (0, 1))}  # a parameter of the name of a field
    gradient, finer = jax.tree.map(jnp.ones_like, params), (0, 0.5, 1)

    def refined(tx, field, **options):
        def state_after(gradient, params):
            return refine_state(tx.update(gradient, tx.init(params), params)[1], finer, **options)

        return getattr(jax.jit(state_after)(gradient, params)[0], field)["nu"].theta

    quarter, half = np.array([0.25, 0.5, 0.25]), np.array([0.5, 0.5, 0.5])
    np.testing.assert_allclose(refined(optax.adam(0.1, b1=0.0), "mu"), quarter / 0.5)
    np.testing.assert_allclose(refined(optax.adam(0.1, b2=0.0), "nu"), (quarter / 0.5) ** 2)
    np.testing.assert_allclose(refined(optax.adagrad(0.1, 0.0), "sum_of_squares"), (quarter / 0.5) ** 2)
    np.testing.assert_allclose(refined(optax.adamax(0.1), "nu", powers={"nu": 1}), quarter / 0.5)
    np.testing.assert_allclose(refined(optax.sgd(0.1, 0.9), "trace", powers={"trace": 0}), half * 2)
    with pytest.raises(ValueError, match=r"does not know how .*params.*tx\.init"):
        refine_state(optax.lbfgs().init(params), finer)


def _mean(controls):
    h = np.diff(controls.nodes)
    return jnp.sum((controls.theta[1:] + controls.theta[:-1]) / 2 * h)


def _halves(params):
    return jax.grad(lambda p: p["head"].sum() + _mean(p["block"]))(params)


@pytest.mark.slow
def test_controls_are_a_pytree_whose_leaves_are_theirs():
    controls = some("linear")
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: 2 * x, c))(controls)
    assert isinstance(doubled, Controls)
    assert doubled.nodes == NODES
    stacked = jax.vmap(lambda c: c.at(1.0)["b"])(jax.tree.map(lambda x: jnp.stack([x, x]), controls))
    np.testing.assert_allclose(stacked, controls.at(1.0)["b"])
    path = jax.tree_util.tree_leaves_with_path(controls)[0][0]
    assert jax.tree_util.keystr(path) == ".theta['b']"
    for basis in ("linear", "constant", np.eye(4)):
        constant = Controls.constant_in_time(jnp.array([1.0, -2.0]), NODES, basis)
        np.testing.assert_allclose(constant.at(TIMES), np.tile([1.0, -2.0], (9, 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Controls(jnp.ones((2, 3)), (0, 0)), ValueError, "strictly increasing"),
        (lambda: Controls(jnp.ones((2, 3)), ()), ValueError, "strictly increasing"),
        (lambda: Controls(jnp.ones((2, 3)), (0, 1, 2)), ValueError, "leading axis of length 3"),
        (lambda: Controls({"a": jnp.ones(2), "b": jnp.ones(3)}, (0, 1), "legendre"), ValueError, "lengths"),
        (lambda: Controls(jnp.ones(3), (0, 1, 2), "legendre"), ValueError, "two nodes"),
        (lambda: Controls(jnp.ones((2, 3)), (0, 1), "cubic"), ValueError, "basis must be"),
        (lambda: Controls(jnp.ones((2, 3)), (0, 1), np.ones((3, 2))), ValueError, "one row for each of the 2"),
        (lambda: Controls({"a": jnp.ones(2, int)}, (0, 1)), TypeError, r"theta\['a'\]"),
        (lambda: some("linear").refine((0, 1, 3)), ValueError, "keep the old nodes"),
        (lambda: some("constant").refine((-1, *NODES)), ValueError, "begin"),
        (lambda: some("legendre", (0, 3)).refine(2), ValueError, "at least 4"),
        (lambda: some("linear").refine(7), ValueError, "new times"),
        (lambda: some("constant").total_variation(2), ValueError, "square-integrable"),
        (lambda: some("linear").total_variation(3), ValueError, "p must be"),
        (lambda: Controls.constant_in_time(jnp.ones(2), (0, 1), [[1, 0], [2, 0]]), ValueError, "constant in time"),
    ],
)
def test_what_is_no_function_of_time_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
