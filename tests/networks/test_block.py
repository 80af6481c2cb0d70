"""`integrate` against diffrax's discrete adjoint, its orders, its report, and what it refuses."""

import functools
import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rk_optax
from rk_optax import TABLEAUS, Etd, Explicit, Stabilized
from rk_optax.networks import Controls, double_sym, integrate, local_report

from .cases import NODES, controls, features, largest_difference, layer, order

GRID = (0.0, 0.25, 0.5, 1.25, 1.5, 2.0)


class DiffraxRK4(diffrax.AbstractERK):
    """diffrax has no classical RK4: its own machinery on the coefficients, written down here."""

    tableau = diffrax.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1, 2, 2, 1]) / 6,
        b_error=np.zeros(4),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k
    term_structure = diffrax.ODETerm

    def order(self, terms):
        return 4


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("name", "oracle"), [("rk4", DiffraxRK4()), ("heun", diffrax.Heun()), ("tsit5", diffrax.Tsit5())]
)
@pytest.mark.usefixtures("x64")
def test_features_and_all_gradients_are_those_of_diffrax(name, oracle):
    block = controls()

    def ours(theta, y):
        return integrate(layer, Controls(theta, NODES), y, GRID, name)

    def theirs(theta, y):
        path = diffrax.LinearInterpolation(jnp.asarray(NODES), theta)
        term = diffrax.ODETerm(lambda t, y, args: layer(path.evaluate(t), y, t))
        solution = diffrax.diffeqsolve(
            term, oracle, GRID[0], GRID[-1], None, y, stepsize_controller=diffrax.StepTo(jnp.asarray(GRID)),
            adjoint=diffrax.RecursiveCheckpointAdjoint(),
        )  # fmt: skip
        return solution.ys[0]

    def value_and_gradients(run):
        def loss(theta, y):
            end = run(theta, y)
            return jnp.sum(jnp.sin(end)), end

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(block.theta, features())

    assert largest_difference(value_and_gradients(ours), value_and_gradients(theirs)) < 1e-12


@pytest.mark.usefixtures("x64")
def test_order_four_where_the_grid_holds_the_nodes_and_an_error_where_it_does_not():
    block, y = controls((0, 1, 2)), features()
    run = jax.jit(lambda grid: integrate(layer, block, y, grid, unroll=1))
    exact = integrate(layer, block, y, np.linspace(0, 2, 801), unroll=1)
    assert 3.8 < order(lambda n: largest_difference(run(np.linspace(0, 2, n + 1)), exact), (16, 32)) < 4.3
    with pytest.raises(ValueError, match=r"kinks at 1, inside .* order 4 has order 2 only.*allow_kinks"):
        integrate(layer, block, y, np.linspace(0, 2, 10))
    # An odd number of steps has the kink in the middle of one; also under jit the grid is concrete here.
    off = jax.jit(lambda grid: integrate(layer, block, y, grid, unroll=1))
    assert 1.7 < order(lambda n: largest_difference(off(np.linspace(0, 2, n + 1)), exact), (27, 81)) < 2.3
    assert integrate(layer, block, y, np.linspace(0, 2, 10), "heun").shape == y.shape  # order 2 loses nothing
    assert integrate(layer, block, y, np.linspace(0, 2, 10), allow_kinks=True).shape == y.shape


def test_steps_over_a_jump_are_refused_from_order_two_on_and_each_step_has_its_own_piece():
    block = Controls(jnp.array([1.0, 10.0]), (0, 1), "constant")
    slope = functools.partial(integrate, lambda theta, y, t: theta * jnp.ones_like(y), block, jnp.zeros(1))
    assert slope((0, 1, 2), "rk4")[0] == pytest.approx(11)  # at its end the first step still has its own weight
    with pytest.raises(ValueError, match="kinks at 1, inside steps"):
        slope((0, 1.5, 2), "heun")
    assert np.isfinite(slope((0, 1.5, 2), "euler")).all()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "expected"), [("rkc1", 1), ("rkc2", 2), ("rkl2", 2)])
@pytest.mark.usefixtures("x64")
def test_stabilised_blocks_have_their_order_with_moving_weights(family, expected):
    block, y = controls(), features()
    exact = integrate(layer, block, y, _refined(64), unroll=1)

    def error(n):
        return largest_difference(
            integrate(layer, block, y, _refined(n), Stabilized(family, stages=4), unroll=1), exact
        )

    assert expected - 0.25 < order(error, (8, 16)) < expected + 0.35
    gradient = jax.jit(jax.grad(lambda c: integrate(layer, c, y, NODES, Stabilized(family, stages=4)).sum()))(block)
    assert all(bool(jnp.any(g != 0)) for g in jax.tree.leaves(gradient))


