"""The loop of `gradient_flow`: attempts, dense output, events and stop conditions, compiled.

One attempt is the loop's body, and a call runs as many as it is told to: a flow that is stepped from Python, one that
is interrupted and resumed and one that runs through are the same program. What is judged here is θ − h·g* itself, for
an h that is cut where the last time is; an update of an optimizer judges what it emits, momentum, rounding and all. So
the two have the solver, the rule and the verdict (`step_size.judged`) in common, and each its own attempt.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax.control import ErrorControl
from rk_optax.field import VectorField
from rk_optax.micro_batches import MicroBatches, bind
from rk_optax.objective import Objective
from rk_optax.parameter_view import ParameterView
from rk_optax.solver import Cost, Solver, fitting, stepped
from rk_optax.step_size import Attempt, Reason, StepSizeRule, chosen, judged, proposed

PyTree = Any


class FlowResult(enum.IntEnum):
    """How a flow ended; `flow.result` holds the number.

    >>> FlowResult(1).message
    'the last of the requested times was reached'
    """

    RUNNING = 0
    REACHED_END = 1
    EVENT = 2
    LOSS = 3
    GRADIENT_NORM = 4
    BUDGET = 5
    STALLED = 6
    REFUSED = 7

    @property
    def message(self) -> str:
        """A sentence for people."""
        return _MESSAGES[self]


_MESSAGES = {
    FlowResult.RUNNING: "not ended yet: pass the state on to go on",
    FlowResult.REACHED_END: "the last of the requested times was reached",
    FlowResult.EVENT: "the event function changed its sign",
    FlowResult.LOSS: "the loss fell to min_loss",
    FlowResult.GRADIENT_NORM: "the norm of the gradient fell to min_gradient_norm",
    FlowResult.BUDGET: "max_gradients or max_steps was reached",
    FlowResult.STALLED: "steps were refused until they were too short to move time: the tolerance is below what the "
    "precision of the parameters can tell, or the field is not finite from here on",
    FlowResult.REFUSED: "a step of a fixed size was refused: a stage was not finite, or the solver's own iteration did "
    "not converge; take a shorter step_size, or a rule that adapts it",
}


class FlowState(NamedTuple):
    """All that a flow needs to go on: arrays alone, so that any checkpointer stores it."""

    elapsed: jax.Array  # shape=(), float: |t − ts[0]|
    lost: jax.Array  # shape=(), float: what rounding has kept out of `elapsed`
    params: PyTree  # θ, moving leaves only, in the stage dtype
    k1: PyTree  # the field at θ
    solver: PyTree  # the solver's own
    rule: PyTree  # the step-size rule's own
    attempts: jax.Array  # shape=(), int32
    refused: jax.Array  # shape=(), int32
    cost: Cost  # shape=(), int32 each
    watched: jax.Array  # shape=(number of stop conditions,), float: their values at θ
    saved: jax.Array  # shape=(), int32: times saved so far
    values: PyTree  # what `save` returned, each leaf with a leading axis of length len(ts)
    step_sizes: jax.Array  # shape=(len(ts),), float: h of the step in which each time lies
    errors: jax.Array  # shape=(len(ts),), float: its scaled error estimate, NaN where the rule takes none
    reason: jax.Array  # shape=(), int32: a `Reason`, of the latest attempt
    result: jax.Array  # shape=(), int32: a `FlowResult`


class Inputs(NamedTuple):
    """What is traced."""

    params: PyTree  # whole, as they came
    times: jax.Array  # shape=(n,)
    offsets: jax.Array  # shape=(n,): |ts − ts[0]|
    data: dict[str, Any]
    scale: PyTree | None  # P, moving leaves only
    limits: dict[str, Any]  # thresholds, by the name of their stop condition, and the budgets


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a program is compiled for."""

    objective: tuple[tuple[str, Any], ...]  # arguments of `Objective`
    solver: Solver
    rule: StepSizeRule
    automatic_first_step: bool
    backward: bool
    save: Any  # a name, a function, or a tuple of pairs (name, one of these)
    event: Callable[[jax.Array, PyTree], jax.Array] | None
    modify: Callable[[VectorField], VectorField] | None
    batches: MicroBatches
    part: _tree.Partition
    stage_dtype: Any


