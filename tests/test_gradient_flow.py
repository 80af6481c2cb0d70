"""The flow in time against diffrax, scipy's DOP853 and matrix exponentials."""

import io

import diffrax
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

import rk_optax
import rk_optax.spectrum
from tests.conftest import network, network_loss

RNG = np.random.default_rng(0)
BASIS = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
MATRIX = BASIS @ np.diag([0.1, 0.5, 2.0, 5.0]) @ BASIS.T
STIFF = BASIS @ np.diag([0.1, 1.0, 30.0, 3000.0]) @ BASIS.T
START = RNG.normal(size=4)


def quadratic(w, matrix):
    return 0.5 * w @ matrix @ w


def decay(w):
    return 0.5 * jnp.sum(w**2)


def rows(values, n):
    """The saved trees as vectors."""
    return np.concatenate([np.asarray(leaf).reshape(n, -1) for leaf in jax.tree.leaves(values)], axis=1)


def exact(matrix, times):
    return np.stack([scipy.linalg.expm(-t * matrix) @ START for t in times])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("solver", "peer"), [("tsit5", diffrax.Tsit5()), ("bogacki_shampine", diffrax.Bosh3())])
def test_a_network_against_dop853_and_diffrax(solver, peer):
    params, data = network(np.float64)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    gradient = jax.jit(lambda y: jax.flatten_util.ravel_pytree(jax.grad(network_loss)(unravel(y), **data))[0])
    ts, tolerance = np.linspace(0, 20, 9), 1e-6
    truth = scipy.integrate.solve_ivp(
        lambda t, y: -np.asarray(gradient(y)), (0, 20), np.asarray(flat), "DOP853", ts, rtol=1e-11, atol=1e-11
    ).y.T
    theirs = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -gradient(y)),
        peer,
        0.0,
        20.0,
        None,
        flat,
        saveat=diffrax.SaveAt(ts=jnp.asarray(ts)),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    )
    flow = rk_optax.gradient_flow(network_loss, params, ts, solver=solver, rtol=tolerance, atol=tolerance, data=data)
    assert flow.result == rk_optax.FlowResult.REACHED_END
    np.testing.assert_array_equal(flow.times, ts)
    ours = rows(flow.values, len(ts))
    assert np.abs(ours - truth).max() <= 10 * tolerance
    assert np.abs(ours - theirs.ys).max() <= 10 * tolerance
    # Both pairs take their last stage for the next first one; 3 gradients start diffrax, 2 start us.
    stages = {"tsit5": 6, "bogacki_shampine": 3}[solver]
    assert flow.cost.gradients == 2 + stages * (flow.accepted + flow.refused)
    assert flow.cost.gradients <= 1.1 * (3 + stages * theirs.stats["num_steps"])
    assert (flow.errors[1:] <= 1).all()


@pytest.mark.covering(most=2)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("solver", "matrix", "options", "error"),
    [
        ("tsit5", MATRIX, {"rtol": 1e-8, "atol": 1e-8}, 1e-7),
        ("dopri5", MATRIX, {"rtol": 1e-8, "atol": 1e-8}, 1e-7),
        ("rk4", MATRIX, {"step_size": 0.01}, 1e-7),
        (rk_optax.Stabilized("rkc2"), STIFF, {"rtol": 1e-5, "atol": 1e-5}, 1e-4),
        (rk_optax.Ros2("hessian"), STIFF, {"rtol": 1e-4, "atol": 1e-4}, 1e-3),
        ("sdirk3", STIFF, {"rtol": 1e-5, "atol": 1e-5}, 1e-4),
        ("radau3", STIFF, {"step_size": 0.02}, 1e-4),
    ],
)
def test_quadratics_against_the_matrix_exponential(solver, matrix, options, error):
    times = np.array([0.0, 0.3, 1.0, 1.1, 4.0])
    flow = rk_optax.gradient_flow(quadratic, START, times, solver=solver, data={"matrix": matrix}, **options)
    assert flow.result == rk_optax.FlowResult.REACHED_END
    assert flow.time == 4
    np.testing.assert_allclose(flow.values[2:], exact(matrix, times[2:]), atol=error)
    if matrix is STIFF:  # tsit5 would take 3000·4/3.5 steps of 6 gradients
        assert flow.cost.gradients + 2 * flow.cost.products < 12_000
    np.testing.assert_array_equal(flow.params, flow.values[-1])


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_backward_in_time_undoes_forward():
    there = rk_optax.gradient_flow(quadratic, START, [1.0, 3.0], rtol=1e-9, atol=1e-9, data={"matrix": MATRIX})
    times = [3.0, 2.5, 1.0]
    back = rk_optax.gradient_flow(quadratic, there.params, times, rtol=1e-9, atol=1e-9, data={"matrix": MATRIX})
    np.testing.assert_allclose(back.values[1], exact(MATRIX, [1.5])[0], atol=1e-7)
    np.testing.assert_allclose(back.params, START, atol=1e-6)
    assert back.time == 1
    traced = jax.jit(
        lambda ts: (
            rk_optax.gradient_flow(
                quadratic, there.params, ts, rtol=1e-9, atol=1e-9, data={"matrix": MATRIX}, direction="backward"
            ).params
        )
    )
    np.testing.assert_array_equal(traced(jnp.array(times)), back.params)


