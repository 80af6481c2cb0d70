"""The Flax networks that are trained.

Each is called as `model(inputs, train=...)` and returns logits. In training it draws dropout masks from the random
stream `dropout` and moves whatever statistics it keeps in the collection `batch_stats`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rk_optax.experiment.tasks.rk_net import ConvRKNet, RKNet
from rk_optax.experiment.tasks.task import Kind

if TYPE_CHECKING:  # the configuration knows what is here
    from rk_optax.experiment.config import ModelConfig


class MLP(nn.Module):
    """A multilayer perceptron on flattened images."""

    hidden: tuple[int, ...]
    classes: int
    activation: Callable[[jax.Array], jax.Array] = nn.tanh
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits (example, class)."""
        x = images.reshape(images.shape[0], -1)
        for width in self.hidden:
            x = self.activation(nn.Dense(width)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes)(x)


class CNN(nn.Module):
    """Convolutions of 3 × 3 and stride 2 with BatchNorm, then dropout and a linear layer."""

    channels: tuple[int, ...]
    classes: int
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits (example, class)."""
        x = images
        for channels in self.channels:
            # As a product with patches: XLA's own convolution is 15 times slower inside a loop on a CPU.
            x = nn.Dense(channels, use_bias=False)(_patches(x))  # BatchNorm has a bias
            x = self.activation(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(self.classes)(x)


class Transformer(nn.Module):
    """A causal transformer that predicts the next character at every position."""

    width: int
    blocks: int
    heads: int
    classes: int
    activation: Callable[[jax.Array], jax.Array] = nn.gelu
    dropout: float = 0.0

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Returns the logits (example, position, character)."""
        positions = self.param("positions", nn.initializers.normal(0.02), (tokens.shape[-1], self.width))
        x = nn.Embed(self.classes, self.width)(tokens) + positions
        mask = nn.make_causal_mask(tokens)

        def drop(x: jax.Array) -> jax.Array:
            return nn.Dropout(self.dropout, deterministic=not train)(x)

        for _ in range(self.blocks):
            x += drop(nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask))
            inner = self.activation(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x += drop(nn.Dense(self.width)(inner))
        return nn.Dense(self.classes)(nn.LayerNorm()(x))


def _patches(images: jax.Array) -> jax.Array:
    """The 3 × 3 neighbourhood of every other pixel, zero beyond the border, along the channel axis."""
    rows, columns = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + rows : 2, j : j + columns : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1)


class Architecture(NamedTuple):
    """How a network is built of a configuration, its activation and a number of classes, and what it takes."""

    build: Callable[[ModelConfig, Callable[[jax.Array], jax.Array], int], nn.Module]
    takes: tuple[Kind, ...]
    refines: bool = False  # whether it can be evaluated on a finer grid, `model.apply(..., refined=True)`


# A new network needs a line here.
MODELS: dict[str, Architecture] = {
    "mlp": Architecture(lambda c, act, classes: MLP(c.hidden, classes, act, c.dropout), ("images", "features")),
    "cnn": Architecture(lambda c, act, classes: CNN(c.hidden, classes, act, c.dropout), ("images",)),
    "transformer": Architecture(
        lambda c, act, classes: Transformer(c.width, c.blocks, c.heads, classes, act, c.dropout), ("text",)
    ),
    "rk_net": Architecture(
        lambda c, act, classes: RKNet(c.width, c.depth, c.steps, c.method, c.layer, classes, act),
        ("images", "features"),
        refines=True,
    ),
    "rk_conv_net": Architecture(
        lambda c, act, classes: ConvRKNet(c.steps, c.method, classes, activation=act), ("images",), refines=True
    ),
}


def build_model(config: ModelConfig, classes: int) -> nn.Module:
    """The network that a configuration describes, with one logit per class."""
    return MODELS[config.name].build(config, getattr(nn, config.activation), classes)
