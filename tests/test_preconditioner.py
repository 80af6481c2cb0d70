"""Preconditioners: against Optax's own scalings, NumPy written from the equations, and scipy on the frozen field."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate
from conftest import network, network_gradient, network_loss
from jax.flatten_util import ravel_pytree
from training import (
    PARAMS,
    PRECONDITIONERS,
    SCALE_EQUATIONS,
    H,
    X,
    assert_close,
    assert_same,
    first_update,
    loss_fn,
    loss_gradient,
    numpy_rk4,
    trajectory,
)

import rk_optax
from rk_optax import Reason

EVERY = pytest.mark.parametrize("name", PRECONDITIONERS)


# --- Optax's own scalings, and NumPy ---------------------------------------------------------------------------------

AS_OPTAX = {
    "adagrad": (rk_optax.precondition_by_adagrad(), optax.scale_by_rss(1.0, eps=0.0)),
    "adagrad, floor 0.25": (rk_optax.precondition_by_adagrad(0.25), optax.scale_by_rss(0.25, eps=0.0)),
    "rms": (rk_optax.precondition_by_rms(0.8, 1e-2), optax.scale_by_rms(0.8, 1e-2, eps_in_sqrt=False)),
    "adam": (rk_optax.precondition_by_adam(0.95, 1e-2), optax.scale_by_adam(b1=0.0, b2=0.95, eps=1e-2)),
    "adam, its default decay": (rk_optax.precondition_by_adam(), optax.scale_by_adam(b1=0.0, eps=1e-3)),
    "rss, adapted": (PRECONDITIONERS["rss"], optax.scale_by_rss(1.0, eps=0.0)),
    "clip, adapted": (PRECONDITIONERS["clip"], optax.clip_by_global_norm(0.5)),
    "adam, adapted": (rk_optax.precondition_by(optax.scale_by_adam()), optax.scale_by_adam()),
}


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("case", AS_OPTAX)
def test_with_eulers_method_it_is_optaxs_scaling(case, x64):
    preconditioner, scaling = AS_OPTAX[case]
    params, data = network(np.float64)
    ours = trajectory(
        rk_optax.euler(network_loss, H, preconditioner=preconditioner), network_loss, params, data, 12, jit=False
    )
    theirs = trajectory(optax.chain(scaling, optax.scale(-H)), network_loss, params, data, 12, jit=False)
    for (mine, _), (expected, _) in zip(ours, theirs, strict=True):
        assert_close(mine, expected, rtol=1e-12, atol=1e-13)
    assert np.linalg.norm(ravel_pytree(ours[-1][0])[0] - ravel_pytree(params)[0]) > 0.1


@pytest.mark.parametrize("name", SCALE_EQUATIONS)
def test_rk4_freezes_the_scale_of_stage_one_at_every_stage_as_numpy_does(name, x64):
    accumulate, scale = SCALE_EQUATIONS[name]
    params, total = PARAMS, jax.tree.map(np.zeros_like, PARAMS)
    tx = rk_optax.rk4(loss_fn, H, preconditioner=PRECONDITIONERS[name])
    for t, (seen, state) in enumerate(trajectory(tx, loss_fn, PARAMS, {"x": X}, 6)):
        assert_close(seen, params)
        if t:
            (kept,) = [s for s in state.preconditioner if isinstance(s, dict)]
            assert_close(jax.tree.map(jnp.square, kept), total)
        total = jax.tree.map(lambda v, g, t=t: accumulate(v, g, t + 1), total, loss_gradient(params))
        frozen = jax.tree.map(lambda v, t=t: scale(v, t + 1), total)
        effective = numpy_rk4(lambda p, frozen=frozen: jax.tree.map(np.multiply, frozen, loss_gradient(p)), params, H)
        params = jax.tree.map(lambda p, d: p - H * d, params, effective)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", SCALE_EQUATIONS)
@pytest.mark.parametrize("how", ["stored stages", "recomputed stage 1", "grad_fn"])
def test_the_scale_reaches_every_kind_of_stage(name, how, x64):
    accumulate, scale = SCALE_EQUATIONS[name]
    frozen = jax.tree.map(lambda g: scale(accumulate(np.zeros_like(g), g, 1), 1), loss_gradient(PARAMS))

    def scaled_gradient(params, x):
        return jax.tree.map(jnp.multiply, frozen, jax.grad(loss_fn)(params, x))

    solver, options = {
        "stored stages": ("dopri5", {}),
        "recomputed stage 1": ("rk4", {"reuse_updates": False}),
        "grad_fn": ("rk4", {"grad_fn": jax.grad(loss_fn)}),
    }[how]
    loss = None if how == "grad_fn" else loss_fn
    tx = rk_optax.runge_kutta(loss, H, solver, preconditioner=PRECONDITIONERS[name], **options)
    params = jax.tree.map(jnp.asarray, PARAMS)
    updates, _ = jax.jit(tx.update)(jax.jit(jax.grad(loss_fn))(params, X), tx.init(params), params, x=X)
    plain = rk_optax.runge_kutta(None, H, solver, grad_fn=scaled_gradient)
    expected, _ = jax.jit(plain.update)(scaled_gradient(params, X), plain.init(params), params, x=X)
    assert_close(updates, expected)


# --- Order -----------------------------------------------------------------------------------------------------------


def frozen_scale(preconditioner, params, data, state):
    """P, read off one step of Euler's method: −hPg over −hg."""
    tx = rk_optax.euler(network_loss, 1.0, preconditioner=preconditioner)
    gradient = network_gradient(params, **data)
    updates, _ = tx.update(gradient, tx.init(params)._replace(preconditioner=state), params, **data)
    return jax.tree.map(lambda u, g: -u / g, updates, gradient)


