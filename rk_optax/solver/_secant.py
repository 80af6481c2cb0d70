"""The Hessian from secants: what the steps so far and the changes of the gradient over them say about it.

The self-scaled Broyden method with Al-Baali's parameters, as `SSBroyden2` of Urbán, Stefanou and Pons (2024, arXiv
2405.04230, formulas 13 to 23), on a dense inverse.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _tree
from rk_optax._vectors import real_matmul

PyTree = Any


class SecantState(NamedTuple):
    """An inverse Hessian H, and where its last gradient is from."""

    inverse: jax.Array  # shape=(P, P): symmetric and positive definite
    params: jax.Array  # shape=(P,): θ of the latest update
    gradient: jax.Array  # shape=(P,): ∇L there
    seen: jax.Array  # shape=(), bool: whether there was one
    fresh: jax.Array  # shape=(), bool: whether H is still a multiple of the identity, and takes its scale from a step

    @classmethod
    def empty(cls, size: int, dtype: Any) -> SecantState:
        """No step yet, and no H: the identity stands for one."""
        zeros, again = jnp.zeros(size, dtype), jnp.zeros(size, dtype)  # separate buffers, which can be donated
        return cls(jnp.eye(size, dtype=dtype), zeros, again, jnp.array(False), jnp.array(True))

    def updated(self, params: jax.Array, gradient: jax.Array) -> SecantState:
        """With the step that has led to `params`.

        H begins as a multiple of the identity (`first_inverse`), and the first secant gives it its scale.

        Along a step without positive curvature B = H⁻¹ is quartered, so that the steps grow until they have left such a
        place: nothing else would, without a line search that lengthens them. Where rounding has made H indefinite, as
        a direction uphill shows, H begins again, with the scale of the latest secant if there is one.
        """
        s, y = params - self.params, gradient - self.gradient
        # In units in which s, y and the gradient are about 1: products of what has the units of the loss overflow.
        of_s, of_y, of_gradient = (_tree.magnitude(x).astype(s.dtype) for x in (s, y, self.gradient))
        s, y, unit = s / of_s, y / of_y, of_s / of_y
        inverse = self.inverse / unit
        pushed = real_matmul(inverse, y)
        # H⁻¹s for the step s = −αH∇L, exact where nothing stands between the direction and the step.
        slope = self.gradient / of_gradient
        direction = real_matmul(inverse, slope)
        length = -_tree.ratio(_tree.norm(s), _tree.norm(direction)) * real_matmul(s, slope)
        sy, square = real_matmul(s, y), real_matmul(y, pushed)
        moved = self.seen & (length > 0) & jnp.isfinite(sy + square + length)
        curved = moved & (sy > 0) & (square > 0)
        # Where it is not usable the numbers may be anything, but no 0/0.
        hy, step, change, size = (jnp.where(curved, x, 1) for x in (pushed, s, y, length))
        new = unit * broyden_inverse(inverse, hy, step, change, size, self.fresh)
        grown = self.inverse + jnp.outer(unit * s, _tree.ratio(3 * s, length))
        new = jnp.where(curved, new, jnp.where(moved, grown, self.inverse))
        new = jnp.where(jnp.all(jnp.isfinite(new)), new, self.inverse)
        uphill = jnp.min(jnp.diagonal(new), initial=jnp.inf) <= 0
        slope = gradient / _tree.magnitude(gradient).astype(gradient.dtype)
        uphill = uphill | (real_matmul(slope, real_matmul(new, slope)) < 0)
        first, known = first_inverse(params, gradient)
        begins = (~self.seen | uphill) & known
        first = jnp.where(curved, unit * _tree.ratio(sy, real_matmul(y, y)), first)
        new = jnp.where(begins, first * jnp.eye(len(params), dtype=params.dtype), new)
        return SecantState(new, params, gradient, self.seen | known, (self.fresh & ~moved) | begins)

    def solve(self, c: Any, scale: jax.Array | None, b: jax.Array) -> jax.Array:
        """X of (I + c·PH⁻¹) x = b: H (H + cP)⁻¹ b, for a diagonal P > 0 (`scale`; None for I)."""
        shift = jnp.asarray(c, b.dtype) * (jnp.ones_like(b) if scale is None else scale)
        b, size = _tree.unit(b)  # which over a long step may be below all numbers

        def by_factor() -> jax.Array:
            factor = jax.scipy.linalg.cho_factor(self.inverse + jnp.diag(shift), lower=True)
            return jax.scipy.linalg.cho_solve(factor, b)

        def by_series() -> jax.Array:
            x = _tree.ratio(b, shift)
            for _ in range(2):
                x = _tree.ratio(b - real_matmul(self.inverse, x), shift)
            return x

        # Then three terms of the series in H/(cP) are all that rounding leaves of it.
        far = jnp.min(shift, initial=jnp.inf) > 1e6 * jnp.trace(self.inverse)
        return size * real_matmul(self.inverse, jax.lax.cond(far, by_series, by_factor))


def first_inverse(params: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The γ of H = γI before any curvature has been seen that would fix it, and whether this gradient gives one.

    Its unit is that of θ²/L, so the step −γ∇L is made a tenth as long as the parameters that have a gradient: a
    multiple of the loss or of the parameters changes nothing but units. A line search shortens what is too long. Where
    all these parameters are 0 no length is known, and that of the step is 1, as in L-BFGS-B.
    """
    reach = 0.1 * _tree.norm(jnp.where(gradient == 0, 0, params))
    first = _tree.ratio(jnp.where(reach == 0, 1, reach), _tree.norm(gradient))
    return first, jnp.isfinite(first) & (first > 0)


def broyden_inverse(
    inverse: jax.Array, pushed: jax.Array, s: jax.Array, y: jax.Array, length: Any, fresh: jax.Array | bool
) -> jax.Array:
    """The next inverse H⁺ of the self-scaled Broyden family, of which H⁺y = s.

    Args:
      inverse: H, symmetric and positive definite.
      pushed: Hy.
      s: the step.
      y: the change of the gradient over it, with s·y > 0.
      length: s·H⁻¹s.
      fresh: whether H is a multiple of the identity, and takes its scale from this step.
    """
    size, sy, square = len(s), real_matmul(s, y), real_matmul(y, pushed)
    b, h = length / sy, square / sy
    a = jnp.maximum(h * b - 1, jnp.finfo(s.dtype).eps)  # not negative, by Cauchy and Schwarz
    least = jnp.minimum(1, h * (1 - jnp.sqrt(a / (1 + a))))
    theta = jnp.maximum((least - 1) / a, jnp.minimum(1 / least, (1 - b) / b))
    sigma = 1 + theta * a
    rho = jnp.minimum(1, 1 / b)
    root = jnp.abs(sigma) ** (1 / (1 - size)) if size > 1 else jnp.ones_like(sigma)
    positive = rho * jnp.minimum(root, 1 / jnp.where(theta > 0, theta, 1))
    tau = jnp.where(theta > 0, positive, jnp.minimum(rho * root, sigma))
    tau = jnp.where(fresh, h / sigma, tau)
    # Divided before they are multiplied: squares of what has the units of the loss may be out of range.
    root, s = jnp.sqrt(square), s / jnp.sqrt(sy)
    pushed = pushed / root
    v = jnp.sqrt(h) * s - pushed
    phi = (1 - theta) / sigma
    kept = inverse - jnp.outer(pushed, pushed) + phi * jnp.outer(v, v)
    return kept / tau + jnp.outer(s, s)
