"""Stage-batch policies: which examples each stage touches, what that costs, and what is left of the order."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from training import assert_close, assert_same

import rk_optax
from rk_optax import first_stage_batch

H = 0.3
W = np.array([0.5, -0.3, 0.8])
RNG = np.random.default_rng(0)
DATA = {"x": RNG.normal(size=(12, 3)), "y": RNG.normal(size=12)}
NAMES = ["x", "y"]


def loss_fn(w, x, y):
    """Logistic-like regression: nonlinear in w, a mean over examples."""
    return jnp.mean(jnp.log(jnp.cosh(x @ w - y))) + 0.05 * jnp.sum(w**2)


def loss_gradient(w, x, y):
    """The gradient of `loss_fn`, by hand and in NumPy."""
    return x.T @ np.tanh(x @ w - y) / len(y) + 0.1 * w


def numpy_step(tableau, gradients, w, h):
    """The effective gradient where stage i has the field `gradients[i]`, and the stage points, by the textbook."""
    ks, points = [], []
    for row, gradient in zip(tableau.a, gradients, strict=False):
        points.append(w - h * sum((a * k for a, k in zip(row, ks, strict=False)), np.zeros_like(w)))
        ks.append(gradient(points[-1]))
    return sum(b * k for b, k in zip(tableau.b, ks, strict=False)), points


def cut(policy, stages):
    """The data of `update` under a policy, and the part that each stage is to see."""
    if policy == "same":
        return DATA, [DATA] * stages
    if policy == "split":
        size = 12 // stages
        return DATA, [{k: v[i * size : (i + 1) * size] for k, v in DATA.items()} for i in range(stages)]
    rng = np.random.default_rng(1)
    stacked = {"x": rng.normal(size=(stages, 5, 3)), "y": rng.normal(size=(stages, 5))}
    return stacked, [{k: v[i] for k, v in stacked.items()} for i in range(stages)]


def options(policy, names=NAMES):
    return {} if policy == "same" else {"stage_batches": policy, "batch_argnames": names}


def part_of_stage_one(policy, data, stages, names=NAMES):
    return data if policy == "same" else first_stage_batch(data, stages, policy, names)


def one_update(policy, solver, h=H, data=None, w=W, loss=loss_fn, names=NAMES, **further):
    """The first update, as a user takes it: the gradient that goes in is that of the first stage's part."""
    stages = rk_optax.TABLEAUS[solver].effective_stages
    data = cut(policy, stages)[0] if data is None else data
    tx = rk_optax.runge_kutta(loss, h, solver, **options(policy, names), **further)
    w = jnp.asarray(w)
    first = part_of_stage_one(policy, data, stages, names)
    return tx.update(jax.grad(loss)(w, **first), tx.init(w), w, **data)


# --- The examples ----------------------------------------------------------------------------------------------------


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("solver", ["euler", "heun", "rk4", "ssprk3", "dopri5"])
@pytest.mark.parametrize("policy", ["same", "fresh", "split"])
def test_each_stage_touches_its_own_examples_and_no_others(policy, solver, x64):
    """Each evaluation reports its point and its examples, which carry their numbers, when the program runs."""
    tableau = rk_optax.TABLEAUS[solver]
    stages = tableau.effective_stages
    identity = np.arange(60.0 if policy == "fresh" else 12.0)
    data = {"ids": identity.reshape(stages, -1) if policy == "fresh" else identity}
    calls = []

    def loss(w, ids):
        jax.debug.callback(lambda w, ids: calls.append((float(w), np.asarray(ids))), w, ids)
        return jnp.mean(jnp.cosh(w - ids / 100))

    one_update(policy, solver, data=data, w=1.0, loss=loss, names=["ids"])
    jax.effects_barrier()

    parts = {"same": [identity] * stages, "fresh": data["ids"], "split": identity.reshape(stages, -1)}[policy]
    _, points = numpy_step(
        tableau,
        [lambda w, part=part: np.mean(np.sinh(w - part / 100)) for part in parts],
        np.array(1.0),
        H,
    )
    assert len(calls) == stages
    for point, part in zip(points, parts, strict=False):
        (seen,) = [ids for w, ids in calls if abs(w - point) < 1e-12]
        np.testing.assert_array_equal(seen, part)
    touched = np.concatenate([ids for _, ids in calls])
    assert len(touched) == {"same": 12 * stages, "fresh": 60, "split": 12}[policy]
    if policy != "same":
        np.testing.assert_array_equal(np.sort(touched), identity)  # every example, and once


