"""Rules that refuse steps: against NumPy references, diffrax's controller, and batches made to break them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffrax import PIDController
from training import attempts, make_step

import rk_optax
from rk_optax import (
    Attempt,
    Cost,
    LeastSquares,
    Reason,
    Step,
    descent_control,
    error_control,
    trust_ratio_control,
)

pytestmark = pytest.mark.latest

START = np.array([1.5, -0.7, 0.4])


def quartic(theta):
    return jnp.sum(theta**4) / 4 + jnp.sum(theta) ** 2


def quartic_gradient(theta):
    return theta**3 + 2 * np.sum(theta)


def valley(theta):
    """Rosenbrock's function as residuals."""
    return jnp.stack([theta[0] - 1, 10 * (theta[1] - theta[0] ** 2)])


# --- error control ---


def numpy_error_control(p, i, d, count, h, rtol, atol, theta):
    """Heun's method with a PID controller, from the formula in `error_control`'s docstring; p̂ + 1 = 2."""
    one, two, seen = 1.0, 1.0, []
    for _ in range(count):
        k1 = quartic_gradient(theta)
        k2 = quartic_gradient(theta - h * k1)
        new, error = theta - h * (k1 + k2) / 2, h * (k2 - k1) / 2
        e = np.sqrt(np.mean((error / (atol + rtol * np.maximum(abs(theta), abs(new)))) ** 2))
        factor = 0.9 * e ** (-(p + i + d) / 2) * one ** ((p + 2 * d) / 2) * two ** (-d / 2)
        factor = np.clip(factor, 0.2, 5.0 if e <= 1 else 0.9)
        if e <= 1:
            theta, one, two = new, e, one
        seen.append((h, e <= 1, theta))
        h *= factor
    return [np.array(column) for column in zip(*seen, strict=True)]


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(("p", "i", "d"), [(0.0, 1.0, 0.0), (0.4, 0.3, 0.0), (0.3, 0.4, 0.1)])
def test_error_control_is_the_pid_controller_of_its_formula(p, i, d, x64):
    tolerances = {"rtol": 1e-3, "atol": 1e-4}
    rule = error_control(**tolerances, initial_step_size=0.3, pcoeff=p, icoeff=i, dcoeff=d, factor_max=5.0)
    ours, _ = attempts(rk_optax.heun(quartic, rule), quartic, START, 20)
    theirs = numpy_error_control(p, i, d, 20, 0.3, theta=START, **tolerances)
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert 0 < np.sum(~theirs[1]) < 15  # some refusals
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-9)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-9)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("p", "i", "d"), [(0.0, 1.0, 0.0), (0.4, 0.3, 0.1)])
def test_where_it_grows_or_refuses_error_control_is_diffraxs(p, i, d, x64):
    """The one difference: an accepted step may shrink the next here, and diffrax holds the factor at 1 there."""
    rule = error_control(1e-3, 1e-3, initial_step_size=1.0, pcoeff=p, icoeff=i, dcoeff=d, max_step_size=1e9)
    theirs = PIDController(1e-3, 1e-3, pcoeff=p, icoeff=i, dcoeff=d, norm=lambda x: jnp.sqrt(jnp.mean(x**2)))
    theta, new = jnp.array([1.0, 2.0]), jnp.array([0.9, 2.5])
    solver = rk_optax.Explicit(rk_optax.TABLEAUS["bogacki_shampine"])
    state = rule.init(jnp.zeros(1))
    _, memory = theirs.init(None, 0.0, 10.0, theta, 1.0, None, None, 3)  # pyright: ignore[reportArgumentType]

    @jax.jit
    def judge(state, size):
        step = Step(theta, Cost(), quantities={"error": size * jnp.array([1.0, -2.0])})
        h = state.next_step_size
        return rule.judge(state, Attempt(solver, None, theta, theta, new, h, step, jnp.array(True)))  # pyright: ignore[reportArgumentType]

    @jax.jit
    def adapt(size, h, memory):
        keep, _, t1, _, memory, _ = theirs.adapt_step_size(
            0.0, h, theta, new, None, size * jnp.array([1.0, -2.0]), 3, memory
        )
        return keep, t1, memory

    compared = 0
    for size in (1e-4, 3e-4, 5.0, 5e-3, 4e-4, 1e-9, 2e-4, 1e3, 1e-3):
        h = state.next_step_size
        verdict = judge(state, size)
        keep, t1, memory = adapt(size, h, memory)
        t0 = float(h) if keep else 0.0
        factor = float(verdict.state.next_step_size / h)
        assert bool(keep) == bool(verdict.accepted)
        expected = (float(t1) - t0) / float(h)
        if keep and factor < 1:
            assert expected == pytest.approx(1)
        else:
            assert factor == pytest.approx(expected, rel=1e-6)
        compared += factor >= 1 or not keep
        state = verdict.state
    assert compared >= 5


