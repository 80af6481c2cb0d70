"""How a rule is built: called first, of numbers that may be traced, by a class that checks itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import first_update, steps

import rk_optax
from rk_optax import LeastSquares

CURVATURE = np.array([1.0, 3.0], np.float32)


def quadratic(w, c=1.0):
    return c * 0.5 * jnp.sum(CURVATURE.astype(w.dtype) * w**2)


def residuals(w):
    return jnp.stack([w[0] - 1, 2 * (w[1] - 0.3 * w[0] ** 2)])


def loss_of(name):
    return LeastSquares(residuals) if name in ("trust_ratio", "search") else quadratic


@pytest.mark.parametrize(
    ("rate", "called"),
    [
        (rk_optax.dal, r"Dal\(max_learning_rate=...\)"),
        (rk_optax.descent_control, r"DescentControl\(\)"),
        (rk_optax.sgd_g2, r"SgdG2\(\)"),
        (rk_optax.trust_ratio_control, r"TrustRatioControl\(\)"),
        (rk_optax.path_control, r"PathControl\(\)"),
        (rk_optax.line_search, r"LineSearch\(\)"),
        (functools.partial(rk_optax.error_control, atol=1e-3), r"ErrorControl\(\)"),
    ],
)
def test_a_rule_that_was_not_called_is_refused_at_construction(rate, called):
    for make in (rk_optax.rk4, rk_optax.rkc):
        with pytest.raises(TypeError, match=f"learning_rate is .* itself, which makes a rule: call it, as in {called}"):
            make(quadratic, rate)
    with pytest.raises(TypeError, match="max_learning_rate is"):
        rk_optax.dal(rate)


def test_a_function_that_makes_a_rule_is_refused_when_it_is_called():
    tx = rk_optax.rk4(quadratic, lambda count: rk_optax.dal(1.0))
    with pytest.raises(TypeError, match=r"makes a rule \(Dal\): pass what it returns"):
        first_update(tx, quadratic, jnp.ones(2))


TRACED = {
    "dal": (rk_optax.heun, rk_optax.dal, {"max_learning_rate": 0.3, "power": 1.5}),
    "sgd_g2": (rk_optax.euler, rk_optax.sgd_g2, {"initial_learning_rate": 0.1, "decay": 0.8}),
    "error": (
        rk_optax.heun,
        rk_optax.error_control,
        {
            **{"rtol": 0.1, "atol": 0.1, "initial_step_size": 0.2, "pcoeff": 0.1, "icoeff": 0.8, "dcoeff": 0.1},
            **{"safety": 0.8, "factor_min": 0.3, "factor_max": 3.0, "min_step_size": 1e-3, "max_step_size": 5.0},
        },
    ),
    "descent": (
        rk_optax.heun,
        rk_optax.descent_control,
        {"initial_step_size": 0.1, "growth": 1.3, "shrinkage": 0.3, "min_step_size": 1e-3, "max_step_size": 5.0},
    ),
    "trust_ratio": (
        rk_optax.residual_euler,
        rk_optax.trust_ratio_control,
        {"initial_step_size": 0.1, "growth": 2.0, "min_step_size": 1e-3, "max_step_size": 5.0},
    ),
    "search": (rk_optax.residual_euler, rk_optax.line_search, {"step_size": 1e3}),
}


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("name", TRACED)
def test_every_number_of_a_rule_may_be_traced(name):
    make, rule, numbers = TRACED[name]
    loss = loss_of(name)

    def run(numbers):
        w, state = steps(make(loss, rule(**numbers)), loss, jnp.array([1.0, -2.0]), 2)
        return w, state.rule

    expected, traced = jax.jit(lambda: run(numbers))(), jax.jit(run)(numbers)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), expected, traced)


def test_what_is_static_says_so():
    with pytest.raises(ValueError, match="every is static: the program is compiled for it"):
        jax.jit(lambda every: rk_optax.dal(1.0, every=every).init())(2)


def test_classes_check_themselves_and_are_what_their_lower_case_names_are():
    assert rk_optax.dal is rk_optax.Dal
    assert rk_optax.descent_control is rk_optax.DescentControl
    assert rk_optax.precondition_by_adam is rk_optax.AdamPreconditioner
    assert rk_optax.dal(1.0) == rk_optax.Dal(1.0)
    assert rk_optax.dal(1.0, 2.0) != rk_optax.Dal(1.0)
    with pytest.raises(ValueError, match="form must be 'rescaled' or 'clipped', got 'nonsense'"):
        rk_optax.Dal(1.0, form="nonsense")
    with pytest.raises(TypeError, match="needs"):
        rk_optax.Dal(1.0, needs=frozenset())


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("estimate", ["product", "difference", "free"])
def test_the_cost_of_an_estimate_is_what_a_step_is_charged(estimate):
    rule = rk_optax.dal(0.1, estimate=estimate)
    _, state = first_update(rk_optax.heun(quadratic, rule), quadratic, jnp.ones(2))
    without = rk_optax.Cost(gradients=2)
    assert [int(n) for n in state.cost] == [a + b for a, b in zip(without, rule.cost_per_estimate, strict=True)]
