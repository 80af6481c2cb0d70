"""The training loop: compiled chunks of steps, for one run or for a grid of runs at once."""

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rk_optax
from rk_optax.experiment.entrants import Optimizer
from rk_optax.experiment.errors import refusing, require
from rk_optax.experiment.tasks.task import Finer, Params, Score, Task, Variables


class RunState(NamedTuple):
    """What a run carries from step to step."""

    step: jax.Array
    params: Params
    statistics: Any
    opt_state: optax.OptState
    key: jax.Array
    cost: rk_optax.Cost


class Point(NamedTuple):
    """A run, or a grid of runs, where it can be evaluated."""

    steps: int
    seconds: float  # in training steps alone: no compilation, no evaluation, no data loading
    state: RunState
    loss: jax.Array | float = math.nan  # mean over the batches since the last point


class _Phase(NamedTuple):
    """The steps that are taken on one grid of the task: all of them, unless it is refined in mid-training."""

    begins: int
    task: Task
    layout: RunState  # shapes and shardings of a run's state
    advance: Callable[..., Any]
    enter: Callable[[RunState], RunState]  # from the state in which the phase before ends


class Trainer:
    """One optimizer on one task, compiled once for all of the given runs."""

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        seeds: int | Sequence[int],
        rates: float | Sequence[float | None] | None,
        chunk: int,
        *,
        steps: int | None = None,
        vectorized: bool = True,
        mesh: jax.sharding.Mesh | None = None,
        refine_at: Sequence[int] = (),
    ):
        """Compiles the training of one run, or of a grid of seeds × learning rates.

        Args:
            task: what is trained.
            optimizer: builds it, and says what its first stage sees.
            seeds: a seed, or the seeds of a grid.
            rates: a learning rate, or the learning rates of a grid; None where the optimizer finds its own.
            chunk: steps from one point to the next.
            steps: length of the run, for a schedule.
            vectorized: whether the runs of a grid go side by side rather than in turns.
            mesh: the devices that share each batch of a single run, along an axis `batch` whose size divides it;
                None for the default device alone.
            refine_at: steps, multiples of `chunk`, after which the run goes on with `task.finer()`; see `refinements`.
        """
        self._task, self._optimizer, self._chunk, self._steps = task, optimizer, chunk, steps
        self._grid = not isinstance(seeds, int)
        self._seeds = seeds
        self._rates = jnp.asarray(np.array(rates, float))
        self._everywhere = self._spread = None
        if mesh is not None:
            self._everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            self._spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "batch"))
        self._source = jax.device_put(task.source, self._everywhere)
        # A seed's parameters serve all rates.
        start = _over_grid(self._start_run, (0, None), (None, 0)) if self._grid else self._start_run
        self._start = jax.jit(start, out_shardings=self._everywhere)
        layout: RunState = jax.eval_shape(self._start, task.init(seeds), self._rates)
        self.compile_seconds = 0.0
        self._phases = [self._phase(0, task, layout, lambda state: state, vectorized)]
        for begins in refine_at:
            task, enter = self._refined(task)
            layout = jax.eval_shape(enter, layout)
            self._phases.append(self._phase(begins, task, layout, enter, vectorized))

    def layout(self, steps: int = 0) -> RunState:
        """Shapes and shardings of a run's state after so many steps."""
        return self._phase_after(steps).layout

    def run(self, steps: int | None, start: Point | None = None) -> Iterator[Point]:
        """Trains, and yields the starting point and the point after each chunk; its state is valid until the next.

        Args:
            steps: where to end, whole chunks from the starting point; None for never.
            start: where to go on, by default from the initial point.
        """
        if start is None:
            initial = self._start(self._task.init(self._seeds), self._rates)
            start = Point(0, 0.0, jax.block_until_ready(initial))
        yield start
        step, seconds, state, _ = start
        phase = self._phase_after(step)
        while steps is None or step < steps:
            if (following := self._phase_after(step + 1)) is not phase:
                phase, state = following, jax.block_until_ready(following.enter(state))
            indices = jax.block_until_ready(self._indices(step))
            began = time.perf_counter()
            state, loss = phase.advance(state, self._rates, self._source, indices)
            jax.block_until_ready(state)
            seconds += time.perf_counter() - began
            step += self._chunk
            yield Point(step, seconds, state, loss)

    def spent(self, point: Point) -> np.ndarray:
        """What the run or runs have cost up to a point, in gradients over a whole batch.

        A Hessian-vector product counts as two gradients, a loss as a third of one, and a Jacobian row as the task says;
        factorisations and other linear algebra show in the seconds alone.
        """
        cost = jax.tree.map(lambda count: np.asarray(count, float), point.state.cost)
        if self._optimizer.gradients_per_step is not None:
            return np.full_like(cost.gradients, point.steps * self._optimizer.gradients_per_step)
        return cost.gradients + 2 * cost.products + cost.losses / 3 + self._task.gradients_per_row * cost.rows

    def score(self, point: Point, split: Any = None) -> Score:
        """Loss and metrics of the run or runs at a point."""
        task = self._phase_after(point.steps).task
        return task.score(point.state.params, point.state.statistics, split, grid=self._grid)

    def restored(self, leaves: Any) -> RunState:
        """A run's state from host arrays, on the devices of this trainer."""
        return jax.device_put(leaves, self._everywhere)

    def _phase_after(self, steps: int) -> _Phase:
        """The one that a run is in after so many steps; where one ends and the next begins, that which ends."""
        return [phase for phase in self._phases if phase.begins < max(steps, 1)][-1]

    def _phase(
        self, begins: int, task: Task, layout: RunState, enter: Callable[[RunState], RunState], vectorized: bool
    ) -> _Phase:
        advance = functools.partial(self._advance_run, task)
        if self._grid:
            side_by_side = jax.vmap if vectorized else _in_turns
            advance = _over_grid(advance, (0, None, None, 0), (0, 0, None, None), side_by_side)
        arguments = (layout, self._rates, self._source, self._indices(0))
        began = time.perf_counter()
        compiled = jax.jit(advance, donate_argnums=0, out_shardings=self._everywhere).lower(*arguments).compile()
        self.compile_seconds += time.perf_counter() - began
        return _Phase(begins, task, layout, compiled, enter)

    def _refined(self, task: Task) -> tuple[Task, Callable[[RunState], RunState]]:
        finer = task.finer()

        def enter(state: RunState) -> RunState:
            opt_state = _carried(finer, self._optimizer, state.opt_state)
            return state._replace(params=finer.params(state.params), opt_state=opt_state)

        over_runs = _over_grid(enter, (0,), (0,)) if self._grid else enter
        return finer.task, jax.jit(over_runs, out_shardings=self._everywhere)

    def _indices(self, start: int) -> jax.Array:
        if isinstance(self._seeds, int):
            return jax.device_put(self._task.batches(self._seeds, start, self._chunk), self._spread)
        return jnp.asarray(np.stack([self._task.batches(seed, start, self._chunk) for seed in self._seeds]))

    def _start_run(self, variables: Variables, rate: jax.Array) -> RunState:
        params, statistics, key = variables
        opt_state = self._optimizer.make(self._task.loss_fn, rate, self._steps).init(params)
        cost = rk_optax.Cost.zeros()
        return RunState(jnp.zeros((), jnp.int32), params, statistics, opt_state, key, cost)

    def _advance_run(
        self, task: Task, state: RunState, rate: jax.Array, source: Any, indices: jax.Array
    ) -> tuple[RunState, jax.Array]:
        optimizer = self._optimizer
        tx = optimizer.make(task.loss_fn, rate, self._steps)
        gradient = jax.value_and_grad(task.loss_and_statistics, has_aux=True)
        reuses = optimizer.keeps_gradient and task.constant

        def step(state: RunState, batch: jax.Array) -> tuple[RunState, Any]:
            dropout_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            data = task.data(source, batch, state.statistics, jax.random.key_data(dropout_key))

            def value_fn(params: Params) -> jax.Array:
                return task.loss_fn(params, **data)

            statistics = state.statistics
            if not optimizer.takes_gradient:
                loss, grads = jnp.asarray(jnp.nan), jax.tree.map(jnp.zeros_like, state.params)
            elif reuses:
                loss, grads = optax.value_and_grad_from_state(value_fn)(state.params, state=state.opt_state)
            else:
                (loss, statistics), grads = gradient(state.params, **optimizer.first_stage(data))
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, value=loss, grad=grads, value_fn=value_fn, **data
            )
            params = optax.apply_updates(state.params, updates)
            cost = state.cost.plus(optimizer.cost(state.opt_state, opt_state, int(not reuses)))
            return RunState(state.step + 1, params, statistics, opt_state, state.key, cost), loss

        state, losses = jax.lax.scan(step, state, indices)
        return state, losses.mean()


