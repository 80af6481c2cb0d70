"""Loss, update and state in one call: those of `update` with the gradient of the loss, and nothing evaluated twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import network, network_gradient, network_loss
from covering import some

import rk_optax

L2 = 0.3


def misfit(params, x, y):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] - y


MEAN = rk_optax.LeastSquares(misfit, weights=2.0, reduction="mean")  # network_loss
LOSSES = {"plain": network_loss, "residuals": MEAN}
CASES = {
    "euler": ("plain", "euler", 0.1),
    "rk4": ("plain", "rk4", rk_optax.descent_control()),
    "dopri5": ("plain", "dopri5", rk_optax.error_control()),
    "dal": ("plain", "heun", rk_optax.dal(0.5)),
    "sgd_g2": ("plain", "euler", rk_optax.sgd_g2(0.1)),
    "corridor": ("plain", "euler", rk_optax.corridor(0.1)),
    "rkc": ("plain", rk_optax.Stabilized("rkc1"), rk_optax.descent_control()),
    "rosenbrock_euler": ("plain", rk_optax.RosenbrockEuler("hessian"), rk_optax.trust_ratio_control()),
    "path": ("residuals", rk_optax.RosenbrockEuler("gauss_newton"), rk_optax.path_control(probes=3)),
    "ros2": ("plain", rk_optax.Ros2("hessian"), 0.1),
    "sdirk2": ("plain", "sdirk2", 0.1),
    "etdrk2": ("plain", rk_optax.Etd(2), 0.1),
    "rows": ("residuals", rk_optax.ResidualEuler(), rk_optax.trust_ratio_control()),
    "rows, path": ("residuals", rk_optax.ResidualEuler(), rk_optax.path_control(probes=3, corrections=1)),
    "beyond max_rows": ("residuals", rk_optax.ResidualEuler(max_rows=3), rk_optax.trust_ratio_control()),
}


# Each of the others has a relative among these.
QUICK = ("rk4", "dal", "rkc", "rosenbrock_euler", "etdrk2", "rows", "rows, path")


@pytest.mark.parametrize("name", some(dict(zip(CASES, CASES, strict=True)), *QUICK))
def test_it_is_the_update_with_the_gradient_of_the_loss(name, x64):
    kind, solver, rule = CASES[name]
    params, data = network(np.float64)
    loss = LOSSES[kind]
    tx = rk_optax.runge_kutta(loss, rule, solver, l2=L2, preconditioner=rk_optax.precondition_by_adagrad())
    together, apart = jax.jit(tx.value_and_update), jax.jit(lambda g, s, p: tx.update(g, s, p, **data))
    state = other = tx.init(params)
    for _ in range(2):
        value, updates, state = together(state, params, **data)
        expected, other = apart(network_gradient(params, **data), other, params)
        jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-7, atol=1e-12), updates, expected)
        squares = sum(np.sum(np.asarray(leaf) ** 2) for leaf in jax.tree.leaves(params))
        hidden = np.tanh(np.asarray(data["x"]) @ np.asarray(params["w1"]) + np.asarray(params["b1"]))
        error = hidden @ np.asarray(params["w2"]) - np.asarray(data["y"])
        assert float(value) == pytest.approx(np.mean(error**2) + 0.5 * L2 * squares, rel=1e-10)
        params = jax.tree.map(jnp.add, params, updates)
    assert bool(state.accepted)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-9), state.rule, other.rule)


@pytest.mark.parametrize(
    ("solver", "rule", "passes", "losses", "gradients"),
    [
        ("rk4", rk_optax.descent_control(), 5, 1, 4),  # 4 gradients and the loss after the step
        (rk_optax.ResidualEuler(), rk_optax.trust_ratio_control(), 2, 1, 0),  # the rows and the loss after the step
        (rk_optax.ResidualEuler(), rk_optax.path_control(probes=2, corrections=0), 4, 3, 0),
    ],
    ids=["rk4", "rows", "path"],
)
def test_nothing_is_evaluated_twice(solver, rule, passes, losses, gradients, evaluations):
    params, data = network()
    tx = rk_optax.runge_kutta(rk_optax.LeastSquares(evaluations.of(misfit), reduction="mean"), rule, solver)
    _, _, state = jax.jit(tx.value_and_update)(tx.init(params), params, **data)
    assert evaluations.number == passes
    assert (int(state.cost.losses), int(state.cost.gradients)) == (losses, gradients)


@pytest.mark.parametrize(("subsets", "points", "gradients"), [((), 64, 0), ((4,), 64, 0), ((4,), 240, 1)])
def test_a_path_on_all_points_alone_begins_with_the_rows(subsets, points, gradients):
    loss = rk_optax.LeastSquares(lambda w, x: w * x - 1, pointwise=["x"], reduction="mean")
    tx = rk_optax.residual_euler(loss, rk_optax.path_control(probes=2, corrections=0, subsets=subsets))
    _, _, state = jax.jit(tx.value_and_update)(tx.init(jnp.ones([])), jnp.ones([]), x=jnp.linspace(1.0, 2.0, points))
    assert int(state.cost.gradients) == gradients


def test_a_gradient_of_your_own_serves_beside_the_loss():
    params, data = network()
    tx = rk_optax.rk4(network_loss, 0.1, grad_fn=lambda p, x, y: jax.tree.map(jnp.zeros_like, p))
    value, updates, state = jax.jit(tx.value_and_update)(tx.init(params), params, **data)
    assert float(value) == pytest.approx(float(jax.jit(network_loss)(params, **data)), rel=1e-6)
    assert (int(state.cost.losses), int(state.cost.gradients)) == (1, 4)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))


def test_a_second_attempt_counts_no_gradient_where_the_first_had_none():
    tx = rk_optax.residual_euler(rk_optax.LeastSquares(lambda w: w - 1), 0.1, finite_derivatives=True)
    _, _, state = jax.jit(tx.value_and_update)(tx.init(jnp.ones(2)), jnp.ones(2))
    assert (int(state.cost.gradients), int(state.cost.rows)) == (0, 2)  # which are formed once


def test_with_an_update_of_ones_own_there_is_that_alone():
    tx = rk_optax.euler(lambda w: jnp.sum(w**2), 0.1)
    other = tx._replace(update=lambda updates, state, params=None, **data: (updates, state))
    with pytest.raises(ValueError, match="does not know of the init or update that _replace has put here"):
        other.value_and_update(tx.init(jnp.ones(2)), jnp.ones(2))


def test_without_a_loss_there_is_none_to_return():
    tx = rk_optax.rk4(None, 0.1, grad_fn=lambda w: w)
    with pytest.raises(ValueError, match="pass loss_fn"):
        tx.value_and_update(tx.init(jnp.ones(2)), jnp.ones(2))


def test_complex_and_half_precision_parameters(x64):
    loss = rk_optax.LeastSquares(lambda z: jnp.stack([jnp.real(z[0] * z[1]) - 1, jnp.imag(z[0]), jnp.abs(z[1]) ** 2]))
    z = jnp.array([1.0 + 2.0j, -0.5 + 0.3j])
    for solver in (rk_optax.ResidualEuler(), "heun"):
        tx = rk_optax.runge_kutta(loss, 0.1, solver)
        value, updates, _ = jax.jit(tx.value_and_update)(tx.init(z), z)
        expected, _ = jax.jit(lambda z, tx=tx: tx.update(jnp.conj(jax.grad(loss)(z)), tx.init(z), z))(z)
        np.testing.assert_allclose(updates, expected, rtol=1e-10)
        assert float(value) == pytest.approx(float(jax.jit(loss)(z)))
    w = jnp.ones(2, jnp.bfloat16)
    tx = rk_optax.rk4(lambda w: jnp.sum(w**2), 0.1)
    value, updates, _ = jax.jit(tx.value_and_update)(tx.init(w), w)
    assert value.dtype == jnp.float32
    assert updates.dtype == jnp.bfloat16
