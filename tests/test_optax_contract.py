"""What Optax asks of every optimizer in its own tests, asked of every optimizer here.

After `alias_test`, `_common_test` (contrib), `float64_test` and `sharding_test` in Optax's source.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from covering import some
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from registry import EXPLICIT
from training import needs_explicit_axes

import rk_optax

pytestmark = pytest.mark.latest

OPTIMIZERS = {
    f"{name}{label}": (name, {"learning_rate": 1e-3, **options})
    for label, options in [("", {}), ("-momentum", {"momentum": 0.9})]
    for name in EXPLICIT
}
# Those for stiff flows, on any loss: with three stages, and with its Hessian.
OPTIMIZERS |= {
    name: (name, {"learning_rate": 1e-3, **options})
    for options, names in [({"stages": 3}, ["rkc", "rkl"]), ({"curvature": "hessian"}, ["rosenbrock_euler", "ros2"])]
    for name in names
}
MIXED = (jnp.float32, jnp.float64)
LOW_AND_HIGH = (jnp.bfloat16, jnp.float32)


# One of each kind of program: no later stage, a chain of stages, stored stages, a recurrence, products. Of the others
# only the coefficients differ.
QUICK = ("euler", "heun-momentum", "rk4", "bogacki_shampine-momentum", "rkc", "ros2")


@pytest.fixture(params=some(OPTIMIZERS, *QUICK))
def optimizer(request):
    """A factory and its keywords: `factory(loss_fn, **keywords)`."""
    name, keywords = request.param
    return getattr(rk_optax, name), keywords


def target(dtype):
    """Optax's targets in one tree: a parabola of a vector and a matrix, and Rosenbrock's function."""
    unit = 1 + 1j if jnp.issubdtype(dtype, jnp.complexfloating) else 1.0
    start = {
        "parabola": (jnp.array([-1.0, 10.0, 1.0], dtype), jnp.zeros((2, 2), dtype)),
        "rosenbrock": jnp.zeros(2, dtype),
    }
    end = {
        "parabola": (
            unit * jnp.array([1.0, -1.0, 1.0], dtype),
            unit * jnp.array([[3.0, -2.0], [1.0, 4.0]], dtype),
        ),
        "rosenbrock": jnp.array([unit, unit**2], dtype),
    }

    def objective(params):
        parabolas = zip(params["parabola"], end["parabola"], strict=True)
        u, v = params["rosenbrock"]
        valley = jnp.abs(unit - u) ** 2 + 100 * jnp.abs(v - u**2) ** 2
        return sum(jnp.sum(jnp.abs(p - e) ** 2) for p, e in parabolas) + valley

    return start, end, objective


def sum_of_squares(params):
    return sum(jnp.sum(jnp.abs(p) ** 2) for p in jax.tree.leaves(params))


def make_step(tx, objective, **extra_args):
    def step(params, state):
        grads = jax.tree.map(jnp.conj, jax.grad(objective)(params))
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, objective, params, steps):
    @jax.jit
    def run(params, state):
        step = make_step(tx, objective)
        return jax.lax.scan(lambda carry, _: (step(*carry), None), (params, state), length=steps)[0]

    return run(params, tx.init(params))


def types(tree):
    """Everything that makes a compiled program fit: shapes, dtypes, weakness, and shardings where they are types."""
    return jax.tree.map(jax.typeof, tree)


def dtypes(tree):
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


@pytest.mark.covering(most=3)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_optimisation_ends_at_the_minimum(optimizer, dtype):
    factory, keywords = optimizer
    start, end, objective = target(dtype)
    params, state = train(factory(objective, **keywords), objective, start, 30_000)
    chex.assert_trees_all_close(params, end, rtol=3e-2, atol=3e-2)
    assert (state.count, state.rejected) == (30_000, 0)


def test_tree_map_params_finds_what_is_like_params_in_the_state(optimizer):
    factory, keywords = optimizer
    start, _, objective = target(jnp.float32)
    tx = factory(objective, **keywords)
    state = tx.init(start)
    chex.assert_trees_all_close(optax.tree_map_params(tx, lambda v: v, state), state)
    changed = optax.tree_map_params(tx, lambda v, p: v + p, state, start)
    like_params = [getattr(state.after, "trace", None)]
    if like_params != [None]:
        chex.assert_trees_all_close(changed.after.trace, start)
    chex.assert_trees_all_close(changed._replace(after=state.after), state)


def test_tree_map_params_works_where_a_mask_leaves_holes(optimizer):
    factory, keywords = optimizer
    start, _, objective = target(jnp.float32)
    tx = factory(objective, mask=lambda params: {name: name == "parabola" for name in params}, **keywords)
    state = tx.init(start)
    chex.assert_trees_all_close(optax.tree_map_params(tx, lambda v: v, state), state)


def test_unexpected_extra_args_are_accepted_and_a_second_call_compiles_nothing(optimizer):
    factory, keywords = optimizer
    traces = []

    def traced(params):
        traces.append(1)
        return sum_of_squares(params)

    tx = factory(traced, **keywords)
    step = jax.jit(make_step(tx, traced, unexpected_extra_args_your_optimizer_doesnt_expect=1))
    params = jnp.array([1.0, 2.0])
    params, state = step(params, tx.init(params))
    after_one = len(traces)
    for _ in range(2):
        params, state = step(params, state)
    assert len(traces) == after_one


@pytest.mark.covering(most=3)
@pytest.mark.parametrize("jit", [True, False])
def test_inject_hyperparams_changes_neither_updates_nor_states(optimizer, jit):
    factory, keywords = optimizer
    params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
    grads = [jnp.ones((2, 3)), -jnp.ones((2, 5, 2))]
    plain = factory(sum_of_squares, **keywords)
    injected = [rk_optax.inject_hyperparams(factory)(sum_of_squares, **keywords)]
    # One is enough where every operation compiles by itself. Optax alone takes caps and stages for rates.
    if jit and not {"max_stages", "max_iterations"} & set(inspect.signature(factory).parameters):
        injected += [
            optax.inject_hyperparams(factory, static_args=("loss_fn",))(sum_of_squares, **keywords),
            optax.inject_hyperparams(functools.partial(factory, sum_of_squares))(**keywords),
        ]

    def update_all(grads, states, params):
        return [tx.update(grads, state, params) for tx, state in zip([plain, *injected], states, strict=True)]

    states = [tx.init(params) for tx in [plain, *injected]]
    (expected, expected_state), *outcomes = (jax.jit(update_all) if jit else update_all)(grads, states, params)
    for updates, state in outcomes:
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)
        chex.assert_trees_all_close(state.inner_state, expected_state, rtol=1e-6)
        assert set(state.hyperparams) == set(keywords) - {"stages", "curvature"}


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_updates_have_the_dtype_of_params(optimizer, dtype):
    factory, keywords = optimizer
    tx = factory(sum_of_squares, **keywords)
    params = jnp.array([1.0, 2.0], dtype)
    updates, _ = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    assert updates.dtype == dtype


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64, jnp.complex64, jnp.complex128])
def test_the_types_of_params_and_state_are_stable_through_cond(optimizer, dtype, x64):
    factory, keywords = optimizer
    params = jnp.array([1.0, 2.0], dtype)
    tx = factory(sum_of_squares, **keywords)
    step = jax.jit(make_step(tx, sum_of_squares))  # traced once for both

    def perhaps_step(params, state, condition):
        return jax.lax.cond(condition, step, lambda params, state: (params, state), params, state)

    state = tx.init(params)
    for function in (perhaps_step, lambda params, state, condition: step(params, state)):
        new_params, new_state = jax.eval_shape(function, params, state, True)
        assert (new_params.shape, new_params.dtype) == (params.shape, dtype)
        assert types(new_state) == types(state)


def test_mixed_dtypes_stay_as_they_are(optimizer, x64):
    factory, keywords = optimizer
    tx = factory(sum_of_squares, **keywords)
    params = tuple(jnp.array([1.0, 2.0], dtype) for dtype in MIXED)
    updates = tuple(jnp.array([10.0, 21.0], dtype) for dtype in MIXED)
    state = jax.eval_shape(tx.init, params)
    updates, new_state = jax.eval_shape(tx.update, updates, state, params)
    assert dtypes(new_state) == dtypes(state)
    assert dtypes(jax.eval_shape(optax.apply_updates, params, updates)) == MIXED


@pytest.mark.covering(most=3)
def test_gradient_accumulation_waits_without_an_error(optimizer):
    factory, keywords = optimizer
    tx = optax.MultiSteps(factory(sum_of_squares, **keywords), every_k_schedule=4)

    @jax.jit
    def first_updates(every_params):
        return [tx.update(params, tx.init(params), params)[0] for params in every_params]

    for updates, dtype in zip(first_updates([jnp.ones(2, d) for d in LOW_AND_HIGH]), LOW_AND_HIGH, strict=True):
        np.testing.assert_array_equal(updates, jnp.zeros(2, dtype))
        assert updates.dtype == dtype


@pytest.mark.covering(most=3)
def test_a_constant_schedule_is_the_constant(optimizer):
    factory, keywords = optimizer
    scheduled = {**keywords, "learning_rate": optax.constant_schedule(keywords["learning_rate"])}

    @jax.jit
    def two_steps(params):
        ends = []
        for options in (keywords, scheduled):
            tx = factory(sum_of_squares, **options)
            step = make_step(tx, sum_of_squares)
            ends.append(step(*step(params, tx.init(params)))[0])
        return ends

    expected, actual = two_steps(jnp.array([-1.0, 10.0, 1.0]))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_init_takes_abstract_input(optimizer):
    factory, keywords = optimizer
    tx = factory(sum_of_squares, **keywords)
    real = tx.init(jnp.zeros((2, 4, 8)))
    assert types(tx.init(jax.ShapeDtypeStruct((2, 4, 8), jnp.float32))) == types(real)


@pytest.mark.covering(most=2)
@needs_explicit_axes
def test_sharding_types_of_state_agree_between_init_update_and_jit(optimizer):
    factory, keywords = optimizer
    tx = factory(sum_of_squares, **keywords)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        params = jax.device_put(np.zeros((2, 8, 4), np.float16), NamedSharding(mesh, PartitionSpec(None, "x")))
        state = tx.init(params)
        assert types(jax.jit(tx.init)(params)) == types(state)
        updates, new_state = tx.update(params, state, params)
        jitted_updates, jitted_state = jax.jit(tx.update)(params, state, params)
        assert types(new_state) == types(jitted_state) == types(state)
        assert types(updates) == types(jitted_updates) == types(params)
