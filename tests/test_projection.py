"""Constraints kept by the last link of a chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rk_optax
from rk_optax import project, project_to_box


def test_a_runge_kutta_step_ends_in_the_box_and_its_stages_do_not():
    def loss(w):
        return jnp.sum((w["a"] - 3) ** 2) + jnp.sum((w["b"] + 1) ** 2)

    tx = optax.chain(
        rk_optax.rk4(loss, 0.2), project_to_box({"a": 0.0, "b": -0.5}, {"a": 1.0, "b": jnp.array([0.1, 9])})
    )
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(jax.grad(loss)(p), s, p))
    for _ in range(10):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["a"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(params["b"], -0.5, rtol=1e-6)


def test_any_projection_and_any_dtype():
    tx = project(optax.projections.projection_l2_ball)
    params = jnp.array([3.0, 4.0], jnp.bfloat16)
    updates, _ = tx.update(jnp.zeros(2, jnp.bfloat16), tx.init(params), params)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(optax.apply_updates(params, updates), float), [0.6, 0.8], rtol=2e-2)


def test_what_cannot_be_projected_is_refused():
    with pytest.raises(ValueError, match="lower must not exceed upper"):
        project_to_box(1.0, 0.0)
    with pytest.raises(ValueError, match="needs the parameters"):
        project_to_box(0.0, 1.0).update(jnp.ones(2), optax.EmptyState())
