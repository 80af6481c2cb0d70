"""Forward gradients: exact for their direction, right in the mean, and fresh at every stage of a step."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rk_optax

H = np.array([[1.0, 0.4], [0.4, 0.6]])
W = np.array([1.0, -2.0])
KEY = jax.random.key(3)


def quadratic(w):
    return 0.5 * w @ jnp.asarray(H, w.dtype) @ w


def step(tx, field, w, **data):
    return tx.update(field(w, **data), tx.init(w), w, **data)[0]


def samples(tx, field, count=50_000, **data):
    """The update of many keys."""
    w = jnp.asarray(W, jnp.float32)
    return np.asarray(jax.jit(jax.vmap(lambda key: step(tx, field, w, key=key, **data)))(jax.random.split(KEY, count)))


def errors_in_the_mean(values, exact):
    """By how many standard errors the mean is off, number by number."""
    return np.abs(values.mean(0) - exact) / (values.std(0) / np.sqrt(len(values)))


# --- The estimate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", [1, 3])
def test_it_is_the_directional_derivative_times_the_direction(directions):
    def loss_fn(w, x):
        return jnp.sum(jnp.sin(w["a"] * x)) + w["b"] ** 3

    w, x = {"a": jnp.array([0.3, -1.0]), "b": jnp.array(2.0)}, jnp.array([1.0, 2.0])
    # A linear loss c·w shows (c·v)v, so the unit vectors show the whole of Σ vvᵀ/K, without knowing the directions.
    size = sum(leaf.size for leaf in jax.tree.leaves(w))
    linear = rk_optax.forward_gradient(lambda w, c: jax.flatten_util.ravel_pytree(w)[0] @ c, directions)
    outer = np.stack([jax.flatten_util.ravel_pytree(linear(w, c=c, key=KEY))[0] for c in np.eye(size)])
    gradient = np.array([*(np.cos(w["a"] * x) * x), 3 * 2.0**2])
    estimate = rk_optax.forward_gradient(loss_fn, directions)(w, x=x, key=KEY)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(estimate)[0], outer @ gradient, rtol=1e-5)
    np.testing.assert_allclose(outer, outer.T, rtol=1e-6)
    assert np.linalg.matrix_rank(outer, tol=1e-4) == directions


@pytest.mark.parametrize("directions", [1, 4])
def test_mean_and_variance_are_those_of_the_paper(directions):
    field = rk_optax.forward_gradient(quadratic, directions)
    w = jnp.asarray(W, jnp.float32)
    estimates = jax.jit(jax.vmap(lambda key: field(w, key=key)))(jax.random.split(KEY, 30_000))
    gradient = H @ W
    assert errors_in_the_mean(np.asarray(estimates), gradient).max() < 4
    variance = np.sum(np.var(estimates, axis=0))
    assert variance == pytest.approx((len(W) + 1) * gradient @ gradient / directions, rel=0.05)


def test_complex_leaves_have_the_gradient_as_optax_has_it_and_others_than_floats_get_zeros():
    params = {"z": jnp.array([1.0 + 2.0j]), "n": jnp.array([3]), "none": None}
    field = rk_optax.forward_gradient(lambda p: jnp.sum(jnp.abs(p["z"]) ** 2 * p["n"]), 50_000)
    estimate = jax.jit(lambda key: field(params, key=key))(KEY)
    np.testing.assert_allclose(estimate["z"], 2 * 3 * params["z"], rtol=0.1)  # 2z, not its conjugate
    assert (estimate["n"].dtype, estimate["n"].tolist(), estimate["none"]) == (jnp.int32, [0], None)
    assert estimate["z"].dtype == params["z"].dtype


def test_the_types_of_params_stay_and_aux_is_handed_on():
    params = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(2)}

    def loss_fn(p, x):
        loss = sum(jnp.sum(leaf.astype(jnp.float32) * x) for leaf in p.values())
        return loss, {"loss": loss}

    estimate, aux = rk_optax.forward_gradient(loss_fn, 2, has_aux=True)(params, 3.0, key=KEY)  # data by position too
    assert {name: leaf.dtype for name, leaf in estimate.items()} == {"half": jnp.bfloat16, "single": jnp.float32}
    assert float(aux["loss"]) == 12.0


# --- Fresh at every stage --------------------------------------------------------------------------------------------


def rk4_of_a_linear_field(h):
    """The update of classical RK4 on dw/dt = −Hw: the Taylor polynomial of exp(−hH), less 1."""
    a = -h * H
    return (a + a @ a / 2 + a @ a @ a / 6 + a @ a @ a @ a / 24) @ W


def test_the_mean_step_of_rk4_is_the_step_on_the_loss_and_with_one_direction_for_all_stages_it_is_not():
    h = 0.5
    field = rk_optax.forward_gradient(quadratic)
    exact = rk4_of_a_linear_field(h)
    fresh = samples(rk_optax.rk4(None, h, grad_fn=field), field)
    assert errors_in_the_mean(fresh, exact).max() < 4
    frozen = samples(rk_optax.rk4(None, h, grad_fn=field.grad_fn), field)  # not declared: a key like a dropout key
    assert errors_in_the_mean(frozen, exact).max() > 20
    bias = np.linalg.norm(frozen.mean(0) - exact) / np.linalg.norm(exact)
    assert bias > 0.4


@pytest.mark.covering
@pytest.mark.parametrize(
    "solver",
    [
        "rk4",  # a loop over the stages
        "dopri5",  # another one, which keeps them
        rk_optax.Explicit(rk_optax.TABLEAUS["heun"], unroll=True),
        rk_optax.Stabilized("rkc2", stages=4),
        rk_optax.Stabilized("rkl1", stages=3),
    ],
    ids=["chained", "stored", "unrolled", "rkc2", "rkl1"],
)
@pytest.mark.parametrize("new_style", [True, False], ids=["key", "PRNGKey"])
def test_stage_1_has_the_key_of_update_each_later_one_its_own_and_dropout_keys_stay(solver, new_style):
    seen = []

    def grad_fn(w, key, dropout_key):
        data = [k if not new_style else jax.random.key_data(k) for k in (key, dropout_key)]
        jax.debug.callback(lambda *keys: seen.append([tuple(np.asarray(k).tolist()) for k in keys]), *data)
        return w

    make = jax.random.key if new_style else jax.random.PRNGKey
    key, dropout_key, w = make(0), make(1), jnp.ones(2)
    tx = rk_optax.runge_kutta(None, 0.1, solver, grad_fn=rk_optax.StochasticField(grad_fn), reuse_updates=False)
    jax.block_until_ready(jax.jit(tx.update)(w, tx.init(w), w, key=key, dropout_key=dropout_key))
    jax.effects_barrier()
    keys, dropout_keys = zip(*seen, strict=True)
    own = tuple(np.asarray(jax.random.key_data(key)).tolist())
    assert len(set(keys)) == len(keys) >= 2
    assert own in keys
    assert len(set(dropout_keys)) == 1


def test_a_tree_of_keys_is_fresh_too_and_a_stage_batch_goes_with_it():
    def grad_fn(w, keys, x):
        return w + jax.random.normal(keys["a"], w.shape) + 0 * x

    field = rk_optax.StochasticField(grad_fn, "keys")
    tx = rk_optax.rk4(None, 0.1, grad_fn=field, stage_batches="fresh", batch_argnames=["x"])
    w, keys, x = jnp.ones(2), {"a": KEY}, jnp.zeros(4)
    first = field(w, keys=keys, x=x[0])
    updates, _ = jax.jit(tx.update)(first, tx.init(w), w, keys=keys, x=x)
    noises = [jax.random.normal(KEY if i == 0 else jax.random.fold_in(KEY, i), w.shape) for i in range(4)]
    k = [w + noises[0]]
    for c, noise in zip((0.05, 0.05, 0.1), noises[1:], strict=True):
        k.append(w - c * k[-1] + noise)
    np.testing.assert_allclose(updates, -0.1 * (k[0] + 2 * k[1] + 2 * k[2] + k[3]) / 6, rtol=1e-5)


# --- What cannot work ------------------------------------------------------------------------------------------------

FIELD = rk_optax.forward_gradient(quadratic)
ROWS = rk_optax.LeastSquares(lambda w: w)


@pytest.mark.parametrize(
    ("rule", "solver"),
    [
        (rk_optax.error_control(), "bogacki_shampine"),
        (rk_optax.dal(0.1, estimate="free"), "heun"),
        (rk_optax.dal(0.1, estimate="difference"), "rk4"),
        (rk_optax.sgd_g2(), "euler"),
        (rk_optax.descent_control(), "rk4"),
        (rk_optax.corridor(1.0), "euler"),
        (rk_optax.trust_ratio_control(), rk_optax.ResidualEuler()),
        (rk_optax.path_control(), rk_optax.ResidualEuler()),
        (0.1, rk_optax.Stabilized("rkc1")),
        (0.1, "implicit_midpoint"),
    ],
    ids=lambda x: str(x).split("(")[0],
)
def test_what_would_take_the_noise_for_something_else_refuses_it(rule, solver):
    with pytest.raises(ValueError, match=r"'deterministic'.*forward_gradient.*constant or scheduled"):
        rk_optax.runge_kutta(ROWS, rule, solver, grad_fn=FIELD)
    tx = rk_optax.runge_kutta(ROWS, rule, solver, grad_fn=jax.grad(quadratic))
    w = jnp.ones(2)
    with pytest.raises(ValueError, match=r"grad_fn of update.*'deterministic'"):
        tx.update(w, tx.init(w), w, grad_fn=FIELD, key=KEY)


@pytest.mark.slow
def test_constant_and_scheduled_steps_and_an_exact_product_take_it():
    for rate in (0.1, lambda count: 0.1 / (1 + count), rk_optax.dal(0.1)):
        tx = rk_optax.rk4(quadratic, rate, grad_fn=FIELD, momentum=0.9)
        updates = step(tx, FIELD, jnp.ones(2), key=KEY)
        assert np.all(np.isfinite(updates))
        assert np.any(updates != 0)


def test_a_flow_refuses_it_whatever_its_steps():
    with pytest.raises(ValueError, match="'deterministic'"):
        rk_optax.gradient_flow(None, jnp.ones(2), [0.0, 1.0], grad_fn=FIELD, step_size=0.1, data={"key": KEY})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rk_optax.forward_gradient(quadratic, 0), ValueError, "directions must be an integer"),
        (lambda: rk_optax.forward_gradient(3), TypeError, "loss_fn must be callable"),
        (lambda: rk_optax.forward_gradient(lambda w, key: w), ValueError, "key_name='direction_key'"),
        (lambda: rk_optax.forward_gradient(lambda w, **data: w), ValueError, "argnames"),
        (lambda: rk_optax.forward_gradient(lambda w: w)(jnp.ones(2), key=KEY), TypeError, "must return a scalar"),
        (lambda: FIELD(jnp.ones(2)), TypeError, "'key'"),
        (lambda: rk_optax.StochasticField(3), TypeError, "grad_fn must be callable"),
        (lambda: rk_optax.StochasticField(quadratic, ()), ValueError, "keys is empty"),
        (lambda: rk_optax.StochasticField(quadratic, (1,)), TypeError, "names of data arguments"),
    ],
)
def test_wrong_arguments_say_so(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_missing_key_and_a_number_in_its_place_are_named_by_update():
    tx = rk_optax.heun(None, 0.1, grad_fn=FIELD)
    w = jnp.ones(2)
    with pytest.raises(TypeError, match="missing 'key', needed by grad_fn"):
        tx.update(w, tx.init(w), w)
    with pytest.raises(TypeError, match=r"key must be a random key.*jax.random.key\(seed\)"):
        tx.update(w, tx.init(w), w, key=0)


def test_its_signature_is_that_of_the_loss_with_a_key():
    def loss_fn(w, x, key, scale=2.0):
        return jnp.sum(w * x) * scale

    field = rk_optax.forward_gradient(loss_fn, key_name="direction_key")
    assert list(inspect.signature(field).parameters) == ["params", "x", "key", "direction_key", "scale"]
    given = {"x": 1.0, "key": KEY, "direction_key": KEY}
    w = jnp.ones(2)
    np.testing.assert_allclose(2 * field(w, scale=2.0, **given), field(w, scale=4.0, **given))
    np.testing.assert_allclose(field(w, **given), field(w, scale=2.0, **given))