def local_errors(solver, preconditioner, steps):
    """Distance from the flow of the frozen field after one step, from a state that two steps have warmed."""
    params, data = network(np.float64)
    warm = rk_optax.euler(network_loss, 0.1, preconditioner=preconditioner)
    params, state = trajectory(warm, network_loss, params, data, 2)[-1]
    scale = frozen_scale(preconditioner, params, data, state.preconditioner)
    start, unravel = ravel_pytree(params)
    field = jax.jit(lambda _, y: -ravel_pytree(scale)[0] * ravel_pytree(network_gradient(unravel(y), **data))[0])

    @jax.jit
    def end_of_step(h):
        tx = rk_optax.runge_kutta(network_loss, h, solver, preconditioner=preconditioner)
        warmed = tx.init(params)._replace(preconditioner=state.preconditioner)
        updates, _ = tx.update(network_gradient(params, **data), warmed, params, **data)
        return start + ravel_pytree(updates)[0]

    errors = []
    for h in steps:
        flow = scipy.integrate.solve_ivp(field, (0, h), start, "DOP853", rtol=3e-14, atol=1e-16).y[:, -1]
        errors.append(np.linalg.norm(end_of_step(h) - flow))
    return errors


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("name", "solver", "order"),
    [
        *((name, "rk4", 4) for name in (*SCALE_EQUATIONS, "hutchinson")),
        ("adagrad", "heun", 2),
        ("adagrad", "dopri5", 5),
    ],
)
def test_a_step_keeps_the_order_of_the_solver_along_the_frozen_field(name, solver, order, x64):
    """Over one step: the scale is frozen anew in each, so from step to step there is no one flow to converge to.

    A method of order p misses the flow of the frozen field by O(h^(p+1)) in one step; g* itself by O(h^p).
    """
    steps = np.array([0.1, 0.05, 0.025]) * (0.5 if name in ("rms", "adam") else 1)
    errors = local_errors(solver, PRECONDITIONERS[name], steps)
    slopes = np.diff(np.log(errors)) / np.diff(np.log(steps))
    assert slopes.min() >= order + 1 - 0.15, (slopes, errors)
    assert errors[-1] > 1e-14  # of truncation, not of rounding


# --- A frozen state is not a frozen scale ----------------------------------------------------------------------------


def test_the_papers_scale_and_optaxs_adapted_rss_part_at_stage_two():
    """Stage 1 sees a gradient of 1, stage 2 of 0.2: 0.2/√(1 + 1²) = 0.141, and 0.2/√(1 + 0.2²) = 0.196."""
    seen = {}
    for name in ("adagrad", "rss"):
        p = PRECONDITIONERS[name]
        params = jnp.array(1.0)
        frozen, state, _ = p.update(jnp.array(1.0), p.init(params), params, None)
        assert float(p.apply(jnp.array(1.0), frozen)) == pytest.approx(2**-0.5)
        seen[name] = float(p.apply(jnp.array(0.2), frozen))
        assert float(jax.tree.leaves(state)[0]) == {"adagrad": 1.0, "rss": 2.0}[name]  # of stage 1 alone
    assert {name: round(value, 3) for name, value in seen.items()} == {"adagrad": 0.141, "rss": 0.196}


