"""One update of an optimizer: prepare the field, attempt a step, commit it or leave all as it was."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rk_optax import _tree
from rk_optax._explanations import causes_explained
from rk_optax.field import VectorField
from rk_optax.objective import Objective
from rk_optax.parameter_view import Mask, ParameterView, promote, refuse_masked_nodes
from rk_optax.preconditioner import Preconditioner, frozen_by
from rk_optax.solver import Cost, Solver, Step, fitting, saturating_sum, stepped
from rk_optax.step_size import Attempt, Reason, StepSizeRule, chosen, judged, proposed

PyTree = Any


class RungeKuttaState(NamedTuple):
    """State of `scale_by_rk` and of every ready optimizer.

    `rk_optax.Reason(int(state.reason)).message` says in words why the latest step was refused.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] # shape=(), int32: updates so far, refused ones included
    step_size: jax.Array  # shape=(), float: h of the latest update
    time: jax.Array  # shape=(), float: the time of the flow, which is the sum of h over the steps that were taken
    time_rounding: jax.Array  # shape=(), float: what rounding has taken from time (and added to, where negative)
    cost: Cost  # shape=(), int32 each: work so far, stage 1 included
    accepted: jax.Array  # shape=(), bool: whether the latest step was taken
    reason: jax.Array  # shape=(), int32: a `Reason`
    rejected: jax.Array  # shape=(), int32: refused updates so far
    solver: PyTree  # the solver's own
    after: PyTree  # of the transformation between solver and step size
    rule: PyTree  # of the step-size rule, with what it saw: `state.rule.ratio` of `dal`
    preconditioner: PyTree  # of the preconditioner


class _Prepared(NamedTuple):
    """What an update starts from."""

    view: ParameterView
    field: VectorField  # preconditioned
    k1: PyTree  # it at view.theta
    loss: jax.Array | None  # at view.theta, where stage 1 was evaluated with it
    preconditioner: PyTree  # its state, if the step is taken
    cost: Cost


