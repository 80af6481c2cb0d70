"""Stabilized methods that choose the number of stages by the curvature, and what they go with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import network, network_loss
from jax.flatten_util import ravel_pytree
from training import cubic, one_step, stability_polynomial

import rk_optax
from rk_optax import Reason, Stabilized

pytestmark = pytest.mark.latest

FAMILIES = ["rkc1", "rkc2", "rkl1", "rkl2"]
THETA = np.array([0.9, -0.4, 0.7, 0.2])

families = pytest.mark.parametrize("family", FAMILIES)
automatic = pytest.mark.parametrize("family", ["rkc1", "rkl2"])


# --- the number of stages, chosen by the curvature ---


def quadratic(eigenvalues, seed=0):
    """½θᵀAθ with these eigenvalues in a random basis, and a random start."""
    rng = np.random.default_rng(seed)
    n = len(eigenvalues)
    basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
    matrix = jnp.asarray((basis * eigenvalues) @ basis.T, jnp.float32)
    return (lambda theta: 0.5 * theta @ matrix @ theta), jnp.asarray(rng.normal(size=n), jnp.float32)


def updates(tx, loss, theta, count, state=None):
    """States after each of some updates, and the last parameters."""
    step = jax.jit(lambda theta, state: tx.update(jax.grad(loss)(theta), state, theta))
    state, states = tx.init(theta) if state is None else state, []
    for _ in range(count):
        change, state = step(theta, state)
        theta = theta + change
        states.append(state)
    return theta, states


SPECTRA = {
    "evenly spaced": np.linspace(1, 40, 40),
    "geometric": np.logspace(-3, 2, 40),
    "one large": np.r_[np.ones(30), 50.0],
    "a cluster at the top": np.r_[np.linspace(0, 1, 20), np.linspace(9, 10, 20)],
    "top two equal": np.r_[np.linspace(0, 1, 20), 7.0, 7.0],
    "a negative one": np.r_[-3.0, np.linspace(0, 20, 20)],
    "one mode": np.array([3.0]),
}


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
def test_the_estimate_of_the_spectral_radius_is_close_and_with_its_safety_factor_from_above(spectrum):
    rng, n = np.random.default_rng(0), len(spectrum)
    bases = np.linalg.qr(rng.normal(size=(8, n, n)))[0]
    matrices = jnp.asarray(bases * spectrum @ bases.transpose(0, 2, 1), jnp.float32)
    tx = rk_optax.runge_kutta(lambda theta, a: 0.5 * theta @ a @ theta, 1e-3, Stabilized("rkc1", max_stages=4))

    def radius(theta, a):
        return tx.update(a @ theta, tx.init(theta), theta, a=a)[1].solver.spectral_radius

    radii = jax.jit(jax.vmap(radius))(jnp.asarray(rng.normal(size=(8, n)), jnp.float32), matrices)
    largest = np.abs(spectrum).max()
    assert largest <= radii.min()
    assert radii.max() <= 1.2 * largest * 1.01


@pytest.mark.slow
def test_the_estimate_on_a_network_is_its_hessians_largest_eigenvalue():
    params, data = network()
    theta, unravel = ravel_pytree(params)

    def loss(theta):
        return network_loss(unravel(theta), **data)

    largest = np.abs(np.linalg.eigvalsh(jax.hessian(loss)(theta))).max()
    _, (state,) = updates(rk_optax.runge_kutta(loss, 1e-3, Stabilized("rkc1")), loss, theta, 1)
    assert float(state.solver.spectral_radius) / 1.2 == pytest.approx(largest, rel=0.05)


def test_the_power_method_finds_a_mode_that_the_gradient_is_orthogonal_to():
    eigenvalues = jnp.array([1.0, 2.0, 50.0, 3.0])

    def loss(theta):
        return 0.5 * jnp.sum(eigenvalues * theta**2)

    theta = jnp.array([1.0, 1.0, 0.0, 1.0])  # the gradient has nothing of λ = 50, and never gets any
    _, (state,) = updates(rk_optax.runge_kutta(loss, 1e-3, Stabilized("rkc1")), loss, theta, 1)
    assert float(state.solver.spectral_radius) >= 50


@pytest.mark.covering(most=1)
@families
def test_the_stages_taken_are_stable_and_not_many_more_than_needed(family):
    loss, theta = quadratic(np.linspace(0.5, 10, 20))
    solver = Stabilized(family)

    @jax.jit
    def after_one_update(h):
        tx = rk_optax.runge_kutta(loss, h, solver)
        return tx.update(jax.grad(loss)(theta), tx.init(theta), theta)[1].solver

    for h in (1e-3, 0.4, 30.0):
        state = after_one_update(h)
        stages, needed = int(state.stages), h * float(state.spectral_radius)
        assert solver.real_stability_interval(stages) >= needed
        fewer = stages - 1 if stages <= 20 else int(stages / 1.13)
        assert stages == 2 or solver.real_stability_interval(fewer) < needed


@pytest.mark.covering(most=1)
@automatic
def test_a_step_of_chosen_stages_is_the_step_of_that_many(family):
    loss, theta = quadratic(np.linspace(0.5, 10, 20))
    solver = Stabilized(family)
    chosen = one_step(solver, jax.grad(loss), theta, 5.0)
    fixed = one_step(Stabilized(family, int(chosen.state.stages)), jax.grad(loss), theta, 5.0)
    np.testing.assert_allclose(chosen.direction, fixed.direction, rtol=0, atol=1e-6)


@pytest.mark.covering(most=1)
@automatic
def test_the_cost_counts_every_gradient_that_is_evaluated(family, evaluations):
    loss, theta = quadratic(np.linspace(0.5, 10, 20))
    tx = rk_optax.runge_kutta(evaluations.of(loss), 2.0, Stabilized(family, estimate_every=3))
    step = jax.jit(lambda theta, state: tx.update(jax.grad(loss)(theta), state, theta))
    state = tx.init(theta)
    for done in range(1, 8):
        change, state = step(theta, state)
        theta = theta + change
        assert int(state.cost.gradients) == evaluations.number + done  # stage 1 came in


def test_the_radius_is_estimated_at_the_first_step_then_every_so_often():
    loss, theta = quadratic(np.linspace(0.5, 10, 20))
    solver = Stabilized("rkc1", estimate_every=4)
    _, states = updates(rk_optax.runge_kutta(loss, 1e-3, solver), loss, theta, 10)
    spent = np.diff([0, *(int(s.cost.gradients) for s in states)])
    assert [n > 2 for n in spent] == [True, False, False, False, True, False, False, False, True, False]
    assert spent[4] < spent[0]  # from the eigenvector of the last time


@pytest.mark.slow
def test_a_refused_step_asks_for_a_new_estimate():
    loss, theta = quadratic(np.linspace(0.5, 10, 20))

    def sharp_elsewhere(theta):  # accepted at first, then a wall
        return loss(theta)

    solver = Stabilized("rkc1", estimate_every=100)
    tx = rk_optax.runge_kutta(sharp_elsewhere, rk_optax.descent_control(1e-2), solver)
    theta, (state,) = updates(tx, sharp_elsewhere, theta, 1)
    low = state.solver._replace(spectral_radius=jnp.array(0.01), age=jnp.array(1, jnp.int32))
    state = state._replace(solver=low, rule=state.rule._replace(next_step_size=jnp.array(5.0)))
    _, (refused, renewed) = updates(tx, sharp_elsewhere, theta, 2, state)
    assert not bool(refused.accepted)
    assert float(refused.solver.spectral_radius) == pytest.approx(0.01)
    assert float(renewed.solver.spectral_radius) >= 10
    assert bool(renewed.accepted)


def test_a_step_beyond_the_most_stages_is_refused_without_evaluating_any(evaluations):
    loss, theta = quadratic(np.linspace(0.5, 10, 20))
    tx = rk_optax.runge_kutta(evaluations.of(loss), 100.0, Stabilized("rkc1", max_stages=10))
    end, states = updates(tx, loss, theta, 2)
    assert [int(s.reason) for s in states] == [Reason.NOT_SOLVED] * 2
    np.testing.assert_array_equal(end, theta)
    first, second = (int(s.cost.gradients) for s in states)
    assert evaluations.number == second - 2
    assert second - first == 1  # no stages, no estimate: the one that came in


@pytest.mark.slow
def test_a_refusal_for_too_long_a_step_shortens_it_at_once_to_what_the_stages_can_do():
    loss, theta = quadratic(np.linspace(0.5, 10, 20))
    solver = Stabilized("rkc1", max_stages=10)
    _, states = updates(rk_optax.runge_kutta(loss, rk_optax.descent_control(1e4), solver), loss, theta, 2)
    assert [bool(s.accepted) for s in states] == [False, True]
    longest = solver.real_stability_interval(10) / float(states[0].solver.spectral_radius)
    assert float(states[0].rule.next_step_size) == pytest.approx(0.95 * longest, rel=1e-5)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("rate", [0.1, rk_optax.descent_control(0.1)], ids=["constant", "descent control"])
def test_one_bad_batch_is_refused_and_the_next_goes_on(rate):
    """An estimate of ρ that is not finite must reach neither the step size nor the next estimate."""

    def loss(theta, x):
        return 0.5 * jnp.sum(x * theta**2)

    tx = rk_optax.runge_kutta(loss, rate, Stabilized("rkc1"))
    step = jax.jit(lambda gradient, theta, state, x: tx.update(gradient, state, theta, x=x))
    theta, good = jnp.ones(3), jnp.array([1.0, 2.0, 3.0])
    for poison in (np.nan, np.inf):
        bad = jnp.array([1.0, poison, 3.0])
        change, state = step(theta, theta, tx.init(theta), bad)
        np.testing.assert_array_equal(change, 0)
        assert not bool(state.accepted)
        assert int(state.reason) in (Reason.NOT_SOLVED, Reason.NOT_FINITE)
        change, state = step(good * theta, theta, state, good)
        assert bool(state.accepted)
        assert float(state.solver.spectral_radius) == pytest.approx(3.6, rel=0.02)
        assert 0.02 < float(state.step_size) < 0.11  # one refusal's worth shorter, no more


def test_a_loss_without_curvature_takes_the_fewest_stages():
    def loss(theta):
        return jnp.sum(jnp.array([1.0, -2.0]) * theta)

    theta, states = updates(rk_optax.runge_kutta(loss, 0.5, Stabilized("rkc1")), loss, jnp.zeros(2), 3)
    np.testing.assert_allclose(theta, [-1.5, 3.0], rtol=1e-6)
    assert [int(s.solver.stages) for s in states] == [2, 2, 2]
    assert all(float(s.solver.spectral_radius) < 1e-2 for s in states)


def test_at_a_stationary_point_it_stays_and_knows_the_curvature():
    loss, theta = quadratic(np.array([1.0, 4.0, 9.0]))
    end, (state,) = updates(rk_optax.runge_kutta(loss, 0.5, Stabilized("rkc1")), loss, jnp.zeros_like(theta), 1)
    np.testing.assert_array_equal(end, 0)
    assert bool(state.accepted)
    assert float(state.solver.spectral_radius) == pytest.approx(10.8, rel=0.05)


# --- what it goes with ---


def test_vmap_over_starts_is_each_start_alone():
    loss, theta = quadratic(np.linspace(0.5, 10, 20))
    tx = rk_optax.runge_kutta(loss, 2.0, Stabilized("rkc1"))
    starts = jnp.stack([theta, 0 * theta, 5 * theta])

    def run(theta):
        return tx.update(jax.grad(loss)(theta), tx.init(theta), theta)

    together, state = jax.jit(jax.vmap(run))(starts)
    for i, start in enumerate(starts):
        alone, own = jax.jit(run)(start)
        np.testing.assert_allclose(together[i], alone, rtol=0, atol=1e-4 * np.abs(alone).max() + 1e-7)
        assert abs(int(state.cost.gradients[i]) - int(own.cost.gradients)) <= 1


@pytest.mark.parametrize("stages", [6, "auto"])
def test_fixed_leaves_none_leaves_and_complex_and_half_precision_leaves_go_along(stages):
    params = {
        "half": jnp.array([1.0, -2.0], jnp.bfloat16),
        "single": jnp.array([3.0]),
        "complex": jnp.array([1.0 + 2.0j]),
        "nothing": None,
        "fixed": jnp.array([7]),
    }
    mask = {"half": True, "single": True, "complex": True, "nothing": True, "fixed": False}

    def loss(params):
        rates = {"half": 1.0, "single": 2.0, "complex": 3.0}
        return sum(r / 2 * jnp.sum(jnp.abs(params[k].astype(jnp.complex64)) ** 2) for k, r in rates.items())

    solver = Stabilized("rkc1", stages, damping=0.05)
    tx = rk_optax.runge_kutta(loss, 0.2, solver, mask=mask)
    grads = {"half": params["half"], "single": 2 * params["single"], "complex": 3 * params["complex"]}
    grads |= {"nothing": None, "fixed": jnp.zeros(1, jnp.int32)}
    change, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), change) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    used = int(state.solver.stages) if stages == "auto" else stages
    polynomial = stability_polynomial("rkc1", used, 0.05)
    for name, rate, tolerance in (("half", 1.0, 1e-2), ("single", 2.0, 1e-5), ("complex", 3.0, 1e-5)):
        expected = (polynomial(0.2 * rate) - 1) * np.asarray(params[name]).astype(complex)
        np.testing.assert_allclose(np.asarray(change[name]).astype(complex), expected, rtol=tolerance)
    np.testing.assert_array_equal(change["fixed"], 0)


def test_half_precision_parameters_see_the_curvature():
    """Differences that long would vanish in bfloat16; the stages are float32."""
    rates = jnp.array([1.0, 30.0])
    theta = jnp.array([1.0, 2.0], jnp.bfloat16)
    tx = rk_optax.runge_kutta(lambda p: 0.5 * jnp.sum(rates * p**2), 0.1, Stabilized("rkc1"))
    _, state = jax.jit(tx.update)((rates * theta).astype(jnp.bfloat16), tx.init(theta), theta)
    assert float(state.solver.spectral_radius) == pytest.approx(36, rel=0.1)


def test_a_preconditioner_changes_the_radius_that_is_estimated():
    rates = jnp.array([1.0, 100.0])

    def loss(theta):
        return 0.5 * jnp.sum(rates * theta**2)

    theta = jnp.array([1.0, 1.0])
    plain = rk_optax.runge_kutta(loss, 1e-2, Stabilized("rkc1"))
    scaled = rk_optax.runge_kutta(
        loss, 1e-2, Stabilized("rkc1"), preconditioner=rk_optax.precondition_by_adagrad(), momentum=0.5
    )
    radii = [float(updates(tx, loss, theta, 1)[1][0].solver.spectral_radius) for tx in (plain, scaled)]
    gradient = np.array([1.0, 100.0])
    expected = (np.array([1.0, 100.0]) / np.sqrt(1 + gradient**2)).max()
    assert radii[0] == pytest.approx(120, rel=0.02)
    assert radii[1] == pytest.approx(1.2 * expected, rel=0.05)


def test_momentum_runs_on_the_effective_gradient():
    loss, theta = quadratic(np.linspace(0.5, 10, 20))
    ready = rk_optax.rkc(loss, 0.5, stages=5, momentum=0.9)
    chained = optax.chain(
        rk_optax.scale_by_rk(loss, 0.5, Stabilized("rkc1", 5)), optax.trace(0.9), optax.scale_by_learning_rate(0.5)
    )
    ours, _ = updates(ready, loss, theta, 4)
    theirs, _ = updates(chained, loss, theta, 4)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.covering
@pytest.mark.parametrize("stages", [3, "auto"])
@families
def test_a_step_of_next_to_no_size_has_the_gradient_as_direction(family, stages, x64):
    for h in (0.0, 1e-30):
        step = one_step(Stabilized(family, stages), cubic, THETA, jnp.asarray(h, float))
        np.testing.assert_allclose(step.direction, cubic(THETA), rtol=1e-12)
