"""The rule that chooses among the steps of one factorisation: against choices made by NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rk_optax
from rk_optax import LeastSquares, Reason, path_control

pytestmark = pytest.mark.latest


def curve(theta, x, y):
    return theta[0] * jnp.tanh(theta[1] * x) + theta[2] * jnp.sin(theta[3] * x) - y


LOSS = LeastSquares(curve)
X = np.linspace(-2, 2, 12)
START = np.array([0.3, 1.5, -0.4, 2.0])


def target(noise=0.0, seed=0):
    return np.asarray(curve(np.array([1.0, 0.7, 0.5, 1.3]), X, 0.0)) + noise * np.random.default_rng(seed).normal(
        size=12
    )


@functools.cache  # many tests take the same steps
def stepper(rule, loss=LOSS, solver=rk_optax.residual_euler, **options):
    tx = solver(loss, rule, **options)

    @jax.jit
    def step(theta, state, data):
        updates, state = tx.update(jax.grad(loss)(theta, **data), state, theta, **data)
        return theta + updates, state

    return tx, step


def run(rule, count, data, start=START, **options):
    tx, step = stepper(rule, **options)
    theta = jnp.asarray(start, float)
    state, seen = tx.init(theta), []
    for i in range(count):
        theta, state = step(theta, state, data(i) if callable(data) else data)
        seen.append((np.asarray(theta), state))
    return seen


@pytest.mark.covering
@pytest.mark.parametrize("boldness", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("corrections", [0, 3])
def test_it_takes_the_longest_trial_step_with_a_fair_part_of_the_best_fall(boldness, corrections, x64):
    y, theta, h = target(), START, 0.7
    rule = path_control(h, probes=7, width=20.0, boldness=boldness, corrections=corrections)
    fitted = jax.jit(lambda t: curve(t, X, y))
    slopes = jax.jit(jax.jacfwd(fitted))
    for found, state in run(rule, 4, {"x": X, "y": y}):
        residual = lambda t: np.asarray(fitted(t))  # noqa: E731
        jacobian, r = np.asarray(slopes(theta)), residual(theta)
        losses, ends = [], []
        sizes = h * 20.0 ** np.linspace(-1, 1, 7)
        for size in sizes:
            solve = lambda g, size=size: np.linalg.solve(np.eye(4) + size * jacobian.T @ jacobian, g)  # noqa: E731
            d, iterates, seen = solve(jacobian.T @ r), [], []
            for _ in range(corrections + 1):
                iterates.append(theta - size * d)
                seen.append((d, -solve(d - jacobian.T @ residual(theta - size * d))))
                # Anderson's acceleration, by least squares over the differences of all iterates.
                moved, changed = (np.diff([x[i] for x in seen], axis=0) for i in (0, 1))
                d, change = seen[-1]
                part = np.linalg.lstsq(changed.T, change, rcond=None)[0] if len(seen) > 1 else np.zeros(0)
                d = d + change - part @ (moved + changed)
            values = [0.5 * np.sum(residual(t) ** 2) for t in iterates]
            losses.append(min(values))
            ends.append(iterates[int(np.argmin(values))])
        falls = 0.5 * np.sum(r**2) - np.array(losses)
        index = np.flatnonzero(falls >= boldness * falls.max())[-1]
        np.testing.assert_allclose(found, ends[index], rtol=1e-6)
        assert float(state.step_size) == float(state.rule.next_step_size) == pytest.approx(sizes[index])
        assert float(state.rule.loss) == pytest.approx(losses[index])
        theta, h = found, sizes[index]
    assert int(state.cost.losses) == 4 * (7 * (corrections + 1) + 2)


@pytest.mark.slow
def test_units_change_nothing():
    data = {"x": X.astype(np.float32), "y": target().astype(np.float32)}
    rule = path_control(boldness=0.1)  # of losses at the rounding the least is chance
    plain = run(rule, 3, data)
    for c in (1e-24, 1e24):
        loss = LeastSquares(curve, weights=float(c))
        for (theta, a), (other, b) in zip(plain, run(rule, 3, data, loss=loss), strict=True):
            np.testing.assert_allclose(other, theta, rtol=2e-3)
            assert float(b.step_size) * c == pytest.approx(float(a.step_size), rel=1e-3)


def test_where_the_data_change_it_is_trust_ratio_control(x64):
    def batch(i):
        return {"x": X, "y": target(0.3, seed=i)}

    ours = run(path_control(0.5), 8, batch)
    assert [int(state.rule.changing) for _, state in ours] == [0] + 7 * [2]
    first, state = ours[0]
    h = float(state.step_size)
    theirs = run(rk_optax.trust_ratio_control(h), 7, lambda i: batch(i + 1), start=first)
    for (theta, a), (other, b) in zip(ours[1:], theirs, strict=True):
        np.testing.assert_allclose(theta, other, rtol=1e-7)
        assert float(a.step_size) == pytest.approx(float(b.step_size))


def test_when_the_data_stay_again_so_do_the_trials(x64):
    seen = run(path_control(), 6, lambda i: {"x": X, "y": target(0.3, seed=min(i, 2))})
    assert [int(state.rule.changing) for _, state in seen] == [0, 2, 2, 1, 0, 0]


def test_it_needs_a_fraction_of_the_steps_of_the_trust_ratio_in_a_curved_valley(x64):
    data, steps = {"x": X, "y": target()}, []
    for rule in (path_control(), rk_optax.trust_ratio_control()):
        seen = run(rule, 30, data, start=np.full(4, 0.1))
        losses = np.array([0.5 * np.sum(np.asarray(curve(theta, X, data["y"])) ** 2) for theta, _ in seen])
        steps.append(int(np.argmax(losses < 1e-14)))
    assert steps[0] <= 8
    assert steps[1] >= 25


def test_no_step_is_the_last(x64):
    """Refused all over, where every way leads out of the domain, then with a loss that can fall again."""
    loss = LeastSquares(lambda theta, wall: jnp.where(jnp.all(theta == 1.0) | (wall == 0), theta, jnp.nan))
    tx, step = stepper(path_control(), loss)
    theta = jnp.ones(2)
    state = tx.init(theta)
    for _ in range(30):
        theta, state = step(theta, state, {"wall": jnp.ones([])})
    assert int(state.rejected) >= 8  # until a step is below the rounding of params
    np.testing.assert_array_equal(theta, 1.0)
    for _ in range(60):
        theta, state = step(theta, state, {"wall": jnp.zeros([])})
    assert np.abs(theta).max() < 1e-6


def test_a_step_too_short_to_show_a_fall_gives_way_to_a_typical_one(x64):
    first = np.random.default_rng(0).permutation(1000)[:63]
    unseen = LeastSquares(curve, pointwise=["x", "y"], weights=np.where(np.isin(np.arange(1000), first), 0, 1e-20))
    for rule, data, loss in [(path_control(1e-25), {"x": X, "y": target()}, LOSS), (SHORT, measured(0.0), unseen)]:
        states = [state.rule for _, state in run(rule, 12, data, loss=loss)]
        assert float(states[-1].loss) < 1e-3 * float(states[0].before)


def test_at_a_minimum_nothing_moves_and_the_reason_says_why():
    data = {"x": X.astype(np.float32), "y": target(0.3).astype(np.float32)}
    seen = run(path_control(), 40, data)
    assert int(seen[-1][1].reason) in (Reason.ACCEPTED, Reason.UNRESOLVED)
    gradient = jax.jit(jax.grad(LOSS))(jnp.asarray(seen[-1][0]), **data)
    assert np.abs(gradient).max() < 1e-4
    assert np.isfinite(seen[-1][1].rule.next_step_size)


def test_momentum_is_judged_with_the_step(x64):
    data = {"x": X, "y": target()}
    seen = run(path_control(), 12, data, momentum=0.5)
    losses = [float(state.rule.loss) for _, state in seen]
    loss = jax.jit(LOSS)
    actual = [float(loss(jnp.asarray(theta), **data)) for theta, _ in seen]
    np.testing.assert_allclose(losses, actual, rtol=1e-9)
    assert all(b <= a for a, b in itertools.pairwise(losses))


def test_a_step_that_momentum_spoils_is_not_chosen_for_ever(x64):
    seen = [state for _, state in run(path_control(), 60, {"x": X, "y": target(0.3)}, momentum=0.5)]
    again = [(a, b) for a, b in itertools.pairwise(seen) if not (a.accepted or b.accepted)]
    assert len(again) >= 5
    for before, after in again:
        assert float(after.step_size) <= 0.51 * float(before.step_size)
    assert float(seen[-1].rule.loss) < 0.9 * float(seen[9].rule.loss)


def test_where_after_leads_uphill_the_reason_says_so(x64):
    after = optax.stateless(lambda updates, params: -updates if updates.shape == (4,) else updates)
    reasons = [int(state.reason) for _, state in run(path_control(), 12, {"x": X, "y": target(0.3)}, after=after)]
    assert reasons[0] == Reason.LOSS_ROSE
    assert Reason.NOT_DOWNHILL in reasons


def test_other_losses_take_the_least_of_the_trials_in_a_krylov_space(x64):
    def loss(theta):
        return jnp.sum((theta[0] ** 2 - 1) ** 2) + 0.5 * theta[1] ** 2

    tx = rk_optax.rosenbrock_euler(loss, path_control(), curvature="hessian")
    theta = jnp.array([0.1, 1.0])  # of negative curvature
    state = tx.init(theta)
    gradient = jax.jit(jax.grad(loss))
    for _ in range(12):
        updates, state = jax.jit(tx.update)(gradient(theta), state, theta)
        theta = theta + updates
    np.testing.assert_allclose(theta, [1, 0], atol=1e-7)
    assert int(state.cost.losses) == 12 * (6 + 2)


SHORT = path_control(probes=2, corrections=0, subsets=(16,))
MANY = np.random.default_rng(1).permutation(np.linspace(-2, 2, 1000))
BY_POINT = LeastSquares(curve, pointwise=["x", "y"], reduction="mean")


def measured(noise):
    return {"x": MANY, "y": np.asarray(curve(np.array([1.0, 0.7, 0.5, 1.3]), MANY, noise * np.sin(997 * MANY)))}


def test_a_step_begins_with_the_points_of_the_coarsest_subset_and_is_judged_on_all(x64):
    rule = path_control(0.7, probes=2, corrections=0)
    order = np.random.default_rng(0).permutation(1000)
    chosen = order[:63]  # of 1,000 one in 16, rounded up
    broken = jax.tree.map(np.array, measured(0.3))
    broken["y"][order[-1]] = np.nan
    (_, refused), (found, state) = run(rule, 2, lambda i: measured(0.3) if i else broken, loss=BY_POINT)
    assert (int(refused.reason), float(refused.rule.loss)) == (Reason.NOT_FINITE, np.inf)  # though the subset is finite
    x, y = (value[chosen] for value in measured(0.3).values())
    jacobian, r = map(np.asarray, jax.jit(lambda w: (jax.jacfwd(curve)(w, x, y), curve(w, x, y)))(jnp.asarray(START)))
    matrix = np.eye(4) + state.step_size * jacobian.T @ jacobian / 63
    np.testing.assert_allclose(found, START - state.step_size * np.linalg.solve(matrix, jacobian.T @ r / 63), rtol=1e-9)
    whole = 0.5 * np.mean(np.asarray(curve(found, *measured(0.3).values())) ** 2)
    assert float(state.rule.loss) == pytest.approx(whole, rel=1e-12)
    # One of 63 points counts as one of all.
    assert (int(state.cost.rows), int(state.cost.losses)) == (2 * 63, 2 * (1 + 1 + 1))


def test_exact_data_never_need_all_points_and_noisy_ones_end_with_all(x64):
    exact = run(path_control(), 10, measured(0.0), start=np.full(4, 0.1), loss=BY_POINT)[-1][1]
    assert float(exact.rule.loss) < 1e-20
    assert int(exact.cost.rows) == 10 * 63
    noisy = [state for _, state in run(path_control(), 30, measured(0.3), start=np.full(4, 0.1), loss=BY_POINT)]
    losses = [float(state.rule.loss) for state in noisy]
    assert all(b <= a for a, b in itertools.pairwise(losses))
    assert max(int(state.rule.level) for state in noisy) == 2
    optimum = scipy.optimize.least_squares(
        lambda t: np.asarray(curve(t, *measured(0.3).values())), [1.0, 0.7, 0.5, 1.3], xtol=1e-15, ftol=1e-15
    )
    assert losses[-1] == pytest.approx(optimum.cost / 1000, rel=1e-10)


def test_a_function_that_sees_all_points_at_once_keeps_them_on_fewer():
    x, q = np.linspace(0, 1, 100), np.full(100, 0.01)
    functions = {"at": lambda theta, x: theta * x, "integral": lambda theta, x, q: jnp.sum(q * theta * x)}
    loss = LeastSquares(functions, pointwise={"at": ["x"]}, weights={"at": 1.0, "integral": 3.0})
    fewer, data = loss.on_fewer_points({"x": x, "q": q}, 4)
    chosen = np.random.default_rng(0).permutation(100)[:25]
    expected = 0.5 * (4 * np.sum((2 * x[chosen]) ** 2) + 3 * np.sum(q * 2 * x) ** 2)
    value, slope = jax.jit(lambda theta: (fewer(theta, **data), fewer.rows(theta, data).gradient))(2.0)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(slope) == pytest.approx(expected, rel=1e-5)  # of a square of θ = 2


def test_fewer_points_are_tried_again_ever_more_rarely(x64):
    states = [state.rule for _, state in run(path_control(), 60, measured(0.3), loss=BY_POINT)]
    failed = [(a, b) for a, b in itertools.pairwise(states) if int(b.failures) > int(a.failures)]
    assert 4 <= len(failed) <= 10
    for before, after in failed:
        assert int(after.wait) == 2 ** int(before.failures)
        assert int(after.level) == int(before.level) + 1
    assert sum(int(state.level) == 2 for state in states[30:]) >= 24


def test_how_fewer_points_of_the_old_data_served_says_nothing_of_new_ones(x64):
    """Noise, which needs all points and has them tried ever more rarely, and then data without."""
    states = [s.rule for _, s in run(path_control(), 18, lambda i: measured(0.3 if i < 15 else 0.0), loss=BY_POINT)]
    assert int(states[14].failures) >= 4
    assert int(states[14].wait) > 5
    assert [int(state.changing) for state in states[14:18]] == [0, 2, 1, 0]
    assert [int(state.failures) for state in states[15:18]] == [0, 0, 0]
    assert int(states[17].level) == 1


def test_a_loss_that_is_infinite_is_none_of_the_data_that_stay():
    """Its gradient is finite: (1e20 - θ) and its negative add up."""
    loss = LeastSquares(lambda theta, x: jnp.stack([theta[0] - x, theta[0] + x, theta[1]]))
    sizes = [1.0, 1e20, 1.0, 1.0, 1.0]
    seen = run(path_control(), 5, lambda i: {"x": np.float32(sizes[i])}, start=np.ones(2, np.float32), loss=loss)
    assert [int(state.rule.changing) for _, state in seen] == [0, 2, 2, 1, 0]
    assert [bool(state.accepted) for _, state in seen] == [True, False, True, True, True]


@pytest.mark.slow
def test_where_the_data_change_all_points_count(x64):
    def batch(i):
        return {"x": MANY, "y": measured(0.1)["y"] + 0.3 * np.random.default_rng(i).normal(size=1000)}

    first = run(path_control(0.5), 5, batch, loss=BY_POINT)
    start, h = first[0][0], float(first[0][1].step_size)
    theirs = run(rk_optax.trust_ratio_control(h), 4, lambda i: batch(i + 1), start=start, loss=BY_POINT)
    for (theta, _), (other, _) in zip(first[1:], theirs, strict=True):
        np.testing.assert_allclose(theta, other, rtol=1e-7)


@pytest.mark.slow
def test_units_change_nothing_of_the_choice_of_points():
    data = jax.tree.map(np.float32, measured(0.3))
    plain = run(path_control(boldness=0.1), 4, data, loss=BY_POINT)
    for c in (1e-24, 1e24):
        loss = LeastSquares(curve, pointwise=["x", "y"], reduction="mean", weights=float(c))
        for (theta, a), (other, b) in zip(plain, run(path_control(boldness=0.1), 4, data, loss=loss), strict=True):
            assert int(a.rule.level) == int(b.rule.level)
            np.testing.assert_allclose(other, theta, rtol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [AxisType.Explicit, AxisType.Auto])
def test_points_on_eight_devices_are_thinned_as_on_one(axes, x64):
    weights = np.linspace(0.5, 2, 1000)

    def two(weights, theta, data):
        loss = LeastSquares(curve, pointwise=["x", "y"], weights=weights)
        tx = rk_optax.residual_euler(loss, path_control(probes=2, corrections=1))
        state = tx.init(theta)
        for _ in range(2):
            _, updates, state = tx.value_and_update(state, theta, **data)
            theta = theta + updates
        return theta, state

    expected, state = jax.jit(two)(weights, START, measured(0.1))
    assert int(state.cost.rows) == 2 * 63
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axes,))
    with jax.set_mesh(mesh):
        along, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
        placed = jax.device_put((weights, START, measured(0.1)), (along, whole, along))
        found, _ = jax.jit(two)(*placed)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_step_size": 0.0}, "initial_step_size"),
        ({"probes": 0}, "probes"),
        ({"probes": 1}, "probes must be at least 2"),
        ({"width": 1.0}, "width"),
        ({"boldness": 0.0}, "boldness"),
        ({"boldness": 1.5}, "boldness"),
        ({"corrections": -1}, "corrections"),
        ({"subsets": (4, 16)}, "subsets must fall"),
        ({"subsets": (4, 1)}, "subsets must fall"),
        ({"subsets": (0,)}, "subsets"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        path_control(**options)


def test_solvers_without_a_path_are_refused():
    with pytest.raises(ValueError, match="one factorisation"):
        rk_optax.rk4(LOSS, path_control())


def test_beyond_the_rounding_of_the_gram_matrix_steps_are_by_singular_values(x64):
    """Residuals whose Jacobian has singular values from 1 to 1e-10, squares of which float64 does not tell apart."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    weights = np.logspace(0, -10, 6)
    loss = LeastSquares(lambda w: weights * (turn @ w + 0.1 * (turn @ w) ** 3 - 1))
    found = {}
    for precise in (True, False):
        states = run(path_control(precise=precise, corrections=0), 40, {}, start=np.zeros(6), loss=loss)
        root = turn @ states[-1][0]
        found[precise] = np.abs(root + 0.1 * root**3 - 1).max(), [bool(s.rule.precise) for _, s in states]
    error, flags = found[True]
    assert error < 1e-3
    assert not flags[0]
    assert flags[-1]
    error, flags = found[False]
    assert error > 0.1
    assert not any(flags)
