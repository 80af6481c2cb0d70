"""The spectrum against scipy's eigsh on the same operator, dense eigenvalues and closed forms."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import rk_optax
from rk_optax import spectrum
from tests.conftest import network, network_loss


def dense(loss_fn, params, **data):
    """The Hessian as a matrix, by JAX's own forward-over-reverse."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda w: loss_fn(unravel(w), **data)))(flat))


@pytest.mark.usefixtures("x64")
def test_both_ends_agree_with_eigsh_on_the_same_operator():
    # 1,200 unknowns and 30 vectors: many restarts, which is where an error would show.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 30))
    y = rng.normal(size=(40, 1))
    params = {
        "w1": jnp.asarray(rng.normal(size=(30, 38))),
        "b1": jnp.zeros(38),
        "w2": jnp.asarray(rng.normal(size=(38, 1))),
    }
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    product = spectrum.matrix_product(network_loss, params, data={"x": x, "y": y})
    flat_product = jax.jit(lambda v: jax.flatten_util.ravel_pytree(product(unravel(v)))[0])
    operator = scipy.sparse.linalg.LinearOperator(
        (flat.size, flat.size),
        dtype=np.float64,
        matvec=lambda v: np.asarray(flat_product(v.ravel())),
    )
    want = {
        which: scipy.sparse.linalg.eigsh(operator, k=4, which=which, tol=1e-10, return_eigenvectors=False)
        for which in ("LA", "SA")
    }
    options = {"data": {"x": x, "y": y}, "basis": 30, "tolerance": 1e-7}
    found = spectrum.eigenpairs(network_loss, params, 4, bottom=4, **options)
    assert found.converged
    assert found.products > 30  # it restarted
    np.testing.assert_allclose(found.values[:4], np.sort(want["LA"])[::-1], rtol=1e-6)
    np.testing.assert_allclose(found.values[4:], np.sort(want["SA"])[::-1], rtol=1e-6)
    vectors = np.concatenate([np.reshape(leaf, (8, -1)) for leaf in jax.tree.leaves(found.vectors)], axis=1)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(8), atol=1e-12)
    residuals = [np.linalg.norm(operator.matvec(v) - value * v) for v, value in zip(vectors, found.values, strict=True)]
    np.testing.assert_allclose(found.residuals, residuals, rtol=1e-2, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_whole_spectrum_and_its_density_against_dense_eigenvalues():
    params, data = network(np.float64)
    want = np.linalg.eigvalsh(dense(network_loss, params, **data))
    found = spectrum.eigenpairs(network_loss, params, len(want), data=data)
    np.testing.assert_allclose(found.values, want[::-1], atol=1e-10)

    # The first 2·steps moments of zᵀf(H)z are exact, and with every node the density is the spectrum's.
    measured = spectrum.density(network_loss, params, probes=400, steps=6, data=data)
    assert measured.weights.sum() == pytest.approx(1)
    for power in (1, 2, 3):
        assert measured.moment(power) == pytest.approx(np.mean(want**power), rel=0.05)
    points = np.linspace(want[0] - 1, want[-1] + 1, 2001)
    curve = measured.at(points, width=0.05)
    assert np.trapezoid(curve, points) == pytest.approx(1, abs=1e-6)
    above = np.trapezoid(np.where(points > 0.5, curve, 0), points)
    assert above == pytest.approx(np.mean(want > 0.5), abs=0.05)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_micro_batches_change_rounding_alone():
    params, data = network(np.float64)
    data = jax.tree.map(lambda a: jnp.concatenate([a, a[:3] + 1]), data)  # 11 rows
    want = np.linalg.eigvalsh(dense(network_loss, params, **data))[::-1][:3]
    for size in (5, 100):  # a last micro-batch of a single row, and none at all
        found = spectrum.eigenpairs(network_loss, params, 3, data=data, batches=size)
        np.testing.assert_allclose(found.values, want, rtol=1e-10)
    loss_fn = rk_optax.ModelLoss(
        lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"], lambda z, y: jnp.mean((z - y) ** 2)
    )
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    rows = jax.jit(
        jax.jacobian(lambda w: (jnp.tanh(data["x"] @ unravel(w)["w1"] + unravel(w)["b1"]) @ unravel(w)["w2"]).ravel())
    )(flat)
    want = np.linalg.eigvalsh(2 / rows.shape[0] * rows.T @ rows)[::-1][:3]
    for size in (None, 4):  # a last micro-batch of three
        found = spectrum.eigenpairs(loss_fn, params, 3, data=data, batches=size, matrix="gauss_newton")
        np.testing.assert_allclose(found.values, want, rtol=1e-10)


def test_multiple_zero_and_complex_eigenvalues():
    found = spectrum.eigenpairs(lambda w: 0.5 * jnp.sum(w**2), jnp.ones(5), 5)
    np.testing.assert_allclose(found.values, np.ones(5), rtol=1e-5)
    flat = spectrum.eigenpairs(lambda w: jnp.sum(w), jnp.ones(4), 2)
    np.testing.assert_array_equal(flat.values, 0)
    assert flat.converged
    # ½(3 Re² + 2 Im²) of a complex number has the eigenvalues 3 and 2.
    found = spectrum.eigenpairs(
        lambda w: 0.5 * (3 * jnp.real(w) ** 2 + 2 * jnp.imag(w) ** 2), jnp.ones([], jnp.complex64), 2
    )
    np.testing.assert_allclose(found.values, [3, 2], rtol=1e-6)


def test_the_power_method_follows_the_largest_eigenvalue():
    params, data = network()
    want = np.abs(np.linalg.eigvalsh(dense(network_loss, params, **data))).max()
    product = spectrum.matrix_product(network_loss, params, data=data)
    vector = jax.tree.map(jnp.ones_like, params)
    _, vector = jax.jit(lambda v: jax.lax.scan(lambda v, _: spectrum.power_step(product, v)[::-1], v, length=60))(
        vector
    )
    assert vector[-1] == pytest.approx(want, rel=1e-4)
    zero, same = spectrum.power_step(lambda v: 0 * v, jnp.ones(3))
    assert zero == 0
    np.testing.assert_array_equal(same, np.ones(3))


def test_a_compiled_call_and_a_start_at_the_answer_save_products():
    params, data = network()
    first = spectrum.eigenpairs(network_loss, params, 1, data=data, basis=5)
    start = jax.tree.map(lambda v: v[0], first.vectors)
    again = jax.jit(lambda p: spectrum.eigenpairs(network_loss, p, 1, data=data, basis=5, start=start))(params)
    assert again.products <= first.products
    assert again.products == 5
    np.testing.assert_allclose(again.values, first.values, rtol=1e-5)
    assert not spectrum.eigenpairs(
        network_loss, params, 1, data=data, basis=3, max_products=3, tolerance=1e-6
    ).converged


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 0}, "k must be"),
        ({"k": 40}, "more than the 30 parameters"),
        ({"k": 3, "basis": 3}, "basis must be larger"),
        ({"tolerance": 0.0}, "tolerance must be"),
        ({"matrix": "fisher"}, "matrix must be"),
        ({"matrix": "gauss_newton"}, "gauss_newton"),
        ({"batches": 0}, "batches must be"),
        ({"batch_argnames": "x"}, "does nothing without batches"),
        ({"batches": 2, "batch_argnames": "z"}, "'z', which is not in data"),
    ],
)
def test_bad_arguments_are_named(options, says):
    params, data = network()
    with pytest.raises(ValueError, match=says):
        spectrum.eigenpairs(network_loss, params, **{"data": data, **options})


def test_bad_data_are_named():
    params, data = network()
    with pytest.raises(ValueError, match="empty"):
        spectrum.eigenpairs(network_loss, params, data=jax.tree.map(lambda a: a[:0], data), batches=2)
    with pytest.raises(ValueError, match="one number of rows"):
        spectrum.eigenpairs(network_loss, params, data={**data, "y": data["y"][:3]}, batches=2)
    with pytest.raises(ValueError, match="pass the loss's data"):
        spectrum.eigenpairs(network_loss, params, batches=2)
    with pytest.raises(TypeError, match="missing"):
        spectrum.eigenpairs(network_loss, params)
