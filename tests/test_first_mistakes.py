"""What a new user does wrong first: each mistake is quoted, and the message names the argument and the remedy."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from covering import some
from flax import nnx
from training import needs_explicit_axes

import rk_optax
import rk_optax.nnx

W, X = jnp.ones(3), jnp.zeros(3)


def loss_fn(w, x):
    return jnp.sum((w - x) ** 2)


least_squares = rk_optax.LeastSquares(lambda w, x: w - x)


def trace(tx, params=W, **data):
    """One update, traced and neither compiled nor run."""
    grads = jax.tree.map(jnp.ones_like, params)
    return jax.eval_shape(lambda g, p: tx.update(g, tx.init(p), p, **data), grads, params)


def stability_of_rk4(z):
    return 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24


def message(error):
    """What a user reads: the message and its notes."""
    return "\n".join([str(error.value), *getattr(error.value, "__notes__", ())])


# --- Keywords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "meant"),
    [
        (lambda: rk_optax.residual_euler(least_squares, max_row=3), "max_rows"),
        (lambda: rk_optax.rkc(loss_fn, stage=3), "stages"),
        (lambda: rk_optax.ros2(least_squares, tolerence=1e-3), "tolerance"),
        (lambda: rk_optax.etd1(loss_fn, 0.1, linaer="l2"), "linear"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentun=0.9), "momentum"),
        (lambda: rk_optax.runge_kutta(loss_fn, 0.1, "heun", hasaux=True), "has_aux"),
        (lambda: rk_optax.rk4(loss_fn, learning_rte=0.1), "learning_rate"),
    ],
)
def test_a_misspelt_option_names_the_right_one_also_of_the_solver(mistake, meant):
    with pytest.raises(TypeError, match=f"did you mean '{meant}'"):
        mistake()


def test_a_keyword_of_another_transformation_is_no_misspelling_of_an_argument_with_a_default():
    tx = rk_optax.rk4(lambda w, x, mask=None: loss_fn(w, x), 0.1)
    trace(tx, x=X, task=1)
    with pytest.raises(TypeError, match=r"did you mean 'mask'.* pass 'mask' too"):
        trace(tx, x=X, maks=1)
    trace(tx, x=X, maks=1, mask=None)


# --- after= ----------------------------------------------------------------------------------------------------------


# Whatever has a rate of its own is taken for a whole optimizer, and so are these.
WHOLE = {
    "polyak_sgd": lambda: optax.polyak_sgd(),
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "dpsgd": lambda: optax.contrib.dpsgd(0.1, 1.0, 0.1, seed=0),
    "schedule_free": lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))),
    "in a chain": lambda: optax.chain(optax.clip(1.0), optax.adam(0.1), optax.apply_every(4)),
    "with a warm-up": lambda: optax.adam(optax.linear_schedule(0.0, 0.1, 100)),
    "noisy_sgd": lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)),
}
# Parts that are named like the others and put the minus sign in themselves.
TURNING = {"scale_by_learning_rate", "scale_by_madgrad", "scale_by_cocob"}
NEEDED = {"k": 1, "step_size": 0.1, "step_size_fn": lambda count: 0.1, "max_backtracking_steps": 3}
NEEDED |= {"max_linesearch_steps": 3, "learning_rate": 0.1}


def transformations():
    """What Optax has, made with its defaults, by its name: whole optimizers, and `scale_by_...`."""
    for module in (optax, optax.contrib):
        for name, make in vars(module).items():
            if not inspect.isfunction(make) or name.startswith("_") or name in WHOLE:
                continue
            parameters = inspect.signature(make).parameters
            rate = {"learning_rate"} & set(parameters)
            if rate or name.startswith("scale_by_"):
                needed = rate | {key for key, p in parameters.items() if p.default is p.empty}
                yield name, functools.partial(make, **{key: NEEDED[key] for key in needed})


OF_OPTAX = dict(transformations())
ENDING = {name: make for name, make in OF_OPTAX.items() if not name.startswith("scale_by_") or name in TURNING} | WHOLE
KEEPING = {name: make for name, make in OF_OPTAX.items() if name not in ENDING}
SEEN_FIRST = ("sgd", "adam", "rprop", "polyak_sgd", "sam", "in a chain")


@pytest.mark.parametrize("make", some(ENDING, *SEEN_FIRST))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_after_a_whole_optimizer_would_ascend_and_is_refused(make):
    with pytest.raises(ValueError, match=r"after.*the loss would rise.*optax\.scale_by_adam\(\)"):
        rk_optax.rk4(loss_fn, 0.1, after=make())


def test_after_whole_optimizers_for_some_leaves_of_a_tree_is_refused_when_the_tree_is_known():
    parts = {"a": optax.scale_by_adam(), "b": optax.sgd(0.1)}
    tx = rk_optax.rk4(
        lambda p: p["x"] ** 2 + p["y"] ** 2, 0.1, after=optax.multi_transform(parts, {"x": "a", "y": "b"})
    )
    with pytest.raises(ValueError, match=r"after.*the loss would rise"):
        jax.eval_shape(tx.init, {"x": jnp.zeros([]), "y": jnp.zeros([])})


@pytest.mark.parametrize("make", some(KEEPING, "scale_by_rprop", "scale_by_polyak", "scale_by_lbfgs"))
def test_after_any_part_of_one_is_taken(make):
    rk_optax.rk4(loss_fn, 0.1, after=make())


@pytest.mark.parametrize(
    "after",
    [
        optax.scale_by_adam(),
        optax.trace(0.9),
        optax.chain(optax.clip(0.1), optax.add_decayed_weights(0.1)),
        optax.add_noise(100.0, 0.5, key=jax.random.key(0)),
        optax.set_to_zero(),
        optax.contrib.reduce_on_plateau(),
        optax.multi_transform({"a": optax.scale(2.0)}, {"leaf": "a"}),
    ],
)
def test_after_a_transformation_that_keeps_the_direction_is_taken(after):
    rk_optax.rk4(loss_fn, 0.1, after=after)


def test_after_with_a_traced_rate_is_taken():
    jax.eval_shape(lambda c: trace(rk_optax.rk4(loss_fn, 0.1, after=optax.trace(c)), x=X)[0], 0.9)


def test_after_that_takes_a_keyword_says_where_it_goes():
    tx = rk_optax.rk4(loss_fn, 0.1, after=optax.contrib.reduce_on_plateau())
    with pytest.raises(TypeError) as error:
        trace(tx, x=X)
    assert "'value'" in message(error)
    assert "after=" in message(error)
    assert "tx.update(grads, state, params, value=loss, x=x)" in message(error)
    trace(tx, x=X, value=1.0)


# --- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [0.1, *(make(0.1) for make in (rk_optax.dal, rk_optax.sgd_g2))], ids=str)
def test_the_step_size_is_found_by_its_name_alone(rule):
    tx = optax.chain(optax.clip(1.0), rk_optax.euler(loss_fn, rule))
    _, state = tx.update(W, tx.init(W), W, x=X)
    np.testing.assert_array_equal(optax.tree_utils.tree_get(state, "step_size"), state[1].step_size)


@pytest.mark.parametrize("make", [rk_optax.error_control, rk_optax.descent_control], ids=["error", "descent"])
def test_and_so_it_is_where_a_rule_keeps_the_next_one(make):
    state = rk_optax.rkc(loss_fn, make(), order=2).init(W)
    assert optax.tree_utils.tree_get(state, "step_size") is state.step_size
    assert optax.tree_utils.tree_get(state, "next_step_size") is state.rule.next_step_size
    state = rk_optax.residual_euler(least_squares).init(W)
    assert optax.tree_utils.tree_get(state, "step_size") is state.step_size


# --- Layers with rates of their own ----------------------------------------------------------------------------------


def test_multi_transform_around_a_solver_says_how_to_give_layers_rates():
    params = {"w": W, "b": W}
    tx = optax.multi_transform({"rk": rk_optax.rk4(loss_fn, 0.1), "sgd": optax.sgd(0.1)}, {"w": "rk", "b": "sgd"})
    with pytest.raises(ValueError, match=r"rates of their own.*precondition_by\(optax\.multi_transform"):
        tx.init(params)


def test_the_way_it_says_integrates_the_flow_with_those_rates(x64):
    rates = {"slow": 0.1, "fast": 1.0}
    scale = optax.multi_transform({name: optax.scale(rate) for name, rate in rates.items()}, {k: k for k in rates})

    def loss(p):
        return 0.5 * (p["slow"] ** 2 + p["fast"] ** 2)

    tx = rk_optax.rk4(loss, 0.5, preconditioner=rk_optax.precondition_by(scale))
    params = {name: jnp.array(1.0) for name in rates}
    updates, _ = jax.jit(tx.update)(jax.jit(jax.grad(loss))(params), tx.init(params), params)
    for name, rate in rates.items():
        np.testing.assert_allclose(1 + updates[name], stability_of_rk4(-0.5 * rate), rtol=1e-12)


# --- Errors inside the loss ------------------------------------------------------------------------------------------


def test_parameters_that_eqx_filter_has_emptied():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))

    def loss(model, x):
        return jnp.mean(jax.vmap(model)(x) ** 2)

    with pytest.raises(TypeError) as error:
        trace(rk_optax.rk4(loss, 0.1), eqx.filter(model, eqx.is_inexact_array), x=jnp.ones((4, 3)))
    assert "'NoneType' object is not callable" in message(error)
    assert "eqx.partition" in message(error)


def of_model(model, x):
    return jnp.mean(model(x) ** 2)


def of_model_with_aux(model, x):
    return of_model(model, x), {}


@pytest.mark.parametrize(
    ("loss", "tx", "options", "remedy"),
    [
        (of_model_with_aux, rk_optax.rk4(of_model_with_aux, 0.3, has_aux=True), {"has_aux": True}, "nnx.pure_loss"),
        (of_model, rk_optax.rk4(of_model, 0.3), {}, "nnx.pure_loss(loss_fn), or rk_optax.nnx.Optimizer(model, partial"),
        (of_model_with_aux, functools.partial(rk_optax.rk4, learning_rate=0.3), {}, "Here has_aux is False"),
        (
            of_model_with_aux,
            functools.partial(rk_optax.rk4, learning_rate=0.3, has_aux=True),
            {"has_aux": True},
            "leave has_aux of the solver off",
        ),
        (of_model, functools.partial(rk_optax.rk4, learning_rate=0.3), {"has_aux": True}, "Here has_aux is True"),
    ],
    ids=["solver of the model", "the same without aux", "forgotten", "given to the solver", "without aux"],
)
def test_an_nnx_optimizer_says_where_the_loss_and_has_aux_go(loss, tx, options, remedy):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = rk_optax.nnx.Optimizer(model, tx, loss, wrt=nnx.Param, **options)
    with pytest.raises(TypeError) as error:
        optimizer.take_step(model, x=jnp.ones((4, 3)))
    assert remedy in message(error)


def scanned(w, x):
    carried, _ = jax.lax.scan(lambda c, _: (c * w, None), jnp.ones(3, jnp.bfloat16), None, length=2)
    return loss_fn(carried.astype(jnp.float32), x)


def convolved(w, x):
    image = jnp.ones((1, 1, 4, 4), jnp.bfloat16)
    return jnp.sum(jax.lax.conv(image, w.reshape(1, 1, 1, 3), (1, 1), "SAME").astype(jnp.float32)) + jnp.sum(x)


def attended(w, x):
    keys = jnp.ones((1, 2, 1, 3), jnp.bfloat16)
    return jnp.sum(jax.nn.dot_product_attention(keys * w, keys, keys).astype(jnp.float32)) + jnp.sum(x)


@pytest.mark.parametrize("loss", [scanned, convolved, attended])
def test_a_loss_that_insists_on_the_dtype_of_the_parameters(loss):
    with pytest.raises((TypeError, ValueError)) as error:
        trace(rk_optax.rk4(loss, 0.1), W.astype(jnp.bfloat16), x=X)
    assert "Parameters of bfloat16 are float32 at a stage; stage_dtype=None" in message(error)
    trace(rk_optax.rk4(loss, 0.1, stage_dtype=None), W.astype(jnp.bfloat16), x=X)


def test_a_shape_that_only_a_later_stage_meets():
    with pytest.raises(TypeError) as error:
        trace(rk_optax.rk4(loss_fn, 0.1), x=jnp.ones(5))
    assert "loss_fn was evaluated here by the solver, for a stage, on what update was given (x: float32[5])" in message(
        error
    )


def test_parameters_that_optax_flatten_has_joined():
    params = {"w": W, "b": jnp.zeros(())}
    tx = optax.flatten(rk_optax.rk4(lambda p, x: loss_fn(p["w"], x) + p["b"] ** 2, 0.1))
    with pytest.raises(TypeError) as error:
        trace(tx, params, x=X)
    assert "one flat array of length 4, as under optax.flatten; leave that out" in message(error)


def one_step(tx, loss, params):
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params)
    return jax.tree.map(jnp.add, params, updates)


def test_joined_tuples_are_silently_another_method_and_the_tree_itself_is_right(x64):
    """Of the joined array the loss reads other numbers: the gradient of b is 0 in all stages but the first."""

    def loss(params):
        w, b = params[0], params[1]
        return 0.5 * jnp.sum(w**2) + 0.5 * jnp.sum(b**2)

    params, h = (jnp.array([1.0, -2.0]), jnp.array(3.0)), 0.5
    joined = one_step(optax.flatten(rk_optax.rk4(loss, h)), loss, params)
    np.testing.assert_allclose(joined[1], 3 * (1 - h / 6), rtol=1e-12)
    right = one_step(rk_optax.rk4(loss, h), loss, params)
    for found, start in zip(right, params, strict=True):
        np.testing.assert_allclose(found, start * stability_of_rk4(-h), rtol=1e-12)


@pytest.mark.skipif(not hasattr(optax, "freeze"), reason="needs optax.freeze")
def test_frozen_after_the_solver_is_silently_another_method_and_a_mask_is_right(x64):
    """The flow of a beside a fixed b = 1 is a' = −(2a − 1); stages that move b see another one."""

    def loss(params):
        return 0.5 * params["a"] ** 2 + 0.5 * (params["a"] - params["b"]) ** 2

    params, h = {"a": jnp.array(2.0), "b": jnp.array(1.0)}, 0.3
    expected = 0.5 + 1.5 * stability_of_rk4(-2 * h)
    frozen = optax.chain(rk_optax.rk4(loss, h), optax.freeze({"a": False, "b": True}))
    frozen, masked = (
        one_step(tx, loss, params) for tx in (frozen, rk_optax.rk4(loss, h, mask={"a": True, "b": False}))
    )
    assert float(frozen["b"]) == float(masked["b"]) == 1
    np.testing.assert_allclose(masked["a"], expected, rtol=1e-12)
    assert abs(float(frozen["a"]) - expected) > 1e-2


