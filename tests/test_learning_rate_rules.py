"""DAL and SGD-G2: what they cost, what they do with zero and NaN, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import network, network_gradient, network_loss, poisoned_loss
from training import Evaluations, assert_close, assert_same, exact_ratio, numpy_dal, trajectory, types

import rk_optax
from rk_optax import Cost, Reason, dal, sgd_g2

C = 0.4
ESTIMATES = ["product", "difference", "free"]


# --- Cost ------------------------------------------------------------------------------------------------------------

RULES = {
    "constant": (0.1, 0, 0),
    "product": (dal(C), 0, 1),
    "difference": (dal(C, estimate="difference"), 1, 0),
    "free": (dal(C, estimate="free"), 0, 0),
    "sgd_g2": (sgd_g2(), 1, 0),
}


COUNTED = [
    *((rule, "euler", True) for rule in ("product", "difference", "sgd_g2")),
    *((rule, solver, True) for rule in ("constant", "product", "difference", "free") for solver in ("rk4", "dopri5")),
    ("free", "bogacki_shampine", True),
    *((rule, "heun", False) for rule in ("product", "difference", "free")),
    ("sgd_g2", "euler", False),
]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("rule", "solver", "jit"), COUNTED)
def test_what_is_charged_is_what_is_evaluated(rule, solver, jit):
    rate, gradients, products = RULES[rule]
    counted = Evaluations(network_loss)
    params, data = network()
    tx = rk_optax.runge_kutta(counted.function, rate, solver)
    update = jax.jit(tx.update) if jit else tx.update
    gradient, state = network_gradient(params, **data), tx.init(params)
    for _ in range(2):
        before = state.cost
        _, state = update(gradient, state, params, **data)
        spent = Cost(*(int(now - then) for now, then in zip(state.cost, before, strict=True)))
        assert spent == Cost(rk_optax.TABLEAUS[solver].effective_stages + gradients, 0, products, 0)
        assert counted.take() == spent.gradients + spent.products - 1  # the incoming gradient is the caller's


@pytest.mark.parametrize("estimate", ["product", "difference"])
def test_every_k_makes_no_estimate_between(estimate):
    counted = Evaluations(network_loss)
    params, data = network()
    tx = rk_optax.euler(counted.function, dal(C, estimate=estimate, every=3))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(network_gradient(params, **data), state, params, **data)
        return optax.apply_updates(params, updates), state

    state, evaluated, charged, ratios, rates = tx.init(params), [], [], [], []
    for _ in range(8):
        before = state.cost
        params, state = step(params, state)
        evaluated.append(counted.take())
        charged.append(int(sum(now - then for now, then in zip(state.cost, before, strict=True))) - 1)
        ratios.append(float(state.rule.ratio))
        rates.append(float(state.step_size))
    assert evaluated == charged == [1, 0, 0, 1, 0, 0, 1, 0]
    assert ratios[0] == ratios[1] == ratios[2] != ratios[3] == ratios[4] == ratios[5] != ratios[6] == ratios[7]
    np.testing.assert_allclose(rates, [numpy_dal(C, r, 1, "rescaled") for r in ratios], rtol=1e-5)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("rule", RULES)
def test_an_update_traces_the_loss_once_whatever_the_number_of_steps(rule):
    traces = []

    def loss(params, x, y):
        traces.append(1)
        return network_loss(params, x, y)

    params, data = network()
    tx = rk_optax.runge_kutta(loss, RULES[rule][0], "euler" if rule == "sgd_g2" else "rk4")
    update = jax.jit(tx.update)
    state, seen = tx.init(params), []
    for i in range(4):
        _, state = update(params, state, params, x=data["x"] + i, y=data["y"])
        seen.append(len(traces))
    assert len(set(seen)) == 1
    assert seen[0] <= 4


# --- Zero, nothing and NaN -------------------------------------------------------------------------------------------


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("form", ["rescaled", "clipped"])
def test_a_gradient_of_zero_is_a_step_that_stays(estimate, form):
    tx = rk_optax.rk4(lambda w: jnp.sum(w**4), dal(C, form=form, estimate=estimate))
    w = jnp.zeros(3)
    state = tx.init(w)
    for i in range(3):
        updates, state = jax.jit(tx.update)(w, state, w)
        assert_same(updates, jnp.zeros(3))
        assert bool(state.accepted)
        assert float(state.step_size) == pytest.approx(C / 100 if estimate == "free" else C)
        assert float(state.rule.ratio) == 0.0, i
        assert bool(state.rule.seen) == (estimate != "free"), i  # a free one has still seen nothing


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_a_rate_of_zero_is_a_step_that_stays_and_the_next_one_moves(estimate):
    params, data = network()
    schedule = optax.linear_schedule(0.0, 0.2, 2)
    tx = rk_optax.rk4(network_loss, dal(schedule, estimate=estimate), momentum=0.9)
    visited = trajectory(tx, network_loss, params, data, 4)
    assert_same(visited[1][0], params)
    assert all(bool(state.accepted) for _, state in visited)
    assert float(visited[1][1].step_size) == 0.0
    losses = [float(network_loss(theta, **data)) for theta, _ in visited[1:]]
    assert losses[-1] < losses[0]
    rates = [float(state.step_size) for _, state in visited[2:]]
    ratios = [float(state.rule.ratio) for _, state in visited[1:]]
    if estimate == "free":
        expected = [0.001, *(numpy_dal(0.2, r, 1, "rescaled") for r in ratios[1:-1])]
    else:
        expected = [numpy_dal(c, r, 1, "rescaled") for c, r in zip((0.1, 0.2, 0.2), ratios[1:], strict=True)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("estimate", ESTIMATES)
@pytest.mark.parametrize("when", [0, 2])
def test_a_step_that_is_not_finite_leaves_the_last_r_and_keeps_nothing_else(estimate, when):
    params, data = network()
    tx = rk_optax.rk4(poisoned_loss, dal(C, estimate=estimate), momentum=0.9)
    gradient, state = network_gradient(params, **data), tx.init(params)
    update = jax.jit(tx.update)
    for _ in range(when):
        _, state = update(gradient, state, params, **data, poison=False)
    updates, refused = update(gradient, state, params, **data, poison=True)
    assert_same(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(refused.reason) == Reason.NOT_FINITE
    assert_same((refused.rule, refused.after), (state.rule, state.after))
    assert int(refused.count) == int(refused.rejected) + when == when + 1
    cost = Cost(4, 0, 1, 0) if estimate == "product" else Cost(4 + (estimate == "difference"), 0, 0, 0)
    assert [int(now - then) for now, then in zip(refused.cost, state.cost, strict=True)] == list(cost)
    # The next good step sees the curvature again.
    updates, state = update(gradient, refused, params, **data, poison=False)
    assert bool(state.accepted)
    np.testing.assert_allclose(state.rule.ratio, exact_ratio(network_loss, params, data), rtol=0.1)


def test_the_free_estimate_of_a_step_refused_for_another_reason_is_kept(x64):
    """The last stage left the domain; the first two did not, and saw the curvature."""

    def loss(w):
        return jnp.where(w < 0.9985, jnp.nan, 1.0) * w**2

    tx = rk_optax.rk4(loss, dal(0.1, estimate="free"))
    w = jnp.array(1.0)
    _, state = jax.jit(tx.update)(2 * w, tx.init(w), w)
    assert int(state.reason) == Reason.NOT_FINITE
    np.testing.assert_allclose(state.rule.ratio, 2.0, rtol=1e-9)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("incoming", [np.nan, np.inf])
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_an_incoming_gradient_that_is_not_finite_poisons_no_state(incoming, estimate):
    tx = rk_optax.rk4(lambda w: jnp.sum(w**2), dal(C, estimate=estimate))
    w = jnp.ones(2)
    _, state = tx.update(2 * w, tx.init(w), w)
    updates, refused = tx.update(jnp.array([incoming, 1.0]), state, w)
    assert_same(updates, jnp.zeros(2))
    assert_same(refused.rule, state.rule)
    assert np.isfinite(refused.rule.ratio)


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_an_empty_tree_works(estimate):
    tx = rk_optax.rk4(lambda params: jnp.zeros([]), dal(C, estimate=estimate))
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert bool(state.accepted)
    assert np.isfinite(state.step_size)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("rule", [r for r in RULES if r != "constant"])
def test_state_has_fixed_types_and_can_be_donated(rule):
    params, data = network()
    tx = rk_optax.runge_kutta(network_loss, RULES[rule][0], "euler" if rule == "sgd_g2" else "rk4", momentum=0.9)
    *_, (expected, last) = trajectory(tx, network_loss, params, data, 3)
    assert types(last) == types(tx.init(params))
    assert types(tx.init(jax.eval_shape(lambda: params))) == types(tx.init(params))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(network_gradient(params, **data), state, params, **data)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert_close(params, expected, rtol=1e-5, atol=1e-6)


def test_the_rates_names_in_state_are_not_those_of_injected_hyperparameters():
    fields = {*rk_optax.dal(1.0).init(None)._fields, *rk_optax.sgd_g2().init(None)._fields}
    assert not fields & {"learning_rate", "initial_learning_rate", "max_learning_rate", "decay", "power", "step_size"}


# --- Refusals --------------------------------------------------------------------------------------------------------


class OneStage(rk_optax.Solver):
    """A solver of one's own, without a second stage."""

    def step(self, problem, params, k1, h, state, *, wants=frozenset()):
        return rk_optax.Step(k1, Cost(gradients=1), state=state)