def test_a_split_rk4_step_costs_as_many_examples_as_one_gradient(x64):
    examples = []

    def loss(w, x, y):
        jax.debug.callback(lambda x: examples.append(len(x)), x)
        return loss_fn(w, x, y)

    _, state = one_update("split", "rk4", loss=loss)
    jax.effects_barrier()
    assert examples == [3, 3, 3, 3]
    assert int(state.cost.gradients) == 4  # of a quarter of the batch each


# --- The numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("solver", ["heun", "rk4", "ssprk3", "dopri5"])
@pytest.mark.parametrize("policy", ["same", "fresh", "split"])
def test_a_step_is_the_textbooks_with_a_field_for_each_stage(policy, solver, x64):
    tableau = rk_optax.TABLEAUS[solver]
    _, parts = cut(policy, tableau.effective_stages)
    effective, _ = numpy_step(tableau, [functools.partial(loss_gradient, **part) for part in parts], W, H)
    updates, state = one_update(policy, solver)
    np.testing.assert_allclose(updates, -H * effective, rtol=1e-12)
    assert int(state.cost.gradients) == tableau.effective_stages


def test_split_rk4_over_several_batches_is_a_loop_in_numpy(x64):
    rng = np.random.default_rng(2)
    tx = rk_optax.rk4(loss_fn, H, momentum=0.8, **options("split"))
    w, trace = W, np.zeros(3)
    theta, state = jnp.asarray(W), tx.init(jnp.asarray(W))
    update = jax.jit(tx.update)
    for _ in range(5):
        data = {"x": rng.normal(size=(8, 3)), "y": rng.normal(size=8)}
        gradients = [
            functools.partial(loss_gradient, x=data["x"][i : i + 2], y=data["y"][i : i + 2]) for i in range(0, 8, 2)
        ]
        k1 = gradients[0](w)
        k2 = gradients[1](w - H / 2 * k1)
        k3 = gradients[2](w - H / 2 * k2)
        k4 = gradients[3](w - H * k3)
        trace = 0.8 * trace + (k1 + 2 * k2 + 2 * k3 + k4) / 6
        w = w - H * trace

        first = first_stage_batch(data, 4, "split", NAMES)
        updates, state = update(jax.grad(loss_fn)(theta, **first), state, theta, **data)
        theta = theta + updates
        np.testing.assert_allclose(theta, w, rtol=1e-12)


@pytest.mark.parametrize("policy", ["fresh", "split"])
def test_stage_one_can_be_recomputed_on_the_first_part(policy, x64):
    data, _ = cut(policy, 4)
    expected, _ = one_update(policy, "rk4")
    tx = rk_optax.rk4(loss_fn, H, reuse_updates=False, **options(policy))
    updates, state = tx.update(jnp.full(3, 1e3), tx.init(W), W, **data)
    np.testing.assert_allclose(updates, expected, rtol=1e-12)
    assert int(state.cost.gradients) == 4


@pytest.mark.covering
@pytest.mark.parametrize("policy", ["fresh", "split"])
@pytest.mark.parametrize("where", ["construction", "update"])
def test_a_grad_fn_sees_the_parts_too(policy, where, x64):
    data, _ = cut(policy, 4)
    expected, _ = one_update(policy, "rk4")
    gradient = jax.grad(loss_fn)
    k1 = gradient(W, **first_stage_batch(data, 4, policy, NAMES))
    at_construction, at_update = ({"grad_fn": gradient}, {}) if where == "construction" else ({}, {"grad_fn": gradient})
    loss = None if where == "construction" else lambda w, x, y: jnp.nan * jnp.sum(w)
    tx = rk_optax.rk4(loss, H, **at_construction, **options(policy))
    updates, _ = tx.update(k1, tx.init(W), W, **data, **at_update)
    np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_arguments_that_are_not_named_reach_every_stage_whole(x64):
    seen = []

    def loss(w, x, y, rng, weight):
        mask = jax.random.bernoulli(rng, 0.5, (3,))
        jax.debug.callback(lambda mask, weight: seen.append((np.asarray(mask), np.asarray(weight))), mask, weight)
        return loss_fn(w * mask, x, y) * jnp.mean(weight)

    key, weight = jax.random.key(3), np.arange(12.0)
    one_update("split", "rk4", data={**DATA, "rng": key, "weight": weight}, loss=loss)
    jax.effects_barrier()
    assert len(seen) == 4
    for mask, whole in seen:
        np.testing.assert_array_equal(mask, jax.random.bernoulli(key, 0.5, (3,)))
        np.testing.assert_array_equal(whole, weight)