def _refined(n):
    return np.concatenate([np.linspace(a, b, n + 1)[:-1] for a, b in itertools.pairwise(NODES)] + [[2.0]])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_double_sym_is_stable_exactly_up_to_the_method_s_interval_and_beyond_it_with_rkc():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)))
    theta = {"kernel": kernel, "bias": jnp.zeros(4)}
    squared = float(jnp.linalg.norm(kernel, 2)) ** 2
    stiffest = jnp.linalg.svd(kernel)[0][:, 0][None]  # y @ kernel: the left singular vector
    linear = functools.partial(double_sym, activation=lambda x: x)

    def growth(reach, solver, steps=40):
        grid = np.arange(steps + 1) * reach / squared
        y = integrate(linear, Controls.constant_in_time(theta, (0,)), stiffest, grid, solver, unroll=1)
        return float(jnp.linalg.norm(y))

    for name in ("euler", "heun", "rk4"):
        interval = TABLEAUS[name].real_stability_interval
        assert growth(0.999 * interval, name) < 1
        assert growth(1.01 * interval, name) > 1.2
    rkc = Stabilized("rkc1", stages=6)
    assert growth(0.99 * rkc.real_stability_interval(6), rkc) < 1 < growth(1.02 * rkc.real_stability_interval(6), rkc)
    assert rkc.real_stability_interval(6) > 20 * TABLEAUS["rk4"].real_stability_interval