@jax.custom_vjp
def squares(a):
    return a**2


squares.defvjp(lambda a: (squares(a), a), lambda a, g: (2 * a * g,))
opaque_model = rk_optax.ModelLoss(lambda w, x: squares(w - x), lambda values: jnp.sum(values))


def opaque_loss(w, x):
    return jnp.sum(squares(w - x))


@pytest.mark.parametrize(
    "tx",
    [
        rk_optax.rosenbrock_euler(opaque_model, 0.1),
        rk_optax.residual_euler(rk_optax.LeastSquares(lambda w, x: squares(w - x)), 0.1, max_rows=1),
    ],
    ids=["gauss_newton", "residual_euler beyond max_rows"],
)
def test_a_custom_vjp_without_forward_mode_says_what_works(tx):
    with pytest.raises(TypeError) as error:
        trace(tx, x=X)
    assert "jax.custom_vjp has no rule" in message(error)
    assert "dal(estimate='difference')" in message(error)
    assert "curvature='hessian'" in message(error)


@pytest.mark.parametrize(
    "tx",
    [
        rk_optax.rosenbrock_euler(opaque_model, 0.1, curvature="hessian"),
        rk_optax.rk4(opaque_loss, rk_optax.dal(0.1, estimate="difference")),
        rk_optax.rk4(opaque_loss, rk_optax.dal(0.1, estimate="free")),
        rk_optax.rkc(opaque_loss),
        rk_optax.etd1(opaque_loss, 0.1, linear="l2", l2=1e-3),
    ],
)
def test_and_what_it_says_works(tx):
    trace(tx, x=X)