def test_random_keys_can_be_fresh_too(x64):
    def loss(w, x, y, rng):
        return loss_fn(w * jax.random.bernoulli(rng, 0.5, (3,)), x, y)

    keys = jax.random.split(jax.random.key(0), 2)
    masks = [np.asarray(jax.random.bernoulli(k, 0.5, (3,))) for k in keys]
    assert np.any(masks[0] != masks[1])
    updates, _ = one_update("fresh", "heun", data={**DATA, "rng": keys}, loss=loss, names=["rng"])

    def gradient(w, mask):
        return mask * (loss_gradient(w * mask, **DATA))

    effective, _ = numpy_step(
        rk_optax.TABLEAUS["heun"], [functools.partial(gradient, mask=mask) for mask in masks], W, H
    )
    np.testing.assert_allclose(updates, -H * effective, rtol=1e-12)


@pytest.mark.parametrize("policy", ["fresh", "split"])
def test_nested_data_are_cut_leaf_by_leaf(policy, x64):
    def nested_loss(w, batch):
        return loss_fn(w, batch["inputs"]["x"], batch["targets"][0])

    data, _ = cut(policy, 4)
    nested = {"batch": {"inputs": {"x": data["x"], "unused": None}, "targets": (data["y"],)}}
    updates, _ = one_update(policy, "rk4", data=nested, loss=nested_loss, names=["batch"])
    expected, _ = one_update(policy, "rk4")
    np.testing.assert_allclose(updates, expected, rtol=1e-12)
    as_string, _ = one_update(policy, "rk4", data=nested, loss=nested_loss, names=["batch"], argnames="batch")
    assert_same(as_string, updates)


def test_one_name_may_be_a_string(x64):
    def loss(w, batch):
        return loss_fn(w, batch["x"], batch["y"])

    listed, _ = one_update("split", "rk4", data={"batch": DATA}, loss=loss, names=["batch"])
    tx = rk_optax.rk4(loss, H, stage_batches="split", batch_argnames="batch")
    first = first_stage_batch({"batch": DATA}, 4, "split", "batch")
    updates, _ = tx.update(jax.grad(loss)(W, **first), tx.init(W), W, batch=DATA)
    assert_same(updates, listed)


def test_euler_has_one_stage_and_so_nothing_to_split(x64):
    assert_same(one_update("split", "euler")[0], one_update("same", "euler")[0])


def test_jit_changes_nothing_and_new_data_of_the_same_shape_do_not_retrace(x64):
    traces = []

    def loss(w, x, y):
        traces.append(1)
        return loss_fn(w, x, y)

    tx = rk_optax.rk4(loss, H, **options("split"))
    update = jax.jit(tx.update)
    seen = []
    for i in range(3):
        data = jax.tree.map(lambda a, i=i: a + i, DATA)
        k1 = jax.grad(loss_fn)(W, **first_stage_batch(data, 4, "split", NAMES))
        updates, _ = update(k1, tx.init(W), W, **data)
        seen.append(len(traces))
        np.testing.assert_allclose(updates, one_update("split", "rk4", data=data)[0], rtol=1e-12)
    assert seen[0] == seen[-1]


def test_an_auxiliary_output_does_not_disturb(x64):
    def with_aux(w, x, y):
        return loss_fn(w, x, y), x

    tx = rk_optax.rk4(with_aux, H, has_aux=True, **options("split"))
    k1 = jax.grad(loss_fn)(W, **first_stage_batch(DATA, 4, "split", NAMES))
    updates, _ = tx.update(k1, tx.init(W), W, **DATA)
    np.testing.assert_allclose(updates, one_update("split", "rk4")[0], rtol=1e-12)


# --- The order -------------------------------------------------------------------------------------------------------


def local_slopes(update_of, gradient, steps=(0.2, 0.1, 0.05)):
    """How fast one step's distance from the flow of `gradient` falls with h: a method of order p has p + 1."""
    errors = []
    for h in steps:
        flow = scipy.integrate.solve_ivp(lambda _, w: -gradient(w), (0, h), W, "DOP853", rtol=3e-14, atol=1e-16).y[
            :, -1
        ]
        errors.append(np.linalg.norm(W + update_of(h) - flow))
    return np.diff(np.log(errors)) / np.diff(np.log(steps))


