"""The layers, against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate

from rk_optax.networks import double, double_sym, hamiltonian, initial, preact_double, single, tv_norm

IMAGES = np.random.default_rng(0).normal(size=(2, 5, 4, 3))


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_double_sym_has_a_symmetric_jacobian_with_eigenvalues_down_to_minus_the_squared_norm():
    theta = initial(jax.random.key(0), double_sym, 3, hidden=4, window=3) | {"bias_out": jnp.ones(3)}
    theta = jax.tree.map(lambda x: x.astype(float), theta)
    y = jnp.asarray(IMAGES[:1])
    jacobian = jax.jit(jax.jacobian(lambda y: double_sym(theta, y, 0.0).ravel()))(y).reshape(60, 60)
    np.testing.assert_allclose(jacobian, jacobian.T, atol=1e-14)
    linear = functools.partial(double_sym, activation=lambda x: x)
    kernel = jax.jit(jax.jacobian(lambda y: linear(theta, y, 0.0).ravel()))(y).reshape(60, 60)  # −KᵀK as a matrix
    eigenvalues, bound = np.linalg.eigvalsh(jacobian), np.linalg.norm(kernel, 2)
    assert -bound - 1e-12 <= eigenvalues.min() < eigenvalues.max() <= 1e-12


@pytest.mark.usefixtures("x64")
def test_a_convolution_is_scipy_s_and_its_transpose_its_adjoint():
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 3, 2)))
    theta, y = {"kernel": kernel, "bias": jnp.zeros(2)}, jnp.asarray(IMAGES)
    ours = single(theta, y, 0.0, activation=lambda x: x)
    for image, result in zip(IMAGES, ours, strict=True):
        for channel in range(2):
            expected = sum(correlate(image[..., c], kernel[..., c, channel], "same") for c in range(3))
            np.testing.assert_allclose(result[..., channel], expected, atol=1e-13)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 5, 4, 2)))
    theta = {"kernel": kernel, "bias": jnp.zeros(2), "bias_out": jnp.zeros(3)}
    there, back = hamiltonian(theta, (x, y), 0.0, activation=lambda x: x)
    np.testing.assert_allclose(jnp.sum(x * there), -jnp.sum(back * y), atol=1e-12)  # ⟨x, Ky⟩ = ⟨Kᵀx, y⟩


@pytest.mark.usefixtures("x64")
def test_layers_are_their_formulas():
    y, rng = jnp.asarray(IMAGES[0]), np.random.default_rng(3)
    theta = {"kernel1": rng.normal(size=(3, 4)), "bias1": rng.normal(size=4)}
    theta |= {"kernel2": rng.normal(size=(4, 3)), "bias2": rng.normal(size=3)}
    k1, k2, b1, b2 = theta["kernel1"], theta["kernel2"], theta["bias1"], theta["bias2"]

    def norm(x):
        return x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-4)

    np.testing.assert_allclose(
        double(theta, y, 0.0, norm=tv_norm), np.tanh(norm(np.tanh(norm(y @ k1) + b1) @ k2) + b2), atol=1e-14
    )
    np.testing.assert_allclose(
        preact_double(theta, y, 0.0, norm=tv_norm), norm(np.tanh(norm(np.tanh(y) @ k1) + b1) @ k2) + b2, atol=1e-14
    )
    symmetric = {"kernel": k1, "bias": b1, "norm_bias": 2 * b1, "bias_out": b2}
    np.testing.assert_allclose(
        double_sym(symmetric, y, 0.0, norm=tv_norm), b2 - np.tanh(norm(y @ k1 + b1) + 2 * b1) @ k1.T, atol=1e-14
    )


def test_initial_parameters_are_xavier_normal_cut_off_and_count_as_they_should():
    theta = initial(jax.random.key(0), functools.partial(double, norm=tv_norm), 40, hidden=60)
    deviation = np.sqrt(2 / 100)
    assert float(theta["kernel1"].std()) == pytest.approx(0.96 * deviation, rel=0.05)
    assert float(jnp.abs(theta["kernel1"]).max()) <= 2 * deviation + 1e-6
    assert not theta["bias1"].any()
    of_images = initial(jax.random.key(0), double_sym, 16, window=3, norm=True)
    assert sum(x.size for x in of_images.values()) == 9 * 16**2 + 3 * 16
    for layer in (single, double, preact_double, double_sym):
        assert layer(initial(jax.random.key(0), layer, 3), jnp.ones((2, 3)), 0.0).shape == (2, 3)
    for message, layer, options in (
        ("no inside", single, {"hidden": 4}),
        ("odd", single, {"window": 2}),
        ("this mod", jnp.tanh, {}),
    ):
        with pytest.raises(ValueError, match=message):
            initial(jax.random.key(0), layer, 3, **options)