@pytest.mark.parametrize(("name", "second"), [("adagrad", 0.2 / 2**0.5), ("rss", 0.2 / (1 + 0.2**2) ** 0.5)])
def test_and_they_part_inside_a_step_of_heun(name, second, x64):
    # With L = w²/2 from w = 1, stage 1 is P·1 = 1/√2; this h takes stage 2 to w = 0.2.
    h = 0.8 * 2**0.5
    tx = rk_optax.heun(lambda w: w**2 / 2, h, preconditioner=PRECONDITIONERS[name])
    w = jnp.array(1.0)
    updates, state = tx.update(w, tx.init(w), w)
    assert float(updates) == pytest.approx(-h * (2**-0.5 + second) / 2, rel=1e-12)
    assert float(jax.tree.leaves(state.preconditioner)[0]) == {"adagrad": 1.0, "rss": 2.0}[name]


def test_clipping_every_stage_is_a_loop_with_a_clip_in_it(x64):
    bound = 0.05

    def clipped_gradient(params):
        gradient = loss_gradient(params)
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        return {key: g * min(1, bound / norm) for key, g in gradient.items()}

    params = PARAMS
    norms = [np.sqrt(sum(np.sum(g**2) for g in loss_gradient(p).values())) for p in (PARAMS,)]
    assert norms[0] > bound
    tx = rk_optax.rk4(loss_fn, 2.0, preconditioner=rk_optax.precondition_by(optax.clip_by_global_norm(bound)))
    for seen, _ in trajectory(tx, loss_fn, PARAMS, {"x": X}, 8):
        assert_close(seen, params)
        params = jax.tree.map(lambda p, d: p - 2.0 * d, params, numpy_rk4(clipped_gradient, params, 2.0))
    # Chained before the solver it would reach stage 1 alone.
    before = optax.chain(optax.clip_by_global_norm(bound), rk_optax.rk4(loss_fn, 2.0))
    alone, _ = first_update(before, loss_fn, PARAMS, x=X)
    inside, _ = first_update(tx, loss_fn, PARAMS, x=X)
    assert np.max(np.abs(alone["w"] - inside["w"])) > 1e-3


def test_an_adapted_transformation_commits_its_state_once_a_step_and_from_stage_one(x64):
    counting = optax.GradientTransformation(
        lambda params: {"count": jnp.zeros([], jnp.int32), "sum": jax.tree.map(jnp.zeros_like, params)},
        lambda g, s, params=None: (g, {"count": s["count"] + 1, "sum": jax.tree.map(jnp.add, s["sum"], g)}),
    )
    tx = rk_optax.dopri5(loss_fn, H, preconditioner=rk_optax.precondition_by(counting))
    visited = trajectory(tx, loss_fn, PARAMS, {"x": X}, 4)
    stage_ones = [loss_gradient(jax.tree.map(np.asarray, params)) for params, _ in visited[:-1]]
    final = visited[-1][1].preconditioner
    assert int(final["count"]) == 4
    assert_close(final["sum"], jax.tree.map(lambda *g: sum(g), *stage_ones))


def test_an_adapted_transformation_sees_the_params_at_the_start_of_the_step(x64):
    decay = rk_optax.precondition_by(optax.add_decayed_weights(0.5))
    updates, _ = first_update(rk_optax.rk4(loss_fn, H, preconditioner=decay), loss_fn, PARAMS, x=X)

    def field(params):
        return jax.tree.map(lambda g, start: g + 0.5 * start, loss_gradient(params), PARAMS)

    assert_close(updates, jax.tree.map(lambda d: -H * d, numpy_rk4(field, PARAMS, H)))


@pytest.mark.slow
def test_an_adapted_transformation_may_hold_a_random_key():
    noise = rk_optax.precondition_by(optax.add_noise(0.1, 0.5, key=jax.random.key(0)))
    tx = rk_optax.rk4(loss_fn, H, preconditioner=noise)
    updates, state = first_update(tx, loss_fn, PARAMS, x=X)
    assert bool(state.accepted)
    assert all(np.all(np.isfinite(u)) for u in updates.values())