class _Attempted(NamedTuple):
    """A step that has been made and judged, and that is not taken yet."""

    step_size: jax.Array
    step: Step
    emitted: PyTree  # of the leaves that move, in the dtypes of params
    after: PyTree  # its state, if the step is taken
    rule: PyTree  # its state, whether the step is taken or not
    accepted: jax.Array
    reason: jax.Array
    cost: Cost  # of the rule


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """All that a transformation is made of, and the three parts of its update: prepare, attempt, commit."""

    objective: Objective
    solver: Solver
    rule: StepSizeRule
    preconditioner: Preconditioner
    after: optax.GradientTransformationExtraArgs | None
    applies_step_size: bool  # emits −h·g*, not g*
    mask: Mask = None
    stage_dtype: Any = "float32"
    reuse_updates: bool = True
    skip_nonfinite: bool = True
    finite_derivatives: bool = False

    def init(self, params: PyTree) -> RungeKuttaState:
        """The state before the first update; `params` may be abstract."""
        refuse_masked_nodes(params)
        moving = _tree.partition(self.mask, params).moving(params)

        def zero(dtype: Any) -> jax.Array:
            return jnp.zeros([], dtype)

        return RungeKuttaState(
            count=zero(jnp.int32),
            step_size=zero(_tree.default_float()),
            time=zero(_tree.default_float()),
            time_rounding=zero(_tree.default_float()),
            cost=Cost.zeros(),
            accepted=jnp.ones([], bool),
            reason=zero(jnp.int32),
            rejected=zero(jnp.int32),
            solver=self.solver.init(moving),
            after=optax.EmptyState() if self.after is None else self.after.init(moving),
            rule=self.rule.init(moving),
            preconditioner=self.preconditioner.init(moving),
        )

    def update(
        self, updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, RungeKuttaState]:
        """The update to add to params, in their dtypes, and the new state."""
        return self._updated(updates, state, params, extra_args)[1:]

    def value_and_update(self, state: Any, params: PyTree, **data: Any) -> tuple[jax.Array, PyTree, RungeKuttaState]:
        """See `rk_optax.RungeKutta.value_and_update`."""
        loss, update, state = self._updated(None, state, params, data)
        assert loss is not None  # for the type checker
        return loss, update, state

    def _updated(
        self, updates: PyTree | None, state: Any, params: PyTree | None, extra_args: Any
    ) -> tuple[jax.Array | None, PyTree, RungeKuttaState]:
        """The loss where stage 1 was evaluated here, because `updates` is None; the update and the new state."""
        if params is None:
            raise ValueError(
                "params is None: a Runge–Kutta step evaluates the loss around params, so pass them: "
                "tx.update(grads, state, params, **data)."
            )
        view = ParameterView.of(params, self.mask, self.stage_dtype)
        with causes_explained():
            prepared = self._prepare(updates, state, view, extra_args)
            attempted = self._attempt(prepared, state, extra_args)
            if self.finite_derivatives:
                attempted = self._attempt_again(attempted, prepared, state, extra_args)
        return prepared.loss, *self._commit(prepared, attempted, state)

    def _prepare(
        self, updates: PyTree | None, state: RungeKuttaState, view: ParameterView, extra_args: Any
    ) -> _Prepared:
        """Binds the field to this update's data, and freezes its preconditioner with what stage 1 shows."""
        incoming, loss, beside = None, None, Cost()
        if updates is not None:
            refuse_masked_nodes(updates)
            incoming = view.taken_in(updates, "updates")
        field = self.objective.bind(extra_args, view, with_loss=updates is None)
        field = self.rule.seen(field, view.theta)
        if updates is None:
            k1, field = self.solver.start(field, view.theta, wants=self.rule.wants)
            loss = field.loss(view.theta)
            beside = Cost(losses=0 if field.knows_rows(view.theta) else field.losses_beside)
        elif self.reuse_updates:
            k1 = field.with_l2(incoming, view.theta)
            field = dataclasses.replace(field, rounding=_tree.unit_roundoff(view.moving(updates)))
        else:
            k1 = field(view.theta)
        frozen, new, cost = frozen_by(self.preconditioner, k1, state.preconditioner, view.theta, field)
        cost = beside.plus(cost)
        field = field.preconditioned(
            lambda gradient: self.preconditioner.apply(gradient, frozen), self.preconditioner.diagonal(frozen)
        )
        field = dataclasses.replace(field, landing=lambda change: view.after(view.handed_out(change)))
        return _Prepared(view, field, self.preconditioner.apply(k1, frozen), loss, new, cost)

    def _attempt_again(
        self, first: _Attempted, prepared: _Prepared, state: RungeKuttaState, extra_args: Any
    ) -> _Attempted:
        """The same attempt, but with h = 0, where all is finite, if the first one was not finite.

        No derivative passes through the first, of which only a boolean is used. Its stages would have 0·NaN for theirs.
        """
        again = self._attempt(prepared, state, extra_args, finite=first.reason != Reason.NOT_FINITE)
        spent = first.step.cost.beyond_k1()
        if prepared.field.knows_rows(prepared.view.theta):
            spent = spent._replace(rows=0)  # formed once for both
        return again._replace(cost=again.cost.plus(spent).plus(first.cost))

    def _attempt(
        self, prepared: _Prepared, state: RungeKuttaState, extra_args: Any, finite: jax.Array | None = None
    ) -> _Attempted:
        """Makes a step and judges it; what is judged is what would be emitted, momentum and all.

        Where it is known not to be `finite`, it is made with h = 0 and refused.
        """
        view, field, k1 = prepared.view, prepared.field, prepared.k1
        theta = view.theta
        h, rule_state, propose_cost = proposed(self.rule, state.count, state.rule, field, theta, k1)
        asked, h, sensible = h, *_sensible(h)
        known_finite = jnp.asarray(True) if finite is None else finite
        made = h if finite is None else jnp.where(finite, h, 0)
        step = stepped(self.solver, field, theta, k1, made, state.solver, self.rule.wants)
        taken, step, rule_state, choose_cost = chosen(self.rule, rule_state, field, theta, k1, made, step)
        step = fitting(self.solver, step, k1, state.solver)
        h = taken if finite is None else jnp.where(finite, taken, h)
        direction, after = self._apply_after(step.direction, state.after, theta, extra_args)
        emitted = view.handed_out(_tree.scale(-h, direction) if self.applies_step_size else direction)

        finite, begun = known_finite, _tree.all_finite(k1)
        if self.skip_nonfinite:
            # What is emitted, because h·g* may overflow, and g* before an `after` that may clip an infinity.
            # Stage 1 as well: a step on fewer points is not made of it.
            shown = emitted if self.after is None else (emitted, step.direction)
            finite = finite & begun & step.finite & _tree.all_finite(shown)
        usable = finite & step.solved
        attempt = Attempt(self.solver, field, theta, k1, view.after(emitted), jnp.asarray(h), step, usable)
        verdict, accepted, reason = judged(self.rule, rule_state, attempt, finite)
        return _Attempted(
            jnp.asarray(jnp.where(sensible, h, asked), state.step_size.dtype),
            step,
            emitted,
            after,
            # A stage 1 that is not finite says nothing about h; a later one does.
            _tree.select(begun, verdict.state, state.rule),
            sensible & accepted,
            jnp.where(sensible, reason, Reason.BAD_STEP_SIZE).astype(jnp.int32),
            propose_cost.plus(choose_cost).plus(verdict.cost),
        )

    def _apply_after(self, direction: PyTree, state: PyTree, theta: PyTree, extra_args: Any) -> tuple[PyTree, PyTree]:
        """`after` of g*, in the stage dtype, from which only its state is cast back to what it was."""
        if self.after is None:
            return direction, state
        state = jax.tree.map(jnp.asarray, state)
        try:
            direction, new = self.after.update(direction, promote(state, self.stage_dtype), theta, **extra_args)
        except TypeError as error:
            if "required keyword-only argument" in str(error):  # as optax.contrib.reduce_on_plateau has one, value
                error.add_note(
                    "It is a keyword that the transformation given as after= takes: pass it to update beside the "
                    "loss's data, as in tx.update(grads, state, params, value=loss, x=x)."
                )
            raise
        return _tree.cast_like(direction, theta), _tree.cast_like(new, state)

    def _commit(
        self, prepared: _Prepared, attempted: _Attempted, state: RungeKuttaState
    ) -> tuple[PyTree, RungeKuttaState]:
        """Takes the step, or leaves all but the rule as it was."""
        step, accepted = attempted.step, attempted.accepted
        time, time_rounding = _tree.sum_with_rounding(state.time, state.time_rounding, attempted.step_size)
        emitted, solver, after, preconditioner, time, time_rounding = _tree.select(
            accepted,
            (attempted.emitted, step.state, attempted.after, prepared.preconditioner, time, time_rounding),
            (
                jax.tree.map(jnp.zeros_like, attempted.emitted),
                *(
                    step.state_if_refused(state.solver),
                    state.after,
                    state.preconditioner,
                    state.time,
                    state.time_rounding,
                ),
            ),
        )
        return prepared.view.update(emitted), RungeKuttaState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            step_size=attempted.step_size,
            time=time,
            time_rounding=time_rounding,
            cost=state.cost.plus(prepared.cost.plus(step.cost).plus(attempted.cost)),
            accepted=accepted,
            reason=attempted.reason,
            rejected=saturating_sum(state.rejected, ~accepted),
            solver=solver,
            after=after,
            rule=attempted.rule,
            preconditioner=preconditioner,
        )


def _sensible(h: Any) -> tuple[Any, jax.Array]:
    """What to make the step with, 0 in place of an h that is negative or not finite, and whether h is neither."""
    sensible = jnp.isfinite(h) & (h >= 0)
    # A Python number, which has been checked, stays one, so that each leaf sees it in full precision.
    return jnp.where(sensible, h, 0) if isinstance(h, jax.Array) else h, sensible
