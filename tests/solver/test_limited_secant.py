"""Curvature from the latest secants alone: BFGS's matrix, its linear systems, and how it descends."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from training import FixedScale
from valley import flat, gradient, rosenbrock

import rk_optax
from rk_optax.solver import _limited_secant
from rk_optax.solver._limited_secant import LimitedSecantState


@pytest.fixture
def limited(monkeypatch):
    """With a memory that is soon full."""
    monkeypatch.setattr(_limited_secant, "MEMORY", 4)


def start():
    return {"a": jnp.array([-1.2, 1.0]), "b": jnp.array([0.7, -0.4, 0.9])}


def bfgs(pairs):
    """B by its recursion, from the y·y/s·y of the latest pair."""
    s, y = pairs[-1]
    matrix = y @ y / (s @ y) * np.eye(len(s))
    for s, y in pairs:
        pushed = matrix @ s
        matrix = matrix - np.outer(pushed, pushed) / (s @ pushed) + np.outer(y, y) / (s @ y)
    return matrix


def on_a_bowl(count, size=6):
    """Places and gradients of a loss of positive curvature, no quadratic; the places are random, steps downhill."""
    rng = np.random.default_rng(0)
    matrix = np.diag(np.logspace(-1, 1, size)) + 0.1
    theta, found = rng.normal(size=size), []
    for _ in range(count):
        slope = matrix @ theta + theta**3
        found.append((theta, slope))
        theta = theta - 0.05 * slope * rng.uniform(0.5, 2, size)
    return found


def after(found, dtype=float):
    state, updated = LimitedSecantState.empty(len(found[0][0]), dtype), jax.jit(LimitedSecantState.updated)
    for theta, slope in found:
        state = updated(state, jnp.asarray(theta, dtype), jnp.asarray(slope, dtype))
    return state


def pairs_of(found, memory=4):
    pairs = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(found)]
    assert all(s @ y > 0 for s, y in pairs)
    return pairs[-memory:]


@pytest.mark.parametrize("scale", [None, (0.5, 2.0, 3.0, 1.0, 0.1)], ids=["", "preconditioned"])
def test_a_step_solves_the_system_with_the_matrix_of_the_latest_secants(scale, limited, x64):
    """After two steps, and after seven, of which a memory of four keeps the latest."""
    given = {}
    if scale is not None:
        given = {"preconditioner": FixedScale({"a": jnp.array(scale[:2]), "b": jnp.array(scale[2:])})}
    tx = rk_optax.runge_kutta(rosenbrock, 2e-4, rk_optax.RosenbrockEuler("limited_secant"), **given)

    @jax.jit
    def directions(hs, state, w):
        def one(h):
            tx = rk_optax.scale_by_rk(rosenbrock, lambda count: h, rk_optax.RosenbrockEuler("limited_secant"), **given)
            return tx.update(jax.grad(rosenbrock)(w), state, w)[0]

        return jax.vmap(one)(hs)

    p = np.ones(5) if scale is None else np.array(scale)
    hs = np.array([0.0, 1e-8, 1e-4, 1e-2, 1.0, 1e3, 1e8, 1e20, 1e200])
    w, state, step, found = start(), tx.init(start()), jax.jit(tx.value_and_update), []
    for count in range(8):
        found.append((flat(w), gradient(flat(w))))
        if count in (2, 7):
            matrix = bfgs(pairs_of(found))
            found_at = directions(hs, state, w)
            for i, h in enumerate(hs):
                direction = flat(jax.tree.map(lambda leaf, i=i: leaf[i], found_at))
                right = gradient(flat(w))
                expected = (
                    np.linalg.solve(matrix, right) / h
                    if h > 1e10
                    else np.linalg.solve(np.eye(5) + h * p[:, None] * matrix, p * right)
                )
                np.testing.assert_allclose(direction, expected, rtol=1e-7, err_msg=str(h))
        _, updates, state = step(state, w)
        w = jax.tree.map(jnp.add, w, updates)
    assert state.solver.secant.pairs.shape == (8, 5)


def test_the_longest_step_is_that_of_l_bfgs(limited, x64):
    found = on_a_bowl(9)
    tx = optax.scale_by_lbfgs(memory_size=4)
    theirs = tx.init(jnp.asarray(found[0][0]))
    for theta, slope in found:
        expected, theirs = tx.update(jnp.asarray(slope), theirs, jnp.asarray(theta))
    direction = after(found).solve(1e30, None, jnp.asarray(found[-1][1]))
    np.testing.assert_allclose(1e30 * np.asarray(direction), expected, rtol=1e-9)


@pytest.mark.parametrize("c", [1e-2, 1.0, 1e8, 1e36])
def test_in_float32_a_system_is_solved_to_rounding_up_to_the_largest_numbers(c, limited):
    """Of which the largest times the curvature is none."""
    found = [(theta, 1e6 * slope) for theta, slope in on_a_bowl(9)]
    matrix, right, p = bfgs(pairs_of(found)), 1e10 * found[-1][1], np.logspace(-2, 2, 6)
    state, solve = after(found, np.float32), jax.jit(LimitedSecantState.solve)
    for scale in (None, p):
        given = None if scale is None else jnp.asarray(scale, np.float32)
        found = solve(state, np.float32(c), given, jnp.asarray(right, np.float32))
        inverse = 1 / c / (np.ones(6) if scale is None else p)
        expected = np.linalg.solve(np.diag(inverse) + matrix, inverse * right)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_along_a_step_without_positive_curvature_it_is_quartered(limited, x64):
    found = on_a_bowl(4)
    matrix, (theta, slope) = bfgs(pairs_of(found)), found[-1]
    state = after(found)
    s = -0.5 * np.linalg.solve(matrix, slope)
    state = jax.jit(LimitedSecantState.updated)(state, jnp.asarray(theta + s), jnp.asarray(slope + 0.1 * slope))
    pushed = matrix @ s
    expected = matrix - 0.75 * np.outer(pushed, pushed) / (s @ pushed)
    right = jnp.asarray(np.arange(1.0, 7))
    np.testing.assert_allclose(state.solve(1e20, None, right) * 1e20, np.linalg.solve(expected, right), rtol=1e-8)


def test_it_begins_again_where_rounding_has_made_it_useless(limited, x64):
    """With the curvature of the latest secant, or, where there is none, as at the start."""
    *found, (theta, slope) = (tuple(map(jnp.asarray, place)) for place in on_a_bowl(5))
    updated, state = jax.jit(LimitedSecantState.updated), after(found)
    spoilt = state._replace(gram=jnp.full_like(state.gram, jnp.nan))
    s, y = theta - found[-1][0], slope - found[-1][1]
    again = updated(spoilt, theta, slope)
    np.testing.assert_allclose(1e20 * again.solve(1e20, None, slope), s @ y / (y @ y) * slope, rtol=1e-9)
    # Of the pairs (s, −y) the matrix maps y to −s: uphill.
    y = found[-1][1] - found[-2][1]
    upside_down = state._replace(curvatures=-state.curvatures)
    assert float(y @ upside_down.solve(1e20, None, y)) < 0
    again = updated(upside_down, found[-1][0], y)  # and no step from there
    first = 0.1 * jnp.linalg.norm(found[-1][0]) / jnp.linalg.norm(y)
    np.testing.assert_allclose(1e20 * again.solve(1e20, None, slope), first * slope, rtol=1e-9)
    assert int(again.stored) == 0
    nothing = updated(state, theta, jnp.full(6, jnp.nan))  # says nothing, and spoils nothing
    np.testing.assert_array_equal(nothing.pairs, state.pairs)
    assert int(nothing.stored) == int(state.stored)


UNITS = [(c, 1.0, 1.0) for c in (1e-25, 1e-12, 1e12, 1e25)] + [(1.0, x, x) for x in (1e-12, 1e12)]
UNITS += [(c, c, 1.0) for c in (1e-25, 1e25)] + [(1.0, 1.0, inert) for inert in (1e-20, 1e20)]


@pytest.mark.parametrize("optimizer", ["rosenbrock_euler", "ros2"])
def test_units_and_inert_leaves_change_no_step(optimizer, limited):
    """In the strict modes that are seen in a compiled function, too; a loss with places of negative curvature."""
    begin = jnp.array([0.5, -0.3, 0.8, 0.1])

    def loss(params, c, length):
        w = params["w"] / length
        return c * (jnp.sum(jnp.array([1.0, 3.0, 10.0, 30.0]) * w**2) - jnp.sum(jnp.cos(3 * w)))

    @jax.jit
    def run(c, length, inert):
        h = jnp.float32(0.1) / c * length * length
        rule = rk_optax.line_search(1e9 * h, first=True, parts=24) if optimizer == "rosenbrock_euler" else h
        tx = getattr(rk_optax, optimizer)(loss, rule, curvature="limited_secant")
        params, data = {"w": length * begin, "inert": inert * jnp.ones(2)}, {"c": c, "length": length}

        def update(carry, _):
            params, state = carry
            _, change, state = tx.value_and_update(state, params, **data)
            return (jax.tree.map(jnp.add, params, change), state), (change["w"] / length, change["inert"])

        return jax.lax.scan(update, (params, tx.init(params)), length=7)[1]

    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        (expected, _), *results = (run(*case) for case in [(1.0, 1.0, 1.0), *UNITS])
    assert np.abs(expected[-1]).max() > 0
    for case, (found, inert) in zip(UNITS, results, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=str(case))
        assert not np.any(inert)


def test_complex_parameters_many_at_once(limited):
    tx = rk_optax.rosenbrock_euler(lambda z: jnp.sum(jnp.abs(z - (1 + 2j)) ** 4), curvature="limited_secant")

    @jax.jit
    @jax.vmap
    def train(z):
        def update(carry, _):
            z, state = carry
            _, updates, state = tx.value_and_update(state, z)
            return (z + updates, state), None

        return jax.lax.scan(update, (z, tx.init(z)), length=40)[0]

    z, state = train(jnp.array([[0, 0, 0], [3, 1j, -1]], jnp.complex64))
    np.testing.assert_allclose(z, np.full((2, 3), 1 + 2j), atol=3e-2)
    assert not any(np.any(np.isnan(x)) for x in jax.tree.leaves(state))


def test_its_state_keeps_its_types_in_a_wider_stage_dtype(limited, x64):
    tx = rk_optax.rosenbrock_euler(lambda w: jnp.sum(w**2), curvature="limited_secant", stage_dtype="float64")
    w = jnp.zeros(3, jnp.float32)
    state = tx.init(w)
    new = jax.eval_shape(tx.value_and_update, state, w)[2]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_ten_thousand_parameters_descend_in_not_twice_the_iterations_of_scipy():
    """Rosenbrock's function of 5,000 pairs from different starts, in float32 against float64."""

    def loss(w):
        return jnp.sum(100 * (w[1::2] - w[::2] ** 2) ** 2 + (1 - w[::2]) ** 2)

    begin = np.tile([-1.2, 1.0], 5000) * np.random.default_rng(0).uniform(0.9, 1.1, 10_000)
    seen, target, value_and_grad = [], 1e-3, jax.jit(jax.value_and_grad(loss))
    scipy.optimize.minimize(
        lambda w: [np.asarray(x, float) for x in value_and_grad(np.float32(w))],
        begin,
        jac=True,
        method="L-BFGS-B",
        options={"maxcor": 20},
        callback=lambda intermediate_result: seen.append(intermediate_result.fun),
    )
    theirs = next(i for i, value in enumerate(seen) if value < target)
    tx = rk_optax.rosenbrock_euler(loss, curvature="secant")

    @jax.jit
    def train(w):
        def update(carry):
            w, state, _, count = carry
            value, updates, state = tx.value_and_update(state, w)
            return w + updates, state, value, count + 1

        start = w, tx.init(w), jnp.float32(jnp.inf), 0
        return jax.lax.while_loop(lambda carry: (carry[2] > target) & (carry[3] < 1000), update, start)

    _, state, value, ours = train(jnp.asarray(begin, jnp.float32))
    assert value <= target
    assert ours <= 2 * theirs
    secant = state.solver.secant
    assert sum(x.size for x in jax.tree.leaves(secant)) < 43 * 10_000
