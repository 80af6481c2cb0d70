"""NNX models: stages on copies from before the gradient, the live model moved once, and otherwise Flax's own class."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from training import assert_close, assert_same, exact_flow

import rk_optax
import rk_optax.nnx


class Net(nnx.Module):
    """Linear, BatchNorm, Dropout, Linear, in training mode."""

    def __init__(self, seed=0, dtype=jnp.float32):
        rngs = nnx.Rngs(seed)
        self.inner = nnx.Linear(3, 8, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, param_dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.outer = nnx.Linear(8, 2, param_dtype=dtype, rngs=rngs)
        self.norm.mean, self.norm.var = nnx.BatchStat(jnp.zeros(8, dtype)), nnx.BatchStat(jnp.ones(8, dtype))

    def __call__(self, x):
        return self.outer(self.dropout(nnx.tanh(self.norm(self.inner(x)))))


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def make_data(dtype=np.float32, seed=0, size=16):
    rng = np.random.default_rng(seed)
    return {"x": jnp.asarray(rng.normal(size=(size, 3)), dtype), "y": jnp.asarray(rng.normal(size=(size, 2)), dtype)}


RK4 = functools.partial(rk_optax.rk4, learning_rate=0.3)
RK4_MOMENTUM = functools.partial(rk_optax.rk4, learning_rate=0.1, momentum=0.9)


def make(tx=RK4, seed=0, loss=loss_fn, dtype=jnp.float32, **options):
    model = Net(seed, dtype)
    return model, rk_optax.nnx.Optimizer(model, tx, loss, **{"wrt": nnx.Param, **options})


@nnx.jit
def take_step(model, optimizer, data):
    return optimizer.take_step(model, **data)


def train(model, optimizer, steps=5, step=take_step, **data):
    for _ in range(steps):
        step(model, optimizer, data)
    return numbers((model, optimizer))


def numbers(node):
    """Everything that an NNX object holds, keys as their data, as NumPy arrays."""

    def number(leaf):
        return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)

    return [number(leaf) for leaf in jax.tree.leaves(nnx.state(node))]


def mask_count(model):
    return int(model.dropout.rngs.count[...])


# --- One step, one field ---------------------------------------------------------------------------------------------

TIME, STEPS = 2.0, [20, 40, 80, 160]
A, B = [0.0, 0.5, 0.5, 1.0], [1 / 6, 1 / 3, 1 / 3, 1 / 6]  # classical RK4


def split(model):
    """The structure, and parameters and all else in arrays."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return graphdef, rk_optax.nnx._as_pure(params), rk_optax.nnx._as_pure(rest)


def loss_with_mask(model, count, data):
    """The loss as a function of parameters, with the dropout mask of a given random count."""
    graphdef, _, rest = split(model)

    def loss(params):
        copy = nnx.merge(graphdef, params, rest)
        copy.dropout.rngs.count[...] = jnp.full([], count, jnp.uint32)
        return loss_fn(copy, **data)

    return loss


def flow_of(losses, weights, params):
    """The flow of a weighted sum of losses to TIME."""
    return exact_flow(
        jax.grad(lambda p: sum(w * loss(p) for w, loss in zip(weights, losses, strict=True))), params, TIME
    )


def observed_order(step_of, model, exact):
    """The slope of the error at TIME against h.

    `step_of(h, model)` steps the live model; between steps its random count goes back to 0, so that the masks of all
    steps are those of the first.
    """
    graphdef, params, rest = split(model)

    @jax.jit  # one compilation for every h
    def error(h, n):
        def body(_, states):
            live = nnx.merge(graphdef, *states)
            live.dropout.rngs.count[...] = jnp.zeros([], jnp.uint32)
            step_of(h, live)
            return split(live)[1:]

        end, _ = jax.lax.fori_loop(0, n, body, (params, rest))
        difference = jax.tree.map(lambda a, e: jnp.max(jnp.abs(a - e)), end, exact)
        return jnp.max(jnp.stack(jax.tree.leaves(difference)))

    slope = -np.polyfit(np.log(STEPS), np.log([error(TIME / n, n) for n in STEPS]), 1)[0]
    print(f"observed order {slope:.2f}")
    return slope


