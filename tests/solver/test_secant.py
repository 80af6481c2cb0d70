"""The curvature that steps have shown: its linear system, its secants, and how it descends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import FixedScale
from valley import flat, gradient, rosenbrock

import rk_optax
from rk_optax.solver._secant import SecantState


def start():
    return {"a": jnp.array([-1.2, 1.0]), "b": jnp.array([0.7])}


@functools.cache
def after_three_steps(scale):
    """Places, the state there, and one more update of step size h, of programs that all h share."""
    given = {}
    if scale is not None:
        given = {"preconditioner": FixedScale({"a": jnp.array(scale[:2]), "b": jnp.array(scale[2:])})}
    tx = rk_optax.runge_kutta(rosenbrock, 2e-3, rk_optax.RosenbrockEuler("secant"), **given)

    @jax.jit
    def long(h, state, w):
        tx = rk_optax.scale_by_rk(rosenbrock, lambda count: h, rk_optax.RosenbrockEuler("secant"), **given)
        return tx.update(jax.grad(rosenbrock)(w), state, w)

    w, places = start(), []
    state, step = tx.init(w), jax.jit(tx.value_and_update)
    for _ in range(3):
        places.append(w)
        _, updates, state = step(state, w)
        w = jax.tree.map(jnp.add, w, updates)
    return [*places, w], state, long


@pytest.mark.parametrize("h", [1e-3, 1.0, 1e3, 1e20])
@pytest.mark.parametrize("scale", [None, (0.5, 2.0, 3.0)], ids=["", "preconditioned"])
def test_the_step_solves_the_system_with_a_matrix_that_maps_the_latest_step_to_the_change_of_the_gradient(
    h, scale, x64
):
    places, state, long = after_three_steps(scale)
    w, places = places[-1], [flat(place) for place in places[:-1]]
    direction, state = long(h, state, w)
    inverse, theta = np.asarray(state.solver.secant.inverse), flat(w)
    s, y = theta - places[-1], gradient(theta) - gradient(places[-1])
    np.testing.assert_allclose(inverse @ y, s, rtol=1e-8)
    assert (np.linalg.eigvalsh(inverse) > 0).all()
    p = np.ones(3) if scale is None else np.array(scale)
    expected = np.linalg.solve(np.eye(3) + h * p[:, None] * np.linalg.inv(inverse), p * gradient(theta))
    np.testing.assert_allclose(flat(direction), expected, rtol=1e-6)


def test_it_ends_at_the_minimum_of_a_curved_valley_in_a_quasi_newton_methods_number_of_steps(x64):
    """From the usual start scipy's BFGS takes some forty."""
    tx = rk_optax.rosenbrock_euler(rosenbrock, curvature="secant")
    w = start() | {"b": jnp.zeros(1)}
    state, step = tx.init(w), jax.jit(tx.value_and_update)
    for _ in range(70):
        loss, updates, state = step(state, w)
        w = jax.tree.map(jnp.add, w, updates)
    assert float(loss) < 1e-20
    np.testing.assert_allclose(w["a"], 1, rtol=1e-8)
    assert int(state.cost.gradients) == 70
    assert int(state.cost.losses) < 140
    assert int(state.cost.products) == 0


def test_it_works_in_float32_and_for_complex_parameters():
    tx = rk_optax.rosenbrock_euler(lambda z: jnp.sum(jnp.abs(z - (1 + 2j)) ** 4), curvature="secant")
    z = jnp.zeros(3, jnp.complex64)
    state, step = tx.init(z), jax.jit(tx.value_and_update)
    for _ in range(40):
        _, updates, state = step(state, z)
        z = z + updates
    np.testing.assert_allclose(z, np.full(3, 1 + 2j), atol=3e-2)


