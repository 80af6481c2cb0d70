"""Step sizes from the sharpness and from the loss: gradient descent kept at a fraction of its stability limit."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rk_optax import _checks, _lanczos, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver import Cost
from rk_optax.step_size import Proposal, StepSizeRule

PyTree = Any


class SharpnessCappedState(NamedTuple):
    """State of `SharpnessCapped`."""

    sharpness: jax.Array  # shape=(), float: the latest estimate of |λ|max
    seen: jax.Array  # shape=(), bool: whether there has been one
    eigenvector: PyTree  # like params: where the power method goes on


@dataclasses.dataclass(frozen=True)
class SharpnessCapped(StepSizeRule):
    """h = α/λmax, at a fixed fraction of Euler's stability limit 2/λmax (α = 2), by the power method.

    λmax is the eigenvalue of the field's Jacobian that is largest in size, P∇²L with a preconditioner P. Each step
    takes `products` steps of the power method from the vector of the step before; the estimate comes from below.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return 0.5 * jnp.sum(jnp.array([1.0, 5.0]) * w ** 2)
    >>> tx = rk_optax.euler(loss_fn, rk_optax.SharpnessCapped(alpha=1.0))
    >>> w = jnp.array([1.0, 1.0])
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> f"{state.rule.sharpness:.3f}, {state.step_size:.3f}"
    '5.000, 0.200'

    Args:
      alpha: α, positive; below 2 for Euler's method, below `real_stability_interval` for another tableau.
      products: Hessian products of a step, each about two gradients.
      first_products: those of the first step, whose start is random.
      max_learning_rate: the most that h can be, where the loss is flat.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a `grad_fn` without a loss.

    Source: the sharpness-capped rates of Cohen et al. (2021), arXiv 2103.00065, with α/λmax for min(h, 2/λmax).
    """

    alpha: float = 1.0
    _: dataclasses.KW_ONLY
    products: int = 1
    first_products: int = 20
    max_learning_rate: float = 1e12
    needs: ClassVar[frozenset[Capability]] = frozenset({"product"})

    def __post_init__(self):
        _checks.number(self.alpha, "alpha", "positive")
        _checks.number(self.max_learning_rate, "max_learning_rate", "positive")
        _checks.count(self.products, "products")
        _checks.count(self.first_products, "first_products")

    def init(self, params: PyTree) -> SharpnessCappedState:
        """No estimate yet."""
        vector = jax.tree.map(jnp.zeros_like, params)
        return SharpnessCappedState(jnp.zeros([], _tree.default_float()), jnp.zeros([], bool), vector)

    def propose(self, count: jax.Array, state: PyTree, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """Costs `products` Hessian products, the first time `first_products`."""
        del count, k1
        random = _lanczos.random_vector(jax.random.key(0), params)
        start = _tree.select(state.seen, _tree.cast_like(state.eigenvector, params), random)

        def iterate(_: Any, carry: tuple[PyTree, jax.Array, jax.Array]) -> tuple[PyTree, jax.Array, jax.Array]:
            vector, sharpness, seen = carry
            moved, size = _tree.unit(field.product(params, vector))
            size = size.astype(sharpness.dtype)
            known = jnp.isfinite(size)
            # Where there is no curvature at all, a product has no direction to go on with.
            vector = _tree.select(known & (size > 0), moved, vector)
            return vector, jnp.where(known, size, sharpness), seen | known

        products = jnp.where(state.seen, self.products, self.first_products)
        carry = (_tree.unit(start)[0], state.sharpness, state.seen)
        vector, sharpness, seen = jax.lax.fori_loop(0, products, iterate, carry)
        sharp = sharpness * self.max_learning_rate > self.alpha
        h = jnp.where(sharp, self.alpha / jnp.where(sharp, sharpness, 1), self.max_learning_rate)
        new = SharpnessCappedState(sharpness, seen, _tree.cast_like(vector, state.eigenvector))
        return Proposal(h, new, Cost(products=products.astype(jnp.int32)))


sharpness_capped = SharpnessCapped


@dataclasses.dataclass(frozen=True)
class Corridor(StepSizeRule):
    """h = min((L − L*)/‖g‖², c), with L* = 0: the rate for which the loss falls along a straight corridor.

    It is Polyak's step. On a quadratic in one dimension hλ = ½. With a diagonal preconditioner P the norm is that in
    which P∇L is the gradient, ⟨∇L, P∇L⟩.

    >>> import jax, jax.numpy as jnp, rk_optax
    >>> def loss_fn(w): return 2.0 * jnp.sum(w ** 2)  # λ = 4
    >>> tx = rk_optax.euler(loss_fn, rk_optax.Corridor(max_learning_rate=1.0))
    >>> w = jnp.array([1.0, -2.0])
    >>> _, state = tx.update(jax.grad(loss_fn)(w), tx.init(w), w)
    >>> float(state.step_size)
    0.125

    Args:
      max_learning_rate: c, positive: the loss falls to L* in finite time, and where ‖g‖ vanishes first h would not end.
      minimum: L*, a number that the loss is not below; h is 0 where it is.

    Raises:
      ValueError: an argument out of its range; at construction of the optimizer, a `grad_fn` without a loss.

    Cost: one loss a step. Source: Dherin and Rosca, "Corridor geometry in gradient-based optimization", arXiv
    2402.08818.
    """

    max_learning_rate: float
    minimum: float = 0.0
    needs: ClassVar[frozenset[Capability]] = frozenset({"loss", "deterministic"})

    def __post_init__(self):
        _checks.number(self.max_learning_rate, "max_learning_rate", "positive")

    def propose(self, count: jax.Array, state: PyTree, field: VectorField, params: PyTree, k1: PyTree) -> Proposal:
        """Costs one loss."""
        del count
        gap = jnp.maximum(field.loss(params) - self.minimum, 0)
        if field.scale is not None:
            k1 = jax.tree.map(lambda g, p: g / jnp.sqrt(p), k1, field.scale)
        norm = _tree.norm(k1)
        usable = norm > 0
        safe = jnp.where(usable, norm, 1)
        h = jnp.where(usable, gap / safe / safe, self.max_learning_rate)
        return Proposal(jnp.minimum(h, self.max_learning_rate), state, Cost(losses=field.losses_at(params)))


corridor = Corridor
