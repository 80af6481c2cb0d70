import jax
import jax.numpy as jnp
import pytest

from rk_optax.experiment.config import ModelConfig
from rk_optax.experiment.models import build_model


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_mlp_has_the_configured_layers(activation):
    model = build_model(ModelConfig(hidden=(12, 7), activation=activation), classes=10)
    images = jnp.ones((3, 8, 8, 1))
    params = model.init(jax.random.key(0), images)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(params))
    assert shapes == sorted([(64, 12), (12,), (12, 7), (7,), (7, 10), (10,)])
    assert model.apply(params, images).shape == (3, 10)


def test_activations_differ():
    images = jnp.linspace(-1, 1, 64).reshape(1, 8, 8, 1)
    outputs = []
    for activation in ("tanh", "relu", "gelu"):
        model = build_model(ModelConfig(hidden=(5,), activation=activation), classes=2)
        outputs.append(model.apply(model.init(jax.random.key(0), images), images))
    assert not jnp.allclose(outputs[0], outputs[1])
    assert not jnp.allclose(outputs[1], outputs[2])
