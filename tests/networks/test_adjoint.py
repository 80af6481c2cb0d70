"""Momentum and energy along depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rk_optax.networks import Controls, integrate, momentum

from .cases import NODES, controls, features, largest_difference, layer, order


@pytest.mark.usefixtures("x64")
def test_momentum_times_perturbation_is_kept_exactly():
    block, y = controls(), features()

    def loss(end):
        return jnp.sum(jnp.cos(end))

    along = momentum(layer, block, y, NODES, loss)
    start = jax.grad(lambda y: loss(integrate(layer, block, y, NODES)))(y)
    assert largest_difference(along.momenta[0], start) < 1e-15
    perturbation = jnp.asarray(np.random.default_rng(5).normal(size=y.shape))

    def states(y):
        return integrate(layer, block, y, NODES, report=["states"])[1].states

    moved = jax.jvp(states, (y,), (perturbation,))[1]
    products = jnp.sum(along.momenta * moved, axis=(1, 2))
    np.testing.assert_allclose(products, products[0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("name", "expected"), [("euler", 1), ("heun", 2), ("rk4", 4)])
@pytest.mark.usefixtures("x64")
def test_energy_drifts_with_the_order_of_the_method(name, expected):
    block = Controls.constant_in_time(controls().at(0.3), (0,))

    def autonomous(theta, y, t):
        return layer(theta, y, 0.0)

    y = features()

    def drift(n):
        energy = momentum(autonomous, block, y, np.linspace(0, 1, n + 1), lambda end: jnp.sum(end**2), name).energy
        assert energy.shape == (n + 1, 4)
        return float(jnp.abs(energy - energy[-1]).max())

    assert expected - 0.4 < order(drift, (16, 32)) < expected + 0.5


@pytest.mark.usefixtures("x64")
def test_energy_changes_where_the_weights_move():
    energy = momentum(layer, controls(), features(), np.linspace(0, 2, 33)[:9], lambda end: jnp.sum(end**2)).energy
    assert jnp.abs(energy - energy[-1]).max() > 0.1
