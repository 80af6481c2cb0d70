"""The Linen train state: one field for all stages, one statistics update per step, and otherwise Flax's own class."""

import dataclasses
import inspect
import runpy
import subprocess
import sys
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from training import exact_flow

import rk_optax
import rk_optax.linen

KEY = jax.random.key(0)


class Net(nn.Module):
    """Dense, BatchNorm, Dropout, Dense, in training mode."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.9, param_dtype=x.dtype)(x)
        x = nn.Dropout(0.5, deterministic=False)(nn.tanh(x))
        return nn.Dense(2, param_dtype=x.dtype)(x)


class State(rk_optax.linen.TrainState):
    batch_stats: Any


class StockState(train_state.TrainState):
    batch_stats: Any


NET = Net()


def forward(params, batch_stats, x, dropout_key):
    """The predictions and the new statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    predicted, new = NET.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": dropout_key})
    return predicted, new["batch_stats"]


def loss_fn(params, batch_stats, x, y, dropout_key):
    predicted, new = forward(params, batch_stats, x, dropout_key)
    return jnp.mean((predicted - y) ** 2), new


def make_data(dtype=np.float32, seed=0, size=16):
    rng = np.random.default_rng(seed)
    return {"x": jnp.asarray(rng.normal(size=(size, 3)), dtype), "y": jnp.asarray(rng.normal(size=(size, 2)), dtype)}


def make_state(tx, x, seed=0, cls=State):
    key = jax.random.key(seed)
    variables = jax.tree.map(lambda a: a.astype(x.dtype), NET.init({"params": key, "dropout": key}, x))
    return cls.create(apply_fn=NET.apply, params=variables["params"], tx=tx, batch_stats=variables["batch_stats"])


def make_step(loss_fn=loss_fn):
    def step(state, x, y, dropout_key):
        data = {"batch_stats": state.batch_stats, "x": x, "y": y, "dropout_key": dropout_key}
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, **data)
        return state.apply_gradients(grads=grads, data=data, batch_stats=stats), loss

    return step


def make_rk4(learning_rate=0.3, loss_fn=loss_fn, **options):
    return rk_optax.rk4(loss_fn, learning_rate, has_aux=True, **options)


def train(state, step, steps=5, **data):
    for i in range(steps):
        state, _ = step(state, **data, dropout_key=jax.random.fold_in(KEY, i))
    return state


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, rtol=1e-5, atol=1e-7):
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol, atol), actual, expected)


# --- One step, one field ---------------------------------------------------------------------------------------------

TIME, STEPS = 2.0, [20, 40, 80, 160]


def flow_of(losses, weights, params):
    """The flow of a weighted sum of losses to TIME."""
    return exact_flow(
        jax.grad(lambda p: sum(w * loss(p) for w, loss in zip(weights, losses, strict=True))), params, TIME
    )


def observed_order(step_of, start, exact):
    """The slope of the error at TIME against h; `step_of(h)` is a function of one argument like `start`."""

    @jax.jit  # one compilation for every h
    def error(h, n):
        end = jax.lax.fori_loop(0, n, lambda _, carry: step_of(h)(carry), start)
        difference = jax.tree.map(lambda a, e: jnp.max(jnp.abs(a - e)), getattr(end, "params", end), exact)
        return jnp.max(jnp.stack(jax.tree.leaves(difference)))

    slope = -np.polyfit(np.log(STEPS), np.log([error(TIME / n, n) for n in STEPS]), 1)[0]
    print(f"observed order {slope:.2f}")
    return slope


def test_rk4_keeps_its_order_through_dropout_and_batch_norm(x64):
    data = make_data(np.float64)
    start = make_state(make_rk4(), data["x"]).replace(step=jnp.zeros([], int))
    exact = flow_of([lambda p: loss_fn(p, start.batch_stats, **data, dropout_key=KEY)[0]], [1.0], start.params)

    def step_of(h):
        def step(state):
            return make_step()(state.replace(tx=make_rk4(h)), **data, dropout_key=KEY)[0].replace(tx=start.tx)

        return step

    assert 3.85 <= observed_order(step_of, start, exact) <= 4.6