# --- Fields that are no gradients ------------------------------------------------------------------------------------


def rotation(z, strength=1.0):
    """Of the game min_x max_y xy: its Jacobian is skew."""
    return {"x": strength * z["y"], "y": -strength * z["x"]}


@pytest.mark.slow
def test_a_smooth_field_that_is_no_gradient_has_products_and_rk4_turns_it_as_it_should(x64):
    z = {"x": jnp.array(1.0), "y": jnp.array(0.0)}
    tx = rk_optax.rk4(None, rk_optax.dal(2.0), grad_fn=rk_optax.SmoothField(rotation))
    updates, state = jax.jit(tx.update)(rotation(z), tx.init(z), z)
    np.testing.assert_allclose(state.rule.ratio, 1.0)
    h = float(state.step_size)
    np.testing.assert_allclose(1 + updates["x"], 1 - h**2 / 2 + h**4 / 24, rtol=1e-12)
    np.testing.assert_allclose(updates["y"], h - h**3 / 6, rtol=1e-12)


@pytest.mark.parametrize("make", [rk_optax.backward_euler, rk_optax.gauss4])
def test_solvers_of_symmetric_systems_refuse_it_unless_it_says_that_it_is_symmetric(make):
    with pytest.raises(ValueError, match=r"'symmetric'.*SmoothField\(grad_fn, symmetric=True\)"):
        make(None, 0.1, grad_fn=rk_optax.SmoothField(rotation))
    tx = make(None, 0.1, grad_fn=rk_optax.SmoothField(jax.grad(loss_fn), symmetric=True))
    trace(tx, x=X)


