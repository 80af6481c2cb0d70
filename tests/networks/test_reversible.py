"""The Hamiltonian block whose backward pass stores nothing."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rk_optax.networks import Controls, hamiltonian, hamiltonian_y, hamiltonian_z, initial, integrate, reversible

from .cases import largest_difference


def block(nodes=(0, 1, 2), width=4):
    theta = [initial(jax.random.key(i), hamiltonian, width, hidden=width + 1) for i in range(len(nodes))]
    controls = Controls(jax.tree.map(lambda *x: jnp.stack(x), *theta), nodes)
    rng = np.random.default_rng(0)
    return controls, (jnp.asarray(rng.normal(size=(3, width))), jnp.asarray(rng.normal(size=(3, width + 1))))


def stored(controls, state, grid):
    """The same steps in plain Python, which reverse mode stores all of."""
    y, z = state
    for a, b in itertools.pairwise(grid):
        theta = controls.at((a + b) / 2)
        z = z - (b - a) * jnp.tanh(y @ theta["kernel"].T + theta["bias_out"])
        y = y + (b - a) * jnp.tanh(z @ theta["kernel"] + theta["bias"])
    return y, z


@pytest.mark.usefixtures("x64")
def test_values_and_gradients_are_those_of_the_stored_pass():
    controls, state = block()
    grid = np.linspace(0, 2, 9)

    def value_and_gradients(run):
        def loss(controls, state):
            return sum(jnp.sum(jnp.sin(x)) for x in run(controls, state))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(controls, state)

    ours = value_and_gradients(lambda c, s: reversible(hamiltonian_y, hamiltonian_z, c, s, grid))
    assert largest_difference(ours, value_and_gradients(lambda c, s: stored(c, s, grid))) < 1e-13


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_it_converges_to_the_same_flow_as_any_other_method():
    controls, state = block()
    exact = integrate(hamiltonian, controls, state, np.linspace(0, 2, 65), unroll=1)
    errors = [
        largest_difference(reversible(hamiltonian_y, hamiltonian_z, controls, state, np.linspace(0, 2, n + 1)), exact)
        for n in (32, 64)
    ]
    assert 1.7 < errors[0] / errors[1] < 2.4


@pytest.mark.slow
def test_memory_does_not_grow_with_depth():
    controls, state = block(width=64)
    state = jax.tree.map(lambda x: jnp.tile(x[:1], (256, 1)).astype(jnp.float32), state)

    def temporaries(run, n):
        gradient = jax.grad(lambda s: run(controls, s, np.linspace(0, 2, n + 1))[0].sum())
        return jax.jit(gradient).lower(state).compile().memory_analysis().temp_size_in_bytes

    ours = functools.partial(reversible, hamiltonian_y, hamiltonian_z)
    per_step = (temporaries(ours, 64) - temporaries(ours, 16)) / 48
    layer_bytes = sum(x[0].nbytes for x in jax.tree.leaves(controls.theta))
    assert per_step < 3 * layer_bytes  # θ of each step, and nothing of the features
    features = sum(x.nbytes for x in state)

    def checkpointed(c, s, grid):
        return integrate(hamiltonian, c, s, grid, unroll=1)

    assert (temporaries(checkpointed, 64) - temporaries(checkpointed, 16)) / 48 > 0.9 * features
