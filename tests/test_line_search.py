"""Steps for data that are new every time, against natural gradients with a line search and SPRING, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rk_optax
from rk_optax import ResidualEuler

WEIGHTS = np.random.default_rng(0).normal(size=(2, 6))  # of the network: eleven with the output's
DAMPING = 1e-4


def misfit(w, x, y):
    return jnp.tanh(x @ w[:12].reshape(2, 6)) @ w[12:] - y


LOSS = rk_optax.LeastSquares(misfit)


def batch(i, count=8):
    x = np.random.default_rng(10 + i).normal(size=(count, 2))
    return {"x": x, "y": np.sin(x[:, 0]) * x[:, 1]}


def start():
    return np.r_[WEIGHTS.ravel(), 0.3 * np.ones(6)]


def rows(w, x, y):
    """Residuals and their Jacobian by hand."""
    hidden = np.tanh(x @ w[:12].reshape(2, 6))
    inner = (1 - hidden**2) * w[12:]
    return hidden @ w[12:] - y, np.hstack([(x[:, :, None] * inner[:, None]).reshape(len(x), 12), hidden])


def numpy_loss(w, x, y):
    return 0.5 * np.sum(rows(w, x, y)[0] ** 2)


def run(tx, steps):
    w = jnp.asarray(start())
    state, step, seen = tx.init(w), jax.jit(tx.value_and_update), []
    for i in range(steps):
        _, updates, state = step(state, w, **batch(i))
        w = w + updates
        seen.append(np.asarray(w))
    return seen, state


@pytest.mark.parametrize("max_rows", [4096, 1], ids=["rows", "products"])
def test_it_is_the_natural_gradient_with_the_best_part_of_its_step(max_rows, x64):
    w = start()
    solver = ResidualEuler(max_rows, tolerance=1e-10, max_iterations=200)
    found, state = run(rk_optax.runge_kutta(LOSS, rk_optax.line_search(1 / DAMPING, parts=8), solver), 4)
    parts = []
    for i in range(4):
        data = batch(i)
        r, jacobian = rows(w, **data)
        step = -jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + DAMPING * np.eye(len(r)), r)
        parts.append(min(0.5 ** np.arange(8), key=lambda part: numpy_loss(w + part * step, **data)))
        w = w + parts[-1] * step
        np.testing.assert_allclose(found[i], w, rtol=1e-6, atol=1e-8)
    assert len(set(parts)) > 1
    assert float(state.rule.part) == parts[-1]
    assert float(state.step_size) == pytest.approx(parts[-1] / DAMPING)
    assert float(state.rule.least) == pytest.approx(numpy_loss(w, **batch(3)), rel=1e-6)


def test_the_first_part_that_falls_enough_is_armijos(x64):
    w, data, tried = start(), batch(0), 0
    tx = rk_optax.residual_euler(LOSS, rk_optax.line_search(1e3, first=True), tolerance=1e-10)
    params = jnp.asarray(w)
    state, step = tx.init(params), jax.jit(tx.value_and_update)
    for i in range(3):
        data = batch(i)
        r, jacobian = rows(w, **data)
        d = -jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-3 * np.eye(len(r)), r)
        part = 1.0
        while tried := tried + 1:
            if numpy_loss(w + part * d, **data) <= numpy_loss(w, **data) + 1e-4 * part * (r @ jacobian @ d):
                break
            part /= 2
        w = w + part * d
        _, updates, state = step(state, params, **data)
        params = params + updates
        np.testing.assert_allclose(params, w, rtol=1e-6, atol=1e-8)
    assert tried > 3
    assert int(state.cost.losses) == tried  # that before each step comes with the rows


def test_where_every_part_rises_the_next_step_is_shorter_and_the_one_after_longer_again(x64):
    """Newton's method for arctan leaves its zero where it starts beyond 1.4."""
    tx = rk_optax.residual_euler(rk_optax.LeastSquares(jnp.arctan), rk_optax.line_search(1e6, parts=1))
    w = jnp.array([3.0])
    state, step = tx.init(w), jax.jit(tx.value_and_update)
    accepted, sizes = [], []
    for _ in range(12):
        _, updates, state = step(state, w)
        w = w + updates
        accepted.append(bool(state.accepted))
        sizes.append(float(state.rule.next_step_size))
        if not accepted[-1]:
            assert int(state.reason) == rk_optax.Reason.LOSS_ROSE
            np.testing.assert_array_equal(updates, 0)
    assert not all(accepted)
    assert any(accepted)
    for before, after, taken in zip([1e6, *sizes], sizes, accepted, strict=False):
        assert after == pytest.approx(min(4 * before, 1e6) if taken else before / 16)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("start", "wanted", "end"), [(3, 1.003, 1), (256, 257.5, 258)])
def test_what_is_judged_is_the_step_that_half_precision_leaves(start, wanted, end, first):
    """Where bfloat16 rounds the update, and where it rounds the sum of parameters and update."""
    tx = rk_optax.residual_euler(rk_optax.LeastSquares(lambda w: w - wanted), rk_optax.line_search(first=first))
    w = jnp.full(1, start, jnp.bfloat16)
    _, updates, state = jax.jit(tx.value_and_update)(tx.init(w), w)
    assert float((w + updates)[0]) == end
    assert float(state.rule.least) == pytest.approx(0.5 * (wanted - end) ** 2, rel=1e-3)


