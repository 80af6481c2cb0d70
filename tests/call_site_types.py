"""What a type checker says where an optimizer is made. Pyright checks this file; nothing runs it.

Every ignored line holds a mistake, and one that pyright did not find would make its comment an error.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=error

from typing import assert_type

import jax
import optax

import rk_optax


def loss_fn(w: jax.Array, x: jax.Array) -> jax.Array:
    return ((w - x) ** 2).sum()


def what_is_right() -> None:
    assert_type(rk_optax.rk4(loss_fn, 0.1), rk_optax.RungeKutta)
    optax.chain(optax.clip(1.0), rk_optax.rk4(loss_fn, 0.1))
    rk_optax.rk4(loss_fn, optax.cosine_decay_schedule(0.3, 10), momentum=0.9, nesterov=True, stage_batches="same")
    rk_optax.dopri5(loss_fn, rk_optax.error_control(rtol=1e-4), l2=1e-3, has_aux=True)
    rk_optax.sdirk3(None, learning_rate=0.1, grad_fn=jax.grad(loss_fn))
    rk_optax.rkc(loss_fn, stages=5)
    rk_optax.runge_kutta(loss_fn, 0.1, "heun", after=optax.scale_by_adam())
    rk_optax.rk4.__name__.upper()


def what_is_wrong() -> None:
    rk_optax.rk4(loss_fn)  # pyright: ignore[reportCallIssue]
    rk_optax.rk4(loss_fn, 0.1, momentun=0.9)  # pyright: ignore[reportCallIssue]
    rk_optax.rk4(loss_fn, 0.1, 0.9)  # pyright: ignore[reportCallIssue]
    rk_optax.rk4(loss_fn, "fast")  # pyright: ignore[reportArgumentType]
    rk_optax.euler(loss_fn, 0.1, has_aux="yes")  # pyright: ignore[reportArgumentType]
    rk_optax.gauss4(loss_fn, 0.1, stage_batches="slpit")  # pyright: ignore[reportArgumentType]
    rk_optax.dopri8(loss_fn, 0.1, preconditioner=optax.clip(1.0))  # pyright: ignore[reportArgumentType]
    rk_optax.rkc(loss_fn, stage=3)  # pyright: ignore[reportCallIssue]
    rk_optax.residual_euler(loss_fn, max_row=3)  # pyright: ignore[reportCallIssue]
    rk_optax.scale_by_rk(loss_fn, 0.1, momentum=0.9)  # pyright: ignore[reportCallIssue]