@pytest.mark.parametrize("solver", ["euler", OneStage()], ids=["euler", "own"])
def test_the_free_estimate_needs_a_second_stage(solver):
    with pytest.raises(ValueError, match=r"first two stages.*does not offer.*'product' or 'difference'.*'heun'"):
        rk_optax.runge_kutta(network_loss, dal(C, estimate="free"), solver)


def test_the_free_estimate_needs_a_second_stage_that_is_not_the_first_again():
    """a21 = 0 puts the second stage where the first one was: there is no curvature to see."""
    again = rk_optax.ButcherTableau("again", [[0, 0, 0], [0, 0, 0], [0, 1, 0]], [0.25, 0.25, 0.5], [0, 0, 1], order=2)
    with pytest.raises(ValueError, match="free"):
        rk_optax.runge_kutta(network_loss, dal(C, estimate="free"), again)


@pytest.mark.parametrize("solver", [*sorted(set(rk_optax.TABLEAUS) - {"euler"}), OneStage()])
def test_sgd_g2_is_for_eulers_method(solver):
    with pytest.raises(ValueError, match=r"gradient-descent step.*rk_optax\.euler, or dal\(\)"):
        rk_optax.runge_kutta(network_loss, sgd_g2(), solver)


@pytest.mark.parametrize("rule", [dal(C), dal(C, estimate="free"), sgd_g2()], ids=["dal", "free", "sgd_g2"])
def test_scale_by_rk_refuses_a_rate_that_could_not_reach_the_caller(rule):
    with pytest.raises(ValueError, match=r"adaptive one cannot reach you.*runge_kutta"):
        rk_optax.scale_by_rk(network_loss, rule, "euler")