@pytest.mark.slow
def test_a_fresh_dropout_mask_per_stage_is_no_method_of_order_four(x64):
    """The first silent mistake: each stage has a field of its own, and nothing raises.

    Measured against the limit that suits it best, the flow of the masks' weighted mean.
    """
    data = make_data(np.float64)
    start = make_state(make_rk4(), data["x"])
    losses = [
        lambda p, key=key: loss_fn(p, start.batch_stats, **data, dropout_key=key)[0] for key in jax.random.split(KEY, 4)
    ]
    weights = rk_optax.TABLEAUS["rk4"].b
    exact = flow_of(losses, weights, start.params)

    def step_of(h):
        def step(params):
            k = total = jax.tree.map(jnp.zeros_like, params)
            for loss, weight, fraction in zip(losses, weights, [0.0, 0.5, 0.5, 1.0], strict=True):
                k = jax.grad(loss)(jax.tree.map(lambda p, k, c=fraction: p - c * h * k, params, k))
                total = jax.tree.map(lambda t, k, w=weight: t + w * k, total, k)
            return jax.tree.map(lambda p, t: p - h * t, params, total)

        return step

    assert 0.5 <= observed_order(step_of, start.params, exact) <= 1.5


def test_every_stage_has_the_mask_of_the_callers_gradient(x64):
    """At equal parameters the stages' gradients are the caller's, so h = 0 in all but name gives the plain gradient."""
    data = make_data(np.float64)
    tiny = 1e-9
    state = make_state(make_rk4(tiny), data["x"])
    everything = {**data, "batch_stats": state.batch_stats, "dropout_key": KEY}
    grads, _ = jax.jit(jax.grad(loss_fn, has_aux=True))(state.params, **everything)
    end, _ = jax.jit(make_step())(state, **data, dropout_key=KEY)
    effective = jax.tree.map(lambda new, old: (old - new) / tiny, end.params, state.params)
    assert_close(effective, grads, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_statistics_move_once_per_step_as_in_one_plain_forward():
    data = make_data()
    state, step = make_state(make_rk4(), data["x"]), jax.jit(make_step())
    for i in range(3):
        key = jax.random.fold_in(KEY, i)
        _, expected = jax.jit(forward)(state.params, state.batch_stats, data["x"], key)
        before = state
        state, _ = step(state, **data, dropout_key=key)
        assert_close(state.batch_stats, expected, rtol=1e-6)
        moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), state.batch_stats, before.batch_stats)
        assert min(jax.tree.leaves(moved)) > 1e-3


def test_stages_see_the_statistics_of_before_the_step(x64):
    """A loss that reads its statistics: the new ones, which replace the field, must not reach the stages."""

    def reads(params, batch_stats, x):
        return jnp.sum((params["w"] - batch_stats * x) ** 4), batch_stats + 1.0

    tx = rk_optax.heun(reads, 0.1, has_aux=True)
    state = State.create(apply_fn=None, params={"w": jnp.array([2.0])}, tx=tx, batch_stats=jnp.array([0.5]))
    data = {"batch_stats": state.batch_stats, "x": jnp.array(2.0)}
    grads, stats = jax.grad(reads, has_aux=True)(state.params, **data)
    state = state.apply_gradients(grads=grads, data=data, batch_stats=stats)
    k1 = 4 * (2.0 - 1.0) ** 3
    k2 = 4 * (2.0 - 0.1 * k1 - 1.0) ** 3
    assert_close(state.params["w"], np.array([2.0 - 0.1 * (k1 + k2) / 2]), rtol=1e-12)
    assert_same(state.batch_stats, np.array([1.5]))


# --- Compiled, donated, vmapped, sharded -----------------------------------------------------------------------------


def test_a_step_traces_the_loss_twice_and_200_steps_never_again():
    """Once for the caller's own gradient and once for all stages together."""
    traces = []

    def traced(params, batch_stats, x, y, dropout_key):
        traces.append(1)
        return loss_fn(params, batch_stats, x, y, dropout_key)

    step = jax.jit(make_step(traced))
    state = make_state(make_rk4(0.1, traced), make_data()["x"])
    for i in range(200):
        state, _ = step(state, **make_data(seed=i), dropout_key=jax.random.fold_in(KEY, i))
    assert len(traces) == 2
    assert state.step == 200
    assert state.opt_state.cost.gradients == 800


