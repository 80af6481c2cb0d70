"""Momentum and energy along depth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rk_optax.networks import Controls, integrate, momentum

from .cases import NODES, controls, features, largest_difference, layer, order


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_momentum_times_perturbation_is_kept_exactly():
    block, y = controls(), features()

    def loss(end):
        return jnp.sum(jnp.cos(end))

    along = momentum(layer, block, y, NODES, loss)
    start = jax.jit(jax.grad(lambda y: loss(integrate(layer, block, y, NODES))))(y)
    assert largest_difference(along.momenta[0], start) < 1e-15
    perturbation = jnp.asarray(np.random.default_rng(5).normal(size=y.shape))

    def states(y):
        return integrate(layer, block, y, NODES, report=["states"])[1].states

    moved = jax.jvp(states, (y,), (perturbation,))[1]
    products = jnp.sum(along.momenta * moved, axis=(1, 2))
    np.testing.assert_allclose(products, products[0], rtol=1e-14, atol=1e-14)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("name", "expected"), [("euler", 1), ("heun", 2), ("rk4", 4)])
@pytest.mark.usefixtures("x64")
def test_energy_drifts_with_the_order_of_the_method(name, expected):
    block = Controls.constant_in_time(controls().at(0.3), (0,))

    def autonomous(theta, y, t):
        return layer(theta, y, 0.0)

    y = features()

    def drift(n):
        grid = np.linspace(0, 1, n + 1)
        along = jax.jit(lambda y: momentum(autonomous, block, y, grid, lambda end: jnp.sum(end**2), name).energy)
        energy = np.asarray(along(y))
        assert energy.shape == (n + 1, 4)
        return float(np.abs(energy - energy[-1]).max())

    assert expected - 0.4 < order(drift, (16, 32)) < expected + 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_energy_changes_where_the_weights_move():
    energy = momentum(layer, controls(), features(), np.linspace(0, 2, 33)[:9], lambda end: jnp.sum(end**2)).energy
    assert jnp.abs(energy - energy[-1]).max() > 0.1


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_report_has_the_energy_and_its_drift_can_be_a_term_of_a_loss():
    block, y, loss = controls(), features(), lambda end: jnp.sum(end**2)
    along = momentum(layer, block, y, NODES, loss)
    end, report = integrate(layer, block, y, NODES, report=["energy", "variation"], loss=loss)
    np.testing.assert_allclose(report.energy, along.energy, rtol=1e-13)
    np.testing.assert_allclose(end, along.states[-1], rtol=1e-13)
    assert report.states is None
    assert report.variation is not None
    # By definition, without a backward pass through the steps: p from differences of the loss at the end.
    k, slope = 1, layer(block.at(NODES[1]), along.states[1], NODES[1])

    @jax.jit
    def rest(e):
        return jnp.sum(integrate(layer, block, along.states[k] + e * slope, NODES[k:]) ** 2, axis=1)

    np.testing.assert_allclose(report.energy[k], (rest(1e-5) - rest(-1e-5)) / 2e-5, rtol=1e-7)

    @jax.jit
    @jax.value_and_grad
    def drift(block):
        energy = integrate(layer, block, y, NODES, report="energy", loss=loss)[1].energy
        return jnp.mean((energy[0] - energy[-1]) ** 2)

    gradient, e = drift(block)[1].theta["bias"][2, 0], 1e-5
    up, down = (drift(Controls(block.theta | {"bias": block.theta["bias"].at[2, 0].add(d)}, NODES)) for d in (e, -e))
    np.testing.assert_allclose(gradient, (up[0] - down[0]) / (2 * e), rtol=1e-6)
    with pytest.raises(ValueError, match="report='energy' needs loss"):
        integrate(layer, block, y, NODES, report=["energy"])
