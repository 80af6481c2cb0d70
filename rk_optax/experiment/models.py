"""The Flax networks that are trained."""

from collections.abc import Callable

import flax.linen as nn
import jax

from rk_optax.experiment.config import ModelConfig

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": nn.tanh,
    "relu": nn.relu,
    "gelu": nn.gelu,
}


class MLP(nn.Module):
    """A multilayer perceptron on flattened images."""

    hidden: tuple[int, ...]
    classes: int
    activation: Callable[[jax.Array], jax.Array] = nn.tanh

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns the logits (example, class)."""
        x = images.reshape(images.shape[0], -1)
        for width in self.hidden:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


def build_model(config: ModelConfig, classes: int) -> nn.Module:
    """The network that a configuration describes, with one logit per class."""
    match config.name:
        case "mlp":
            return MLP(tuple(config.hidden), classes, _ACTIVATIONS[config.activation])
