"""Every kind of solver on several devices, data or parameters split, is the step of one device."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from training import needs_explicit_axes

import rk_optax

pytestmark = needs_explicit_axes
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(4, 8)).astype(np.float32), "v": RNG.normal(size=(8,)).astype(np.float32)}
DATA = {"x": RNG.normal(size=(8, 4)).astype(np.float32), "y": np.linspace(-1, 1, 8, dtype=np.float32)}
SOLVERS = {
    "rk4": "rk4",
    "rkc": rk_optax.Stabilized("rkc1"),
    "rosenbrock_euler": rk_optax.RosenbrockEuler("gauss_newton"),
    "ros2": rk_optax.Ros2("hessian"),
    "residual_euler": rk_optax.ResidualEuler(),
    "sdirk3": "sdirk3",
    "backward_euler": "backward_euler",
    "gauss4": "gauss4",
    "etdrk2": rk_optax.Etd(2),
    "rkl": rk_optax.Stabilized("rkl2"),
    "diagonal": rk_optax.RosenbrockEuler("diagonal"),
    "secant": rk_optax.RosenbrockEuler("secant"),
    "limited secant": rk_optax.RosenbrockEuler("limited_secant"),
    "gmres": rk_optax.RosenbrockEuler("hessian", linear_solver=rk_optax.Gmres()),
    "products": rk_optax.ResidualEuler(max_rows=1),
}
QUICK = {("explicit", "parameters", name) for name in ("rkc", "residual_euler")}
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in (
        (axes, split, name) for axes in ("explicit", "auto") for split in ("data", "parameters") for name in SOLVERS
    )
]


def model(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def step(solver, gather=lambda params: params):
    loss = rk_optax.LeastSquares(lambda params, x, y: model(gather(params), x) - y, reduction="mean")
    tx = rk_optax.runge_kutta(loss, 0.5, solver)
    return jax.jit(lambda params, data: tx.update(jax.grad(loss)(params, **data), tx.init(params), params, **data))


@functools.cache
def step_of_one_device(name):
    return step(SOLVERS[name])(jax.tree.map(jnp.asarray, PARAMS), DATA)[0]


@pytest.mark.parametrize(("axes", "split", "name"), CASES)
def test_a_step_on_a_mesh_is_the_step_of_one_device(axes, split, name):
    expected = step_of_one_device(name)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit if axes == "explicit" else AxisType.Auto,))

    def gather(params):  # with explicit axes a model of split parameters says where they come together
        return (
            jax.tree.map(lambda p: jax.sharding.reshard(p, PartitionSpec()), params) if axes == "explicit" else params
        )

    with jax.set_mesh(mesh):
        along, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
        params = jax.device_put(PARAMS, along if split == "parameters" else whole)
        updates, state = step(SOLVERS[name], gather)(params, jax.device_put(DATA, along))
    assert bool(state.accepted)
    for key, update in updates.items():
        np.testing.assert_allclose(update, expected[key], rtol=1e-4, atol=1e-6)
        if axes == "explicit":
            assert update.sharding.is_equivalent_to(params[key].sharding, update.ndim)


def at_point(params, x, y):
    return {"value": model(params, x[None])[0] - y, "slope": jax.grad(lambda x: model(params, x[None])[0])(x)[:2]}


def terms(weights, number):
    """Residuals of two kinds of points and one of none: 8·3 + 8 + 8 = 40, or with fewer terms 24, beside 40 weights."""
    functions = {
        "equation": at_point,
        "edge": lambda params, edge: model(params, edge[None])[0],
        "anchor": lambda params: params["v"],
    }
    kept = {name: functions[name] for name in list(functions)[:number]}
    given = {"equation": {"value": weights, "slope": 0.5}, "edge": 2.0, "anchor": 3.0}
    pointwise = ["x", "y", "edge"][: number + 1]
    return rk_optax.LeastSquares(kept, weights={k: given[k] for k in kept}, pointwise=pointwise, reduction="mean")


RULES = {
    "trust": rk_optax.trust_ratio_control(initial_step_size=30.0),
    "path": rk_optax.path_control(probes=3, corrections=1),
}
POINTS = [
    pytest.param(*case, marks=[] if case == ("explicit", 3, "trust") else pytest.mark.slow)
    for case in ((a, n, r) for a in ("explicit", "auto") for n in (1, 3) for r in RULES)
]


WEIGHTS = np.r_[0.0, np.linspace(0.5, 2, 7)]


def two_updates(number, rule):
    """`two(weights, params, data)`: the loss before the second of two updates, and parameters and state after it."""

    @jax.jit
    def update(weights, params, state, data):
        tx = rk_optax.residual_euler(terms(weights, number), RULES[rule], l2=0.1)
        state = tx.init(params) if state is None else state
        value, updates, state = tx.value_and_update(state, params, **data)
        return value, jax.tree.map(jnp.add, params, updates), state

    def two(weights, params, data):
        _, params, state = update(weights, params, None, data)
        return update(weights, params, state, data)

    return two


@functools.cache
def two_updates_of_one_device(number, rule):
    params, data = jax.tree.map(jnp.float64, (PARAMS, DATA | {"edge": -DATA["x"]}))
    return two_updates(number, rule)(jnp.asarray(WEIGHTS), params, data)


@pytest.mark.parametrize(("axes", "number", "rule"), POINTS)
def test_least_squares_with_points_on_eight_devices_is_that_of_one(axes, number, rule, x64):
    """Fewer residuals (24) than weights (40) and as many; weights of points, an l2 term, two steps."""
    params, data = jax.tree.map(jnp.float64, (PARAMS, DATA | {"edge": -DATA["x"]}))
    value, expected, state = two_updates_of_one_device(number, rule)
    assert bool(state.accepted)
    assert int(state.solver.form) == (0 if number == 1 else 1)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit if axes == "explicit" else AxisType.Auto,))
    with jax.set_mesh(mesh):
        along, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
        placed = jax.device_put(jnp.asarray(WEIGHTS), along), jax.device_put(params, whole), jax.device_put(data, along)
        split_value, found, split_state = two_updates(number, rule)(*placed)
    assert float(split_value) == pytest.approx(float(value), rel=1e-9)
    assert float(split_state.step_size) == pytest.approx(float(state.step_size), rel=1e-6)
    for key, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[key], rtol=1e-6, atol=1e-9)


def exchanged(program):
    """What devices send each other: the shapes of what is summed, and the largest of what is moved, in numbers."""
    operations = re.findall(r" = (.*?) (all-\w+|collective-\w+|reduce-scatter)\(", program)
    shapes = [
        (kind, tuple(map(int, filter(None, shape.split(",")))))
        for result, kind in operations
        for shape in re.findall(r"\w\d+\[([\d,]*)\]", result)
    ]
    moved = [math.prod(shape) for kind, shape in shapes if kind != "all-reduce"]
    return [shape for kind, shape in shapes if kind == "all-reduce"], max(moved)


@pytest.mark.parametrize(
    ("axes", "number", "context"),
    [("explicit", 1, True), ("explicit", 3, False), ("auto", 1, False), ("auto", 3, True)],
)
def test_the_rows_stay_on_the_devices_of_their_points(axes, number, context):
    """Of 40 weights, and of 24 residuals or 40 of three functions: one sum over devices of the smaller matrix."""
    params, data = jax.tree.map(jnp.asarray, (PARAMS, DATA | {"edge": -DATA["x"]}))
    weights = jnp.asarray(WEIGHTS, np.float32)
    scale, y = jnp.linspace(0.5, 2, 40), jnp.linspace(-1, 1, 24 if number == 1 else 40)

    def products(weights, params, data, scale, y):
        rows = terms(weights, number).rows(params, data)
        gram = rows.gram("residuals" if number == 1 else "parameters", scale, 2.0)
        return jnp.tril(gram), rows.rmv(jnp.stack([y, rows.residual])), rows.mv(scale), rows.magnitude()

    expected = jax.jit(products)(weights, params, data, scale, y)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit if axes == "explicit" else AxisType.Auto,))
    along, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    args = jax.device_put((weights, params, data, scale, y), (along, whole, along, whole, whole))
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        program = jax.jit(products).lower(*args).compile()
        found = program(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    summed, moved = exchanged(program.as_text())
    assert summed.count((len(y), len(y))) == 1
    assert sum(map(math.prod, summed)) < 2 * len(y) ** 2
    assert moved <= 2 * len(y)  # vectors, and pieces of the rows with an eighth of the columns


@pytest.mark.parametrize("kind", ["loss", "residuals"])
def test_under_shard_map_the_mean_is_in_the_loss_or_in_the_size_of_the_residuals(kind):
    """With `check_vma=True` JAX adds up gradients and products of parameters that all devices share."""
    solver, rows = rk_optax.RosenbrockEuler("gauss_newton", tolerance=1e-6), len(DATA["y"])
    whole = rk_optax.LeastSquares(lambda params, x, y: model(params, x) - y, reduction="mean")
    if kind == "loss":
        loss = rk_optax.ModelLoss(model, lambda z, y: jax.lax.pmean(0.5 * jnp.mean((z - y) ** 2), "d"))
    else:
        loss = rk_optax.LeastSquares(lambda params, x, y: (model(params, x) - y) / np.sqrt(rows).astype(np.float32))

    def updates(loss, params, data):
        tx = rk_optax.runge_kutta(loss, 0.5, solver)
        return tx.update(jax.grad(loss)(params, **data), tx.init(params), params, **data)[0]

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(
        lambda params, data: updates(loss, params, data),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("d")),
        out_specs=PartitionSpec(),
        check_vma=True,
    )
    params = jax.tree.map(jnp.asarray, PARAMS)
    found, expected = jax.jit(split)(params, DATA), jax.jit(functools.partial(updates, whole))(params, DATA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


@pytest.mark.parametrize("rule", ["trust", "path"])
def test_rows_under_shard_map_are_refused_with_what_to_do_instead(rule):
    loss = rk_optax.LeastSquares(lambda params, x, y: model(params, x) - y)
    tx = rk_optax.residual_euler(loss, RULES[rule])

    def updates(params, data):
        return tx.value_and_update(tx.init(params), params, **data)[1]

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("d")), "out_specs": PartitionSpec()}
    with pytest.raises(ValueError, match=r"cannot be formed under jax\.shard_map.*NamedSharding.*jax\.vmap"):
        jax.eval_shape(jax.shard_map(updates, mesh=mesh, **specs), jax.tree.map(jnp.asarray, PARAMS), DATA)
