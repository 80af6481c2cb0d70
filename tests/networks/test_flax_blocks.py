"""`RKBlock` for Linen and NNX: `integrate` with names, one dropout mask a call, and no BatchNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import rk_optax
import rk_optax.nnx
from rk_optax.linen import RKBlock
from rk_optax.networks import Controls, double_sym, initial, integrate, refine, refine_state

NODES = (0.0, 1.0, 2.0)
Y = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


class LinenLayer(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, y, t=0.0):
        y = nn.tanh(nn.Dense(y.shape[-1])(y) + t)
        return nn.Dropout(self.rate, deterministic=False)(y) if self.rate else y


class NnxLayer(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.linear = nnx.Linear(3, 3, rngs=rngs)
        self.first, self.second = (nnx.Dropout(rate, rngs=rngs) for _ in range(2))

    def __call__(self, y):
        return self.second(self.first(nnx.tanh(self.linear(y))))


@pytest.mark.slow
def test_a_linen_block_is_integrate_with_the_layer_s_parameters():
    block = RKBlock(LinenLayer(), nodes=NODES, constant_in_time=False, with_time=True)
    variables = block.init(jax.random.key(0), Y)
    dense = variables["params"]["controls"]["Dense_0"]
    assert dense["kernel"].shape == (3, 3, 3)
    assert not np.allclose(dense["kernel"][0], dense["kernel"][1])
    by_hand = integrate(lambda th, y, t: jnp.tanh(y @ th["kernel"] + th["bias"] + t), Controls(dense, NODES), Y, NODES)
    np.testing.assert_allclose(block.apply(variables, Y), by_hand, rtol=1e-5, atol=1e-6)
    alike = RKBlock(LinenLayer(), nodes=NODES).init(jax.random.key(0), Y)["params"]["controls"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(alike[0], alike[2])


@pytest.mark.slow
def test_a_linen_block_of_a_pure_layer_inside_a_network_trains_with_a_report():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = RKBlock(
                double_sym, NODES, initial=lambda key: initial(key, double_sym, 3, hidden=5), solver="heun",
                grid=(0, 1, 2), report=["error"], name="block",
            )  # fmt: skip
            y, report = block(nn.Dense(3)(x))
            return nn.Dense(2)(y), report

    net = Net()
    params = net.init(jax.random.key(0), Y)["params"]
    assert params["block"]["controls"]["kernel"].shape == (3, 3, 5)

    def loss(params):
        out, report = net.apply({"params": params}, Y)
        return jnp.mean(out**2) + 1e-9 * report.error.mean()

    tx = rk_optax.heun(loss, 0.1)
    updates, _ = jax.jit(lambda p: tx.update(jax.grad(loss)(p), tx.init(p), p))(params)
    assert loss(optax.apply_updates(params, updates)) < loss(params)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_one_dropout_mask_serves_a_whole_call_and_the_next_has_another(kind):
    if kind == "linen":
        block = RKBlock(LinenLayer(0.5), nodes=NODES, grid=np.linspace(0, 2, 9), report=["states"])
        variables = jax.jit(block.init)({"params": jax.random.key(0), "dropout": jax.random.key(0)}, Y)
        keys = iter(jax.random.split(jax.random.key(1)))
        apply = jax.jit(lambda key: block.apply(variables, Y, rngs={"dropout": key})[1].states)
        call = lambda: apply(next(keys))  # noqa: E731
    else:
        block = rk_optax.nnx.RKBlock(
            lambda rngs: NnxLayer(rngs, 0.3), NODES, grid=np.linspace(0, 2, 9), report=["states"], rngs=nnx.Rngs(0)
        )
        apply = nnx.jit(lambda block, y: block(y)[1].states)
        call = lambda: apply(block, Y)  # noqa: E731
    first, second = map(np.asarray, (call(), call()))
    still = np.asarray(first == first[0]).all(axis=0)  # dropped at every stage of every step
    assert 0 < still.sum() < still.size
    moves = np.asarray(first[1:] != first[:-1])
    assert (moves.all(axis=0) | still).all()  # and nothing was dropped at some of them only
    assert (still != np.asarray(second == second[0]).all(axis=0)).any()


@pytest.mark.slow
def test_an_nnx_block_draws_nothing_in_evaluation_and_trains():
    block = rk_optax.nnx.RKBlock(lambda rngs: NnxLayer(rngs, 0.3), NODES, constant_in_time=False, rngs=nnx.Rngs(0))
    counts = lambda: [int(c) for c in jax.tree.leaves(nnx.state(block, nnx.RngCount))]  # noqa: E731
    block.eval()
    np.testing.assert_array_equal(block(Y), block(Y))
    before = counts()
    theta = rk_optax.nnx._as_pure(nnx.state(block.controls, nnx.Param))["linear"]
    by_hand = integrate(lambda th, y, t: jnp.tanh(y @ th["kernel"] + th["bias"]), Controls(theta, NODES), Y, NODES)
    np.testing.assert_allclose(block(Y), by_hand, rtol=1e-5, atol=1e-6)
    block.train()
    optimizer = rk_optax.nnx.Optimizer(
        block, lambda loss: rk_optax.heun(loss, 0.1), lambda block, x: jnp.mean(block(x) ** 2), wrt=nnx.Param
    )
    start = block.controls.linear.kernel[...]
    nnx.jit(lambda block, optimizer: optimizer.take_step(block, x=Y))(block, optimizer)
    assert (block.controls.linear.kernel[...] != start).any()
    assert max(new - old for new, old in zip(counts(), before, strict=True)) == 1  # one gradient of the caller's


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_batch_norm_inside_the_layer_is_refused(kind):
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, y):
            return nn.BatchNorm(use_running_average=False)(y)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    make = {
        "linen": lambda: RKBlock(Linen(), nodes=NODES).init(jax.random.key(0), Y),
        "nnx": lambda: rk_optax.nnx.RKBlock(Nnx, NODES, rngs=nnx.Rngs(0)),
    }[kind]
    with pytest.raises(ValueError, match=r"(batch_stats|BatchStat) beside its parameters.*LayerNorm"):
        make()


@pytest.mark.slow
def test_time_is_refined_in_mid_training_with_the_optimizer_state_carried_over():
    coarse = RKBlock(LinenLayer(), nodes=(0, 1, 2), grid=(0, 0.5, 1, 1.5, 2))
    finer = (0, 0.5, 1, 1.5, 2)
    fine = RKBlock(LinenLayer(), nodes=finer, grid=finer)
    params = {"block": coarse.init(jax.random.key(0), Y)["params"], "head": jnp.ones(3)}

    def loss(block, params):
        return jnp.mean((block.apply({"params": params["block"]}, Y) * params["head"] - 1) ** 2)

    tx = optax.adam(0.01)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss, argnums=1)(coarse, params), state, params)
        params = optax.apply_updates(params, updates)
    refined = refine(params, finer, old=(0, 1, 2))
    np.testing.assert_allclose(loss(fine, refined), loss(coarse, params), rtol=1e-6)
    assert refined["head"] is params["head"]
    state = refine_state(state, finer, old=(0, 1, 2))
    updates, state = tx.update(jax.grad(loss, argnums=1)(fine, refined), state, refined)
    assert loss(fine, optax.apply_updates(refined, updates)) < loss(fine, refined)
    assert int(state[0].count) == 4
