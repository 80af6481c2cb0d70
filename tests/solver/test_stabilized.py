"""Chebyshev- and Legendre-stabilised steps: against nodepy, the published iterates, NumPy's polynomials and scipy."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import sympy
from conftest import network, network_gradient, network_loss
from jax.flatten_util import ravel_pytree
from nodepy.runge_kutta_method import RKC1, RKC2
from training import cubic, one_step, stability_polynomial

import rk_optax
from rk_optax import Stabilized, VectorField

FAMILIES = ["rkc1", "rkc2", "rkl1", "rkl2"]
THETA = np.array([0.9, -0.4, 0.7, 0.2])

families = pytest.mark.parametrize("family", FAMILIES)


def diagonal_step(solver, eigenvalues, h):
    """What a step leaves of each mode of a quadratic: R(hλ)."""
    eigenvalues = jnp.asarray(eigenvalues)
    step = one_step(solver, lambda theta: eigenvalues * theta, jnp.ones_like(eigenvalues), h)
    return 1 - h * np.asarray(step.direction)


# --- the recurrences ---


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("family", "stages", "damping"),
    [
        ("rkc1", 2, (1, 20)),
        ("rkc1", 5, (1, 20)),
        ("rkc1", 9, (2, 1)),
        ("rkc1", 18, (0, 1)),
        ("rkc2", 2, (2, 13)),
        ("rkc2", 5, (2, 13)),
        ("rkc2", 9, (0, 1)),
        ("rkc2", 18, (3, 1)),
    ],
)
def test_a_chebyshev_step_is_nodepys(family, stages, damping, x64):
    method = {"rkc1": RKC1, "rkc2": RKC2}[family](stages, sympy.Rational(*damping))
    h, ks = 0.6, []
    for row in np.array(method.A, float):
        ks.append(cubic(THETA - h * sum((a * k for a, k in zip(row, ks, strict=False)), np.zeros(4))))
    expected = np.array(method.b, float) @ ks
    step = one_step(Stabilized(family, stages, damping[0] / damping[1]), cubic, THETA, h)
    np.testing.assert_allclose(step.direction, expected, rtol=0, atol=1e-10)
    assert step.cost.gradients == stages


def rkl_iterates(order, s, field, y0, tau):
    """Meyer, Balsara and Aslam (2014), section 3, in iterates: dy/dt = M(y)."""
    if order == 1:
        w1 = 2 / (s**2 + s)
        older, y = y0, y0 + w1 * tau * field(y0)
        for j in range(2, s + 1):
            mu, nu = (2 * j - 1) / j, (1 - j) / j
            older, y = y, mu * y + nu * older + mu * w1 * tau * field(y)
        return y
    b = [1 / 3, 1 / 3] + [(j**2 + j - 2) / (2 * j * (j + 1)) for j in range(2, s + 1)]
    w1 = 4 / (s**2 + s - 2)
    older, y = y0, y0 + b[1] * w1 * tau * field(y0)
    for j in range(2, s + 1):
        mu, nu = (2 * j - 1) / j * b[j] / b[j - 1], -(j - 1) / j * b[j] / b[j - 2]
        moved = mu * y + nu * older + (1 - mu - nu) * y0
        older, y = y, moved + mu * w1 * tau * field(y) - (1 - b[j - 1]) * mu * w1 * tau * field(y0)
    return y


@pytest.mark.covering
@pytest.mark.parametrize("stages", [2, 3, 7, 20])
@pytest.mark.parametrize("order", [1, 2])
def test_a_legendre_step_is_that_of_the_published_iterates(order, stages, x64):
    h = 0.6
    step = one_step(Stabilized(f"rkl{order}", stages), cubic, THETA, h)
    expected = rkl_iterates(order, stages, lambda y: -cubic(y), THETA, h)
    np.testing.assert_allclose(THETA - h * step.direction, expected, rtol=0, atol=1e-13)


# --- quadratics: the stability polynomial ---


CASES = [("rkc1", 0.05), ("rkc1", 3.0), ("rkc2", 2 / 13), ("rkl1", None), ("rkl2", None)]


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("stages", [2, 3, 10, 24])
@pytest.mark.parametrize(("family", "damping"), CASES)
def test_a_step_on_a_quadratic_is_the_stability_polynomial_bounded_in_its_interval_only(family, damping, stages, x64):
    solver = Stabilized(family, stages, damping)
    end = solver.real_stability_interval(stages)
    inside = np.linspace(0, end, 401)
    left = diagonal_step(solver, inside, 1.0)
    polynomial = stability_polynomial(family, stages, damping or 0.0)
    np.testing.assert_allclose(left, polynomial(inside), rtol=0, atol=1e-10)
    assert np.abs(left).max() <= 1 + 1e-10
    # Where s is odd, and where damping is strong, R goes on from well inside ±1, and the true limit is further out.
    if stages % 2 == 0 and (damping or 0) < 1:
        assert np.abs(diagonal_step(solver, np.array([1.05 * end]), 1.0))[0] > 1


@pytest.mark.parametrize("stages", [5, 20, 100])
def test_the_intervals_are_the_published_ones(stages):
    assert Stabilized("rkc1").real_stability_interval(stages) == pytest.approx(1.936 * stages**2, rel=4e-3)
    epsilon = 2 / 13
    expected = 2 / 3 * (stages**2 - 1) * (1 - 2 * epsilon / 15)
    assert Stabilized("rkc2").real_stability_interval(stages) == pytest.approx(expected, rel=1e-2)
    assert Stabilized("rkl1").real_stability_interval(stages) == stages**2 + stages
    assert Stabilized("rkl2").real_stability_interval(stages) == (stages**2 + stages - 2) / 2


@pytest.mark.parametrize("damping", [1.0, 5.0])
def test_damping_shrinks_interior_modes_and_the_interval(damping, x64):
    solver, usual = Stabilized("rkc1", 20, damping), Stabilized("rkc1", 20)
    end = solver.real_stability_interval(20)
    interior = np.abs(diagonal_step(solver, np.linspace(0.05 * end, end, 200), 1.0)).max()
    assert interior <= 1 / np.cosh(np.sqrt(2 * damping)) * 1.01  # T_s(1 + ε/s²) → cosh √(2ε)
    assert end < usual.real_stability_interval(20)
    with_usual = np.linspace(0.05, 1, 200) * usual.real_stability_interval(20)
    assert np.abs(diagonal_step(usual, with_usual, 1.0)).max() > 0.95


def test_a_step_far_beyond_gradient_descents_leaves_nothing_of_a_stiff_mode():
    left = diagonal_step(Stabilized("rkc1", 200, damping=5.0), jnp.array([1.0, 10.0, 1000.0]), 20.0)
    assert np.abs(left).max() < 0.2


# --- order ---


@functools.cache
def network_flow():
    """Gradient, start, time and end of the flow of a small network; needs x64."""
    params, data = network(np.float64)
    theta, unravel = ravel_pytree(params)
    gradient = jax.jit(jax.grad(lambda theta: network_loss(unravel(theta), **data)))
    run = scipy.integrate.solve_ivp(
        lambda t, y: -np.asarray(gradient(y)), (0, 0.5), np.asarray(theta), "DOP853", rtol=3e-14, atol=1e-15
    )
    return theta, gradient, run.y[:, -1]


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("stages", [2, 7])
@families
def test_the_error_at_a_fixed_time_falls_with_the_order(family, stages, x64):
    theta, gradient, end = network_flow()
    solver, problem = Stabilized(family, stages), VectorField(lambda theta, stage: gradient(theta))

    @jax.jit
    def run(count):
        h = 0.5 / count

        def step(_, y):
            return y - h * solver.step(problem, y, gradient(y), h, ()).direction

        return jax.lax.fori_loop(0, count, step, theta)

    errors = [np.linalg.norm(run(n) - end) for n in (64, 128, 256)]
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    assert np.abs(slopes - solver.order).max() < 0.1


@pytest.mark.parametrize("family", ["rkc2", "rkl2"])
def test_the_error_estimate_falls_like_the_cube_of_h_and_is_the_rkc_codes(family, x64):
    theta, gradient, _ = network_flow()
    solver, sizes = Stabilized(family, 6), {}
    for h in (0.1, 0.05, 0.025, 0.0125):
        step = one_step(solver, gradient, theta, h, wants={"error"})
        new = theta - h * step.direction
        by_hand = 0.8 * (theta - new) - 0.4 * h * (gradient(theta) + gradient(new))
        np.testing.assert_allclose(step.quantities["error"], by_hand, rtol=1e-6, atol=1e-15)
        assert step.cost.gradients == 7
        sizes[h] = float(jnp.linalg.norm(step.quantities["error"]))
    assert solver.error_order == 2
    assert np.log2(sizes[0.025] / sizes[0.0125]) == pytest.approx(3, abs=0.15)


def test_first_order_has_no_error_estimate():
    solver = Stabilized("rkc1", 5)
    assert solver.error_order is None
    with pytest.raises(ValueError, match=r"has one.*'rkc2'"):
        one_step(solver, cubic, THETA, 0.1, wants={"error"})


# --- rounding, memory, tracing ---


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("stages", [2, 20, 200])
@families
def test_a_short_step_in_float32_keeps_its_digits(family, stages, request):
    """Differences of iterates divided by h would have an error of 0.2 here."""
    h, (params, data) = 1e-4, network(np.float32)

    def direction(dtype):
        cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(np.asarray(x), dtype))
        theta, own = cast(params), cast(data)
        step = one_step_of_tree(Stabilized(family, stages), lambda p: network_gradient(p, **own), theta, h)
        return np.asarray(ravel_pytree(step.direction)[0], np.float64)

    single = direction(np.float32)
    request.getfixturevalue("x64")  # from here on
    double = direction(np.float64)
    error = np.linalg.norm(single - double) / np.linalg.norm(double)
    assert error <= 1e-6, (family, stages)


@families
def test_a_long_step_in_float32_keeps_its_digits(family, request):
    """Near the stability limit, where the displacements of stiff modes are far below the gradient's size."""
    stages = 100
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(60, 60)))[0]
    matrix, theta = basis * np.geomspace(1e-6, 1, 60) @ basis.T, rng.normal(size=60)
    matrix, theta = matrix.astype(np.float32), theta.astype(np.float32)
    h = 0.95 * Stabilized(family).real_stability_interval(stages)
    single = one_step_of_tree(Stabilized(family, stages), lambda t: jnp.asarray(matrix) @ t, theta, np.float32(h))
    assert single.direction.dtype == np.float32
    request.getfixturevalue("x64")  # from here on
    double = one_step_of_tree(
        Stabilized(family, stages), lambda t: jnp.asarray(matrix, float) @ t, jnp.asarray(theta, float), h
    )
    error = np.linalg.norm(single.direction - double.direction) / np.linalg.norm(double.direction)
    assert error <= (1e-4 if family[-1] == "1" else 1e-3)


