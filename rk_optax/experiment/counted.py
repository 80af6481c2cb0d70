"""Methods of others as transformations that count their cost in `state.cost`, as the solvers of rk_optax do."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import rk_optax

Transformation = optax.GradientTransformationExtraArgs


class CountedState(NamedTuple):
    """State of every such method."""

    cost: rk_optax.Cost
    method: Any  # what it carries itself


def counted(init: Callable[[Any], Any], step: Callable[..., tuple[Any, Any, rk_optax.Cost]]) -> Transformation:
    """A method as a transformation.

    `init(params)` is what the method carries. `step(gradient, state, params, data, value)`, with the data of the loss
    by name and its value, or None, returns the update to add, what the method carries from here, and the cost.
    """

    def start(params: Any) -> CountedState:
        return CountedState(rk_optax.Cost.zeros(), init(params))

    def update(updates: Any, state: Any, params: Any = None, value: Any = None, **extra: Any) -> tuple[Any, Any]:
        data = {name: extra[name] for name in extra if name not in ("grad", "value_fn")}
        moves, method, cost = step(updates, state.method, params, data, value)
        return moves, CountedState(state.cost.plus(cost), method)

    return optax.GradientTransformationExtraArgs(start, update)
