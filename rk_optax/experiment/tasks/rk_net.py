"""Networks that are Runge–Kutta methods of their features: dense, and the convolutional one of Onken and Ruthotto."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from rk_optax.linen import RKBlock
from rk_optax.networks import double_sym, initial, refine, refine_state, single, tv_norm

Activation = Callable[[jax.Array], jax.Array]
LAYERS = {"double_sym": double_sym, "single": single}
# Steps for each unit of time of the refined grid, by RK4.
_FINE = 16


class RKNet(nn.Module):
    """Linear features, one block of so many units of time with a node at each, and a linear layer."""

    width: int
    depth: int
    steps: int
    method: str
    layer: str
    classes: int
    activation: Activation = nn.tanh
    halvings: int = 0  # of the grids of steps and of nodes

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, refined: bool = False) -> jax.Array:
        """Returns the logits (example, class); `refined`: those of the same weights on a fine grid."""
        y = nn.Dense(self.width, name="first")(images.reshape(images.shape[0], -1))
        layer = LAYERS[self.layer]
        start = partial(initial, layer=layer, channels=self.width)
        block = _block(self, partial(layer, activation=self.activation), start, refined)
        return nn.Dense(self.classes, name="last")(block(y))


class ConvRKNet(nn.Module):
    """Three blocks of 16, 32 and 64 channels, 1 × 1 convolutions and pooling between them, and a linear layer.

    Each block is `double_sym` with 3 × 3 convolutions and `tv_norm`, five nodes in four units of time: 251,866
    parameters for 3 input channels and 10 classes. BatchNorm is outside the blocks only.

    Source: Onken and Ruthotto's poster and its code, DynamicBlocks.
    """

    steps: int
    method: str
    classes: int
    widths: tuple[int, ...] = (16, 32, 64)
    depth: int = 4
    activation: Activation = nn.relu
    halvings: int = 0

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, refined: bool = False) -> jax.Array:
        """Returns the logits (example, class); `refined`: of the same weights on a fine grid."""
        layer = partial(double_sym, activation=self.activation, norm=tv_norm)

        def connected(y: jax.Array, channels: int, window: int) -> jax.Array:
            y = nn.Conv(channels, (window, window))(y)
            return self.activation(nn.BatchNorm(use_running_average=not train, momentum=0.9)(y))

        y = connected(images, self.widths[0], 3)
        for i, (width, following) in enumerate(zip(self.widths, (*self.widths[1:], self.widths[-1]), strict=True)):
            start = partial(initial, layer=double_sym, channels=width, window=3, norm=True)
            y = _block(self, layer, start, refined, f"block{i}")(y)
            y = connected(y, following, 1)
            last = i == len(self.widths) - 1
            y = y.mean(axis=(1, 2)) if last else nn.avg_pool(y, (2, 2), (2, 2))
        return nn.Dense(self.classes)(y)


def finer(net: RKNet | ConvRKNet) -> tuple[RKNet | ConvRKNet, Callable[[Any], Any], Callable[..., Any]]:
    """The network with steps and distances between nodes half as long, and how to get there.

    That is a function of its parameters that leaves θ(t) as it is, and one of an optimizer's state and of the powers of
    `refine_state`.
    """
    following = net.clone(halvings=net.halvings + 1)
    old, nodes = _nodes(net), _nodes(following)
    return following, partial(refine, nodes=nodes, old=old), partial(refine_state, nodes=nodes, old=old)


def _nodes(net: Any) -> tuple[float, ...]:
    return tuple(np.linspace(0, net.depth, net.depth * 2**net.halvings + 1).tolist())


def _block(net: Any, layer: Any, start: Any, refined: bool, name: str = "block") -> RKBlock:
    steps, method = (_FINE * net.depth, "rk4") if refined else (net.steps, net.method)
    grid = np.linspace(0, net.depth, steps * 2**net.halvings + 1)
    return RKBlock(layer, _nodes(net), grid, method, initial=start, name=name)
