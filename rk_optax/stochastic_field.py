"""Fields that draw random numbers, and the one place that says which numbers a stage draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


@dataclasses.dataclass(frozen=True)
class StochasticField:
    """A `grad_fn` whose noise is drawn anew at every stage: an unbiased estimate of a field.

    The random keys are data of `update`, like a batch. Stage 1 gets a key as it was passed, so that it is what
    `grad_fn` gives the caller; every later stage gets one of its own, made from that. So the noise of different
    stages is independent, and a step of an explicit method is a product of independent factors: on a linear field its
    mean is the step on the mean field. A dropout mask is the opposite. It defines the field of a step, all stages
    share it, and its key is an ordinary data argument, which is left alone.

    Whatever takes the difference of two evaluations for curvature or error, or the length of one for a slope of the
    loss, sees noise: such rules and solvers refuse this field when the optimizer is built.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def noisy(w, key): return w + jax.random.normal(key, w.shape)  # w, in the mean
    >>> field = rk_optax.StochasticField(noisy)
    >>> tx = rk_optax.heun(None, 0.1, grad_fn=field)
    >>> w, key = jnp.ones(3), jax.random.key(0)
    >>> updates, state = tx.update(field(w, key=key), tx.init(w), w, key=key)
    >>> int(state.cost.gradients)
    2

    Pass another key to every update: `jax.random.fold_in(key, step)`.

    Args:
      grad_fn: `grad_fn(params, *data, key) -> field`, like params and in the convention of the `updates` of `update`.
      keys: names of those data arguments that are random keys (or trees of them) of noise.

    Raises:
      TypeError: `grad_fn` is not callable, `keys` holds anything but names; at the first update, data under such a
        name that are no random keys.
      ValueError: `keys` is empty.

    Cost: that of `grad_fn`, which solvers count as one gradient.
    """

    grad_fn: Callable[..., Any]
    keys: tuple[str, ...] = ("key",)

    def __post_init__(self):
        if not callable(self.grad_fn):
            raise TypeError(f"grad_fn must be callable, got {type(self.grad_fn).__name__}.")
        keys = (self.keys,) if isinstance(self.keys, str) else tuple(self.keys)
        if not keys:
            raise ValueError("keys is empty: name the data arguments that are random keys, or pass grad_fn as it is.")
        if not all(isinstance(name, str) for name in keys):
            raise TypeError(f"keys must be names of data arguments, got {self.keys!r}.")
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "__wrapped__", self.grad_fn)  # its signature names the data

    def __call__(self, params: PyTree, *args: Any, **data: Any) -> PyTree:
        """The field at `params`, with the noise of stage 1."""
        return self.grad_fn(params, *args, **data)

    def data_of_stage(self, data: Mapping[str, Any], stage: int | jax.Array) -> dict[str, Any]:
        """The data of a stage, which counts from 0 and may be traced: its own keys, and the rest as it is."""
        own = {
            name: jax.tree.map(lambda key, name=name: _fresh(key, stage, name), data[name], is_leaf=_is_key)
            for name in self.keys
            if name in data
        }
        return {**data, **own}


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _fresh(key: Any, stage: int | jax.Array, name: str) -> jax.Array:
    """The key itself at stage 0, one made from it at any other."""
    if not _is_key(key):
        old = jnp.asarray(key)
        if old.dtype != jnp.uint32 or old.ndim != 1:  # a key of jax.random.PRNGKey
            raise TypeError(
                f"{name} must be a random key, one for all stages, got {old.dtype} of shape {old.shape}: pass "
                f"{name}=jax.random.key(seed), folded with the step."
            )
        key = old
    if isinstance(stage, int):
        return key if stage == 0 else jax.random.fold_in(key, stage)
    return jnp.where(stage == 0, key, jax.random.fold_in(key, stage))
