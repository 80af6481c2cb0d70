import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rk_optax
from rk_optax import TABLEAUS
from rk_optax.experiment.config import OptimizerConfig
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.optimizers import build_optimizer


def loss_fn(params, images, labels):
    return jnp.mean((images @ params - labels) ** 2)


DATA = {"images": jnp.array([[1.0, 2.0], [3.0, -1.0]]), "labels": jnp.array([0.5, 1.0])}


def build(factory, **options):
    return build_optimizer("optimizers.x", OptimizerConfig(factory, (0.1, 1.0), options))


def one_step(optimizer, learning_rate=0.01):
    params = jnp.array([0.3, -0.2])
    tx = optimizer.make(loss_fn, learning_rate)
    grads = jax.grad(loss_fn)(params, **DATA)
    return tx.update(grads, tx.init(params), params, **DATA)


@pytest.mark.parametrize("factory", ["sgd", "momentum", "adam", *TABLEAUS])
def test_all_are_called_alike_and_cost_what_they_say(factory):
    optimizer = build(factory)
    updates, state = one_step(optimizer)
    assert np.all(np.isfinite(updates))
    if factory in TABLEAUS:
        assert int(state.cost.gradients) == optimizer.gradients_per_step
    else:
        assert optimizer.gradients_per_step == 1


@pytest.mark.parametrize(
    ("factory", "reference"),
    [
        ("sgd", optax.sgd(0.01)),
        ("euler", optax.sgd(0.01)),
        ("momentum", optax.sgd(0.01, momentum=0.9)),
        ("adam", optax.adam(0.01)),
    ],
)
def test_agrees_with_optax(factory, reference):
    updates, _ = one_step(build(factory))
    params = jnp.array([0.3, -0.2])
    expected, _ = reference.update(jax.grad(loss_fn)(params, **DATA), reference.init(params), params)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_learning_rates_can_be_mapped_over():
    optimizer = build("rk4")
    rates = jnp.array([0.01, 0.1])
    mapped, _ = jax.vmap(lambda rate: one_step(optimizer, rate))(rates)
    for rate, updates in zip(rates, mapped, strict=True):
        np.testing.assert_allclose(updates, one_step(optimizer, float(rate))[0], rtol=1e-5)


def test_options_reach_the_factory():
    plain, _ = one_step(build("adam"))
    changed, _ = one_step(build("adam", b1=0.0, nesterov=True))
    assert jax.tree.structure(plain) == jax.tree.structure(changed)
    assert build("heun", momentum=0.5).make(loss_fn, 0.1).init(jnp.zeros(2)).after is not None


def test_unknown_factories_suggest_a_known_one():
    with pytest.raises(UsageError, match=r"optimizers\.x\.factory = 'adm' .* did you mean 'adam'"):
        build("adm")
    with pytest.raises(UsageError, match="neither of sgd, momentum, adam nor a solver listed by"):
        build("qqqqqqq")


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("adam", {"momentum": 0.9}, "momentum"),
        ("sgd", {"learning_rate": 0.9}, "learning_rate"),
        ("rk4", {"momentun": 0.9}, "momentun"),
        ("rk4", {"momentum": 1.5}, "momentum"),
    ],
)
def test_wrong_options_are_refused_before_training(factory, options, message):
    with pytest.raises(UsageError, match=rf"optimizers\.x\.options = .*{message}"):
        build(factory, **options)


DAL = {"estimate": "free"}


@pytest.mark.parametrize(
    ("fields", "direct"),
    [
        ({"preconditioner": "adagrad"}, lambda h: {"preconditioner": rk_optax.precondition_by_adagrad()}),
        ({"preconditioner": "rms"}, lambda h: {"preconditioner": rk_optax.precondition_by_rms()}),
        ({"preconditioner": "adam"}, lambda h: {"preconditioner": rk_optax.precondition_by_adam()}),
        ({"rule": "dal"}, lambda h: {"learning_rate": rk_optax.dal(h)}),
        ({"rule": "dal", "rule_options": DAL}, lambda h: {"learning_rate": rk_optax.dal(h, estimate="free")}),
        (
            {"stage_batches": "split"},
            lambda h: {"stage_batches": "split", "batch_argnames": ("images", "labels")},
        ),
    ],
)
def test_ingredients_are_those_of_the_library(fields, direct):
    optimizer = build_optimizer("optimizers.x", OptimizerConfig("heun", (0.1, 1.0), {"momentum": 0.5}, **fields))
    expected = rk_optax.heun(loss_fn, **{"learning_rate": 0.05, "momentum": 0.5, **direct(0.05)})
    params, plain = jnp.array([0.3, -0.2]), rk_optax.heun(loss_fn, 0.05, momentum=0.5)
    grads = jax.grad(loss_fn)(params, **optimizer.first_stage(DATA))
    updates, state = optimizer.make(loss_fn, 0.05).update(grads, expected.init(params), params, **DATA)
    np.testing.assert_allclose(updates, expected.update(grads, expected.init(params), params, **DATA)[0], rtol=1e-6)
    assert not np.allclose(updates, plain.update(grads, plain.init(params), params, **DATA)[0], rtol=1e-3)
    spent = int(state.cost.gradients) + 2 * int(state.cost.products)  # as the runner counts products
    assert optimizer.gradients_per_step == (1 if "stage_batches" in fields else spent)


@pytest.mark.parametrize(("estimate", "gradients"), [("free", 4), ("difference", 5), ("product", 6)])
def test_what_a_rule_costs_is_counted(estimate, gradients):
    config = OptimizerConfig("rk4", (0.1, 1.0), rule="dal", rule_options={"estimate": estimate})
    assert build_optimizer("optimizers.x", config).gradients_per_step == gradients


def test_the_first_stage_of_split_batches_sees_the_first_slice():
    optimizer = build_optimizer("optimizers.x", OptimizerConfig("heun", (0.1, 1.0), stage_batches="split"))
    seen = optimizer.first_stage(DATA)
    np.testing.assert_array_equal(seen["images"], DATA["images"][:1])
    np.testing.assert_array_equal(seen["labels"], DATA["labels"][:1])
    assert build("heun").first_stage(DATA) is DATA


@pytest.mark.parametrize(
    ("factory", "fields", "message"),
    [
        ("adam", {"preconditioner": "adagrad"}, r"preconditioner = 'adagrad' is for solvers, and adam is Optax's"),
        ("sgd", {"rule": "dal"}, r"rule = 'dal' is for solvers"),
        ("momentum", {"stage_batches": "split"}, r"stage_batches = 'split' is for solvers"),
        ("rk4", {"rule_options": DAL}, r"rule_options = .* is for a rule: set optimizers\.x\.rule to 'dal'"),
        ("rk4", {"rule": "dal", "rule_options": {"every": 2}}, r"rule_options = .* must leave out every"),
        ("rk4", {"rule": "dal", "rule_options": {"estimate": "freee"}}, r"rule_options = .* estimate must be"),
        ("rk4", {"rule": "dal", "rule_options": {"pover": 2.0}}, r"rule_options = .*pover"),
        ("rk4", {"rule": "dal", "stage_batches": "split"}, r"stage_batches = 'split' does not go with a rule"),
        ("euler", {"rule": "dal", "rule_options": DAL}, r"options = .* estimate='product' or 'difference'"),
    ],
)
def test_impossible_ingredients_are_refused_before_training(factory, fields, message):
    with pytest.raises(UsageError, match=rf"optimizers\.x\.{message}"):
        build_optimizer("optimizers.x", OptimizerConfig(factory, (0.1, 1.0), **fields))
