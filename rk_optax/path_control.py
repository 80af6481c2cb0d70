"""The step-size rule that chooses among all the steps of one factorisation, by the loss at their ends."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost, Path, Quantity, Step
from rk_optax.step_size import Attempt, Choice, KeptStepSize, Reason, Verdict

PyTree = Any
Number = float | jax.Array


class PathControlState(NamedTuple):
    """State of `PathControl`."""

    next_step_size: jax.Array  # shape=(), float: about which the next trial steps lie; 0 before the first
    loss: jax.Array  # shape=(), float: at the params that the latest update left, on its data; ∞ before the first
    fall: jax.Array  # shape=(), float: of the loss, by the latest step; negative where it would have risen
    changing: jax.Array  # shape=(), int32: 0 while the data stay; 2 at an update whose data are new, then less by one
    divisor: jax.Array  # shape=(), float: of h at the next refusal where the data change; doubles with each in a row
    before: jax.Array  # shape=(), float: the loss at the params of the latest update
    predicted: jax.Array  # shape=(), float: the fall that the quadratic model foretold for its linearly implicit step


@dataclasses.dataclass(frozen=True)
class PathControl(KeptStepSize):
    """Tries the steps of many h from one factorisation, and takes the best, or a longer one that is nearly as good.

    The trial steps have `probes` step sizes, log-spaced from h/width to h·width about the latest h. Those of least
    squares are then corrected: with the same factor, each correction is one more iteration of simplified Newton from
    the linearly implicit step towards backward Euler, at one evaluation of the residuals. For each h the iterate of
    least loss counts; of all h the largest is taken whose fall of the loss is at least `boldness` of the best. A step
    is taken only if the loss does not rise.

    Use it for high accuracy, in either precision: its steps cost more than those of `trust_ratio_control` (in float64
    1.7 times as much, in float32 six times) and lead further. Relative errors of one seed in float64, on a 2-D
    Poisson network of 2,241 weights and 1,020 residuals, after so many processor seconds on a busy machine: 8e-5 (5 s)
    and 6e-6 (8 s), and of the trust ratio 2e-3 (8 s), 3e-4 (11 s) and 6e-5 (25 s); in float32 6e-5 (11 s), and of the
    trust ratio 7e-5 (25 s). After the first steps the best of the trials is nearly always within a factor of six of the
    latest h, with all its corrections. A smaller `boldness` goes on with longer steps while their loss is not yet the
    least: it falls later and may end lower.

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
      probes: the number of trial steps, static; None for 6 in float64 and 16 in float32, where the factor takes most of
        a step.
      width: the largest factor by which h changes in one update, above 1; None for 6 in float64 and 30 in float32.
      boldness: β in (0, 1]; 1 takes the least loss.
      corrections: evaluations of the residuals for each trial beyond the first, static; least squares alone has them.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a solver without a path; where an
        update is differentiated.
      NotImplementedError: least squares in float64 on a TPU, for which JAX has no reduction to tridiagonal form.

    Cost: probes·(corrections + 1) + 2 losses a step, evaluated one after the other, which took 0.4 of the time of all
    at once on a CPU; with new data 3.
    """

    initial_step_size: Number | None = None
    _: dataclasses.KW_ONLY
    probes: int | None = None
    width: Number | None = None
    boldness: Number = 1.0
    corrections: int = 4
    needs: ClassVar[frozenset[Capability]] = frozenset({"loss", "deterministic"})
    wants: ClassVar[frozenset[Quantity]] = frozenset({"path"})

    def __post_init__(self):
        if self.initial_step_size is not None:
            _checks.numbers(self, initial_step_size="positive")
        if self.probes is not None:
            _checks.count(self.probes, "probes")
        if self.width is not None:
            _checks.numbers(self, width="growth")
        _checks.numbers(self, boldness="fraction")
        if self.corrections != 0 or isinstance(self.corrections, bool):
            _checks.count(self.corrections, "corrections")

    def init(self, params: PyTree) -> PathControlState:
        """Nothing has been seen; the first step size comes from the first factorisation, where none is given."""
        del params
        first = 0.0 if self.initial_step_size is None else self.initial_step_size
        # Separate buffers: one shared by several fields could not be donated.
        values = {"next_step_size": first, "loss": jnp.inf, "fall": 0, "divisor": 2, "before": 0, "predicted": 0}
        scalars = {name: jnp.full([], value, _tree.default_float()) for name, value in values.items()}
        return PathControlState(**scalars, changing=jnp.zeros([], jnp.int32))

    def choose(
        self, state: PathControlState, field: VectorField, params: PyTree, k1: PyTree, h: Any, step: Step
    ) -> Choice:
        """The losses of the trial steps decide; see the class."""
        del k1
        path: Path = step.quantities["path"]
        dtype = path.typical.dtype
        h = jnp.where(h > 0, h, path.typical).astype(dtype)
        before = path.evaluate(params).loss.astype(state.before.dtype)
        # The same data give the same loss at the same params, to rounding; there are none before the first.
        stayed = jnp.isinf(state.loss) | (jnp.abs(before - state.loss) <= 1e-3 * jnp.abs(state.loss))
        changing = jnp.where(stayed, jnp.maximum(state.changing - 1, 0), 2)
        probes, width = self._trial_steps(dtype)

        def best() -> tuple[jax.Array, jax.Array]:
            exponents = jnp.linspace(-1.0, 1.0, probes, dtype=dtype)
            sizes = _bounded(h * jnp.asarray(width, dtype) ** exponents)
            losses, coordinates = self._try(path, params, sizes)
            falls = jnp.where(jnp.isfinite(losses), before.astype(dtype) - losses.astype(dtype), -jnp.inf)
            enough = (falls > 0) & (falls >= self.boldness * jnp.max(falls))
            index = jnp.max(jnp.where(enough, jnp.arange(probes), 0))
            return sizes[index], coordinates[index]

        def only() -> tuple[jax.Array, jax.Array]:
            return h, path.start(h[None])[0]

        h, coordinates = jax.lax.cond(changing == 0, best, only)
        predicted = path.predicted_fall(h[None], path.start(h[None]))[0]
        direction = jax.tree.map(lambda leaf: leaf[0], path.direction(h[None], coordinates[None]))
        state = state._replace(changing=changing, before=before, predicted=predicted.astype(before.dtype))
        trials = jnp.where(changing == 0, probes * (self._corrections(path) + 1), 0)
        h, direction = _underivable((h, direction))
        return Choice(h, step._replace(direction=direction), state, Cost(losses=trials + field.losses_at(params)))

    def _trial_steps(self, dtype: Any) -> tuple[int, Number]:
        """How many, and how far from h the outermost. In float32 the factor takes most of a step: more cost little."""
        probes, width = (6, 6.0) if jnp.finfo(dtype).bits >= 64 else (16, 30.0)
        return probes if self.probes is None else self.probes, width if self.width is None else self.width

    def _corrections(self, path: Path) -> int:
        return self.corrections if path.correctable else 0

    def _try(self, path: Path, params: PyTree, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """For each h the least of the losses that its iterates reach, and the coordinates of that iterate."""

        def iterate(_: Any, carry: Any) -> Any:
            coordinates, least, kept = carry
            direction = path.direction(h, coordinates)

            def trial(i: jax.Array) -> Any:
                # One after the other: all at once take k times the memory, and on a CPU twice the time.
                end = jax.tree.map(lambda p, d: p - h[i].astype(_tree.real_dtype(p)) * d[i], params, direction)
                return path.evaluate(end)

            trials = jax.lax.map(trial, jnp.arange(len(h)))
            better = trials.loss < least
            kept = jnp.where(better[:, None], coordinates, kept)
            return path.corrected(h, coordinates, trials.response), jnp.where(better, trials.loss, least), kept

        start = path.start(h)
        least = jnp.full(h.shape, jnp.inf, jax.eval_shape(path.evaluate, params).loss.dtype)
        _, least, kept = jax.lax.fori_loop(0, self._corrections(path) + 1, iterate, (start, least, start))
        return least, kept

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
        divisor = jnp.where(accepted, 2, jnp.minimum(2 * state.divisor, 1024))
        new = state._replace(
            next_step_size=_bounded(h),
            loss=jnp.where(accepted, after, before),
            fall=fall,
            divisor=jnp.where(changing & ~tie, divisor, state.divisor).astype(dtype),
        )
        reason = jnp.where(accepted, Reason.ACCEPTED, jnp.where(tie, Reason.UNRESOLVED, Reason.LOSS_ROSE))
        return Verdict(accepted, reason, new, Cost(losses=1))


path_control = PathControl


@jax.custom_jvp
def _underivable(chosen: PyTree) -> PyTree:
    """What was chosen. Derivatives would be those of the factorisation, NaN where two eigenvalues agree."""
    return chosen


@_underivable.defjvp
def _(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise ValueError(
        "An update of path_control cannot be differentiated: which trial step is the best jumps with what it depends "
        "on, and its factorisation has no derivative where eigenvalues agree. Differentiate "
        "through an explicit method, or rosenbrock_euler(curvature='diagonal'), with another rule."
    )


def _bounded(h: jax.Array) -> jax.Array:
    """The step size within what its dtype can express, with room on both sides: none is the last."""
    info = jnp.finfo(h.dtype)
    return jnp.clip(h, float(info.tiny) * 1e6, float(info.max) * 1e-6)