def test_training_lowers_the_loss():
    data = make_data()
    state, step = make_state(make_rk4(), data["x"]), jax.jit(make_step())
    _, first = step(state, **data, dropout_key=KEY)
    _, last = step(train(state, step, 50, **data), **data, dropout_key=KEY)
    assert last < 0.7 * first


@pytest.mark.slow
def test_the_state_can_be_donated():
    data = make_data()
    tx = make_rk4(momentum=0.9)
    expected = train(make_state(tx, data["x"]), jax.jit(make_step()), **data)
    state = jax.tree.map(jnp.copy, make_state(tx, data["x"]))
    end = train(state, jax.jit(make_step(), donate_argnums=0), **data)
    assert_close(end, expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.slow
def test_vmap_over_seeds_is_the_loop():
    data = make_data()
    tx = make_rk4(momentum=0.9)
    states = [make_state(tx, data["x"], seed) for seed in range(3)]
    many = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *states)
    step = jax.jit(make_step())
    many = train(many, jax.jit(lambda many, **data: jax.vmap(lambda one: make_step()(one, **data))(many)), **data)
    for i, state in enumerate(states):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], many)
        assert_close(one, train(state, step, **data), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_batch_sharded_over_eight_devices_gives_the_same_training():
    data = make_data(size=32)
    tx = make_rk4(momentum=0.9)
    state = make_state(tx, data["x"])
    expected = train(state, jax.jit(make_step()), **data)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    split = jax.device_put(data, NamedSharding(mesh, PartitionSpec("batch")))
    everywhere = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    end = train(everywhere, jax.jit(make_step()), **split)
    assert_close(end, expected, rtol=1e-4, atol=1e-6)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(end)} == {8}


# --- The stock class's behaviour -------------------------------------------------------------------------------------


