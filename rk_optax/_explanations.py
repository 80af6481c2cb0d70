"""What an error inside a user's function is told before it goes on: what the solver passed in, and what helps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rk_optax.parameter_view import ParameterView

PyTree = Any
Linear = Callable[[PyTree], PyTree]


_NO_FORWARD_MODE = (
    "A Gauss–Newton product differentiates the model forwards, and a Hessian product the gradient, where a "
    "jax.custom_vjp has no rule. curvature='hessian' needs none for a custom_vjp in the model; without products are "
    "the explicit tableaus, rkc, rkl, residual_euler up to max_rows, etd1(linear='l2'), dal(estimate='difference') and "
    "dal(estimate='free'). Or write the rule with jax.custom_jvp."
)
_KNOWN_CAUSES = {
    "'NoneType' object is not callable": "The parameters hold None where the loss wants a function, as eqx.filter "
    "leaves them. Split the module with eqx.partition, pass the static half as data and call eqx.combine in the loss.",
    "'State' object": "This is a loss of an NNX model, and a solver differentiates a loss of parameters: "
    "rk_optax.nnx.pure_loss(loss_fn), or rk_optax.nnx.Optimizer(model, partial(rk_optax.rk4, learning_rate=...), "
    "loss_fn, wrt=nnx.Param).",
    "(jvp) to a custom_vjp": _NO_FORWARD_MODE,
}


@contextlib.contextmanager
def explained(role: str, view: ParameterView, data: Mapping[str, Any]) -> Iterator[None]:
    """Adds to an error in a function of the user's what the solver passed in, and what helps."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "__notes__"):  # an evaluation inside this one has done so
            error.add_note(_situation(role, view, data))
            _add_causes(error)
        raise


@contextlib.contextmanager
def causes_explained() -> Iterator[None]:
    """Adds to an error what helps; that of a derivative may come from outside of the function."""
    try:
        yield
    except Exception as error:
        _add_causes(error)
        raise


def linearized(function: Callable[[PyTree], PyTree], params: PyTree) -> tuple[PyTree, Linear]:
    """`jax.linearize`, which lets a `jax.custom_vjp` pass: its error comes when XLA meets the linear map, too late."""
    value, linear = jax.linearize(function, params)
    if _holds_custom_vjp(jax.make_jaxpr(linear)(params).jaxpr):
        raise TypeError(f"A function of the loss has no forward mode. {_NO_FORWARD_MODE}")
    return value, linear


def _holds_custom_vjp(jaxpr: Any) -> bool:
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        if equation.primitive.name == "custom_lin" or any(hasattr(j, "eqns") and _holds_custom_vjp(j) for j in inner):
            return True
    return False


def _add_causes(error: Exception) -> None:
    for sign, remedy in _KNOWN_CAUSES.items():
        if sign in str(error) and remedy not in getattr(error, "__notes__", ()):
            error.add_note(remedy)


def _situation(role: str, view: ParameterView, data: Mapping[str, Any]) -> str:
    shapes = ", ".join(f"{name}: {_shapes(value)}" for name, value in data.items()) or "no data"
    where = f"{role} was evaluated here by the solver, for a stage, on what update was given ({shapes})."
    if isinstance(view.params, jax.Array) and view.params.ndim == 1:
        where += f" Parameters are one flat array of length {view.params.size}, as under optax.flatten; leave that out."
    own, seen = (_dtypes(tree) for tree in (view.params, view.whole(view.theta)))
    if own == seen:
        return where
    return (
        f"{where} Parameters of {own} are {seen} at a stage; stage_dtype=None keeps their own dtypes, for a loss that "
        "insists on them."
    )


def _dtypes(tree: PyTree) -> str:
    return " and ".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(tree)}))


def _shapes(value: Any) -> str:
    leaves = jax.tree.leaves(value)
    return ", ".join(f"{jnp.result_type(x)}{list(jnp.shape(x))}" for x in leaves[:3] if hasattr(x, "dtype")) or "static"
