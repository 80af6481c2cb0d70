"""Right-hand sides y' = layer(θ, y, t) of residual networks, as pure functions.

θ is a dict of arrays at one time, without the leading axis of `Controls`. A kernel of shape (channels, hidden) acts on
the last axis of y; one of shape (window, window, channels, hidden), with an odd window, is a convolution of images y of
shape (batch, rows, columns, channels), with zeros beyond the border. Options are keywords: `functools.partial` sets
them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rk_optax import _checks

Theta = dict[str, jax.Array]
Elementwise = Callable[[jax.Array], jax.Array]


def single(theta: Theta, y: jax.Array, t: Any, *, activation: Elementwise = jnp.tanh) -> jax.Array:
    """σ(Ky + b): one layer. θ: kernel, bias.

    >>> theta = initial(jax.random.key(0), single, channels=4)
    >>> single(theta, jnp.ones((2, 4)), 0.0).shape
    (2, 4)
    """
    return activation(_apply(theta["kernel"], y) + theta["bias"])


def double(
    theta: Theta, y: jax.Array, t: Any, *, activation: Elementwise = jnp.tanh, norm: Elementwise | None = None
) -> jax.Array:
    """σ(N(K₂ σ(N(K₁y) + b₁)) + b₂): the residual block of ResNet. θ: kernel1, bias1, kernel2, bias2.

    Args:
      theta: the parameters at t.
      y: features.
      t: time, not used.
      activation: σ.
      norm: N, such as `tv_norm`; None for the identity.
    """
    norm = norm or _identity
    inner = activation(norm(_apply(theta["kernel1"], y)) + theta["bias1"])
    return activation(norm(_apply(theta["kernel2"], inner)) + theta["bias2"])


def preact_double(
    theta: Theta, y: jax.Array, t: Any, *, activation: Elementwise = jnp.tanh, norm: Elementwise | None = None
) -> jax.Array:
    """N(K₂ σ(N(K₁ σ(y)) + b₁)) + b₂: the block with activations first. θ and arguments as of `double`."""
    norm = norm or _identity
    inner = norm(_apply(theta["kernel1"], activation(y))) + theta["bias1"]
    return norm(_apply(theta["kernel2"], activation(inner))) + theta["bias2"]


def double_sym(
    theta: Theta, y: jax.Array, t: Any, *, activation: Elementwise = jnp.tanh, norm: Elementwise | None = None
) -> jax.Array:
    """−Kᵀσ(N(Ky + b)) + b_out: parabolic. θ: kernel, bias; bias_out, and norm_bias after N, where they are there.

    Without N, and with an activation that does not fall and whose slope is at most 1, the Jacobian is symmetric with
    eigenvalues from −‖K‖² to 0: a step is stable where h‖K‖² is at most the method's `real_stability_interval`.

    Args:
      theta: the parameters at t.
      y: features.
      t: time, not used.
      activation: σ.
      norm: N, such as `tv_norm`, with which the Jacobian is not symmetric; None for the identity.

    Source: Ruthotto and Haber, J. Math. Imaging Vision 62 (2020) 352-364.
    """
    inner = _apply(theta["kernel"], y) + theta["bias"]
    if norm is not None:
        inner = norm(inner) + theta.get("norm_bias", 0)
    return theta.get("bias_out", 0) - _apply_transpose(theta["kernel"], activation(inner))


def hamiltonian_y(theta: Theta, z: jax.Array, t: Any, *, activation: Elementwise = jnp.tanh) -> jax.Array:
    """Y' = σ(Kz + b), one half of `hamiltonian`."""
    return activation(_apply(theta["kernel"], z) + theta["bias"])


def hamiltonian_z(theta: Theta, y: jax.Array, t: Any, *, activation: Elementwise = jnp.tanh) -> jax.Array:
    """Z' = −σ(Kᵀy + b_out), the other half of `hamiltonian`."""
    return -activation(_apply_transpose(theta["kernel"], y) + theta["bias_out"])


def hamiltonian(
    theta: Theta, state: tuple[jax.Array, jax.Array], t: Any, *, activation: Elementwise = jnp.tanh
) -> tuple[jax.Array, jax.Array]:
    """Y' = σ(Kz + b), z' = −σ(Kᵀy + b_out): features (y, z) that neither grow nor decay. θ: kernel, bias, bias_out.

    As a layer for `integrate`. `reversible` takes the two halves, and a backward pass that stores nothing.

    Source: Chang et al., AAAI 2018 (arXiv 1709.03698).
    """
    y, z = state
    return hamiltonian_y(theta, z, t, activation=activation), hamiltonian_z(theta, y, t, activation=activation)