def test_error_control_follows_the_flow_within_its_tolerance(x64):
    rates = jnp.array([0.5, 3.0])
    tx = rk_optax.dopri5(lambda theta: 0.5 * jnp.sum(rates * theta**2), error_control(1e-6, 1e-9))
    step = jax.jit(lambda theta, state: tx.update(rates * theta, state, theta))
    theta, state, time = jnp.ones(2), tx.init(jnp.ones(2)), 0.0
    while time < 2:
        change, state = step(theta, state)
        theta, time = theta + change, time + float(state.step_size) * bool(state.accepted)
    np.testing.assert_allclose(theta, np.exp(-rates * time), rtol=3e-5)


# --- descent control ---


def numpy_descent_control(count, h, theta, loss, gradient):
    """Gradient descent that climbs to the h of most fall per ‖g‖²; one gradient a step."""
    gain, growing, seen = 0.0, True, []
    for _ in range(count):
        g = gradient(theta)
        fall = loss(theta) - loss(theta - h * g)
        seen.append((h, fall >= 0))
        if fall < 0:
            h, gain, growing = h * 0.25, 0.0, True
            continue
        theta, new = theta - h * g, fall / (g @ g)
        growing = growing != (new < gain)
        gain, h = new, h * (1.5 if growing else 1 / 1.5)
    return [np.array(column) for column in zip(*seen, strict=True)]


@pytest.mark.parametrize("initial", [1e-3, 10.0])
def test_descent_control_is_its_reference(initial, x64):
    ours, _ = attempts(rk_optax.euler(quartic, descent_control(initial)), quartic, START, 30)
    theirs = numpy_descent_control(30, initial, START, lambda t: np.sum(t**4) / 4 + np.sum(t) ** 2, quartic_gradient)
    np.testing.assert_array_equal(ours[1], theirs[1])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
    assert len(set(np.sign(np.diff(theirs[0])))) == 2  # it grew and it shrank


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("seen", [0.0, 1.0, -1.0], ids=["nothing", "a fall", "a rise"])
def test_descent_control_lengthens_an_unresolved_step_whatever_has_been_seen_before(seen):
    """Else an h that is far too short stays for good."""
    tx = rk_optax.euler(lambda theta: jnp.sum(theta) * 0 + 1e6, descent_control(0.5))
    theta = jnp.ones(2)
    state = tx.init(theta)
    state = state._replace(rule=state.rule._replace(fall=jnp.full_like(state.rule.fall, seen)))
    change, state = jax.jit(tx.update)(1e-9 * theta, state, theta)
    assert bool(state.accepted)
    assert float(state.rule.next_step_size) == 0.75
    assert (int(state.cost.gradients), int(state.cost.losses)) == (3, 2)  # the slopes at both ends were asked
    assert float(np.abs(change).max()) > 0


# --- trust-ratio control ---


def numpy_trust_ratio(count, h, theta):
    """Linearly implicit Euler on Rosenbrock's residuals by a dense solve; Nielsen's update of the step."""
    divisor, seen = 2.0, []
    for _ in range(count):
        r = np.array([theta[0] - 1, 10 * (theta[1] - theta[0] ** 2)])
        jacobian = np.array([[1.0, 0.0], [-20 * theta[0], 10.0]])
        direction = np.linalg.solve(np.eye(2) + h * jacobian.T @ jacobian, jacobian.T @ r)
        new = theta - h * direction
        after = np.array([new[0] - 1, 10 * (new[1] - new[0] ** 2)])
        linear = r - h * jacobian @ direction
        ratio = (r @ r - after @ after) / (r @ r - linear @ linear)
        accepted = after @ after <= r @ r
        seen.append((h, accepted, new if accepted else theta))
        h = h / max(1 / 3, 1 - (2 * ratio - 1) ** 3) if accepted else h / divisor
        theta, divisor = (new, 2.0) if accepted else (theta, 2 * divisor)
    return [np.array(column) for column in zip(*seen, strict=True)]


@pytest.mark.parametrize("factory", [rk_optax.residual_euler, rk_optax.rosenbrock_euler])
def test_trust_ratio_control_is_its_reference(factory, x64):
    loss = LeastSquares(valley)
    options = {} if factory is rk_optax.residual_euler else {"tolerance": 1e-13}
    rule = trust_ratio_control(1e4)
    ours, state = attempts(factory(loss, rule, **options), loss, np.array([-1.2, 1.0]), 18)
    theirs = numpy_trust_ratio(18, 1e4, np.array([-1.2, 1.0]))
    np.testing.assert_array_equal(ours[1], theirs[1])
    assert np.sum(~theirs[1]) >= 2
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    np.testing.assert_allclose(ours[2], theirs[2], rtol=1e-6, atol=1e-8)
    assert int(state.cost.losses) == 36


