"""What the training loop needs to know of what is trained."""

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import numpy as np

Array: TypeAlias = np.ndarray | jax.Array  # on the host, then on a device
Params: TypeAlias = Any  # a pytree of arrays
Data: TypeAlias = dict[str, Any]  # what a loss takes beside the parameters, by name
# What the examples of a data set are, and a network takes: (row, column, channel) or one axis of float32, or tokens.
Kind: TypeAlias = Literal["images", "features", "text"]


class Variables(NamedTuple):
    """What a run starts from, a function of its seed alone."""

    params: Params
    statistics: Any  # what the model keeps beside its parameters, such as BatchNorm's averages
    key: jax.Array  # data of the random key that every dropout mask comes from


class Score(NamedTuple):
    """Loss and further metrics; of a grid of runs, arrays (seed, rate)."""

    loss: np.ndarray
    metrics: dict[str, np.ndarray]

    @property
    def accuracy(self) -> np.ndarray:
        """The fraction of correct predictions."""
        return self.metrics["accuracy"]


class Finer(NamedTuple):
    """A task on a finer grid, and how the training of the coarser one goes on there."""

    task: "Task"
    params: Callable[[Params], Params]
    opt_state: Callable[..., Any]  # (state, powers=...), as `rk_optax.networks.refine_state` has them


class Task(abc.ABC):
    """A loss with its data: initial parameters, batches, and what an optimizer may be told.

    Attributes:
        loss_fn: `loss_fn(params, **data)`, with the structure that stiff solvers need.
        source: the training examples, a pytree on the default device.
        examples: their number.
        sliced: names of the data arguments that hold a batch and may be cut into slices.
        constant: whether every step sees the same data, so that values and gradients may be reused.
        gradients_per_row: what one row of the residuals' Jacobian costs, in gradients of the loss.
    """

    loss_fn: Callable[..., jax.Array]
    source: Any
    examples: int
    sliced: ClassVar[tuple[str, ...]] = ()
    constant: bool = False
    gradients_per_row: float = 1.0

    @abc.abstractmethod
    def init(self, seeds: int | Sequence[int]) -> Variables:
        """What a run starts from, which depends on the seed alone; of several seeds, stacked."""

    def batches(self, seed: int, start: int, count: int) -> np.ndarray:
        """Indices (count, batch_size) of the batches from step `start` on; none where there is nothing to choose."""
        return np.zeros((count, 0), np.int32)

    @abc.abstractmethod
    def data(self, source: Any, batch: jax.Array, statistics: Any, dropout_key: jax.Array) -> Data:
        """The arguments of the loss for one batch."""

    @abc.abstractmethod
    def score(self, params: Params, statistics: Any, split: Any, *, grid: bool = False) -> Score:
        """Loss and metrics over a split of the data, of a run or of a grid of runs."""

    def finer(self) -> Finer:
        """The same on a grid of twice as many steps; a TypeError where there is no grid."""
        raise TypeError(f"{type(self).__name__} has no grid to refine")

    def loss_and_statistics(self, params: Params, **data: Any) -> tuple[jax.Array, Any]:
        """The loss, and the statistics after this batch, which only the caller's own gradient moves."""
        return self.loss_fn(params, **data), {}