def test_rk4_keeps_its_order_through_dropout_and_batch_norm(x64):
    data, model = make_data(np.float64), Net(dtype=jnp.float64)
    exact = flow_of([loss_with_mask(model, 0, data)], [1.0], split(model)[1])

    def step_of(h, live):
        factory = functools.partial(rk_optax.rk4, learning_rate=h)
        rk_optax.nnx.Optimizer(live, factory, loss_fn, wrt=nnx.Param).take_step(live, **data)

    assert 3.85 <= observed_order(step_of, model, exact) <= 4.6


def live_rk4(model, data, h):
    """The first silent mistake: Runge-Kutta by the textbook, on the live model. Nothing raises."""
    _, params, _ = split(model)
    k = total = jax.tree.map(jnp.zeros_like, params)
    for fraction, weight in zip(A, B, strict=True):
        nnx.update(model, jax.tree.map(lambda p, k, c=fraction: p - c * h * k, params, k))
        k = rk_optax.nnx._as_pure(nnx.grad(loss_fn)(model, **data))
        total = jax.tree.map(lambda t, k, w=weight: t + w * k, total, k)
    nnx.update(model, jax.tree.map(lambda p, t: p - h * t, params, total))


@pytest.mark.slow
def test_stages_on_the_live_model_are_no_method_of_order_four(x64):
    """Every stage draws a mask. Measured against the limit that suits it best, the flow of the masks' weighted mean."""
    data, model = make_data(np.float64), Net(dtype=jnp.float64)
    exact = flow_of([loss_with_mask(model, i, data) for i in range(4)], B, split(model)[1])
    assert 0.5 <= observed_order(lambda h, live: live_rk4(live, data, h), model, exact) <= 1.5


@pytest.mark.slow
def test_a_snapshot_taken_after_the_gradient_is_no_method_of_order_four(x64):
    """The second silent mistake: stages 2 to 4 share a mask, but it is not the one of stage 1."""
    data, model = make_data(np.float64), Net(dtype=jnp.float64)
    losses = [loss_with_mask(model, i, data) for i in range(2)]
    exact = flow_of(losses, [B[0], sum(B[1:])], split(model)[1])

    def step_of(h, live):
        optimizer = nnx.Optimizer(live, rk_optax.rk4(rk_optax.nnx.pure_loss(loss_fn), h), wrt=nnx.Param)
        grads = nnx.grad(loss_fn)(live, **data)
        optimizer.update(live, grads, snapshot=rk_optax.nnx.snapshot(live), **data)

    assert 0.5 <= observed_order(step_of, model, exact) <= 1.5


@pytest.mark.slow
def test_statistics_and_random_counts_move_once_per_step_as_in_one_plain_forward():
    data = make_data()
    model, optimizer = make()
    for i in range(3):
        plain = nnx.clone(model)
        plain(data["x"])
        before = numbers(nnx.state(model, nnx.BatchStat))
        take_step(model, optimizer, data)
        after = numbers(nnx.state(model, nnx.BatchStat))
        assert_close(after, numbers(nnx.state(plain, nnx.BatchStat)), rtol=1e-6)
        assert min(np.abs(a - b).max() for a, b in zip(after, before, strict=True)) > 1e-3
        assert mask_count(model) == i + 1


@pytest.mark.slow
def test_stages_on_the_live_model_move_statistics_and_random_counts_once_per_stage():
    """What take_step is for: the same step by hand moves them four times."""
    data = make_data()
    model, plain = Net(), Net()
    live_rk4(model, data, 0.0)  # at h = 0 all four stages are the forward pass of one point
    for _ in range(4):
        plain(data["x"])
    assert mask_count(model) == 4
    assert_close(numbers(nnx.state(model, nnx.BatchStat)), numbers(nnx.state(plain, nnx.BatchStat)), rtol=1e-5)