@pytest.mark.parametrize(
    ("start", "seen", "then"),
    [(0.0, 0.0, 1.0), (1.0, 0.5, 243.0), (1.0, 0.0, 243.0)],
    ids=["at the minimum", "a ratio seen before", "nothing seen before"],
)
def test_trust_ratio_control_lengthens_a_step_whose_fall_the_losses_do_not_show(start, seen, then):
    """The slopes show it, and that the model is right: else h collapses, and the next points would find it there."""
    tx, step = trust_ratio_step()
    theta = jnp.full(1, start, jnp.float32)
    state = tx.init(theta)
    state = state._replace(rule=state.rule._replace(ratio=jnp.full_like(state.rule.ratio, seen)))
    for _ in range(5):
        theta, state = step(theta, state, {})
        assert bool(state.accepted)
    assert float(state.rule.next_step_size) == then


@functools.cache
def trust_ratio_step():
    loss = LeastSquares(lambda theta: jnp.concatenate([jnp.array([1e4]), 1e-3 * theta]))
    tx = rk_optax.residual_euler(loss, trust_ratio_control())
    return tx, jax.jit(make_step(tx, loss))


# --- what the losses do not show ---


def descended(tx, loss, theta, steps):
    def step(carry, _):
        theta, state = carry
        _, change, state = tx.value_and_update(state, theta)
        return (theta + change, state), None

    theta, state = jax.jit(lambda start: jax.lax.scan(step, start, None, length=steps)[0])((theta, tx.init(theta)))
    return theta, float(loss(theta)), state


def test_a_step_below_the_rounding_of_the_parameters_is_made_longer():
    """It foretells a fall that does not come: that is no fault of the model."""
    loss = LeastSquares(lambda theta: theta - 999)
    theta, _, _ = descended(rk_optax.residual_euler(loss, trust_ratio_control(1e-6)), loss, jnp.array([1e3]), 60)
    assert float(theta[0]) == 999


def test_slopes_do_not_hide_that_the_loss_does_not_fall():
    """Of waves on a floor a long step finds both slopes as it likes, and no fall."""

    def loss(theta):
        return 1 + 1e-4 * jnp.mean(jnp.cos(theta))

    tx = rk_optax.euler(loss, descent_control(1e8))
    _, value, _ = descended(tx, loss, jnp.linspace(0.5, 5.5, 20), 150)
    assert value < 1 - 0.9e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_loss_of_half_precision_does_not_hide_a_tenfold_rise(dtype):
    def loss(theta):
        return (0.1 - 0.01 * theta[0] + 0.9 * jax.nn.sigmoid(40 * (theta[0] - 3))).astype(dtype)

    tx = rk_optax.euler(loss, descent_control(600.0))
    _, _, state = jax.jit(tx.value_and_update)(tx.init(jnp.zeros(1)), jnp.zeros(1))
    assert not bool(state.accepted)
    assert int(state.reason) == Reason.LOSS_ROSE


# --- what is refused ---


def square(theta):
    return jnp.sum(theta**2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rk_optax.scale_by_rk(square, descent_control()), "adaptive one cannot reach you"),
        (lambda: rk_optax.scale_by_rk(square, error_control(), "heun"), "adaptive one cannot reach you"),
        (lambda: rk_optax.rk4(square, error_control()), "'rk4' does not offer"),
        (lambda: rk_optax.rkc(square, error_control()), "Stabilized does not offer"),
        (lambda: rk_optax.rk4(square, trust_ratio_control()), "the tableau 'rk4' does not offer"),
        (lambda: rk_optax.rkc(square, trust_ratio_control()), "Stabilized does not offer"),
        (
            lambda: rk_optax.residual_euler(LeastSquares(valley), trust_ratio_control(), momentum=0.9),
            "momentum, after or weight_decay",
        ),
        (
            lambda: rk_optax.residual_euler(LeastSquares(valley), trust_ratio_control(), weight_decay=0.1),
            "momentum, after or weight_decay",
        ),
        (lambda: rk_optax.rk4(None, descent_control(), grad_fn=square), "'loss': pass loss_fn"),
        (lambda: error_control(rtol=-1.0), "rtol"),
        (lambda: error_control(atol=0.0), "atol must be positive"),
        (lambda: error_control(safety=1.1), r"safety must be in \(0, 1\]"),
        (lambda: error_control(factor_min=1.0), "factor_min < 1 < factor_max"),
        (lambda: error_control(factor_max=np.inf), "factor_min < 1 < factor_max"),
        (lambda: error_control(initial_step_size=0.0), "initial_step_size must be positive"),
        (lambda: descent_control(growth=1.0), "growth must be above 1"),
        (lambda: descent_control(shrinkage=1.0), "shrinkage"),
        (lambda: descent_control(1.0, min_step_size=2.0), "must lie between"),
        (lambda: descent_control(1.0, max_step_size=0.5), "must lie between"),
        (lambda: descent_control(np.nan), "initial_step_size"),
        (lambda: trust_ratio_control(growth=np.nan), "growth must be above 1"),
        (lambda: trust_ratio_control(-1.0), "initial_step_size must be positive"),
        (lambda: trust_ratio_control(max_step_size=np.nan), "must lie between"),
    ],
)
def test_what_makes_no_sense_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- no learning rate: logistic regression ---


