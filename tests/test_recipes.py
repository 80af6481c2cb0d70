"""The recipes of the site, run as they stand; those for Equinox modules and plain pytrees with dropout besides."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rk_optax

pytestmark = pytest.mark.latest

H = 0.3


def make_data(dtype=np.float64):
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(16, 3)), dtype), jnp.asarray(rng.normal(size=(16, 2)), dtype)
    return {"x": x, "y": y, "key": jax.random.key(1)}


def textbook(gradient, params, steps):
    """Classical Runge-Kutta steps downhill, by hand."""
    gradient = jax.jit(gradient)
    for _ in range(steps):
        k = total = jax.tree.map(jnp.zeros_like, params)
        for fraction, weight in zip([0.0, 0.5, 0.5, 1.0], [1 / 6, 1 / 3, 1 / 3, 1 / 6], strict=True):
            k = gradient(jax.tree.map(lambda p, k, c=fraction: p - c * H * k, params, k))
            total = jax.tree.map(lambda t, k, w=weight: t + w * k, total, k)
        params = jax.tree.map(lambda p, t: p - H * t, params, total)
    return params


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-10, 1e-12), actual, expected)


# --- Equinox ---------------------------------------------------------------------------------------------------------


class Net(eqx.Module):
    inner: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    outer: eqx.nn.Linear
    activation: Callable  # neither an array nor static: what eqx.partition is for

    def __init__(self, key, dtype):
        key, another = jax.random.split(key)
        self.inner = eqx.nn.Linear(3, 8, dtype=dtype, key=key)
        self.norm = eqx.nn.BatchNorm(8, "batch", dtype=dtype, mode="batch")
        self.dropout, self.activation = eqx.nn.Dropout(0.5), jnp.tanh
        self.outer = eqx.nn.Linear(8, 2, dtype=dtype, key=another)

    def __call__(self, x, model_state, key):
        hidden, model_state = self.norm(self.inner(x), model_state)
        return self.outer(self.dropout(self.activation(hidden), key=key)), model_state


def module_loss(params, static, model_state, x, y, key):
    model = eqx.combine(params, static)
    forward = jax.vmap(model, in_axes=(0, None, 0), out_axes=(0, None), axis_name="batch")
    predicted, model_state = forward(x, model_state, jax.random.split(key, len(x)))
    return jnp.mean((predicted - y) ** 2), model_state


def make_module_step(tx, loss_fn=module_loss):
    @eqx.filter_jit
    def step(model, model_state, opt_state, x, y, key):
        params, static = eqx.partition(model, eqx.is_inexact_array)
        data = {"static": static, "model_state": model_state, "x": x, "y": y, "key": key}
        (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, **data)
        updates, opt_state = tx.update(grads, opt_state, params, **data)
        return eqx.apply_updates(model, updates), model_state, opt_state, loss

    return step


@pytest.mark.slow
def test_an_equinox_module_with_dropout_and_batch_norm_steps_as_the_textbook_does(x64):
    data = make_data()
    model, model_state = eqx.nn.make_with_state(Net)(jax.random.key(0), jnp.float64)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    fixed = {"static": static, "model_state": model_state, **data}
    expected = textbook(lambda p: jax.grad(module_loss, has_aux=True)(p, **fixed)[0], params, 3)

    tx = rk_optax.rk4(module_loss, H, has_aux=True)
    opt_state, step = tx.init(eqx.filter(model, eqx.is_inexact_array)), make_module_step(tx)
    for _ in range(3):
        model, model_state, opt_state, _ = step(model, model_state, opt_state, **data)
    assert_close(eqx.filter(model, eqx.is_inexact_array), expected)
    assert model.activation is jnp.tanh
    assert opt_state.cost.gradients == 12


def test_the_statistics_of_an_equinox_module_move_once_per_step(x64):
    data = make_data()
    model, model_state = eqx.nn.make_with_state(Net)(jax.random.key(0), jnp.float64)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    _, once = jax.jit(lambda state: module_loss(params, static, state, **data))(model_state)

    tx = rk_optax.rk4(module_loss, H, has_aux=True)
    _, moved, _, _ = make_module_step(tx)(model, model_state, tx.init(params), **data)
    assert_close(jax.tree.leaves(moved), jax.tree.leaves(once))
    changes = [jnp.max(jnp.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (moved, model_state)), strict=True)]
    assert max(changes) > 1e-3


@pytest.mark.slow
def test_a_step_of_an_equinox_module_traces_the_loss_twice_and_never_again():
    traces = []

    def traced(params, static, model_state, x, y, key):
        traces.append(1)
        return module_loss(params, static, model_state, x, y, key)

    data = make_data(np.float32)
    model, model_state = eqx.nn.make_with_state(Net)(jax.random.key(0), jnp.float32)
    tx = rk_optax.rk4(traced, 0.1, has_aux=True)
    opt_state, step = tx.init(eqx.filter(model, eqx.is_inexact_array)), make_module_step(tx, traced)
    for i in range(200):
        data["key"] = jax.random.key(i)
        model, model_state, opt_state, _ = step(model, model_state, opt_state, **data)
    assert len(traces) == 2


# --- Plain pytrees ---------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    weight: jax.Array
    bias: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layers:
    inner: Layer
    outer: Layer


def make_tree(container):
    rng = np.random.default_rng(2)
    inner = Layer(jnp.asarray(rng.normal(size=(3, 8))), jnp.asarray(rng.normal(size=8)))
    outer = Layer(jnp.asarray(rng.normal(size=(8, 2))), None)
    trees = {"dataclass": Layers(inner, outer), "dict": {"inner": inner, "outer": outer}, "list": [inner, outer]}
    return trees[container]


def tree_loss(params, x, y, key):
    leaves = jax.tree.leaves(params)  # inner weight, inner bias, outer weight
    hidden = jnp.tanh(x @ leaves[0] + leaves[1])
    hidden = jnp.where(jax.random.bernoulli(key, 0.5, hidden.shape), 2 * hidden, 0.0)
    return jnp.mean((hidden @ leaves[2] - y) ** 2)


@pytest.mark.parametrize("container", ["dataclass", "dict", "list"])
def test_any_pytree_with_a_dropout_key_steps_as_the_textbook_does(container, x64):
    data, params = make_data(), make_tree(container)
    expected = textbook(lambda p: jax.grad(tree_loss)(p, **data), params, 3)
    tx = rk_optax.rk4(tree_loss, H)
    traces = []

    @jax.jit
    def step(params, opt_state, data):
        traces.append(1)
        loss, grads = jax.value_and_grad(tree_loss)(params, **data)
        updates, opt_state = tx.update(grads, opt_state, params, **data)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    for _ in range(3):
        params, opt_state, _ = step(params, opt_state, data)
    assert_close(params, expected)
    assert len(traces) == 1


# --- The pages, and what the physics-informed networks have learnt ----------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page of physics leaves behind, all blocks of it and of the other recipes run in order."""
    return [names_of(name, tmp_path_factory) for name in ("recipes.md", "physics.md")][-1]