@pytest.mark.slow
def test_a_gradient_of_ones_own_with_a_snapshot_from_before_it_is_take_step():
    data = make_data()
    model, optimizer = make(RK4_MOMENTUM)
    expected = train(model, optimizer, **data)

    @nnx.jit
    def by_hand(model, optimizer, data):
        before = rk_optax.nnx.snapshot(model)
        grads = nnx.grad(loss_fn)(model, **data)
        optimizer.update(model, grads, snapshot=before, **data)

    model = Net()
    tx = RK4_MOMENTUM(rk_optax.nnx.pure_loss(loss_fn))
    assert_close(train(model, nnx.Optimizer(model, tx, wrt=nnx.Param), step=by_hand, **data), expected)


def test_a_snapshot_does_not_move_with_the_model():
    model = Net()
    _, rest = rk_optax.nnx.snapshot(model)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(rest["norm"])]
    model(make_data()["x"])
    assert_same([np.asarray(leaf) for leaf in jax.tree.leaves(rest["norm"])], before)
    assert int(rest["dropout"]["rngs"]["count"]) == 0
    assert mask_count(model) == 1


@pytest.mark.slow
def test_take_step_returns_loss_and_aux_of_before_the_step():
    def with_aux(model, x, y):
        predicted = model(x)
        return jnp.mean((predicted - y) ** 2), {"predicted": predicted}

    data = make_data()
    model, optimizer = make(loss=with_aux, has_aux=True)
    predicted = nnx.clone(model)(data["x"])
    loss, aux = take_step(model, optimizer, data)
    assert_close(aux["predicted"], predicted)
    assert_close(loss, jnp.mean((predicted - data["y"]) ** 2))
    plain_model, plain = make()
    take_step(plain_model, plain, data)
    assert_close(numbers(model), numbers(plain_model))


def test_only_the_parameters_of_wrt_move():
    model, optimizer = make(wrt=nnx.All(nnx.Param, nnx.PathContains("outer")))
    before = Net()
    train(model, optimizer, **make_data())
    assert_same(numbers(model.inner), numbers(before.inner))
    assert_same(numbers(nnx.state(model.norm, nnx.Param)), numbers(nnx.state(before.norm, nnx.Param)))
    assert np.abs(model.outer.kernel[...] - before.outer.kernel[...]).max() > 1e-3
    assert optimizer.opt_state.cost.gradients[...] == 20


@pytest.mark.slow
def test_random_keys_are_data_like_any_other(x64):
    """One key for all stages: the step of the textbook."""

    def keyed(model, x, y, key):
        hidden = nnx.Dropout(0.5)(nnx.tanh(model.inner(x)), rngs=nnx.Rngs(dropout=key))
        return jnp.mean((model.outer(hidden) - y) ** 2)

    data = {**make_data(np.float64), "key": jax.random.key(7)}
    model, optimizer = make(loss=keyed, dtype=jnp.float64)
    graphdef, params, rest = split(model)
    gradient = jax.jit(jax.grad(lambda p: keyed(nnx.merge(graphdef, p, rest), **data)))
    k = total = jax.tree.map(jnp.zeros_like, params)
    for fraction, weight in zip(A, B, strict=True):
        k = gradient(jax.tree.map(lambda p, k, c=fraction: p - c * 0.3 * k, params, k))
        total = jax.tree.map(lambda t, k, w=weight: t + w * k, total, k)
    take_step(model, optimizer, data)
    assert_close(split(model)[1], jax.tree.map(lambda p, t: p - 0.3 * t, params, total), rtol=1e-10)


# --- Compiled, donated, vmapped, sharded -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_step_traces_the_loss_twice_and_200_steps_never_again():
    """Once for the model's own gradient and once for all stages together."""
    traces = []

    def traced(model, x, y):
        traces.append(1)
        return loss_fn(model, x, y)

    model, optimizer = make(loss=traced, tx=functools.partial(rk_optax.rk4, learning_rate=0.1))
    for i in range(200):
        take_step(model, optimizer, make_data(seed=i))
    assert len(traces) == 2
    assert optimizer.step[...] == mask_count(model) == 200
    assert optimizer.opt_state.cost.gradients[...] == 800


def test_training_lowers_the_loss():
    data = make_data()
    model, optimizer = make()
    first = take_step(model, optimizer, data)
    train(model, optimizer, 50, **data)
    assert take_step(model, optimizer, data) < 0.7 * first