def logistic(z, targets):
    return jnp.mean(jnp.logaddexp(0, z) - targets * z)


def conditioned(kappa, n=80, d=12, seed=0):
    """Logistic regression with soft labels whose optimum is known and whose Hessian there has this condition number."""
    rng = np.random.default_rng(seed)
    x, optimum = rng.normal(size=(n, d)), rng.normal(size=d) / np.sqrt(d)
    probability = 1 / (1 + np.exp(-x @ optimum))  # soft labels: the gradient at the optimum is 0
    hessian = (x.T * (probability * (1 - probability))) @ x / n
    values, vectors = np.linalg.eigh(hessian)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    change = (vectors / np.sqrt(values)) @ (np.logspace(-np.log10(kappa), 0, d)[:, None] ** 0.5 * rotation.T)
    return jnp.asarray(x @ change), jnp.asarray(probability), np.linalg.solve(change, optimum)


@pytest.mark.slow
def test_rkc_with_descent_control_needs_a_fifth_of_gradient_descents_gradients_at_condition_ten_thousand(x64):
    x, targets, optimum = conditioned(1e4)

    def loss(w):
        return logistic(x @ w, targets)

    np.testing.assert_allclose(jax.grad(loss)(optimum), 0, atol=1e-12)
    eigenvalues = np.linalg.eigvalsh(jax.hessian(loss)(optimum))
    assert eigenvalues[-1] / eigenvalues[0] == pytest.approx(1e4, rel=1e-6)

    def gradients(tx):
        def go_on(carry):
            w, state = carry
            far = jnp.linalg.norm(w - optimum) > 1e-4 * np.linalg.norm(optimum)
            return far & (state.cost.gradients < 200_000)

        def step(carry):
            w, state = carry
            change, state = tx.update(jax.grad(loss)(w), state, w)
            return w + change, state

        w = jnp.zeros(len(optimum))
        w, state = jax.jit(lambda w: jax.lax.while_loop(go_on, step, (w, tx.init(w))))(w)
        assert jnp.linalg.norm(w - optimum) <= 1e-4 * np.linalg.norm(optimum)
        return int(state.cost.gradients)

    best_rate = 2 / (eigenvalues[0] + eigenvalues[-1])
    descent, ours = gradients(rk_optax.euler(loss, best_rate)), gradients(rk_optax.rkc(loss))
    print(f"gradient descent {descent}, rkc {ours}, ratio {descent / ours:.1f}")
    assert ours <= descent / 5


@pytest.mark.slow
def test_rkc_with_descent_control_never_diverges_whatever_the_first_step():
    def train(seed, first):
        a, b, c = jax.random.split(jax.random.key(seed), 3)
        x = jax.random.normal(a, (40, 6)) * jnp.logspace(-1.5, 0.5, 6)
        targets = (x @ jax.random.normal(b, (6,)) + 0.3 * jax.random.normal(c, (40,)) > 0).astype(float)

        def loss(w):
            return logistic(x @ w, targets) + 5e-4 * w @ w

        tx = rk_optax.rkc(loss, max_stages=100)
        w = jnp.zeros(6)
        state = tx.init(w)
        state = state._replace(rule=state.rule._replace(next_step_size=first))

        def step(carry, _):
            w, state = carry
            change, state = tx.update(jax.grad(loss)(w), state, w)
            return (w + change, state), (loss(w + change), state.reason)

        (w, _), (losses, reasons) = jax.lax.scan(step, (w, state), length=60)
        return losses, jnp.linalg.norm(jax.grad(loss)(w)), reasons

    seeds, firsts = (grid.ravel() for grid in jnp.meshgrid(jnp.arange(20), 10.0 ** jnp.arange(-4, 5, 2)))
    losses, gradients, reasons = jax.jit(jax.vmap(train))(seeds, firsts)
    assert np.isfinite(losses).all()
    assert np.diff(losses, axis=1).max() <= 1e-6
    assert losses[:, 0].max() <= np.log(2) + 1e-6
    assert gradients.max() < 1e-4  # 0.1 and more at the start
    # Most have converged after 20 steps, and then the losses do not tell a step from standing still.
    refused = (reasons != Reason.ACCEPTED) & (reasons != Reason.UNRESOLVED)
    assert refused.sum(axis=1).max() < 30
