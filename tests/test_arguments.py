"""Data reach a function by the names in its signature, and what cannot be read or matched says so."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from rk_optax._arguments import read_data_function


def call(function, data, argnames=None):
    """What the function gets from `update(..., **data)`, parameters being the string "params"."""
    read = read_data_function(function, "loss_fn", argnames)
    return read("params", read.select(data))


def record(*args, **kwargs):
    return args, kwargs


def plain(params, x, y=2):
    return params, x, y


def keyword_only(params, *, x, y=2):
    return params, x, y


def returns_its_arguments(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Model:
    def loss(self, params, x, y=2):
        return params, x, y

    @classmethod
    def class_loss(cls, params, x, y=2):
        return params, x, y

    @staticmethod
    def static_loss(params, x, y=2):
        return params, x, y

    def __call__(self, params, x, y=2):
        return params, x, y


READABLE = {
    "function": plain,
    "keyword-only": keyword_only,
    "lambda": lambda params, x, y=2: (params, x, y),
    "bound method": Model().loss,
    "class method": Model.class_loss,
    "static method": Model.static_loss,
    "callable instance": Model(),
    "functools.wraps": returns_its_arguments(plain),
    "partial of a leading argument": functools.partial(lambda model, params, x, y=2: (params, x, y), "model"),
    "partial of a keyword": functools.partial(lambda params, x, y: (params, x, y), y=2),
    "partial of a method": functools.partial(Model().loss, y=2),
}


@pytest.mark.parametrize("function", READABLE.values(), ids=READABLE)
def test_a_readable_signature_names_its_data(function):
    assert call(function, {"x": 1}) == ("params", 1, 2)
    assert call(function, {"y": 3, "x": 1}) == ("params", 1, 3)


@pytest.mark.parametrize("function", READABLE.values(), ids=READABLE)
def test_a_readable_signature_demands_what_has_no_default(function):
    with pytest.raises(TypeError, match="missing 'x', needed by loss_fn"):
        call(function, {"y": 3})


@pytest.mark.parametrize(
    "transform",
    [jax.jit, jax.checkpoint, jax.grad, lambda f: jax.vmap(f, in_axes=(None, 0)), functools.partial(jax.named_call)],
    ids=["jit", "checkpoint", "grad", "vmap", "named_call"],
)
def test_functions_transformed_by_jax_are_read_through(transform):
    def loss(params, x):
        return jnp.sum(params * x)

    read = read_data_function(transform(loss), "loss_fn")
    assert (read.required, read.optional) == (("x",), ())
    if transform is jax.jit:
        assert read(2.0, {"x": 3.0}) == 6.0


def test_only_the_data_of_the_function_are_picked():
    assert read_data_function(plain, "loss_fn").select({"x": 1, "value": 0, "epoch": 7}) == {"x": 1}
    assert read_data_function(lambda params: params, "loss_fn").select({"x": 1}) == {}


def function_of(parameters):
    """A function with these parameters, as written in a signature, that returns the last of them."""
    last = parameters.split(",")[-1].split("=")[0]
    return eval(f"lambda {parameters}: {last}")


# --- Names that are close, missing or taken --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "keyword"),
    [("batch", "bacth"), ("batch", "batches"), ("labels", "label"), ("rng", "rgn"), ("x_train", "X_train"), ("x", "X")],
)
@pytest.mark.parametrize("optional", [False, True])
def test_a_near_miss_names_the_right_argument_and_shows_the_call(argument, keyword, optional):
    function = function_of(f"params, {argument}=None" if optional else f"params, {argument}")
    usage = f"[, {argument}={argument}]" if optional else f", {argument}={argument}"
    with pytest.raises(TypeError) as error:
        call(function, {keyword: 1})
    assert f"keyword {keyword!r}, which loss_fn does not take; did you mean {argument!r}?" in str(error.value)
    assert f"tx.update(grads, state, params{usage})" in str(error.value)


@pytest.mark.parametrize("extra", ["value", "grad", "value_fn"])
def test_what_generic_trainers_send_is_never_a_near_miss(extra):
    near = {"value": "values", "grad": "grads", "value_fn": "value_f"}[extra]
    assert call(function_of(f"params, {near}=None"), {extra: 1}) is None


def test_a_keyword_close_to_an_argument_that_is_filled_is_ignored():
    assert call(plain, {"x": 1, "xs": 5, "y": 3}) == ("params", 1, 3)


def test_a_keyword_far_from_every_argument_is_ignored():
    assert call(lambda params, images, labels=None: labels, {"images": 1, "temperature": 5, "epoch": 2}) is None


def test_every_missing_argument_is_named():
    with pytest.raises(TypeError, match=re.escape("'x', 'y'") + ".*" + re.escape("tx.update(grads, state, params")):
        call(lambda params, x, y: None, {})


@pytest.mark.parametrize("name", ["params", "updates", "state", "grad_fn"])
def test_an_argument_with_a_name_that_update_uses_is_refused(name):
    for function, argnames in [(function_of(f"theta, {name}"), None), (record, (name,))]:
        with pytest.raises(ValueError, match=f"data argument named '{name}'.*Rename the argument"):
            read_data_function(function, "loss_fn", argnames)


def test_the_parameters_may_have_any_name():
    assert call(lambda state, x: (state, x), {"x": 1}) == ("params", 1)


def test_value_and_grad_are_allowed_as_names_of_data():
    assert call(lambda params, value: value, {"value": 4}) == 4


# --- Signatures that cannot be read ----------------------------------------------------------------------------------


def takes_anything(params, **data):
    return params, data


def takes_a_row(params, *data):
    return params, *data


def by_position_only(params, x, y, /):
    return params, x, y


def undecorated(function):
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


UNREADABLE = {
    "takes **data": takes_anything,
    "takes *data": takes_a_row,
    "takes *args": undecorated(plain),
    "takes 'x' by position only": by_position_only,
}


@pytest.mark.parametrize(("reason", "function"), UNREADABLE.items(), ids=["kwargs", "args", "wrapper", "positional"])
def test_a_signature_that_cannot_be_read_says_why_and_asks_for_argnames(reason, function):
    with pytest.raises(ValueError, match=re.escape(reason) + r".*argnames=.*functools\.wraps"):
        read_data_function(function, "loss_fn")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (takes_anything, ("params", {"x": 1, "y": 3})),
        (takes_a_row, ("params", 1, 3)),
        (undecorated(plain), ("params", 1, 3)),
        (by_position_only, ("params", 1, 3)),
        (record, ((("params",), {"x": 1, "y": 3}))),
        (lambda params, x, *more: (params, x, *more), ("params", 1, 3)),
        (lambda params, x, **more: (params, x, more), ("params", 1, {"y": 3})),
        (lambda params, x, /, **more: (params, x, more), ("params", 1, {"y": 3})),
        (lambda params, x, /, y: (params, x, y), ("params", 1, 3)),
        (lambda params, x, /, *, y: (params, x, y), ("params", 1, 3)),
        (plain, ("params", 1, 3)),
        (keyword_only, ("params", 1, 3)),
    ],
)
def test_argnames_say_what_the_signature_does_not(function, expected):
    assert call(function, {"y": 3, "x": 1, "value": 0}, argnames=("x", "y")) == expected
    with pytest.raises(TypeError, match="missing 'y'"):
        call(function, {"x": 1}, argnames=("x", "y"))


def test_argnames_in_another_order_than_the_signature_still_go_by_name():
    assert call(by_position_only, {"x": 1, "y": 3}, argnames=("y", "x")) == ("params", 1, 3)


def test_a_builtin_without_a_signature_takes_its_data_in_the_order_of_argnames():
    class NoSignature:
        """As some C extensions: callable, but nothing to inspect."""

        __signature__ = "none"

        def __call__(self, params, *data):
            return params, *data

    with pytest.raises(ValueError, match="argnames="):
        read_data_function(NoSignature(), "loss_fn")
    assert call(NoSignature(), {"y": 3, "x": 1}, argnames=("x", "y")) == ("params", 1, 3)


def test_one_argname_may_be_a_string():
    assert call(takes_a_row, {"batch": 1}, argnames="batch") == ("params", 1)


@pytest.mark.parametrize(
    ("function", "argnames", "message"),
    [
        (plain, ("y",), r"needs \['x'\] too"),
        (plain, ("x", "z"), r"has no argument \['z'\]"),
        (by_position_only, ("x",), r"needs \['y'\] too"),
        (by_position_only, ("x", "y", "z"), r"has no argument \['z'\]"),
        (lambda params: params, ("x",), r"has no argument \['x'\]"),
    ],
)
def test_argnames_that_disagree_with_the_signature_are_refused(function, argnames, message):
    with pytest.raises(ValueError, match=f"argnames=.*disagrees with the signature of loss_fn: it {message}"):
        read_data_function(function, "loss_fn", argnames)


@pytest.mark.parametrize("function", [lambda: None, lambda *, params: params, lambda **data: data])
def test_a_function_without_room_for_the_parameters_is_refused(function):
    with pytest.raises(TypeError, match="grad_fn must take the parameters as its first positional argument"):
        read_data_function(function, "grad_fn")


@pytest.mark.parametrize("value", [3, "loss", {"w": 1}])
def test_what_cannot_be_called_is_refused(value):
    with pytest.raises(TypeError, match=f"loss_fn must be callable, got {type(value).__name__}"):
        read_data_function(value, "loss_fn")
