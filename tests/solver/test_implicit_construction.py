"""How an implicit solver is built: names, aliases, tableaus of one's own, and what cannot be solved."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import first_update

import rk_optax
from rk_optax import IMPLICIT_TABLEAUS, ButcherTableau, Explicit, Implicit, VectorField
from rk_optax.solver import as_solver

named = pytest.mark.parametrize("name", IMPLICIT_TABLEAUS)

THETA = np.array([0.9, -0.4, 0.7])


def loss_fn(w):
    """Nonlinear, coupled, with a Hessian that changes along the step."""
    return jnp.sum(w**4) / 4 + jnp.sin(w[0] * w[1]) + jnp.prod(w) + jnp.sum((w - 0.3) ** 2)


def hand_made(loss):
    gradient = jax.grad(loss)
    return VectorField(lambda w, stage: gradient(w), loss, gradient, gradient=gradient)


@pytest.mark.covering(most=2)
@named
def test_names_aliases_and_tableaus_are_the_same_method(name):
    tableau = IMPLICIT_TABLEAUS[name]
    assert as_solver(name) == as_solver(tableau) == Implicit(tableau)
    w = jnp.asarray(THETA, jnp.float32)
    programs = [
        str(jax.make_jaxpr(functools.partial(first_update, tx, loss_fn))(w))
        for tx in (getattr(rk_optax, name)(loss_fn, 0.1), rk_optax.runge_kutta(loss_fn, 0.1, name))
    ]
    assert programs[0] == programs[1]


def late_explicit():
    return ButcherTableau("late", [[0.5, 0], [1, 0]], [0.5, 0.5], [0.5, 1], 1)


def defective():
    return ButcherTableau("defective", [[0.75, 0.25], [-0.25, 0.25]], [0.5, 0.5], [1, 0], 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Implicit("sdirk2"), TypeError, "tableau must be a ButcherTableau, got str"),
        (lambda: Implicit(rk_optax.TABLEAUS["rk4"]), ValueError, "'rk4' is explicit.*rk_optax.Explicit"),
        (lambda: Explicit(IMPLICIT_TABLEAUS["sdirk2"]), ValueError, r"not explicit.*rk_optax\.Implicit\(tableau\)"),
        (lambda: Implicit(late_explicit()), ValueError, "'late' has an explicit stage after the first"),
        (lambda: Implicit(defective()), ValueError, "'defective' has coupled stages.*inverted and diagonalised"),
        (lambda: Implicit(IMPLICIT_TABLEAUS["sdirk2"], tolerance=1.0), ValueError, r"tolerance must be in \(0, 1\)"),
        (lambda: Implicit(IMPLICIT_TABLEAUS["sdirk2"], tolerance=0.0), ValueError, "tolerance must be positive"),
        (lambda: Implicit(IMPLICIT_TABLEAUS["sdirk2"], max_iterations=0), ValueError, "max_iterations must be"),
        (lambda: Implicit(IMPLICIT_TABLEAUS["sdirk2"], max_linear_iterations=2.5), ValueError, "max_linear_iter"),
        (lambda: rk_optax.gauss4(loss_fn, rk_optax.error_control()), ValueError, "'gauss4' does not offer"),
        (lambda: rk_optax.gauss4(None, 0.1, grad_fn=jax.grad(loss_fn)), ValueError, "'product': pass loss_fn"),
        (
            lambda: rk_optax.radau3(loss_fn, 0.1, preconditioner=rk_optax.precondition_by(optax.scale(2.0))),
            ValueError,
            "symmetric only with a diagonal",
        ),
        (
            lambda: rk_optax.sdirk3(loss_fn, 0.1, stage_batches="split", batch_argnames=["w"]),
            ValueError,
            "fixed number of gradients per step",
        ),
        (lambda: as_solver("backwards_euler"), ValueError, "did you mean 'backward_euler'"),
    ],
)
def test_what_cannot_be_solved_says_so_and_what_to_do(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_without_embedded_weights_there_is_no_error_estimate():
    problem, w = hand_made(loss_fn), jnp.asarray(THETA)
    solver = as_solver("trapezoid")
    with pytest.raises(ValueError, match="embedded error estimate, which the tableau 'trapezoid' does not offer"):
        solver.step(problem, w, problem(w), 0.1, solver.init(w), wants={"error"})
