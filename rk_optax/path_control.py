"""The step-size rule that chooses among all the steps of one factorisation, by the loss at their ends."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _precision, _tree
from rk_optax._anderson import History, anderson
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost, Factored, Path, Quantity, Step, saturating_sum, underivable
from rk_optax.step_size import Attempt, Choice, KeptStepSize, Reason, Verdict

PyTree = Any
Number = float | jax.Array
_BEYOND = 0.3  # of the h at which rounding hides all smaller eigenvalues than 1/h: from here on they are noisy


class PathControlState(NamedTuple):
    """State of `PathControl`."""

    next_step_size: jax.Array  # shape=(), float: about which the next trial steps lie; 0 before the first
    loss: jax.Array  # shape=(), float: at the params that the latest update left, on its data; ∞ before the first alone
    fall: jax.Array  # shape=(), float: of the loss, by the latest step; negative where it would have risen
    changing: jax.Array  # shape=(), int32: 0 while the data stay; 2 at an update whose data are new, then less by one
    divisor: jax.Array  # shape=(), float: of h at the next refusal; doubles with each in a row
    before: jax.Array  # shape=(), float: the loss at the params of the latest update
    predicted: jax.Array  # shape=(), float: the fall that the quadratic model foretold for its linearly implicit step
    level: jax.Array  # shape=(), int32: of the next update: 0 for the fewest points, the last for all
    subset_fall: jax.Array  # shape=(), float: logarithm of the subset's loss before the latest step over that after it
    refused: jax.Array  # shape=(), int32: steps in a row that no trial of the same points was worth
    failures: jax.Array  # shape=(), int32: how often fewer points did not serve, of the data that have stayed since
    wait: jax.Array  # shape=(), int32: updates until fewer points are tried again
    precise: jax.Array  # shape=(), bool: whether the next step on all points is by singular values


class _Chosen(NamedTuple):
    """One of the steps of a path."""

    step_size: jax.Array
    direction: PyTree
    fall: jax.Array  # of the loss on the points of the path
    before: jax.Array  # that loss
    predicted: jax.Array  # its fall by the linearly implicit step of the same h, by the quadratic model
    beyond: jax.Array  # h over the longest that a Gram matrix resolves
    cost: Cost
    solver: PyTree  # its state


@dataclasses.dataclass(frozen=True)
class PathControl(KeptStepSize):
    """Tries the steps of many h from one factorisation, and takes the best, or a longer one that is nearly as good.

    The trial steps have `probes` step sizes, log-spaced from h/width to h·width about the latest h. Those of least
    squares are then corrected: with the same factor, each correction is one more iteration of simplified Newton from
    the linearly implicit step towards backward Euler, at one evaluation of the residuals. Anderson's acceleration
    (1965), by the last three, makes the iterations of longer h converge. For each h the iterate of least loss counts;
    of all h the largest is taken whose fall of the loss is at least `boldness` of the best. A step is taken only if the
    loss does not rise; where momentum, `after` or the rounding of params has made one rise whose trial fell, the next
    trials are all shorter. No h is so short that it stays: where all trials together would show no fall, and a step of
    the reciprocal of the mean eigenvalue one, they begin there anew.

    Use it on data that stay, in either precision: its steps on all points cost 1.8 times as much as those of
    `trust_ratio_control` in float64 and four times in float32, and lead further. Relative errors in float64 on a 2-D
    Poisson network of 2,241 weights and 1,020 residuals, medians of five seeds after so many seconds of one core: 6e-4
    (1 s), 3e-6 (3 s), 4e-8 (10 s) and 4e-10 (25 s), and of the trust ratio 2e-2 (5 s), 2e-4 (10 s) and 2e-5 (25 s). A
    smaller `boldness` goes on with longer steps while their loss is not yet the least: it falls later, maybe lower.

    In float64, for parameters in float64, a long h meets the rounding of the Gram matrix of the residuals' Jacobian,
    which hides all its eigenvalues below that of the largest. Where the chosen h is that long, the next steps on all
    points are by the singular values of the Jacobian itself. They take about three times as long, and lead from an
    error of about 2e-8 of that network to the one above.

    In float32 the residuals and their Jacobian are in float32, and what is made of them in float64, also where
    `jax_enable_x64` is off: the Gram matrix, its factor and the coordinates of the steps. That needs JAX 0.8 and a CPU
    or GPU; elsewhere all steps are by singular values in float32, which take several times as long. What bounds the
    error in the end is the rounding of the residuals, at 2e-6 to 5e-6 of that network. Where they are evaluated in
    float64 (with `jax_enable_x64` and points in float64), parameters in float32 have led to 1.3e-7.

    It begins with few of the loss's points, where a step costs little and leads nearly as far: `subsets` divides their
    number. Where a step lowers the loss on all points by less than half as much as that on its subset, as logarithms,
    the next ones have more of them: one, then two, four ... before fewer are tried again, and one again once the data
    are new. A step on a subset, too, is taken only if the loss on all points does not rise. That needs
    `rk_optax.LeastSquares` with `pointwise` arguments; other losses have all points from the start, and no subset has
    fewer than 60 residuals.

    Where the loss at params is not the one that the previous update left there, the data have changed and falls on them
    say little: then h follows the quality of the quadratic model, as under `rk_optax.trust_ratio_control`, with one
    uncorrected trial, until the data have stayed for three updates. (If they change in every update, that rule is
    cheaper: a Cholesky factor takes a quarter of the time.)

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> loss_fn = rk_optax.LeastSquares(lambda w: jnp.array([w[0] - 1, 10 * (w[1] - w[0] ** 2)]))
    >>> tx = rk_optax.residual_euler(loss_fn, rk_optax.path_control(probes=8))
    >>> w = jnp.zeros(2)
    >>> state = tx.init(w)
    >>> for _ in range(8):
    ...     updates, state = jax.jit(tx.update)(jax.grad(loss_fn)(w), state, w)
    ...     w = w + updates
    >>> bool(loss_fn(w) < 1e-6)
    True

    Args:
      initial_step_size: about which the first trial steps lie, as a learning rate; None: the reciprocal of the mean
        eigenvalue of the first matrix (of the largest, in a Krylov space), so that units do not matter.
      probes: the number of trial steps, static; None for 4, and by singular values 6 in float64 and 8 in float32, where
        the factor takes most of a step; for 6 in float64 and 16 in float32 where there are no corrections.
      width: the largest factor by which h changes in one update, above 1; None for 6, and 30 where the factor is in
        float32.
      boldness: β in (0, 1]; 1 takes the least loss.
      corrections: evaluations of the residuals for each trial beyond the first, static; least squares alone has them.
        None for 6 in float64 and 10 in float32, and by singular values 12 in float64.
      subsets: by what the number of points is divided in the beginning, and then, static and falling; () for all points
        from the start. Each takes its part of the time to compile, and under `jax.vmap` of every step.
      precise: whether long steps in float64 are by singular values; likewise. They never are where the Jacobian is on
        several devices or formed in blocks.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a solver without a path; where an
        update is differentiated.
      NotImplementedError: least squares in float64 on a TPU, for which JAX has no reduction to tridiagonal form.

    Cost: probes·(corrections + 1) + 2 losses a step, evaluated one after the other, which took 0.4 of the time of all
    at once on a CPU; with new data 3. On a subset all but two are of its points, as are the rows.
    """

    initial_step_size: Number | None = None
    _: dataclasses.KW_ONLY
    probes: int | None = None
    width: Number | None = None
    boldness: Number = 1.0
    corrections: int | None = None
    subsets: tuple[int, ...] = (16, 4)
    precise: bool = True
    needs: ClassVar[frozenset[Capability]] = frozenset({"loss", "deterministic"})
    wants: ClassVar[frozenset[Quantity]] = frozenset({"path"})

    def __post_init__(self):
        if self.initial_step_size is not None:
            _checks.numbers(self, initial_step_size="positive")
        if self.probes is not None:
            _checks.count(self.probes, "probes")
            if self.probes == 1:
                raise ValueError(
                    "probes must be at least 2, one on either side of h: one alone would not find its way."
                )
        if self.width is not None:
            _checks.numbers(self, width="growth")
        _checks.numbers(self, boldness="fraction")
        _checks.flags(self, "precise")
        if self.corrections is not None and (self.corrections != 0 or isinstance(self.corrections, bool)):
            _checks.count(self.corrections, "corrections")
        object.__setattr__(self, "subsets", tuple(self.subsets))
        for divisor in self.subsets:
            _checks.count(divisor, "subsets")
        if any(x <= y for x, y in itertools.pairwise((*self.subsets, 1))):
            raise ValueError(f"subsets must fall, and be above 1, got {self.subsets!r}.")

    def init(self, params: PyTree) -> PathControlState:
        """Nothing has been seen; the first step size comes from the first factorisation, where none is given."""
        del params
        first = 0.0 if self.initial_step_size is None else self.initial_step_size
        # Separate buffers: one shared by several fields could not be donated.
        values = {"next_step_size": first, "loss": jnp.inf, "fall": 0, "divisor": 2, "before": 0, "predicted": 0}
        scalars = {name: jnp.full([], value, _tree.default_float()) for name, value in values.items()}
        counts = {name: jnp.zeros([], jnp.int32) for name in ("changing", "level", "refused", "failures", "wait")}
        return PathControlState(
            **scalars, **counts, subset_fall=jnp.zeros([], _tree.default_float()), precise=jnp.zeros([], bool)
        )

    def seen(self, field: VectorField, params: PyTree) -> VectorField:
        """The field, with fewer points only where some of its subsets are worth a step."""
        subsets = len(self._fields(field, params)) > 1
        return field if subsets else dataclasses.replace(field, fewer_points=None)

    def choose(
        self, state: PathControlState, field: VectorField, params: PyTree, k1: PyTree, h: Any, step: Step
    ) -> Choice:
        """The losses of the trial steps decide; see the class."""
        del k1
        dtype = state.before.dtype
        loss = field.loss(params)
        before = loss.astype(dtype)
        # The same data give the same loss at the same params, to rounding; there are none before the first.
        stayed = jnp.isinf(state.loss) | (jnp.abs(before - state.loss) <= 1e-3 * jnp.abs(state.loss))
        changing = jnp.where(stayed, jnp.maximum(state.changing - 1, 0), 2)
        new = changing == 2
        fields = self._fields(field, params)
        last = len(fields) - 1
        level = jnp.where(changing == 0, jnp.minimum(state.level, last), last)

        def on(part: VectorField, form: Quantity) -> Callable[[], _Chosen]:
            factored = step.quantities[form]
            return lambda: self._chosen(part, field, loss, params, h, changing == 0, state.divisor <= 2, factored)

        branches = [on(part, "path") for part in fields]
        offered = self.precise and "precise_path" in step.quantities
        on_all = (changing == 0) & (level == last) & offered
        precise = on_all & state.precise
        if offered:
            branches.append(on(field, "precise_path"))
        chosen = jax.lax.switch(level + precise.astype(level.dtype), branches)
        # Back where h is clearly shorter again, lest the two take turns.
        beyond = chosen.beyond > jnp.where(precise, 0.01, 1) * _BEYOND
        state = state._replace(
            changing=changing,
            before=before,
            predicted=chosen.predicted.astype(dtype),
            level=level,
            # How fewer of the old points served says nothing of the new ones.
            failures=jnp.where(new, 0, state.failures),
            wait=jnp.where(new, 0, state.wait),
            subset_fall=_logarithmic(chosen.fall, chosen.before).astype(dtype),
            precise=jnp.where(on_all, beyond, state.precise),
        )
        h, direction = underivable((chosen.step_size, chosen.direction))
        step = step._replace(direction=direction, state=chosen.solver, refused_state=chosen.solver)
        return Choice(h, step, state, chosen.cost.plus(Cost(losses=field.losses_at(params))))

    def _fields(self, field: VectorField, params: PyTree) -> list[VectorField]:
        """The fields on the subsets that are worth it, from the fewest points to all."""
        found = [field.on_fewer_points(divisor) for divisor in self.subsets]
        return [*(part for part in found if part is not None and part.count_rows(params) >= 60), field]

    def _chosen(
        self,
        part: VectorField,
        whole: VectorField,
        before: jax.Array,
        params: PyTree,
        h: jax.Array,
        several: jax.Array,
        taken: jax.Array,
        factored: Callable[[VectorField], Factored],
    ) -> _Chosen:
        """The best of `several` trial steps on the points of `part`, or the one of h; `before` is the loss on all.

        `taken` says that h does not come from refusals in a row; see `_visible`.
        """
        path, cost, solver = factored(part)
        probes, width, corrections = self._trial_steps(path)
        real, trials = h.dtype, probes * (corrections + 1)

        def best(h: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            exponents = jnp.linspace(-1.0, 1.0, probes, dtype=h.dtype)
            sizes = _bounded(h * jnp.asarray(width, h.dtype) ** exponents, real)
            losses, coordinates = _least(path, params, sizes, corrections)
            falls = jnp.where(jnp.isfinite(losses), before - losses.astype(h.dtype), -jnp.inf)
            enough = (falls > 0) & (falls >= self.boldness * jnp.max(falls))
            index = jnp.max(jnp.where(enough, jnp.arange(probes), 0))
            return sizes[index], coordinates[index], falls[index]

        def only(h: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return h, path.start(h[None])[0], jnp.zeros_like(before)

        with _precision.doubled(path.dtype):
            dtype = path.dtype
            before = before if part is whole else path.loss_at_start(params).astype(before.dtype)
            rounding = 2 * jnp.finfo(before.dtype).eps * jnp.abs(before)
            h = _visible(path, h.astype(dtype), width, rounding.astype(dtype), taken)
            if part is whole:
                h, coordinates, fall = jax.lax.cond(several, best, only, h, before.astype(dtype))
            else:
                h, coordinates, fall = best(h, before.astype(dtype))
            predicted = path.predicted_fall(h[None], path.start(h[None]))[0]
            direction = jax.tree.map(lambda leaf: leaf[0], path.direction(h[None], coordinates[None]))
            beyond = (h * jnp.finfo(dtype).eps) * path.largest
            numbers = tuple(x.astype(real) for x in (h, fall, before, predicted, beyond))
        h, fall, before, predicted, beyond = numbers
        if part is whole:
            cost = cost._replace(losses=cost.losses + jnp.where(several, trials, 0))
        else:
            # In what it would be on all points, rounded up; rows are counted as they are.
            n, of = part.count_rows(params), whole.count_rows(params)
            work = cost._replace(losses=cost.losses + trials)
            cost = Cost(*(-(-int(count) * n // of) for count in work))._replace(rows=cost.rows)
        cost = Cost(*(jnp.asarray(count, jnp.int32) for count in cost))
        return _Chosen(h, direction, fall, before, predicted, beyond, cost, solver)

    def _trial_steps(self, path: Path) -> tuple[int, Number, int]:
        """How many, how far from h the outermost, and their corrections: more where the factor takes most of a step."""
        double = jnp.finfo(path.dtype).bits >= 64
        # In a program in float32 a trial costs half as much as in one in float64, and the factor the same.
        single = jnp.finfo(_tree.default_float()).bits < 64
        if not path.correctable:
            probes, corrections = 6 if double else 16, 0
        elif path.precise:
            probes, corrections = (6, 12) if double else (8, 10)
        else:
            probes, corrections = 4, 10 if single else 6
        probes = probes if self.probes is None else self.probes
        if path.correctable and self.corrections is not None:
            corrections = self.corrections
        return probes, self._width(path.dtype), corrections

    def _width(self, dtype: Any) -> Number:
        return (6.0 if jnp.finfo(dtype).bits >= 64 else 30.0) if self.width is None else self.width

    def judge(self, state: PathControlState, attempt: Attempt) -> Verdict:
        """Accepts where the loss does not rise, momentum and all. Costs a loss."""
        before, predicted, dtype = state.before, state.predicted, state.next_step_size.dtype
        after = attempt.field.loss(attempt.candidate)
        rounding = 2 * jnp.finfo(after.dtype).eps * jnp.abs(before)
        after, h = after.astype(dtype), attempt.step_size.astype(dtype)
        fall = before - after
        accepted = attempt.usable & (fall >= 0)
        tie = attempt.usable & (jnp.abs(fall) <= 8 * rounding) & (predicted <= rounding)
        # With other data in each update h follows the model's quality, after Nielsen.
        ratio = jnp.where(jnp.isfinite(fall), _tree.ratio(fall, predicted), 0)
        factor = 1 / jnp.maximum(1 / 3, 1 - (2 * jnp.clip(ratio, 0, 2) - 1) ** 3)
        factor = jnp.where(accepted, factor, 1 / state.divisor)
        changing = state.changing > 0
        h = jnp.where(changing & ~tie, h * factor, h)
        # Where nothing can be told, all has converged, and h must not run away.
        h = jnp.where(tie & (state.next_step_size > 0), state.next_step_size, h)
        # A trial fell and the step rises, for `after` or the rounding of params. Lest it be chosen for ever, all the
        # next trials are shorter: down to a step of nothing, which is taken, and momentum turns to the gradient.
        last = len(self._fields(attempt.field, attempt.params)) - 1
        misled = (~tie & (state.subset_fall > 0)) | (state.divisor > 2)
        misled = misled & ~accepted & ~changing & (state.level == last)
        width = jnp.asarray(self._width(_tree.default_float()), dtype)
        h = jnp.where(misled, h / (width * state.divisor), h)
        divisor = jnp.where(accepted, 2, jnp.minimum(2 * state.divisor, 1024))
        # On a subset of the points: it serves as long as all points have half of its fall, and it has one.
        refused = jnp.where(state.subset_fall > 0, 0, saturating_sum(state.refused, 1))
        whole_fall = _logarithmic(fall, before)
        serves = accepted & (state.subset_fall >= 0.01) & (whole_fall >= 0.5 * state.subset_fall)
        serves = serves | ((state.subset_fall <= 0) & (refused < 3) & ~tie)
        failed = ~serves & ~changing & (state.level < last)
        wait = jnp.where(failed, 2 ** jnp.minimum(state.failures, 16), jnp.maximum(state.wait - 1, 0))
        fewer = ~failed & ~changing & (wait == 0)
        new = state._replace(
            next_step_size=_bounded(h, dtype),
            loss=_known(jnp.where(accepted, after, before)),
            fall=fall,
            divisor=jnp.where((changing & ~tie) | accepted | misled, divisor, state.divisor).astype(dtype),
            level=jnp.clip(state.level + failed.astype(jnp.int32) - fewer.astype(jnp.int32), 0, last),
            refused=jnp.where(failed, 0, refused),
            failures=saturating_sum(state.failures, failed),
            wait=wait,
        )
        reason = jnp.where(tie, Reason.UNRESOLVED, Reason.LOSS_ROSE)
        reason = jnp.where(attempt.usable & _leads_uphill(attempt), Reason.NOT_DOWNHILL, reason)
        reason = jnp.where(accepted, Reason.ACCEPTED, reason)
        return Verdict(accepted, reason, new, Cost(losses=1))


path_control = PathControl


def _visible(path: Path, h: jax.Array, width: Number, rounding: jax.Array, taken: jax.Array) -> jax.Array:
    """The step size about which to try: a typical one where h is 0 or, unless refusals have made it so, too short.

    Too short is an h with which no trial would show a fall, where a typical one would.
    """
    h = jnp.where(h > 0, h, path.typical)
    longest = jnp.stack([jnp.asarray(width, h.dtype) * h, path.typical])
    trial, typical = path.predicted_fall(longest, path.start(longest)) > rounding
    return jnp.where(taken & ~trial & typical & (h < path.typical), path.typical, h)


def _leads_uphill(attempt: Attempt) -> jax.Array:
    """Whether the step goes up the gradient, though so short that g* is the gradient: `after` leads there."""
    gradient, scale = attempt.k1, attempt.field.scale
    off = _tree.norm(jax.tree.map(jnp.subtract, attempt.step.direction, gradient))
    short = off <= 0.1 * _tree.norm(gradient)
    gradient = gradient if scale is None else jax.tree.map(jnp.divide, gradient, scale)
    change = jax.tree.map(jnp.subtract, attempt.candidate, attempt.params)
    return short & (_tree.inner(_tree.unit(gradient)[0], _tree.unit(change)[0]) > 0)


def _known(loss: jax.Array) -> jax.Array:
    """It, or the largest number in place of one that is not finite, for ∞ says that there has been none."""
    return jnp.where(jnp.isfinite(loss), loss, jnp.finfo(loss.dtype).max)


def _logarithmic(fall: jax.Array, before: jax.Array) -> jax.Array:
    """Log of a loss before a step over that after it, 0 where neither can be told."""
    share = jnp.where(jnp.isfinite(fall) & (before > 0), _tree.ratio(fall, before), 0)
    return -jnp.log(jnp.clip(1 - share, jnp.finfo(share.dtype).tiny, None))


def _least(path: Path, params: PyTree, h: jax.Array, corrections: int) -> tuple[jax.Array, jax.Array]:
    """For each h the least of the losses that its iterates reach, and the coordinates of that iterate."""

    def iterate(count: jax.Array, carry: Any) -> Any:
        coordinates, least, kept, history = carry
        direction = path.direction(h, coordinates)

        def trial(i: jax.Array) -> Any:
            # One after the other: all at once take k times the memory, and on a CPU twice the time.
            end = jax.tree.map(lambda p, d: p - h[i].astype(_tree.real_dtype(p)) * d[i], params, direction)
            return path.evaluate(end)

        trials = jax.lax.map(trial, jnp.arange(len(h)))
        better = trials.loss < least
        kept = jnp.where(better[:, None], coordinates, kept)
        corrected = path.corrected(h, coordinates, trials.response)
        accelerated, history = anderson(coordinates, corrected - coordinates, history, count)
        return accelerated, jnp.where(better, trials.loss, least), kept, history

    start = path.start(h)
    least = jnp.full(h.shape, jnp.inf, jax.eval_shape(path.evaluate, params).loss.dtype)
    history = History.of(start, min(corrections, 3))
    _, least, kept, _ = jax.lax.fori_loop(0, corrections + 1, iterate, (start, least, start, history))
    return least, kept


def _bounded(h: jax.Array, dtype: Any) -> jax.Array:
    """The step size within what `dtype` can express, with room on both sides: none is the last."""
    info = jnp.finfo(dtype)
    return jnp.clip(h, float(info.tiny) * 1e6, float(info.max) * 1e-6)
