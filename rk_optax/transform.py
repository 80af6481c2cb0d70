"""One controlled solver step as an Optax gradient transformation."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack

import jax
import jax.numpy as jnp
import optax

from rk_optax import _checks, _tree
from rk_optax._arguments import near_miss
from rk_optax.field import Objective, StageBatches, check_kinds, check_like_params, promote
from rk_optax.preconditioner import Preconditioner, no_preconditioner
from rk_optax.solver import Cost, Solver, as_solver
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


def _transformation(
    loss_fn: Callable[..., Any] | None,
    learning_rate: LearningRate,
    solver: str | ButcherTableau | Solver,
    after: optax.GradientTransformation | None,
    emit: Callable[[PyTree, Any], PyTree],
    *,
    grad_fn: Callable[..., Any] | None = None,
    has_aux: bool = False,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    reuse_updates: bool = True,
    argnames: Sequence[str] | None = None,
    stage_dtype: Any = "float32",
    skip_nonfinite: bool = True,
    preconditioner: Preconditioner | None = None,
    l2: float | jax.Array | None = None,
    stage_batches: Literal["same", "fresh", "split"] = "same",
    batch_argnames: Sequence[str] = (),
    **unknown: Any,
) -> optax.GradientTransformationExtraArgs:
    for name in unknown:
        raise TypeError(f"Got an unexpected keyword argument {name!r}; {_hint(name)}")
    method = as_solver(solver)
    rule = as_rule(learning_rate)
    rule.check(method, after is not None)
    frozen_scale = no_preconditioner() if preconditioner is None else preconditioner
    if not isinstance(frozen_scale, Preconditioner):
        raise TypeError(
            f"preconditioner must be a Preconditioner, got {type(frozen_scale).__name__}; an Optax transformation "
            "becomes one with rk_optax.precondition_by(...)."
        )
    if method.needs_diagonal_scale and frozen_scale.diagonal is None:
        raise ValueError(
            f"preconditioner: the linear systems of {type(method).__name__} are symmetric only with a diagonal one, "
            "such as rk_optax.precondition_by_adagrad(); precondition_by(...) promises no diagonal."
        )
    objective = Objective(
        loss_fn,
        grad_fn=grad_fn,
        has_aux=has_aux,
        argnames=argnames,
        needs=method.needs | rule.needs | frozen_scale.needs,
        l2=None if l2 is None else _checks.number(l2, "l2", "not negative"),
        stage_batches=_stage_batches(stage_batches, batch_argnames, method, rule),
    )
    _check_stage_dtype(stage_dtype)
    between = optax.with_extra_args_support(optax.identity() if after is None else after)

    def init(params: PyTree) -> RungeKuttaState:
        _refuse_masked_nodes(params)
        moving = _tree.partition(mask, params).moving(params)

        def zero(dtype: Any) -> jax.Array:
            return jnp.zeros([], dtype)

        return RungeKuttaState(
            count=zero(jnp.int32),
            step_size=zero(_tree.default_float()),
            # Separate buffers: one shared by all fields could not be donated.
            cost=Cost(*(zero(jnp.int32) for _ in Cost._fields)),
            accepted=jnp.ones([], bool),
            reason=zero(jnp.int32),
            rejected=zero(jnp.int32),
            solver=method.init(moving),
            after=between.init(moving),
            rule=rule.init(),
            preconditioner=frozen_scale.init(moving),
        )

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, RungeKuttaState]:
        if params is None:
            raise ValueError(
                "params is None: a Runge–Kutta step evaluates the loss around params, so pass them: "
                "tx.update(grads, state, params, **data)."
            )
        _refuse_masked_nodes(params)
        _refuse_masked_nodes(updates)
        check_like_params(updates, params, "updates")
        params = jax.tree.map(jnp.asarray, params)
        part = _tree.partition(mask, params)
        moving = part.moving(params)
        _check_differentiable(moving)
        theta = promote(moving, stage_dtype)
        field = objective.bind(extra_args, params, part, stage_dtype)
        incoming = part.moving(updates)
        if reuse_updates:
            field = dataclasses.replace(field, rounding=_tree.unit_roundoff(incoming))
        check_kinds(incoming, theta, "updates")
        incoming = _tree.cast_like(incoming, theta)
        k1 = objective.with_l2(incoming, theta) if reuse_updates else field(theta)
        frozen, preconditioner_state, scale_cost = frozen_scale.update(k1, state.preconditioner, theta, field)
        diagonal = None if frozen_scale.diagonal is None else frozen_scale.diagonal(frozen)
        field = field.preconditioned(lambda gradient: frozen_scale.apply(gradient, frozen), diagonal)
        k1 = frozen_scale.apply(k1, frozen)

        h, rule_state, rule_cost = rule.propose(state.count, state.rule, field, theta, k1)
        step = method.step(field, theta, k1, h, state.solver, wants=rule.wants)
        h, step, rule_state, choice_cost = rule.choose(rule_state, field, theta, k1, h, step)
        direction, after_state = between.update(
            _tree.cast_like(step.direction, moving), state.after, moving, **extra_args
        )
        emitted = _tree.cast_like(emit(promote(direction, stage_dtype), h), moving)

        # What is emitted, because h·g* may overflow, and g* before an `after` that may clip an infinity.
        looked_at = (emitted, h) if after is None else (step.direction, emitted, h)
        finite = step.finite & _tree.all_finite(looked_at) if skip_nonfinite else jnp.asarray(True)
        usable = finite & step.solved
        candidate = promote(jax.tree.map(jnp.add, moving, emitted), stage_dtype)
        attempt = Attempt(method, field, theta, k1, candidate, jnp.asarray(h), step, usable)
        verdict = rule.judge(rule_state, attempt)
        accepted = usable & verdict.accepted
        reason = jnp.where(finite, jnp.where(step.solved, verdict.reason, Reason.NOT_SOLVED), Reason.NOT_FINITE)

        kept_of_refused = state.solver if step.refused_state is None else step.refused_state
        zeros = jax.tree.map(jnp.zeros_like, params)
        emitted, *kept = _tree.select(
            accepted,
            (emitted, step.state, after_state, preconditioner_state),
            (part.moving(zeros), kept_of_refused, state.after, state.preconditioner),
        )
        solver_state, after_state, preconditioner_state = kept
        return part.merge(emitted, zeros), RungeKuttaState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            step_size=jnp.asarray(h, state.step_size.dtype),
            cost=state.cost.plus(step.cost).plus(scale_cost).plus(rule_cost).plus(choice_cost).plus(verdict.cost),
            accepted=accepted,
            reason=reason.astype(jnp.int32),
            rejected=state.rejected + ~accepted,
            solver=solver_state,
            after=after_state,
            rule=verdict.state,
            preconditioner=preconditioner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _hint(unknown: str) -> str:
    """What to do about a keyword that no optimizer takes, or not this one."""
    of_ready_ones = ("momentum", "nesterov", "after", "weight_decay")
    if unknown in of_ready_ones:
        return "scale_by_rk emits g* alone: chain what is to follow after it, or use rk_optax.runge_kutta."
    known = [*Options.__annotations__, *of_ready_ones]
    near = near_miss(unknown, known)
    return f"did you mean {near!r}?" if near else f"what every optimizer takes: {', '.join(known)}."


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


def _check_stage_dtype(stage_dtype: Any) -> None:
    if stage_dtype is None:
        return
    try:
        floating = jnp.issubdtype(jnp.dtype(stage_dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"stage_dtype must be a real floating-point dtype or None, got {stage_dtype!r}.")
    if jnp.dtype(stage_dtype) == jnp.float64 and _tree.default_float() != jnp.float64:
        raise ValueError("stage_dtype float64 needs jax.config.update('jax_enable_x64', True) first.")


def _check_differentiable(moving: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(moving):
        if not _tree.is_inexact(leaf):
            raise TypeError(
                f"params{jax.tree_util.keystr(path)} has dtype {leaf.dtype}, which has no gradient; keep it fixed "
                "with the solver's mask= (False for that leaf)."
            )


def _refuse_masked_nodes(tree: PyTree) -> None:
    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    if any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked))):
        raise ValueError(
            "params hold optax.MaskedNode: optax.masked and optax.partition hand down a tree that the loss cannot "
            "read. Use the solver's own mask= instead: rk_optax.rk4(loss_fn, learning_rate, mask=mask) moves only "
            "the leaves marked True, at every stage."
        )


def with_options_of(source: Callable[..., Any]) -> Callable[[_F], _F]:
    """Shows the keywords of `source` where a function takes `**options` and passes them on.

    `help` reads the result, and so does `optax.inject_hyperparams`, which cannot see through `**options`.
    """
    shared = [p for p in inspect.signature(source).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        names = {p.name for p in own}
        parameters = [*own, *(p for p in shared if p.name not in names)]
        vars(function)["__signature__"] = signature.replace(parameters=parameters)
        return function

    return decorate


def _emit_direction(direction: PyTree, h: Any) -> PyTree:
    del h
    return direction


def _emit_update(direction: PyTree, h: Any) -> PyTree:
    return _tree.scale(-h, direction)


@with_options_of(_transformation)
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
    return _transformation(loss_fn, learning_rate, solver, None, _emit_direction, **options)


@with_options_of(_transformation)
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
    return _transformation(loss_fn, learning_rate, solver, between, _emit_update, **options)


def _between(
    momentum: Any, nesterov: bool, after: optax.GradientTransformation | None
) -> optax.GradientTransformation | None:
    """The transformation between solver and step size."""
    if momentum is None:
        if nesterov:
            raise ValueError("nesterov=True does nothing without momentum: pass momentum=0.9, say.")
        if isinstance(after, Preconditioner):
            raise TypeError("after is a Preconditioner, which acts on every stage: pass it as preconditioner=.")
        if after is not None and not (hasattr(after, "init") and hasattr(after, "update")):
            raise TypeError(f"after must be an optax.GradientTransformation, got {type(after).__name__}.")
        return after
    if after is not None:
        raise ValueError(
            "momentum and after are two ways to say what stands between solver and step size; pass one: "
            "after=optax.chain(optax.trace(0.9), ...)."
        )
    return optax.trace(_checks.number(momentum, "momentum", "decay"), nesterov=nesterov)


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