@pytest.mark.covering(most=1)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", ["tsit5", "dopri5", "rk4"])
def test_dense_output_has_order_four(solver):
    # The curvature of the loss turns the direction, so no condition of a scalar equation hides another.
    params, data = network(np.float64)
    times = np.r_[0.0, np.sort(np.random.default_rng(1).uniform(0, 2, 1000)), 2.0]
    fine = rk_optax.gradient_flow(network_loss, params, times, data=data, rtol=1e-12, atol=1e-12, solver="tsit5")
    errors = [
        np.abs(
            rows(
                rk_optax.gradient_flow(network_loss, params, times, data=data, step_size=h, solver=solver).values, 1002
            )
            - rows(fine.values, 1002)
        ).max()
        for h in (1 / 16, 1 / 32)
    ]
    assert 3.5 < np.log2(errors[0] / errors[1]) < 5.5
    assert errors[1] < 1e-5


@pytest.mark.slow
def test_times_do_not_change_the_steps():
    few = rk_optax.gradient_flow(network_loss, network()[0], [0.0, 5.0], data=network()[1])
    many = rk_optax.gradient_flow(network_loss, network()[0], np.linspace(0, 5, 100), data=network()[1])
    assert few.accepted == many.accepted
    np.testing.assert_allclose(rows(few.values, 2)[1], rows(many.values, 100)[-1], rtol=1e-6)


class Recorded:
    """Rows that say which of them were asked for."""

    def __init__(self, rows):
        self.rows, self.shape, self.dtype, self.asked = rows, rows.shape, rows.dtype, set()

    def __getitem__(self, index):
        self.asked.add((index.start, index.stop))
        return self.rows[index]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_micro_batches_change_rounding_alone(tmp_path):
    params, data = network(np.float64)
    data = jax.tree.map(lambda a: jnp.concatenate([a, a[:3] + 1]), data)  # 11 rows
    np.save(tmp_path / "x.npy", data["x"])
    recorded = Recorded(np.asarray(data["y"]))
    host = {"x": rk_optax.HostRows(np.load(tmp_path / "x.npy", mmap_mode="r")), "y": rk_optax.HostRows(recorded)}
    arguments, save = (network_loss, params, [0.0, 1.0, 4.0]), {"w": "params", "loss": "loss"}
    whole = rk_optax.gradient_flow(*arguments, data=data, save=save)
    for source in (data, host):
        cut = rk_optax.gradient_flow(*arguments, data=source, save=save, batches=5)  # the last one has a single row
        np.testing.assert_allclose(rows(cut.values, 3), rows(whole.values, 3), rtol=1e-9, atol=1e-12)
        assert cut.cost == whole.cost
    np.testing.assert_allclose(
        whole.values["loss"][1], network_loss(jax.tree.map(lambda x: x[1], whole.values["w"]), **data)
    )
    assert recorded.asked == {(0, 5), (5, 10), (10, 11)}
    # Products too, and where the rows are fewer than a micro-batch has.
    products = [
        rk_optax.spectrum.matrix_product(network_loss, params, data=source, batches=20)(params)
        for source in (data, host)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), *products)
    with pytest.raises(TypeError, match="rows must have a shape"):
        rk_optax.HostRows([1.0, 2.0])


@pytest.mark.slow
def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted():
    params, data = network()
    arguments = (network_loss, params, np.linspace(0, 10, 6))
    options = {"data": data, "save": lambda t, p: {"t": t, "w2": p["w2"]}, "event": lambda t, p: t - 9.0}
    through = rk_optax.gradient_flow(*arguments, **options)

    class KilledError(Exception):
        pass

    calls, stored = [], {}

    def store_and_die(flow):
        calls.append(int(flow.accepted))
        stored["file"] = io.BytesIO()
        np.savez(stored["file"], *jax.tree.leaves(flow.state))
        if len(calls) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        rk_optax.gradient_flow(*arguments, **options, progress=store_and_die, steps_per_call=4)
    assert calls[0] < calls[1] < through.accepted
    blank = rk_optax.gradient_flow(*arguments, **options, max_steps=1).state
    stored["file"].seek(0)
    state = jax.tree.unflatten(jax.tree.structure(blank), list(np.load(stored["file"]).values()))
    resumed = rk_optax.gradient_flow(*arguments, **options, state=state)
    jax.tree.map(np.testing.assert_array_equal, resumed, through)
    assert through.result == rk_optax.FlowResult.EVENT


