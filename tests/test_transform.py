"""What one update is: against steps written by hand in NumPy, Optax's own transformations and closed forms."""

import functools
import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
from conftest import network, network_loss
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rk_optax
from rk_optax import Cost, Reason, Step

H = 0.3
PARAMS = {"w": np.array([0.5, -0.3, 0.8]), "b": np.array([0.4, -0.2])}
X = np.array([0.1, 0.2, -0.4])


def loss_fn(params, x):
    """Both leaves enter both gradients, so what one leaf does at a stage shows in the other."""
    return jnp.sum((params["w"] - x) ** 4) / 4 + jnp.sum((params["b"] * jnp.sum(params["w"])) ** 2) / 2


def loss_gradient(params, x):
    """The gradient of `loss_fn`, by hand and in NumPy."""
    total = np.sum(params["w"])
    return {"w": (params["w"] - x) ** 3 + total * np.sum(params["b"] ** 2), "b": params["b"] * total**2}


def numpy_rk4(gradient, params, h, k1=None):
    """The effective gradient of one classical Runge-Kutta step downhill, by the textbook."""

    def stage(k, fraction):
        return gradient(jax.tree.map(lambda p, d: p - fraction * h * d, params, k))

    k1 = gradient(params) if k1 is None else k1
    k2 = stage(k1, 0.5)
    k3 = stage(k2, 0.5)
    k4 = stage(k3, 1.0)
    return jax.tree.map(lambda a, b, c, d: (a + 2 * b + 2 * c + d) / 6, k1, k2, k3, k4)


def numpy_update(params, x, h=H, **kwargs):
    """The update of `rk4(loss_fn, h)`."""
    return jax.tree.map(lambda g: -h * g, numpy_rk4(lambda p: loss_gradient(p, x), params, h, **kwargs))


def descent_gradient(loss, params, **data):
    """What Optax calls the gradient: conjugated for complex leaves."""
    return jax.tree.map(jnp.conj, jax.grad(loss)(params, **data))


def first_update(tx, loss, params, **data):
    """The first update of `tx` and the state after it."""
    params = jax.tree.map(jnp.asarray, params)
    return tx.update(descent_gradient(loss, params, **data), tx.init(params), params, **data)


def make_step(tx, loss):
    """A training step `(params, state, data) -> (params, state)`, as a user writes it."""

    def step(params, state, data):
        updates, state = tx.update(descent_gradient(loss, params, **data), state, params, **data)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, loss, params, data, steps, jit=True):
    """Parameters and state after some steps on the same data."""
    step = jax.jit(make_step(tx, loss)) if jit else make_step(tx, loss)
    params = jax.tree.map(jnp.asarray, params)
    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, data)
    return params, state


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-12, atol=1e-14)
assert_same = chex.assert_trees_all_equal


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


@pytest.fixture
def evaluations():
    """`evaluations.of(function)` counts how often the function is evaluated at run time, whatever is compiled."""

    class Evaluations:
        def __init__(self):
            self._calls = []

        def of(self, function):
            @functools.wraps(function)
            def counted(*args, **kwargs):
                jax.debug.callback(lambda: self._calls.append(1))
                return function(*args, **kwargs)

            return counted

        @property
        def number(self):
            jax.effects_barrier()
            return len(self._calls)

    return Evaluations()


# --- Stages ----------------------------------------------------------------------------------------------------------


def test_an_update_is_the_step_of_the_textbook(x64):
    updates, _ = first_update(rk_optax.rk4(loss_fn, H), loss_fn, PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X))


def test_the_incoming_updates_serve_as_stage_one(x64):
    k1 = {"w": np.array([1.0, 2.0, -1.0]), "b": np.array([0.5, 3.0])}  # not the gradient: it must show
    tx = rk_optax.rk4(loss_fn, H)
    updates, _ = tx.update(k1, tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X, k1=k1))


def test_without_reuse_the_incoming_updates_do_not_matter(x64):
    nonsense = jax.tree.map(lambda p: np.full_like(p, 7.0), PARAMS)
    tx = rk_optax.rk4(loss_fn, H, reuse_updates=False)
    updates, _ = tx.update(nonsense, tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X))


@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_reusing_stage_one_changes_no_bit_when_both_sides_are_jitted(name):
    params, data = network()
    runs = [
        train(rk_optax.runge_kutta(network_loss, 0.1, name, reuse_updates=reuse), network_loss, params, data, 10)[0]
        for reuse in (True, False)
    ]
    assert_same(*runs)


