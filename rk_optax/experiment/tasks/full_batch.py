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

    constant = True
    examples = 1

    def __init__(
        self,
        loss_fn: Callable[..., jax.Array],
        params: Params,
        data: Data,
        error: Callable[[Params], jax.Array],
        error_name: str,
    ):
        """Takes `loss_fn(params, **data)`."""
        self.loss_fn, self.params, self.source = loss_fn, params, data
        self.error, self.error_name = error, error_name
        self._measure = jax.jit(lambda params, data: (loss_fn(params, **data), error(params)))

    def init(self, seeds: int | Sequence[int]) -> Variables:
        """The start, which is part of the problem; there are no dropout masks to draw."""
        return Variables(self.params, {}, jax.random.key_data(jax.random.key(0)))

    def score(self, params: Params, statistics: Any, split: Any = None, *, grid: bool = False) -> Score:
        """Loss and error, on all of the data."""
        loss, error = self._measure(params, self.source)
        return Score(np.asarray(loss, float), {"error": np.asarray(error, float)})
