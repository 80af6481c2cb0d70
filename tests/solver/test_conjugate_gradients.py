"""Conjugate gradients: the iterations of the textbook, under a preconditioner, and of nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

from rk_optax.solver._linear import conjugate_gradients


def numpy_cg(a, b, tolerance, most):
    """Textbook CG from 0 with Steihaug's exit."""
    x, r = np.zeros_like(b), b.copy()
    p, count = r.copy(), 0
    while np.linalg.norm(r) > tolerance * np.linalg.norm(b) and count < most:
        count += 1
        moved = a @ p
        if p @ moved <= 0:
            return (b if count == 1 else x), count, True
        step = r @ r / (p @ moved)
        x, new = x + step * p, r - step * moved
        p, r = new + new @ new / (r @ r) * p, new
    return x, count, False


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("tolerance", [0.3, 1e-3, 1e-10])
@pytest.mark.parametrize("most", [1, 3, 50])
@pytest.mark.parametrize("spectrum", [np.linspace(1, 9, 8), np.repeat([1.0, 5.0], 4), np.r_[-0.5, np.ones(7) * 2]])
def test_cg_takes_the_iterations_of_the_textbook(spectrum, most, tolerance, x64):
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    matrix, b, c = (basis * spectrum) @ basis.T, rng.normal(size=8), 4.0
    expected, count, negative = numpy_cg(np.eye(8) + c * matrix, b, tolerance, most)
    found = conjugate_gradients(lambda v: matrix @ v, c, jnp.asarray(b), None, tolerance=tolerance, max_iterations=most)
    assert (int(found.iterations), bool(found.negative)) == (count, negative)
    np.testing.assert_allclose(found.x, expected, rtol=1e-8, atol=1e-10)
    if not negative:
        true = np.linalg.norm(b - (np.eye(8) + c * matrix) @ found.x) / np.linalg.norm(b)
        assert float(found.residual) == pytest.approx(true, rel=1e-4, abs=1e-12)
        assert true <= tolerance or count == most
    if len(set(np.round(spectrum, 9))) == 2 and not negative and most == 50:
        assert count <= 2  # as many as distinct eigenvalues


def test_cg_under_a_preconditioner_works_on_the_symmetric_form(x64):
    rng = np.random.default_rng(4)
    root = rng.normal(size=(5, 5))
    matrix, b, scale = root @ root.T, rng.normal(size=5), np.array([0.01, 1.0, 100.0, 0.5, 3.0])
    found = conjugate_gradients(
        lambda v: matrix @ v, 0.3, jnp.asarray(b), jnp.asarray(scale), tolerance=1e-12, max_iterations=5
    )
    expected = np.linalg.solve(np.eye(5) + 0.3 * scale[:, None] * matrix, b)
    np.testing.assert_allclose(found.x, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_cg_of_nothing_is_nothing_and_of_nan_is_nan():
    def solve(b, product=lambda v: v):
        return conjugate_gradients(product, 1.0, b, None, tolerance=1e-3, max_iterations=9)

    nothing = solve(jnp.zeros(3))
    assert (int(nothing.iterations), float(nothing.residual)) == (0, 0.0)
    np.testing.assert_array_equal(nothing.x, 0)
    for bad in (solve(jnp.array([1.0, np.nan])), solve(jnp.ones(2), lambda v: v * np.nan), solve(jnp.array([np.inf]))):
        assert np.isnan(bad.x).all()
        assert int(bad.iterations) <= 1
