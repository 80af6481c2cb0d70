"""The step-size rule that chooses among all the steps of one factorisation, by the loss at their ends."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost, Path, Quantity, Step
from rk_optax.step_size import Attempt, Choice, Proposal, Reason, StepSizeRule, Verdict

PyTree = Any


class PathControlState(NamedTuple):
    """State of `path_control`."""

    step_size: jax.Array  # shape=(), float: about which the next trial steps lie; 0 before the first
    loss: jax.Array  # shape=(), float: at the params that the latest update left, on its data
    fall: jax.Array  # shape=(), float: of the loss, by the latest step; negative where it rose
    ratio: jax.Array  # shape=(), float: of that fall to the predicted one, where the data change; 0 elsewhere
    divisor: jax.Array  # shape=(), float: of h at the next refusal where the data change; doubles with each in a row
    changing: jax.Array  # shape=(), int32: 0 while the data stay; 2 at an update whose data are new, then less by one
    before: jax.Array  # shape=(), float: the loss at the params of the latest update
    predicted: jax.Array  # shape=(), float: the predicted fall of the latest step, before corrections


@dataclasses.dataclass(frozen=True)
class PathControl(StepSizeRule):
    """See `path_control`."""

    initial_step_size: float | None
    probes: int
    width: float
    boldness: float | None
    corrections: int
    resampled: bool | None
    growth: float = 3.0
    needs: frozenset[Capability] = frozenset({"loss"})
    wants: frozenset[Quantity] = frozenset({"path"})

    def init(self) -> PathControlState:
        """Nothing has been seen; the first step size comes from the first factorisation, where none is given."""
        zero = jnp.zeros([], _tree.default_float())
        return PathControlState(
            step_size=zero if self.initial_step_size is None else jnp.full_like(zero, self.initial_step_size),
            loss=jnp.full_like(zero, -1.0),  # less than any loss of least squares: nothing seen
            fall=zero,
            ratio=zero,
            divisor=jnp.full_like(zero, 2.0),
            changing=jnp.full([], 2 if self.resampled else 0, jnp.int32),
            before=zero,
            predicted=zero,
        )

    def propose(
        self, count: jax.Array, state: PathControlState, field: VectorField, params: PyTree, k1: PyTree
    ) -> Proposal:
        """The middle of the trial steps."""
        del count, field, params, k1
        return Proposal(state.step_size, state)

    def choose(
        self, state: PathControlState, field: VectorField, params: PyTree, k1: PyTree, h: Any, step: Step
    ) -> Choice:
        """Costs a loss, and one for each trial step and correction; two where the data change."""
        del field, k1
        path: Path = step.quantities["path"]
        dtype = path.typical.dtype
        h = jnp.where(h > 0, h, path.typical).astype(dtype)
        before = path.evaluate(params).loss
        changing = state.changing
        if self.resampled is None:
            # The same data give the same loss at the same params, to rounding.
            same = (state.loss < 0) | (jnp.abs(before - state.loss) <= 1e-3 * jnp.abs(state.loss))
            changing = jnp.where(same, jnp.maximum(changing - 1, 0), 2)

        def only() -> tuple[jax.Array, jax.Array]:
            return h, path.start(h[None])[0]

        def best() -> tuple[jax.Array, jax.Array]:
            exponents = jnp.linspace(-1.0, 1.0, self.probes, dtype=dtype)
            sizes = _bounded(h * self.width**exponents)
            losses, coordinates = self._try(path, params, sizes)
            falls = jnp.where(jnp.isfinite(losses), before - losses, -jnp.inf)
            boldness = path.boldness if self.boldness is None else self.boldness
            enough = (falls > 0) & (falls >= boldness * jnp.max(falls))
            index = jnp.max(jnp.where(enough, jnp.arange(self.probes), 0))
            return sizes[index], coordinates[index]

        trials = self.probes * (self._corrections(path) + 1)
        if self.resampled is None:
            h, coordinates = jax.lax.cond(changing == 0, best, only)
            trials = jnp.where(changing == 0, trials, 0)
        else:
            h, coordinates = only() if self.resampled else best()
            trials = 0 if self.resampled else trials
        predicted = path.predicted_fall(h[None], path.start(h[None]))[0]
        state = state._replace(
            changing=changing,
            before=before.astype(state.before.dtype),
            predicted=predicted.astype(state.predicted.dtype),
        )
        direction = jax.tree.map(lambda leaf: leaf[0], path.direction(h[None], coordinates[None]))
        return Choice(h, step._replace(direction=direction), state, Cost(losses=trials + 1))

    def _corrections(self, path: Path) -> int:
        return self.corrections if path.correctable else 0

    def _try(self, path: Path, params: PyTree, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """For each h the least of the losses that the iterates reach, and the coordinates of that iterate."""

        def iterate(_: Any, carry: Any) -> Any:
            coordinates, least, kept = carry
            direction = path.direction(h, coordinates)
            ends = jax.tree.map(lambda p, d: p - _column(h, d) * d, params, direction)
            trials = jax.lax.map(lambda i: path.evaluate(jax.tree.map(lambda leaf: leaf[i], ends)), jnp.arange(len(h)))
            better = trials.loss < least
            least = jnp.where(better, trials.loss, least)
            kept = jnp.where(better[:, None], coordinates, kept)
            return path.corrected(h, coordinates, trials.response), least, kept

        start = path.start(h)
        least = jnp.full(h.shape, jnp.inf, jax.eval_shape(path.evaluate, params).loss.dtype)
        _, least, kept = jax.lax.fori_loop(0, self._corrections(path) + 1, iterate, (start, least, start))
        return least, kept

    def judge(self, state: PathControlState, attempt: Attempt) -> Verdict:
        """Accepts where the loss does not rise. Costs a loss."""
        dtype = state.step_size.dtype
        before, after = state.before, attempt.field.loss(attempt.candidate).astype(dtype)
        fall = before - after
        accepted = attempt.usable & (fall >= 0)
        rounding = 2 * jnp.finfo(after.dtype).eps * jnp.abs(before)
        tie = attempt.usable & (jnp.abs(fall) <= rounding) & (state.predicted <= rounding)
        # Where the data change, the loss at the end of a step says little of the next: h follows the model's quality.
        ratio = jnp.where((fall == 0) & (state.predicted <= 0), 1, fall / state.predicted)
        grown = 1 / jnp.maximum(1 / self.growth, 1 - (2 * ratio - 1) ** 3)
        factor = jnp.where(accepted, grown, 1 / state.divisor)
        divisor = jnp.where(accepted, 2, 2 * state.divisor)
        changing = state.changing > 0
        h = jnp.where(changing, attempt.step_size * factor, attempt.step_size)
        h = jnp.where(tie, jnp.where(state.step_size > 0, state.step_size, attempt.step_size), h)
        new = PathControlState(
            step_size=_bounded(h).astype(dtype),
            loss=jnp.where(accepted, after, before),
            fall=fall,
            ratio=jnp.where(changing, ratio, 0).astype(dtype),
            divisor=jnp.where(changing & ~tie, divisor, state.divisor).astype(dtype),
            changing=state.changing,
            before=before,
            predicted=state.predicted,
        )
        refused = jnp.where(tie, Reason.UNRESOLVED, Reason.LOSS_ROSE)
        return Verdict(accepted, jnp.where(accepted, Reason.ACCEPTED, refused), new, Cost(losses=1))


def path_control(
    initial_step_size: float | None = None,
    *,
    probes: int = 12,
    width: float = 10.0,
    boldness: float | None = None,
    corrections: int = 4,
    resampled: bool | None = None,
) -> PathControl:
    """All step sizes of one factorisation are tried, and the largest whose fall is a fair part of the best is taken.

    TODO
    """
    if initial_step_size is not None:
        _checks.number(initial_step_size, "initial_step_size", "positive")
    _checks.count(probes, "probes")
    if not 1 < _checks.number(width, "width", "positive") < math.inf:
        raise ValueError(f"width must be above 1 and finite, got {width!r}.")
    if boldness is not None and not 0 < _checks.number(boldness, "boldness", "positive") <= 1:
        raise ValueError(f"boldness must be in (0, 1], got {boldness!r}.")
    if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 0:
        raise ValueError(f"corrections must be an integer, not negative, got {corrections!r}.")
    if resampled not in (None, True, False):
        raise ValueError(f"resampled must be True, False or None (to be detected), got {resampled!r}.")
    return PathControl(initial_step_size, probes, width, boldness, corrections, resampled)


def _bounded(h: jax.Array) -> jax.Array:
    """H within what its dtype can express with room on both sides, so that no step size is the last."""
    info = jnp.finfo(h.dtype)
    return jnp.clip(h, float(info.tiny) * 1e6, float(info.max) * 1e-6)


def _column(h: jax.Array, leaf: jax.Array) -> jax.Array:
    return h.astype(_tree.real_dtype(leaf)).reshape(-1, *(1,) * (leaf.ndim - 1))