@pytest.mark.parametrize(
    ("name", "pair"), [("rk4", (0.0, 1e-9)), ("tsit5", (0.0, 1e-9)), ("dopri5", (0.0, 1e-9)), ("heun", (0.0, 1e-9))]
)
@pytest.mark.usefixtures("x64")
def test_stiffness_is_the_rate_of_a_linear_layer(name, pair):
    rates = Controls.constant_in_time(jnp.array([-3.0]), (0,))
    _, report = integrate(
        lambda theta, y, t: theta * y, rates, features(batch=2), (0, 0.1, 0.3), name, report=["stiffness"]
    )
    assert report.stiffness.shape == (2, 2)
    np.testing.assert_allclose(report.stiffness, 3.0, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_pairs_of_stages_at_one_time_do_not_mistake_moving_weights_for_stiffness():
    driven = Controls(jnp.array([[0.0], [50.0]]), (0, 1))

    def slope(theta, y, t):
        return theta - 2 * y

    def seen(name):
        return integrate(slope, driven, jnp.ones((1, 1)), (0, 1), name, report=["stiffness"])[1].stiffness[0, 0]

    assert seen("rk4") == pytest.approx(2)
    assert seen("tsit5") == pytest.approx(2)
    assert seen("heun") > 10  # k1 and k2 alone cannot know


@pytest.mark.slow
@pytest.mark.parametrize(("name", "falls"), [("heun", 2), ("bogacki_shampine", 3), ("tsit5", 5)])
@pytest.mark.usefixtures("x64")
def test_the_error_is_scaled_by_the_tolerances_and_falls_with_the_embedded_order(name, falls):
    block, y = controls((0, 1)), features()

    def error(h, **tolerances):
        return integrate(layer, block, y, (0, h), name, report=["error"], **tolerances)[1].error[0]

    assert error(0.1).shape == (4,)  # of each example
    assert falls - 0.3 < float(jnp.log2(error(0.1) / error(0.05)).mean()) < falls + 0.3
    # Against the definition, with SciPy-like scaling written out.
    end = integrate(layer, block, y, (0, 0.1), name)
    raw = error(0.1, atol=1.0, rtol=0.0)
    scale = 1e-3 + 1e-2 * np.maximum(np.abs(y), np.abs(end))
    vector = rk_optax.Explicit(TABLEAUS[name])
    assert vector.error_order is not None
    scaled = error(0.1, atol=1e-3, rtol=1e-2)
    assert (np.asarray(raw) / scale.max(axis=1) <= np.asarray(scaled) * (1 + 1e-9)).all()
    assert (np.asarray(scaled) <= np.asarray(raw) / scale.min(axis=1) * (1 + 1e-9)).all()
    np.testing.assert_allclose(error(0.1, atol=1e-3, rtol=0.0), 1e3 * raw, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_regularisers_have_finite_gradients_also_at_rest():
    rest = Controls.constant_in_time({"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}, (0, 1))

    def regulariser(c, y):
        report = integrate(lambda th, y, t: jnp.tanh(y @ th["kernel"] + th["bias"]), c, y, (0, 0.5, 1), "tsit5",
                           report=["error", "stiffness", "variation"])[1]  # fmt: skip
        return report.error.mean() + report.stiffness.mean() + report.variation

    for gradient in jax.tree.leaves(jax.jit(jax.grad(regulariser, argnums=(0, 1)))(rest, jnp.zeros((2, 3)))):
        assert np.isfinite(gradient).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_local_report_is_that_of_one_step_and_its_gradient_stops_there():
    block, y = controls(), features()
    _, whole = integrate(layer, block, y, GRID, "tsit5", report=["states", "error", "stiffness"])
    keys = jax.random.split(jax.random.key(0), 20)
    ask = functools.partial(local_report, layer, grid=GRID, solver="tsit5", report=["error", "stiffness"])
    seen = jax.vmap(lambda key: ask(block, states=whole.states, key=key))(keys)
    drawn = {int(np.argmin(np.abs(whole.error[:, 0] - error[0, 0]))) for error in seen.error}
    assert len(drawn) == 5  # every step has its turn
    for error, stiffness in zip(seen.error, seen.stiffness, strict=True):
        k = int(np.argmin(np.abs(whole.error[:, 0] - error[0, 0])))
        np.testing.assert_allclose(error[0], whole.error[k], rtol=1e-8)
        np.testing.assert_allclose(stiffness[0], whole.stiffness[k], rtol=1e-8)
    of_states = jax.jit(jax.grad(lambda states: ask(block, states=states, key=keys[0]).error.mean()))(whole.states)
    assert not of_states.any()
    of_theta = jax.jit(jax.grad(lambda c: ask(c, states=whole.states, key=keys[0]).error.mean()))(block)
    assert of_theta.theta["kernel"].any()
    with pytest.raises(ValueError, match="local_report has 'error' and 'stiffness'"):
        local_report(layer, block, whole.states, GRID, keys[0], report=["variation"])


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(0.0, 0.5, 1.0, 1.5, 2.0), (2.0, 1.5, 1.0, 0.0), (0.0, 1.0)])
@pytest.mark.usefixtures("x64")
def test_a_step_from_a_random_time_is_uniform_over_depth(grid):
    """Closed form: y' = λy by Heun's method, whose error estimate is ½(hλ)²y, grows along the grid."""
    rate, grid, n = -0.5, np.array(grid), len(grid) - 1
    block = Controls.constant_in_time(jnp.asarray(rate * np.sign(grid[-1] - grid[0])), (0.0,))

    def linear(theta, y, t):
        return theta * y

    y = jnp.ones((1, 1))
    states = integrate(linear, block, y, grid, "heun", report=["states"])[1].states
    keys = jax.random.split(jax.random.key(2), 400)
    draw = jax.vmap(lambda key: local_report(linear, block, states, grid, key, "heun", times="random", atol=1, rtol=0))
    seen = draw(keys)
    found = np.sort(np.asarray(seen.error)[:, 0, 0])

    def closed_form(s):
        k = np.minimum(s.astype(int), n)
        at = np.interp(s, np.arange(n + 1), grid)
        before, h = abs(at - grid[k]), abs(np.interp(s + 1, np.arange(n + 1), grid) - at)
        z = rate * before
        return (h * rate) ** 2 / 2 * np.asarray(states)[k, 0, 0] * (1 + z + z**2 / 2)

    expected = np.sort(closed_form((np.arange(400) + 0.5) / 400 * max(n - 1, 0)))
    # The distribution, within a bound of Kolmogorov's that fails once in 10,000.
    ranks = np.searchsorted(expected, found * (1 + 1e-12)) - np.searchsorted(found, found)
    assert np.abs(ranks).max() < (2.2 * np.sqrt(400) if n > 1 else 401)
    assert expected[0] * (1 - 1e-3) < found[0] <= found[-1] < expected[-1] * (1 + 1e-3)
    assert (np.asarray(seen.cost.gradients) == 4).all()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_a_step_from_a_random_time_keeps_off_kinks_and_off_the_state_before_it():
    block, y, key = controls(), features(), jax.random.key(0)
    states = integrate(layer, block, y, GRID, report=["states"])[1].states
    ask = functools.partial(local_report, layer, grid=GRID, key=key, solver="tsit5", times="random", allow_kinks=True)
    with pytest.raises(ValueError, match=r"kinks at 0\.5, 1\.25, inside steps.*Draw a step of the grid"):
        ask(block, states=states, allow_kinks=False)
    with pytest.raises(ValueError, match="times must be"):
        ask(block, states=states, times="any")
    assert not jax.jit(jax.grad(lambda states: ask(block, states=states).error.mean()))(states).any()
    of_theta = jax.jit(jax.grad(lambda c: ask(c, states=states).error.mean()))(block).theta["kernel"]
    assert np.isfinite(of_theta).all()
    assert of_theta.any()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_remat_loops_and_written_out_stages_change_nothing():
    block, y = controls(), features()

    def gradient(**options):
        return jax.jit(jax.value_and_grad(lambda c: integrate(layer, c, y, GRID, **options).sum()))(block)

    usual = gradient()
    for options in ({"remat": False}, {"unroll": 1}, {"solver": Explicit(TABLEAUS["rk4"])}, {"unroll": 99}):
        assert largest_difference(gradient(**options), usual) < 1e-13


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_features_may_be_a_tree_of_any_precision_and_time_may_run_backwards():
    block, y = controls(), features()

    def pair(theta, state, t):
        return {"a": layer(theta, state["a"], t), "b": state["b"] * 0.5j}

    start = {"a": y.astype(np.float32), "b": jnp.ones((4, 1), np.complex128)}
    end = integrate(pair, block, start, GRID)
    assert end["a"].dtype == np.float32
    np.testing.assert_allclose(end["b"], np.exp(1j), atol=1e-4)
    back = integrate(layer, block, integrate(layer, block, y, _refined(8)), _refined(8)[::-1])
    assert largest_difference(back, y) < 1e-5
    traced = jax.jit(lambda grid: integrate(layer, block, y, grid))(jnp.asarray(GRID))
    assert largest_difference(traced, integrate(layer, block, y, GRID)) < 1e-13
    step = jax.jit(jax.grad(lambda end: integrate(layer, block, y, jnp.array([0.0, 0.5]) * end).sum()))(1.0)
    assert np.isfinite(step)


@pytest.mark.slow
def test_the_cost_counts_evaluations_of_the_layer():
    block, y = controls(dtype=np.float32), features(dtype=np.float32)

    def cost(solver, report):
        return int(integrate(layer, block, y, NODES, solver, report=report)[1].cost.gradients)

    assert cost("rk4", ["states"]) == cost("rk4", ["stiffness"]) == 12
    assert cost("tsit5", ["states"]) == 18
    assert cost("tsit5", ["error"]) == cost("tsit5", ["stiffness"]) == 21
    assert cost(Stabilized("rkc2", stages=5), ["states"]) == 15


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"solver": "dopri"}, ValueError, "TABLEAUS"),
        ({"solver": 4}, TypeError, "solver must be a name"),
        ({"solver": rk_optax.Implicit(rk_optax.IMPLICIT_TABLEAUS["gauss4"])}, ValueError, "Jacobian for symmetric"),
        ({"solver": rk_optax.RosenbrockEuler()}, ValueError, "Jacobian for symmetric"),
        ({"solver": Stabilized("rkc2")}, ValueError, "no reverse mode"),
        ({"solver": Etd(2, "diagonal")}, ValueError, "Etd"),
        ({"solver": Etd(1, "l2")}, ValueError, "given"),
        ({"solver": Etd(2, "given")}, ValueError, "Semilinear"),
        ({"grid": (0, 1, 1)}, ValueError, "strictly monotone"),
        ({"grid": (0,)}, ValueError, "at least two times"),
        ({"y": jnp.ones((2, 3), int)}, TypeError, "floating-point"),
        ({"y": jnp.ones(()), "report": ["error"], "solver": "heun"}, ValueError, "leading axis"),
        ({"report": ["errors"]}, ValueError, "report must name"),
        ({"report": ["error"]}, ValueError, "embedded error estimate"),
        ({"report": ["stiffness"], "solver": "euler"}, ValueError, "two explicit stages"),
        ({"report": ["stiffness"], "solver": Stabilized("rkc2", stages=5)}, ValueError, "two explicit stages"),
        ({"layer": lambda theta, y, t: y[:, :2]}, TypeError, "must be like y"),
        ({"layer": lambda theta, y, t: y * 1j}, TypeError, "must be like y"),
        ({"controls": {"kernel": 1}}, TypeError, "constant_in_time"),
        ({"unroll": 0}, ValueError, "unroll"),
    ],
)
def test_what_cannot_work_is_refused(change, error, message):
    arguments = {"layer": layer, "controls": controls(dtype=np.float32), "y": features(dtype=np.float32), "grid": NODES}
    with pytest.raises(error, match=message):
        integrate(**(arguments | change))