def one_step_of_tree(solver, field, theta, h):
    problem = VectorField(lambda theta, stage: field(theta))
    return jax.jit(lambda theta: solver.step(problem, theta, field(theta), h, solver.init(theta)))(theta)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("stages", [2, 50, "auto"])
@families
def test_the_loss_is_traced_once_by_an_update_whatever_the_number_of_stages(family, stages):
    traces, (params, data) = collections.Counter(), network()

    def loss_fn(params, x, y):
        traces["loss"] += 1
        return network_loss(params, x, y)

    tx = rk_optax.runge_kutta(loss_fn, 0.1, Stabilized(family, stages, max_stages=30))
    jax.jit(tx.update).lower(network_gradient(params, **data), tx.init(params), params, **data)
    assert traces["loss"] == (2 if stages == "auto" else 1)  # the power method's loop and the stages' loop


@families
def test_memory_does_not_grow_with_the_stages_and_is_two_trees_beside_k1_and_the_newest_gradient(family):
    size = 1 << 18

    def temporaries(stages):
        solver = Stabilized(family, stages)
        problem = VectorField(lambda theta, stage: jnp.sin(theta))
        step = jax.jit(lambda theta, k1: solver.step(problem, theta, k1, 0.1, ()).direction)
        leaf = jax.ShapeDtypeStruct((size,), jnp.float32)
        return step.lower(leaf, leaf).compile().memory_analysis().temp_size_in_bytes / (4 * size)

    few, many = temporaries(3), temporaries(60)
    assert many <= few + 0.01
    assert many <= 3.1


