"""What several test files do with a transformation: take steps, compare trees, count evaluations."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rk_optax import Cost, DiagonalPreconditioner


def descent_gradient(loss, params, **data):
    """What Optax calls the gradient: conjugated for complex leaves."""
    return jax.tree.map(jnp.conj, jax.grad(loss)(params, **data))


def first_update(tx, loss, params, **data):
    """The first update of `tx` and the state after it."""
    params = jax.tree.map(jnp.asarray, params)
    return tx.update(descent_gradient(loss, params, **data), tx.init(params), params, **data)


def trajectory(tx, loss, params, data, steps, jit=True):
    """`(params, state)` at the start and after each of some steps on the same data."""

    def step(params, state, data):
        updates, state = tx.update(descent_gradient(loss, params, **data), state, params, **data)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    params = jax.tree.map(jnp.asarray, params)
    visited = [(params, tx.init(params))]
    for _ in range(steps):
        visited.append(step(*visited[-1], data))
    return visited


def assert_close(actual, expected, rtol=1e-12, atol=1e-14):
    """Same structure, nearly the same numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=atol), actual, expected)


def assert_same(actual, expected):
    """Same structure, the very same numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@dataclasses.dataclass(frozen=True, eq=False)
class FixedScale(DiagonalPreconditioner):
    """P = `scale`, a tree like params, whatever the gradient is."""

    scale: Any

    def update(self, gradient, state, params, field):
        return self.scale, state, Cost()


def types(tree):
    """Shape and dtype of each leaf."""
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


class Evaluations:
    """Counts how often a function is evaluated when the program runs, compiled or not; a product counts once."""

    def __init__(self, function):
        self._calls = []

        @functools.wraps(function)
        def counted(*args, **kwargs):
            jax.debug.callback(lambda: self._calls.append(1))
            return function(*args, **kwargs)

        self.function = counted

    def take(self):
        """The evaluations since the last call of `take`."""
        jax.effects_barrier()
        n = len(self._calls)
        self._calls.clear()
        return n
