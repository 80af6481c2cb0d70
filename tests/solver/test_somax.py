"""python-somax's Gauss–Newton step by a Cholesky factorisation in the space of the residuals: ours, independently."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rk_optax

pytestmark = pytest.mark.latest

somax = pytest.importorskip("somax")


@pytest.mark.parametrize("damping", [2.0**-10, 1.0])  # exact in float32, in which that library keeps it
def test_egn_mse_is_residual_euler_with_the_inverse_of_its_damping(x64, damping):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(9, 2))), jnp.asarray(rng.normal(size=9))
    params = {"w": jnp.asarray(rng.normal(size=(2, 4))), "v": jnp.asarray(rng.normal(size=4))}

    def model(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    method = somax.make("egn_mse", predict_fn=model, lam0=damping, learning_rate=1.0)
    theirs = jax.jit(lambda p: method.step(p, {"x": x, "y": y}, method.init(p), jax.random.key(0))[0])(params)

    loss_fn = rk_optax.LeastSquares(lambda params, x, y: model(params, x) - y, reduction="mean")
    tx = rk_optax.residual_euler(loss_fn, 1 / damping)
    updates = jax.jit(lambda p: tx.update(jax.grad(loss_fn)(p, x=x, y=y), tx.init(p), p, x=x, y=y)[0])(params)
    for ours, other, start in zip(*map(jax.tree.leaves, (updates, theirs, params)), strict=True):
        np.testing.assert_allclose(ours, other - start, rtol=1e-11, atol=1e-13)
