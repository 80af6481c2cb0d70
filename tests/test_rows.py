"""Residuals and their Jacobian as an operator, in its forms, against NumPy."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from training import needs_explicit_axes

from rk_optax import (
    LeastSquares,
    line_search,
    path_control,
    precondition_by_adam,
    residual_euler,
    trust_ratio_control,
)

RNG = np.random.default_rng(0)
PARAMS = {"a": RNG.normal(size=2) + 1j * RNG.normal(size=2), "b": RNG.normal(size=(2, 1))}
DATA = {"x": RNG.normal(size=7), "edge": RNG.normal(size=3)}
# Σ a_i c_i x and b of 7 points with two residuals, of 3 with one, and two of none.
MIXED = np.array([0.3 - 1.0j, 2.0 + 0.5j])


def inside(params, x):
    return jnp.stack([jnp.real(jnp.sum(params["a"] * MIXED)) * x, params["b"][0, 0] * x**2])


def boundary(params, edge):
    return params["b"][1, 0] * edge - 1


def anchor(params):
    return jnp.real(params["a"]) - 0.5


def loss_of(**options):
    return LeastSquares(
        {"inside": inside, "boundary": boundary, "anchor": anchor},
        weights={"inside": 1.0, "boundary": 4.0, "anchor": 9.0},
        pointwise=["x", "edge"],
        **options,
    )


def by_hand():
    """R with the columns Re a, Im a, b, and r."""
    a, b, x, edge = PARAMS["a"], PARAMS["b"][:, 0], DATA["x"], DATA["edge"]
    linear = np.sum(a * MIXED).real
    rows, residual = [], []
    for point in x:
        rows += [[*(MIXED.real * point), *(-MIXED.imag * point), 0, 0], [0, 0, 0, 0, point**2, 0]]
        residual += [linear * point, b[0] * point**2]
    for point in edge:
        rows.append([0, 0, 0, 0, 0, 2 * point])
        residual.append(2 * (b[1] * point - 1))
    for i in range(2):
        rows.append([3.0 * (i == 0), 3.0 * (i == 1), 0, 0, 0, 0])
        residual.append(3 * (a[i].real - 0.5))
    return np.array(rows), np.array(residual)


FORMS = {"one array": {}, "two points at once": {"points_at_once": 2}}


@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_the_jacobian_by_hand(form, x64):
    matrix, residual = by_hand()
    scale, v = np.linspace(0.5, 2, 6), np.linspace(-1, 1, 6)
    y = np.stack([residual, np.cos(np.arange(len(residual)))])

    @jax.jit
    def products(params, data):
        rows = loss_of(**FORMS[form]).rows(params, data)
        assert rows.shape == matrix.shape
        return {
            "r": rows.residual,
            "R": rows.matrix(),
            "Rv": rows.mv(v),
            "Ry": rows.rmv(y),
            "gradient": rows.gradient,
            "N": jnp.tril(rows.gram("residuals", scale, 2.0)),
            "P": jnp.tril(rows.gram("parameters", scale, 2.0)),
            "I": jnp.tril(rows.gram("parameters")),
            "size": rows.magnitude(),
            "low": rows.astype(jnp.float32).mv(v.astype(np.float32)),
        }

    params = jax.tree.map(jnp.asarray, PARAMS)
    found = products(params, DATA)
    pulled, root = matrix.T @ residual, matrix * np.sqrt(scale)
    expected = {
        "r": residual,
        "R": matrix,
        "Rv": matrix @ v,
        "Ry": y @ matrix,
        "gradient": {"a": pulled[:2] + 1j * pulled[2:4], "b": pulled[4:, None]},
        "N": np.tril(root @ root.T) / 4,
        "P": np.tril(root.T @ root) / 4,
        "I": np.tril(matrix.T @ matrix),
    }
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), expected, {k: found[k] for k in expected}
    )
    assert 1 <= float(found["size"]) / np.abs(matrix).max() <= 2
    assert found["low"].dtype == jnp.float32
    np.testing.assert_allclose(found["low"], matrix @ v, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        jax.tree.map(jnp.conj, jax.grad(loss_of())(params, **DATA)),
        found["gradient"],
    )


def test_rows_in_blocks_are_the_step_of_rows_in_one_array_and_are_never_held_whole():
    """2,000 residuals of 60 parameters, 480 kB of rows: one step holds them, and all that the other holds is less."""
    params = {"w": jnp.asarray(RNG.normal(size=(1, 20))), "b": jnp.zeros(20), "v": jnp.asarray(RNG.normal(size=20))}
    x = jnp.linspace(-1, 1, 2000)

    def misfit(params, x):
        return jnp.tanh(x * params["w"][0] + params["b"]) @ params["v"] - jnp.sin(3 * x)

    found, held = {}, {}
    for size in (None, 64):
        loss = LeastSquares(misfit, pointwise="x", reduction="mean", points_at_once=size)
        tx = residual_euler(loss, 10.0)
        program = jax.jit(tx.value_and_update).lower(tx.init(params), params, x=x).compile()
        found[size], held[size] = (
            program(tx.init(params), params, x=x)[:2],
            program.memory_analysis().temp_size_in_bytes,
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found[64], found[None])
    assert held[64] < 2000 * 60 * 4 < held[None]


RULES = {
    "path": path_control(probes=2, corrections=1),  # first on one point in 16
    "trust": trust_ratio_control(),
    "search": line_search(parts=2),
}


@needs_explicit_axes
@pytest.mark.covering(most=2)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", ["one array", "blocks", "split"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_strict_modes_stop_no_form_of_rows(form, rule, dtype, request):
    """Two steps of 1,024 points of two residuals, in strict promotion of ranks and types, and with NaNs looked for."""

    def misfit(params, x):
        return jnp.stack([jnp.tanh(x * params["w"] + params["b"]) @ params["v"] - jnp.sin(3 * x), x * params["b"][0]])

    def value(shift):
        return np.linspace(-1, 1, 4, dtype=dtype) + dtype(shift)

    if dtype == np.float64:
        request.getfixturevalue("x64")

    params = {"w": value(0.5), "b": value(0.0), "v": value(1.0)}
    data = {"x": np.random.default_rng(0).uniform(-1, 1, 1024).astype(dtype)}
    size = 128 if form == "blocks" else None
    loss = LeastSquares(misfit, weights=3.0, pointwise="x", reduction="mean", points_at_once=size)
    found = []
    for strict in (False, True):
        with contextlib.ExitStack() as stack:
            if form == "split":
                mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
                stack.enter_context(jax.set_mesh(mesh))
                data = jax.device_put(data, NamedSharding(mesh, PartitionSpec("d")))
            if strict:
                for mode in (jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict")):
                    stack.enter_context(mode)
                stack.enter_context(jax.debug_nans(True))
            tx = residual_euler(loss, RULES[rule], l2=1e-3, preconditioner=precondition_by_adam())
            theta, step = jax.tree.map(jnp.asarray, params), jax.jit(tx.value_and_update)
            state = tx.init(theta)
            for _ in range(2):
                _, updates, state = step(state, theta, **data)
                theta = jax.tree.map(jnp.add, theta, updates)
            found.append(theta)
            if not strict and rule == "path":
                assert int(state.cost.rows) < 1024  # of 128 residuals each
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *found)
    assert not np.allclose(found[1]["v"], params["v"], atol=1e-2)


def test_blocks_are_of_points_on_one_device():
    with pytest.raises(ValueError, match="points_at_once is for functions of single points"):
        LeastSquares(anchor, points_at_once=5)
    with pytest.raises(ValueError, match="points_at_once must be an integer of at least 1"):
        loss_of(points_at_once=0)