def test_it_is_refused_where_it_makes_no_sense():
    with pytest.raises(ValueError, match=r"line_search needs a solver for very long steps, which .* 'rk4' is not"):
        rk_optax.rk4(LOSS, rk_optax.line_search())
    with pytest.raises(ValueError, match="Leave those out"):
        rk_optax.residual_euler(LOSS, rk_optax.line_search(), momentum=0.9)
    with pytest.raises(ValueError, match="step_size must be positive"):
        rk_optax.line_search(0.0)
    with pytest.raises(ValueError, match="parts"):
        rk_optax.line_search(parts=0)


# --- inertia ---


@pytest.mark.parametrize("l2", [None, 0.2])
@pytest.mark.parametrize("count", [8, 30], ids=["rows", "parameters"])
def test_inertia_is_spring(count, l2, x64):
    """phi = mu phi - R'(RR' + lambda)^-1 (r + mu R phi), with a learning rate behind it; l2 is a residual more."""
    mu, rate, w, phi = 0.8, 0.3, start(), np.zeros(18)
    tx = rk_optax.runge_kutta(
        LOSS, 1 / DAMPING, ResidualEuler(tolerance=1e-10, inertia=mu), l2=l2, after=optax.scale(rate)
    )
    params = jnp.asarray(w)
    state, step = tx.init(params), jax.jit(tx.value_and_update)
    for i in range(4):
        data = batch(i, count)
        r, jacobian = rows(w, **data)
        if l2 is not None:
            r, jacobian = np.r_[r, np.sqrt(l2) * w], np.vstack([jacobian, np.sqrt(l2) * np.eye(18)])
        kernel = jacobian @ jacobian.T + DAMPING * np.eye(len(r))
        phi = mu * phi - jacobian.T @ np.linalg.solve(kernel, r + mu * jacobian @ phi)
        w = w + rate * phi
        _, updates, state = step(state, params, **data)
        params = params + updates
        np.testing.assert_allclose(params, w, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(state.solver.moved, phi, rtol=1e-5, atol=1e-8)
    assert int(state.solver.form) == (0 if count == 8 else 1)


@pytest.mark.parametrize("count", [8, 30], ids=["rows", "parameters"])
def test_the_trust_ratio_knows_of_inertia(count, x64):
    """The ratio is that of the model at the step that was made, and a refused step ends the inertia."""
    data, w, h = batch(0, count), jnp.asarray(start()), 3.0
    tx = rk_optax.residual_euler(LOSS, rk_optax.trust_ratio_control(h), inertia=0.9, l2=0.1)
    state, step, refused = tx.init(w), jax.jit(tx.value_and_update), 0
    for i in range(12):
        if i == 6:  # far too long
            state = state._replace(rule=state.rule._replace(next_step_size=jnp.asarray(1e9)))
        before = np.asarray(w)
        value, updates, state = step(state, w, **data)
        loss = float(value)
        r, jacobian = rows(before, **data)
        d = np.asarray(state.solver.moved)
        if bool(state.accepted):
            np.testing.assert_allclose(updates, d, rtol=1e-9)
            model = 0.5 * np.sum((r + jacobian @ d) ** 2) + 0.05 * np.sum((before + d) ** 2)
            after = numpy_loss(before + d, **data) + 0.05 * np.sum((before + d) ** 2)
            assert float(state.rule.ratio) == pytest.approx((loss - after) / (loss - model), rel=1e-4)
        else:
            refused += 1
            np.testing.assert_array_equal(d, 0)
        w = w + updates
    assert 0 < refused < 9


@pytest.mark.parametrize("given", [{}, {"stage_dtype": None}, {"stage_dtype": "float64"}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_inertia_keeps_the_types_of_its_state(dtype, given, x64):
    loss = rk_optax.LeastSquares(lambda w: w - 1)
    tx = rk_optax.residual_euler(loss, 1.0, inertia=0.5, **given)
    w = jnp.zeros(3, dtype)
    state = tx.init(w)
    new = jax.eval_shape(tx.value_and_update, state, w)[2]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert state.solver.moved.dtype == jnp.float32


def test_inertia_without_a_path_or_rows_is_told():
    with pytest.raises(ValueError, match="needs the steps of all h"):
        rk_optax.residual_euler(LOSS, rk_optax.path_control(), inertia=0.9)
    with pytest.raises(ValueError, match=r"inertia must be in \[0, 1\)"):
        rk_optax.residual_euler(LOSS, inertia=1.0)
    tx = rk_optax.residual_euler(LOSS, 1.0, inertia=0.5, max_rows=3)
    w, data = jnp.asarray(start(), jnp.float32), jax.tree.map(jnp.float32, batch(0))
    with pytest.raises(ValueError, match="within max_rows=3"):
        tx.update(jax.grad(LOSS)(w, **data), tx.init(w), w, **data)
