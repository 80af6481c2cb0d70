"""Methods that are told what the problem is, a linear system or a factorisation: the bounds of a race.

They read the data of the loss instead of its gradient; `loss_fn`, and a `learning_rate` of type None, are there to call
them like the others.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import rk_optax
from rk_optax.experiment.counted import Transformation, counted


class DualDescentState(NamedTuple):
    """What `stochastic_dual_descent` carries."""

    rows: jax.Array  # shape=(), int32: rows of the matrix that were read, less whole multiples of it
    key: jax.Array  # for the rows to come
    place: jax.Array  # like params: where the next gradient is taken, α + ρv
    sgd: Any  # Optax's


def stochastic_dual_descent(
    loss_fn: Callable[..., jax.Array],
    learning_rate: Any,
    batch: int = 64,
    momentum: float = 0.9,
    averaging: float = 1e-3,
) -> Transformation:
    """Stochastic dual descent on (½αᵀMα − yᵀα)/n: Nesterov's method on sampled rows of M, and an average of α.

    With g the gradient on `batch` rows, drawn with replacement, at α + ρv: v ← ρv − ηg, α ← α + v, and the parameters
    are ᾱ ← (1 − r)ᾱ + rα. Optax's Nesterov momentum keeps α + ρv.

    Args:
        loss_fn: its data are `matrix` and `y`.
        learning_rate: η, in units of the mean over n.
        batch: rows of a step.
        momentum: ρ.
        averaging: r.

    Source: Lin et al., "Stochastic gradient descent for Gaussian processes done right", arXiv 2310.20581.
    """
    sgd = optax.sgd(learning_rate, momentum, nesterov=True)

    def init(params: Any) -> DualDescentState:
        key = jax.random.key_data(jax.random.key(0))
        place = jnp.array(params)  # a buffer of its own
        return DualDescentState(jnp.zeros([], jnp.int32), key, place, sgd.init(params))

    def step(grads: Any, state: DualDescentState, params: Any, data: Any, value: Any) -> Any:
        matrix, y = data["matrix"], data["y"]
        key, own = jax.random.split(jax.random.wrap_key_data(state.key))
        rows = jax.random.randint(own, (batch,), 0, len(y))
        residual = matrix[rows] @ state.place - y[rows]
        gradient = jnp.zeros_like(y).at[rows].add(residual / batch)
        moves, after = sgd.update(gradient, state.sgd, state.place)
        place: Any = optax.apply_updates(state.place, moves)
        velocity = -learning_rate * optax.tree_utils.tree_get(after, "trace")
        alpha = place - momentum * velocity
        whole, read = jnp.divmod(state.rows + batch, len(y))
        new = DualDescentState(read, jax.random.key_data(key), place, after)
        return averaging * (alpha - params), new, rk_optax.Cost(gradients=whole)

    return counted(init, step)


class ConjugateGradientsState(NamedTuple):
    """What `conjugate_gradients` carries."""

    residual: jax.Array  # y − Mα
    direction: jax.Array
    square: jax.Array  # shape=(): of the residual; negative before the first step


def conjugate_gradients(loss_fn: Callable[..., jax.Array], learning_rate: None = None) -> Transformation:
    """The conjugate gradient method for Mα = y, from data `matrix` and `y`, an iteration a step."""

    def init(params: Any) -> ConjugateGradientsState:
        return ConjugateGradientsState(jnp.zeros_like(params), jnp.zeros_like(params), -jnp.ones([], params.dtype))

    def step(grads: Any, state: ConjugateGradientsState, params: Any, data: Any, value: Any) -> Any:
        matrix, y = data["matrix"], data["y"]
        first = state.square < 0
        residual = jnp.where(first, y - matrix @ params, state.residual)
        direction = jnp.where(first, residual, state.direction)
        square = jnp.where(first, residual @ residual, state.square)
        pushed = matrix @ direction
        energy = direction @ pushed
        length = jnp.where(energy > 0, square / jnp.where(energy > 0, energy, 1), 0)  # 0 once it is solved
        residual = residual - length * pushed
        new = residual @ residual
        following = residual + new / jnp.where(square > 0, square, 1) * direction
        return length * direction, ConjugateGradientsState(residual, following, new), rk_optax.Cost(gradients=1)

    return counted(init, step)


def cholesky(loss_fn: Callable[..., jax.Array], learning_rate: None = None) -> Transformation:
    """Mα = y by a factorisation, from data `matrix` and `y`, in one step."""

    def step(grads: Any, state: Any, params: Any, data: Any, value: Any) -> Any:
        solution = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(data["matrix"]), data["y"])
        return solution - params, state, rk_optax.Cost()

    return counted(lambda params: (), step)


def alternating_least_squares(loss_fn: Callable[..., jax.Array], learning_rate: None = None) -> Transformation:
    """A factorisation LRᵀ of a matrix of which some entries are known: L for fixed R, then R for fixed L, in one step.

    The data are `row`, `column` and `entry`, the parameters `left` and `right`.
    """

    def solved(fixed: jax.Array, mine: jax.Array, other: jax.Array, entry: jax.Array, count: int) -> jax.Array:
        """For each of `count` rows the least-squares solution over its known entries."""
        known = fixed[other]
        rank = fixed.shape[1]
        gram = jnp.zeros((count, rank, rank), fixed.dtype).at[mine].add(known[:, :, None] * known[:, None, :])
        right = jnp.zeros((count, rank), fixed.dtype).at[mine].add(known * entry[:, None])
        return jnp.linalg.solve(gram, right[..., None])[..., 0]

    def step(grads: Any, state: Any, params: Any, data: Any, value: Any) -> Any:
        row, column, entry = data["row"], data["column"], data["entry"]
        left = solved(params["right"], row, column, entry, len(params["left"]))
        right = solved(left, column, row, entry, len(params["right"]))
        # Each half is a pass over the entries, as a gradient is one.
        cost = rk_optax.Cost(gradients=2)
        return {"left": left - params["left"], "right": right - params["right"]}, state, cost

    return counted(lambda params: (), step)


DIRECT: Mapping[str, Callable[..., Transformation]] = {
    method.__name__: method
    for method in (stochastic_dual_descent, conjugate_gradients, cholesky, alternating_least_squares)
}
