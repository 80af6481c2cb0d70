"""What a solver, a rule or a preconditioner of one's own returns: a mistake is named, with the method that made it."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import rk_optax
from rk_optax import Cost, Proposal, Step, Verdict

PARAMS = {"w": jnp.ones(2)}
SPENT = Cost(gradients=1)


def loss_fn(params):
    return jnp.sum(params["w"] ** 2)


def made(base, **members):
    return dataclasses.dataclass(frozen=True)(type("Mine", (base,), members))()


def state_like_params(self, params):
    return jax.tree.map(jnp.zeros_like, params)


def solver(step, **members):
    return made(
        rk_optax.Solver,
        step=lambda self, field, params, k1, h, state, *, wants=frozenset(): step(k1, state),
        **members,
    )


def rule(propose=lambda state: Proposal(0.1, state), **members):
    return made(rk_optax.StepSizeRule, propose=lambda self, count, state, field, params, k1: propose(state), **members)


def judge(verdict):
    return rule(judge=lambda self, state, attempt: verdict(state), init=state_like_params)


def scaling(update, **members):
    return made(
        rk_optax.DiagonalPreconditioner,
        update=lambda self, gradient, state, params, field: update(gradient, state),
        **members,
    )


def after_two_steps(solver="heun", rule=0.1, preconditioner=None, params=PARAMS):
    """The types of the state after a compiled loop, whose program is made and not compiled."""
    tx = rk_optax.runge_kutta(loss_fn, rule, solver, preconditioner=preconditioner)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.eval_shape(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=2)[0], params)[1]


ALIGNED = frozenset({"alignment"})
MISTAKES = {
    "a direction alone": (
        {"solver": solver(lambda k1, state: k1)},
        r"Mine\.step must return a rk_optax\.Step\(direction, cost, state=state\), got dict",
    ),
    "a cost that is a number": (
        {"solver": solver(lambda k1, state: Step(k1, 1))},
        r"The cost that Mine\.step returns must be a rk_optax\.Cost, got int",
    ),
    "a cost that is no count": (
        {"solver": solver(lambda k1, state: Step(k1, Cost(gradients=1.5)))},
        r"The cost that Mine\.step returns counts gradients: an integer scalar, got 1\.5",
    ),
    "a direction of another structure": (
        {"solver": solver(lambda k1, state: Step(k1["w"], SPENT))},
        r"The direction that Mine\.step returns must have the tree structure of k1",
    ),
    "a direction that would be broadcast": (
        {"solver": solver(lambda k1, state: Step({"w": k1["w"].sum()}, SPENT))},
        r"The direction that Mine\.step returns must have the leaf shapes .* at k1\['w'\] got \(\), expected \(2,\)",
    ),
    "a state that is forgotten": (
        {"solver": solver(lambda k1, state: Step(k1, SPENT), init=state_like_params)},
        r"The state that Mine\.step returns must have the tree structure of the state that init made",
    ),
    "a state of another shape": (
        {"solver": solver(lambda k1, state: Step(k1, SPENT, state={"w": jnp.ones(3)}), init=state_like_params)},
        r"The state that Mine\.step returns must have the leaf shapes .*\['w'\] got \(3,\), expected \(2,\)",
    ),
    "a state that would be truncated": (
        {"solver": solver(lambda k1, state: Step(k1, SPENT, state=0.5), init=lambda self, params: 0)},
        r"The state that Mine\.step returns has float32 at state, where init has int32, which would truncate it",
    ),
    "a state of a refused step": (
        {"solver": solver(lambda k1, state: Step(k1, SPENT, state=state, refused_state=k1))},
        r"The state that Mine\.step \(refused_state\) returns must have the tree structure",
    ),
    "a quantity that is offered and not returned": (
        {
            "solver": solver(lambda k1, state: Step(k1, SPENT), offers=ALIGNED),
            "rule": rule(wants=ALIGNED),
        },
        r"Mine\.step was asked for the quantity 'alignment', which Mine offers, and returns .* with nothing in it",
    ),
    "a quantity that is not offered": (
        {"rule": rule(wants=ALIGNED)},
        r"Mine needs the quantity 'alignment', which the tableau 'heun' does not offer",
    ),
    "a need that no field has": (
        {"solver": solver(lambda k1, state: Step(k1, SPENT), needs=frozenset({"hessian"}))},
        r"needs has 'hessian', which no field has; there are loss, product, ",
    ),
    "a string of needs": (
        {"solver": solver(lambda k1, state: Step(k1, SPENT), needs="loss")},
        r"needs of Mine must be a frozenset of names, such as frozenset\({'loss'}\), got 'loss'",
    ),
    "a string of wants": ({"rule": rule(wants="error")}, r"Mine: wants must be a frozenset of names, .* got 'error'"),
    "a step size alone": (
        {"rule": rule(lambda state: 0.1)},
        r"Mine\.propose must return a rk_optax\.Proposal\(step_size, state\), got float",
    ),
    "step sizes by coordinate": (
        {"rule": rule(lambda state: Proposal(jnp.ones(2), state))},
        r"The step size that Mine\.propose returns must be a scalar, got shape \(2,\)",
    ),
    "a step size chosen alone": (
        {"rule": rule(choose=lambda self, state, field, params, k1, h, step: (h, step))},
        r"Mine\.choose must return a rk_optax\.Choice\(step_size, step, state\), got tuple",
    ),
    "a proposal without the state": (
        {"rule": rule(lambda state: Proposal(0.1, ()), init=state_like_params)},
        r"The state that Mine\.propose returns must have the tree structure",
    ),
    "a verdict that is a bool": (
        {"rule": judge(lambda state: True)},
        r"Mine\.judge must return a rk_optax\.Verdict\(accepted, reason, state\), got bool",
    ),
    "a reason of one's own": (
        {"rule": judge(lambda state: Verdict(False, 42, state))},
        r"The reason that Mine\.judge returns must be one of rk_optax\.Reason, got 42",
    ),
    "a verdict without the state": (
        {"rule": judge(lambda state: Verdict(True, 0, ()))},
        r"The state that Mine\.judge returns must have the tree structure",
    ),
    "verdicts by coordinate": (
        {"rule": judge(lambda state: Verdict(state["w"] >= 0, 0, state))},
        r"What Mine\.judge returns as accepted must be a scalar, got shape \(2,\)",
    ),
    "a diagonal alone": (
        {"preconditioner": scaling(lambda gradient, state: gradient)},
        r"Mine\.update must return \(frozen, state, cost\), got {'w'",
    ),
    "a diagonal that would be broadcast": (
        {"preconditioner": scaling(lambda gradient, state: ({"w": jnp.ones(())}, state, Cost()))},
        r"The diagonal of Mine must have the leaf shapes of params: at params\['w'\] got \(\), expected \(2,\)",
    ),
    "a scale without the state": (
        {"preconditioner": scaling(lambda gradient, state: (gradient, (), Cost()), init=state_like_params)},
        r"The state that Mine\.update returns must have the tree structure",
    ),
}


@pytest.mark.parametrize(("parts", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(parts, message):
    with pytest.raises((TypeError, ValueError), match=message):
        after_two_steps(**parts)


def test_the_same_checks_hold_for_a_flow():
    mine = solver(lambda k1, state: Step(k1, SPENT), init=state_like_params)
    with pytest.raises(ValueError, match=r"The state that Mine\.step returns must have the tree structure"):
        rk_optax.gradient_flow(loss_fn, PARAMS, (0.0, 1.0), solver=mine, step_size=0.1)


def test_a_quantity_of_ones_own_name_reaches_the_rule_that_wants_it():
    mine = solver(lambda k1, state: Step(k1, SPENT, quantities={"alignment": jnp.float32(-1)}), offers=ALIGNED)

    def aligned(self, state, attempt):
        return Verdict(attempt.step.quantities["alignment"] > 0, rk_optax.Reason.NOT_DOWNHILL, state)

    tx = rk_optax.runge_kutta(loss_fn, rule(wants=ALIGNED, judge=aligned), mine)
    _, state = jax.jit(tx.update)(jax.grad(loss_fn)(PARAMS), tx.init(PARAMS), PARAMS)
    assert rk_optax.Reason(int(state.reason)) is rk_optax.Reason.NOT_DOWNHILL


def test_the_state_keeps_the_dtypes_of_init_where_the_stages_are_wider():
    half = {"w": jnp.ones(2, jnp.bfloat16)}
    last_field = {
        "solver": solver(lambda k1, state: Step(k1, SPENT, state=k1), init=state_like_params),
        "rule": rule(lambda state: Proposal(0.1, {"w": jnp.ones(2)}), init=state_like_params),
        "preconditioner": scaling(lambda gradient, state: (gradient, gradient, Cost()), init=state_like_params),
    }
    state = after_two_steps(**last_field, params=half)
    for kept in (state.solver, state.rule, state.preconditioner):
        assert kept["w"].dtype == jnp.bfloat16


def test_a_typed_key_passes_as_it_is():
    drawn = solver(
        lambda k1, state: Step(k1, SPENT, state=jax.random.split(state)[0]), init=lambda self, params: jax.random.key(0)
    )
    assert jnp.issubdtype(after_two_steps(drawn).solver.dtype, jax.dtypes.prng_key)