def test_reusing_stage_one_changes_only_rounding_in_eager_mode():
    params, data = network()
    jitted = train(rk_optax.rk4(network_loss, 0.1), network_loss, params, data, 2)[0]
    eager = train(rk_optax.rk4(network_loss, 0.1, reuse_updates=False), network_loss, params, data, 2, jit=False)[0]
    assert_close(eager, jitted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("solver", "gradients"),
    [("euler", 1), ("heun", 2), ("bogacki_shampine", 3), ("rk4", 4), ("dopri5", 6), ("tsit5", 6), ("dopri8", 13)],
)
@pytest.mark.parametrize("reuse", [True, False])
def test_a_step_evaluates_one_gradient_per_effective_stage_less_the_one_that_came_in(
    solver, gradients, reuse, evaluations
):
    tx = rk_optax.runge_kutta(evaluations.of(loss_fn), 0.1, solver, reuse_updates=reuse)
    _, state = jax.jit(tx.update)(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert evaluations.number == gradients - reuse
    assert state.cost == Cost(gradients=gradients, losses=0, products=0, rows=0)


def test_an_eager_step_evaluates_as_many_gradients_as_a_jitted_one(evaluations):
    tx = rk_optax.rk4(evaluations.of(loss_fn), 0.1)
    tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert evaluations.number == 3


def test_the_cost_in_state_adds_up_over_updates():
    _, state = train(rk_optax.rk4(loss_fn, 0.1), loss_fn, PARAMS, {"x": X}, 5)
    assert state.cost == Cost(gradients=20)
    assert (state.count, state.rejected, bool(state.accepted)) == (5, 0, True)
    assert dtypes((state.count, state.cost)) == [jnp.int32] * 5


def test_init_never_evaluates_the_loss():
    def refuses(params):
        raise AssertionError("evaluated")

    state = rk_optax.rk4(refuses, 0.1, momentum=0.9).init(PARAMS)
    assert state.cost == Cost()


# --- One step, one field ---------------------------------------------------------------------------------------------


def dropout_loss(params, x, y, rng):
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    hidden = jnp.where(jax.random.bernoulli(rng, 0.5, hidden.shape), hidden / 0.5, 0.0)
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


def exact_flow(gradient, params, time):
    """The gradient flow by SciPy's eighth-order integrator; complex parameters stay complex."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    field = jax.jit(lambda theta: -jax.flatten_util.ravel_pytree(gradient(unravel(theta)))[0])
    run = scipy.integrate.solve_ivp(
        lambda t, theta: np.asarray(field(theta)), (0, time), np.asarray(flat), "DOP853", rtol=1e-13, atol=1e-14
    )
    return unravel(run.y[:, -1])


def observed_order(tx_at, loss, params, data, exact, time, numbers_of_steps):
    """The slope of the error at `time` against h."""
    errors = []
    for steps in numbers_of_steps:
        end, _ = train(tx_at(time / steps), loss, params, data, steps)
        difference = jax.tree.map(lambda a, e: jnp.max(jnp.abs(a - e)), end, exact)
        errors.append(max(jax.tree.leaves(difference)))
    return -np.polyfit(np.log(numbers_of_steps), np.log(errors), 1)[0]


def test_rk4_keeps_its_order_through_a_dropout_network_with_one_key(x64):
    params, data = network(np.float64)
    data = {**data, "rng": jax.random.key(3)}
    exact = exact_flow(lambda p: jax.grad(dropout_loss)(p, **data), params, 2.0)
    slope = observed_order(
        lambda h: rk_optax.rk4(dropout_loss, h), dropout_loss, params, data, exact, 2.0, [10, 20, 40, 80]
    )
    assert 3.85 <= slope <= 4.6


def test_aux_of_the_loss_is_discarded_by_the_stages(x64):
    def with_aux(params, x):
        return loss_fn(params, x), {"mean": jnp.mean(params["w"])}

    tx = rk_optax.rk4(with_aux, H, has_aux=True)
    updates, _ = tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X))


# --- A gradient of the caller's own ----------------------------------------------------------------------------------


def test_grad_fn_replaces_the_gradient_of_the_loss_at_later_stages(x64, evaluations):
    gradient = evaluations.of(jax.grad(loss_fn))
    tx = rk_optax.rk4(None, H, grad_fn=gradient)
    updates, state = tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X))
    assert evaluations.number == 3
    assert state.cost.gradients == 4


def test_grad_fn_wins_over_the_loss_even_where_they_disagree(x64):
    def doubled(params, x):
        return jax.tree.map(lambda g: 2 * g, jax.grad(loss_fn)(params, x))

    def twice(params):
        return jax.tree.map(lambda g: 2 * g, loss_gradient(params, X))

    tx = rk_optax.rk4(loss_fn, H, grad_fn=doubled)
    updates, _ = tx.update(twice(PARAMS), tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, jax.tree.map(lambda g: -H * g, numpy_rk4(twice, PARAMS, H)))


def test_grad_fn_of_one_update_wins_over_the_one_given_at_construction(x64):
    def wrong(params):
        return jax.tree.map(jnp.zeros_like, params)

    tx = rk_optax.rk4(loss_fn, H, grad_fn=wrong)

    @jax.jit
    def update(x):
        return tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, grad_fn=jax.grad(loss_fn), x=x)[0]

    assert_close(update(X), numpy_update(PARAMS, X))


def test_grad_fn_may_return_aux(x64):
    tx = rk_optax.rk4(None, H, grad_fn=lambda params, x: (jax.grad(loss_fn)(params, x), "aux"), has_aux=True)
    updates, _ = tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert_close(updates, numpy_update(PARAMS, X))


@pytest.mark.parametrize("per_update", [False, True])
def test_a_micro_batched_grad_fn_is_the_full_batch(x64, per_update):
    params, data = network(np.float64)

    def micro_batched(params, x, y):
        parts = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), (x, y))
        gradients = jax.lax.map(lambda part: jax.grad(network_loss)(params, *part), parts)
        return jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)

    grads = micro_batched(params, **data)
    tx = rk_optax.rk4(network_loss, 0.5, grad_fn=None if per_update else micro_batched)
    extra = {"grad_fn": micro_batched} if per_update else {}
    updates, _ = tx.update(grads, tx.init(params), params, **extra, **data)
    expected, _ = first_update(rk_optax.rk4(network_loss, 0.5), network_loss, params, **data)
    assert_close(updates, expected)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda p: {"w": p["w"]}, "tree structure of params"),
        (lambda p: {"w": p["w"][:2], "b": p["b"]}, r"params\['w'\] got \(2,\), expected \(3,\)"),
        (lambda p: (0.0, p), "tree structure of params"),
    ],
)
def test_a_grad_fn_whose_result_is_unlike_params_is_refused(result, message):
    tx = rk_optax.rk4(None, H, grad_fn=result)
    with pytest.raises(ValueError, match=f"result of grad_fn must have the .*{message}"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


# --- Data ------------------------------------------------------------------------------------------------------------


def test_data_are_matched_by_name_and_not_by_order(x64):
    def weighted(params, x, y):
        return loss_fn(params, x - 2 * y)

    x, y = X + 1.0, np.full(3, 0.5)
    tx = rk_optax.rk4(weighted, H)
    grads = loss_gradient(PARAMS, x - 2 * y)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, y=y, x=x)
    assert_close(updates, numpy_update(PARAMS, x - 2 * y))


def test_an_optional_argument_may_be_given_or_left_out(x64):
    def shifted(params, x, shift=0.0):
        return loss_fn(params, x + shift)

    tx = rk_optax.rk4(shifted, H)
    for data, x in [({}, X), ({"shift": 0.3}, X + 0.3)]:
        updates, _ = tx.update(loss_gradient(PARAMS, x), tx.init(PARAMS), PARAMS, x=X, **data)
        assert_close(updates, numpy_update(PARAMS, x))


def test_keywords_that_the_loss_does_not_take_are_ignored(x64):
    tx = rk_optax.rk4(loss_fn, H)
    generic = {"value": 1.0, "grad": PARAMS, "value_fn": loss_fn, "epoch": 3}
    updates, _ = tx.update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X, **generic)
    assert_close(updates, numpy_update(PARAMS, X))


def test_a_misspelt_keyword_is_an_error_that_names_the_right_one():
    def labelled(params, images, labels=None):
        return jnp.sum(params)

    tx = rk_optax.rk4(labelled, H)
    state = tx.init(X)
    for data, wrong, right in [
        ({"image": X}, "image", "images"),
        ({"images": X, "lables": X}, "lables", "labels"),  # optional, so nothing is missing
    ]:
        with pytest.raises(TypeError, match=rf"'{wrong}'.*did you mean '{right}'\?.*tx\.update\("):
            tx.update(X, state, X, **data)


def test_a_missing_keyword_is_an_error_that_names_it_and_shows_the_call():
    tx = rk_optax.rk4(loss_fn, H)
    with pytest.raises(TypeError, match=re.escape("'x'") + ".*" + re.escape("tx.update(grads, state, params, x=x)")):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(("name", "expected"), [("euler", 0), ("rk4", 1), ("dopri8", 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_the_loss_is_traced_at_most_once_in_200_steps_on_fresh_data(name, expected, dtype):
    traces = []

    def traced(params, x):
        traces.append(1)
        return jnp.sum(jnp.abs(params["w"] - x) ** 2)

    tx = rk_optax.runge_kutta(traced, 0.1, name, momentum=0.5)

    @jax.jit
    def step(params, state, x):
        grads = jax.tree.map(lambda w: 2 * (w - x), params)
        updates, state = tx.update(grads, state, params, x=x)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.zeros(3, dtype)}
    state = tx.init(params)
    for fresh in np.random.default_rng(0).normal(size=(200, 3)):
        params, state = step(params, state, jnp.asarray(fresh, dtype))
    assert len(traces) == expected


# --- Fixed leaves ----------------------------------------------------------------------------------------------------

MASKS = {
    "tree": {"w": True, "b": False},
    "prefix": {"w": True, "b": {"inner": False}},
    "callable": lambda params: {"w": True, "b": False},
}


@pytest.fixture(params=["tree", "prefix", "callable"])
def masked(request):
    """A mask that fixes b, and how params hold b."""
    return MASKS[request.param], request.param == "prefix"


def test_a_fixed_leaf_keeps_its_value_at_every_stage(masked, x64):
    mask, nested = masked

    def nest(tree):
        return {"w": tree["w"], "b": {"inner": tree["b"]}} if nested else tree

    def loss(params, x):
        return loss_fn({"w": params["w"], "b": params["b"]["inner"] if nested else params["b"]}, x)

    def gradient_with_b_fixed(params):
        return {**loss_gradient(params, X), "b": np.zeros(2)}

    tx = rk_optax.rk4(loss, H, mask=mask, momentum=0.9)
    updates, state = first_update(tx, loss, nest(PARAMS), x=X)
    expected = jax.tree.map(lambda g: -H * g, numpy_rk4(gradient_with_b_fixed, PARAMS, H))
    assert_close(updates, nest(expected))
    assert len(jax.tree.leaves(state.after)) == 1  # no momentum is held for what does not move


def test_a_mask_that_is_one_boolean_holds_for_every_leaf(x64):
    assert_close(first_update(rk_optax.rk4(loss_fn, H, mask=True), loss_fn, PARAMS, x=X)[0], numpy_update(PARAMS, X))
    still, _ = first_update(rk_optax.rk4(loss_fn, H, mask=False), loss_fn, PARAMS, x=X)
    assert_same(still, jax.tree.map(np.zeros_like, PARAMS))


def test_an_integer_leaf_is_kept_by_a_mask_whatever_stands_for_its_gradient(x64):
    def loss(params, x):
        return loss_fn(params, x * params["n"])

    params = {**jax.tree.map(jnp.asarray, PARAMS), "n": jnp.array(2)}
    tx = rk_optax.rk4(loss, H, mask={"w": True, "b": True, "n": False})
    grads = jax.grad(loss, allow_int=True)(params, X)  # float0 for n
    updates, _ = tx.update(grads, tx.init(params), params, x=X)
    assert updates["n"] == 0
    assert updates["n"].dtype == params["n"].dtype
    del updates["n"]
    assert_close(updates, numpy_update(PARAMS, 2 * X))


def test_an_integer_leaf_without_mask_is_an_error_that_names_leaf_and_mask():
    params = {"w": jnp.ones(2), "n": jnp.array(2)}
    tx = rk_optax.rk4(lambda params: jnp.sum(params["w"]), H)
    with pytest.raises(TypeError, match=r"params\['n'\] has dtype int32.*mask="):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"w": True}, "structure of params"),
        ({"w": True, "b": None}, "structure of params"),
        ({"w": True, "c": False}, "structure of params"),
        (lambda params: {"w": True}, "structure of params"),
        ({"w": 1, "b": 0}, "Python booleans"),
        ({"w": True, "b": "no"}, "Python booleans"),
        ({"w": jnp.array(True), "b": False}, "Python booleans"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused_at_init(mask, message):
    with pytest.raises(ValueError, match=f"mask must .*{message}"):
        rk_optax.rk4(loss_fn, H, mask=mask).init(PARAMS)


# --- Trees and types -------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None


def test_none_leaves_and_scalar_leaves_in_any_containers_work(x64):
    def tree(w, b):
        return [Layer(w, None), {"scalars": (b[0], b[1])}, ()]

    def loss(params, x):
        return loss_fn({"w": params[0].kernel, "b": jnp.stack(params[1]["scalars"])}, x)

    tx = rk_optax.rk4(loss, H, momentum=0.9)
    updates, _ = first_update(tx, loss, tree(PARAMS["w"], PARAMS["b"]), x=X)
    expected = numpy_update(PARAMS, X)
    assert_close(updates, tree(expected["w"], expected["b"]))


@pytest.mark.parametrize("params", [{}, (), None, {"a": None}])
def test_a_tree_without_leaves_is_a_step_that_stays(params):
    tx = rk_optax.rk4(lambda params: jnp.zeros([]), H, momentum=0.9)
    if params is None:
        params = {"nothing": {}}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates == params
    assert (state.count, bool(state.accepted)) == (1, True)


def test_python_numbers_and_numpy_arrays_are_parameters_too():
    tx = rk_optax.rk4(lambda params: params["a"] ** 2 / 2 + jnp.sum(params["b"] ** 2) / 2, 1.0)
    params = {"a": 2.0, "b": np.array([1.0], np.float32)}
    updates, _ = tx.update(params, tx.init(params), params)
    after_one_step = 1 - 1 + 1 / 2 - 1 / 6 + 1 / 24  # the stability polynomial at −1
    np.testing.assert_allclose(updates["a"], 2.0 * (after_one_step - 1), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], [after_one_step - 1], rtol=1e-6)


def complex_loss(params):
    """|z² − d|² summed: real, nonlinear, and its gradient is easily written by hand."""
    return jnp.sum(jnp.abs(params["z"] ** 2 - TARGET) ** 2) + jnp.sum(params["x"] ** 2 * jnp.abs(params["z"]) ** 2)


def complex_gradient(params):
    """2 ∂L/∂z̄ for z and ∂L/∂x for the real leaf, in NumPy."""
    z, x = params["z"], params["x"]
    return {"z": 4 * (z**2 - TARGET) * np.conj(z) + 2 * x**2 * z, "x": 2 * x * np.abs(z) ** 2}


TARGET = np.array([0.3 + 0.5j, -0.4 + 0.1j])
COMPLEX_PARAMS = {"z": np.array([0.9 - 0.4j, 0.2 + 0.7j]), "x": np.array([0.5, -0.6])}


def test_complex_leaves_step_as_the_textbook_does_with_conjugated_gradients(x64):
    updates, _ = first_update(rk_optax.rk4(complex_loss, 0.1), complex_loss, COMPLEX_PARAMS)
    expected = numpy_rk4(complex_gradient, COMPLEX_PARAMS, 0.1)
    assert_close(updates, jax.tree.map(lambda g: -0.1 * g, expected))
    assert dtypes(updates) == [jnp.float64, jnp.complex128]


def test_complex_leaves_follow_the_flow_at_the_order_of_the_method(x64):
    params = jax.tree.map(lambda a: np.asarray(a, complex), COMPLEX_PARAMS)
    exact = exact_flow(complex_gradient_in_jax, params, 1.0)
    exact["x"] = jnp.real(exact["x"])
    slope = observed_order(
        lambda h: rk_optax.rk4(complex_loss, h), complex_loss, COMPLEX_PARAMS, {}, exact, 1.0, [10, 20, 40, 80]
    )
    assert 3.85 <= slope <= 4.6


def complex_gradient_in_jax(params):
    z, x = params["z"], params["x"]
    return {"z": 4 * (z**2 - TARGET) * jnp.conj(z) + 2 * x**2 * z, "x": 2 * x * jnp.abs(z) ** 2}


def test_mixed_dtypes_keep_their_own_and_their_own_precision(x64):
    params = {"w": jnp.asarray(PARAMS["w"], jnp.float64), "b": jnp.asarray(PARAMS["b"], jnp.float32)}
    tx = rk_optax.rk4(loss_fn, H, momentum=0.9)
    updates, state = first_update(tx, loss_fn, params, x=X)
    assert dtypes(updates) == dtypes(params) == dtypes(state.after)
    rounded = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    expected = numpy_update(rounded, X)
    np.testing.assert_allclose(updates["b"], expected["b"], rtol=1e-6)
    # Only the float32 leaf's stages may round; were w scaled in float32 too, this would be of the order of 1e-8.
    alone = rk_optax.rk4(loss_fn, H, mask={"w": True, "b": False})
    fixed = {**loss_gradient(rounded, X), "b": np.zeros(2)}
    updates, _ = first_update(alone, loss_fn, params, x=X)
    expected = numpy_rk4(lambda p: {**loss_gradient(p, X), "b": np.zeros(2)}, rounded, H, k1=fixed)
    np.testing.assert_allclose(updates["w"], -H * expected["w"], rtol=1e-13)


@pytest.mark.parametrize("rate", [np.float64(0.1), np.float32(0.1), np.array(0.1), lambda count: np.float64(0.1), 0.1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.complex64])
def test_no_kind_of_step_size_promotes_anything(rate, dtype, x64):
    params = jnp.ones(2, dtype)
    tx = rk_optax.rk4(lambda params: jnp.sum(jnp.abs(params) ** 2) / 2, rate, momentum=0.9)
    updates, state = jax.eval_shape(tx.update, params, tx.init(params), params)
    assert updates.dtype == dtype
    assert dtypes(state.after) == [dtype]
    assert state.step_size.dtype == jnp.float64


# One ulp of 1 is 2^-7 in bfloat16 and 2^-10 in float16; here the whole step is about 4e-4, at h·curvature = 1.
OFFSET, CURVATURE, STAYS = 4e-4, 100.0, 1 - 1 + 1 / 2 - 1 / 6 + 1 / 24


def stiff_loss(params):
    return jnp.sum(CURVATURE / 2 * (params - jnp.float32(1 + OFFSET)) ** 2)


@pytest.mark.parametrize(
    ("dtype", "stage_dtype", "expected"),
    [
        (jnp.bfloat16, "float32", OFFSET * (1 - STAYS)),
        (jnp.float16, "float32", OFFSET * (1 - STAYS)),
        (jnp.float16, None, OFFSET),  # Euler; bfloat16 is left out, as XLA keeps its sums in float32 where it fuses
    ],
)
def test_low_precision_stages_vanish_below_one_ulp_unless_they_are_formed_in_float32(dtype, stage_dtype, expected):
    params = jnp.ones(3, dtype)
    tx = rk_optax.rk4(stiff_loss, 1 / CURVATURE, stage_dtype=stage_dtype)
    updates, _ = tx.update(jnp.full(3, -CURVATURE * OFFSET, dtype), tx.init(params), params)
    assert updates.dtype == dtype
    np.testing.assert_allclose(np.float32(updates), expected, rtol=0.01)


@pytest.mark.parametrize(
    ("dtype", "stage_dtype", "seen"),
    [
        (jnp.bfloat16, "float32", jnp.float32),
        (jnp.float16, jnp.float32, jnp.float32),
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float16, None, jnp.float16),
        (jnp.bfloat16, "float64", jnp.float64),
        (jnp.float64, "float32", jnp.float64),
        (jnp.complex64, "float32", jnp.complex64),
        (jnp.complex64, "float64", jnp.complex128),
        (jnp.float32, "bfloat16", jnp.float32),
    ],
)
def test_the_loss_sees_stages_in_the_stage_dtype_and_no_less_than_the_parameters_own(dtype, stage_dtype, seen, x64):
    witnessed = set()

    def loss(params):
        witnessed.update(dtypes(params))
        return jnp.sum(jnp.abs(params["moves"]) ** 2) * jnp.sum(jnp.abs(params["stays"]))

    params = {"moves": jnp.ones(2, dtype), "stays": jnp.ones(2, dtype)}
    tx = rk_optax.rk4(loss, H, stage_dtype=stage_dtype, mask={"moves": True, "stays": False}, momentum=0.9)
    updates, state = tx.update(params, tx.init(params), params)
    assert witnessed == {jnp.dtype(seen)}
    assert dtypes(updates) == [dtype, dtype]
    assert dtypes(state.after) == [dtype]


# --- Step size -------------------------------------------------------------------------------------------------------


def test_a_schedule_is_read_at_the_count_of_updates(x64):
    rates = np.array([0.3, 0.1, 0.25, 0.05])
    tx = rk_optax.rk4(loss_fn, lambda count: jnp.asarray(rates)[count])
    step = jax.jit(make_step(tx, loss_fn))
    params, state = PARAMS, tx.init(PARAMS)
    expected = PARAMS
    for rate in rates:
        params, state = step(params, state, {"x": X})
        expected = jax.tree.map(np.add, expected, numpy_update(expected, X, rate))
        assert_close(params, expected)
        np.testing.assert_allclose(state.step_size, rate)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("zero", [0.0, 0, jnp.float32(0.0)])
def test_a_schedule_that_returns_zero_gives_a_zero_update_and_finite_state(jit, zero, x64):
    tx = rk_optax.rk4(loss_fn, lambda count: zero, momentum=0.9)
    update = jax.jit(tx.update) if jit else tx.update
    updates, state = update(loss_gradient(PARAMS, X), tx.init(PARAMS), PARAMS, x=X)
    assert_same(updates, jax.tree.map(np.zeros_like, PARAMS))
    assert_close(state.after.trace, loss_gradient(PARAMS, X))
    assert (state.count, state.step_size, bool(state.accepted)) == (1, 0.0, True)


def test_a_warm_up_from_zero_trains():
    params, data = network()
    tx = rk_optax.rk4(network_loss, optax.linear_schedule(0.0, 0.5, 5))
    trained, state = train(tx, network_loss, params, data, 20)
    assert network_loss(trained, **data) < 0.5 * network_loss(params, **data)
    assert state.rejected == 0


def test_a_scale_after_the_solver_is_not_a_smaller_step():
    def stability(z):
        return 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24

    def quadratic(params):
        return 0.5 * jnp.sum(params**2)

    w = jnp.array([1.0])
    for tx, factor in [
        (rk_optax.rk4(quadratic, 0.5), stability(-0.5)),
        (optax.chain(rk_optax.rk4(quadratic, 1.0), optax.scale(0.5)), (1 + stability(-1.0)) / 2),
    ]:
        updates, _ = first_update(tx, quadratic, w)
        np.testing.assert_allclose(w + updates, [factor], rtol=1e-6)
    assert abs(stability(-0.5) - (1 + stability(-1.0)) / 2) > 0.05


@pytest.mark.parametrize("rate", [H, jnp.float32(H), optax.cosine_decay_schedule(H, 20)])
def test_scale_by_rk_in_a_chain_with_trace_is_the_ready_optimizer_with_momentum(rate):
    params, data = network()
    chain = optax.chain(
        rk_optax.scale_by_rk(network_loss, rate, "rk4"), optax.trace(0.9), optax.scale_by_learning_rate(rate)
    )
    expected, _ = train(rk_optax.runge_kutta(network_loss, rate, "rk4", momentum=0.9), network_loss, params, data, 10)
    assert_close(train(chain, network_loss, params, data, 10)[0], expected, rtol=1e-5, atol=1e-6)


def test_momentum_is_a_trace_of_the_effective_gradient(x64):
    params, state = train(rk_optax.rk4(loss_fn, H, momentum=0.8), loss_fn, PARAMS, {"x": X}, 6)
    expected, moment = PARAMS, jax.tree.map(np.zeros_like, PARAMS)
    for _ in range(6):
        direction = numpy_rk4(lambda p: loss_gradient(p, X), expected, H)
        moment = jax.tree.map(lambda m, g: 0.8 * m + g, moment, direction)
        expected = jax.tree.map(lambda p, m: p - H * m, expected, moment)
    assert_close(params, expected)
    assert_close(state.after.trace, moment)


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({"momentum": 0.7}, optax.trace(0.7)),
        ({"momentum": 0.7, "nesterov": True}, optax.trace(0.7, nesterov=True)),
        ({"momentum": 0.0}, optax.identity()),
        ({"after": optax.scale_by_adam()}, optax.scale_by_adam()),
        (
            {"after": optax.chain(optax.clip(0.1), optax.add_decayed_weights(0.01))},
            optax.chain(optax.clip(0.1), optax.add_decayed_weights(0.01)),
        ),
    ],
)
def test_after_runs_between_the_solver_and_the_step_size(options, after):
    params, data = network()
    solver = rk_optax.scale_by_rk(network_loss, H, "heun")

    @jax.jit
    def step(params, states):
        direction, solver_state = solver.update(jax.grad(network_loss)(params, **data), states[0], params, **data)
        direction, after_state = after.update(direction, states[1], params)
        return jax.tree.map(lambda p, d: p - H * d, params, direction), (solver_state, after_state)

    expected, states = params, (solver.init(params), after.init(params))
    for _ in range(4):
        expected, states = step(expected, states)
    trained, _ = train(rk_optax.heun(network_loss, H, **options), network_loss, params, data, 4)
    assert_close(trained, expected, rtol=1e-5, atol=1e-6)


def test_keywords_of_update_reach_a_transformation_given_as_after():
    def scale_by_value(updates, state, params=None, *, value, **extra):
        del params, extra
        return jax.tree.map(lambda u: value * u, updates), state

    after = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), scale_by_value)
    plain, _ = first_update(rk_optax.rk4(loss_fn, H), loss_fn, PARAMS, x=X)
    tx = rk_optax.rk4(loss_fn, H, after=after)
    scaled, _ = tx.update(jax.grad(loss_fn)(PARAMS, X), tx.init(PARAMS), PARAMS, x=X, value=3.0)
    assert_close(scaled, jax.tree.map(lambda u: 3 * u, plain), rtol=1e-6)


def test_vmap_over_learning_rates_and_momenta_is_the_loop():
    params, data = network()
    rates, momenta = np.array([0.05, 0.2, 0.8], np.float32), np.array([0.0, 0.5, 0.9], np.float32)

    def run(rate, momentum):
        return train(rk_optax.rk4(network_loss, rate, momentum=momentum), network_loss, params, data, 2, jit=False)

    together, states = jax.jit(jax.vmap(run))(rates, momenta)
    np.testing.assert_allclose(states.step_size, rates)
    for i, (rate, momentum) in enumerate(zip(rates.tolist(), momenta.tolist(), strict=True)):
        alone, _ = train(rk_optax.rk4(network_loss, rate, momentum=momentum), network_loss, params, data, 2)
        assert_close(jax.tree.map(lambda a: a[i], together), alone, rtol=1e-5, atol=1e-6)


# --- Non-finite values in later stages -------------------------------------------------------------------------------


def edge_loss(params, edge):
    """Finite with a finite gradient above the edge, NaN below it."""
    return jnp.sum(jnp.sqrt(params - edge))


SAFE, NEAR = -100.0, 0.99  # from params of about 1, a step of size 1 stays finite or crosses the edge


@pytest.fixture(params=["momentum", "adam", "scale_by_rk"])
def guarded(request):
    """A transformation, and how its constructor is called again without the guard."""
    make = {
        "momentum": functools.partial(rk_optax.rk4, edge_loss, 1.0, momentum=0.9),
        "adam": functools.partial(rk_optax.rk4, edge_loss, 1.0, after=optax.scale_by_adam()),
        "scale_by_rk": functools.partial(rk_optax.scale_by_rk, edge_loss, 1.0, "rk4"),
    }[request.param]
    return make


def test_a_later_stage_that_is_not_finite_leaves_parameters_and_momentum_where_they_were(guarded):
    tx = guarded()
    update = jax.jit(tx.update)
    params = jnp.ones(2)
    grads = {edge: jax.grad(edge_loss)(params, edge) for edge in (SAFE, NEAR)}
    assert np.all(np.isfinite(grads[NEAR]))

    first, before = update(grads[SAFE], tx.init(params), params, edge=SAFE)
    assert bool(before.accepted)
    refused, state = update(grads[NEAR], before, params, edge=NEAR)
    assert_same(refused, jnp.zeros(2))
    assert_same((state.after, state.solver), (before.after, before.solver))
    assert (state.count, state.cost.gradients, state.rejected) == (2, 8, 1)
    assert not bool(state.accepted)
    assert int(state.reason) == Reason.NOT_FINITE
    assert "not finite" in Reason(int(state.reason)).message

    # The next good step is the one that would have come without the bad one.
    with_gap, state = update(grads[SAFE], state, params, edge=SAFE)
    without, _ = update(grads[SAFE], before, params, edge=SAFE)
    assert_same(with_gap, without)
    assert (state.count, state.rejected, bool(state.accepted), int(state.reason)) == (3, 1, True, Reason.ACCEPTED)
    assert np.all(first != 0)


def test_the_guard_can_be_switched_off(guarded):
    tx = guarded(skip_nonfinite=False)
    params = jnp.ones(2)
    updates, _ = tx.update(jax.grad(edge_loss)(params, NEAR), tx.init(params), params, edge=NEAR)
    assert np.all(np.isnan(updates))


def test_apply_if_finite_cannot_see_what_the_guard_sees():
    params = jnp.ones(2)
    grads = jax.grad(edge_loss)(params, NEAR)
    for skip, outcome in [(False, np.isnan), (True, lambda u: u == 0)]:
        tx = optax.apply_if_finite(rk_optax.rk4(edge_loss, 1.0, skip_nonfinite=skip), max_consecutive_errors=5)
        updates, _ = tx.update(grads, tx.init(params), params, edge=NEAR)
        assert np.all(outcome(updates))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("after", [optax.clip(1.0), optax.zero_nans()], ids=["clip", "zero_nans"])
def test_a_later_stage_that_is_not_finite_is_seen_through_an_after_that_hides_it(bad, after):
    def gradient(params):  # 1 at params, not finite at later stages
        return jnp.where(params < 1, bad, 1.0)

    tx = rk_optax.rk4(None, 0.5, grad_fn=gradient, after=after)
    params = jnp.ones(2)
    updates, state = tx.update(gradient(params), tx.init(params), params)
    assert_same(updates, jnp.zeros(2))
    assert int(state.reason) == Reason.NOT_FINITE


@pytest.mark.parametrize(("name", "weightless_stage"), [("dopri5", 2), ("dopri8", 3), ("heun3", 2)])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_later_stage_that_is_not_finite_is_seen_even_where_its_weight_is_zero(name, weightless_stage, bad):
    def gradient(params):  # bad at that stage alone; at the parameters that follow from it, finite again
        there = 1 - rk_optax.TABLEAUS[name].c[weightless_stage - 1]
        return jnp.where(jnp.abs(params - there) < 1e-5, bad, 1.0)

    tx = rk_optax.runge_kutta(None, 1.0, name, grad_fn=gradient)
    params = jnp.ones(2)
    updates, state = tx.update(gradient(params), tx.init(params), params)
    assert_same(updates, jnp.zeros(2))
    assert int(state.reason) == Reason.NOT_FINITE


@pytest.mark.parametrize("incoming", [np.nan, np.inf])
def test_an_incoming_gradient_that_is_not_finite_is_refused_even_where_its_weight_is_zero(incoming):
    tx = rk_optax.midpoint(lambda params: jnp.sum(params**2), 0.1)
    params = jnp.ones(2)
    updates, state = tx.update(jnp.array([incoming, 1.0]), tx.init(params), params)
    assert_same(updates, jnp.zeros(2))
    assert int(state.reason) == Reason.NOT_FINITE


def test_an_update_that_overflows_in_the_dtype_of_params_is_refused():
    tx = rk_optax.euler(lambda params: jnp.sum(params), 1000.0)
    params = jnp.ones(2, jnp.float16)
    updates, state = tx.update(jnp.full(2, 1000.0, jnp.float16), tx.init(params), params)
    assert_same(updates, jnp.zeros(2, jnp.float16))
    assert int(state.reason) == Reason.NOT_FINITE


def test_a_schedule_that_returns_nan_is_refused_and_the_next_step_is_taken():
    tx = rk_optax.rk4(lambda params: jnp.sum(params**2) / 2, lambda count: jnp.where(count == 0, jnp.nan, 1.0))
    params = jnp.ones(2)
    updates, state = tx.update(params, tx.init(params), params)
    assert_same(updates, jnp.zeros(2))
    assert int(state.reason) == Reason.NOT_FINITE
    updates, state = tx.update(params, state, params)
    np.testing.assert_allclose(updates, STAYS - 1, rtol=1e-6)


def test_a_step_size_that_is_not_finite_is_seen_even_where_the_direction_does_not_use_it():
    tx = rk_optax.scale_by_rk(lambda params: jnp.sum(params), lambda count: jnp.nan, "euler")
    params = jnp.ones(2)
    updates, state = tx.update(params, tx.init(params), params)
    assert_same(updates, jnp.zeros(2))
    assert int(state.reason) == Reason.NOT_FINITE


def test_a_gradient_that_is_not_finite_in_a_fixed_leaf_stops_nothing():
    tx = rk_optax.euler(lambda params: jnp.sum(params["w"]), 0.5, mask={"w": True, "fixed": False})
    params = {"w": jnp.ones(2), "fixed": jnp.ones(2)}
    updates, state = tx.update({"w": jnp.ones(2), "fixed": jnp.full(2, jnp.nan)}, tx.init(params), params)
    assert_same(updates, {"w": jnp.full(2, -0.5), "fixed": jnp.zeros(2)})
    assert bool(state.accepted)


class Failing(rk_optax.Solver):
    """Counts its steps in its state, and says that every second one failed."""

    def init(self, params):
        return jnp.zeros([], jnp.int32)

    def step(self, problem, params, k1, h, state, *, want_error=False):
        odd = self.attempts % 2 == 1
        self.attempts += 1
        return Step(k1, Cost(gradients=1, products=5), solved=jnp.asarray(not odd), state=state + 1)

    attempts = 0


def test_a_step_that_its_solver_gave_up_restores_solver_and_momentum_but_not_the_cost():
    tx = rk_optax.runge_kutta(lambda params: jnp.sum(params), 0.1, Failing(), momentum=0.5)
    params = jnp.ones(2)
    updates, good = tx.update(jnp.ones(2), tx.init(params), params)
    np.testing.assert_allclose(updates, -0.1)
    updates, state = tx.update(jnp.ones(2), good, params)
    assert_same(updates, jnp.zeros(2))
    assert_same((state.solver, state.after), (good.solver, good.after))
    assert state.solver == 1
    assert state.cost == Cost(gradients=2, products=10)
    assert int(state.reason) == Reason.NOT_SOLVED


# --- Devices ---------------------------------------------------------------------------------------------------------


def elementwise_loss(params):
    """Needs no communication for its gradient."""
    return jnp.sum(params["w"] ** 4) / 4


needs_explicit_axes = pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="explicit axes need jax.set_mesh")
MESHES = ["auto", pytest.param("explicit", marks=needs_explicit_axes)]


@pytest.fixture
def mesh(request):
    """Eight devices along x, with the axis type that the test asks for."""
    explicit = request.param == "explicit"
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))
    if not explicit:
        yield mesh
        return
    with jax.set_mesh(mesh):
        yield mesh


def shardings(tree):
    return [leaf.sharding.spec for leaf in jax.tree.leaves(tree) if leaf.ndim]


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


@pytest.mark.parametrize("reduces", ["grad_fn", "loss"])
def test_under_shard_map_a_reduced_gradient_is_the_gradient_of_the_whole_batch(reduces):
    params, data = network()
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))

    def mean_loss(params, x, y):
        return jax.lax.pmean(network_loss(params, x, y), "batch")

    def mean_gradient(params, x, y):
        return jax.lax.pmean(jax.grad(network_loss)(params, x, y), "batch")

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
    grads = jax.grad(network_loss)(params, **data)
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


# --- Other transformations around and inside -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.partition({"rk": tx, "sgd": optax.sgd(0.1)}, {"w": "rk", "b": "sgd"}),
        lambda tx: optax.multi_transform({"rk": tx, "sgd": optax.sgd(0.1)}, {"w": "rk", "b": "sgd"}),
    ],
    ids=["masked", "partition", "multi_transform"],
)
@pytest.mark.parametrize("make", [rk_optax.rk4, rk_optax.scale_by_rk])
def test_wrappers_that_hide_leaves_are_refused_and_pointed_to_the_mask(wrap, make):
    with pytest.raises(ValueError, match=r"MaskedNode.*optax\.masked and optax\.partition.*mask="):
        wrap(make(loss_fn, 0.1)).init(PARAMS)


def test_masked_nodes_that_reach_update_alone_are_refused_too():
    tx = rk_optax.rk4(loss_fn, 0.1)
    hidden = {"w": jnp.ones(3), "b": optax.MaskedNode()}
    for updates, params in [(PARAMS, hidden), (hidden, PARAMS)]:
        with pytest.raises(ValueError, match=r"MaskedNode.*mask="):
            tx.update(updates, tx.init(PARAMS), params, x=X)


INJECTIONS = {
    "optax": functools.partial(optax.inject_hyperparams, static_args=("loss_fn",)),
    "rk_optax": rk_optax.inject_hyperparams,
}


@pytest.fixture(params=list(INJECTIONS))
def inject(request):
    return INJECTIONS[request.param]


def test_an_injected_rate_can_be_changed_in_state_without_a_retrace(inject):
    params, data = network()
    tx = inject(rk_optax.rk4)(network_loss, learning_rate=0.1, momentum=0.5)
    traces = []

    def step(params, state, data):
        traces.append(1)
        return make_step(tx, network_loss)(params, state, data)

    step = jax.jit(step)
    state = tx.init(params)
    rates, seen = [0.1, 0.02, 0.3], params
    for rate in rates:
        state.hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
        seen, state = step(seen, state, data)
        np.testing.assert_allclose(state.inner_state.step_size, rate, rtol=1e-6)
    scheduled = rk_optax.rk4(network_loss, lambda count: jnp.asarray(rates)[count], momentum=0.5)
    expected, _ = train(scheduled, network_loss, params, data, 3)
    assert_close(seen, expected, rtol=1e-5, atol=1e-6)
    assert len(traces) == 1


def test_an_injected_momentum_can_be_changed_in_state(inject):
    tx = inject(rk_optax.rk4)(loss_fn, learning_rate=H, momentum=0.9)
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    step = jax.jit(make_step(tx, loss_fn))
    _, state = step(params, tx.init(params), {"x": X})
    state.hyperparams["momentum"] = jnp.float32(0.0)
    without, _ = step(params, state, {"x": X})
    assert_close(jax.tree.map(jnp.subtract, without, params), numpy_update(PARAMS, X), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("jit", [True, False])
def test_an_injected_warm_up_from_zero_works(inject, jit):
    params, data = network()
    schedule = optax.linear_schedule(0.0, 0.4, 4)
    tx = inject(rk_optax.heun)(network_loss, learning_rate=schedule)
    step = make_step(tx, network_loss)
    step = jax.jit(step) if jit else step
    state = tx.init(params)
    still, state = step(params, state, data)
    assert_same(still, params)
    trained = still
    for _ in range(3):
        trained, state = step(trained, state, data)
    expected, _ = train(rk_optax.heun(network_loss, schedule), network_loss, params, data, 4)
    assert_close(trained, expected, rtol=1e-5, atol=1e-6)


def test_the_shipped_injection_leaves_functions_alone_and_takes_further_static_args():
    tx = rk_optax.inject_hyperparams(rk_optax.rk4, static_args=("momentum",))(
        loss_fn,
        learning_rate=H,
        grad_fn=jax.grad(loss_fn),
        mask=lambda params: {"w": True, "b": False},
        momentum=0.9,
        stage_dtype=jnp.float32,
    )
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    updates, state = first_update(tx, loss_fn, params, x=X)
    assert set(state.hyperparams) == {"learning_rate"}
    assert_same(updates["b"], jnp.zeros(2))
    assert np.all(updates["w"] != 0)


def test_the_layout_of_the_state_is_the_public_one():
    state = rk_optax.rk4(loss_fn, 0.1, momentum=0.9).init(PARAMS)
    assert type(state) is rk_optax.RungeKuttaState
    assert state._fields == (
        *("count", "step_size", "cost", "accepted", "reason", "rejected"),
        *("solver", "after", "rule", "preconditioner"),
    )
    assert state.cost._fields == ("gradients", "losses", "products", "rows")
    assert (state.solver, state.rule, state.preconditioner) == ((), (), ())
    assert type(state.after) is optax.TraceState


def test_state_holds_no_name_that_inject_hyperparams_or_a_line_search_owns():
    fields = set(rk_optax.RungeKuttaState._fields)
    assert fields.isdisjoint({"learning_rate", "value", "grad", "hyperparams"})
    assert fields >= {"count", "step_size", "cost", "accepted", "reason"}


def test_an_after_with_a_random_key_in_its_state_is_selected_like_any_other():
    tx = rk_optax.rk4(loss_fn, H, after=optax.add_noise(0.1, 0.5, key=jax.random.key(0)))
    updates, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, x=X)
    assert bool(state.accepted)
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


# --- Bad input -------------------------------------------------------------------------------------------------------

IMPLICIT_EULER = rk_optax.ButcherTableau("implicit Euler", [[1.0]], [1.0], [1.0], 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rk_optax.rk4(loss_fn, 0.0), ValueError, r"learning_rate must be finite and positive, got 0\.0"),
        (lambda: rk_optax.rk4(loss_fn, -0.1), ValueError, r"must be finite and positive, got -0\.1.*schedule"),
        (lambda: rk_optax.rk4(loss_fn, jnp.array(-0.1)), ValueError, "learning_rate must be finite and positive"),
        (lambda: rk_optax.rk4(loss_fn, np.nan), ValueError, "learning_rate must be finite and positive, got nan"),
        (lambda: rk_optax.rk4(loss_fn, np.inf), ValueError, "learning_rate must be finite and positive, got inf"),
        (lambda: rk_optax.rk4(loss_fn, jnp.array(jnp.inf)), ValueError, "must be finite and positive, got inf"),
        (lambda: rk_optax.rk4(loss_fn, "0.1"), TypeError, "learning_rate must be a positive number.*'0.1'"),
        (lambda: rk_optax.rk4(loss_fn, True), TypeError, "learning_rate must be a positive number.*True"),
        (lambda: rk_optax.rk4(loss_fn, None), TypeError, "learning_rate must be a positive number.*None"),
        (lambda: rk_optax.rk4(loss_fn, 0.1j), TypeError, "learning_rate must be a positive number"),
        (lambda: rk_optax.rk4(loss_fn, [0.1]), TypeError, "learning_rate must be a positive number"),
        (lambda: rk_optax.rk4(loss_fn, np.ones(2)), TypeError, "learning_rate must be a positive number"),
        (lambda: rk_optax.rk4(loss_fn, jnp.ones(2)), ValueError, r"learning_rate must be a real scalar.*\(2,\)"),
        (lambda: rk_optax.rk4(loss_fn, jnp.array(True)), ValueError, "learning_rate must be a real scalar.*bool"),
        (lambda: rk_optax.rk4(None, 0.1), TypeError, "loss_fn is None: pass loss_fn, or grad_fn="),
        (lambda: rk_optax.rk4(0.1, loss_fn), TypeError, "loss_fn must be callable, got float"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, grad_fn=PARAMS), TypeError, "grad_fn must be callable, got dict"),
        (lambda: rk_optax.runge_kutta(loss_fn, 0.1, "RK5"), ValueError, "Unknown solver 'RK5'; did you mean 'rk4'"),
        (lambda: rk_optax.runge_kutta(loss_fn, 0.1, "zzz"), ValueError, "Unknown solver 'zzz'; known names: euler"),
        (lambda: rk_optax.runge_kutta(loss_fn, 0.1, None), TypeError, "solver must be a name, a ButcherTableau or"),
        (lambda: rk_optax.runge_kutta(loss_fn, 0.1, rk_optax.Explicit), TypeError, "an instance, not the class"),
        (lambda: rk_optax.runge_kutta(loss_fn, 0.1, IMPLICIT_EULER), ValueError, "'implicit Euler' is not explicit"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=1.0), ValueError, r"momentum must be in \[0, 1\), got 1\.0"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=-0.1), ValueError, r"momentum must be in \[0, 1\), got -0\.1"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=np.nan), ValueError, r"momentum must be in \[0, 1\), got nan"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=True), ValueError, r"momentum must be in \[0, 1\), got True"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=np.float32(1.5)), ValueError, r"momentum must be in \[0, 1\)"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=jnp.array(1.5)), ValueError, r"momentum must be in \[0, 1\)"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum="0.9"), (TypeError, ValueError), "momentum must be"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=[0.9]), (TypeError, ValueError), "momentum must be"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, nesterov=True), ValueError, "nesterov=True does nothing without momentum"),
        (
            lambda: rk_optax.rk4(loss_fn, 0.1, momentum=0.9, after=optax.trace(0.9)),
            ValueError,
            "momentum and after are two ways.*pass one",
        ),
        (lambda: rk_optax.rk4(loss_fn, 0.1, after=0.9), TypeError, "after must be an optax.GradientTransformation"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, stage_dtype=int), ValueError, "stage_dtype must be a real floating-point"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, stage_dtype="float33"), (TypeError, ValueError), "stage_dtype must be"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, stage_dtype=32), (TypeError, ValueError), "stage_dtype must be"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, stage_dtype="float64"), ValueError, "float64 needs.*jax_enable_x64"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, has_auxx=True), TypeError, "has_auxx"),
        (lambda: rk_optax.scale_by_rk(loss_fn, 0.1, "rk4", momentum=0.9), TypeError, "momentum"),
    ],
)
def test_bad_arguments_are_refused_at_construction_with_what_to_do(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (lambda p: p["w"], {}, r"must return a scalar, got shape \(3,\): reduce it.*jnp\.mean"),
        (lambda p: jnp.sum(p["w"])[None], {}, r"must return a scalar, got shape \(1,\)"),
        (lambda p: jnp.argmax(p["w"]), {}, "real floating-point scalar, got int32"),
        (lambda p: jnp.sum(p["w"]) > 0, {}, "real floating-point scalar, got bool"),
        (lambda p: 3, {}, "real floating-point scalar, got int"),
        (lambda p: jnp.sum(p["w"]) * 1j, {}, "real floating-point scalar, got complex64"),
        (lambda p: (jnp.sum(p["w"]), 1.0), {}, "returned a tuple.*has_aux=True"),
        (lambda p: jnp.sum(p["w"]), {"has_aux": True}, r"must return \(loss, aux\)"),
        (lambda p: {"loss": jnp.sum(p["w"])}, {}, "real floating-point scalar, got dict"),
        (lambda p: None, {}, "real floating-point scalar, got NoneType"),
    ],
)
def test_a_loss_that_does_not_return_a_real_scalar_is_refused_with_what_to_do(loss, options, message):
    tx = rk_optax.rk4(loss, 0.1, **options)
    with pytest.raises(TypeError, match=message):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"w": PARAMS["w"]}, "updates must have the tree structure of params"),
        ({**PARAMS, "c": PARAMS["b"]}, "updates must have the tree structure of params"),
        ({**PARAMS, "b": None}, "updates must have the tree structure of params"),
        ({**PARAMS, "b": np.ones(3)}, r"updates must have the leaf shapes of params: at params\['b'\] got \(3,\)"),
        ({**PARAMS, "b": np.ones(())}, r"at params\['b'\] got \(\), expected \(2,\)"),
        ({**PARAMS, "b": np.ones(2) * 1j}, "updates are complex where params are real"),
    ],
)
def test_updates_unlike_params_are_refused(updates, message):
    tx = rk_optax.rk4(loss_fn, 0.1)
    with pytest.raises(ValueError, match=message):
        tx.update(updates, tx.init(PARAMS), PARAMS, x=X)


def test_params_left_out_are_an_error_that_shows_the_call():
    tx = rk_optax.rk4(loss_fn, 0.1)
    with pytest.raises(ValueError, match=re.escape("tx.update(grads, state, params, **data)")):
        tx.update(PARAMS, tx.init(PARAMS), x=X)


def test_a_schedule_that_returns_no_real_scalar_is_refused():
    tx = rk_optax.rk4(loss_fn, lambda count: jnp.ones(2))
    with pytest.raises(ValueError, match=r"learning_rate schedule must be a real scalar, got shape \(2,\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, x=X)
