import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rk_optax
from rk_optax import TABLEAUS
from rk_optax.experiment.config import ModelConfig, OptimizerConfig
from rk_optax.experiment.entrants import OPTAX, SOLVERS, build_optimizer
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.tasks.supervised import probe_loss


def loss_fn(params, images, labels):
    return jnp.mean((images @ params - labels) ** 2)


DATA = {"images": jnp.array([[1.0, 2.0], [3.0, -1.0]]), "labels": jnp.array([0.5, 1.0])}


def build_from(config, loss=loss_fn):
    has_rate = config.learning_rates is not None
    return build_optimizer("optimizers.x", config, loss, has_rate=has_rate, sliced=("images", "labels"))


def build(factory, **options):
    return build_from(OptimizerConfig(factory, (0.1, 1.0), options=options))


def one_step(optimizer, learning_rate=0.01):
    params = jnp.array([0.3, -0.2])
    tx = optimizer.make(loss_fn, learning_rate, None)
    grads = jax.grad(loss_fn)(params, **DATA)
    return tx.update(grads, tx.init(params), params, **DATA)


@pytest.mark.covering(most=2)
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


@pytest.mark.slow
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
    assert build("heun", momentum=0.5).make(loss_fn, 0.1, None).init(jnp.zeros(2)).after is not None


def test_unknown_factories_suggest_a_known_one():
    with pytest.raises(UsageError, match=r"optimizers\.x\.factory = 'adm' .* did you mean 'adam'"):
        build("adm")
    with pytest.raises(UsageError, match=r"no optimizer of Optax, nor one that `rk-optax solvers` lists$"):
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


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("fields", "direct"),
    [
        ({"preconditioner": "adagrad"}, lambda h: {"preconditioner": rk_optax.precondition_by_adagrad()}),
        ({"preconditioner": "rms"}, lambda h: {"preconditioner": rk_optax.precondition_by_rms()}),
        ({"preconditioner": "adam"}, lambda h: {"preconditioner": rk_optax.precondition_by_adam()}),
        ({"rule": "dal"}, lambda h: {"learning_rate": rk_optax.dal(h)}),
        ({"rule": "dal", "rule_options": DAL}, lambda h: {"learning_rate": rk_optax.dal(h, estimate="free")}),
        ({"stage_batches": "split"}, lambda h: {"stage_batches": "split", "batch_argnames": ("images", "labels")}),
    ],
)
def test_ingredients_are_those_of_the_library(fields, direct):
    optimizer = build_from(OptimizerConfig("heun", (0.1, 1.0), options={"momentum": 0.5}, **fields))
    expected = rk_optax.heun(loss_fn, **{"learning_rate": 0.05, "momentum": 0.5, **direct(0.05)})
    params, plain = jnp.array([0.3, -0.2]), rk_optax.heun(loss_fn, 0.05, momentum=0.5)

    @jax.jit
    def first_updates(params):
        grads = jax.grad(loss_fn)(params, **optimizer.first_stage(DATA))
        own = optimizer.make(loss_fn, 0.05, None).update(grads, expected.init(params), params, **DATA)
        return own, *(tx.update(grads, tx.init(params), params, **DATA)[0] for tx in (expected, plain))

    (updates, state), same, other = first_updates(params)
    np.testing.assert_allclose(updates, same, rtol=1e-6)
    assert not np.allclose(updates, other, rtol=1e-3)
    spent = int(state.cost.gradients) + 2 * int(state.cost.products)  # as the runner counts products
    assert optimizer.gradients_per_step == (1 if "stage_batches" in fields else spent)


@pytest.mark.parametrize(
    "config",
    [OptimizerConfig("euler", (0.01, 0.1), rule="corridor"), OptimizerConfig("euler", rule="sharpness_capped")],
)
def test_rules_of_the_curvature_are_those_of_the_library(config):
    rate = 0.05 if config.learning_rates else None
    rule = rk_optax.corridor(0.05) if rate else rk_optax.sharpness_capped()
    params = jnp.array([0.3, -0.2])
    pair = build_from(config).make(loss_fn, rate, None), rk_optax.euler(loss_fn, rule)

    def first(tx):
        return jax.jit(lambda p: tx.update(jax.grad(loss_fn)(p, **DATA), tx.init(p), p, **DATA)[0])(params)

    np.testing.assert_array_equal(*map(first, pair))


@pytest.mark.parametrize(("estimate", "gradients"), [("free", 4), ("difference", 5), ("product", 6)])
def test_what_a_rule_costs_is_counted(estimate, gradients):
    config = OptimizerConfig("rk4", (0.1, 1.0), rule="dal", rule_options={"estimate": estimate})
    assert build_from(config).gradients_per_step == gradients
    every = dataclasses.replace(config, rule_options={"estimate": "product", "every": 2})
    assert build_from(every).gradients_per_step is None  # what differs from step to step is read from the state