# --- The floor -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [rk_optax.precondition_by_adagrad, rk_optax.precondition_by_rms])
def test_a_weight_whose_gradient_is_zero_at_stage_one_only_needs_the_floor(make):
    """L = a²/2 + b(a − 1) from a = 1, b = 0: the gradient of b is 0 there, and −h·P at the second stage."""

    def valley(params):
        return params["a"] ** 2 / 2 + params["b"] * (params["a"] - 1)

    params = {"a": jnp.array(1.0), "b": jnp.array(0.0)}
    gradient = jax.jit(jax.grad(valley))(params)
    assert float(gradient["b"]) == 0.0
    moved = {}
    for floor in (1e-8, 1.0):
        tx = rk_optax.heun(valley, 0.1, preconditioner=make(floor=floor))
        updates, state = jax.jit(tx.update)(gradient, tx.init(params), params)
        assert bool(state.accepted)  # finite, so nothing guards against it
        moved[floor] = abs(float(updates["b"]))
    # h²·P_a·P_b/2, where P_b is 1 with the paper's floor and 1e4 or 1e8 without.
    assert 1e-3 < moved[1.0] < 1e-2
    assert moved[1e-8] > 10


@pytest.mark.parametrize("floor", [1e-4, 1.0, 100.0])
def test_adagrads_floor_bounds_the_scale_by_its_inverse_root(floor):
    p = rk_optax.precondition_by_adagrad(floor)
    zero = jnp.zeros(3)
    frozen, _, _ = p.update(zero, p.init(zero), zero, None)
    np.testing.assert_allclose(p.apply(jnp.ones(3), frozen), floor**-0.5, rtol=1e-6)


# --- Refused steps ---------------------------------------------------------------------------------------------------


def poisoned_loss(params, x, poison=False):
    return jnp.where(poison, jnp.nan, 1.0) * loss_fn(params, x)


@pytest.mark.covering(most=2)
@EVERY
def test_a_refused_step_restores_the_state_of_the_preconditioner(name):
    tx = rk_optax.rk4(poisoned_loss, H, preconditioner=PRECONDITIONERS[name])
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), PARAMS)
    x = X.astype(np.float32)
    gradient = jax.jit(jax.grad(loss_fn))(params, x)
    # Hutchinson's second estimate falls into the refused step: an even number of steps before it.
    _, state = jax.jit(tx.update)(gradient, tx.init(params), params, x=x)
    _, state = jax.jit(tx.update)(gradient, state, params, x=x)
    updates, refused = jax.jit(tx.update)(gradient, state, params, x=x, poison=True)
    assert int(refused.reason) == Reason.NOT_FINITE
    assert_same(updates, jax.tree.map(jnp.zeros_like, params))
    assert_same(refused.preconditioner, state.preconditioner)
    # And so it goes on as if nothing had been.
    again, _ = jax.jit(tx.update)(gradient, refused, params, x=x)
    expected, _ = jax.jit(tx.update)(gradient, state, params, x=x)
    assert_same(again, expected)
    assert int(refused.cost.gradients) == 12
    assert int(refused.cost.products) == (2 if name == "hutchinson" else 0)


@pytest.mark.parametrize("name", ["adagrad", "rms", "adam"])
def test_a_gradient_whose_square_overflows_does_not_freeze_its_weight_for_ever(name):
    tx = rk_optax.euler(lambda w: jnp.sum(w**2), 0.1, preconditioner=PRECONDITIONERS[name])
    w = jnp.ones(2)
    _, state = tx.update(jnp.array([1e25, 1.0]), tx.init(w), w)
    updates, state = tx.update(jnp.ones(2), state, w)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.preconditioner))
    assert np.all(updates < 0)


