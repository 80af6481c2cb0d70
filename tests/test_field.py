"""What a loss or a grad_fn becomes: the field of one update, on the moving leaves, in the stage dtype."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rk_optax.field import VectorField
from rk_optax.objective import Objective
from rk_optax.parameter_view import ParameterView, check_like_params, promote

PARAMS = {"w": np.array([1.0, -2.0], np.float32), "b": np.array([0.5], np.float32)}


def loss_fn(params, x):
    return jnp.sum((params["w"] * params["b"] - x) ** 2)


def gradient_by_hand(params, x):
    residual = params["w"] * params["b"] - x
    return {"w": 2 * residual * params["b"], "b": np.sum(2 * residual * params["w"], keepdims=True)}


def bind(objective, params=PARAMS, *, mask=None, **extra_args):
    return objective.bind(extra_args, ParameterView.of(params, mask))


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-6)


def test_the_field_is_the_gradient_and_the_loss_is_the_loss_on_the_data_of_the_update():
    objective = Objective(loss_fn)
    for x in (0.0, 3.0):
        problem = bind(objective, x=x)
        elsewhere = jax.tree.map(lambda p: p + 0.25, PARAMS)
        assert_close(problem(elsewhere), gradient_by_hand(elsewhere, x))
        np.testing.assert_allclose(problem.loss(elsewhere), loss_fn(elsewhere, x), rtol=1e-6)


def test_the_field_is_the_same_at_every_stage():
    problem = bind(Objective(loss_fn), x=1.0)
    for stage in (0, 3, jnp.array(2)):
        assert_close(problem(PARAMS, stage), gradient_by_hand(PARAMS, 1.0))


def test_the_field_of_complex_parameters_is_conjugated_as_optax_has_it():
    params = {"z": jnp.array([1.0 + 2.0j, -0.5j]), "r": jnp.array(3.0)}
    target = 0.5 - 1.0j
    objective = Objective(lambda params: jnp.sum(jnp.abs(params["z"] - target) ** 2) + params["r"] ** 2)
    field = bind(objective, params)(params)
    assert_close(field, {"z": 2 * (np.asarray(params["z"]) - target), "r": 6.0})


def test_fixed_leaves_keep_the_values_of_the_update_and_are_absent_from_the_field():
    problem = bind(Objective(loss_fn), mask={"w": True, "b": False}, x=1.0)
    moved = {"w": PARAMS["w"] + 1, "b": None}
    expected = gradient_by_hand({"w": PARAMS["w"] + 1, "b": PARAMS["b"]}, 1.0)
    assert_close(problem(moved), {"w": expected["w"], "b": None})
    np.testing.assert_allclose(problem.loss(moved), loss_fn({**PARAMS, "w": PARAMS["w"] + 1}, 1.0), rtol=1e-6)


@pytest.mark.parametrize("returns", ["loss", "list"])
def test_aux_is_dropped(returns):
    def with_aux(params, x):
        pair = (loss_fn(params, x), {"anything": "at all"})
        return pair if returns == "loss" else list(pair)

    problem = bind(Objective(with_aux, has_aux=True), x=1.0)
    assert_close(problem(PARAMS), gradient_by_hand(PARAMS, 1.0))
    np.testing.assert_allclose(problem.loss(PARAMS), loss_fn(PARAMS, 1.0), rtol=1e-6)


# --- grad_fn ---------------------------------------------------------------------------------------------------------


def minus(params, x):
    return jax.tree.map(lambda p: x - p, params)


def test_a_grad_fn_is_the_field_and_reads_data_of_its_own():
    problem = bind(Objective(None, grad_fn=minus), x=1.0)
    assert_close(problem(PARAMS), jax.tree.map(lambda p: 1 - p, PARAMS))


def test_the_loss_is_not_asked_for_its_data_where_a_grad_fn_stands_in():
    def needs_more(params, x, labels):
        raise AssertionError("evaluated")

    problem = bind(Objective(needs_more, grad_fn=minus), x=1.0)
    assert_close(problem(PARAMS), jax.tree.map(lambda p: 1 - p, PARAMS))


def test_a_grad_fn_of_one_update_has_the_last_word_and_none_is_no_word():
    objective = Objective(loss_fn, grad_fn=minus)
    zero = bind(objective, grad_fn=lambda params: jax.tree.map(jnp.zeros_like, params), x=1.0)
    assert_close(zero(PARAMS), jax.tree.map(np.zeros_like, PARAMS))
    assert_close(bind(objective, grad_fn=None, x=1.0)(PARAMS), jax.tree.map(lambda p: 1 - p, PARAMS))


def test_the_result_of_a_grad_fn_takes_the_dtype_of_the_stages():
    objective = Objective(None, grad_fn=lambda params: jax.tree.map(lambda p: np.ones(p.shape, np.float16), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(bind(objective)(PARAMS))} == {jnp.dtype(jnp.float32)}


def test_argnames_serve_the_loss_and_a_grad_fn_that_cannot_be_read_but_spare_one_that_can():
    def opaque(*args):
        return minus(*args)

    objective = Objective(lambda *args: loss_fn(*args), argnames=("x",))
    assert_close(bind(objective, x=1.0)(PARAMS), gradient_by_hand(PARAMS, 1.0))
    readable = Objective(lambda *args: loss_fn(*args), grad_fn=lambda params, y: minus(params, y), argnames=("x",))
    for problem in (bind(objective, grad_fn=opaque, x=1.0), bind(readable, y=1.0)):
        assert_close(problem(PARAMS), jax.tree.map(lambda p: 1 - p, PARAMS))


@pytest.mark.parametrize(
    ("result", "has_aux", "error", "message"),
    [
        (lambda p: p["w"], False, ValueError, "result of grad_fn must have the tree structure of params"),
        (lambda p: {**p, "b": None}, False, ValueError, "result of grad_fn must have the tree structure of params"),
        (lambda p: {**p, "w": p["w"][:1]}, False, ValueError, r"leaf shapes of params: at params\['w'\] got \(1,\)"),
        (lambda p: (p, 0.0), False, ValueError, "tree structure of params"),
        (lambda p: p, True, TypeError, r"grad_fn must return \(gradient, aux\), got dict"),
        (lambda p: {**p, "w": p["w"] * 1j}, False, (TypeError, ValueError), "complex where params are real"),
    ],
)
def test_a_grad_fn_that_returns_no_gradient_is_refused(result, has_aux, error, message):
    problem = bind(Objective(None, grad_fn=result, has_aux=has_aux))
    with pytest.raises(error, match=message):
        problem(PARAMS)


# --- What is missing -------------------------------------------------------------------------------------------------


def test_a_problem_of_a_grad_fn_alone_says_that_it_has_no_loss():
    with pytest.raises(ValueError, match="no loss: pass loss_fn"):
        bind(Objective(None, grad_fn=minus), x=1.0).loss(PARAMS)
    with pytest.raises(ValueError, match="no loss: pass loss_fn"):
        VectorField(lambda params, stage: params).loss(PARAMS)


def test_a_solver_that_needs_a_loss_is_told_at_construction_that_there_is_none():
    with pytest.raises(ValueError, match="needs a 'loss': pass loss_fn"):
        Objective(None, grad_fn=minus, needs=frozenset({"loss"}))


def test_a_solver_that_needs_a_loss_gets_it_beside_a_grad_fn():
    problem = bind(Objective(loss_fn, grad_fn=minus, needs=frozenset({"loss"})), x=1.0)
    assert_close(problem(PARAMS), jax.tree.map(lambda p: 1 - p, PARAMS))
    np.testing.assert_allclose(problem.loss(PARAMS), loss_fn(PARAMS, 1.0), rtol=1e-6)


def test_nothing_to_solve_is_refused():
    with pytest.raises(TypeError, match="pass loss_fn, or grad_fn="):
        Objective(None)


# --- Precision and shapes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "stage_dtype", "expected"),
    [
        ("bfloat16", "float32", "float32"),
        ("float16", "float32", "float32"),
        ("float32", "float16", "float32"),
        ("float16", "bfloat16", "float32"),
        ("complex64", "float32", "complex64"),
        ("int32", "float32", "int32"),
        ("bool", "float32", "bool"),
        ("bfloat16", None, "bfloat16"),
    ],
)
def test_promotion_raises_floating_point_leaves_to_the_stage_dtype_and_lowers_none(dtype, stage_dtype, expected):
    assert promote([jnp.ones(2, dtype)], stage_dtype)[0].dtype == expected


def test_trees_like_params_pass_whatever_their_dtypes_and_others_name_the_leaf():
    check_like_params(jax.tree.map(lambda p: p.astype(np.float16), PARAMS), PARAMS, "It")
    check_like_params({"a": None}, {"a": None}, "It")
    check_like_params(1.0, np.float32(2.0), "It")
    with pytest.raises(ValueError, match="It must have the tree structure of params"):
        check_like_params({"a": None}, {"a": 1.0}, "It")
    with pytest.raises(ValueError, match=r"It must have the leaf shapes of params: at params\['b'\]\[1\] got \(3,\)"):
        check_like_params({"b": [1.0, np.ones(3)]}, {"b": [1.0, np.ones(2)]}, "It")
