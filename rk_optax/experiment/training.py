"""The training loop: compiled chunks of steps, for one run or for a grid of runs at once."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rk_optax.experiment.data import Array, Dataset, Split, batch_indices
from rk_optax.experiment.optimizers import Optimizer, Params


class Task:
    """A model to train on a data set: initial parameters, loss, batches and scores."""

    def __init__(self, model: nn.Module, data: Dataset, batch_size: int | None, l2: float = 0.0):
        """Puts the data on the default device."""
        self.model = model
        self.l2 = l2
        self.batch_size = batch_size
        self.data: Dataset = jax.device_put(data)
        # Compiled once for all optimizers.
        self._init = jax.jit(self._init_run)
        self._init_seeds = jax.jit(jax.vmap(self._init_run))
        self._score = jax.jit(self._score_run)
        self._score_grid = jax.jit(_over_grid(self._score_run, (0, None), (0, None)))

    def init(self, seeds: int | Sequence[int]) -> Params:
        """Initial parameters, which depend on the seed alone; of several seeds, stacked."""
        init = self._init if isinstance(seeds, int) else self._init_seeds
        return init(jnp.asarray(seeds))

    def loss(self, params: Params, images: Array, labels: Array) -> jax.Array:
        """Mean cross-entropy plus the L2 penalty."""
        logits: Any = self.model.apply(params, images)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean() + 0.5 * self.l2 * optax.tree_utils.tree_norm(params, squared=True)

    def batches(self, seed: int, start: int, count: int) -> np.ndarray:
        """Indices (count, batch_size) of the batches from step `start` on."""
        return batch_indices(seed, len(self.data.train.labels), self.batch_size, start, count)

    def score(self, params: Params, split: Split, *, grid: bool = False) -> "Score":
        """Loss and accuracy over a whole split, of a run or of a grid of runs."""
        score = self._score_grid if grid else self._score
        return Score(*(np.asarray(value, np.float64) for value in score(params, split)))

    def _init_run(self, seed: jax.Array) -> Params:
        return self.model.init(jax.random.key(seed), self.data.train.images[:1])

    def _score_run(self, params: Params, split: Split) -> tuple[jax.Array, jax.Array]:
        logits: Any = self.model.apply(params, split.images)
        return self.loss(params, *split), (logits.argmax(-1) == split.labels).mean()


class RunState(NamedTuple):
    """What a run carries from step to step."""

    params: Params
    opt_state: optax.OptState


class Point(NamedTuple):
    """A run, or a grid of runs, where it can be evaluated."""

    steps: int
    seconds: float  # in training steps alone: no compilation, no evaluation, no data loading
    state: RunState


class Score(NamedTuple):
    """Loss and accuracy over a whole split; of a grid of runs, arrays (seed, rate)."""

    loss: np.ndarray
    accuracy: np.ndarray


class Trainer:
    """One optimizer on one task, compiled once for all of the given runs."""

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        seeds: int | Sequence[int],
        rates: float | Sequence[float],
        chunk: int,
        *,
        vectorized: bool = True,
    ):
        """Compiles the training of one run, or of a grid of seeds × learning rates.

        Args:
            task: what is trained.
            optimizer: builds it, and says what its first stage sees.
            seeds: a seed, or the seeds of a grid.
            rates: a learning rate, or the learning rates of a grid.
            chunk: steps from one point to the next.
            vectorized: whether the runs of a grid go side by side rather than in turns.
        """
        self._task, self._optimizer, self._chunk = task, optimizer, chunk
        self._grid = not isinstance(seeds, int)
        self._seeds = seeds
        self._rates = jnp.asarray(rates, jnp.float32)
        start, advance = self._start_run, self._advance_run
        if self._grid:
            start = _over_grid(start, (0, None), (None, 0))  # a seed's parameters serve all rates
            advance = (_over_grid if vectorized else _in_turns)(advance, (0, None, None, 0), (0, 0, None, None))
        self._start = jax.jit(start)
        state = jax.eval_shape(self._start, task.init(seeds), self._rates)
        arguments = (state, self._rates, task.data.train, self._indices(0))
        began = time.perf_counter()
        self._advance = jax.jit(advance, donate_argnums=0).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - began

    def run(self, steps: int) -> Iterator[Point]:
        """Trains from the start, stopping after every chunk.

        Args:
            steps: a multiple of the chunk.

        Yields:
            The initial point and the point after each chunk; its state is valid until the next.
        """
        state = self._start(self._task.init(self._seeds), self._rates)
        jax.block_until_ready(state)
        seconds = 0.0
        yield Point(0, seconds, state)
        for step in range(0, steps, self._chunk):
            indices = jax.block_until_ready(self._indices(step))
            began = time.perf_counter()
            state = self._advance(state, self._rates, self._task.data.train, indices)
            jax.block_until_ready(state)
            seconds += time.perf_counter() - began
            yield Point(step + self._chunk, seconds, state)

    def score(self, point: Point, split: Split) -> Score:
        """Loss and accuracy of the run or runs at a point, over a whole split."""
        return self._task.score(point.state.params, split, grid=self._grid)

    def _indices(self, start: int) -> jax.Array:
        if isinstance(self._seeds, int):
            return jnp.asarray(self._task.batches(self._seeds, start, self._chunk))
        return jnp.asarray(np.stack([self._task.batches(seed, start, self._chunk) for seed in self._seeds]))

    def _start_run(self, params: Params, rate: jax.Array) -> RunState:
        return RunState(params, self._optimizer.make(self._task.loss, rate).init(params))

    def _advance_run(self, state: RunState, rate: jax.Array, train: Split, indices: jax.Array) -> RunState:
        tx = self._optimizer.make(self._task.loss, rate)

        def step(state: RunState, batch: jax.Array) -> tuple[RunState, None]:
            data = {"images": train.images[batch], "labels": train.labels[batch]}
            grads = jax.grad(self._task.loss)(state.params, **self._optimizer.first_stage(data))
            updates, opt_state = tx.update(grads, state.opt_state, state.params, **data)
            return RunState(optax.apply_updates(state.params, updates), opt_state), None

        return jax.lax.scan(step, state, indices)[0]


def _over_grid(
    function: Callable[..., Any], seed_axes: tuple[int | None, ...], rate_axes: tuple[int | None, ...]
) -> Callable[..., Any]:
    """The function of one run, mapped over a grid (seed, rate) of runs."""
    return jax.vmap(jax.vmap(function, rate_axes), seed_axes)


def _in_turns(
    function: Callable[..., Any], seed_axes: tuple[int | None, ...], rate_axes: tuple[int | None, ...]
) -> Callable[..., Any]:
    """The same as `_over_grid`, one run after the other."""
    return _one_by_one(_one_by_one(function, rate_axes), seed_axes)


def _one_by_one(function: Callable[..., Any], axes: tuple[int | None, ...]) -> Callable[..., Any]:
    def over_runs(*arguments: Any) -> Any:
        mapped = [argument for argument, axis in zip(arguments, axes, strict=True) if axis == 0]

        def run(own: list[Any]) -> Any:
            theirs = iter(own)
            return function(*(next(theirs) if axis == 0 else a for a, axis in zip(arguments, axes, strict=True)))

        return jax.lax.map(run, mapped)

    return over_runs
