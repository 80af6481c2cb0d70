"""What docs/extend.md makes, a solver, a rule and a preconditioner of one's own, goes through every wrapper."""

import functools
import pathlib
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rk_optax
from rk_optax.field import Capability
from rk_optax.solver import Quantity

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "extend.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page():
    """The names of the page, once all of its blocks and the assertions in them have run."""
    names = {"__name__": "__main__"}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


@pytest.mark.slow
def test_each_extension_of_the_page_is_short(page):
    assert len(BLOCKS) >= 6
    assert max(len(block.splitlines()) for block in BLOCKS) <= 25


@pytest.mark.parametrize(("column", "kind"), [("needs", Capability), ("offers", Quantity)])
def test_the_tables_have_all_that_can_be_needed_and_offered(column, kind):
    table = PAGE.read_text(encoding="utf-8").split(f"\n| `{column}` |")[1].split("\n\n")[0]
    assert set(re.findall(r'^\| `"(\w+)"` \|', table, re.MULTILINE)) == set(typing.get_args(kind))


def loss_fn(params, x):
    return 0.5 * jnp.mean(jnp.sum(x * (params["w"] - params["b"]) ** 2, axis=-1)) + 0.1 * jnp.sum(params["b"] ** 2)


PARAMS = {"w": jnp.array([1.0, -1.0]), "b": jnp.array([0.2, 0.1])}
X = jnp.array([[1.0, 4.0], [2.0, 3.0]])


def with_aux(params, x):
    return loss_fn(params, x), x


WRAPPERS = {
    "bare": {},
    "momentum": {"momentum": 0.5, "nesterov": True},
    "after": {"after": optax.scale_by_adam()},
    "decays": {"weight_decay": 1e-3, "l2": 1e-3},
    "mask": {"mask": {"w": True, "b": False}},
    "aux": {"has_aux": True},
    "split": {"stage_batches": "split", "batch_argnames": ["x"]},
    "stage 1 again": {"reuse_updates": False},
}


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("options", WRAPPERS.values(), ids=WRAPPERS)
def test_all_three_together_go_through_every_option(page, options):
    loss = with_aux if "has_aux" in options else loss_fn
    optimizer = rk_optax.runge_kutta(
        loss, page["Polyak"](largest=0.1), page["Extragradient"](), preconditioner=page["BySize"](), **options
    )
    check(optimizer, split="stage_batches" in options)


def chained(solver, rule, preconditioner):
    del rule  # an adaptive h cannot reach what comes after
    return optax.chain(
        rk_optax.scale_by_rk(loss_fn, 0.1, solver, preconditioner=preconditioner), optax.scale_by_learning_rate(0.1)
    )


def injected(solver, rule, preconditioner):
    make = functools.partial(rk_optax.runge_kutta, loss_fn, rule, solver, preconditioner=preconditioner)
    return rk_optax.inject_hyperparams(make)(weight_decay=1e-3)


def guarded(solver, rule, preconditioner):
    inner = rk_optax.runge_kutta(loss_fn, rule, solver, preconditioner=preconditioner)
    return optax.apply_if_finite(inner, max_consecutive_errors=3)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("wrap", [chained, injected, guarded])
def test_all_three_together_go_through_wrappers_of_optax(page, wrap):
    check(wrap(page["Extragradient"](), page["Polyak"](largest=0.1), page["BySize"]()))


def test_those_with_a_state_go_together(page):
    tx = rk_optax.runge_kutta(
        loss_fn, page["Armijo"](first=0.1), page["AdamsBashforth"](), momentum=0.5, mask={"w": True, "b": False}
    )
    check(tx)


def check(tx, split=False):
    """Two steps in a scan lower the loss, types stay, and a vmap of runs is the runs."""

    def run(params):
        def step(carry, _):
            params, state = carry
            data = {"x": X}
            if split:
                data = rk_optax.first_stage_batch(data, 2, "split", ["x"])
            updates, state = tx.update(jax.grad(loss_fn)(params, **data), state, params, x=X)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=2)[0][0]

    other = jax.tree.map(lambda p: -2 * p, PARAMS)
    together = jax.jit(jax.vmap(run))(jax.tree.map(lambda *p: jnp.stack(p), PARAMS, other))
    ends = jax.tree.map(lambda leaf: leaf[0], together)
    assert loss_fn(ends, X) < loss_fn(PARAMS, X)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ends, jax.jit(run)(PARAMS))
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(run, low))} == {jnp.dtype(jnp.bfloat16)}
