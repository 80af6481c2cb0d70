"""One controlled solver step as an Optax gradient transformation."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack, cast

import jax
import jax.numpy as jnp
import optax

from rk_optax import _checks, _tree
from rk_optax._arguments import near_miss
from rk_optax._explanations import causes_explained
from rk_optax.field import Capability, Objective, VectorField, check_capabilities
from rk_optax.parameter_view import Mask, ParameterView, check_stage_dtype, promote, refuse_masked_nodes
from rk_optax.preconditioner import Preconditioner, no_preconditioner
from rk_optax.solver import Cost, Solver, Step, as_solver, name_of, saturating_sum
from rk_optax.stage_batches import StageBatches
from rk_optax.step_size import Attempt, LearningRate, Reason, StepSizeRule, as_rule
from rk_optax.tableau import ButcherTableau

PyTree = Any
_F = TypeVar("_F", bound=Callable[..., Any])


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


class Options(TypedDict, total=False):
    """Keywords that `scale_by_rk` and every ready optimizer share; `scale_by_rk` describes them."""

    grad_fn: Callable[..., Any] | None
    has_aux: bool
    mask: PyTree | Callable[[PyTree], PyTree] | None
    reuse_updates: bool
    argnames: Sequence[str] | None
    stage_dtype: Any
    skip_nonfinite: bool
    preconditioner: Preconditioner | None
    l2: float | jax.Array | None
    stage_batches: Literal["same", "fresh", "split"]
    batch_argnames: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Options:
    """`Options` with their defaults, checked as far as each can be alone."""

    grad_fn: Callable[..., Any] | None = None
    has_aux: bool = False
    mask: PyTree | Callable[[PyTree], PyTree] | None = None
    reuse_updates: bool = True
    argnames: Sequence[str] | None = None
    stage_dtype: Any = "float32"
    skip_nonfinite: bool = True
    preconditioner: Preconditioner | None = None
    l2: float | jax.Array | None = None
    stage_batches: Literal["same", "fresh", "split"] = "same"
    batch_argnames: Sequence[str] = ()

    def __post_init__(self):
        if not isinstance(self.preconditioner, Preconditioner | None):
            raise TypeError(
                f"preconditioner must be a Preconditioner, got {type(self.preconditioner).__name__}; an Optax "
                "transformation becomes one with rk_optax.precondition_by(...), and a class such as "
                "precondition_by_adagrad when it is called."
            )
        if self.l2 is not None:
            object.__setattr__(self, "l2", _checks.number(self.l2, "l2", "not negative"))
        check_stage_dtype(self.stage_dtype)


class _Prepared(NamedTuple):
    """What an update starts from."""

    view: ParameterView
    field: VectorField  # preconditioned
    k1: PyTree  # it at view.theta
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
class _Method:
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

    def init(self, params: PyTree) -> RungeKuttaState:
        refuse_masked_nodes(params)
        moving = _tree.partition(self.mask, params).moving(params)

        def zero(dtype: Any) -> jax.Array:
            return jnp.zeros([], dtype)

        return RungeKuttaState(
            count=zero(jnp.int32),
            step_size=zero(_tree.default_float()),
            time=zero(_tree.default_float()),
            time_rounding=zero(_tree.default_float()),
            # Separate buffers: one shared by all fields could not be donated.
            cost=Cost(*(zero(jnp.int32) for _ in Cost._fields)),
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
        if params is None:
            raise ValueError(
                "params is None: a Runge–Kutta step evaluates the loss around params, so pass them: "
                "tx.update(grads, state, params, **data)."
            )
        view = ParameterView.of(params, self.mask, self.stage_dtype)
        with causes_explained():
            prepared = self._prepare(updates, state, view, extra_args)
            attempted = self._attempt(prepared, state, extra_args)
        return self._commit(prepared, attempted, state)

    def _prepare(self, updates: PyTree, state: RungeKuttaState, view: ParameterView, extra_args: Any) -> _Prepared:
        """Binds the field to this update's data, and freezes its preconditioner with what stage 1 shows."""
        refuse_masked_nodes(updates)
        incoming = view.taken_in(updates, "updates")
        field = self.objective.bind(extra_args, view)
        if self.reuse_updates:
            k1 = field.with_l2(incoming, view.theta)
            field = dataclasses.replace(field, rounding=_tree.unit_roundoff(view.moving(updates)))
        else:
            k1 = field(view.theta)
        frozen, new, cost = self.preconditioner.update(k1, state.preconditioner, view.theta, field)
        field = field.preconditioned(
            lambda gradient: self.preconditioner.apply(gradient, frozen), self.preconditioner.diagonal(frozen)
        )
        return _Prepared(view, field, self.preconditioner.apply(k1, frozen), new, cost)

    def _attempt(self, prepared: _Prepared, state: RungeKuttaState, extra_args: Any) -> _Attempted:
        """Makes a step and judges it; what is judged is what would be emitted, momentum and all."""
        view, field, k1 = prepared.view, prepared.field, prepared.k1
        theta = view.theta
        h, rule_state, propose_cost = self.rule.propose(state.count, state.rule, field, theta, k1)
        proposed, h, sensible = h, *_sensible(h)
        step = self.solver.step(field, theta, k1, h, state.solver, wants=self.rule.wants)
        h, step, rule_state, choose_cost = self.rule.choose(rule_state, field, theta, k1, h, step)
        direction, after = self._apply_after(step.direction, state.after, theta, extra_args)
        emitted = view.handed_out(_tree.scale(-h, direction) if self.applies_step_size else direction)

        finite = jnp.asarray(True)
        if self.skip_nonfinite:
            # What is emitted, because h·g* may overflow, and g* before an `after` that may clip an infinity.
            finite = step.finite & _tree.all_finite((emitted, () if self.after is None else step.direction))
        usable = finite & step.solved
        attempt = Attempt(self.solver, field, theta, k1, view.after(emitted), jnp.asarray(h), step, usable)
        verdict = self.rule.judge(rule_state, attempt)
        reason = jnp.where(finite, jnp.where(step.solved, verdict.reason, Reason.NOT_SOLVED), Reason.NOT_FINITE)
        return _Attempted(
            jnp.asarray(jnp.where(sensible, h, proposed), state.step_size.dtype),
            step,
            emitted,
            after,
            # A stage 1 that is not finite says nothing about h; a later one does.
            _tree.select(_tree.all_finite(k1), verdict.state, state.rule),
            sensible & usable & verdict.accepted,
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
        time, time_rounding = _sum_with_rounding(state.time, state.time_rounding, attempted.step_size)
        kept_of_refused = state.solver if step.refused_state is None else step.refused_state
        emitted, solver, after, preconditioner, time, time_rounding = _tree.select(
            accepted,
            (attempted.emitted, step.state, attempted.after, prepared.preconditioner, time, time_rounding),
            (
                jax.tree.map(jnp.zeros_like, attempted.emitted),
                *(kept_of_refused, state.after, state.preconditioner, state.time, state.time_rounding),
            ),
        )
        return prepared.view.update(emitted), RungeKuttaState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            step_size=attempted.step_size,
            time=time,
            time_rounding=time_rounding,
            cost=state.cost.plus(prepared.cost).plus(step.cost).plus(attempted.cost),
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


def _sum_with_rounding(total: jax.Array, rounding: jax.Array, term: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`total + term`, and what rounding has taken from it so far, which the next sum makes good (Kahan's sum)."""
    term = term - rounding
    new = jnp.minimum(total + term, jnp.finfo(total.dtype).max)
    return new, (new - total) - term


def _transformation(
    loss_fn: Callable[..., Any] | None,
    learning_rate: LearningRate,
    solver: str | ButcherTableau | Solver,
    after: optax.GradientTransformation | None,
    applies_step_size: bool,
    options: _Options,
) -> optax.GradientTransformationExtraArgs:
    """Checks that the parts go together, and joins them."""
    method, rule = as_solver(solver), as_rule(learning_rate)
    rule.check(method, after is not None)
    scale = no_preconditioner() if options.preconditioner is None else options.preconditioner
    of_scale: frozenset[Capability] = frozenset({"diagonal_scale"})
    check_capabilities(method.needs & of_scale, scale.offers, f"preconditioner: {name_of(method)}")
    objective = Objective(
        loss_fn,
        grad_fn=options.grad_fn,
        has_aux=options.has_aux,
        argnames=options.argnames,
        needs=method.needs | rule.needs | scale.needs,
        l2=options.l2,
        stage_batches=_stage_batches(options.stage_batches, options.batch_argnames, method, rule),
    )
    whole = _Method(
        objective,
        method,
        rule,
        scale,
        None if after is None else optax.with_extra_args_support(after),
        applies_step_size,
        mask=options.mask,
        stage_dtype=options.stage_dtype,
        reuse_updates=options.reuse_updates,
        skip_nonfinite=options.skip_nonfinite,
    )
    return optax.GradientTransformationExtraArgs(whole.init, whole.update)


def _stage_batches(policy: Any, names: Sequence[str], method: Solver, rule: StepSizeRule) -> StageBatches:
    if policy == "same":
        if names:
            raise ValueError("batch_argnames does nothing with stage_batches='same'; pass 'fresh' or 'split' too.")
        return StageBatches()
    if method.gradients_per_step is None:
        raise ValueError(
            f"stage_batches={policy!r} needs a solver with a fixed number of gradients per step, which "
            f"{type(method).__name__} does not have."
        )
    if "curvature" in rule.wants:
        raise ValueError(
            f"dal(estimate='free') compares the first two stages, and with stage_batches={policy!r} they see different "
            "batches, so that it would measure their noise. Use estimate='product' or 'difference'."
        )
    return StageBatches.of(policy, names, method.gradients_per_step)


_OF_READY_ONES = ("momentum", "nesterov", "after", "weight_decay")


def with_options_of(source: Callable[..., Any]) -> Callable[[_F], _F]:
    """Shows the keywords of `source` where a function takes `**options` and passes them on; others are refused.

    `help` reads the result, and so does `optax.inject_hyperparams`, which cannot see through `**options`.
    """
    shared = [p for p in inspect.signature(source).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        parameters = [*own, *(p for p in shared if p.name not in names)]
        known = [p.name for p in parameters]

        @functools.wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            for name in keywords:
                if name not in known:
                    raise TypeError(f"Got an unexpected keyword argument {name!r}; {_hint(name, known)}")
            return function(*args, **keywords)

        vars(checked)["__signature__"] = signature.replace(parameters=parameters)
        return cast(_F, checked)

    return decorate


def _hint(unknown: str, known: Sequence[str]) -> str:
    """What to do about a keyword that no optimizer takes, or not this one."""
    if unknown in _OF_READY_ONES:
        return "scale_by_rk emits g* alone: chain what is to follow after it, or use rk_optax.runge_kutta."
    near = near_miss(unknown, known)
    shared = [*Options.__annotations__, *_OF_READY_ONES]
    return f"did you mean {near!r}?" if near else f"what every optimizer takes: {', '.join(shared)}."


@with_options_of(_Options)
def scale_by_rk(
    loss_fn: Callable[..., Any] | None,
    learning_rate: LearningRate,
    solver: str | ButcherTableau | Solver = "rk4",
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by a Runge–Kutta method's effective gradient g*, without applying the step size.

    Chain the step size, and whatever else, after it; the *same* rate on both sides makes the chain the method:

    >>> import jax, jax.numpy as jnp, optax, rk_optax
    >>> def loss_fn(w, x): return jnp.sum((w - x) ** 2)
    >>> tx = optax.chain(rk_optax.scale_by_rk(loss_fn, 0.1, "rk4"), optax.scale_by_learning_rate(0.1))
    >>> w, x = jnp.array(1.0), jnp.array(0.0)
    >>> updates, state = tx.update(jax.grad(loss_fn)(w, x), tx.init(w), w, x=x)
    >>> w = optax.apply_updates(w, updates)
    >>> print(f"{w:.4f}, exp(-0.2) = {jnp.exp(-0.2):.4f}")
    0.8187, exp(-0.2) = 0.8187

    A refused step emits zeros, through which a later `optax.trace` still moves the parameters; the ready optimizers
    (`rk_optax.rk4` and so on) run such a transformation inside, as `after=`, and do not have this gap.

    Args:
      loss_fn: `loss_fn(params, *data) -> scalar`. Data are passed to `update` by keyword and matched to the names in
        its signature; what `update` gets beside them is ignored, unless it looks like a misspelt data argument. May
        be None where `grad_fn` is given.
      learning_rate: the step size h > 0, in the units of a gradient-descent learning rate: a number, a JAX scalar
        (traced ones too) or an Optax schedule of the update count. h = 0 from a schedule is a step that stays.
      solver: a name in `rk_optax.TABLEAUS`, a `ButcherTableau` or a `Solver`.
      **options: shared by every optimizer of the package:
        grad_fn: `grad_fn(params, *data) -> gradient`, used for the later stages instead of `jax.grad(loss_fn)`: for
          micro-batches, `shard_map` with `pmean`, custom rules. It returns what you would pass as `updates`, so
          conjugated for complex leaves. `update` takes a `grad_fn=` too, for that update.
        has_aux: `loss_fn` returns `(loss, aux)` (and `grad_fn`, if given, `(gradient, aux)`); the stages discard
          aux: take it from your own evaluation at params, once per step.
        mask: as for `optax.masked`, a tree of booleans (or a prefix, or a function of params): leaves marked False
          keep their value at every stage and get zero updates.
        reuse_updates: whether the incoming updates are ∇loss at params on this batch and serve as stage 1. With
          False stage 1 is evaluated again, for one gradient more.
        argnames: names of the data arguments, for a loss whose signature cannot be read.
        stage_dtype: the least precision of stages, "float32" by default; a loss of bfloat16 parameters sees float32
          stages, since offsets below one ulp would vanish. None keeps the parameters' own dtypes.
        skip_nonfinite: whether a step with a non-finite stage, step size or update is refused: zero update, solver
          and momentum states restored, `state.accepted` False and `state.rejected` counted.
        preconditioner: a `Preconditioner`, frozen within each step and applied to every stage.
        l2: λ of a term (λ/2)‖θ‖² added to the loss, and so to the field at every stage; the incoming gradient is taken
          to be without it.
        stage_batches: "same" (one batch for all stages, one vector field per step), "fresh" (data in `batch_argnames`
          have a leading axis with a batch per stage) or "split" (they are cut into equal slices, one per stage).
          Except for "same", the incoming updates must be the gradient on the first stage's part, which
          `rk_optax.first_stage_batch` cuts out; the order of the method is kept only in the mean.
        batch_argnames: the data arguments that `stage_batches` cuts.

    Returns:
      A transformation whose `update(updates, state, params, **data)` returns g* in the dtypes of params. It costs
      the solver's gradients less the one that came in.

    Raises:
      TypeError, ValueError: at construction for bad arguments; at the first update for missing or misspelt data, a
        loss that is not a real scalar, params=None, or trees that do not fit one another.
    """
    if as_rule(learning_rate).adaptive:
        raise ValueError(
            "scale_by_rk emits g* for a step size that you apply after it, and an adaptive one cannot reach you. Use "
            "rk_optax.runge_kutta, or a ready optimizer, which apply it themselves."
        )
    return _transformation(loss_fn, learning_rate, solver, None, False, _Options(**options))


@with_options_of(_Options)
def runge_kutta(
    loss_fn: Callable[..., Any] | None,
    learning_rate: LearningRate,
    solver: str | ButcherTableau | Solver = "rk4",
    *,
    momentum: float | jax.Array | None = None,
    nesterov: bool = False,
    after: optax.GradientTransformation | None = None,
    weight_decay: float | jax.Array | None = None,
    **options: Unpack[Options],
) -> optax.GradientTransformationExtraArgs:
    """A ready optimizer for any solver: θ ← θ − h·(after(g*(θ, h)) + weight_decay·θ).

    >>> import jax, jax.numpy as jnp, optax, rk_optax
    >>> def loss_fn(w, x): return jnp.sum((w - x) ** 2)
    >>> tx = rk_optax.runge_kutta(loss_fn, 0.1, "ssprk3", momentum=0.9)
    >>> w, x = jnp.array(1.0), jnp.array(0.0)
    >>> updates, state = tx.update(jax.grad(loss_fn)(w, x), tx.init(w), w, x=x)
    >>> int(state.cost.gradients)
    3

    Args:
      loss_fn: as for `scale_by_rk`.
      learning_rate: as for `scale_by_rk`.
      solver: as for `scale_by_rk`.
      momentum: decay of a trace between solver and step size, in [0, 1): shorthand for `after=optax.trace(momentum)`.
      nesterov: whether that trace is Nesterov's.
      after: any Optax transformation of g*, run inside so that a refused step restores its state too.
      weight_decay: decoupled decay of the weights, as in `optax.adamw`; `l2` puts a decay inside the field instead.
      **options: as for `scale_by_rk`.

    Returns:
      A transformation that emits the update to add to params.

    Raises:
      ValueError: momentum outside [0, 1), both momentum and after, nesterov without momentum.
      TypeError, ValueError: as for `scale_by_rk`.
    """
    between = _between(momentum, nesterov, after)
    if weight_decay is not None:
        decay = optax.add_decayed_weights(_checks.number(weight_decay, "weight_decay", "not negative"))
        between = decay if between is None else optax.chain(between, decay)
    return _transformation(loss_fn, learning_rate, solver, between, True, _Options(**options))


def _between(
    momentum: Any, nesterov: bool, after: optax.GradientTransformation | None
) -> optax.GradientTransformation | None:
    """The transformation between solver and step size."""
    if momentum is None:
        if nesterov:
            raise ValueError("nesterov=True does nothing without momentum: pass momentum=0.9, say.")
        if after is not None:
            _check_after(after)
        return after
    if after is not None:
        raise ValueError(
            "momentum and after are two ways to say what stands between solver and step size; pass one: "
            "after=optax.chain(optax.trace(0.9), ...)."
        )
    return optax.trace(_checks.number(momentum, "momentum", "decay"), nesterov=nesterov)


def _check_after(after: Any) -> None:
    if isinstance(after, Preconditioner):
        raise TypeError("after is a Preconditioner, which acts on every stage: pass it as preconditioner=.")
    if not (hasattr(after, "init") and hasattr(after, "update")):
        raise TypeError(f"after must be an optax.GradientTransformation, got {type(after).__name__}.")
    if _turns_round(after):
        raise ValueError(
            "after turns gradients into descent directions, as optax.adam and every whole optimizer does, and the step "
            "size does so once more: the loss would rise. Pass the part without sign and learning rate: "
            "after=optax.scale_by_adam(), optax.trace(0.9), ..."
        )


def _turns_round(after: optax.GradientTransformation) -> bool:
    """Whether a gradient of ±1 comes out with the other sign, both times."""

    def probe(sign: float) -> jax.Array:
        gradient = jnp.full([1], sign)
        known = {"value": jnp.zeros([]), "grad": gradient, "value_fn": lambda params: jnp.sum(sign * params)}
        turned, _ = optax.with_extra_args_support(after).update(gradient, after.init(place), place, **known)
        return jnp.asarray(turned)

    with jax.ensure_compile_time_eval():
        place = jnp.zeros([1])
        try:
            return bool(((probe(1.0) < 0) & (probe(-1.0) > 0)).all())
        except Exception:  # made for a tree of its own or other keywords, or traced: nothing can be said
            return False


# Functions, and numbers that the program is compiled for; the others, such as rates, may be traced.
_NOT_HYPERPARAMETERS = frozenset({"loss_fn", "grad_fn", "mask", "stage_dtype"}) | {
    *("stages", "order", "damping", "max_stages", "max_iterations", "max_rows", "tolerance")
}


def inject_hyperparams(
    factory: Callable[..., optax.GradientTransformation], **options: Any
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`optax.inject_hyperparams` for the factories of this package, told that a loss is no schedule, no count a rate.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def loss_fn(w, x): return jnp.sum((w - x) ** 2)
    >>> tx = rk_optax.inject_hyperparams(rk_optax.rk4)(loss_fn, learning_rate=0.1)
    >>> state = tx.init(jnp.array(1.0))
    >>> rate = state.hyperparams["learning_rate"]
    >>> state.hyperparams["learning_rate"] = jnp.full_like(rate, 0.05)  # same dtype: no retrace

    Args:
      factory: `rk_optax.rk4`, `rk_optax.scale_by_rk` and so on.
      **options: `hyperparam_dtype` and further `static_args`, as Optax has them.

    Returns:
      A factory with the arguments of `factory`, whose numeric ones live in `state.hyperparams`.
    """
    static = _NOT_HYPERPARAMETERS & set(inspect.signature(factory).parameters)
    further = options.pop("static_args", ())
    static |= {further} if isinstance(further, str) else set(further)
    return optax.inject_hyperparams(factory, static_args=static, **options)