class _Flow:
    """A setting and its inputs while a program is traced."""

    def __init__(self, setting: Setting, inputs: Inputs):
        self.setting, self.inputs = setting, inputs
        self.view = ParameterView(inputs.params, setting.part, setting.stage_dtype)
        self.loss_field = bind(Objective(**dict(setting.objective)), inputs.data, self.view, setting.batches)
        field = self.loss_field if setting.modify is None else setting.modify(self.loss_field)
        if inputs.scale is not None:
            scale = inputs.scale
            field = field.preconditioned(lambda g: jax.tree.map(jnp.multiply, scale, g), scale)
        self.field = field.reversed() if setting.backward else field
        self.wants = setting.rule.wants | (setting.solver.offers & {"last_stage", "dense"})
        self.stops = _stops(setting, inputs.limits)

    def time(self, elapsed: jax.Array) -> jax.Array:
        first = self.inputs.times[0]
        return first - elapsed if self.setting.backward else first + elapsed

    # --- the start ---

    def start(self) -> FlowState:
        setting, n = self.setting, len(self.inputs.offsets)
        params = self.view.theta
        k1 = self.field(params)
        cost = Cost().plus(Cost(gradients=1))
        rule = setting.rule.init(params)
        if setting.automatic_first_step:
            assert isinstance(setting.rule, ErrorControl)  # for the type checker
            h = _first_step(self.field, params, k1, setting.rule, setting.solver.error_order or 0)
            rule = rule._replace(next_step_size=h.astype(rule.next_step_size.dtype))
            cost = cost.plus(Cost(gradients=1))
        zero = jnp.zeros([], self.inputs.offsets.dtype)
        watched = self.watch(zero, params, k1)
        values, save_cost = self.save(zero, params)
        nothing = jnp.full([n], jnp.nan, zero.dtype)
        below = [stop.at_once & (x <= 0) for stop, x in zip(self.stops, watched, strict=True)]
        return FlowState(
            elapsed=zero,
            lost=jnp.zeros_like(zero),
            params=params,
            k1=k1,
            solver=setting.solver.init(params),
            rule=rule,
            attempts=jnp.zeros([], jnp.int32),
            refused=jnp.zeros([], jnp.int32),
            cost=cost.plus(save_cost).plus(self.watch_cost),
            watched=watched,
            saved=jnp.ones([], jnp.int32),
            values=jax.tree.map(lambda x: _empty(n, x).at[0].set(x), values),
            step_sizes=nothing,
            errors=jnp.full_like(nothing, jnp.nan),
            reason=jnp.zeros([], jnp.int32),
            result=self.first_of(below),
        )

    # --- one attempt ---

    def attempt(self, state: FlowState) -> FlowState:
        setting, rule = self.setting, self.setting.rule
        params, k1, dtype = state.params, state.k1, state.elapsed.dtype
        h, rule_state, cost = proposed(rule, state.attempts, state.rule, self.field, params, k1)
        remaining = (self.inputs.offsets[-1] - state.elapsed) + state.lost
        h = jnp.asarray(h, dtype)
        # A step that would end a rounding error of time before the last time ends on it.
        last = h + jnp.finfo(dtype).eps * self.inputs.offsets[-1] >= remaining
        h = jnp.where(last, remaining, h)
        step = stepped(setting.solver, self.field, params, k1, h, state.solver, self.wants)
        h, step, rule_state, choice_cost = chosen(rule, rule_state, self.field, params, k1, h, step)
        step = fitting(setting.solver, step, k1, state.solver)
        h = jnp.asarray(h, dtype)
        candidate = _tree.add_scaled(params, -h, step.direction)
        finite = step.finite & _tree.all_finite(candidate)
        usable = finite & step.solved
        attempt = Attempt(setting.solver, self.field, params, k1, candidate, h, step, usable)
        verdict, accepted, reason = judged(rule, rule_state, attempt, finite)
        # k1 was evaluated by whoever came here; of a refused step it serves the next one too.
        cost = cost.plus(step.cost.beyond_k1()).plus(choice_cost).plus(verdict.cost)

        if "last_stage" in self.wants:
            end = step.quantities["last_stage"]
        else:
            end = jax.lax.cond(accepted, lambda: self.field(candidate), lambda: k1)
            cost = cost.plus(Cost(gradients=accepted))
        if "dense" in self.wants:
            displacement = step.quantities["dense"]
        else:
            displacement = functools.partial(_hermite, k1, step.direction, end)

        def within(sigma: jax.Array) -> PyTree:
            """θ at a fraction of the step."""
            return _tree.add_scaled(params, -h, displacement(sigma))

        moved = state._replace(
            solver=_tree.select(accepted, step.state, step.state_if_refused(state.solver)),
            rule=verdict.state,
            attempts=state.attempts + 1,
            refused=state.refused + ~accepted,
            cost=state.cost.plus(cost),
            reason=reason,
        )
        new = moved._replace(params=candidate, k1=end)
        last &= h == remaining  # a rule may have chosen another
        elapsed, lost = _tree.sum_with_rounding(state.elapsed, state.lost, h)
        new = new._replace(
            elapsed=jnp.where(last, self.inputs.offsets[-1], elapsed), lost=jnp.where(last, 0, lost).astype(dtype)
        )
        sigma = jnp.ones([], dtype)
        if self.stops:
            new, sigma = jax.lax.cond(accepted, lambda: self.watched(state, new, h, within), lambda: (new, sigma))
        new = self.saved(state, new, accepted, h, sigma, within, verdict.state)
        # What is refused keeps θ, k1 and time; all else is the same on both sides.
        kept = moved._replace(values=new.values, saved=new.saved, step_sizes=new.step_sizes, errors=new.errors)
        new = new._replace(
            **{
                name: _tree.select(accepted, getattr(new, name), getattr(kept, name))
                for name in ("params", "k1", "elapsed", "lost", "watched", "result", "cost")
            }
        )
        return new._replace(result=self.ended(new, accepted))

    def ended(self, state: FlowState, accepted: jax.Array) -> jax.Array:
        """The result after an attempt, where no stop condition has given one."""
        limits = self.inputs.limits
        end = self.inputs.offsets[-1]
        over = (state.cost.gradients >= limits["max_gradients"]) | (state.attempts >= limits["max_steps"])
        if self.setting.rule.adaptive:
            h = getattr(state.rule, "next_step_size", jnp.inf)
            tiny = ~accepted & ((h <= 1e-13 * end) | (state.reason == Reason.SMALLEST_STEP))
            refused = jnp.where(tiny, FlowResult.STALLED, FlowResult.RUNNING)
        else:
            refused = jnp.where(accepted, FlowResult.RUNNING, FlowResult.REFUSED)
        result = jnp.where(over & (refused == FlowResult.RUNNING), FlowResult.BUDGET, refused)
        result = jnp.where((end - state.elapsed) + state.lost <= 0, FlowResult.REACHED_END, result)
        return jnp.where(state.result != FlowResult.RUNNING, state.result, result).astype(jnp.int32)

    # --- stop conditions ---

    def watch(self, elapsed: jax.Array, params: PyTree, k: PyTree) -> jax.Array:
        """The values of the stop conditions."""
        values = [stop.value(self, elapsed, params, k) for stop in self.stops]
        return jnp.stack([jnp.asarray(v, self.inputs.offsets.dtype) for v in values]) if values else jnp.zeros([0])

    @property
    def watch_cost(self) -> Cost:
        return Cost(losses=sum(stop.result == FlowResult.LOSS for stop in self.stops))

    def crossed(self, before: jax.Array, after: jax.Array) -> jax.Array:
        falling = jnp.array([stop.at_once for stop in self.stops])
        changed = jnp.sign(before) * jnp.sign(after) <= 0
        return jnp.where(falling, after <= 0, changed & (before != 0))

    def first_of(self, happened: Any) -> jax.Array:
        """The result of the first stop condition that holds, or RUNNING."""
        result = jnp.asarray(FlowResult.RUNNING, jnp.int32)
        for stop, now in reversed(list(zip(self.stops, happened, strict=True))):
            result = jnp.where(now, jnp.asarray(stop.result, jnp.int32), result)
        return result

    def watched(
        self, old: FlowState, new: FlowState, h: jax.Array, within: Callable[[jax.Array], PyTree]
    ) -> tuple[FlowState, jax.Array]:
        """An accepted step, cut where a stop condition was met first, and the fraction of it that is left."""
        values = self.watch(new.elapsed, new.params, new.k1)
        new = new._replace(watched=values, cost=new.cost.plus(self.watch_cost))
        one = jnp.ones([], h.dtype)
        of_norm = any(stop.result == FlowResult.GRADIENT_NORM for stop in self.stops)

        def at(sigma: jax.Array) -> tuple[PyTree, PyTree, jax.Array]:
            params = within(sigma)
            k = self.field(params) if of_norm else new.k1
            return params, k, self.watch(old.elapsed + sigma * h, params, k)

        def cut() -> tuple[FlowState, jax.Array]:
            halvings = 2 - jnp.finfo(h.dtype).machep  # to a rounding error of the step

            def halve(_: Any, bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                low, high = bracket
                middle = 0.5 * (low + high)
                met = jnp.any(self.crossed(old.watched, at(middle)[2]))
                return jnp.where(met, low, middle), jnp.where(met, middle, high)

            _, sigma = jax.lax.fori_loop(0, halvings, halve, (jnp.zeros_like(one), one))
            params = within(sigma)
            k = self.field(params)
            values = self.watch(old.elapsed + sigma * h, params, k)
            elapsed, lost = _tree.sum_with_rounding(old.elapsed, old.lost, sigma * h)
            spent = self.watch_cost
            spent = Cost(losses=spent.losses * (halvings + 1), gradients=1 + halvings * of_norm)
            return new._replace(
                params=params,
                k1=k,
                elapsed=elapsed,
                lost=lost,
                watched=values,
                cost=new.cost.plus(spent),
                result=self.first_of(self.crossed(old.watched, values)),
            ), sigma

        return jax.lax.cond(jnp.any(self.crossed(old.watched, values)), cut, lambda: (new, one))

    # --- output ---

    def save(self, elapsed: jax.Array, params: PyTree) -> tuple[PyTree, Cost]:
        """What is to be saved, and its cost."""
        spent = Cost()

        def of(what: Any) -> PyTree:
            nonlocal spent
            if what == "params":
                return self.view.whole(params)
            if what == "loss":
                spent = spent._replace(losses=spent.losses + 1)
                return self.loss_field.loss(params)
            if what == "gradient_norm":
                spent = spent._replace(gradients=spent.gradients + 1)
                return _tree.norm(self.loss_field(params))
            return what(self.time(elapsed), self.view.whole(params))

        save = self.setting.save
        values = {name: of(what) for name, what in save} if isinstance(save, tuple) else of(save)
        return jax.tree.map(jnp.asarray, values), spent

    def saved(
        self,
        old: FlowState,
        new: FlowState,
        accepted: jax.Array,
        h: jax.Array,
        sigma: jax.Array,
        within: Callable[[jax.Array], PyTree],
        rule_state: PyTree,
    ) -> FlowState:
        """Saves what was asked for at the times within the step, which is `sigma` of h long."""
        offsets = self.inputs.offsets
        error = jnp.asarray(getattr(rule_state, "error", jnp.nan), h.dtype)

        def position(index: jax.Array) -> jax.Array:
            return ((offsets[index] - old.elapsed) + old.lost) / h

        def due(carry: Any) -> jax.Array:
            index = carry[0]
            ahead = index < len(offsets)
            return accepted & ahead & (position(jnp.minimum(index, len(offsets) - 1)) <= sigma)

        def put(carry: Any) -> Any:
            index, values, step_sizes, errors, cost = carry
            value, spent = self.save(offsets[index], within(position(index)))
            values = jax.tree.map(lambda slots, x: slots.at[index].set(x), values, value)
            return index + 1, values, step_sizes.at[index].set(h), errors.at[index].set(error), cost.plus(spent)

        carry = (old.saved, old.values, old.step_sizes, old.errors, new.cost)
        index, values, step_sizes, errors, cost = jax.lax.while_loop(due, put, carry)
        return new._replace(saved=index, values=values, step_sizes=step_sizes, errors=errors, cost=cost)


class _Stop(NamedTuple):
    """A condition that ends a flow."""

    result: FlowResult
    value: Callable[[_Flow, jax.Array, PyTree, PyTree], jax.Array]  # it is met where this reaches 0
    at_once: bool  # met wherever the value is not positive; else where it changes its sign


def _stops(setting: Setting, limits: dict[str, Any]) -> list[_Stop]:
    stops = []
    event = setting.event
    if event is not None:
        stops.append(_Stop(FlowResult.EVENT, lambda flow, t, p, k: event(flow.time(t), flow.view.whole(p)), False))
    if "min_loss" in limits:
        stops.append(_Stop(FlowResult.LOSS, lambda flow, t, p, k: flow.loss_field.loss(p) - limits["min_loss"], True))
    if "min_gradient_norm" in limits:
        stops.append(
            _Stop(FlowResult.GRADIENT_NORM, lambda flow, t, p, k: _tree.norm(k) - limits["min_gradient_norm"], True)
        )
    return stops


@functools.partial(jax.jit, static_argnums=0)
def start(setting: Setting, inputs: Inputs) -> FlowState:
    """The state at the first time."""
    return _Flow(setting, inputs).start()


@functools.partial(jax.jit, static_argnums=0)
def advance(setting: Setting, inputs: Inputs, state: FlowState, until: jax.Array) -> FlowState:
    """Attempts until the flow has ended, or `state.attempts` is `until`."""
    flow = _Flow(setting, inputs)

    def go_on(state: FlowState) -> jax.Array:
        return (state.result == FlowResult.RUNNING) & (state.attempts < until)

    return jax.lax.while_loop(go_on, flow.attempt, state)


def _first_step(field: VectorField, params: PyTree, k1: PyTree, rule: ErrorControl, error_order: int) -> jax.Array:
    """Hairer, Nørsett and Wanner's starting step (1993, II.4), from one gradient beside k1."""
    sizes = jax.tree.map(lambda x: rule.atol + rule.rtol * jnp.abs(x), params)
    count = max(sum(x.size for x in jax.tree.leaves(params)), 1)

    def size(tree: PyTree) -> jax.Array:
        return _tree.norm(jax.tree.map(jnp.divide, tree, sizes)) / math.sqrt(count)

    d0, d1 = size(params), size(k1)
    h0 = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * _tree.ratio(d0, d1))
    change = jax.tree.map(jnp.subtract, field(_tree.add_scaled(params, -h0, k1)), k1)
    d2 = size(change) / h0
    most = jnp.maximum(d1, d2)
    h1 = jnp.where(
        most <= 1e-15, jnp.maximum(1e-6, h0 * 1e-3), (0.01 / jnp.maximum(most, 1e-15)) ** (1 / (error_order + 1))
    )
    h = jnp.minimum(100 * h0, h1)
    return jnp.where(jnp.isfinite(h) & (h > 0), h, h0)


def _hermite(k1: PyTree, direction: PyTree, end: PyTree, sigma: jax.Array) -> PyTree:
    """D(σ) of the cubic through both ends with their slopes, θ(t + σh) = θ − h·D(σ)."""
    weights = (sigma * (1 - sigma) ** 2, sigma**2 * (3 - 2 * sigma), sigma**2 * (sigma - 1))
    total = _tree.scale(weights[0], k1)
    return _tree.add_scaled(_tree.add_scaled(total, weights[1], direction), weights[2], end)


def _empty(n: int, like: jax.Array) -> jax.Array:
    """Room for n values: NaN, or zero where there is none."""
    fill = jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
    return jnp.full((n, *like.shape), fill, like.dtype)