@pytest.mark.slow
def test_eager_and_jitted_by_nnx_and_by_jax_with_split_and_merge_agree():
    data = make_data()
    expected = train(*make(RK4_MOMENTUM), 3, **data)

    eager = train(
        *make(RK4_MOMENTUM), 3, step=lambda model, optimizer, data: optimizer.take_step(model, **data), **data
    )
    assert_close(eager, expected, rtol=1e-4, atol=1e-6)

    graphdef, state = nnx.split(make(RK4_MOMENTUM))

    @jax.jit
    def step(state, data):
        model, optimizer = nnx.merge(graphdef, state)
        optimizer.take_step(model, **data)
        return nnx.state((model, optimizer))

    for _ in range(3):
        state = step(state, data)
    assert_close(numbers(nnx.merge(graphdef, state)), expected)


@pytest.mark.slow
def test_model_and_optimizer_can_be_donated():
    data = make_data()
    expected = train(*make(RK4_MOMENTUM), **data)
    model, optimizer = make(RK4_MOMENTUM)
    old = model.inner.kernel[...]
    step = nnx.jit(lambda model, optimizer, data: optimizer.take_step(model, **data), donate_argnums=(0, 1))
    assert_close(train(model, optimizer, step=step, **data), expected)
    assert old.is_deleted()


@pytest.mark.slow
def test_vmap_over_seeds_is_the_loop():
    data = make_data()
    tx = RK4_MOMENTUM(rk_optax.nnx.pure_loss(loss_fn))

    @nnx.vmap(in_axes=0, out_axes=0)
    def make_many(key):
        return make(tx, key)

    keys = jax.random.split(jax.random.key(0), 3)
    model, optimizer = make_many(keys)
    step = nnx.jit(nnx.vmap(lambda model, optimizer, data: optimizer.take_step(model, **data), in_axes=(0, 0, None)))
    many = train(model, optimizer, step=step, **data)
    for i, key in enumerate(keys):
        assert_close([leaf[i] for leaf in many], train(*make(tx, key), **data), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_batch_sharded_over_eight_devices_gives_the_same_training():
    data = make_data(size=32)
    expected = train(*make(RK4_MOMENTUM), **data)
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(data, NamedSharding(mesh, PartitionSpec("batch")))
    both = make(RK4_MOMENTUM)
    nnx.update(both, jax.device_put(nnx.state(both), NamedSharding(mesh, PartitionSpec())))
    assert_close(train(*both, **sharded), expected, rtol=1e-4, atol=1e-6)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(nnx.state(both))} == {8}


# --- The stock class's behaviour -------------------------------------------------------------------------------------


