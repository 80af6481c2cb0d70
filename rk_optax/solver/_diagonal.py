"""A running estimate of the Hessian's diagonal, for solvers whose linear part is one."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _tree
from rk_optax.field import VectorField
from rk_optax.solver._base import Cost

PyTree = Any


class DiagonalState(NamedTuple):
    """State of `DiagonalCurvature`."""

    steps: jax.Array  # shape=(), int32: steps seen
    estimates: jax.Array  # shape=(), int32: estimates in the mean
    key: jax.Array  # of the probes
    mean: PyTree  # like params, real: the running mean, not corrected for its start at 0


@dataclasses.dataclass(frozen=True)
class DiagonalCurvature:
    """The diagonal D of the Hessian by Hutchinson's estimator: the running mean of z ⊙ Hz, z random signs, D ≥ 0.

    The mean is exact in expectation, and in one sample where the Hessian is diagonal; its negative part is cut off when
    D is read. Each estimate costs one Hessian-vector product (about two gradients), at the first step and then every
    `every` steps; one that is not finite is dropped.

    Args:
      decay: of the running mean, in [0, 1); it is bias-corrected.
      every: steps between estimates.
      seed: of the probes.

    Raises:
      ValueError: an argument out of its range.

    Source: Bekas, Kokiopoulou and Saad (2007); the mean over steps as in AdaHessian (arXiv 2006.00719), without its
      squares.
    """

    decay: float = 0.99
    every: int = 10
    seed: int = 0

    def __post_init__(self):
        _checks.number(self.decay, "decay", "decay")
        _checks.count(self.every, "every")

    def init(self, params: PyTree) -> DiagonalState:
        """Nothing estimated; `params` may be abstract."""
        return DiagonalState(
            jnp.zeros([], jnp.int32),
            jnp.zeros([], jnp.int32),
            jax.random.key_data(jax.random.key(self.seed)),
            jax.tree.map(lambda x: jnp.real(jnp.zeros_like(x)), params),
        )

    def update(self, field: VectorField, params: PyTree, state: DiagonalState) -> tuple[PyTree, DiagonalState, Cost]:
        """D at `params`, real and like params in the stage dtype, with the state and the cost of this step."""
        due = state.steps % self.every == 0
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.steps)
        wide = jax.tree.map(lambda d, p: d.astype(_tree.real_dtype(p)), state.mean, params)

        def estimate() -> tuple[PyTree, jax.Array]:
            assert field.gradient is not None  # for the type checker: the objective saw to it
            signs = _tree.random_signs(key, params)
            product = jax.jvp(field.gradient, (params,), (signs,))[1]
            new = jax.tree.map(
                lambda d, z, hz: self.decay * d + (1 - self.decay) * jnp.real(jnp.conj(z) * hz), wide, signs, product
            )
            finite = _tree.all_finite(new)
            return _tree.select(finite, new, wide), state.estimates + finite

        mean, estimates = jax.lax.cond(due, estimate, lambda: (wide, state.estimates))

        def corrected(d: jax.Array) -> jax.Array:
            known = 1 - jnp.asarray(self.decay, d.dtype) ** estimates  # 0 before the first: D = 0
            return jnp.maximum(_tree.ratio(d, known), 0)

        new = DiagonalState(state.steps + 1, estimates, state.key, _tree.cast_like(mean, state.mean))
        return jax.tree.map(corrected, mean), new, Cost(products=due.astype(jnp.int32))
