"""Reverse mode through an update: right against differences where it is smooth, and finite wherever the value is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import RULES

import rk_optax

pytestmark = pytest.mark.latest

H, STEP = 0.1, 1e-6
DATA = np.array([0.8, -1.1, 0.6])
SMOOTH, ONE_ZERO, ALL_ZERO = np.array([0.5, -0.3, 0.8]), np.array([0.5, -0.3, 0.0]), np.zeros(3)


def loss_fn(params, x):
    """A coordinate of the gradient is 0 where the parameter is."""
    return jnp.sum(x**2 * jnp.tanh(params["w"]) ** 2) + params["w"][0] ** 2 * params["w"][1] ** 2


SOLVERS = {
    **{name: name for name in rk_optax.TABLEAUS},
    "rkc": rk_optax.Stabilized("rkc1", 4),
    "rkc2": rk_optax.Stabilized("rkc2", 4),
    "rkl": rk_optax.Stabilized("rkl2", 4),
    "etd1": rk_optax.Etd(1),
    "etdrk2": rk_optax.Etd(2),
    "rosenbrock_euler": rk_optax.RosenbrockEuler("diagonal"),
    "ros2": rk_optax.Ros2("diagonal"),
}
PRECONDITIONERS = {
    "none": None,
    "adagrad": rk_optax.precondition_by_adagrad(),
    "rms": rk_optax.precondition_by_rms(),
    "adam": rk_optax.precondition_by_adam(),
    "hutchinson": rk_optax.precondition_by_hutchinson(),
    "clip": rk_optax.precondition_by(optax.clip_by_global_norm(0.5)),
}
QUICK = {
    ("ros2", "none", "constant"),
    ("rk4", "rms", "constant"),
    ("heun", "none", "dal"),
}
LONG = {
    *((solver, "none", "constant") for solver in ("dopri5", "etdrk2", "rk4", "rkc2")),
    ("rk4", "adam", "constant"),
    ("heun", "none", "dal, free"),
    ("euler", "none", "sgd_g2"),
}
EXHAUSTIVE = [pytest.mark.slow, pytest.mark.exhaustive]
ALL_RULES = {("heun", "none", rule) for rule in RULES if rule not in ("error", "sgd_g2", "trust", "path", "search")} | {
    ("bogacki_shampine", "none", "error"),
    ("euler", "none", "sgd_g2"),
    ("rosenbrock_euler", "none", "trust"),
}


def combinations():
    both = [(s, p, "constant") for s in SOLVERS for p in PRECONDITIONERS]
    for case in sorted({*both, *QUICK, *LONG, *ALL_RULES}):
        if case[1] != "clip" or isinstance(SOLVERS[case[0]], str | rk_optax.Stabilized):  # the others want a diagonal
            yield pytest.param(*case, marks=[] if case in QUICK else EXHAUSTIVE[: 1 if case in LONG else 2])


@pytest.mark.parametrize(("solver", "preconditioner", "rule"), list(combinations()))
def test_reverse_mode_is_right_and_finite(solver, preconditioner, rule, x64):
    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def moved(w, h, x):
        tx = rk_optax.runge_kutta(
            loss_fn, RULES[rule](h), SOLVERS[solver], preconditioner=PRECONDITIONERS[preconditioner]
        )
        params = {"w": w}
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params, x=x)
            params = optax.apply_updates(params, updates)
        return jnp.sum(jnp.arange(1.0, 4.0) * params["w"])

    # An h from a difference of gradients has that difference's error.
    close = {"rel": 1e-3 if "difference" in rule else 1e-5, "abs": 1e-7}
    for start in (SMOOTH, ONE_ZERO):
        arguments = (jnp.asarray(start), jnp.asarray(H), jnp.asarray(DATA))
        gradients = moved(*arguments)[1]
        directions = [jnp.ones(3) * (start != 0), jnp.ones([]), jnp.ones(3)]
        for i, direction in enumerate(directions):
            ends = []
            for sign in (1, -1):
                shifted = list(arguments)
                shifted[i] = shifted[i] + sign * STEP * direction
                ends.append(float(moved(*shifted)[0]))
            expected = (ends[0] - ends[1]) / (2 * STEP)
            assert float(jnp.sum(gradients[i] * direction)) == pytest.approx(expected, **close), (start, i)
    if preconditioner == "clip":
        return  # optax.global_norm has no derivative at 0
    at_rest = moved(jnp.asarray(ALL_ZERO), jnp.asarray(H), jnp.asarray(DATA))[1]
    assert all(np.isfinite(g).all() for g in at_rest)


@pytest.mark.parametrize(
    "make",
    [rk_optax.backward_euler, rk_optax.rosenbrock_euler, rk_optax.residual_euler, rk_optax.rkc],
    ids=lambda m: m.__name__,
)
def test_what_iterates_until_it_has_converged_has_jaxs_own_message(make):
    loss = rk_optax.LeastSquares(lambda w, x: jnp.tanh(w) - x)

    def moved(w):
        tx = make(loss, H)
        return jnp.sum(tx.update(jax.grad(loss)(w, DATA), tx.init(w), w, x=jnp.asarray(DATA, w.dtype))[0])

    with pytest.raises(ValueError, match=r"Reverse-mode differentiation does not work for lax\.while_loop"):
        jax.eval_shape(jax.grad(moved), jnp.ones(3))


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd])
def test_what_chooses_among_trial_steps_says_that_it_has_no_derivative(derivative, precise, request):
    if precise:
        request.getfixturevalue("x64")
    loss = rk_optax.LeastSquares(lambda w, x: jnp.tanh(w) - x)

    def moved(x):
        tx, w = rk_optax.residual_euler(loss, rk_optax.path_control()), jnp.ones(3)
        return jnp.sum(tx.update(jax.grad(loss)(w, x), tx.init(w), w, x=x)[0])

    with pytest.raises(ValueError, match=r"path_control cannot be differentiated.*explicit method"):
        jax.eval_shape(derivative(moved), jnp.asarray(DATA, float))


# --- Refused steps ---------------------------------------------------------------------------------------------------


def edge_loss(w, x):
    """Not finite below the edge, where neither its value nor its derivatives are."""
    return jnp.sum(x[:2] * jnp.sqrt(w - x[2])) + jnp.sum(w**2)


REFUSING = {
    "heun, descent": lambda h, **o: rk_optax.heun(edge_loss, rk_optax.descent_control(h), **o),
    "rk4, constant": lambda h, **o: rk_optax.rk4(edge_loss, h, after=optax.scale_by_adam(), **o),
    "rk4, dal": lambda h, **o: rk_optax.rk4(edge_loss, rk_optax.dal(h), **o),
    "heun, free": lambda h, **o: rk_optax.heun(edge_loss, rk_optax.dal(20 * h, estimate="free"), **o),
    "bogacki_shampine, error": lambda h, **o: rk_optax.bogacki_shampine(
        edge_loss, rk_optax.error_control(0.5, 0.5, initial_step_size=h), **o
    ),
    "rkc2": lambda h, **o: rk_optax.runge_kutta(edge_loss, h, rk_optax.Stabilized("rkc2", 4), **o),
    "etdrk2": lambda h, **o: rk_optax.runge_kutta(
        edge_loss, h, rk_optax.Etd(2), preconditioner=rk_optax.precondition_by_rms(), **o
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=EXHAUSTIVE[: 1 if name == "heun, descent" else 2]) for name in REFUSING]
)
def test_reverse_mode_through_a_step_refused_at_a_later_stage_is_that_of_staying(name, x64):
    """Both ways, over lanes of which one is refused at first and one is not, and against differences."""

    def moved(inputs, **options):
        w, h, x = inputs[:2], inputs[2], inputs[3:]
        tx = REFUSING[name](h, **options)
        state, refused = tx.init(w), []
        for _ in range(2):
            updates, state = tx.update(jax.grad(edge_loss)(w, x), state, w, x=x)
            w = w + updates
            refused.append(state.reason == rk_optax.Reason.NOT_FINITE)
        return w @ jnp.array([1.0, 2.0]) + state.step_size, (jnp.stack(refused), state.cost.gradients)

    guarded = functools.partial(moved, finite_derivatives=True)
    inputs = jnp.array([[1.0, 1.2, 0.5, 0.8, 1.1, 0.9], [1.0, 1.2, 0.01, 0.8, 1.1, 0.1]])
    value = jax.jit(jax.vmap(guarded))
    ends, (refused, cost) = value(inputs)
    plain_ends, (plain_refused, plain_cost) = jax.jit(jax.vmap(moved))(inputs)
    assert refused[0].any()
    assert not refused[1].any()
    np.testing.assert_array_equal(refused, plain_refused)
    np.testing.assert_allclose(ends, plain_ends, rtol=1e-12)
    assert (cost > plain_cost).all()
    found = jax.jit(jax.vmap(jax.grad(guarded, has_aux=True)))(inputs)[0]
    forward = jax.jit(jax.vmap(jax.jacfwd(moved, has_aux=True)))(inputs)[0]
    np.testing.assert_allclose(found, forward, rtol=1e-9, atol=1e-12)
    for i in range(inputs.shape[1]):
        shift = STEP * np.eye(inputs.shape[1])[i]
        expected = (value(inputs + shift)[0] - value(inputs - shift)[0]) / (2 * STEP)
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-5, atol=1e-6)


def test_without_it_the_derivative_is_nan_and_both_guards_go_together():
    tx = rk_optax.heun(lambda w: jnp.sqrt(w - 0.9), 10.0)
    w = jnp.array(1.0)
    update = jax.value_and_grad(lambda w: tx.update(jnp.ones([]), tx.init(w), w)[0])
    value, slope = update(w)
    assert float(value) == 0
    assert np.isnan(slope)
    with pytest.raises(ValueError, match=r"finite_derivatives=True .* skip_nonfinite=False"):
        rk_optax.heun(loss_fn, 0.1, finite_derivatives=True, skip_nonfinite=False)