def tv_norm(x: jax.Array, *, epsilon: float = 1e-4) -> jax.Array:
    """x/√(Σ x² + ε), the sum over the channels (last axis) of each pixel.

    >>> tv_norm(jnp.array([[3.0, 4.0]])).round(3)
    Array([[0.6, 0.8]], dtype=float32)
    """
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + epsilon)


def initial(
    key: jax.Array,
    layer: Callable[..., Any],
    channels: int,
    *,
    hidden: int | None = None,
    window: int | None = None,
    norm: bool = False,
) -> Theta:
    """Parameters of one of this module's layers: kernels Xavier normal, cut off at two deviations; biases 0.

    Args:
      key: of the random numbers.
      layer: one of this module's layers, also as a `functools.partial`.
      channels: of the features.
      hidden: width inside the layer, by default `channels`.
      window: of a convolution, odd; None for a dense kernel.
      norm: whether `double_sym` has the bias after its norm, and the bias of its transposed kernel.

    Raises:
      ValueError: another layer, an even window, `hidden` for a layer that has no inside, or a `norm` that is no bool.
    """
    norm = _checks.flag(norm, "norm")
    while isinstance(layer, functools.partial):
        layer = layer.func
    hidden_width = channels if hidden is None else hidden
    if layer is single and hidden_width != channels:
        raise ValueError("single has no inside: leave hidden out.")
    if window is not None and window % 2 == 0:
        raise ValueError(f"window must be odd, so that a convolution has its adjoint, got {window}.")
    # name: (the way in or out, channels there)
    there, back = (channels, hidden_width), (hidden_width, channels)
    kernels, biases = {
        single: ({"kernel": there}, {"bias": channels}),
        double: ({"kernel1": there, "kernel2": back}, {"bias1": hidden_width, "bias2": channels}),
        preact_double: ({"kernel1": there, "kernel2": back}, {"bias1": hidden_width, "bias2": channels}),
        double_sym: (
            {"kernel": there},
            {"bias": hidden_width} | ({"norm_bias": hidden_width, "bias_out": channels} if norm else {}),
        ),
        hamiltonian: ({"kernel": back}, {"bias": channels, "bias_out": hidden_width}),
    }.get(layer, (None, None))
    if kernels is None or biases is None:
        raise ValueError(f"initial knows the layers of this module, not {layer!r}: initialise your own yourself.")
    theta = {}
    for name, (fan_in, fan_out) in kernels.items():
        key, own = jax.random.split(key)
        area = 1 if window is None else window**2
        shape = (fan_in, fan_out) if window is None else (window, window, fan_in, fan_out)
        deviation = math.sqrt(2 / (area * (fan_in + fan_out)))
        theta[name] = deviation * jnp.clip(jax.random.normal(own, shape), -2, 2)
    return theta | {name: jnp.zeros(width) for name, width in biases.items()}


def _identity(x: jax.Array) -> jax.Array:
    return x


def _apply(kernel: jax.Array, y: jax.Array) -> jax.Array:
    return y @ kernel if kernel.ndim == 2 else _convolve(y, kernel)


def _apply_transpose(kernel: jax.Array, y: jax.Array) -> jax.Array:
    if kernel.ndim == 2:
        return y @ kernel.T
    # The adjoint of a convolution with zeros beyond the border and an odd window is the one with the window reversed.
    return _convolve(y, kernel[::-1, ::-1].swapaxes(2, 3))


def _convolve(y: jax.Array, kernel: jax.Array) -> jax.Array:
    def by_library(y: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(y, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    # XLA's own convolution is many times slower inside a loop on a CPU, and training steps are often in one.
    return jax.lax.platform_dependent(y, kernel, cpu=_convolve_patches, default=by_library)


def _convolve_patches(y: jax.Array, kernel: jax.Array) -> jax.Array:
    height, width, channels, hidden = kernel.shape
    rows, columns = y.shape[1:3]
    padded = jnp.pad(y, ((0, 0), (height // 2, height // 2), (width // 2, width // 2), (0, 0)))
    shifted = [padded[:, i : i + rows, j : j + columns] for i in range(height) for j in range(width)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(height * width * channels, hidden)