@pytest.mark.parametrize("loss_scale", [1e-25, 1.0, 1e25])
def test_the_first_step_is_a_tenth_of_the_parameters_that_have_a_gradient(loss_scale):
    """In any units of the loss; with an h so long that the step is -H∇L."""

    def loss(w):
        return loss_scale * jnp.sum(jnp.array([1.0, 10.0]) * (w[:2] - 1) ** 2)

    tx = rk_optax.runge_kutta(loss, 1e8 / loss_scale, rk_optax.RosenbrockEuler("secant"))
    for w in (np.array([2.0, 2.0, 1e20]), np.array([0.0, 0.0, 1e20])):  # the last one does nothing
        slope = np.array([2.0, 20.0, 0.0]) * (w - 1)
        length = 0.1 * np.hypot(*w[:2]) or 1.0
        change, state = jax.jit(lambda w: tx.value_and_update(tx.init(w), w)[1:])(jnp.asarray(w, jnp.float32))
        np.testing.assert_allclose(change, -length * slope / np.linalg.norm(slope), rtol=1e-5)
    gone, state = jax.jit(lambda w: tx.update(jnp.zeros(3), tx.init(w), w))(jnp.ones(3))
    assert not np.any(gone)
    assert not bool(state.solver.secant.seen)  # a gradient of 0 says nothing


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e8])
def test_it_ends_at_the_minimum_in_any_units_of_the_loss_beside_a_leaf_that_does_nothing(scale):
    def loss(w):
        return scale * jnp.sum(jnp.array([1.0, 10.0]) * (w[:2] - 1) ** 2)

    tx = rk_optax.rosenbrock_euler(loss, rk_optax.line_search(1e8 / scale, first=True, parts=24), curvature="secant")
    w = jnp.array([2.0, 2.0, 1e20])
    state, step = tx.init(w), jax.jit(tx.value_and_update)
    for _ in range(10):
        _, updates, state = step(state, w)
        w = w + updates
    np.testing.assert_allclose(w, [1, 1, 1e20], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_a_secant_is_kept_in_any_units_of_the_loss(scale):
    """Of scale/2 w·Aw, whose gradient changes by scale·As over a step s along the first one."""
    matrix, w = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([0.7, -0.4])
    state, s, updated = SecantState.empty(2, jnp.float32), -0.1 * matrix @ w, jax.jit(SecantState.updated)
    for place in (w, w + s):
        state = updated(state, np.asarray(place, np.float32), np.asarray(scale * (matrix @ place), np.float32))
    np.testing.assert_allclose(np.asarray(state.inverse, float) @ (scale * matrix @ s), s, rtol=1e-4)
    assert (np.linalg.eigvalsh(np.asarray(state.inverse, float)) > 0).all()


def test_a_matrix_that_is_indefinite_by_rounding_begins_again(x64):
    tx = rk_optax.rosenbrock_euler(rosenbrock, curvature="secant")
    state, w = tx.init(start()), start()
    spoilt = state.solver.secant._replace(inverse=jnp.diag(jnp.array([1.0, -1.0, 1.0])), seen=jnp.array(True))
    state = state._replace(solver=state.solver._replace(secant=spoilt))
    _, updates, state = jax.jit(tx.value_and_update)(state, w)
    inverse = np.asarray(state.solver.secant.inverse)
    np.testing.assert_array_equal(inverse, inverse[0, 0] * np.eye(3))
    assert inverse[0, 0] > 0
    assert state.accepted
    assert flat(updates) @ gradient(flat(w)) < 0


def test_its_state_keeps_its_types_in_a_wider_stage_dtype(x64):
    tx = rk_optax.rosenbrock_euler(lambda w: jnp.sum(w**2), curvature="secant", stage_dtype="float64")
    w = jnp.zeros(3, jnp.float32)
    state = tx.init(w)
    new = jax.eval_shape(tx.value_and_update, state, w)[2]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.parametrize("curvature", ["secant", "limited_secant"])
def test_ros2_takes_it_too(curvature, x64):
    """Any matrix will do: halving h divides the error of one second-order step by eight."""

    @jax.jit
    def updates(h):
        tx = rk_optax.runge_kutta(rosenbrock, lambda count: h, rk_optax.Ros2(curvature))
        return tx.value_and_update(tx.init(start()), start())[1]

    def after(h):
        return flat(start()) + flat(updates(h))

    def fine(h):
        w, theta = 2000, flat(start())
        for _ in range(w):
            k1 = gradient(theta)
            theta = theta - h / w * gradient(theta - h / w / 2 * k1)
        return theta

    errors = [np.linalg.norm(after(h) - fine(h)) for h in (2e-4, 1e-4)]
    assert 6 < errors[0] / errors[1] < 10


def test_it_needs_a_gradient_field():
    with pytest.raises(ValueError, match="needs a 'symmetric'"):
        rk_optax.rosenbrock_euler(None, 0.1, curvature="secant", grad_fn=lambda w: w)


def test_of_many_parameters_no_dense_matrix_is_kept():
    for size, numbers in ((4096, 4096**2), (4097, 42 * 4097)):
        state = jax.eval_shape(rk_optax.rosenbrock_euler(rosenbrock, curvature="secant").init, jnp.zeros(size))
        kept = sum(x.size for x in jax.tree.leaves(state.solver.secant))
        assert numbers <= kept < 1.05 * numbers
