"""Float64 within float32 programs: what is the caller's stays what it is, and the digits are those of float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rk_optax
from rk_optax import LeastSquares, _precision, path_control
from rk_optax._vectors import lower_gram
from rk_optax.solver._factor import Tridiagonal

pytestmark = [
    pytest.mark.latest,
    pytest.mark.skipif(not hasattr(jax, "enable_x64"), reason="the context came with JAX 0.8"),
]

X = np.linspace(-1, 1, 70, dtype=np.float32)
Y = np.sin(2 * X)


def residual(w, x, y):
    """Of a caller whose numbers are float32, with operations that fail where float64 is left over."""
    assert {a.dtype for a in (w, x, y, jnp.linspace(0.0, 1.0, 3), jnp.arange(3.0))} == {np.dtype(np.float32)}
    grid = jnp.linspace(0.0, 1.0, 3)
    first = grid[jnp.argmax(-jnp.frexp(grid)[0])]
    return w[0] * jnp.tanh(w[1] * x + w[2]) + first - y


def updated(loss, steps=3, **options):
    tx = rk_optax.residual_euler(loss, path_control(**options))

    def run(w, data):
        def step(carry, _):
            w, state = carry
            value, updates, state = tx.value_and_update(state, w, **data)
            return (w + updates, state), value

        return jax.lax.scan(step, (w, tx.init(w)), None, length=steps)

    return run


START = np.array([0.5, 1.0, 0.1], np.float32)
DATA = {"x": X, "y": Y}


@pytest.mark.parametrize("points_at_once", [None, 16])
def test_the_functions_of_a_caller_see_float32_alone(points_at_once):
    loss = LeastSquares(residual, pointwise=["x", "y"], points_at_once=points_at_once)
    (w, state), values = jax.jit(updated(loss))(START, DATA)
    assert not jax.config.jax_enable_x64
    assert values[-1] < 0.1 * values[0]
    assert {x.dtype for x in jax.tree.leaves((w, state, values)) if jnp.issubdtype(x.dtype, jnp.floating)} == {
        np.dtype(np.float32)
    }


@pytest.mark.parametrize("axes", [None, (0, None), (0, 0)])
def test_the_digits_are_those_of_float64_also_where_several_are_mapped(axes):
    """(I + hMMᵀ)x = b of a condition that leaves float32 no digit, in a branch and in a loop, as in an update."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(n, 6)))[0] for n in (6, 9))
    matrix, b = ((left * np.logspace(0, -5, 6)) @ right.T).astype(np.float32), np.float32(rng.normal(size=6))

    def solved(matrix, b):
        def solve():
            with _precision.doubled(np.dtype(np.float64)):
                factor = Tridiagonal.of(lower_gram(jax.lax.convert_element_type(matrix, np.float64)))
                z = factor.coordinates(jax.lax.convert_element_type(b, np.float64)[None])
                x = jax.lax.map(lambda h: factor.vectors(factor.solve(h[None], z))[0], jnp.full(1, 1e11))[0]
                return jax.lax.convert_element_type(x, np.float32)

        return jax.lax.cond(jnp.sum(b * b) + jnp.sum(matrix) < 1e9, solve, lambda: jnp.zeros(6))

    function = solved if axes is None else jax.vmap(solved, axes)
    args = [x if axes is None or axes[i] is None else np.stack([x, x]) for i, x in enumerate((matrix, b))]
    found = jax.jit(function)(*args)
    wide = matrix.astype(float)
    expected = np.linalg.solve(np.eye(6) + 1e11 * wide @ wide.T, b.astype(float))
    for x in found[None] if axes is None else found:
        np.testing.assert_allclose(x, expected, rtol=1e-5)


@pytest.mark.slow
def test_several_at_once_are_each_what_it_is_alone():
    loss = LeastSquares(residual, pointwise=["x", "y"])
    starts = np.stack([START, 2 * START])
    (together, _), _ = jax.jit(jax.vmap(updated(loss, 2), (0, None)))(starts, DATA)
    for start, found in zip(starts, together, strict=True):
        (alone, _), _ = jax.jit(updated(loss, 2))(start, DATA)
        np.testing.assert_allclose(found, alone, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [AxisType.Explicit, AxisType.Auto])
def test_points_on_eight_devices_are_as_on_one(axes):
    loss = LeastSquares(lambda w, x, y: w[0] * jnp.tanh(w[1] * x + w[2]) - y, pointwise=["x", "y"])
    data = {"x": np.linspace(-1, 1, 80, dtype=np.float32), "y": np.sin(2 * np.linspace(-1, 1, 80, dtype=np.float32))}
    step = jax.jit(updated(loss, 2))
    (expected, _), _ = step(START, data)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(axes,))
    with jax.set_mesh(mesh):
        along, whole = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
        (found, _), _ = step(jax.device_put(START, whole), jax.device_put(data, along))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_step_can_be_lowered_for_a_gpu():
    """Where nobody has one: what JAX lowers outside of the context, argmax for one, it then cannot."""
    loss = LeastSquares(residual, pointwise=["x", "y"])
    step = jax.jit(updated(loss, 1)).trace(START, DATA)
    assert "f64" in step.lower(lowering_platforms=("cuda",)).as_text()


def test_an_error_of_the_caller_leaves_the_precision_as_it_was():
    def fail():
        with _precision.doubled(np.dtype(np.float64)):
            assert jax.config.jax_enable_x64
            with _precision.callers():
                assert not jax.config.jax_enable_x64
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not jax.config.jax_enable_x64
    with _precision.callers():  # outside of any, and where float64 is the default, it changes nothing
        assert not jax.config.jax_enable_x64


def test_where_float64_is_the_default_nothing_changes(x64):
    with _precision.doubled(np.dtype(np.float64)), _precision.callers():
        assert jax.config.jax_enable_x64