def test_a_flow_stepped_from_python_is_the_same_program():
    traces = []

    def counted(w):
        traces.append(1)
        return decay(w)

    options = {"solver": "euler", "step_size": 0.1}
    through = rk_optax.gradient_flow(counted, jnp.ones(2), [0.0, 1.0], **options)
    before, seen = len(traces), []
    options |= {"progress": seen.append, "steps_per_call": 4}
    stepped = rk_optax.gradient_flow(counted, jnp.ones(2), [0.0, 1.0], **options)
    assert len(traces) == before
    assert [int(flow.accepted) for flow in seen] == [4, 8, 10]
    jax.tree.map(np.testing.assert_array_equal, stepped, through)


@pytest.mark.slow
def test_saved_functionals_keep_memory_flat():
    params, data = jnp.ones(10_000), {"x": jnp.linspace(0.5, 1, 10_000)}

    def temporaries(n):
        def run(w):
            flow = rk_optax.gradient_flow(
                lambda w, x: 0.5 * jnp.sum(x * w**2), w, jnp.linspace(0, 1, n), data=data, save=lambda t, w: jnp.sum(w)
            )
            return flow.values

        return jax.jit(run).lower(params).compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(100), temporaries(1000)
    assert many - few < 100_000  # 900 copies of params are 36 MB


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_what_ends_a_flow_is_named_and_located():
    w, tight = jnp.array([1.0]), {"rtol": 1e-9, "atol": 1e-9}
    end = rk_optax.FlowResult

    flow = rk_optax.gradient_flow(decay, w, [0, 0.5, 9], event=lambda t, w: w[0] - 0.5, **tight)
    assert flow.result == end.EVENT
    assert flow.time == pytest.approx(np.log(2), abs=1e-8)
    assert flow.params[0] == pytest.approx(0.5, abs=1e-12)
    assert flow.saved == 2
    np.testing.assert_array_equal(np.isnan(flow.times), [False, False, True])
    np.testing.assert_array_equal(np.isnan(flow.values[:, 0]), [False, False, True])

    flow = rk_optax.gradient_flow(decay, w, [0, 9], min_loss=0.125, min_gradient_norm=0.1, **tight)
    assert flow.result == end.LOSS
    assert flow.time == pytest.approx(np.log(2), abs=1e-8)
    flow = rk_optax.gradient_flow(decay, w, [0, 9], min_loss=0.005, min_gradient_norm=0.2, **tight)
    assert flow.result == end.GRADIENT_NORM
    assert flow.time == pytest.approx(np.log(5), abs=1e-8)
    start = rk_optax.gradient_flow(decay, w, [0, 9], min_loss=1.0, min_gradient_norm=0.2, **tight)
    assert (start.result, start.time, start.accepted) == (end.LOSS, 0, 0)

    # A budget, and going on with a larger one.
    flow = rk_optax.gradient_flow(decay, w, [0, 9], max_gradients=50, **tight)
    assert flow.result == end.BUDGET
    assert 50 <= flow.cost.gradients < 57
    more = rk_optax.gradient_flow(decay, w, [0, 9], state=flow.state, **tight)
    whole = rk_optax.gradient_flow(decay, w, [0, 9], **tight)
    np.testing.assert_array_equal(more.params, whole.params)
    assert more.result == whole.result == end.REACHED_END

    # What blows up at t = 1, and what a fixed step cannot take.
    blown = rk_optax.gradient_flow(lambda w: -jnp.sum(w**3) / 3, w, [0, 2])
    assert blown.result == end.STALLED
    assert blown.time == pytest.approx(1, abs=1e-3)
    assert "refused" in end(int(blown.result)).message
    fixed = rk_optax.gradient_flow(lambda w: jnp.sum(-jnp.sqrt(w)), -w, [0, 2], solver="rk4", step_size=0.1)
    assert fixed.result == end.REFUSED


