"""Nothing but units: scaling the loss, the parameters or a leaf that the loss does not see changes no step.

In float32, over every optimizer and every rule. h goes with the inverse of the loss, and so does what a rule measures.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rk_optax

POINTS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
TARGETS = np.linspace(-1, 1, 6).astype(np.float32)
START = np.array([0.5, -0.3, 0.8, 0.1], np.float32)
H = 0.1
SCALES = (1e-25, 1e-12, 1e12, 1e25)


def residuals(params, unit, length):
    return unit * (jnp.tanh(POINTS @ (params["w"] / length)) - TARGETS)


LOSS = rk_optax.LeastSquares(residuals)
OPTIMIZERS = {
    name: getattr(rk_optax, name)
    for name in ["euler", "heun", "midpoint", "ralston", "kutta3", "ssprk3", "bogacki_shampine", "rk4", "rk38", "dopri5", "tsit5", "dopri8", "rkc", "rkl", "rosenbrock_euler", "ros2", "residual_euler", "backward_euler", "implicit_midpoint", "trapezoid", "sdirk2", "sdirk3", "radau3", "gauss4", "etd1", "etdrk2"]
}
FOR_ALL_H = {"min_step_size": 1e-30, "max_step_size": 1e30}
# The rule for a first step size of h, which may be traced.
RULES = {
    "constant": lambda h: h,
    "dal": rk_optax.dal,
    "dal, difference": lambda h: rk_optax.dal(h, estimate="difference"),
    "dal, free": lambda h: rk_optax.dal(h, estimate="free"),
    "descent": lambda h: rk_optax.descent_control(**FOR_ALL_H),
    "error": lambda h: rk_optax.error_control(1e-2, 1e-30, **FOR_ALL_H),
    "trust": lambda h: rk_optax.trust_ratio_control(**FOR_ALL_H),
    "sgd_g2": lambda h: rk_optax.sgd_g2(),
}


def builds(optimizer, rule):
    try:
        OPTIMIZERS[optimizer](LOSS, RULES[rule](H))
    except ValueError:
        return False
    return True


# Each optimizer with a constant h and with a rule, each rule with an optimizer of each kind; the others are slow.
QUICK = {("rk4", rule) for rule in RULES} | {("rosenbrock_euler", "trust"), ("ros2", "error"), ("euler", "sgd_g2")}
QUICK |= {(optimizer, "descent") for optimizer in OPTIMIZERS}
COMBINATIONS = [
    pytest.param(*both, marks=[] if both in QUICK else pytest.mark.slow)
    for both in itertools.product(OPTIMIZERS, RULES)
    if builds(*both)
]


def three_updates(optimizer, rule):
    """A compiled function of the loss's scale, the parameters' scale and the size of a leaf that the loss ignores."""

    @jax.jit
    def run(c, length, inert):
        h = jnp.float32(H) / c * length * length
        data = {"unit": jnp.sqrt(c), "length": length}
        tx = OPTIMIZERS[optimizer](LOSS, RULES[rule](h))
        params = {"w": length * START, "inert": inert * jnp.ones(2)}
        state = tx.init(params)
        if "step_size" in getattr(state.rule, "_fields", ()):
            state = state._replace(rule=state.rule._replace(step_size=h))

        def update(carry, _):
            params, state = carry
            change, state = tx.update(jax.grad(LOSS)(params, **data), state, params, **data)
            params = jax.tree.map(jnp.add, params, change)
            return (params, state), (change["w"] / length, change["inert"], state.accepted)

        return jax.lax.scan(update, (params, state), length=3)[1]

    return run


@pytest.mark.parametrize(("optimizer", "rule"), COMBINATIONS)
def test_units_and_inert_leaves_change_no_step(optimizer, rule):
    run = three_updates(optimizer, rule)
    expected, _, accepted = run(1.0, 1.0, 1.0)
    assert np.abs(expected[0]).max() > 1e-3
    cases = [(c, 1.0, 1.0) for c in SCALES]
    cases += [(1.0, length, length) for length in (1e-12, 1e12)]
    cases += [(1.0, 1.0, inert) for inert in (1e-20, 1e20)]
    wrong = []
    for case in cases:
        found, inert, taken = run(*case)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        if not (error < 1e-4 and np.all(taken == accepted) and not np.any(inert)):
            wrong.append((case, float(error), taken))
    assert not wrong, wrong