def whole_gradient(w):
    return loss_gradient(w, **DATA)


@functools.lru_cache
def jitted(policy, solver):
    def update(h, data):
        return one_update(policy, solver, h, data)[0]

    return jax.jit(update)


REPEATED = {
    "same": DATA,
    "fresh": {k: np.stack([v] * 4) for k, v in DATA.items()},
    "split": {k: np.concatenate([v] * 4) for k, v in DATA.items()},
}


@pytest.mark.parametrize("policy", REPEATED)
def test_with_the_same_examples_in_every_part_rk4_keeps_order_four(policy, x64):
    slopes = local_slopes(lambda h: np.asarray(jitted(policy, "rk4")(h, REPEATED[policy])), whole_gradient)
    assert slopes.min() >= 5 - 0.15


@pytest.mark.parametrize(("solver", "order"), [("rk4", 0), ("ssprk3", 0), ("heun", 1)])
def test_a_split_step_does_not_keep_the_order_along_the_flow_of_the_whole_batch(solver, order, x64):
    """Unequal weights favour some slices: order 0. Equal ones make the batch's gradient, but no more: order 1."""
    slopes = local_slopes(lambda h: np.asarray(jitted("split", solver)(h, DATA)), whole_gradient)
    np.testing.assert_allclose(slopes, order + 1, atol=0.15)


def mean_over(policy, draws, solver, loss_gradients, h):
    """The update averaged over all orders of the parts."""
    tableau = rk_optax.TABLEAUS[solver]
    return np.mean([-h * numpy_step(tableau, [loss_gradients[i] for i in draw], W, h)[0] for draw in draws], axis=0)


@pytest.mark.covering
@pytest.mark.parametrize(
    ("policy", "field", "order"),
    [("fresh", "linear", 4), ("fresh", "nonlinear", 2), ("split", "linear", 1), ("split", "nonlinear", 1)],
)
def test_what_is_left_of_rk4s_order_in_the_mean_over_all_draws(policy, field, order, x64):
    """Independent batches keep the order in the mean along a linear field only; slices, which are not, not even there.

    By the textbook loop, which the tests above have found our steps to be.
    """
    rng = np.random.default_rng(4)
    parts = [{"x": rng.normal(size=(3, 3)), "y": rng.normal(size=3)} for _ in range(4)]

    def linear(w, x, y):
        return x.T @ (x @ w - y) / len(y)

    gradients = [functools.partial(linear if field == "linear" else loss_gradient, **part) for part in parts]
    # Independent draws from two batches are enough to tell; the four slices of a batch come in all orders.
    draws = itertools.product(range(2), repeat=4) if policy == "fresh" else itertools.permutations(range(4))
    draws = list(draws)
    population = gradients[:2] if policy == "fresh" else gradients
    slopes = local_slopes(
        lambda h: mean_over(policy, draws, "rk4", gradients, h),
        lambda w: np.mean([g(w) for g in population], axis=0),
        steps=(0.05, 0.025, 0.0125),
    )
    np.testing.assert_allclose(slopes, order + 1, atol=0.15)


# --- The helper ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fresh", "split"])
def test_the_helper_cuts_out_the_first_stages_part_and_leaves_the_rest(policy):
    data, parts = cut(policy, 4)
    key = jax.random.key(0)
    first = first_stage_batch({**data, "rng": key, "flag": True}, 4, policy, NAMES)
    assert first.keys() == {"x", "y", "rng", "flag"}
    assert_close({k: first[k] for k in NAMES}, jax.tree.map(lambda a: a.astype(np.float32), parts[0]), rtol=1e-6)
    assert first["rng"] is key
    assert first["flag"] is True
    assert data["x"].shape == cut(policy, 4)[0]["x"].shape


def test_the_helper_works_under_jit():
    first = jax.jit(lambda data: first_stage_batch(data, 3, "split", ["x"]))({"x": jnp.arange(6), "y": jnp.arange(5)})
    assert_same(first, {"x": jnp.arange(2), "y": jnp.arange(5)})