@pytest.mark.slow
def test_a_smooth_field_is_read_for_its_data_and_its_jacobian_is_taken_at_its_data():
    field = rk_optax.SmoothField(rotation)
    tx = rk_optax.rk4(None, rk_optax.dal(2.0), grad_fn=field)
    z = {"x": jnp.array(1.0), "y": jnp.array(0.0)}
    for strength in (1.0, 3.0):
        _, state = jax.jit(tx.update)(rotation(z, strength), tx.init(z), z, strength=strength)
        np.testing.assert_allclose(state.rule.ratio, strength, rtol=1e-6)
    with pytest.raises(TypeError, match="grad_fn must be callable, got int"):
        rk_optax.SmoothField(3)


# --- Time ------------------------------------------------------------------------------------------------------------


def test_time_is_the_sum_of_the_steps_that_were_taken_to_the_rounding_of_the_sum():
    rates = jnp.array([0.1, jnp.nan, 1e-7, 0.25])
    tx = rk_optax.euler(lambda w: jnp.sum(w**2), lambda count: rates[count % 4])
    count = 10_000

    @jax.jit
    def run(w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jnp.zeros_like(w), state, w)
            return (w + updates, state), None

        return jax.lax.scan(step, (w, tx.init(w)), length=4 * count)[0][1]

    state = run(W)
    exact = count * float(np.float64(np.float32(0.1)) + np.float64(np.float32(1e-7)) + 0.25)
    # Added up without what rounding takes, float32 is wrong by 1e-5 of this sum.
    assert abs(float(state.time) - exact) <= 2 * np.spacing(np.float32(exact))
    assert int(state.rejected) == count


