"""Factors whose shifted systems are cheap: against dense solves by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rk_optax._vectors import lower_gram
from rk_optax.solver._factor import Eigenvectors, Tridiagonal

SIZES = np.array([0.0, 1e-3, 0.7, 40.0, 1e5])


def gram(n, seed=0):
    """Of four rows at most, scaled: of low rank from n = 5 on."""
    rows = np.random.default_rng(seed).normal(size=(n, 4))
    return rows @ rows.T


MATRICES = {
    "one": gram(1),
    "two": gram(2),
    "three": gram(3),
    "two blocks": gram(70) + np.diag(np.linspace(0, 1, 70)),
    "diagonal": np.diag(np.arange(1.0, 6)),  # no reflection has anything to do
    "block diagonal": np.kron(np.eye(3), gram(3, 1)),  # some have nothing
    "zero": np.zeros((4, 4)),
}


def tridiagonal(matrix):
    return Tridiagonal.of(jnp.tril(matrix) + 7 * jnp.triu(jnp.ones(matrix.shape), 1))  # that part is not read


def eigenvectors(matrix):
    return Eigenvectors(*jnp.linalg.eigh(jnp.asarray(matrix)))


@jax.jit
def steps(matrix, h, b):
    """(I + hA)⁻¹b of all h."""
    f = tridiagonal(matrix)
    return f.vectors(f.solve(h, f.coordinates(b)))


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("factor", [tridiagonal, eigenvectors])
def test_the_shifted_systems_of_all_h_are_solved(factor, name, x64):
    matrix = MATRICES[name]
    b = np.random.default_rng(1).normal(size=(len(SIZES), len(matrix)))

    @jax.jit
    def solve(matrix, b):
        f = factor(matrix)
        z = f.coordinates(b)
        return f.vectors(z), f.vectors(f.solve(SIZES, z)), f.vectors(f.solve(SIZES, z[:1])), f.mean

    back, each, shared, mean = solve(matrix, b)
    np.testing.assert_allclose(back, b, atol=1e-14)
    expected = [np.linalg.solve(np.eye(len(matrix)) + h * matrix, x) for h, x in zip(SIZES, b, strict=True)]
    np.testing.assert_allclose(each, expected, atol=1e-9)
    expected = [np.linalg.solve(np.eye(len(matrix)) + h * matrix, b[0]) for h in SIZES]
    np.testing.assert_allclose(shared, expected, atol=1e-9)
    assert mean == pytest.approx(np.trace(matrix) / len(matrix))


@pytest.mark.parametrize("unit", [1e-150, 1.0, 1e150])
def test_no_h_overflows_and_rounding_leaves_no_negative_eigenvalue(unit, x64):
    h = np.array([1e11, 1e17, 1e140]) / unit
    found = np.asarray(steps(gram(9) * unit, h, gram(9)[:1]))  # b in the range of A, so all of it is damped
    nearest = np.linalg.lstsq(gram(9), gram(9)[0], rcond=1e-12)[0]
    np.testing.assert_allclose(1e11 * found[0], nearest, atol=1e-3)
    assert np.all(np.abs(found[1:]) <= 1e-12)  # what is lost to rounding is no step


def test_many_matrices_at_once(x64):
    matrices = np.stack([gram(5, seed) for seed in range(3)])
    found = jax.jit(jax.vmap(steps, (0, None, None)))(matrices, np.array([2.0]), np.ones((1, 5)))[:, 0]
    expected = np.linalg.solve(np.eye(5) + 2 * matrices, np.ones((3, 5, 1)))[..., 0]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("shape", [(2, 5), (520, 3)])  # at once, and by blocks
@pytest.mark.parametrize("scaled", [False, True])
def test_the_lower_triangle_of_a_gram_matrix(shape, scaled, x64):
    rng = np.random.default_rng(0)
    rows, scale = rng.normal(size=shape), rng.uniform(size=shape[1])
    expected = np.tril(rows @ np.diag(scale if scaled else np.ones(shape[1])) @ rows.T)
    found = np.tril(jax.jit(lower_gram)(rows, scale if scaled else None))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
