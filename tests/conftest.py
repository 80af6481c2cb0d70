"""Shared set-up: eight CPU devices, float64 on request, and the losses that several test files use."""

import os

# Before JAX starts: the sharding tests need several devices.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def pytest_collection_modifyitems(items):
    """The runner's own libraries do not change what the solvers compute."""
    for item in items:
        if "experiment" in item.path.parts:
            item.add_marker(pytest.mark.latest)


@pytest.fixture
def x64():
    """Double precision inside one test."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def network_loss(params, x, y):
    """A nonlinear least-squares loss: a small tanh network of two layers."""
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


def network(dtype=np.float32, seed=0):
    """Parameters and data for `network_loss`: `(params, {"x": ..., "y": ...})`."""
    rng = np.random.default_rng(seed)
    params = {"w1": rng.normal(size=(3, 5)), "b1": rng.normal(size=5), "w2": rng.normal(size=(5, 2))}
    data = {"x": rng.normal(size=(8, 3)), "y": rng.normal(size=(8, 2))}
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, data))


@pytest.fixture
def evaluations():
    """`evaluations.of(function)` counts how often the function is evaluated at run time, whatever is compiled."""

    class Evaluations:
        def __init__(self):
            self._calls = []

        def of(self, function):
            @functools.wraps(function)
            def counted(*args, **kwargs):
                jax.debug.callback(lambda: self._calls.append(1))
                return function(*args, **kwargs)

            return counted

        @property
        def number(self):
            jax.effects_barrier()
            return len(self._calls)

    return Evaluations()
