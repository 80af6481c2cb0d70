"""Every kind of solver on several devices, data or parameters split, is the step of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rk_optax

pytestmark = pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="explicit axes need jax.set_mesh")
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
    "gauss4": "gauss4",
    "etdrk2": rk_optax.Etd(2),
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


@pytest.mark.parametrize(("axes", "split", "name"), CASES)
def test_a_step_on_a_mesh_is_the_step_of_one_device(axes, split, name):
    expected = step(SOLVERS[name])(jax.tree.map(jnp.asarray, PARAMS), DATA)[0]
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
    found, expected = jax.jit(split)(params, DATA), updates(whole, params, DATA)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)