def plain(decay=0.1):
    """An optimizer that takes no keywords, not even `**extra_args`."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -decay * g, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("tx", [plain(), optax.sgd(0.1, 0.9), optax.adam(0.01)], ids=["plain", "momentum", "adam"])
@pytest.mark.parametrize("with_data", [True, False])
def test_an_optax_optimizer_steps_as_in_the_stock_class_to_the_bit(tx, with_data):
    data = make_data()

    def step(state, x, y, dropout_key):
        everything = {"batch_stats": state.batch_stats, "x": x, "y": y, "dropout_key": dropout_key}
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, **everything)
        extra = {"data": everything} if with_data and isinstance(state, State) else {}
        return state.apply_gradients(grads=grads, batch_stats=stats, **extra), loss

    ours = train(make_state(tx, data["x"]), jax.jit(step), **data)
    stock = train(make_state(tx, data["x"], cls=StockState), jax.jit(step), **data)
    for field in dataclasses.fields(stock):
        if field.name not in ("apply_fn", "tx"):
            assert_same(getattr(ours, field.name), getattr(stock, field.name))
    assert ours.tx is tx


def test_fields_create_and_signature_are_the_stock_ones():
    ours, stock = rk_optax.linen.TrainState, train_state.TrainState
    assert issubclass(ours, stock)
    described = [(f.name, f.type, dict(f.metadata)) for f in dataclasses.fields(ours)]
    assert described == [(f.name, f.type, dict(f.metadata)) for f in dataclasses.fields(stock)]
    assert inspect.signature(ours.create) == inspect.signature(stock.create)
    tx = optax.adam(0.1)
    made = [cls.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx) for cls in (ours, stock)]
    assert_same(*(flax.serialization.to_state_dict(state) for state in made))
    assert made[0].step == 0


@pytest.mark.slow
def test_serialization_goes_there_and_back_and_training_continues_to_the_bit():
    data, step = make_data(), jax.jit(make_step())
    state = train(make_state(make_rk4(momentum=0.9), data["x"]), step, **data)
    fresh = make_state(make_rk4(momentum=0.9), data["x"], seed=5)
    for restored in (
        flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state)),
        flax.serialization.from_state_dict(fresh, flax.serialization.to_state_dict(state)),
    ):
        assert_same(jax.tree.leaves(restored), jax.tree.leaves(state))
        assert_same(jax.tree.leaves(train(restored, step, **data)), jax.tree.leaves(train(state, step, **data)))


def test_a_checkpoint_of_the_stock_class_is_read_and_the_other_way_round():
    x, tx = make_data()["x"], optax.adam(0.1)
    ours, stock = (make_state(tx, x, seed, cls) for seed, cls in enumerate((State, StockState)))
    for source, target in ((ours, stock), (stock, ours)):
        restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(source))
        assert type(restored) is type(target)
        assert_same(restored.params, source.params)


def test_fields_given_as_keywords_are_replaced_even_tx():
    other = optax.sgd(0.5)
    state = rk_optax.linen.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
    state = state.apply_gradients(grads={"w": jnp.ones(2)}, tx=other, apply_fn=len)
    assert (state.tx, state.apply_fn) == (other, len)
    assert_close(state.params["w"], np.full(2, 0.9))


@pytest.mark.parametrize("make", ["sgd", "heun"])
def test_parameters_that_are_overwritten_with_their_gradient_stay_so(make, x64):
    def inner_loss(params, scale):
        return jnp.sum((scale * params["w"]) ** 2) / 2

    params = {"params": {"w": jnp.array([1.0, 2.0])}, OVERWRITE_WITH_GRADIENT: {"scale": jnp.array(2.0)}}
    scale = params[OVERWRITE_WITH_GRADIENT]["scale"]
    grads = {
        "params": jax.grad(inner_loss)(params["params"], scale),
        OVERWRITE_WITH_GRADIENT: {"scale": jnp.array(7.0)},
    }
    tx = optax.sgd(0.1) if make == "sgd" else rk_optax.heun(inner_loss, 0.1)
    state = rk_optax.linen.TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.apply_gradients(grads=grads, data={"scale": scale})
    factor = 1 - 0.4 if make == "sgd" else 1 - 0.4 + 0.4**2 / 2
    assert_close(state.params["params"]["w"], factor * params["params"]["w"], rtol=1e-12)
    assert_same(state.params[OVERWRITE_WITH_GRADIENT]["scale"], jnp.array(7.0))


# --- Mistakes --------------------------------------------------------------------------------------------------------


def test_data_given_as_keywords_are_an_error_that_shows_the_mapping():
    data = make_data()
    state = make_state(make_rk4(), data["x"])
    with pytest.raises(TypeError, match=r"no field for x=\.\.\., y=\.\.\. .*data=dict\(x=\.\.\., y=\.\.\.\)"):
        state.apply_gradients(grads=state.params, **data)


def test_a_misspelt_field_is_an_error_and_does_not_pass_for_data():
    data = make_data()
    state = make_state(make_rk4(), data["x"])
    everything = {**data, "batch_stats": state.batch_stats, "dropout_key": KEY}
    with pytest.raises(TypeError, match="no field for batch_stat="):
        state.apply_gradients(grads=state.params, data=everything, batch_stat=state.batch_stats)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dropout_kye": KEY}, "did you mean 'dropout_key'"), ({}, "missing 'dropout_key'")],
)
def test_misspelt_or_missing_data_are_an_error_that_names_them_and_the_mapping(change, message):
    data = make_data()
    state = make_state(make_rk4(), data["x"])
    everything = {**data, "batch_stats": state.batch_stats, **change}
    with pytest.raises(TypeError, match=message) as caught:
        state.apply_gradients(grads=state.params, data=everything)
    assert any("data=dict(...)" in note for note in caught.value.__notes__)


def test_the_package_does_not_import_flax():
    code = "import sys, rk_optax; sys.exit(any(name.split('.')[0] == 'flax' for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "needs"), [("linen", ["flax.training", "flax.training.train_state"]), ("nnx", ["flax.nnx"])]
)
def test_without_flax_the_error_says_what_to_install(name, needs, monkeypatch):
    for module in ["flax", *needs]:
        monkeypatch.setitem(sys.modules, module, None)
    path = rk_optax.linen.__file__.replace("linen.py", f"{name}.py")
    with pytest.raises(ImportError, match=r"pip install 'rk-optax\[flax\]'"):
        runpy.run_path(path)