@pytest.mark.parametrize(
    ("data", "policy", "names", "message"),
    [
        ({"x": np.ones(10)}, "split", ["x"], r"4 equal parts.*'x' of shape \(10,\) does not divide.*multiple of 4"),
        ({"x": np.ones(())}, "split", ["x"], r"'x' of shape \(\) does not divide"),
        ({"x": np.ones((3, 8))}, "fresh", ["x"], r"leading axis of length 4, got shape \(3, 8\).*jnp\.stack"),
        ({"x": np.ones(())}, "fresh", ["x"], r"leading axis of length 4, got shape \(\)"),
        ({"x": np.ones(8)}, "spilt", ["x"], "'fresh'.*'split'.*'spilt'"),
        ({"x": np.ones(8)}, "split", ["z"], "'z'.*batch_argnames|batch_argnames.*'z'"),
    ],
)
def test_the_helper_refuses_what_it_cannot_cut(data, policy, names, message):
    with pytest.raises(ValueError, match=message):
        first_stage_batch(data, 4, policy, names)


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["heun", "rk4", "dopri5"])
def test_batches_that_do_not_divide_are_refused_at_the_update(solver, x64):
    stages = rk_optax.TABLEAUS[solver].effective_stages
    tx = rk_optax.runge_kutta(loss_fn, H, solver, **options("split"))
    data = {"x": np.ones((stages * 2 + 1, 3)), "y": np.ones(stages * 2 + 1)}
    with pytest.raises(ValueError, match=rf"into {stages} equal parts.*does not divide.*multiple of {stages}"):
        tx.update(W, tx.init(W), W, **data)


def test_one_argument_that_does_not_divide_is_named(x64):
    tx = rk_optax.rk4(loss_fn, H, **options("split"))
    with pytest.raises(ValueError, match="data argument 'y'"):
        tx.update(W, tx.init(W), W, x=np.ones((8, 3)), y=np.ones(9))


def test_a_stack_of_the_wrong_number_of_batches_is_refused(x64):
    tx = rk_optax.rk4(loss_fn, H, **options("fresh"))
    with pytest.raises(ValueError, match=r"'x' must have a leading axis of length 4, got shape \(3, 5, 3\)"):
        tx.update(W, tx.init(W), W, x=np.ones((3, 5, 3)), y=np.ones((3, 5)))


def test_an_optional_argument_that_is_cut_may_be_left_out(x64):
    def loss(w, x, y, weight=None):
        return loss_fn(w, x, y) if weight is None else loss_fn(w, x, y) * jnp.mean(weight)

    names = [*NAMES, "weight"]
    tx = rk_optax.rk4(loss, H, **options("split", names))
    k1 = jax.grad(loss_fn)(W, **first_stage_batch(DATA, 4, "split", NAMES))
    updates, _ = tx.update(k1, tx.init(W), W, **DATA)
    np.testing.assert_allclose(updates, one_update("split", "rk4")[0], rtol=1e-12)


def plain(w):
    return jnp.sum(w**2)


class Adaptive(rk_optax.Solver):
    """A solver whose number of gradients is not fixed."""

    def step(self, problem, params, k1, h, state, *, wants=frozenset()):
        return rk_optax.Step(k1, rk_optax.Cost(gradients=1), state=state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rk_optax.rk4(loss_fn, H, stage_batches="spilt"), "'same', 'fresh' or 'split', got 'spilt'"),
        (lambda: rk_optax.rk4(loss_fn, H, stage_batches=None), "'same', 'fresh' or 'split', got None"),
        (lambda: rk_optax.rk4(loss_fn, H, stage_batches="split"), "'split' needs batch_argnames"),
        (lambda: rk_optax.rk4(loss_fn, H, stage_batches="fresh", batch_argnames=()), "'fresh' needs batch_argnames"),
        (lambda: rk_optax.rk4(loss_fn, H, batch_argnames=["x"]), "batch_argnames does nothing with .*'same'"),
        (lambda: rk_optax.rk4(loss_fn, H, **options("split", ["x", "z"])), "batch_argnames has 'z'.*loss_fn does not"),
        (lambda: rk_optax.rk4(plain, H, **options("split", ["x"])), "batch_argnames has 'x'.*loss_fn does not"),
        (
            lambda: rk_optax.rk4(loss_fn, H, grad_fn=lambda w, x: w, **options("split")),
            "batch_argnames has 'y'.*grad_fn does not",
        ),
        (
            lambda: rk_optax.runge_kutta(loss_fn, H, Adaptive(), **options("split")),
            "fixed number of gradients per step, which Adaptive does not have",
        ),
    ],
)
def test_mistakes_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()
