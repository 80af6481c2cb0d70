import jax
import jax.numpy as jnp
import pytest

from rk_optax.experiment.config import ModelConfig
from rk_optax.experiment.tasks.models import build_model


def init(model, inputs):
    return jax.jit(model.init)(jax.random.key(0), inputs)


def apply(model, variables, inputs, **options):
    def call(variables, inputs, rngs):
        return model.apply(variables, inputs, rngs=rngs, **options)

    rngs = options.pop("rngs", None)
    return jax.jit(call)(variables, inputs, rngs)


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu"])
def test_mlp_has_the_configured_layers(activation):
    model = build_model(ModelConfig(hidden=(12, 7), activation=activation), classes=10)
    images = jnp.ones((3, 8, 8, 1))
    params = init(model, images)
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(params))
    assert shapes == sorted([(64, 12), (12,), (12, 7), (7,), (7, 10), (10,)])
    assert apply(model, params, images).shape == (3, 10)


def test_activations_differ():
    images = jnp.linspace(-1, 1, 64).reshape(1, 8, 8, 1)
    outputs = []
    for activation in ("tanh", "relu", "gelu"):
        model = build_model(ModelConfig(hidden=(5,), activation=activation), classes=2)
        outputs.append(apply(model, init(model, images), images))
    assert not jnp.allclose(outputs[0], outputs[1])
    assert not jnp.allclose(outputs[1], outputs[2])


@pytest.mark.slow
def test_dropout_and_statistics_are_for_training_alone():
    images = jnp.linspace(-1, 1, 4 * 49).reshape(4, 7, 7, 1)
    for name, dropout in [("mlp", 0.5), ("cnn", 0.5)]:
        model = build_model(ModelConfig(name, hidden=(6,), dropout=dropout), classes=3)
        variables = init(model, images)
        assert jnp.array_equal(apply(model, variables, images), apply(model, variables, images))
        masks = [{"dropout": jax.random.key(seed)} for seed in (1, 1, 2)]
        first, again, other = (
            apply(model, variables, images, train=True, rngs=mask, mutable=["batch_stats"])[0] for mask in masks
        )
        assert jnp.array_equal(first, again)
        assert not jnp.allclose(first, other)


@pytest.mark.slow
def test_cnn_is_convolutions_and_batch_norm():
    """The oracle: XLA's convolution and the two moments."""
    images = jax.random.normal(jax.random.key(1), (5, 7, 7, 1))
    model = build_model(ModelConfig("cnn", hidden=(4, 6), activation="relu"), classes=3)
    variables = init(model, images)
    logits, moved = apply(model, variables, images, train=True, mutable=["batch_stats"])
    x, params = images, variables["params"]
    for layer in range(2):
        kernel = params[f"Dense_{layer}"]["kernel"].reshape(3, 3, x.shape[-1], -1)
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        assert jnp.allclose(moved["batch_stats"][f"BatchNorm_{layer}"]["mean"], 0.1 * mean, atol=1e-5)
        x = jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5))
    expected = x.reshape(5, -1) @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    assert jnp.allclose(logits, expected, atol=1e-4)


@pytest.mark.slow
def test_transformer_looks_back_alone():
    config = ModelConfig("transformer", width=8, blocks=2, heads=2, activation="gelu", dropout=0.1)
    model = build_model(config, classes=5)
    tokens = jnp.array([[0, 1, 2, 3, 4, 0]])
    variables = init(model, tokens)
    logits = apply(model, variables, tokens)
    assert logits.shape == (1, 6, 5)
    changed = apply(model, variables, tokens.at[0, 3].set(1))
    assert jnp.allclose(logits[0, :3], changed[0, :3], atol=1e-6)
    assert jnp.all(jnp.any(jnp.abs(logits[0, 3:] - changed[0, 3:]) > 1e-4, axis=-1))
