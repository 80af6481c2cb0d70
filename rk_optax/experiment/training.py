"""The training loop: compiled chunks of steps, for one run or for a grid of runs at once."""

import math
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

# A large split is scored in pieces of so many examples, which bounds the memory that a convolution takes.
_PIECE = 4096
_DROPOUT = 0x64726F70  # keeps the dropout keys of a run apart from those of its initial parameters


class Variables(NamedTuple):
    """What a run starts from, a function of its seed alone."""

    params: Params
    statistics: Any  # what the model keeps beside its parameters, such as BatchNorm's averages
    key: jax.Array  # data of the random key that every dropout mask comes from


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
        self._score_grid = jax.jit(_over_grid(self._score_run, (0, 0, None), (0, 0, None)))

    def init(self, seeds: int | Sequence[int]) -> Variables:
        """What a run starts from, which depends on the seed alone; of several seeds, stacked."""
        init = self._init if isinstance(seeds, int) else self._init_seeds
        return init(jnp.asarray(seeds))

    def loss(
        self, params: Params, images: Array, labels: Array, statistics: Any = None, dropout_key: Any = None
    ) -> jax.Array:
        """Mean cross-entropy plus the L2 penalty, as a model in training has it.

        Statistics and key stay as they are within a step, so that the stages of a solver see one function.
        """
        return self.loss_and_statistics(params, images, labels, statistics, dropout_key)[0]

    def loss_and_statistics(
        self, params: Params, images: Array, labels: Array, statistics: Any = None, dropout_key: Any = None
    ) -> tuple[jax.Array, Any]:
        """The loss, and the statistics after this batch, which only the caller's own gradient moves."""
        logits, moved = self.model.apply(
            {**params, **(statistics or {})},
            images,
            train=True,
            mutable=list(statistics or {}),
            rngs=None if dropout_key is None else {"dropout": jax.random.wrap_key_data(dropout_key)},
        )
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean() + self._penalty(params), moved

    def batches(self, seed: int, start: int, count: int) -> np.ndarray:
        """Indices (count, batch_size) of the batches from step `start` on."""
        return batch_indices(seed, len(self.data.train.labels), self.batch_size, start, count)

    def score(self, params: Params, statistics: Any, split: Split, *, grid: bool = False) -> "Score":
        """Loss and accuracy over a whole split, of a run or of a grid of runs."""
        score = self._score_grid if grid else self._score
        return Score(*(np.asarray(value, np.float64) for value in score(params, statistics, split)))

    def _init_run(self, seed: jax.Array) -> Variables:
        key = jax.random.key(seed)
        statistics = dict(self.model.init(key, self.data.train.images[:1]))
        params = {"params": statistics.pop("params")}
        return Variables(params, statistics, jax.random.key_data(jax.random.fold_in(key, _DROPOUT)))

    def _score_run(self, params: Params, statistics: Any, split: Split) -> tuple[jax.Array, jax.Array]:
        def examples(piece: Split) -> tuple[jax.Array, jax.Array]:
            logits: Any = self.model.apply({**params, **statistics}, piece.images)
            losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, piece.labels)
            return losses, logits.argmax(-1) == piece.labels

        losses, correct = _in_pieces(examples, split)
        return losses.mean() + self._penalty(params), correct.mean()

    def _penalty(self, params: Params) -> jax.Array:
        return 0.5 * self.l2 * optax.tree_utils.tree_norm(params, squared=True)


class RunState(NamedTuple):
    """What a run carries from step to step."""

    step: jax.Array
    params: Params
    statistics: Any
    opt_state: optax.OptState
    key: jax.Array


