"""The Hessian from the latest secants alone: for more parameters than a dense matrix has room for.

BFGS in its compact form (Byrd, Nocedal and Schnabel, 1994, formula 2.17), of which linear systems with a multiple of
the identity, or a diagonal, are solved as well as those of the matrix itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax._vectors import real_matmul
from rk_optax.solver._secant import first_inverse

MEMORY = 20  # pairs m: two for each are kept, 40 times the parameters; further ones no longer save many steps


class LimitedSecantState(NamedTuple):
    """The latest m steps s and changes y of the gradient over them, of which B is made, and the place of the last one.

    B = γ(I − W N⁻¹Wᵀ) with W = [S, Y] and N = [[SᵀS, L], [Lᵀ, −D]], L the part of SᵀY below its diagonal. It does not
    change with the length of any column of W where N changes with it, so that all are kept as unit vectors, and what
    has a unit is one curvature for each pair.
    """

    pairs: jax.Array  # shape=(2m, P): s/‖s‖ of m pairs, then y/‖y‖ of them; the latest in slot stored − 1, modulo m
    gram: jax.Array  # shape=(2m, 2m): the inner products of the pairs' vectors
    curvatures: jax.Array  # shape=(m,): ‖y‖/‖s‖
    stored: jax.Array  # shape=(), int32: pairs since B was a multiple of the identity
    scale: jax.Array  # shape=(): γ > 0, in the units of L/θ²
    reach: jax.Array  # shape=(): the length of B⁻¹∇L at the latest update
    params: jax.Array  # shape=(P,): θ of the latest update
    gradient: jax.Array  # shape=(P,): ∇L there
    seen: jax.Array  # shape=(), bool: whether there was one

    @classmethod
    def empty(cls, size: int, dtype: Any) -> LimitedSecantState:
        """No step yet, and no B: the identity stands for one."""
        zeros, again = jnp.zeros(size, dtype), jnp.zeros(size, dtype)  # separate buffers, which can be donated
        pairs, gram = jnp.zeros((2 * MEMORY, size), dtype), jnp.zeros((2 * MEMORY, 2 * MEMORY), dtype)
        none, one, reach = jnp.zeros([], jnp.int32), jnp.ones([], dtype), jnp.ones([], dtype)
        curvatures = jnp.zeros(MEMORY, dtype)
        return cls(pairs, gram, curvatures, none, one, reach, zeros, again, jnp.array(False))

    def updated(self, params: jax.Array, gradient: jax.Array) -> LimitedSecantState:
        """With the step that has led to `params`; what is not said here is as for `SecantState.updated`.

        γ is the y·y/s·y of the latest pair. Along a step without positive curvature B is quartered: that is BFGS's
        update for y = Bs/4, and Bs is −α∇L where the step was s = −αB⁻¹∇L. B begins again where rounding shows: where
        B⁻¹∇L is uphill, or not finite.
        """
        (s, of_s), (y, of_y), (slope, steepness) = map(
            _unit, (params - self.params, gradient - self.gradient, self.gradient)
        )
        least = float(jnp.finfo(s.dtype).eps)  # a cosine below is rounding
        cosine, down = real_matmul(s, y), -real_matmul(s, slope)
        curvature, quartered = _tree.ratio(of_y, of_s), 0.25 * _tree.ratio(steepness, self.reach)
        moved = self.seen & (down > least) & jnp.isfinite(cosine + curvature + quartered) & (quartered > 0)
        curved = moved & (cosine > least)
        y = jnp.where(curved, y, -slope)
        scale = jnp.where(curved, _tree.ratio(curvature, cosine), self.scale)
        new = self._with_pair(moved, s, y, jnp.where(curved, curvature, quartered))._replace(scale=scale)
        slope, steepness = _unit(gradient)
        one = jnp.ones_like(scale)
        direction = new._solved(jnp.zeros_like(scale), one, one, slope)
        reach = _tree.norm(direction)
        downhill = (real_matmul(slope, direction) > 0) & jnp.isfinite(reach)
        first, known = first_inverse(params, gradient)
        begins = (~self.seen | ~downhill) & known
        scale = jnp.where(begins & ~curved, 1 / jnp.where(known, first, 1), scale)
        return new._replace(
            stored=jnp.where(begins, 0, new.stored),
            scale=scale,
            reach=jnp.where(begins, steepness, reach * steepness) / scale,
            params=params,
            gradient=gradient,
            seen=self.seen | known,
        )

    def _with_pair(self, moved: jax.Array, s: jax.Array, y: jax.Array, curvature: jax.Array) -> LimitedSecantState:
        """With one more pair where one was found (`moved`), in place of the oldest."""
        memory = len(self.curvatures)
        slot = self.stored % memory
        at = jnp.stack([slot, slot + memory])
        rows = jnp.where(moved, jnp.stack([s, y]), self.pairs[at])
        pairs = self.pairs.at[at].set(rows)
        products = real_matmul(pairs, rows.T)
        stored = jnp.where(self.stored < 2 * memory, self.stored, self.stored - memory)  # and never overflows
        return self._replace(
            pairs=pairs,
            gram=self.gram.at[at].set(products.T).at[:, at].set(products),
            curvatures=self.curvatures.at[slot].set(jnp.where(moved, curvature, self.curvatures[slot])),
            stored=stored + moved.astype(stored.dtype),
        )

    def solve(self, c: Any, scale: jax.Array | None, b: jax.Array) -> jax.Array:
        """X of (I + c·PB) x = b, for a diagonal P > 0 (`scale`; None for I) and c ≥ 0."""
        c, (b, size) = jnp.asarray(c, b.dtype), _unit(b)
        of_scale = 1 if scale is None else _tree.magnitude(scale).astype(b.dtype)
        weights = jnp.ones([], b.dtype) if scale is None else scale / of_scale
        shift = c * self.scale * of_scale
        near = shift <= 1
        x = self._solved(jnp.where(near, 1, 1 / jnp.where(near, 1, shift)), jnp.where(near, shift, 1), weights, b)
        # The product of a long c and γ may be infinite, and XLA, to which (u/v)/w is u/(vw), would divide by it.
        size = jnp.where(near, size, jax.lax.optimization_barrier(size / self.scale / of_scale))
        return size / jnp.where(near, 1, c) * x

    def _solved(self, a: jax.Array, e: jax.Array, weights: jax.Array, b: jax.Array) -> jax.Array:
        """X of (aI + e·PB/γ) x = b: by Woodbury, in whose small matrix nothing cancels for any a, e ≥ 0 not both 0.

        With the diagonal E = a + eP that matrix is N − Wᵀ(eP/E)W = [[SᵀFS, C], [Cᵀ, −D − Yᵀ(I − F)Y]], F = aE⁻¹, and
        C is both L − Sᵀ(I − F)Y, where e is the small one, and SᵀFY − (SᵀY − L) where a is.
        """
        memory = len(self.curvatures)
        age = (self.stored - 1 - jnp.arange(memory)) % memory
        kept = age < self.stored
        both = jnp.tile(kept, 2)
        diagonal = a + e * weights
        f, rest = a / diagonal, e * weights / diagonal
        mostly_a = a >= e
        of_c = jnp.where(mostly_a, -rest, f)
        s, y = self.pairs[:memory], self.pairs[memory:]
        inner = jnp.where(both[:, None] & both[None], self.gram, 0)
        ss, sy, yy = inner[:memory, :memory], inner[:memory, memory:], inner[memory:, memory:]
        later = age[:, None] < age[None]  # s_i than y_j
        c = jnp.where(mostly_a, jnp.where(later, sy, 0), jnp.where(later, 0, -sy))
        if weights.ndim:
            whole = kept[:, None] & kept[None]
            ss, moved, yy = (
                jnp.where(whole, real_matmul(w[None] * left, right.T), 0)
                for w, left, right in ((f, s, s), (of_c, s, y), (rest, y, y))
            )
        else:
            ss, moved, yy = f * ss, of_c * sy, rest * yy
        d = jnp.where(kept, jnp.diagonal(sy) * _tree.ratio(self.scale, self.curvatures), 1)
        c, ss, yy = c + moved, ss + jnp.diag(jnp.where(kept, 0, 1).astype(ss.dtype)), yy + jnp.diag(d)
        small = jnp.block([[ss, c], [c.T, -yy]])
        units = jnp.sqrt(jnp.max(jnp.abs(small), axis=1))
        x = b / diagonal
        right = jnp.where(both, real_matmul(self.pairs, x), 0)
        weight = jnp.linalg.solve(small / units[None] / units[:, None], right / units) / units
        return x + rest * real_matmul(weight, self.pairs)


def _unit(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_tree.unit`, also of a vector so short that its inverse length is no number."""
    size = _tree.magnitude(vector).astype(vector.dtype)
    vector, length = _tree.unit(vector / size)
    return vector, length * size
