"""A loss of which every step sees all the data, with a known distance from the solution."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rk_optax.experiment.tasks.task import Data, Params, Score, Task, Variables


class FullBatch(Task):
    """A loss, where to start, and how far from the solution one is.

    Attributes:
        params: where every run starts.
        error: `error(params)`, a scalar.
        error_name: what that is.
    """

    examples = 1

    def __init__(
        self,
        loss_fn: Callable[..., jax.Array],
        params: Params,
        data: Data,
        error: Callable[[Params], jax.Array],
        error_name: str,
        *,
        sample: Callable[[jax.Array], Data] | None = None,
        seed: int = 0,
    ):
        """Takes `loss_fn(params, **data)`.

        With `sample(key)` every step sees data of its own, drawn from the seed; the loss that is reported is of `data`.
        """
        self.loss_fn, self.params, self.source = loss_fn, params, data
        self.error, self.error_name = error, error_name
        self.constant, self._sample, self._seed = sample is None, sample, seed
        self._measure = jax.jit(lambda params, data: (loss_fn(params, **data), error(params)))

    def init(self, seeds: int | Sequence[int]) -> Variables:
        """The start, which is part of the problem, and the key of all samples."""
        return Variables(self.params, {}, jax.random.key_data(jax.random.key(self._seed)))

    def data(self, source: Data, batch: jax.Array, statistics: Any, dropout_key: jax.Array) -> Data:
        """All of the source, or a sample."""
        return source if self._sample is None else self._sample(jax.random.wrap_key_data(dropout_key))

    def score(self, params: Params, statistics: Any, split: Any = None, *, grid: bool = False) -> Score:
        """Loss and error, on all of the data."""
        loss, error = self._measure(params, self.source)
        return Score(np.asarray(loss, float), {"error": np.asarray(error, float)})