def test_a_hessian_vector_product_needs_the_loss_and_says_so_at_construction():
    with pytest.raises(ValueError, match=r"learning rate.*needs a 'product': pass loss_fn"):
        rk_optax.rk4(None, dal(C), grad_fn=jax.grad(network_loss))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dal(0.0), ValueError, r"max_learning_rate must be finite and positive, got 0\.0"),
        (lambda: dal(-1), ValueError, r"max_learning_rate must be finite and positive, got -1"),
        (lambda: dal(np.nan), ValueError, "max_learning_rate must be finite and positive, got nan"),
        (lambda: dal(np.inf), ValueError, "max_learning_rate must be finite and positive, got inf"),
        (lambda: dal(jnp.array(-1.0)), ValueError, "max_learning_rate must be finite and positive"),
        (lambda: dal("1"), TypeError, "max_learning_rate must be a positive number.*'1'"),
        (lambda: dal(None), TypeError, "max_learning_rate must be a positive number.*None"),
        (lambda: dal(jnp.ones(2)), ValueError, r"max_learning_rate must be a real scalar.*\(2,\)"),
        (lambda: dal(1.0, 0.0), ValueError, r"power must be positive and finite, got 0\.0"),
        (lambda: dal(1.0, -1), ValueError, "power must be positive and finite, got -1"),
        (lambda: dal(1.0, np.nan), ValueError, "power must be positive and finite, got nan"),
        (lambda: dal(1.0, np.float32(-1)), ValueError, "power must be positive and finite"),
        (lambda: dal(1.0, jnp.array(-1.0)), ValueError, "power must be positive and finite"),
        (lambda: dal(1.0, "2"), (TypeError, ValueError), "power must be"),
        (lambda: dal(1.0, form="scaled"), ValueError, "form must be 'rescaled' or 'clipped', got 'scaled'"),
        (lambda: dal(1.0, estimate="hvp"), ValueError, "estimate must be 'product', 'difference' or 'free', got 'hvp'"),
        (lambda: dal(1.0, every=0), ValueError, "every must be an integer of at least 1, got 0"),
        (lambda: dal(1.0, every=1.5), ValueError, r"every must be an integer of at least 1, got 1\.5"),
        (lambda: dal(1.0, every=True), ValueError, "every must be an integer of at least 1, got True"),
        (
            lambda: dal(1.0, estimate="free", every=2),
            ValueError,
            "every has no use with estimate='free'.*leave it",
        ),
        (lambda: sgd_g2(0.0), ValueError, r"initial_learning_rate must be positive and finite, got 0\.0"),
        (lambda: sgd_g2(np.inf), ValueError, "initial_learning_rate must be positive and finite, got inf"),
        (lambda: sgd_g2("1"), (TypeError, ValueError), "initial_learning_rate must be"),
        (lambda: sgd_g2(optax.constant_schedule(0.1)), (TypeError, ValueError), "initial_learning_rate must be"),
        (lambda: sgd_g2(0.1, 1.0), ValueError, r"decay must be in \[0, 1\), got 1\.0"),
        (lambda: sgd_g2(0.1, -0.5), ValueError, r"decay must be in \[0, 1\), got -0\.5"),
        (lambda: sgd_g2(0.1, np.float32(1.5)), ValueError, r"decay must be in \[0, 1\)"),
        (lambda: sgd_g2(0.1, "0.9"), (TypeError, ValueError), "decay must be"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
