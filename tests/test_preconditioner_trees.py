"""Preconditioners on any tree, in any type, on any number of devices and in any program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import network, network_loss
from jax.sharding import NamedSharding, PartitionSpec
from training import (
    MESHES,
    PARAMS,
    PRECONDITIONERS,
    SCALE_EQUATIONS,
    H,
    X,
    assert_close,
    assert_same,
    eight_devices,
    first_update,
    loss_fn,
    loss_gradient,
    numpy_rk4,
    trajectory,
    types,
)

import rk_optax

EVERY = pytest.mark.parametrize("name", PRECONDITIONERS)


def realised(tree):
    """The type of the real part of each leaf."""
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.finfo(jnp.result_type(x)).dtype), tree)


@pytest.mark.covering(most=1)
@EVERY
def test_state_and_updates_have_the_shapes_and_dtypes_of_params(name, x64):
    params = {
        "half": jnp.ones((2, 3), jnp.bfloat16),
        "single": jnp.ones(4, jnp.float32),
        "double": jnp.ones([], jnp.float64),
        "none": None,
    }

    def loss(params):
        return sum(jnp.sum(jnp.cos(leaf).astype(jnp.float32)) for leaf in jax.tree.leaves(params))

    tx = rk_optax.rk4(loss, 0.1, preconditioner=PRECONDITIONERS[name])
    state = tx.init(params)
    updates, after = first_update(tx, loss, params)
    assert types(updates) == types(params)
    assert types(after) == types(state)
    like_params = [s for s in state.preconditioner if isinstance(s, dict)]
    assert all(types(kept) == types(params) for kept in like_params)
    assert len(like_params) == (name != "clip")


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", SCALE_EQUATIONS)
def test_bfloat16_parameters_are_scaled_in_float32(name):
    half = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    single = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    x = X.astype(np.float32)
    tx = rk_optax.rk4(loss_fn, H, preconditioner=PRECONDITIONERS[name])
    gradient = jax.grad(loss_fn)(half, x)
    low, low_state = tx.update(gradient, tx.init(half), half, x=x)
    high, high_state = tx.update(jax.tree.map(lambda g: g.astype(jnp.float32), gradient), tx.init(single), single, x=x)
    # g* is rounded to bfloat16, and then −h g* is: one unit in the last place.
    assert_close(*(jax.tree.map(lambda u: u.astype(jnp.float32), t) for t in (low, high)), rtol=2**-7, atol=0)
    rounded = jax.tree.map(lambda s, kept: s.astype(kept.dtype), high_state.preconditioner, low_state.preconditioner)
    assert_same(low_state.preconditioner, rounded)


@pytest.mark.covering
@pytest.mark.parametrize("decay", [0.99, 0.999])
@pytest.mark.parametrize("name", ["adam", "hutchinson"])
def test_bias_correction_survives_stages_in_bfloat16(name, decay):
    """After one step the correction undoes the decay: g²(1 − decay)/(1 − decay), whatever the precision."""

    def loss(w):
        return jnp.sum(w**2)  # gradient 2w, curvature 2

    make = {"adam": rk_optax.precondition_by_adam, "hutchinson": rk_optax.precondition_by_hutchinson}[name]
    tx = rk_optax.euler(loss, 1.0, preconditioner=make(decay=decay, floor=1e-3), stage_dtype=None)
    w = jnp.ones(3, jnp.bfloat16)
    updates, state = tx.update(jnp.full(3, 2, jnp.bfloat16), tx.init(w), w)
    assert bool(state.accepted)
    np.testing.assert_allclose(np.asarray(updates, np.float32), -1, rtol=0.05)


@pytest.mark.parametrize("name", SCALE_EQUATIONS)
def test_complex_leaves_are_scaled_by_their_modulus(name, x64):
    accumulate, scale = SCALE_EQUATIONS[name]
    params = np.array([0.5 + 0.2j, -0.4j, 0.3])

    def loss(w):
        return jnp.sum(jnp.abs(w - (0.1 + 0.3j)) ** 4) / 4

    def field(w):
        return np.abs(w - (0.1 + 0.3j)) ** 2 * (w - (0.1 + 0.3j))

    frozen = scale(accumulate(np.zeros(3), np.abs(field(params)), 1), 1)
    tx = rk_optax.rk4(loss, H, preconditioner=PRECONDITIONERS[name])
    updates, state = first_update(tx, loss, params)
    np.testing.assert_allclose(updates, -H * numpy_rk4(lambda w: frozen * field(w), params, H), rtol=1e-12)
    kept = [leaf for leaf in jax.tree.leaves(state.preconditioner) if leaf.ndim]
    assert [leaf.dtype for leaf in kept] == [jnp.float64]


@pytest.mark.covering(most=2)
@EVERY
def test_a_mask_keeps_fixed_leaves_out_of_state_and_scale(name, x64):
    tx = rk_optax.rk4(loss_fn, H, preconditioner=PRECONDITIONERS[name], mask={"w": True, "b": False})
    alone = rk_optax.rk4(lambda w, x: loss_fn({"w": w, "b": PARAMS["b"]}, x), H, preconditioner=PRECONDITIONERS[name])
    params = PARAMS
    for (seen, state), (w, reference) in zip(
        trajectory(tx, loss_fn, PARAMS, {"x": X}, 3),
        trajectory(alone, lambda w, x: loss_fn({"w": w, "b": PARAMS["b"]}, x), PARAMS["w"], {"x": X}, 3),
        strict=True,
    ):
        np.testing.assert_allclose(seen["w"], w, rtol=1e-12)
        assert_same(seen["b"], params["b"])
        assert len(jax.tree.leaves(state.preconditioner)) == len(jax.tree.leaves(reference.preconditioner))


@pytest.mark.covering(most=2)
@EVERY
def test_an_empty_tree_and_a_scalar_work(name):
    empty = rk_optax.rk4(lambda params: jnp.zeros([]), 0.1, preconditioner=PRECONDITIONERS[name])
    updates, state = empty.update({}, empty.init({}), {})
    assert updates == {}
    assert bool(state.accepted)
    scalar = rk_optax.rk4(lambda w: w**2, 0.1, preconditioner=PRECONDITIONERS[name])
    updates, _ = first_update(scalar, lambda w: w**2, 1.0)
    assert updates.shape == ()
    assert float(updates) < 0


def elementwise_loss(params):
    """Needs no communication for its gradient."""
    return jnp.sum(params["w"] ** 4) / 4


@pytest.fixture(params=MESHES)
def mesh(request):
    """Eight devices along x, with either axis type."""
    with eight_devices(request.param) as mesh:
        yield mesh


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["adagrad", "hutchinson", "rss"])
def test_state_stays_sharded_like_params(name, mesh):
    tx = rk_optax.heun(elementwise_loss, 0.1, preconditioner=PRECONDITIONERS[name])
    values = np.linspace(0.1, 1.0, 64, dtype=np.float32)
    params = {"w": jax.device_put(values, NamedSharding(mesh, PartitionSpec("x")))}
    gradient = {"w": params["w"] ** 3}
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(gradient, state, params)
    like_params = [leaf for leaf in jax.tree.leaves((updates, state, after)) if leaf.shape == values.shape]
    assert len(like_params) == 3
    assert {leaf.sharding.spec for leaf in like_params} == {PartitionSpec("x")}
    expected, _ = first_update(tx, elementwise_loss, {"w": jnp.asarray(values)})
    assert_close(updates, expected, rtol=1e-5, atol=1e-7)


@EVERY
def test_init_on_abstract_params_has_the_types_of_init_on_real_ones(name):
    tx = rk_optax.rk4(network_loss, 0.1, preconditioner=PRECONDITIONERS[name])
    params, _ = network()
    abstract = jax.eval_shape(lambda: params)
    assert types(tx.init(abstract)) == types(tx.init(params))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["adagrad", "hutchinson", "rss"])
def test_params_and_state_can_be_donated(name):
    tx = rk_optax.rk4(network_loss, 0.1, preconditioner=PRECONDITIONERS[name])
    params, data = network()
    *_, (expected, _) = trajectory(tx, network_loss, params, data, 3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(jax.grad(network_loss)(params, **data), state, params, **data)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert_close(params, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["adam", "hutchinson", "clip"])
def test_jit_and_vmap_change_nothing(name, x64):
    tx = rk_optax.heun(loss_fn, H, preconditioner=PRECONDITIONERS[name])
    scales = np.array([0.5, 1.0, 2.0])

    def two_steps(scale):
        params = jax.tree.map(lambda p: scale * jnp.asarray(p), PARAMS)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss_fn)(params, X), state, params, x=X)
            params = optax.apply_updates(params, updates)
        return params, state

    together = jax.jit(jax.vmap(two_steps))(scales)
    for i, scale in enumerate(scales):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], together), two_steps(scale), rtol=1e-12)


def test_a_preconditioner_composes_with_injected_hyperparameters(x64):
    tx = rk_optax.inject_hyperparams(rk_optax.rk4)(loss_fn, learning_rate=H, preconditioner=PRECONDITIONERS["adagrad"])
    state = tx.init(PARAMS)
    assert "preconditioner" not in state.hyperparams
    state.hyperparams["learning_rate"] = jnp.asarray(H / 2)
    updates, _ = jax.jit(tx.update)(loss_gradient(PARAMS), state, PARAMS, x=X)
    expected, _ = first_update(
        rk_optax.rk4(loss_fn, H / 2, preconditioner=PRECONDITIONERS["adagrad"]), loss_fn, PARAMS, x=X
    )
    assert_close(updates, expected)


def test_the_settings_of_a_preconditioner_may_be_traced(x64):
    @jax.jit
    def update(floor, decay):
        tx = rk_optax.rk4(loss_fn, H, preconditioner=rk_optax.precondition_by_rms(decay, floor))
        return tx.update(loss_gradient(PARAMS), tx.init(PARAMS), PARAMS, x=X)[0]

    expected, _ = first_update(rk_optax.rk4(loss_fn, H, preconditioner=PRECONDITIONERS["rms"]), loss_fn, PARAMS, x=X)
    assert_close(update(0.1, 0.9), expected)
