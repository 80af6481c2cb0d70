"""Steps of one part of the parameters after the other, as players of a game take them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver._base import Cost, Quantity, Solver, Step, check_offers, fitting, stepped

PyTree = Any
Players = dict[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Alternating(Solver):
    """Players one after the other: each makes a step of `solver` in its own field, where those before have moved.

    Args:
      solver: what each player moves by.
      order: names of players, who are the keys of params; one that is there k times moves by h/k each time.
    """

    solver: Solver
    order: tuple[str, ...]

    @property
    def needs(self) -> frozenset[Capability]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the solver."""
        return self.solver.needs

    def init(self, params: PyTree) -> PyTree:
        """A state of the solver for each player."""
        return {name: self.solver.init(params[name]) for name in sorted(set(self.order))}

    def step(
        self,
        field: VectorField,
        params: PyTree,
        k1: PyTree,
        h: Any,
        state: PyTree,
        *,
        wants: frozenset[Quantity] = frozenset(),
    ) -> Step:
        """One step; see `Solver.step`."""
        check_offers(self, wants, "This step")
        moves = collections.Counter(self.order)
        at, states, refused = dict(params), dict(state), dict(state)
        total = jax.tree.map(jnp.zeros_like, k1)
        finite, solved, cost = jnp.asarray(True), jnp.asarray(True), Cost()
        for turn, name in enumerate(self.order):
            own = _field_of(field, at, name)
            share = 1 / moves[name]
            first = k1[name] if turn == 0 else own(at[name])
            step = stepped(self.solver, own, at[name], first, share * h, states[name], frozenset())
            step = fitting(self.solver, step, first, states[name])
            at[name] = _tree.add_scaled(at[name], -share * h, step.direction)
            total[name] = _tree.add_scaled(total[name], share, step.direction)
            states[name] = step.state
            refused[name] = step.state_if_refused(refused[name])
            finite, solved = finite & step.finite, solved & step.solved
            cost = Cost(*(a + b for a, b in zip(cost, step.cost, strict=True)))
        # In fields of all players, rounded up. Of stage 1 only the first player's part was of use.
        players = len(moves)
        cost = cost._replace(gradients=cost.gradients + players - 1)
        return Step(
            total,
            Cost(*(-(-c // players) for c in cost)),
            finite=finite,
            solved=solved,
            state=states,
            refused_state=refused,
        )


def _field_of(field: VectorField, params: Players, name: str) -> VectorField:
    """The field in the parameters of one player, the others' being what they are now."""
    others = dict(params)

    def restricted(whole: Callable[..., Players] | None) -> Any:
        return None if whole is None else lambda own, *stage: whole({**others, name: own}, *stage)[name]

    return VectorField(
        restricted(field.evaluate),
        smooth_field=restricted(field.smooth_field),
        rounding=field.rounding,
        gradient=restricted(field.gradient),
        scale=None if field.scale is None else field.scale[name],
        symmetric=field.symmetric,
    )