@pytest.mark.slow
def test_masks_preconditioners_and_dtypes():
    params = {"a": jnp.array([1.0, 1.0]), "b": jnp.array(2.0, jnp.bfloat16), "fixed": jnp.array(3)}

    def loss_fn(p):
        return 0.5 * jnp.sum(p["a"] ** 2) * p["fixed"] + 0.5 * p["b"].astype(jnp.float32) ** 2

    flow = rk_optax.gradient_flow(
        loss_fn,
        params,
        [0.0, 0.5],
        mask={"a": True, "b": True, "fixed": False},
        preconditioner={"a": jnp.array([1.0, 0.5]), "b": 2.0, "fixed": 1},
        save="params",
    )
    assert flow.params["fixed"] == 3
    np.testing.assert_allclose(flow.params["a"], np.exp([-1.5, -0.75]), rtol=1e-4)
    assert flow.params["b"].dtype == jnp.float32
    np.testing.assert_allclose(flow.params["b"], 2 * np.exp(-1), rtol=1e-4)
    turned = rk_optax.gradient_flow(lambda z: jnp.real(z) ** 2 + 0.5 * jnp.imag(z) ** 2, jnp.array(1 + 1j), [0.0, 1.0])
    np.testing.assert_allclose(turned.params, np.exp(-2) + 1j * np.exp(-1), rtol=1e-4)


def test_time_keeps_its_digits_over_many_steps_in_float32():
    flow = rk_optax.gradient_flow(decay, jnp.ones(1), [0.0, 0.123, 7.0], solver="euler", step_size=1e-4)
    assert flow.accepted == 70_000
    assert flow.time == 7
    # A sum of 70,000 float32 steps is off by 0.01 and more.
    np.testing.assert_allclose(flow.values[:, 0], np.exp([0.0, -0.123, -7.0]), rtol=2e-3)


def test_other_rules_than_tolerances():
    options = {"data": {"matrix": MATRIX.astype(np.float32)}, "save": "loss"}
    for rule in (rk_optax.dal(0.1), rk_optax.descent_control(0.01, max_step_size=0.1), rk_optax.error_control(1e-3)):
        flow = rk_optax.gradient_flow(quadratic, jnp.asarray(START, jnp.float32), [0.0, 1.0], step_size=rule, **options)
        assert flow.result == rk_optax.FlowResult.REACHED_END
        truth = exact(MATRIX, [1.0])[0]
        np.testing.assert_allclose(flow.values[1], quadratic(truth, MATRIX), rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"ts": [0.0, 1.0, 1.0]}, ValueError, "strictly increasing"),
        ({"ts": [0.0, 2.0, 1.0]}, ValueError, "strictly increasing"),
        ({"ts": [0.0, np.nan]}, ValueError, "finite"),
        ({"ts": [0.0]}, ValueError, "at least two"),
        ({"ts": [0.0, 1.0], "direction": "backward"}, ValueError, "other way"),
        ({"direction": "up"}, ValueError, "direction must be"),
        ({"rtol": 0.0}, ValueError, "rtol must be positive"),
        ({"atol": -1e-6}, ValueError, "atol must be positive"),
        ({"solver": "rk4", "rtol": 1e-3}, ValueError, "need an error estimate.*Pass step_size"),
        ({"solver": "radau3"}, ValueError, "need an error estimate"),
        ({"step_size": 0.1, "rtol": 1e-3}, ValueError, "pass one of them"),
        ({"step_size": -0.1}, ValueError, "positive"),
        ({"event": lambda t, w: w}, ValueError, "event must return a real"),
        ({"event": 3}, TypeError, "event must be a function"),
        ({"save": "weights"}, ValueError, "save must be"),
        ({"preconditioner": jnp.array([1.0, -1.0, 1.0])}, ValueError, "preconditioner must be positive"),
        ({"preconditioner": {"a": 1.0}}, ValueError, "diagonal like params"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"batches": 2}, ValueError, "pass the loss's data"),
        ({"data": {"x": jnp.ones((0, 3))}, "batches": 2}, ValueError, "empty"),
        ({"data": {"x": rk_optax.HostRows(np.ones((4, 3)))}}, ValueError, r"HostRows of data\['x'\].*batches=1000"),
        ({"data": {"x": rk_optax.HostRows(np.ones((0, 3)))}, "batches": 2}, ValueError, "empty"),
        ({"ts": [1.0, 0.0], "solver": rk_optax.Ros2()}, ValueError, "structure"),
    ],
)
def test_bad_input_is_named(options, error, says):
    with pytest.raises(error, match=says):
        rk_optax.gradient_flow(**{"loss_fn": decay, "params": jnp.ones(3), "ts": [0.0, 1.0], **options})