class Point(NamedTuple):
    """A run, or a grid of runs, where it can be evaluated."""

    steps: int
    seconds: float  # in training steps alone: no compilation, no evaluation, no data loading
    state: RunState
    loss: jax.Array | float = math.nan  # mean over the batches since the last point


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
        mesh: jax.sharding.Mesh | None = None,
    ):
        """Compiles the training of one run, or of a grid of seeds × learning rates.

        Args:
            task: what is trained.
            optimizer: builds it, and says what its first stage sees.
            seeds: a seed, or the seeds of a grid.
            rates: a learning rate, or the learning rates of a grid.
            chunk: steps from one point to the next.
            vectorized: whether the runs of a grid go side by side rather than in turns.
            mesh: the devices that share each batch of a single run, along an axis `batch` whose size divides it;
                None for the default device alone.
        """
        self._task, self._optimizer, self._chunk = task, optimizer, chunk
        self._grid = not isinstance(seeds, int)
        self._seeds = seeds
        self._rates = jnp.asarray(rates, jnp.float32)
        start, advance = self._start_run, self._advance_run
        if self._grid:
            start = _over_grid(start, (0, None), (None, 0))  # a seed's parameters serve all rates
            advance = (_over_grid if vectorized else _in_turns)(advance, (0, None, None, 0), (0, 0, None, None))
        self._everywhere = self._spread = None
        if mesh is not None:
            self._everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            self._spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "batch"))
        self._train: Split = jax.device_put(task.data.train, self._everywhere)
        self._start = jax.jit(start, out_shardings=self._everywhere)
        # Shapes and shardings of a run's state.
        self.layout: RunState = jax.eval_shape(self._start, task.init(seeds), self._rates)
        arguments = (self.layout, self._rates, self._train, self._indices(0))
        began = time.perf_counter()
        self._advance = jax.jit(advance, donate_argnums=0, out_shardings=self._everywhere).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - began

    def start(self) -> Point:
        """The initial point."""
        state = self._start(self._task.init(self._seeds), self._rates)
        return Point(0, 0.0, jax.block_until_ready(state))

    def run(self, steps: int, start: Point | None = None) -> Iterator[Point]:
        """Trains, stopping after every chunk.

        Args:
            steps: where to end, whole chunks from the starting point.
            start: where to go on, by default from the initial point.

        Yields:
            The starting point and the point after each chunk; its state is valid until the next.
        """
        point = self.start() if start is None else start
        yield point
        _, seconds, state, _ = point
        for step in range(point.steps, steps, self._chunk):
            indices = jax.block_until_ready(self._indices(step))
            began = time.perf_counter()
            state, loss = self._advance(state, self._rates, self._train, indices)
            jax.block_until_ready(state)
            seconds += time.perf_counter() - began
            yield Point(step + self._chunk, seconds, state, loss)

    def score(self, point: Point, split: Split) -> Score:
        """Loss and accuracy of the run or runs at a point, over a whole split."""
        return self._task.score(point.state.params, point.state.statistics, split, grid=self._grid)

    def restored(self, leaves: Any) -> RunState:
        """A run's state from host arrays, on the devices of this trainer."""
        return jax.tree.map(lambda like, leaf: jax.device_put(leaf, like.sharding), self.layout, leaves)

    def _indices(self, start: int) -> jax.Array:
        if isinstance(self._seeds, int):
            return jax.device_put(self._task.batches(self._seeds, start, self._chunk), self._spread)
        return jnp.asarray(np.stack([self._task.batches(seed, start, self._chunk) for seed in self._seeds]))

    def _start_run(self, variables: Variables, rate: jax.Array) -> RunState:
        params, statistics, key = variables
        opt_state = self._optimizer.make(self._task.loss, rate).init(params)
        return RunState(jnp.zeros((), jnp.int32), params, statistics, opt_state, key)

    def _advance_run(
        self, state: RunState, rate: jax.Array, train: Split, indices: jax.Array
    ) -> tuple[RunState, jax.Array]:
        tx = self._optimizer.make(self._task.loss, rate)
        gradient = jax.value_and_grad(self._task.loss_and_statistics, has_aux=True)

        def step(state: RunState, batch: jax.Array) -> tuple[RunState, jax.Array]:
            dropout_key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
            # One mask, and the statistics of before the step, for all stages.
            data = {
                "images": train.images[batch],
                "labels": train.labels[batch],
                "statistics": state.statistics,
                "dropout_key": jax.random.key_data(dropout_key),
            }
            (loss, statistics), grads = gradient(state.params, **self._optimizer.first_stage(data))
            updates, opt_state = tx.update(grads, state.opt_state, state.params, **data)
            params = optax.apply_updates(state.params, updates)
            return RunState(state.step + 1, params, statistics, opt_state, state.key), loss

        state, losses = jax.lax.scan(step, state, indices)
        return state, losses.mean()


def _in_pieces(function: Callable[[Split], Any], split: Split) -> Any:
    """A function of examples, evaluated on so many at a time."""
    whole = len(split.labels) - len(split.labels) % _PIECE
    if whole == 0:
        return function(split)
    pieces = Split(*(part[:whole].reshape(-1, _PIECE, *part.shape[1:]) for part in split))
    done = jax.tree.map(lambda part: part.reshape(whole, *part.shape[2:]), jax.lax.map(function, pieces))
    if whole == len(split.labels):
        return done
    rest = function(Split(*(part[whole:] for part in split)))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), done, rest)


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
