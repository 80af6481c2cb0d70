"""Structured losses: their values, gradients and rows against the loss written out and jax.jacrev of the residuals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import rk_optax
from rk_optax import LeastSquares, ModelLoss

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(2, 3)).astype(np.float32), "b": RNG.normal(size=3).astype(np.float32)}
POINTS = RNG.normal(size=(5, 2)).astype(np.float32)
EDGE = RNG.normal(size=(4, 2)).astype(np.float32)
SHIFT = np.float32(0.3)


def network(params, point):
    return jnp.tanh(point @ params["w"] + params["b"])


def interior(params, x, shift):
    """At one point: two leaves of residuals, of sizes 1 and 2."""
    out = network(params, x)
    return {"sum": jnp.sum(out) - shift, "pair": out[:2] ** 2}


def boundary(params, edge):
    return network(params, edge)[0] - 1.0


def anchor(params):
    return params["b"] - 0.5


TERMS = {"interior": interior, "boundary": boundary, "anchor": anchor}
WEIGHTS = {"interior": {"sum": 2.0, "pair": 0.5}, "boundary": 10.0, "anchor": 3.0}
DATA = {"x": POINTS, "shift": SHIFT, "edge": EDGE}


def by_hand(params, mean):
    """Weighted residuals, one vector, and half of whose square is the loss."""
    out = jax.vmap(lambda x: network(params, x))(POINTS)
    average = jnp.mean if mean else jnp.sum
    parts = [
        (2.0, out.sum(axis=1) - SHIFT),
        (0.5, out[:, :2] ** 2),
        (10.0, jax.vmap(lambda x: network(params, x))(EDGE)[:, 0] - 1.0),
        (3.0, params["b"] - 0.5),
    ]
    return sum(0.5 * w * average(r**2) for w, r in parts)


def least_squares(mean=False, weights=WEIGHTS):
    return LeastSquares(TERMS, weights=weights, pointwise=["x", "edge"], reduction="mean" if mean else "sum")


# --- least squares ---


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("mean", [False, True])
def test_value_and_gradient_are_those_of_the_loss_written_out(mean):
    loss = least_squares(mean)
    value, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS, **DATA)
    expected, expected_gradient = jax.jit(jax.value_and_grad(lambda params: by_hand(params, mean)))(PARAMS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6), gradient, expected_gradient)


@pytest.mark.covering
@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("mean", [False, True])
def test_rows_are_the_jacobian_of_the_weighted_residuals(mean, pointwise, x64):
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), PARAMS)
    whole = {
        "interior": lambda params, x, shift: jax.vmap(lambda x: interior(params, x, shift))(x),
        "boundary": lambda params, edge: jax.vmap(lambda x: boundary(params, x))(edge),
        "anchor": anchor,
    }
    loss = (
        least_squares(mean) if pointwise else LeastSquares(whole, weights=WEIGHTS, reduction="mean" if mean else "sum")
    )
    rows = jax.jit(loss.rows)(params, DATA)
    flat = np.concatenate([np.reshape(leaf, (22, -1)) for leaf in jax.tree.leaves(rows.jacobian)], axis=1)
    # Rows come in an order of their own, the same for residuals and Jacobian: compare what does not depend on it.
    theta, unravel = ravel_pytree(params)
    outputs = lambda t: ravel_pytree(loss.outputs(unravel(t), DATA))[0]  # noqa: E731
    reference, jacobian = map(np.asarray, jax.jit(lambda t: (outputs(t), jax.jacrev(outputs)(t)))(theta))
    assert loss.count_rows(params, DATA) == 22 == rows.residual.size
    ours, theirs = np.argsort(rows.residual), np.argsort(reference)
    np.testing.assert_allclose(np.asarray(rows.residual)[ours], reference[theirs], rtol=1e-10)
    np.testing.assert_allclose(flat[ours], jacobian[theirs], rtol=1e-8, atol=1e-12)
    value, gradient = jax.jit(jax.value_and_grad(lambda params: by_hand(params, mean)))(params)
    np.testing.assert_allclose(np.asarray(rows.residual) @ flat, ravel_pytree(gradient)[0], rtol=1e-6, atol=1e-7)
    assert 0.5 * rows.residual @ rows.residual == pytest.approx(float(value), rel=1e-6)


def test_rows_of_complex_parameters_are_conjugated_gradients(x64):
    loss = LeastSquares(lambda z: jnp.stack([jnp.real(z[0] * z[1]), jnp.imag(z[0]), jnp.abs(z[1]) ** 2]))
    z = jnp.array([1.0 + 2.0j, -0.5 + 0.3j])
    rows = jax.jit(loss.rows)(z, {})
    gradient = jnp.conj(jax.jit(jax.grad(loss))(z))
    np.testing.assert_allclose(rows.residual @ rows.jacobian, gradient, rtol=1e-12)
    direction, small = np.array([0.3 - 1.0j, 2.0 + 0.7j]), 1e-6
    outputs = jax.jit(lambda z: loss.outputs(z, {}))
    difference = (outputs(z + small * direction) - outputs(z - small * direction)) / (2 * small)
    np.testing.assert_allclose(np.real(np.conj(rows.jacobian) @ direction), difference, rtol=1e-7)


@pytest.mark.parametrize(
    ("weights", "expected"), [(None, 2.5 + 4.5), (4.0, 4 * 7.0), ({"u": 2.0, "v": 1.0}, 2 * 2.5 + 4.5)]
)
def test_weights_are_a_number_or_a_prefix_of_one_functions_residuals(weights, expected):
    loss = LeastSquares(lambda params: {"u": jnp.array([1.0, 2.0]) + params, "v": 3.0 + params}, weights=weights)
    assert float(loss(jnp.zeros(()))) == pytest.approx(expected)
    np.testing.assert_allclose(0.5 * np.sum(loss.rows(jnp.zeros(()), {}).residual ** 2), expected, rtol=1e-6)


def test_a_number_weighs_all_functions():
    heavy = jax.jit(LeastSquares(TERMS, weights=2.0, pointwise=["x", "edge"]))(PARAMS, **DATA)
    light = jax.jit(LeastSquares(TERMS, pointwise=["x", "edge"]))(PARAMS, **DATA)
    assert float(heavy) == pytest.approx(2 * float(light), rel=1e-6)


def test_a_single_argument_name_may_be_a_string_and_a_default_stays_a_default():
    def residual(params, x, scale=2.0):
        return scale * params * x

    loss = LeastSquares(residual, pointwise="x")
    x = jnp.array([1.0, 2.0])
    assert float(loss(1.0, x)) == 10.0
    assert float(loss(1.0, x, 1.0)) == 2.5
    assert float(loss(1.0, x=x, scale=1.0)) == 2.5
    np.testing.assert_allclose(loss.rows(jnp.ones(()), {"x": x, "scale": 1.0}).jacobian, x)


def test_one_function_takes_its_data_by_position_and_several_by_keyword_only():
    assert float(LeastSquares(lambda params, x, y: params * x - y)(2.0, 3.0, 4.0)) == 2.0
    with pytest.raises(TypeError, match="positional"):
        least_squares()(PARAMS, POINTS, SHIFT, EDGE)
    with pytest.raises(TypeError, match="edge"):
        least_squares()(PARAMS, x=POINTS, shift=SHIFT)


# --- a model's loss ---


def test_a_models_loss_is_the_loss_of_its_outputs():
    def model(params, x):
        return x @ params["w"] + params["b"]

    def cross_entropy(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, labels = ModelLoss(model, cross_entropy), jnp.array([0, 1, 2, 1, 0])
    plain = lambda params: cross_entropy(model(params, POINTS), labels)  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(PARAMS, x=POINTS, labels=labels)
    expected, expected_gradient = jax.jit(jax.value_and_grad(plain))(PARAMS)
    assert float(value) == pytest.approx(float(expected))
    jax.tree.map(np.testing.assert_array_equal, gradient, expected_gradient)
    with pytest.raises(TypeError, match="positional"):
        loss(PARAMS, POINTS, labels)


def test_both_functions_may_take_the_same_data():
    loss = ModelLoss(lambda params, x: params * x, lambda outputs, x: jnp.sum(outputs * x))
    assert float(loss(2.0, x=jnp.array([1.0, 3.0]))) == 20.0


# --- through update ---


def test_data_reach_it_by_name_and_a_misspelt_name_is_told():
    tx = rk_optax.residual_euler(least_squares(), 0.1)
    value_and_gradient = jax.jit(jax.value_and_grad(least_squares()))
    before, grads = value_and_gradient(PARAMS, **DATA)
    update, state = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS, **DATA, value=1.0)
    assert int(state.cost.rows) == 22
    after, _ = value_and_gradient(optax.apply_updates(PARAMS, update), **DATA)
    assert float(after) < float(before)
    with pytest.raises(TypeError, match="did you mean 'edge'"):
        tx.update(grads, state, PARAMS, x=POINTS, shift=SHIFT, edges=EDGE)
    with pytest.raises(TypeError, match="missing 'shift'"):
        tx.update(grads, state, PARAMS, x=POINTS, edge=EDGE)


def test_a_structured_loss_is_a_loss_for_every_solver():
    loss = least_squares()
    plain = rk_optax.heun(lambda params, x, shift, edge: by_hand(params, False), 0.05)
    ours = rk_optax.heun(loss, 0.05)

    @jax.jit
    def both(params, data):
        grads = jax.grad(loss)(params, **data)
        return [tx.update(grads, tx.init(params), params, **data)[0] for tx in (plain, ours)]

    expected, found = both(PARAMS, DATA)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-6), found, expected)


def test_new_points_of_the_same_number_do_not_retrace_and_a_mask_keeps_leaves():
    traces = []

    def counted(params, x, shift):
        traces.append(1)
        return interior(params, x, shift)

    loss = LeastSquares(counted, pointwise="x")
    tx = rk_optax.residual_euler(loss, mask={"w": True, "b": False})
    rng = np.random.default_rng(1)

    @jax.jit
    def step(params, state, x):
        grads = jax.grad(loss)(params, x=x, shift=SHIFT)
        updates, state = tx.update(grads, state, params, x=x, shift=SHIFT)
        return optax.apply_updates(params, updates), state

    params, state, count = PARAMS, tx.init(PARAMS), []
    for _ in range(3):
        params, state = step(params, state, jnp.asarray(rng.normal(size=(5, 2)), jnp.float32))
        count.append(len(traces))
    assert count[0] == count[-1]
    np.testing.assert_array_equal(params["b"], PARAMS["b"])
    assert np.abs(params["w"] - PARAMS["w"]).max() > 0


# --- what is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LeastSquares({}), "empty dict"),
        (lambda: LeastSquares(interior, pointwise=["x", "y"]), "pointwise has 'y'"),
        (lambda: LeastSquares(interior, weights=-1.0), "weights must be finite and not negative"),
        (lambda: LeastSquares(interior, weights={"sum": np.nan}), "weights must be finite and not negative"),
        (lambda: LeastSquares(TERMS, weights={"interior": 1.0}), r"weights has \['interior'\]"),
        (lambda: LeastSquares(interior, reduction="max"), "reduction must be"),  # pyright: ignore[reportArgumentType]
        (lambda: LeastSquares(lambda params, **data: params), r"cannot be read from its signature"),
        (lambda: LeastSquares(lambda params, state: params), "named 'state'"),
        (lambda: rk_optax.rk4(least_squares(), 0.1, has_aux=True), "has_aux=True"),
        (lambda: rk_optax.rk4(ModelLoss(network, jnp.sum), 0.1, has_aux=True), "has_aux=True|signature"),
    ],
)
def test_what_is_wrong_at_construction_is_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_function_that_is_none_is_told():
    with pytest.raises(TypeError, match="output_loss must be callable"):
        ModelLoss(network, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="boundary must be callable"):
        LeastSquares({"interior": interior, "boundary": 3})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("residual", [1j * np.ones(2), np.arange(2)], ids=["complex", "integers"])
def test_residuals_that_are_not_real_floats_are_told(residual):
    with pytest.raises(TypeError, match="real floating-point arrays"):
        LeastSquares(lambda params: residual)(jnp.ones(2))


def test_weights_that_are_no_prefix_of_the_residuals_are_told():
    loss = LeastSquares(lambda params: {"u": params, "v": params}, weights={"u": 1.0})
    with pytest.raises(ValueError, match="prefix of the residuals"):
        loss(jnp.ones(2))


# --- weights and points as a physics-informed network has them ---


def at_point(params, x):
    return params["a"] * x - jnp.sin(x)


def over_all(params, x):
    """An integral constraint: it sees every point at once."""
    return params["a"] * jnp.mean(x) - params["b"]


NODES = np.array([0.2, 0.5, 1.1, 1.4, 2.0])
AB = {"a": np.float64(0.6), "b": np.float64(0.3)}


def of_nodes(params, weights, mean_weight=1.0):
    at_points = params["a"] * NODES - np.sin(NODES)
    over = params["a"] * NODES.mean() - params["b"]
    return 0.5 * np.mean(weights * at_points**2) + 0.5 * mean_weight * over**2


@pytest.mark.parametrize("weights", [np.array([0.0, 2.0, 1.0, 0.0, 5.0]), np.zeros(5)])
def test_a_constraint_over_points_that_are_pointwise_elsewhere_and_a_weight_for_each_point(weights, x64):
    loss = LeastSquares(
        {"equation": at_point, "integral": over_all},
        weights={"equation": weights, "integral": 3.0},
        pointwise={"equation": ["x"]},
        reduction="mean",
    )
    params = jax.tree.map(jnp.asarray, AB)
    value, flat, residual, rows = jax.jit(
        lambda p, data: (*jax.value_and_grad(loss)(p, **data), loss.residual(p, data), loss.rows(p, data))
    )(params, {"x": NODES})
    assert float(value) == pytest.approx(of_nodes(AB, weights, 3.0), rel=1e-12)
    assert rows.residual.shape == (6,)  # and not ten, of an integral over each point
    np.testing.assert_allclose(residual, rows.residual)
    for name in AB:
        np.testing.assert_allclose(rows.jacobian[name] @ rows.residual, flat[name], rtol=1e-12)
    tx = rk_optax.residual_euler(loss, rk_optax.path_control())
    updates, state = jax.jit(tx.update)(flat, tx.init(params), params, x=NODES)
    assert bool(state.accepted)
    after = jax.tree.map(lambda p, u: np.asarray(p + u), params, updates)
    assert float(state.rule.loss) == pytest.approx(of_nodes(after, weights, 3.0), rel=1e-9)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_residual_at_all_is_an_error(reduction):
    loss = rk_optax.LeastSquares({"edge": lambda w, x: w[0] * x}, pointwise=["x"], reduction=reduction)
    w, x = jnp.ones(2), jnp.zeros(0)
    tx = rk_optax.residual_euler(loss, 0.1)
    for evaluate in (loss, lambda w, x: tx.update(w, tx.init(w), w, x=x)):
        with pytest.raises(ValueError, match=r"no residual on these data \(N = 0\): 'edge' got no points"):
            evaluate(w, x=x)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_term_without_points_contributes_nothing(reduction):
    functions, options = {"inside": at_point, "edge": lambda params, edge: params["b"] - edge}, {"reduction": reduction}
    loss = LeastSquares(functions, pointwise=["x", "edge"], **options)
    alone = LeastSquares({"inside": at_point}, pointwise="x", **options)
    params, none = jax.tree.map(jnp.float32, AB), np.zeros((0,), np.float32)

    @jax.jit
    def seen(params, data):
        rows, residual = loss.rows(params, data).residual, loss.residual(params, data)
        return jax.value_and_grad(loss)(params, **data), alone(params, x=data["x"]), rows, residual

    (value, gradient), without, rows, residual = seen(params, {"x": NODES, "edge": none})
    assert float(value) == pytest.approx(float(without))
    assert float(gradient["b"]) == 0
    assert rows.shape == residual.shape == (5,)


def test_mistakes_of_a_least_squares_loss_are_named():
    with pytest.raises(TypeError, match=r"'edge' returned no residuals: does it lack a `return`"):
        LeastSquares({"x": at_point, "edge": lambda params: None})({"a": 1.0}, x=1.0)
    with pytest.raises(TypeError, match=r"pass data by name: loss_fn\(params, x=\.\.\.\)"):
        LeastSquares({"equation": at_point, "integral": over_all})(AB, NODES)
    with pytest.raises(ValueError, match=r"pointwise has 'x'; the residual functions are"):
        LeastSquares({"equation": at_point}, pointwise={"x": ["x"]})
    with pytest.raises(ValueError, match=r"pointwise\['equation'\] has 'y'"):
        LeastSquares({"equation": at_point}, pointwise={"equation": "y"})
    with pytest.raises(ValueError, match="for a dict of residual functions"):
        LeastSquares(at_point, pointwise={"at_point": "x"})
    with pytest.raises(ValueError, match="not negative"):
        LeastSquares(at_point, weights=np.array([1.0, -1.0]))
    with pytest.raises(ValueError, match=r"weights of shape \(3,\)"):
        LeastSquares(at_point, weights=np.ones(3), pointwise="x")(AB, x=NODES)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_fewer_points_keep_their_weights_and_the_scale_of_the_loss(reduction, x64):
    """Of residuals w·(a − x) at points x, b at other points, and one of none."""
    x, z, w = np.arange(100.0), np.full(30, 2.0), np.linspace(1, 3, 100)
    loss_fn = LeastSquares(
        {
            "line": lambda p, x: p["a"] - x,
            "level": lambda p, z: p["b"] * z,
            "whole": lambda p: p["c"],
        },
        weights={"line": w, "level": 5.0, "whole": 7.0},
        pointwise=["x", "z"],
        reduction=reduction,
    )
    params = {"a": jnp.array(2.0), "b": jnp.array(3.0), "c": jnp.array(4.0)}
    seen = []
    for divisor in (16, 4):
        fewer, data = loss_fn.on_fewer_points({"x": x, "z": z}, divisor)
        kept = np.asarray(data["x"])
        assert (len(kept), len(data["z"])) == (-(-100 // divisor), -(-30 // divisor))
        scale = 100 if reduction == "sum" else 1
        line = 0.5 * scale * np.mean(w[kept.astype(int)] * (2.0 - kept) ** 2)
        level = 0.5 * (30 if reduction == "sum" else 1) * 5.0 * 6.0**2
        assert float(fewer(params, **data)) == pytest.approx(line + level + 0.5 * 7 * 16)
        assert fewer.count_rows(params, data) == len(kept) + len(data["z"]) + 1
        seen.append(set(kept))
    assert seen[0] < seen[1]
    assert loss_fn.on_fewer_points({"x": x[:1], "z": z[:1]}, 4) is None
    assert LeastSquares(lambda p, x: p - x).on_fewer_points({"x": x}, 4) is None
