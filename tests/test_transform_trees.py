"""What one update is: trees, against steps by hand in NumPy, Optax and closed forms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import (
    PARAMS,
    STAYS,
    H,
    X,
    assert_close,
    dtypes,
    exact_flow,
    first_update,
    loss_fn,
    loss_gradient,
    numpy_rk4,
    numpy_update,
    observed_order,
)

import rk_optax


# --- Trees and types -----------------------------------------------------------------------------------------------
class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None


@pytest.mark.slow
def test_none_leaves_and_scalar_leaves_in_any_containers_work(x64):
    def tree(w, b):
        return [Layer(w, None), {"scalars": (b[0], b[1])}, ()]

    def loss(params, x):
        return loss_fn({"w": params[0].kernel, "b": jnp.stack(params[1]["scalars"])}, x)

    tx = rk_optax.rk4(loss, H, momentum=0.9)
    updates, _ = first_update(tx, loss, tree(PARAMS["w"], PARAMS["b"]), x=X)
    expected = numpy_update(PARAMS, X)
    assert_close(updates, tree(expected["w"], expected["b"]))


@pytest.mark.parametrize("params", [{}, (), None, {"a": None}])
def test_a_tree_without_leaves_is_a_step_that_stays(params):
    tx = rk_optax.rk4(lambda params: jnp.zeros([]), H, momentum=0.9)
    if params is None:
        params = {"nothing": {}}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates == params
    assert (state.count, bool(state.accepted)) == (1, True)


def test_python_numbers_and_numpy_arrays_are_parameters_too():
    tx = rk_optax.rk4(lambda params: params["a"] ** 2 / 2 + jnp.sum(params["b"] ** 2) / 2, 1.0)
    params = {"a": 2.0, "b": np.array([1.0], np.float32)}
    updates, _ = tx.update(params, tx.init(params), params)
    after_one_step = 1 - 1 + 1 / 2 - 1 / 6 + 1 / 24  # the stability polynomial at −1
    np.testing.assert_allclose(updates["a"], 2.0 * (after_one_step - 1), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [after_one_step - 1], rtol=1e-6)


def complex_loss(params):
    """|z² − d|² summed: real, nonlinear, and its gradient is easily written by hand."""
    return jnp.sum(jnp.abs(params["z"] ** 2 - TARGET) ** 2) + jnp.sum(params["x"] ** 2 * jnp.abs(params["z"]) ** 2)


def complex_gradient(params):
    """2 ∂L/∂z̄ for z and ∂L/∂x for the real leaf, in NumPy."""
    z, x = params["z"], params["x"]
    return {"z": 4 * (z**2 - TARGET) * np.conj(z) + 2 * x**2 * z, "x": 2 * x * np.abs(z) ** 2}


TARGET = np.array([0.3 + 0.5j, -0.4 + 0.1j])
COMPLEX_PARAMS = {"z": np.array([0.9 - 0.4j, 0.2 + 0.7j]), "x": np.array([0.5, -0.6])}


def test_complex_leaves_step_as_the_textbook_does_with_conjugated_gradients(x64):
    updates, _ = first_update(rk_optax.rk4(complex_loss, 0.1), complex_loss, COMPLEX_PARAMS)
    expected = numpy_rk4(complex_gradient, COMPLEX_PARAMS, 0.1)
    assert_close(updates, jax.tree.map(lambda g: -0.1 * g, expected))
    assert dtypes(updates) == [jnp.float64, jnp.complex128]


def test_complex_leaves_follow_the_flow_at_the_order_of_the_method(x64):
    params = jax.tree.map(lambda a: np.asarray(a, complex), COMPLEX_PARAMS)
    exact = exact_flow(complex_gradient_in_jax, params, 1.0)
    exact["x"] = jnp.real(exact["x"])
    slope = observed_order(
        lambda h: rk_optax.rk4(complex_loss, h), complex_loss, COMPLEX_PARAMS, {}, exact, 1.0, [10, 20, 40, 80]
    )
    assert 3.85 <= slope <= 4.6


def complex_gradient_in_jax(params):
    z, x = params["z"], params["x"]
    return {"z": 4 * (z**2 - TARGET) * jnp.conj(z) + 2 * x**2 * z, "x": 2 * x * jnp.abs(z) ** 2}


def test_mixed_dtypes_keep_their_own_and_their_own_precision(x64):
    params = {"w": jnp.asarray(PARAMS["w"], jnp.float64), "b": jnp.asarray(PARAMS["b"], jnp.float32)}
    tx = rk_optax.rk4(loss_fn, H, momentum=0.9)
    updates, state = first_update(tx, loss_fn, params, x=X)
    assert dtypes(updates) == dtypes(params) == dtypes(state.after)
    rounded = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    expected = numpy_update(rounded, X)
    np.testing.assert_allclose(updates["b"], expected["b"], rtol=1e-6)
    # Only the float32 leaf's stages may round; were w scaled in float32 too, this would be of the order of 1e-8.
    alone = rk_optax.rk4(loss_fn, H, mask={"w": True, "b": False})
    fixed = {**loss_gradient(rounded, X), "b": np.zeros(2)}
    updates, _ = first_update(alone, loss_fn, params, x=X)
    expected = numpy_rk4(lambda p: {**loss_gradient(p, X), "b": np.zeros(2)}, rounded, H, k1=fixed)
    np.testing.assert_allclose(updates["w"], -H * expected["w"], rtol=1e-13)


@pytest.mark.covering
@pytest.mark.parametrize("rate", [np.float64(0.1), np.float32(0.1), np.array(0.1), lambda count: np.float64(0.1), 0.1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_no_kind_of_step_size_promotes_anything(rate, dtype, x64):
    params = jnp.ones(2, dtype)
    tx = rk_optax.rk4(lambda params: jnp.sum(jnp.abs(params) ** 2) / 2, rate, momentum=0.9)
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert updates.dtype == dtype
    assert dtypes(state.after) == [dtype]
    assert state.step_size.dtype == jnp.float64


# One ulp of 1 is 2^-7 in bfloat16 and 2^-10 in float16; here the whole step is about 4e-4, at h·curvature = 1.
OFFSET, CURVATURE = 4e-4, 100.0


def stiff_loss(params):
    return jnp.sum(CURVATURE / 2 * (params - jnp.float32(1 + OFFSET)) ** 2)


@pytest.mark.parametrize(
    ("dtype", "stage_dtype", "expected"),
    [
        (jnp.bfloat16, "float32", OFFSET * (1 - STAYS)),
        (jnp.float16, "float32", OFFSET * (1 - STAYS)),
        (jnp.float16, None, OFFSET),  # Euler; bfloat16 is left out, as XLA keeps its sums in float32 where it fuses
    ],
)
def test_low_precision_stages_vanish_below_one_ulp_unless_they_are_formed_in_float32(dtype, stage_dtype, expected):
    params = jnp.ones(3, dtype)
    tx = rk_optax.rk4(stiff_loss, 1 / CURVATURE, stage_dtype=stage_dtype)
    updates, _ = tx.update(jnp.full(3, -CURVATURE * OFFSET, dtype), tx.init(params), params)
    assert updates.dtype == dtype
    np.testing.assert_allclose(np.float32(updates), expected, rtol=0.01)


@pytest.mark.covering
@pytest.mark.parametrize(
    ("dtype", "stage_dtype", "seen"),
    [
        (jnp.bfloat16, "float32", jnp.float32),
        (jnp.float16, jnp.float32, jnp.float32),
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float16, None, jnp.float16),
        (jnp.bfloat16, "float64", jnp.float64),
        (jnp.float64, "float32", jnp.float64),
        (jnp.complex64, "float32", jnp.complex64),
        (jnp.complex64, "float64", jnp.complex128),
        (jnp.float32, "bfloat16", jnp.float32),
    ],
)
def test_the_loss_sees_stages_in_the_stage_dtype_and_no_less_than_the_parameters_own(dtype, stage_dtype, seen, x64):
    witnessed = set()

    def loss(params):
        witnessed.update(dtypes(params))
        return jnp.sum(jnp.abs(params["moves"]) ** 2) * jnp.sum(jnp.abs(params["stays"]))

    params = {"moves": jnp.ones(2, dtype), "stays": jnp.ones(2, dtype)}
    tx = rk_optax.rk4(loss, H, stage_dtype=stage_dtype, mask={"moves": True, "stays": False}, momentum=0.9)
    updates, state = tx.update(params, tx.init(params), params)
    assert witnessed == {jnp.dtype(seen)}
    assert dtypes(updates) == [dtype, dtype]
    assert dtypes(state.after) == [dtype]