def names_of(name, tmp_path_factory):
    text = (Path(__file__).parents[1] / "docs" / name).read_text(encoding="utf-8")
    names = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("recipes"))
        for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
            exec(compile(block, name, "exec"), names)
    return names


def numpy_network(params, x):
    *hidden, (w, b) = jax.tree.map(lambda leaf: np.asarray(leaf, float), params)
    for v, c in hidden:
        x = np.tanh(x @ v + c)
    return x @ w + b


@pytest.mark.slow
def test_stopping_on_what_was_kept_back_finds_the_coefficient_that_the_noise_hides(page):
    x = np.linspace(0, 1, 101)
    errors = {}
    for name in ("stopped", "params"):
        curve = numpy_network(page[name]["network"], x[:, None])[:, 0]
        errors[name] = np.sqrt(np.mean((curve - np.sin(np.pi * x)) ** 2)), abs(float(page["kappa"]) - 0.3)
    errors["params"] = errors["params"][0], abs(float(page["without_stopping"]) - 0.3)
    assert errors["stopped"][0] < 0.9 * errors["params"][0]
    assert errors["stopped"][1] < 0.5 * errors["params"][1]
    # The solution is one sine, (0.3/kappa) sin(pi x): what all forty values say about kappa, and how well.
    sine, values = np.sin(np.pi * np.asarray(page["t"], float)), np.asarray(page["u"], float)
    best, spread = 0.3 * (sine @ sine) / (sine @ values), 0.3 * 0.2 / np.sqrt(sine @ sine)
    assert abs(float(page["kappa"]) - best) < 3 * spread


@pytest.mark.slow
def test_boundary_values_by_construction_are_exact_and_the_rest_is_the_solution(page):
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 21)] * 2), axis=-1).reshape(-1, 2)
    x, y = grid.T
    wave = np.exp(x) * np.sin(np.pi * y)
    load = wave * ((1 - 2 * np.pi**2) * np.sin(np.pi * x) + 2 * np.pi * np.cos(np.pi * x))
    points = jnp.asarray(grid, jnp.float32)
    np.testing.assert_allclose(jax.vmap(page["load"])(points), load, atol=1e-3)
    found = np.asarray(jax.vmap(page["height"], (None, 0))(page["membrane"], points))
    edge = (x == 0) | (x == 1) | (y == 0) | (y == 1)
    np.testing.assert_array_equal(found[edge], (points[:, 0] * points[:, 1])[edge])
    expected = x * y + wave * np.sin(np.pi * x)
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.slow
def test_a_network_with_three_outputs_flows_as_kovasznay_says(page):
    x, y = np.meshgrid(np.linspace(-0.5, 1, 21), np.linspace(-0.5, 1.5, 21))
    decay = 20 - np.sqrt(400 + 4 * np.pi**2)
    wake, angle = np.exp(decay * x), 2 * np.pi * y
    expected = 1 - wake * np.cos(angle), decay / (2 * np.pi) * wake * np.sin(angle), (1 - wake**2) / 2

    def flow(x, y):
        return np.moveaxis(numpy_network(page["stream"], np.stack([x, y], axis=-1)), -1, 0)

    for field, exact in zip(flow(x, y), expected, strict=True):
        assert np.linalg.norm(field - exact) < 1e-2 * np.linalg.norm(exact)
    small = 1e-4
    mass = (flow(x + small, y) - flow(x - small, y))[0] + (flow(x, y + small) - flow(x, y - small))[1]
    assert np.sqrt(np.mean((mass / (2 * small)) ** 2)) < 1e-2