# --- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rk_optax.precondition_by_adagrad(0.0), ValueError, r"floor must be positive and finite, got 0\.0"),
        (lambda: rk_optax.precondition_by_adagrad(-1), ValueError, "floor must be positive and finite, got -1"),
        (lambda: rk_optax.precondition_by_adagrad(np.inf), ValueError, "floor must be positive and finite, got inf"),
        (lambda: rk_optax.precondition_by_adagrad(np.nan), ValueError, "floor must be positive and finite, got nan"),
        (lambda: rk_optax.precondition_by_rms(floor=0.0), ValueError, "floor must be positive.* scale of a stage"),
        (lambda: rk_optax.precondition_by_rms(1.0), ValueError, r"decay must be in \[0, 1\), got 1\.0"),
        (lambda: rk_optax.precondition_by_rms(-0.1), ValueError, r"decay must be in \[0, 1\), got -0\.1"),
        (lambda: rk_optax.precondition_by_adam(np.nan), ValueError, r"decay must be in \[0, 1\), got nan"),
        (lambda: rk_optax.precondition_by_adam(floor=-1.0), ValueError, r"floor must be positive.*got -1\.0"),
        (lambda: rk_optax.precondition_by_hutchinson(2.0), ValueError, r"decay must be in \[0, 1\), got 2\.0"),
        (lambda: rk_optax.precondition_by_hutchinson(floor=0.0), ValueError, "floor must be positive"),
        (lambda: rk_optax.precondition_by_hutchinson(every=0), ValueError, "every must be an integer of at least 1"),
        (lambda: rk_optax.precondition_by_hutchinson(every=2.5), ValueError, r"every must be .*got 2\.5"),
        (lambda: rk_optax.precondition_by_hutchinson(every=True), ValueError, "every must be .*got True"),
        (lambda: rk_optax.precondition_by(0.1), TypeError, r"takes an optax\.GradientTransformation, got float"),
        (lambda: rk_optax.precondition_by(optax.clip), TypeError, r"optax\.GradientTransformation, got function"),
        (
            lambda: rk_optax.rk4(loss_fn, H, preconditioner=optax.clip(1.0)),
            TypeError,
            r"preconditioner must be a Preconditioner, got GradientTransformation.*rk_optax\.precondition_by",
        ),
        (
            lambda: rk_optax.rk4(loss_fn, H, preconditioner=rk_optax.precondition_by_adagrad),
            TypeError,
            "preconditioner must be a Preconditioner, got .* when it is called",
        ),
        (
            lambda: rk_optax.rk4(None, H, grad_fn=jax.grad(loss_fn), preconditioner=PRECONDITIONERS["hutchinson"]),
            ValueError,
            "preconditioner needs a 'product': pass loss_fn",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name_and_with_a_remedy(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("value", [np.float32(-1.0), np.array(-1.0), jnp.array(-1.0), "1", None], ids=repr)
@pytest.mark.parametrize("argument", ["floor", "decay"])
def test_concrete_numbers_of_any_kind_are_checked_at_construction(argument, value):
    kinds = ["rms", "adam", "hutchinson", *(["adagrad"] if argument == "floor" else [])]
    for kind in kinds:
        with pytest.raises((TypeError, ValueError), match=argument):
            getattr(rk_optax, f"precondition_by_{kind}")(**{argument: value})


@pytest.mark.slow
def test_a_preconditioner_of_ones_own_takes_part(x64):
    """Three methods and what they need are the whole interface."""
    seen = []

    class Tripled(rk_optax.Preconditioner):
        needs = frozenset({"loss"})

        def init(self, params):
            return jnp.zeros([], jnp.int32)

        def update(self, gradient, state, params, field):
            seen.append(field.loss(params))
            return 3.0, state + 1, rk_optax.Cost(losses=1)

        def apply(self, gradient, frozen):
            return jax.tree.map(lambda g: frozen * g, gradient)

    tripled = Tripled()
    updates, state = first_update(rk_optax.rk4(loss_fn, H, preconditioner=tripled), loss_fn, PARAMS, jit=False, x=X)
    expected = numpy_rk4(lambda p: jax.tree.map(lambda g: 3 * g, loss_gradient(p)), PARAMS, H)
    assert_close(updates, jax.tree.map(lambda d: -H * d, expected))
    assert int(state.cost.losses) == int(state.preconditioner) == 1
    np.testing.assert_allclose(seen[0], loss_fn(PARAMS, X), rtol=1e-12)
    with pytest.raises(ValueError, match="needs a 'loss': pass loss_fn"):
        rk_optax.rk4(None, H, grad_fn=jax.grad(loss_fn), preconditioner=tripled)
