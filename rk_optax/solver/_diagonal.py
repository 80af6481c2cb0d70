"""A running estimate of the Hessian's diagonal, for solvers whose linear part is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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

    decay: float | jax.Array = 0.99
    every: int = 10
    seed: int = 0

    def __post_init__(self):
        _checks.numbers(self, decay="decay")
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

        def weighed(mean: jax.Array, sample: jax.Array, decay: jax.Array) -> jax.Array:
            return decay * mean + (1 - decay) * sample

        mean, known, new, cost = self._running_mean(field, params, state, weighed)
        d = jax.tree.map(lambda d: jnp.maximum(_tree.ratio(d, known.astype(d.dtype)), 0), mean)
        return jax.tree.map(lambda d, p: d.astype(_tree.real_dtype(p)), d, params), new, cost

    def root_mean_square(
        self, field: VectorField, params: PyTree, state: DiagonalState
    ) -> tuple[PyTree, DiagonalState, Cost]:
        """√ of the running mean of (z ⊙ Hz)², in float32 at least; the state's mean is the root too."""

        def weighed(root: jax.Array, sample: jax.Array, decay: jax.Array) -> jax.Array:
            return hypotenuse(jnp.sqrt(decay) * root, jnp.sqrt(1 - decay) * sample)

        root, known, new, cost = self._running_mean(field, params, state, weighed)
        return jax.tree.map(lambda d: _tree.ratio(d, jnp.sqrt(known).astype(d.dtype)), root), new, cost

    def _running_mean(
        self, field: VectorField, params: PyTree, state: DiagonalState, weighed: Callable[..., jax.Array]
    ) -> tuple[PyTree, jax.Array, DiagonalState, Cost]:
        """The mean that `weighed` makes of the last one and z ⊙ Hz, its sum of weights (0 before the first), ..."""
        due = state.steps % self.every == 0
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.steps)
        # In float32 at least: a decay of 0.999 is 1 in bfloat16.
        wide = jax.tree.map(
            lambda d, p: d.astype(_tree.common_dtype(_tree.real_dtype(p), jnp.float32)), state.mean, params
        )

        def estimate() -> tuple[PyTree, jax.Array]:
            assert field.gradient is not None  # for the type checker: the objective saw to it
            signs = _tree.random_signs(key, params)
            product = jax.jvp(field.gradient, (params,), (signs,))[1]

            def weigh(d: jax.Array, z: jax.Array, hz: jax.Array) -> jax.Array:
                sample = jnp.real(jnp.conj(z) * hz).astype(d.dtype)
                return weighed(d, sample, jnp.asarray(self.decay, d.dtype))

            new = jax.tree.map(weigh, wide, signs, product)
            finite = _tree.all_finite(new)
            return _tree.select(finite, new, wide), state.estimates + finite.astype(jnp.int32)

        mean, estimates = jax.lax.cond(due, estimate, lambda: (wide, state.estimates))
        known = 1 - jax.lax.pow(jnp.asarray(self.decay, _tree.default_float()), estimates)
        steps = jnp.asarray(optax.safe_increment(state.steps))
        new = DiagonalState(steps, estimates, state.key, _tree.cast_like(mean, state.mean))
        return mean, known, new, Cost(products=due.astype(jnp.int32))


def hypotenuse(x: jax.Array, y: jax.Array) -> jax.Array:
    """√(x² + y²) where x² may overflow or vanish, with a derivative where both are 0."""
    x, y = jnp.abs(x), jnp.abs(y)
    larger, smaller = jnp.maximum(x, y), jnp.minimum(x, y)
    return larger * jnp.sqrt(1 + _tree.ratio(smaller, larger) ** 2)
