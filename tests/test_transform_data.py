"""What one update is: data, against steps by hand in NumPy, Optax and closed forms."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import (
    PARAMS,
    H,
    X,
    assert_close,
    assert_same,
    first_update,
    loss_fn,
    loss_gradient,
    numpy_rk4,
    numpy_update,
)

import rk_optax


# --- Data ----------------------------------------------------------------------------------------------------------
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


@pytest.mark.covering(most=2)
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


# --- Fixed leaves --------------------------------------------------------------------------------------------------
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
