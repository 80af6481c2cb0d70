"""Forward gradients: unbiased estimates of a gradient from directional derivatives, without reverse mode."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax._arguments import DataFunction, read_data_function
from rk_optax.objective import scalar_loss
from rk_optax.stochastic_field import StochasticField

PyTree = Any


def forward_gradient(
    loss_fn: Callable[..., Any],
    directions: int = 1,
    *,
    has_aux: bool = False,
    key_name: str = "key",
    argnames: Sequence[str] | None = None,
) -> StochasticField:
    """The forward gradient (∇L·v)v of a loss, with v normal: a directional derivative in place of reverse mode.

    Its mean is ∇L. Its variance is large: E‖(∇L·v)v − ∇L‖² = (P + 1)‖∇L‖² with P numbers in params, divided by the
    number of directions. So it is for few parameters, many directions, or losses without reverse mode; perturbing the
    activations of a network does far better (`rk_optax.linen.activity_forward_gradient`).

    It is the `grad_fn` of any explicit solver, with a constant or scheduled step. Directions are drawn anew at every
    stage of a step: with one direction for all stages the step would be that of the loss along a line, of which the
    mean is another method (see `StochasticField`).

    >>> import jax, jax.numpy as jnp, optax, rk_optax
    >>> def loss_fn(w, x): return jnp.sum((w - x) ** 2)
    >>> field = rk_optax.forward_gradient(loss_fn, directions=8)
    >>> tx = rk_optax.rk4(None, 0.05, grad_fn=field)
    >>> @jax.jit
    ... def step(w, state, **data):
    ...     updates, state = tx.update(field(w, **data), state, w, **data)
    ...     return optax.apply_updates(w, updates), state
    >>> w, x = jnp.zeros(2), jnp.array([1.0, -1.0])
    >>> state = tx.init(w)
    >>> for i in range(100):
    ...     w, state = step(w, state, x=x, key=jax.random.key(i))
    >>> bool(loss_fn(w, x) < 1e-3)
    True

    Args:
      loss_fn: `loss_fn(params, *data) -> scalar`, or `(scalar, aux)` with `has_aux`.
      directions: how many are averaged.
      has_aux: whether the loss returns auxiliary data; the field then returns `(gradient, aux)`, and the optimizer
        takes `has_aux=True` too.
      key_name: under which name the random key of the directions reaches the field and `update`. A key that the loss
        itself takes, for dropout, is data like any other and must have another name.
      argnames: names of the data arguments, for a loss whose signature cannot be read.

    Returns:
      A field `field(params, *data, key=key)`, like params. Leaves that have no derivative, such as integers, get zeros.
      A solver's `mask` does not reach it: the fixed leaves add to the variance, so close the loss over them instead.

    Raises:
      TypeError: `loss_fn` is not callable; when called, a loss that is no real scalar, or a missing key.
      ValueError: `directions` is no positive integer, `has_aux` no bool; the loss has an argument called
        `key_name`, or arguments that cannot be read.

    Cost: one directional derivative a direction, about two losses in time and twice the memory of one loss, where a
    gradient takes three and all activations; the directions side by side. Solvers count it as one gradient.

    Source: Baydin et al., "Gradients without backpropagation", arXiv 2202.08587; weight perturbation in Ren et al.,
    arXiv 2210.03310.
    """
    _checks.count(directions, "directions")
    has_aux = _checks.flag(has_aux, "has_aux")
    loss = read_data_function(loss_fn, "loss_fn", argnames)

    def estimate(params: PyTree, key: jax.Array, data: dict[str, Any]) -> Any:
        params = jax.tree.map(jnp.asarray, params)
        part = _tree.partition(jax.tree.map(_tree.is_inexact, params), params)
        moving = part.moving(params)

        def value(moving: PyTree) -> tuple[jax.Array, Any]:
            result = loss(part.merge(moving, params), data)
            return scalar_loss(result, has_aux), result[1] if has_aux else ()

        def along(key: jax.Array) -> tuple[PyTree, Any]:
            direction = random_normal(key, moving)
            _, slope, aux = jax.jvp(value, (moving,), (direction,), has_aux=True)
            return _tree.scale(slope, direction), aux

        gradient, aux = mean_over_keys(along, key, directions)
        gradient = part.merge(gradient, jax.tree.map(jnp.zeros_like, params))
        return (gradient, aux) if has_aux else gradient

    return keyed_field(estimate, loss, key_name)


def random_normal(key: jax.Array, like: PyTree) -> PyTree:
    """Standard normal numbers in the shapes and dtypes of `like`; in complex leaves real and imaginary part are."""
    leaves, treedef = jax.tree.flatten(like)

    def draw(i: int, leaf: jax.Array) -> jax.Array:
        # jax.random gives a complex number variance 1 in all.
        factor = 2**0.5 if jnp.iscomplexobj(leaf) else 1.0
        return (factor * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)).astype(leaf.dtype)

    return treedef.unflatten([draw(i, leaf) for i, leaf in enumerate(leaves)])


def mean_over_keys(
    function: Callable[[jax.Array], tuple[PyTree, Any]], key: jax.Array, count: int
) -> tuple[PyTree, Any]:
    """The mean of the first part of `function(key)` over `count` keys, side by side; the second part of one of them."""
    if count == 1:
        return function(key)
    means, rest = jax.vmap(function)(jax.random.split(key, count))
    return jax.tree.map(lambda x: x.mean(axis=0), means), jax.tree.map(lambda x: x[0], rest)


def keyed_field(
    estimate: Callable[[PyTree, jax.Array, dict[str, Any]], Any], loss: DataFunction, key_name: str
) -> StochasticField:
    """The field that takes what the loss takes, and a random key by name.

    Raises:
      ValueError: the loss has an argument of that name.
    """
    if key_name in (*loss.required, *loss.optional):
        raise ValueError(
            f"loss_fn takes {key_name!r} itself, and the directions need a key of their own, fresh at every stage: "
            "give it another name, key_name='direction_key' say."
        )
    kind = inspect.Parameter
    signature = inspect.Signature(
        [
            kind("params", kind.POSITIONAL_ONLY),
            *(kind(name, kind.POSITIONAL_OR_KEYWORD) for name in loss.required),
            kind(key_name, kind.KEYWORD_ONLY),
            *(kind(name, kind.KEYWORD_ONLY, default=None) for name in loss.optional),
        ]
    )

    def field(params: PyTree, *args: Any, **data: Any) -> Any:
        given = signature.bind(params, *args, **data).arguments
        return estimate(given.pop("params"), given.pop(key_name), given)

    vars(field)["__signature__"] = signature
    return StochasticField(field, (key_name,))