def test_a_large_network_evaluates_each_stage_once(evaluations):
    params, data = network()
    loss = evaluations.of(network_loss)
    tx = rk_optax.runge_kutta(loss, 0.01, Stabilized("rkc2", 9))
    _, state = jax.jit(tx.update)(network_gradient(params, **data), tx.init(params), params, **data)
    assert evaluations.number == 8
    assert int(state.cost.gradients) == 9


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "rkc3"}, "family must be one of rkc1, rkc2, rkl1, rkl2"),
        ({"stages": 1}, "at least 2.*rk_optax.euler"),
        ({"stages": 2.5}, "stages"),
        ({"stages": True}, "stages"),
        ({"stages": "many"}, "stages"),
        ({"damping": -0.1}, "damping must be finite and not negative"),
        ({"damping": np.nan}, "damping"),
        ({"family": "rkl1", "damping": 0.1}, "parameter of the Chebyshev families"),
        ({"family": "rkl2", "damping": 0.0}, "parameter of the Chebyshev families"),
        ({"max_stages": 1}, "max_stages must be at least 2"),
        ({"max_stages": 0}, "max_stages"),
        ({"estimate_every": 0}, "estimate_every"),
        ({"power_iterations": 0}, "power_iterations"),
        ({"safety": 0.9}, "safety must be at least 1"),
        ({"safety": np.inf}, "safety"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Stabilized(**arguments)


@pytest.mark.parametrize("alias", [rk_optax.rkc, rk_optax.rkl])
def test_the_aliases_refuse_an_order_that_does_not_exist(alias):
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        alias(lambda theta: theta, order=3)


def test_stage_batches_need_a_fixed_number_of_stages():
    split = {"stage_batches": "split", "batch_argnames": ["x"]}
    rk_optax.rkc(lambda theta, x: theta, 0.1, stages=4, **split)
    with pytest.raises(ValueError, match="fixed number of gradients per step"):
        rk_optax.rkc(lambda theta, x: theta, 0.1, **split)