# --- Strict promotion, split batches over devices --------------------------------------------------------------------


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["rk4", "dopri5", "rkc", "ros2", "sdirk2", "gauss4", "etdrk2"])
def test_strict_dtype_promotion_stops_no_solver(name, dtype):
    curvature = {"curvature": "hessian"} if name == "ros2" else {}
    with jax.numpy_dtype_promotion("strict"):
        tx = getattr(rk_optax, name)(
            loss_fn, 0.1, l2=1e-3, momentum=0.9, preconditioner=rk_optax.precondition_by_adam(), **curvature
        )
        updates, _ = trace(tx, W.astype(dtype), x=X)
    assert updates.dtype == dtype


@needs_explicit_axes
@pytest.mark.parametrize("axis_type", ["Explicit", "Auto"])
def test_a_batch_over_devices_is_split_as_on_one_device(axis_type):
    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    x = np.arange(48, dtype=np.float32).reshape(16, 3) / 48
    tx = rk_optax.rk4(loss, 0.1, stage_batches="split", batch_argnames=["x"])
    first = functools.partial(rk_optax.first_stage_batch, stages=4, policy="split", batch_argnames=["x"])

    @jax.jit
    def update(w, x):
        return tx.update(jax.grad(loss)(w, **first({"x": x})), tx.init(w), w, x=x)[0]

    alone = update(W, x)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(getattr(jax.sharding.AxisType, axis_type),))
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d")))
        np.testing.assert_allclose(update(W, spread), alone, rtol=1e-5)
