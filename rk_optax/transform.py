"""Solvers as Optax gradient transformations: `scale_by_rk`, which emits g*, and `runge_kutta`, which applies h too."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rk_optax import _checks
from rk_optax._options import CheckedOptions, Options, with_options_of
from rk_optax.field import Capability, check_capabilities
from rk_optax.objective import Objective
from rk_optax.preconditioner import Preconditioner, no_preconditioner
from rk_optax.solver import Solver, as_solver, name_of, needs_of
from rk_optax.stage_batches import StageBatches
from rk_optax.step_size import LearningRate, StepSizeRule, as_rule
from rk_optax.tableau import ButcherTableau
from rk_optax.update import RungeKuttaState, Update


class RungeKutta(optax.GradientTransformationExtraArgs):
    """The Optax transformation that every factory of the package makes, and one call for loss and update together."""

    _whole: Update | None = None  # not a field: `_replace` leaves it behind

    @classmethod
    def of(cls, whole: Update) -> RungeKutta:
        """The transformation with this update."""
        made = cls(whole.init, whole.update)
        made._whole = whole
        return made

    def value_and_update(self, state: Any, params: Any, **data: Any) -> tuple[jax.Array, Any, RungeKuttaState]:
        """The loss at params and what `update` returns, without a gradient of yours.

        Stage 1 and the loss are evaluated here in one pass, and a step-size rule that compares losses does not evaluate
        the one at params again. `rk_optax.residual_euler` evaluates no gradient at all: both come from its rows. After
        `optax.chain` or another wrapper there is `update` alone.

        >>> import jax, jax.numpy as jnp, optax, rk_optax
        >>> loss_fn = rk_optax.LeastSquares(lambda w, x: w - x)
        >>> tx = rk_optax.residual_euler(loss_fn)
        >>> w, x = jnp.array([1.0, 3.0]), jnp.zeros(2)
        >>> loss, updates, state = jax.jit(tx.value_and_update)(tx.init(w), w, x=x)
        >>> float(loss), bool(loss_fn(optax.apply_updates(w, updates), x) < loss), int(state.cost.gradients)
        (5.0, True, 0)

        Args:
          state: what `init` or the last update returned.
          params: θ.
          **data: as for `update`. An aux of the loss (`has_aux`) is dropped.

        Returns:
          The loss at params, with the term of `l2`, evaluated in the stage dtype; the update; the new state.

        Raises:
          ValueError: there is no `loss_fn`, or `init` or `update` were replaced by others.
          TypeError, ValueError: as `update`.
        """
        if self._whole is None:
            raise ValueError(
                "value_and_update does not know of the init or update that _replace has put here. Call update, or the "
                "value_and_update of the optimizer as it was made."
            )
        return self._whole.value_and_update(state, params, **data)


def _transformation(
    loss_fn: Callable[..., Any] | None,
    learning_rate: LearningRate,
    solver: str | ButcherTableau | Solver,
    after: optax.GradientTransformation | None,
    applies_step_size: bool,
    options: CheckedOptions,
) -> RungeKutta:
    """Checks that the parts go together, and joins them."""
    method, rule = as_solver(solver), as_rule(learning_rate)
    rule.check(method, after is not None)
    scale = no_preconditioner() if options.preconditioner is None else options.preconditioner
    for part in (method, rule, scale):
        _checks.names(part.needs, f"needs of {type(part).__name__}")
    of_scale: frozenset[Capability] = frozenset({"diagonal_scale"})
    check_capabilities(method.needs & of_scale, scale.offers, f"preconditioner: {name_of(method)}")
    objective = Objective(
        loss_fn,
        grad_fn=options.grad_fn,
        has_aux=options.has_aux,
        argnames=options.argnames,
        needs=method.needs | rule.needs | scale.needs | needs_of(rule.wants),
        l2=options.l2,
        stage_batches=_stage_batches(options.stage_batches, options.batch_argnames, method, rule),
    )
    whole = Update(
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
        finite_derivatives=options.finite_derivatives,
    )
    return RungeKutta.of(whole)


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


@with_options_of(CheckedOptions)
def scale_by_rk(
    loss_fn: Callable[..., Any] | None,
    learning_rate: LearningRate,
    solver: str | ButcherTableau | Solver = "rk4",
    **options: Unpack[Options],
) -> RungeKutta:
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
        finite_derivatives: whether reverse mode through such a refused step is finite too, for hypergradients: the
          step is made twice, the second time with h = 0 where the first was not finite. Without it the derivative is
          NaN there, 0·NaN of the loss's own. Doubles the cost; a stage 1 that is not finite has no derivative.
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
    return _transformation(loss_fn, learning_rate, solver, None, False, CheckedOptions(**options))


@with_options_of(CheckedOptions)
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
) -> RungeKutta:
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
    between = _after_solver(momentum, nesterov, after)
    if weight_decay is not None:
        decay = optax.add_decayed_weights(_checks.number(weight_decay, "weight_decay", "not negative"))
        between = decay if between is None else optax.chain(between, decay)
    return _transformation(loss_fn, learning_rate, solver, between, True, CheckedOptions(**options))


def _after_solver(
    momentum: Any, nesterov: bool, after: optax.GradientTransformation | None
) -> optax.GradientTransformation | None:
    """The transformation between solver and step size."""
    nesterov = _checks.flag(nesterov, "nesterov")
    if momentum is None:
        if nesterov:
            raise ValueError("nesterov=True does nothing without momentum: pass momentum=0.9, say.")
        return None if after is None else _checked_after(after)
    if after is not None:
        raise ValueError(
            "momentum and after are two ways to say what stands between solver and step size; pass one: "
            "after=optax.chain(optax.trace(0.9), ...)."
        )
    return optax.trace(_checks.number(momentum, "momentum", "decay"), nesterov=nesterov)


def _checked_after(after: Any) -> optax.GradientTransformation:
    """It, if it is a transformation between solver and step size."""
    if isinstance(after, Preconditioner):
        raise TypeError("after is a Preconditioner, which acts on every stage: pass it as preconditioner=.")
    if isinstance(after, type) or not (hasattr(after, "init") and hasattr(after, "update")):
        raise TypeError(
            f"after must be an optax.GradientTransformation, got {type(after).__name__}"
            + (f" {after.__name__}: call it." if isinstance(after, type) else ".")
        )
    if _refuse_whole_optimizers(after, np.zeros(1)):
        return after

    def init(params: Any) -> Any:
        """It was made for a tree of its own, as optax.multi_transform is: now there is one."""
        _refuse_whole_optimizers(after, params)
        return after.init(params)

    return after._replace(init=init)


def _refuse_whole_optimizers(after: optax.GradientTransformation, params: Any) -> bool:
    """Raises where `after` has a minus sign of its own in a leaf like one of params; returns whether that was seen."""
    turns = _turns_round(after, jax.tree.map(lambda leaf: np.zeros((1,) * np.ndim(leaf), np.float32), params))
    if turns:
        raise ValueError(
            "after turns gradients into descent directions, as optax.adam and every whole optimizer does, and the step "
            "size does so once more: the loss would rise. Pass the part without sign and learning rate: "
            "after=optax.scale_by_adam(), optax.trace(0.9), ..."
        )
    return turns is not None


def _turns_round(after: optax.GradientTransformation, place: Any) -> bool | None:
    """Whether gradients of ±1, the same in each of some steps, come out of a leaf with the other sign, if it shows."""

    def probe(sign: float, with_keywords: bool) -> list[np.ndarray]:
        params = jax.tree.map(jnp.asarray, place)
        gradient, state = jax.tree.map(lambda leaf: jnp.full_like(leaf, sign), params), after.init(params)
        total = list(jax.tree.leaves(place))

        def loss(params: Any, obj_fn: Any = None) -> jax.Array:
            del obj_fn  # optax.contrib.sophia takes one, and a line search hands it on to value_fn
            # Far above the bounds that methods of Polyak's kind are given.
            return sum((jnp.sum(sign * leaf) for leaf in jax.tree.leaves(params)), jnp.full([], 1e3))

        known = {"value": loss(params), "grad": gradient, "value_fn": loss, "obj_fn": loss} if with_keywords else {}
        for count in range(10):  # the first may emit 0, as in a warm-up, or go uphill, as optax.contrib.sam does
            turned, state = optax.with_extra_args_support(after).update(gradient, state, params, **known)
            total = [a + np.asarray(b) for a, b in zip(total, jax.tree.leaves(turned), strict=True)]
            if count and any(leaf.any() for leaf in total):
                break
        return total

    with jax.ensure_compile_time_eval():
        for with_keywords in (True, False):
            try:
                up, down = probe(1.0, with_keywords), probe(-1.0, with_keywords)
            except Exception:  # other keywords, a tree of its own, or traced: nothing can be said
                continue
            return any(bool(((a < 0) & (b > 0)).all()) for a, b in zip(up, down, strict=True))
    return None


# Functions, and numbers that the program is compiled for; the others, such as rates, may be traced.
_NOT_HYPERPARAMETERS = frozenset({"loss_fn", "grad_fn", "mask", "stage_dtype"}) | {
    *("stages", "order", "damping", "max_stages", "max_iterations", "max_rows", "tolerance", "inertia")
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
