"""Which part of the data each stage of a step sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class StageBatches:
    """Which part of the data each stage sees.

    Attributes:
      policy: "same": all of it; "fresh": stage i sees `x[i]` of data with a leading axis of length `stages`; "split":
        stage i sees the i-th of `stages` equal slices along the first axis.
      names: the data arguments that are cut; the others are the same for all stages.
      stages: gradients of one step.
    """

    policy: Literal["same", "fresh", "split"] = "same"
    names: tuple[str, ...] = ()
    stages: int = 1

    @classmethod
    def of(cls, policy: Any, names: Sequence[str] | str, stages: int) -> StageBatches:
        """A policy that cuts.

        Raises:
          ValueError: an unknown policy, or no names.
        """
        names = (names,) if isinstance(names, str) else tuple(names)
        if policy not in ("fresh", "split"):
            raise ValueError(f"stage_batches must be 'same', 'fresh' or 'split', got {policy!r}.")
        if not names:
            raise ValueError(f"stage_batches={policy!r} needs batch_argnames, the data arguments that hold batches.")
        return cls(policy, names, stages)

    def at(self, data: Mapping[str, Any], stage: int | jax.Array) -> dict[str, Any]:
        """The data of one stage.

        Raises:
          ValueError: a leading axis that is not `stages` long ("fresh") or does not divide into `stages` ("split").
        """
        if self.policy == "same":
            return dict(data)
        cut = {
            name: jax.tree.map(lambda x, name=name: self._slice(x, name, stage), data[name])
            for name in self.names
            if name in data
        }
        return {**data, **cut}

    def _slice(self, x: jax.Array, name: str, stage: int | jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        length = x.shape[0] if x.ndim else None
        if self.policy == "fresh":
            if length != self.stages:
                raise ValueError(
                    f"stage_batches='fresh' needs a batch per stage: data argument {name!r} must have a leading axis "
                    f"of length {self.stages}, got shape {x.shape}. Stack {self.stages} batches with jnp.stack."
                )
            return jax.lax.dynamic_index_in_dim(x, stage, keepdims=False)
        if length is None or length % self.stages:
            raise ValueError(
                f"stage_batches='split' cuts a batch into {self.stages} equal parts, and data argument {name!r} "
                f"of shape {x.shape} does not divide. Use a batch size that is a multiple of {self.stages}."
            )
        # A slice keeps the sharding of a batch over devices, which a reshape would put on the axis of the stages.
        return jax.lax.dynamic_slice_in_dim(x, stage * (length // self.stages), length // self.stages)


def first_stage_batch(
    data: Mapping[str, Any], stages: int, policy: Literal["fresh", "split"], batch_argnames: Sequence[str]
) -> dict[str, Any]:
    """The data on which to evaluate the gradient that `update` takes as stage 1, under a stage-batch policy.

    >>> import jax.numpy as jnp, rk_optax
    >>> rk_optax.first_stage_batch({"x": jnp.arange(8)}, 4, "split", ["x"])
    {'x': Array([0, 1], dtype=int32)}

    Args:
      data: the keywords of `update`.
      stages: gradients per step of the solver: 4 for RK4; `rk_optax.TABLEAUS[name].effective_stages`.
      policy: the optimizer's `stage_batches`.
      batch_argnames: the optimizer's.

    Raises:
      ValueError: sizes that do not divide.
    """
    batches = StageBatches.of(policy, batch_argnames, stages)
    for name in set(batches.names) - set(data):
        raise ValueError(f"batch_argnames has {name!r}, which is not in data: {sorted(data)!r}.")
    return batches.at(data, 0)
