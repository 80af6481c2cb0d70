"""The dense solver in the space of the residuals, against NumPy in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rk_optax.rows import DenseRows
from rk_optax.solver._linear import conjugate_gradients, solve_in_row_space, solver_of_positive


def positive(size, seed=0):
    square = np.random.default_rng(seed).normal(size=(size, size))
    return square @ square.T / size + np.eye(size)


def rows_of(count, width, smallest, seed=0):
    """Rows whose singular values fall from 1 to `smallest`."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(size, count)))[0] for size in (count, width))
    return left * np.geomspace(1, smallest, count) @ right.T


def solved(rows, scale, h, c, **options):
    options = {"tolerance": 1e-5, "max_iterations": 100} | options
    solve = jax.jit(lambda rows, *args: solve_in_row_space(DenseRows.of(rows), *args, **options))
    return solve(*map(jnp.asarray, (rows, scale, h, c)))


@pytest.mark.covering(most=2)
# Below, at and above the size of a block, and not a multiple of it.
@pytest.mark.parametrize("size", [1, 5, 64, 65, 128, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_positive_system_is_solved_from_its_lower_triangle(size, dtype, x64):
    matrix, b = positive(size), np.arange(size) - 1.7
    lower = np.where(np.tri(size, dtype=bool), matrix, np.nan)
    found = jax.jit(lambda a, b: solver_of_positive(a)(b))(jnp.asarray(lower, dtype), jnp.asarray(b, dtype))
    assert found.dtype == dtype
    expected = np.linalg.solve(matrix, b)
    assert np.linalg.norm(found - expected) <= 1e2 * np.finfo(dtype).eps * np.linalg.norm(expected)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("where", [3, 200])
def test_a_system_that_is_not_positive_is_nan(where, x64):
    matrix = positive(300)
    matrix[where, where] = -1
    assert np.isnan(jax.jit(lambda a: solver_of_positive(a)(jnp.ones(300)))(matrix)).all()


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("h", [0.0, 1e-30, 1e-3, 1.0, 1e5])
def test_the_row_space_system_is_solved(h, x64):
    rng = np.random.default_rng(1)
    rows, scale, c = rng.normal(size=(150, 170)), rng.uniform(0, 2, 170), rng.normal(size=150)
    scale[:5] = 0
    expected = rows.T @ np.linalg.solve(np.eye(150) + h * (rows * scale) @ rows.T, c)
    np.testing.assert_allclose(solved(rows, scale, h, c, tolerance=1e-12).x, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_rounding_of_the_product_does_not_limit_h(x64):
    """In float32, h = 1e8 and K of norm 1: K is known to 1e-7 only, which is ten times the identity over h."""
    h, rows, c = 1e8, rows_of(200, 300, 1e-6).astype(np.float32), np.ones(200, np.float32)
    exact = rows.astype(float)
    expected = exact.T @ np.linalg.solve(np.eye(200) + h * exact @ exact.T, c)
    plain = jnp.linalg.cholesky(jnp.asarray(rows) @ rows.T + jnp.eye(200, dtype=np.float32) / h)
    assert np.isnan(plain).any()
    found = solved(rows, np.ones(300, np.float32), np.float32(h), c)
    assert found.x.dtype == np.float32
    assert 1 < int(found.iterations) < 100
    error = np.linalg.norm(found.x - expected) / np.linalg.norm(expected)
    assert error < 1e-2


def test_nothing_to_solve_is_zero_and_finite():
    rows, scale = np.ones((3, 4), np.float32), np.ones(4, np.float32)
    for r, c in ((rows, np.zeros(3)), (0 * rows, np.ones(3)), (0 * rows, np.zeros(3))):
        for h in (0.0, 1.0, 1e30):
            np.testing.assert_array_equal(solved(r, scale, np.float32(h), c.astype(np.float32)).x, np.zeros(4))


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["rows", "c"])
def test_what_is_not_finite_stays_visible(where, bad):
    parts = {"rows": np.ones((3, 4), np.float32), "c": np.ones(3, np.float32)}
    parts[where].flat[0] = bad
    found = solved(parts["rows"], np.ones(4, np.float32), np.float32(1), parts["c"]).x
    assert not np.isfinite(found).all()


def test_squares_that_would_overflow_are_not_formed():
    rows, c = np.full((3, 4), 1e5, np.float32), np.full(3, 1e20, np.float32)
    found = solved(rows, np.ones(4, np.float32), np.float32(1), c)
    np.testing.assert_allclose(found.x, np.full(4, 3e25 / (1 + 1.2e11)), rtol=1e-5)


def test_residuals_out_of_reach_do_not_hide_an_unsolved_step():
    """c is all but orthogonal to the rows, and h is beyond what rounding leaves of the identity."""
    rows = np.array([[0.0], [1.0]], np.float32)
    found = solved(rows, np.ones(1, np.float32), np.float32(1e9), np.array([1, 1e-6], np.float32))
    assert float(found.x[0]) == pytest.approx(1e-6 / (1 + 1e9), rel=1e-3)


def test_few_long_rows_that_are_all_but_equal_have_a_factor():
    rng = np.random.default_rng(0)
    row = rng.normal(size=100_000).astype(np.float32)
    rows = np.stack([row, row * (1 + 1e-7 * rng.normal(size=row.size).astype(np.float32))])
    found = solved(rows, np.ones(row.size, np.float32), np.float32(1e6), np.ones(2, np.float32))
    assert np.isfinite(found.x).all()


@pytest.mark.slow
def test_a_batch_of_systems_is_solved_one_by_one(x64):
    rng = np.random.default_rng(2)
    rows, c, h = rng.normal(size=(3, 70, 80)), rng.normal(size=(3, 70)), np.array([0.1, 10.0, 1e6])
    together = jax.jit(
        jax.vmap(
            lambda r, h, c: solve_in_row_space(DenseRows.of(r), jnp.ones(80), h, c, tolerance=1e-10, max_iterations=50)
        )
    )
    np.testing.assert_allclose(
        together(rows, h, c).x,
        [
            solved(r, np.ones(80), t, v, tolerance=1e-10, max_iterations=50).x
            for r, t, v in zip(rows, h, c, strict=True)
        ],
        rtol=1e-8,
        atol=1e-15,
    )


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e12, 1e25])
def test_units_change_no_solution(factor):
    rng = np.random.default_rng(3)
    rows, c = rng.normal(size=(6, 9)).astype(np.float32), rng.normal(size=6).astype(np.float32)
    scale = rng.uniform(0.5, 2, 9).astype(np.float32)
    exact = rows.T.astype(float) @ np.linalg.solve(np.eye(6) + (rows * scale).astype(float) @ rows.T, c)
    of_rows = np.float32(np.sqrt(factor))
    for r, s, h, right, unit in (
        (of_rows * rows, scale, 1 / factor, of_rows * c, factor),
        (rows, factor * scale, 1 / factor, c, 1.0),
        (rows, scale, 1.0, factor * c, factor),
    ):
        found = solved(r, np.float32(s), np.float32(h), np.float32(right))
        np.testing.assert_allclose(np.asarray(found.x, float) / unit, exact, rtol=1e-4, atol=1e-5)
        assert float(found.error) < 1e-4


@pytest.mark.slow
def test_what_the_rows_do_not_reach_costs_one_iteration():
    rows = np.vstack([np.random.default_rng(4).normal(size=(5, 3)), np.zeros((2, 3))]).astype(np.float32)
    unreached = np.r_[np.zeros(5), np.ones(2)].astype(np.float32)
    for r, c in ((0 * rows, np.ones(7, np.float32)), (rows, unreached)):
        for h in (1e-3, 1.0, 1e6):
            found = solved(r, np.ones(3, np.float32), np.float32(h), c)
            assert int(found.iterations) <= 1
            np.testing.assert_array_equal(found.x, 0)


def test_a_direction_that_vanished_does_not_pass_for_a_solution():
    """C times the product is beyond float32: CG makes no step, and says so."""
    b = jnp.array([1.0, 2.0])

    def solution(c):
        return conjugate_gradients(lambda v: 1e30 * v, c, b, None, tolerance=1e-3, max_iterations=5)

    assert bool(solution(1e-30).usable)
    assert bool(solution(1e-30).converged)
    assert not bool(solution(1e30).usable)
    assert not bool(solution(1e30).converged)
