"""The step-size rule that shortens the direction of a very long step, for data that change from step to step."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost, Solver, Step, name_of
from rk_optax.step_size import Attempt, Choice, KeptStepSize, Reason, Verdict

PyTree = Any
Number = float | jax.Array


class LineSearchState(NamedTuple):
    """State of `LineSearch`."""

    next_step_size: jax.Array  # shape=(), float: of the next step before it is shortened
    part: jax.Array  # shape=(), float: of the latest step that was taken, a power of 1/2; 0 before the first
    before: jax.Array  # shape=(), float: the loss at the params of the latest update, on its data
    least: jax.Array  # shape=(), float: the least of its trials; above `before` where nothing moved


@dataclasses.dataclass(frozen=True)
class LineSearch(KeptStepSize):
    """Makes a very long linearly implicit step, and takes of 1, 1/2, 1/4 ... of it the part with the least loss.

    At h = 1e8 the direction is all but Gauss–Newton's: with `rk_optax.residual_euler` this is the natural-gradient
    method ENGD-W with damping 1/h and its line search. Use it where the data are new in every step: there the other
    rules, which learn h from step to step, are slow at the start, where short steps are needed, and go too far later,
    where every batch by itself is fitted easily. On a Poisson problem in five dimensions (2,665 weights, 650 new points
    a step, float64, one seed) ENGD-W with these 12 parts had relative errors of 5e-3, 1e-3 and 7e-4 after 4, 8 and 12
    processor seconds, and the same directions under the trust ratio 2.4, 1.3 and 1e-2. On data that stay
    `rk_optax.path_control` ends lower.

    The loss is that of the step's batch, at parameters rounded to their own dtypes. Where no part lowers it, nothing
    moves and the next step is 16 times shorter; each step that is taken lengthens the next fourfold, up to `step_size`.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> loss_fn = rk_optax.LeastSquares(lambda w: jnp.array([w[0] - 1, 10 * (w[1] - w[0] ** 2)]))
    >>> tx = rk_optax.residual_euler(loss_fn, rk_optax.line_search())
    >>> w = jnp.array([-1.0, 1.0])
    >>> _, state = jax.jit(tx.update)(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> float(state.rule.part), bool(state.rule.least < state.rule.before)
    (0.125, True)

    Args:
      step_size: h > 0 of the whole step, in the units of θ²/L.
      parts: how many parts are tried, static.
      first: whether to take the first part that lowers the loss by 1e-4 of what the slope foretells (Armijo's rule)
        instead of the best of all: for curvature="secant", whose steps are cheap and mostly right.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a solver for which a very long step
        has no meaning, or momentum, after or weight_decay.

    Cost: parts + 1 losses a step, one after the other, or fewer with `first`. Source: Müller and Zeinhofer (2023),
    "Achieving high accuracy with PINNs via energy natural gradients", arXiv 2302.13163; in residual space
    Guzmán-Cordero et al. (2025).
    """

    step_size: Number = 1e8
    _: dataclasses.KW_ONLY
    parts: int = 12
    first: bool = False
    needs: ClassVar[frozenset[Capability]] = frozenset({"loss", "deterministic"})

    def __post_init__(self):
        _checks.numbers(self, step_size="positive")
        _checks.count(self.parts, "parts")
        _checks.flags(self, "first")

    def check(self, solver: Solver, has_after: bool = False) -> None:
        """Refuses solvers whose direction at a very long step is none, and updates that were not tried."""
        super().check(solver, has_after)
        if "predicted_fall" not in solver.offers:
            raise ValueError(
                f"line_search needs a solver for very long steps, which {name_of(solver)} is not. Use it with "
                "residual_euler or rosenbrock_euler, or descent_control() with this solver."
            )
        if has_after:
            raise ValueError(
                "line_search tries parts of the solver's own step, not of one changed by momentum, after or "
                "weight_decay. Leave those out (l2= is in the loss), or use descent_control()."
            )

    def init(self, params: PyTree) -> LineSearchState:
        """Nothing has been tried."""
        del params
        part, before, least = (jnp.zeros([], _tree.default_float()) for _ in range(3))
        return LineSearchState(jnp.full([], self.step_size, part.dtype), part, before, least)

    def choose(
        self, state: LineSearchState, field: VectorField, params: PyTree, k1: PyTree, h: Any, step: Step
    ) -> Choice:
        """The part of least loss, or the first that is good enough. Costs the losses, that before the step too."""
        whole, dtype = _tree.scale(h, step.direction), state.part.dtype
        before = field.loss(params).astype(dtype)

        def trial(part: jax.Array) -> jax.Array:
            loss = field.loss(field.landed(params, _tree.scale(-part, whole))).astype(dtype)
            return jnp.where(jnp.isfinite(loss), loss, jnp.inf)

        if self.first:
            gradient = k1 if field.scale is None else jax.tree.map(jnp.divide, k1, field.scale)
            slope = _tree.inner(gradient, whole).astype(dtype)

            def goes_on(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
                part, loss, count = carry
                return ~(loss <= before - 1e-4 * part * slope) & (count < self.parts)

            def halved(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
                part, _, count = carry
                return 0.5 * part, trial(0.5 * part), count + 1

            whole_step = jnp.ones([], dtype)
            part, least, count = jax.lax.while_loop(
                goes_on, halved, (whole_step, trial(whole_step), jnp.ones([], jnp.int32))
            )
        else:
            parts = 0.5 ** jnp.arange(self.parts, dtype=dtype)
            losses = jax.lax.map(trial, parts)
            best = jnp.argmin(losses)
            part, least, count = parts[best], losses[best], self.parts
        part = jnp.where(jnp.isfinite(least), part, 0)
        state = state._replace(part=part, before=before, least=least)
        return Choice(h * part, step, state, Cost(losses=count + field.losses_at(params)))

    def judge(self, state: LineSearchState, attempt: Attempt) -> Verdict:
        """Accepts where the least loss is not above that before the step. Costs nothing."""
        accepted = attempt.usable & (state.least <= state.before) & jnp.isfinite(state.least)
        first = jnp.asarray(self.step_size, state.next_step_size.dtype)
        info = jnp.finfo(first.dtype)
        h = state.next_step_size * jnp.where(accepted, 4, 1 / 16)
        h = jnp.clip(h, jnp.minimum(first, float(info.tiny) / float(info.eps)), first)
        reason = jnp.where(accepted, Reason.ACCEPTED, Reason.LOSS_ROSE)
        return Verdict(accepted, reason, state._replace(next_step_size=h))


line_search = LineSearch
