"""What one update is: devices, against steps by hand in NumPy, Optax and closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import network, network_gradient, network_loss
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from training import (
    MESHES,
    assert_close,
    assert_same,
    eight_devices,
    first_update,
    make_step,
    train,
)

import rk_optax


# --- Devices -------------------------------------------------------------------------------------------------------
def elementwise_loss(params):
    """Needs no communication for its gradient."""
    return jnp.sum(params["w"] ** 4) / 4


@pytest.fixture
def mesh(request):
    """Eight devices along x, with the axis type that the test asks for."""
    with eight_devices(request.param) as mesh:
        yield mesh


def shardings(tree):
    return [leaf.sharding.spec for leaf in jax.tree.leaves(tree) if leaf.ndim]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("mesh", MESHES, indirect=True)
@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_state_updates_and_stage_buffers_stay_sharded(mesh, name):
    size = 8 * 4096
    tx = rk_optax.runge_kutta(elementwise_loss, 0.1, name, momentum=0.9)
    values = np.linspace(0.1, 1.0, size, dtype=np.float32)
    params = {"w": jax.device_put(values, NamedSharding(mesh, PartitionSpec("x")))}
    grads = {"w": params["w"] ** 3}

    state = tx.init(params)
    compiled = jax.jit(tx.update).lower(grads, state, params).compile()
    updates, new_state = compiled(grads, state, params)
    spec = PartitionSpec("x")
    assert shardings((params, state, updates, new_state)) == [spec] * 4
    eager, eager_state = tx.update(grads, state, params)
    assert shardings((eager, eager_state)) == [spec] * 2

    assert "all-gather" not in compiled.as_text()
    stages_alive = {"rk4": 6, "dopri5": 12}[name]
    assert compiled.memory_analysis().temp_size_in_bytes <= stages_alive * size * 4 / 8

    on_one_device = {"w": jnp.asarray(values)}
    expected, _ = first_update(tx, elementwise_loss, on_one_device)
    assert_close(updates, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mesh", MESHES, indirect=True)
def test_init_on_abstract_sharded_params_has_the_types_of_init_on_real_ones(mesh):
    tx = rk_optax.rk4(elementwise_loss, 0.1, momentum=0.9)
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    real = tx.init({"w": jax.device_put(np.ones(16, np.float32), sharding)})
    for abstract in (
        tx.init({"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}),
        jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=sharding)}),
    ):
        assert jax.tree.structure(abstract) == jax.tree.structure(real)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == jax.tree.map(lambda a: (a.shape, a.dtype), real)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("reduces", ["grad_fn", "loss"])
def test_under_shard_map_a_reduced_gradient_is_the_gradient_of_the_whole_batch(reduces):
    params, data = network()
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))

    def mean_loss(params, x, y):
        return jax.lax.pmean(network_loss(params, x, y), "batch")

    def mean_gradient(params, x, y):
        return jax.lax.pmean(network_gradient(params, x, y), "batch")

    if reduces == "loss":
        tx, gradient = rk_optax.rk4(mean_loss, 0.5, momentum=0.9), jax.grad(mean_loss)
    else:
        tx, gradient = rk_optax.rk4(None, 0.5, grad_fn=mean_gradient, momentum=0.9), mean_gradient

    def step(params, state, data):
        updates, state = tx.update(gradient(params, **data), state, params, **data)
        return optax.apply_updates(params, updates), state

    everywhere, split = PartitionSpec(), PartitionSpec("batch")
    # With replication checked, the gradient of a loss of replicated parameters is already summed over devices.
    checked = {"check_vma": reduces == "loss"}
    step = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(everywhere, everywhere, split), out_specs=(everywhere, everywhere), **checked
        )
    )
    sharded, state = params, tx.init(params)
    for _ in range(3):
        sharded, state = step(sharded, state, data)
    expected, expected_state = train(rk_optax.rk4(network_loss, 0.5, momentum=0.9), network_loss, params, data, 3)
    assert_close(sharded, expected, rtol=1e-4, atol=1e-6)
    assert state.cost == expected_state.cost


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    "make",
    [
        functools.partial(rk_optax.rk4, network_loss, 0.1, momentum=0.9),
        functools.partial(rk_optax.rk4, network_loss, jnp.float32(0.1)),
        functools.partial(rk_optax.dopri5, network_loss, optax.linear_schedule(0.1, 0.0, 10)),
        functools.partial(rk_optax.inject_hyperparams(rk_optax.rk4), network_loss, learning_rate=0.1, momentum=0.5),
    ],
)
def test_params_and_state_can_be_donated(make):
    tx = make()
    start, data = network()
    expected, _ = train(tx, network_loss, start, data, 3)
    step = jax.jit(make_step(tx, network_loss), donate_argnums=(0, 1))
    for init in (tx.init, jax.jit(tx.init)):
        params = jax.tree.map(jnp.copy, start)
        state = init(params)
        for _ in range(3):
            params, state = step(params, state, data)
        assert_same(params, expected)


@pytest.mark.parametrize("name", ["euler", "rk4"])
def test_no_buffer_is_shared_by_state_params_updates_and_rate(name):
    rate = jnp.float32(0.1)
    params, data = network()
    tx = rk_optax.runge_kutta(network_loss, rate, name, momentum=0.0)
    grads = network_gradient(params, **data)
    state = tx.init(params)
    updates, new_state = tx.update(grads, state, params, **data)
    for held in (state, new_state):
        leaves = jax.tree.leaves((held, params, grads, updates, rate))
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_an_eager_update_can_be_followed_by_donating_ones():
    rate = jnp.float32(0.1)
    tx = rk_optax.rk4(network_loss, rate, momentum=0.9)
    params, data = network()
    step = make_step(tx, network_loss)
    params, state = step(params, tx.init(params), data)
    donating = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(2):
        params, state = donating(params, state, data)
    assert not rate.is_deleted()
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))