def plain(decay=0.1):
    """An optimizer that takes no keywords, not even `**extra_args`."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: -decay * g, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


@nnx.jit
def stock_step(model, optimizer, data):
    optimizer.update(model, nnx.grad(loss_fn)(model, **data))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("tx", [plain(), optax.sgd(0.1, 0.9), optax.adam(0.01)], ids=["plain", "momentum", "adam"])
def test_an_optax_optimizer_steps_as_in_the_stock_class(tx):
    data = make_data()
    model = Net()
    expected = train(model, nnx.Optimizer(model, tx, wrt=nnx.Param), step=stock_step, **data)
    model, optimizer = make(tx, loss=None)
    assert_same(train(model, optimizer, step=stock_step, **data), expected)  # to the bit
    assert optimizer.tx == tx
    for given in (tx, lambda loss: tx):  # the loss's value is computed too, in another program
        assert_close(train(*make(given), **data), expected, rtol=1e-4, atol=1e-6)


def test_keywords_of_update_reach_the_optimizer_as_in_the_stock_class():
    model, optimizer = make(optax.polyak_sgd(1.0), loss=None)
    grads = nnx.grad(loss_fn)(model, **make_data())
    before = numbers(nnx.state(model, nnx.Param))
    optimizer.update(model, grads, value=jnp.array(0.0))  # Polyak's rule stays where the loss is zero
    assert_same(numbers(nnx.state(model, nnx.Param)), before)


def test_fields_and_state_are_the_stock_ones():
    model = Net()
    ours = rk_optax.nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    stock = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    assert isinstance(ours, nnx.Optimizer)
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(stock))
    assert set(vars(ours)) - set(vars(stock)) == {"loss_fn", "has_aux"}
    with pytest.raises(TypeError, match="wrt"):
        rk_optax.nnx.Optimizer(model, optax.adam(0.1))
    with pytest.raises(TypeError, match="grads"):
        ours.update(model)


@pytest.mark.slow
def test_a_restored_state_continues_the_training():
    data = make_data()
    both = make(RK4_MOMENTUM)
    train(*both, **data)
    saved = jax.tree.map(jnp.copy, nnx.state(both))
    expected = train(*both, **data)
    fresh = make(RK4_MOMENTUM, seed=5)
    nnx.update(fresh, saved)
    assert_same(train(*fresh, **data), expected)


@pytest.mark.covering(most=1)
@pytest.mark.skipif("graph" not in inspect.signature(nnx.split).parameters, reason="this Flax has graph mode alone")
@pytest.mark.parametrize("how", ["argument", "context"])
def test_models_as_plain_pytrees_work_too(how):
    data = make_data()
    expected = train(*make(RK4_MOMENTUM), 2, **data)
    if how == "argument":
        both = make(RK4_MOMENTUM, graph=False)
        assert_close(train(*both, 2, **data), expected)
        return
    with nnx.set_graph_mode(False):
        model, optimizer = make(RK4_MOMENTUM)
        for _ in range(2):
            optimizer.take_step(model, **data)
    assert_close(numbers((model, optimizer)), expected, rtol=1e-4, atol=1e-6)


# --- Mistakes --------------------------------------------------------------------------------------------------------


def test_an_update_without_snapshot_says_to_take_the_step_or_the_snapshot():
    model, optimizer = make()
    with pytest.raises(TypeError, match=r"take_step\(model, x=x\).*snapshot\(model\) first"):
        optimizer.update(model, nnx.grad(loss_fn)(model, **make_data()), **make_data())


def test_a_loss_of_a_model_given_to_a_solver_says_how_to_convert_it():
    model, optimizer = make(RK4(loss_fn))
    with pytest.raises(TypeError) as caught:
        optimizer.take_step(model, **make_data())
    assert any("pure_loss(loss_fn)" in note for note in caught.value.__notes__)


def test_missing_or_misspelt_data_are_an_error_and_the_model_stays():
    data = make_data()
    model, optimizer = make()
    for wrong in ({"x": data["x"]}, {"x": data["x"], "z": data["y"]}, {**data, "z": 1.0}):
        with pytest.raises(TypeError, match=r"'y'|'z'"):
            optimizer.take_step(model, **wrong)
    assert mask_count(model) == 0


@pytest.mark.parametrize("build", [nnx.Rngs, lambda seed: {"inside": [nnx.Linear(1, 1, rngs=nnx.Rngs(seed))]}])
def test_live_objects_among_the_data_are_an_error_that_says_what_to_pass(build):
    model, optimizer = make(loss=lambda model, x, extra: loss_fn(model, x, x[:, :2]))
    with pytest.raises(TypeError, match=r"data\['extra'\].* is a live (Rngs|Linear).*random key"):
        optimizer.take_step(model, x=make_data()["x"], extra=build(0))


def test_a_missing_loss_is_an_error_where_one_is_needed():
    model = Net()
    with pytest.raises(TypeError, match="tx is a function of the loss"):
        rk_optax.nnx.Optimizer(model, RK4, wrt=nnx.Param)
    with pytest.raises(TypeError, match="take_step needs a loss"):
        rk_optax.nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param).take_step(model)


def test_a_pure_loss_keeps_the_signature_and_guards_its_own_argument():
    def loss(model, x, /, y=1, *, z, **more):
        return 0.0

    names = list(inspect.signature(rk_optax.nnx.pure_loss(loss)).parameters)
    assert names == ["model", "x", "y", "z", "snapshot", "more"]
    with pytest.raises(ValueError, match=r"'snapshot'.*rename it"):
        rk_optax.nnx.pure_loss(lambda model, snapshot: 0.0)
