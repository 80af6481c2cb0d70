"""The bounds of the races take the steps that they say, by oracles that know nothing of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from rk_optax.experiment.config import EntrantConfig
from rk_optax.experiment.direct import (
    alternating_least_squares,
    cholesky,
    conjugate_gradients,
    stochastic_dual_descent,
)
from rk_optax.experiment.entrants import build_optimizer
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.loop import Trainer
from rk_optax.experiment.tasks.problems import PROBLEMS

pytestmark = pytest.mark.usefixtures("x64")


def run(tx, problem, steps):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(None, state, params, **problem.source)
        return jax.tree.map(jnp.add, params, updates), state

    params, state = problem.params, tx.init(problem.params)
    path = []
    for _ in range(steps):
        params, state = step(params, state)
        path.append(params)
    return path, state


def test_stochastic_dual_descent_is_the_algorithm_of_the_paper():
    n, batch, eta, rho, r = 40, 7, 0.5, 0.8, 0.05
    problem = PROBLEMS["gp_dual"](0, points=n)
    matrix, y = (np.asarray(problem.source[name]) for name in ("matrix", "y"))
    path, state = run(stochastic_dual_descent(None, eta, batch, rho, r), problem, 60)
    alpha, velocity, average, key = np.zeros(n), np.zeros(n), np.zeros(n), jax.random.key(0)
    for step in range(60):
        key, own = jax.random.split(key)
        ahead, gradient = alpha + rho * velocity, np.zeros(n)
        for i in np.asarray(jax.random.randint(own, (batch,), 0, n)):
            gradient[i] += (matrix[i] @ ahead - y[i]) / batch
        velocity = rho * velocity - eta * gradient
        alpha = alpha + velocity
        average = r * alpha + (1 - r) * average
        np.testing.assert_allclose(path[step], average, rtol=0, atol=2e-15 * max(1, np.abs(average).max()))
    assert np.abs(average).max() > 0.1
    assert int(state.cost.gradients) == 60 * batch // n


def test_conjugate_gradients_are_scipy_s_and_end_where_the_factorisation_does():
    problem = PROBLEMS["gp_dual"](1, points=40, noise=0.3)
    matrix, y = (np.asarray(problem.source[name]) for name in ("matrix", "y"))
    path, state = run(conjugate_gradients(None), problem, 60)
    theirs = []
    scipy.sparse.linalg.cg(matrix, y, rtol=1e-30, maxiter=20, callback=lambda x: theirs.append(x.copy()))
    for ours, other in zip(path, theirs[:10], strict=False):
        np.testing.assert_allclose(ours, other, rtol=1e-9, atol=1e-11)
    assert int(state.cost.gradients) == 60
    (solution,), state = run(cholesky(None), problem, 1)
    np.testing.assert_allclose(solution, np.linalg.solve(matrix, y), rtol=1e-10)
    np.testing.assert_allclose(path[-1], solution, rtol=1e-8)


@pytest.mark.slow
def test_alternating_least_squares_solves_each_half_and_a_whole_matrix_at_once():
    problem = PROBLEMS["factorisation"](0, rows=8, columns=7, rank=2, condition=10.0, observed=0.7)
    (first, *_), state = run(alternating_least_squares(None), problem, 2)
    row, column, entry = (np.asarray(problem.source[name]) for name in ("row", "column", "entry"))
    left = first["left"]
    for i in range(8):
        mine = row == i
        other = np.asarray(problem.params["right"])[column[mine]]
        np.testing.assert_allclose(left[i], np.linalg.lstsq(other, entry[mine], rcond=None)[0], rtol=1e-9)
    for j in range(7):
        mine = column == j
        best = np.linalg.lstsq(np.asarray(left)[row[mine]], entry[mine], rcond=None)[0]
        np.testing.assert_allclose(first["right"][j], best, rtol=1e-9)
    assert int(state.cost.gradients) == 4
    whole = PROBLEMS["factorisation"](0, observed=1.0)
    (solved,), _ = run(alternating_least_squares(None), whole, 1)
    assert whole.error(solved) < 1e-10


def test_the_factorisation_has_the_spectrum_and_the_entries_that_it_says():
    problem = PROBLEMS["factorisation"](3, rows=12, columns=9, rank=3, condition=50.0, observed=0.65)
    row, column = (np.asarray(problem.source[name]) for name in ("row", "column"))
    assert min(np.bincount(row, minlength=12).min(), np.bincount(column, minlength=9).min()) >= 4
    assert len(row) == 70
    with pytest.raises(UsageError, match="observed leaves a row"):
        PROBLEMS["factorisation"](3, observed=0.1)
    every = PROBLEMS["factorisation"](3, rows=12, columns=9, rank=3, condition=50.0, observed=1.0).source["entry"]
    values = np.linalg.svd(np.asarray(every).reshape(12, 9), compute_uv=False)
    np.testing.assert_allclose(values[:4], [1, 50**-0.5, 0.02, 0], atol=1e-12)
    np.testing.assert_allclose(problem.source["entry"], np.asarray(every).reshape(12, 9)[row, column])
    residuals = (problem.params["left"] @ problem.params["right"].T)[row, column] - problem.source["entry"]
    np.testing.assert_allclose(problem.loss_fn(problem.params, **problem.source), 0.5 * residuals @ residuals)


def test_an_entrant_that_takes_no_gradient_is_given_none_and_pays_for_none():
    problem = PROBLEMS["gp_dual"](0, points=30)
    calls = []

    def counted(params, matrix, y):
        calls.append(1)
        return PROBLEMS["gp_dual"](0, points=30).loss_fn(params, matrix, y)

    problem.loss_fn = counted
    optimizer = build_optimizer("entrants.cg", EntrantConfig("conjugate_gradients"), counted, has_rate=False)
    trainer = Trainer(problem, optimizer, 0, None, 5)
    points = list(trainer.run(10))
    assert not calls
    assert float(points[-1].state.cost.gradients) == 10
    assert problem.error(points[-1].state.params) < 0.4
