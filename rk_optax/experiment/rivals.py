"""The optimizers that stiff least squares is raced against: quasi-Newton and Gauss–Newton methods from the literature.

Each is written as published, so that a race compares with what others would run; none is part of rk_optax's API.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import rk_optax
from rk_optax.experiment.counted import Transformation, counted
from rk_optax.experiment.errors import optional
from rk_optax.solver._secant import broyden_inverse


class BroydenState(NamedTuple):
    """What `ssbroyden` carries."""

    inverse: jax.Array  # shape=(P, P): of the Hessian
    fresh: jax.Array  # shape=(), bool: whether the inverse is still the identity
    search: Any  # of the line search: its value and gradient are those at the new parameters


def ssbroyden(loss_fn: Callable[..., jax.Array], max_linesearch_steps: int = 20) -> Transformation:
    """The self-scaled Broyden method with Al-Baali's parameters, as `SSBroyden2` of Urbán, Stefanou and Pons (2024).

    A dense inverse Hessian, a line search for the strong Wolfe conditions that first tries 1 (Optax's), and from each
    step s and change y of the gradient a member of the Broyden family (formulas 13 to 23 of arXiv 2405.04230). Where no
    step is found the inverse starts again from the identity.
    """
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps, initial_guess_strategy="one")

    def init(params: Any) -> BroydenState:
        flat, _ = ravel_pytree(params)
        return BroydenState(jnp.eye(flat.size, dtype=flat.dtype), jnp.array(True), search.init(params))

    def step(grads: Any, state: BroydenState, params: Any, data: Any, value: Any) -> Any:
        gradient, unravel = ravel_pytree(grads)
        identity = jnp.eye(len(gradient), dtype=gradient.dtype)
        direction = state.inverse @ gradient
        downhill = direction @ gradient > 0
        direction = jnp.where(downhill, direction, gradient)

        def value_fn(p: Any) -> jax.Array:
            return loss_fn(p, **data)

        value = value_fn(params) if value is None else value
        of_loss: Any = {"value": value, "grad": grads, "value_fn": value_fn}
        after: Any
        moves, after = search.update(unravel(-direction), state.search, params, **of_loss)
        s, y = ravel_pytree(moves)[0], ravel_pytree(after.grad)[0] - gradient
        fresh, sy = state.fresh | ~downhill, s @ y
        inverse = jnp.where(downhill, state.inverse, identity)
        pushed = jnp.where(downhill, state.inverse @ y, y)
        # s = −αHg, so s·H⁻¹s = −α s·g.
        length = -jnp.sqrt((s @ s) / (direction @ direction)) * (s @ gradient)
        # Nothing but this writes the matrix, in one pass: it is what a step costs.
        new = broyden_inverse(inverse, pushed, s, y, length, fresh)
        usable, stuck = (sy > 0) & (y @ pushed > 0) & (length > 0), ~jnp.any(s != 0)
        new = jnp.where(usable, new, jnp.where(stuck, identity, inverse))
        cost = rk_optax.Cost(gradients=after.info.num_linesearch_steps)
        return moves, BroydenState(new, jnp.where(usable, False, fresh | stuck), after), cost

    return counted(init, step)


def engd_w(loss_fn: rk_optax.LeastSquares, learning_rate: float | None = None, damping: float = 1e-8) -> Transformation:
    """Energy natural gradients by Woodbury's formula: θ − ηRᵀ(RRᵀ + λI)⁻¹r (Guzmán-Cordero et al. 2025).

    `damping` is λ; the rate η is that of the least loss over 2⁰, 2⁻¹ ... 2⁻³⁰ where none is given, as in Müller and
    Zeinhofer (2023).
    """
    return spring(loss_fn, learning_rate, damping, momentum=0.0, norm_constraint=None)


def spring(
    loss_fn: rk_optax.LeastSquares,
    learning_rate: float | None = None,
    damping: float = 1e-8,
    momentum: float = 0.9,
    norm_constraint: float | None = 1e-3,
) -> Transformation:
    """Goldshlager, Abrahamsen and Lin's SPRING (2024, arXiv 2401.10190), as rla-pinns has it for residuals.

    φ ← μφ − Rᵀ(RRᵀ + λI)⁻¹(r + μRφ), and θ ← θ + ηφ, with η no more than √C/‖φ‖.

    Args:
        loss_fn: the residuals.
        learning_rate: η; None takes the least loss over 2⁰, 2⁻¹ ... 2⁻³⁰.
        damping: λ.
        momentum: μ in [0, 1).
        norm_constraint: C, for a given η; None for no bound.
    """
    _check_residuals(loss_fn)

    def step(grads: Any, last: jax.Array, params: Any, data: Any, value: Any) -> Any:
        flat, unravel = ravel_pytree(params)
        of_data = loss_fn.rows(params, data)
        residual, rows = of_data.residual, of_data.matrix()
        phi = momentum * last - _damped(rows, residual + momentum * (rows @ last), damping)
        if learning_rate is None:
            rates = jnp.asarray(0.5 ** np.arange(31.0), flat.dtype)
            losses = jax.lax.map(lambda rate: loss_fn(unravel(flat + rate * phi), **data), rates)
            rate = rates[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]
        else:
            rate = jnp.asarray(learning_rate, flat.dtype)
            if norm_constraint is not None:
                rate = jnp.minimum(rate, np.sqrt(norm_constraint) / jnp.linalg.norm(phi))
        cost = rk_optax.Cost(rows=len(rows), losses=31 if learning_rate is None else 0)
        return unravel(rate * phi), phi, cost

    return counted(lambda params: jnp.zeros_like(ravel_pytree(params)[0]), step)


def somax_egn(
    loss_fn: rk_optax.LeastSquares, learning_rate: float = 1.0, damping: float = 1.0, adapts: bool = True
) -> Transformation:
    """python-somax's `egn_mse`: Gauss–Newton by a Cholesky factorisation in the space of the residuals.

    Args:
        loss_fn: its residuals are the library's predictions, with targets 0.
        learning_rate: of a step.
        damping: λ, at the start.
        adapts: whether λ follows the quality of the model (the library's `trust_region`) or stays.
    """
    _check_residuals(loss_fn)
    somax = optional("somax", "needs python-somax", "python-somax")

    def method(scale: float) -> Any:
        def predict(params: Any, data: Mapping[str, Any]) -> jax.Array:
            return scale * loss_fn.residual(params, data)  # its loss is a mean

        policy = {"lam_policy": "trust_region", "record_rho_every_k": 1} if adapts else {"lam_policy": "const"}
        return somax.make("egn_mse", predict_fn=predict, lam0=damping, learning_rate=learning_rate, **policy)

    def step(grads: Any, state: Any, params: Any, data: Any, value: Any) -> Any:
        count = loss_fn.count_rows(params, data)
        batch = {"x": data, "y": jnp.zeros(count, ravel_pytree(params)[0].dtype)}
        new, state, _ = method(float(np.sqrt(count))).step(params, batch, state, jax.random.key(0))
        return jax.tree.map(jnp.subtract, new, params), state, rk_optax.Cost(gradients=1, products=count)

    return counted(method(1.0).init, step)


def optimistix_lm(loss_fn: rk_optax.LeastSquares, iterations: int = 4) -> Transformation:
    """Optimistix's `LevenbergMarquardt`, `iterations` of its own to an update; its step size goes on from the last."""
    _check_residuals(loss_fn)
    optimistix, equinox = (optional(name, f"needs {name}", name) for name in ("optimistix", "equinox"))

    class Resumed(optimistix.ClassicalTrustRegion):
        """The library's trust region, from a given step size."""

        start: Any = 1.0

        def init(self, y: Any, f_info_struct: Any) -> Any:
            state = super().init(y, f_info_struct)
            return equinox.tree_at(lambda s: s.step_size, state, jnp.asarray(self.start, state.step_size.dtype))

    def step(grads: Any, step_size: jax.Array, params: Any, data: Any, value: Any) -> Any:
        solver = optimistix.LevenbergMarquardt(rtol=0.0, atol=0.0)
        solver = equinox.tree_at(lambda s: s.search, solver, Resumed(start=step_size))
        # One more than asked for: the first evaluates where it starts.
        found = optimistix.least_squares(
            lambda p, _: loss_fn.residual(p, data), solver, params, max_steps=iterations + 1, throw=False
        )
        size = ravel_pytree(params)[0].size
        cost = rk_optax.Cost(losses=1, products=(iterations + 1) * size)
        return jax.tree.map(jnp.subtract, found.value, params), found.state.search_state.step_size, cost

    return counted(lambda params: jnp.ones([], ravel_pytree(params)[0].dtype), step)


RIVALS: dict[str, Callable[..., Transformation]] = {
    rival.__name__: rival for rival in (ssbroyden, engd_w, spring, somax_egn, optimistix_lm)
}


def _damped(rows: jax.Array, right: jax.Array, damping: float) -> jax.Array:
    """Rᵀ(RRᵀ + λI)⁻¹c, by the smaller of RRᵀ and RᵀR: without Woodbury's formula where there are fewer weights."""
    wide = len(rows) <= rows.shape[1]
    kernel = rows @ rows.T if wide else rows.T @ rows
    factor = jnp.linalg.cholesky(kernel + damping * jnp.eye(len(kernel), dtype=rows.dtype)), True
    solve = jax.scipy.linalg.cho_solve
    return solve(factor, right) @ rows if wide else solve(factor, right @ rows)


def _check_residuals(loss_fn: Any) -> None:
    if not isinstance(loss_fn, rk_optax.LeastSquares):
        raise TypeError(f"needs residuals, an rk_optax.LeastSquares, and not a {type(loss_fn).__name__}")
