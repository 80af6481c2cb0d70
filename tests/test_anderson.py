"""Anderson acceleration: against least squares by NumPy, in finitely many steps on linear maps, in any units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rk_optax._anderson import History, anderson


def iterates(maps, start, count, length):
    """The iterates of several maps, one row of `start` each, shape (count, k, n)."""

    def step(carry, i):
        x, history = carry
        new, history = anderson(x, maps(x) - x, history, i)
        return (new, history), new

    start = jnp.asarray(start)
    run = jax.jit(lambda x: jax.lax.scan(step, (x, History.of(x, length)), jnp.arange(count))[1])
    return np.asarray(run(start))


def test_an_iterate_is_that_of_least_squares_over_the_latest_differences(x64):
    rng = np.random.default_rng(0)
    matrix, x = 0.3 * rng.normal(size=(5, 5)), rng.normal(size=5)
    image = lambda x: np.tanh(matrix @ x) + 0.5  # noqa: E731
    found = iterates(jax.vmap(lambda x: jnp.tanh(matrix @ x) + 0.5), x[None], 6, 3)[:, 0]
    seen = []
    for point in found:
        seen = [*seen[-3:], (x, image(x) - x)]
        moved, changed = (np.diff([pair[i] for pair in seen], axis=0) for i in (0, 1))
        x = sum(seen[-1])
        if len(seen) > 1:
            x = x - np.linalg.lstsq(changed.T, seen[-1][1], rcond=None)[0] @ (moved + changed)
        np.testing.assert_allclose(point, x, rtol=1e-9)


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_the_fixed_point_of_a_linear_map_is_found_though_its_iteration_diverges(unit):
    """In float32: x ↦ Ax + b in three dimensions, A with eigenvalues of −4, 0.5 and 3; beside it a map to ∞."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    matrix = jnp.asarray(rotation @ np.diag([-4.0, 0.5, 3.0]) @ rotation.T, jnp.float32)
    shift = unit * jnp.array([1.0, -2.0, 0.5])

    def maps(x):
        return jnp.stack([matrix @ x[0] + shift, jnp.full(3, jnp.inf)])

    found = iterates(maps, unit * jnp.ones((2, 3)), 6, 3)
    expected = np.linalg.solve(np.eye(3) - np.asarray(matrix, float), np.asarray(shift, float))
    np.testing.assert_allclose(found[-1, 0], expected, rtol=1e-4)


def test_without_a_history_it_is_the_map_itself():
    found = iterates(lambda x: 0.5 * x + 1, np.zeros((1, 2), np.float32), 2, 0)
    np.testing.assert_array_equal(found[:, 0, 0], [1.0, 1.5])
