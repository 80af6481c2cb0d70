"""The gradient flow itself: θ(t), and what you ask of it, at the times you ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rk_optax import _checks, _tree
from rk_optax._flow import FlowResult, FlowState, Inputs, Setting, advance, start
from rk_optax.control import error_control
from rk_optax.field import VectorField
from rk_optax.micro_batches import MicroBatches
from rk_optax.objective import Objective
from rk_optax.parameter_view import Mask, ParameterView, check_like_params, check_stage_dtype, promote
from rk_optax.solver import Cost, Solver, as_solver
from rk_optax.step_size import LearningRate, StepSizeRule, as_rule
from rk_optax.tableau import ButcherTableau

PyTree = Any
Functional = Callable[[jax.Array, PyTree], PyTree]
Save = Literal["params", "loss", "gradient_norm"] | Functional

_RTOL, _ATOL = 1e-5, 1e-8
_UNBOUNDED = np.iinfo(np.int32).max


class Flow(NamedTuple):
    """A solution of `gradient_flow`, whole or so far."""

    times: jax.Array  # shape=(n,): ts, NaN where the flow ended before
    values: PyTree  # what `save` asked for, each leaf with a leading axis of length n; NaN (or zero) likewise
    step_sizes: jax.Array  # shape=(n,): h of the step in which each time lies, NaN for the first
    errors: jax.Array  # shape=(n,): the scaled error estimate of that step, at most 1; NaN where the rule takes none
    time: jax.Array  # shape=(): how far the flow came; the event's time where one ended it
    params: PyTree  # θ there, like params, low precision promoted to the stage dtype
    saved: jax.Array  # shape=(), int32: how many of the times were reached
    accepted: jax.Array  # shape=(), int32: steps
    refused: jax.Array  # shape=(), int32: steps
    cost: Cost  # shape=(), int32 each: work, of stop conditions and of what `save` names included
    result: jax.Array  # shape=(), int32: a `FlowResult`
    state: FlowState  # to go on from


def gradient_flow(
    loss_fn: Callable[..., Any] | None,
    params: PyTree,
    ts: ArrayLike,
    *,
    solver: str | ButcherTableau | Solver = "tsit5",
    rtol: float | None = None,
    atol: float | None = None,
    step_size: LearningRate | None = None,
    save: Save | Mapping[str, Save] = "params",
    event: Callable[[jax.Array, PyTree], jax.Array] | None = None,
    min_loss: float | jax.Array | None = None,
    min_gradient_norm: float | jax.Array | None = None,
    max_gradients: int | None = None,
    max_steps: int | None = 1_000_000,
    data: Mapping[str, Any] | None = None,
    batches: int | None = None,
    batch_argnames: Sequence[str] | str | None = None,
    direction: Literal["forward", "backward"] | None = None,
    preconditioner: PyTree | None = None,
    mask: Mask = None,
    field: Callable[[VectorField], VectorField] | None = None,
    grad_fn: Callable[..., Any] | None = None,
    has_aux: bool = False,
    argnames: Sequence[str] | None = None,
    stage_dtype: Any = "float32",
    progress: Callable[[Flow], Any] | None = None,
    steps_per_call: int | None = None,
    state: FlowState | None = None,
) -> Flow:
    """Integrates dθ/dt = −P∇L(θ) from θ(ts[0]) = params and gives what `save` asks for at the times `ts`.

    Steps are as long as the tolerance lets them be: the times are reached by dense output (the pair's own interpolant
    for "tsit5" and "dopri5", order 4; the cubic Hermite interpolant otherwise), and only the last step is cut, to end
    on ts[-1].

    >>> import jax.numpy as jnp, rk_optax
    >>> def loss_fn(w, x): return 0.5 * jnp.sum(x * w ** 2)
    >>> flow = rk_optax.gradient_flow(
    ...     loss_fn, jnp.array([1.0, 2.0]), [0.0, 1.0, 3.0], data={"x": jnp.array([1.0, 0.5])},
    ...     save={"w": "params", "loss": "loss"})
    >>> [f"{x:.4f}" for x in flow.values["w"][1]]  # exp(-1) and 2 exp(-1/2)
    ['0.3679', '1.2131']
    >>> rk_optax.FlowResult(int(flow.result)).name, int(flow.refused)
    ('REACHED_END', 0)

    Args:
      loss_fn: `loss_fn(params, *data) -> scalar`; None where `grad_fn` is given.
      params: θ at ts[0], a pytree of floating-point leaves, real or complex.
      ts: times, shape (n,), n ≥ 2, strictly increasing or strictly decreasing; the first is that of `params`. In the
        units of a learning rate: gradient descent with rate h moves time by about h a step.
      solver: a name, a tableau or a `Solver`, as for `rk_optax.runge_kutta`; for stiff flows `Stabilized("rkc2")`,
        `Ros2()` and "sdirk3" (tolerances), `Stabilized("rkc1")` and "radau3" (`step_size`).
      rtol: relative tolerance of a step, positive; by default 1e-5. The errors of the steps add up: over a network's
        loss to some ten tolerances, in diffrax too (`benchmarks/flow.py`).
      atol: absolute tolerance of a step, positive, in the units of params; by default 1e-8. The controller is that of
        `rk_optax.error_control`; the first step is found by one gradient.
      step_size: instead of tolerances, a fixed h, a schedule of the steps, or a rule such as `rk_optax.dal(...)` or
        `rk_optax.descent_control()`.
      save: "params", "loss" or "gradient_norm", a function `save(t, params) -> pytree`, or a dict of these. A
        functional keeps memory flat where n copies of params would not fit.
      event: `event(t, params) -> real scalar`; the flow ends where it changes its sign, located on the dense output to
        a rounding error of the step. What lies between two steps' ends and changes sign twice is not seen.
      min_loss: the flow ends where the loss falls to this; costs a loss a step.
      min_gradient_norm: the flow ends where ‖P∇L‖ falls to this.
      max_gradients: the flow ends once this many gradients are spent.
      max_steps: the flow ends after this many attempted steps; None for no bound.
      data: the loss's data by name; `rk_optax.HostRows` for what does not fit into the device's memory.
      batches: rows of a micro-batch, for data that are too many at once; the loss must be a mean over the rows. The
        field is the exact mean over all rows, whatever the last micro-batch's size.
      batch_argnames: the data arguments whose first axis runs over the rows; by default all.
      direction: "forward" or "backward" in time; by default what `ts` says. Needed where `ts` is traced and runs
        backward. A solver that needs residuals or a Gauss–Newton matrix goes forward only.
      preconditioner: a constant diagonal P > 0, like params or a prefix of it; by default the identity.
      mask: True for leaves that move, as for `rk_optax.runge_kutta`.
      field: another flow than the gradient flow, as a function of its field, such as
        `rk_optax.implicit_gradient_regularization(h)` or `rk_optax.principal_flow(h)`.
      grad_fn: `grad_fn(params, *data) -> gradient`, instead of that of the loss.
      has_aux: `loss_fn` returns `(loss, aux)`.
      argnames: names of the data arguments, for a loss whose signature cannot be read.
      stage_dtype: the least precision of θ and of what the loss sees.
      progress: called with the `Flow` so far after every `steps_per_call` attempts; it may print, or store
        `flow.state`. The numbers are the same with and without it: both run the same program.
      steps_per_call: attempts of one compiled call, where there is `progress`; by default 100.
      state: `flow.state` of an earlier call with the same arguments, to go on from there, bit for bit as if it had not
        stopped. Only budgets and stop conditions may have changed.

    Returns:
      A `Flow`. Under `jit` everything is traced, and `progress` cannot be used.

    Raises:
      TypeError, ValueError: times that are not monotone, tolerances that are not positive, a tolerance for a solver
        without an error estimate, data that are empty, missing or of different lengths, an event that is no real
        scalar, and whatever `rk_optax.runge_kutta` refuses.

    Cost: for tsit5 and dopri5 6 gradients a step, since the last stage is the next first one; for other methods their
    stages, where the field at the end of a step serves as stage 1 of the next. Refused steps keep their stage 1.
    """
    method = as_solver(solver)
    rule = _rule(method, rtol, atol, step_size)
    times, offsets, backward = _times(ts, direction)
    if backward and method.needs & {"gauss_newton", "rows"}:
        raise ValueError(
            f"direction: {type(method).__name__} needs the structure of the loss, and backward in time the flow is "
            "that of −loss, which has none. Use an explicit solver, such as 'tsit5'."
        )
    check_stage_dtype(stage_dtype)
    view = ParameterView.of(params, mask, stage_dtype)
    params, part = view.params, view.part
    # Any preconditioner here is a diagonal; one set of data serves all steps, so noise would be the same in all.
    needs = (method.needs | rule.needs | {"deterministic"}) - {"diagonal_scale"}
    watches_loss = min_loss is not None or "loss" in _names(save)
    objective: tuple[tuple[str, Any], ...] = (
        ("loss_fn", loss_fn),
        ("grad_fn", grad_fn),
        ("has_aux", has_aux),
        ("argnames", None if argnames is None else tuple(argnames)),
        ("needs", needs | {"loss"} if watches_loss else needs),
    )
    Objective(**dict[str, Any](objective))
    cut = MicroBatches.of(batches, batch_argnames)
    data = {} if data is None else dict(data)
    cut.rows(data)
    limits: dict[str, Any] = {
        "max_gradients": _UNBOUNDED if max_gradients is None else _checks.count(max_gradients, "max_gradients"),
        "max_steps": _UNBOUNDED if max_steps is None else _checks.count(max_steps, "max_steps"),
    }
    for name, limit in (("min_loss", min_loss), ("min_gradient_norm", min_gradient_norm)):
        if limit is not None:
            limits[name] = limit if name == "min_loss" else _checks.number(limit, name, "not negative")
    setting = Setting(
        objective=objective,
        solver=method,
        rule=rule,
        automatic_first_step=step_size is None,
        backward=backward,
        save=tuple(save.items()) if isinstance(save, Mapping) else save,
        event=event,
        modify=field,
        batches=cut,
        part=part,
        stage_dtype=stage_dtype,
    )
    inputs = Inputs(params, times, offsets, data, _scale(preconditioner, params, part, stage_dtype), limits)
    _check_functions(setting, save, event, times, params)
    current: FlowState
    if state is None:
        current = start(setting, inputs)
    else:
        check_like_params(state.params, part.moving(params), "state.params")
        # What ended it may no longer be a reason; the program finds out.
        ended = (FlowResult.REACHED_END, FlowResult.REFUSED)
        over = jnp.isin(state.result, jnp.array(ended))
        current = state._replace(result=jnp.where(over, state.result, FlowResult.RUNNING).astype(jnp.int32))
    if progress is None:
        return _flow(setting, inputs, advance(setting, inputs, current, jnp.asarray(_UNBOUNDED, jnp.int32)))
    calls = 100 if steps_per_call is None else _checks.count(steps_per_call, "steps_per_call")
    flow = _flow(setting, inputs, current)
    while int(flow.result) == FlowResult.RUNNING:
        current = advance(setting, inputs, current, current.attempts + calls)
        flow = _flow(setting, inputs, current)
        progress(flow)
    return flow


def _flow(setting: Setting, inputs: Inputs, state: FlowState) -> Flow:
    reached = jnp.arange(len(inputs.times)) < state.saved
    elapsed = -state.elapsed if setting.backward else state.elapsed
    whole = jax.tree.map(jnp.asarray, setting.part.merge(state.params, inputs.params))
    return Flow(
        times=jnp.where(reached, inputs.times, jnp.nan),
        values=state.values,
        step_sizes=state.step_sizes,
        errors=state.errors,
        time=inputs.times[0] + elapsed,
        params=whole,
        saved=state.saved,
        accepted=state.attempts - state.refused,
        refused=state.refused,
        cost=state.cost,
        result=state.result,
        state=state,
    )


def _rule(method: Solver, rtol: float | None, atol: float | None, step_size: LearningRate | None) -> StepSizeRule:
    if step_size is not None:
        if rtol is not None or atol is not None:
            raise ValueError("step_size and tolerances are two ways to choose the steps: pass one of them.")
        rule = as_rule(step_size)
        rule.check(method)
        return rule
    relative = _checks.number(_RTOL if rtol is None else rtol, "rtol", "positive")
    absolute = _checks.number(_ATOL if atol is None else atol, "atol", "positive")
    if "error" not in method.offers:
        raise ValueError(
            f"rtol and atol need an error estimate, and this solver ({method}) has none. Pass step_size=, a fixed h or "
            "a rule such as rk_optax.descent_control(), or use a solver that has one, such as 'tsit5' or 'sdirk3'."
        )
    return error_control(relative, absolute, initial_step_size=1.0, min_step_size=1e-30)


def _times(ts: ArrayLike, direction: str | None) -> tuple[jax.Array, jax.Array, bool]:
    """The times, their distances from the first, and whether they run backward."""
    if direction not in (None, "forward", "backward"):
        raise ValueError(f"direction must be 'forward' or 'backward', got {direction!r}.")
    if isinstance(ts, jax.core.Tracer):
        if ts.ndim != 1 or len(ts) < 2:
            raise ValueError(f"ts must have shape (n,) with at least two times, got shape {ts.shape}.")
        times = ts.astype(_tree.default_float())
        return times, jnp.abs(times - times[0]), direction == "backward"
    values = np.asarray(ts, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"ts must have shape (n,) with at least two times, got shape {values.shape}.")
    # In double precision before they are rounded: late times may be close together.
    changes = np.diff(values)
    if not np.isfinite(values).all() or not ((changes > 0).all() or (changes < 0).all()):
        raise ValueError("ts must be finite and strictly increasing, or strictly decreasing to go backward in time.")
    backward = bool(changes[0] < 0)
    if direction is not None and backward != (direction == "backward"):
        raise ValueError(f"direction is {direction!r}, and ts run the other way.")
    dtype = _tree.default_float()
    return jnp.asarray(values, dtype), jnp.asarray(np.abs(values - values[0]), dtype), backward


def _scale(preconditioner: PyTree | None, params: PyTree, part: _tree.Partition, stage_dtype: Any) -> PyTree | None:
    """P like the moving leaves."""
    if preconditioner is None:
        return None
    try:
        spread = jax.tree.map(
            lambda p, sub: jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(p), x.shape), sub),
            preconditioner,
            params,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"preconditioner must be a diagonal like params, or a prefix of it: {error}") from None
    for leaf in jax.tree.leaves(spread):
        if not isinstance(leaf, jax.core.Tracer) and not bool(jnp.all((leaf > 0) & jnp.isfinite(leaf))):
            raise ValueError("preconditioner must be positive and finite in every entry.")
    like = promote(part.moving(params), stage_dtype)
    return jax.tree.map(lambda p, x: p.astype(_tree.real_dtype(x)), part.moving(spread), like)


def _names(save: Any) -> list[Any]:
    return list(save.values()) if isinstance(save, Mapping) else [save]


def _check_functions(setting: Setting, save: Any, event: Any, times: jax.Array, params: PyTree) -> None:
    for what in _names(save):
        if not callable(what) and what not in ("params", "loss", "gradient_norm"):
            raise ValueError(
                "save must be 'params', 'loss', 'gradient_norm', a function save(t, params), or a dict of these; got "
                f"{what!r}."
            )
    if event is None:
        return
    if not callable(event):
        raise TypeError(f"event must be a function event(t, params) -> real scalar, got {type(event).__name__}.")
    shape = jax.eval_shape(event, times[0], params)
    if getattr(shape, "shape", None) != () or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise ValueError(
            f"event must return a real floating-point scalar, which changes its sign where the flow is to end; got "
            f"{shape}."
        )