def refinements(fractions: Sequence[float], steps: int, every: int) -> tuple[int, ...]:
    """The steps, multiples of `every`, that are nearest to fractions of a run and have to lie within it."""
    at = tuple(round(fraction * steps / every) * every for fraction in fractions)
    require(
        not at or all(before < after for before, after in itertools.pairwise((0, *at, steps))),
        f"model.refine_at = {tuple(fractions)} of {steps} steps, evaluated every {every}, is after steps {at}, which "
        "must increase and lie within the run: take a smaller evaluate_every or a longer run",
    )
    return at


def check_refinement(task: Task, optimizer: Optimizer, steps: int) -> None:
    """Checks that the state of an optimizer can be carried over to the task's finer grid."""
    opt_state = jax.eval_shape(lambda: optimizer.make(task.loss_fn, 0.1, steps).init(task.init(0).params))
    jax.eval_shape(functools.partial(_carried, task.finer(), optimizer), opt_state)


def _carried(finer: Finer, optimizer: Optimizer, opt_state: Any) -> Any:
    with refusing("model.refine_at does not go with this optimizer", ValueError):
        return finer.opt_state(opt_state, powers=optimizer.powers)


_Axes = tuple[int | None, ...]  # of arguments, as `jax.vmap` has them


def _over_grid(function: Callable[..., Any], seed_axes: _Axes, rate_axes: _Axes, over: Any = jax.vmap) -> Any:
    """The function of one run, mapped over a grid (seed, rate) of runs."""
    return over(over(function, rate_axes), seed_axes)


def _in_turns(function: Callable[..., Any], axes: _Axes) -> Callable[..., Any]:
    """What `jax.vmap` returns, one run after the other."""

    def over_runs(*arguments: Any) -> Any:
        mapped = {i: argument for i, (argument, axis) in enumerate(zip(arguments, axes, strict=True)) if axis == 0}
        return jax.lax.map(lambda own: function(*(own.get(i, whole) for i, whole in enumerate(arguments))), mapped)

    return over_runs