def test_the_first_stage_of_split_batches_sees_the_first_slice():
    optimizer = build_from(OptimizerConfig("heun", (0.1, 1.0), stage_batches="split"))
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
        ("rk4", {"rule_options": DAL}, r"rule_options = .* is for a rule: set optimizers\.x\.rule, to 'dal' say"),
        ("rk4", {"rule": "descent_control"}, r"rule = 'descent_control' finds the step size: leave learning rates out"),
        ("rkc", {"stage_batches": "split"}, r"stage_batches = 'split' needs a fixed number of stages, which rkc"),
        ("rk4", {"rule": "dal", "rule_options": {"estimate": "freee"}}, r"rule_options = .* estimate must be"),
        ("rk4", {"rule": "dal", "rule_options": {"pover": 2.0}}, r"rule_options = .*pover"),
        ("rk4", {"rule": "dal", "stage_batches": "split"}, r"stage_batches = 'split' does not go with a rule"),
        ("euler", {"rule": "dal", "rule_options": DAL}, r"factory = 'euler': .* estimate='product' or 'difference'"),
    ],
)
def test_impossible_ingredients_are_refused_before_training(factory, fields, message):
    with pytest.raises(UsageError, match=rf"optimizers\.x\.{message}"):
        build_from(OptimizerConfig(factory, (0.1, 1.0), **fields))


STRUCTURED = rk_optax.LeastSquares(lambda params, images, labels: images @ params - labels, reduction="mean")
FIND_THEIR_OWN = ("rkc", "rkl", "rosenbrock_euler", "ros2", "residual_euler")
STIFF = (*FIND_THEIR_OWN, "backward_euler", "sdirk2", "gauss4", "etd1", "etdrk2")


def test_every_optimizer_of_both_libraries_is_known():
    for name in rk_optax.__all__:
        member = getattr(rk_optax, name)
        if inspect.isfunction(member) and [*inspect.signature(member).parameters][:2] == ["loss_fn", "learning_rate"]:
            assert (name in SOLVERS) != (name in ("runge_kutta", "scale_by_rk")), name
    assert {"rkc", "rkl", "rosenbrock_euler", "ros2", "residual_euler", "backward_euler", "etdrk2"} <= set(SOLVERS)
    assert {"sgd", "momentum", "nesterov", "adam", "adamw", "lion", "lbfgs", "adam_then_lbfgs"} <= set(OPTAX)
    assert not OPTAX.keys() & SOLVERS.keys()  # a name means one thing
    for name in OPTAX:
        if name not in ("adam_then_lbfgs", "noisy_sgd", "optimistic_adam"):  # they need more, or warn
            assert build(name)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("factory", STIFF)
def test_stiff_methods_count_the_work_of_every_step(factory):
    rates = None if factory in FIND_THEIR_OWN else (0.1, 1.0)
    optimizer = build_from(OptimizerConfig(factory, rates), STRUCTURED)
    assert optimizer.gradients_per_step is None
    params = jnp.array([0.3, -0.2])
    tx = optimizer.make(STRUCTURED, 0.1, None)
    before = tx.init(params)
    updates, after = jax.jit(tx.update)(jax.grad(STRUCTURED)(params, **DATA), before, params, **DATA)
    assert STRUCTURED(params + updates, **DATA) < STRUCTURED(params, **DATA)
    assert optimizer.cost(before, after, 1) == after.cost
    assert int(after.cost.gradients) >= 1


def test_lbfgs_counts_its_line_search():
    optimizer, params = build("lbfgs"), jnp.array([0.3, -0.2])
    tx = optimizer.make(loss_fn, 1.0, None)
    state = tx.init(params)
    calls = []

    def value_fn(params):
        jax.debug.callback(lambda: calls.append(1))
        return loss_fn(params, **DATA)

    value, grad = jax.value_and_grad(loss_fn)(params, **DATA)
    _, after = tx.update(grad, state, params, value=value, grad=grad, value_fn=value_fn, **DATA)
    jax.effects_barrier()
    assert int(optimizer.cost(state, after, 1).gradients) == len(calls) + 1
    assert int(optimizer.cost(state, after, 0).gradients) == len(calls)


@pytest.mark.parametrize(
    ("factory", "rates", "message"),
    [
        ("backward_euler", None, r"factory = 'backward_euler' needs a learning_rate"),
        ("adam", None, r"factory = 'adam' needs a learning_rate"),
        ("rosenbrock_euler", None, r"factory = 'rosenbrock_euler'.* 'gauss_newton'"),
        ("residual_euler", None, r"factory = 'residual_euler': .*LeastSquares.* Set model\.loss = 'squared_error'"),
    ],
)
def test_what_a_method_needs_is_said_before_training(factory, rates, message):
    network = probe_loss(ModelConfig())
    with pytest.raises(UsageError, match=rf"optimizers\.x\.{message}"):
        build_from(OptimizerConfig(factory, rates), network if factory == "residual_euler" else loss_fn)
