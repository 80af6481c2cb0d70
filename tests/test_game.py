"""Games: one flow of all players, its closed forms, rates, drift, penalty and alternation; and what is refused."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.integrate

import rk_optax
from rk_optax import Drift, PlayerGradients, game

BILINEAR = {"x": lambda p: p["x"] * p["y"], "y": lambda p: -p["x"] * p["y"]}
START = {"x": 0.6, "y": -0.8}


def trajectory(tx, params, steps, **data):
    """All params of a run, as a NumPy array with a column for each number, and the last state."""
    params = jax.tree.map(jnp.asarray, params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(tx.grad(params, **data), state, params, **data)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), path = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, steps))(params)
    whole = jax.tree.map(lambda first, rest: np.concatenate([np.asarray(first)[None], rest]), params, path)
    return np.concatenate([np.reshape(leaf, (steps + 1, -1)) for leaf in jax.tree.leaves(whole)], axis=1), state


# --- Closed forms of the bilinear game -------------------------------------------------------------------------------


def chebyshev(s, damping):
    """The stability function of RKC of order 1, by its definition."""
    t = np.polynomial.chebyshev.Chebyshev.basis(s)
    w0 = 1 + damping / s**2
    return lambda z: t(w0 + z * t(w0) / t.deriv()(w0)) / t(w0)


STABILITY = {
    "euler": (1, lambda z: 1 + z),
    "heun": (2, lambda z: 1 + z + z**2 / 2),
    "ssprk3": (3, lambda z: 1 + z + z**2 / 2 + z**3 / 6),
    "rk4": (4, lambda z: 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24),
    "rkc1": (5, chebyshev(5, 0.05)),
    "extragradient": (2, lambda z: 1 + z + z**2),
}
NOT_NAMED = {
    "rkc1": rk_optax.Stabilized("rkc1", stages=5),
    "extragradient": rk_optax.ButcherTableau("extragradient", [[0, 0], [1, 0]], [0, 1], [0, 1], 1),
}


@pytest.mark.parametrize("name", STABILITY)
def test_the_radius_of_the_spiral_is_that_of_the_stability_function(name, x64):
    gradients, stability = STABILITY[name]
    solver = NOT_NAMED.get(name, name)
    h, rates = 0.3, {"x": 2.0, "y": 0.5}  # eigenvalues ±i√(2·0.5) of the field, in an ellipse with axes √2 and √½
    path, state = trajectory(game(BILINEAR, h, solver, rates=rates), START, 40)
    z = path[:, 0] / np.sqrt(2.0) + 1j * path[:, 1] / np.sqrt(0.5)
    np.testing.assert_allclose(z[1:] / z[:-1], stability(1j * h), rtol=1e-12)
    assert (np.abs(z[-1]) > np.abs(z[0])) == (name in ("euler", "heun", "rkc1"))
    assert int(state.cost.gradients) == 40 * gradients


# --- Rates -----------------------------------------------------------------------------------------------------------


def seeker(params, goal):
    return jnp.sum((params["seeker"] - goal * jnp.tanh(params["hider"])) ** 2) / 2


def hider(params):
    return -jnp.sin(jnp.sum(params["seeker"]) * params["hider"]) + params["hider"] ** 4 / 4


HUNT = {"seeker": seeker, "hider": hider}
PLACES = {"seeker": np.array([0.4, -0.7]), "hider": np.array(0.9)}
GOAL = np.array([1.0, 2.0])


def hunt(rates, z):
    """The field of HUNT by hand: hider first, as in the order of the keys."""
    s, a = z[1:], z[0]
    of_hider = -np.sum(s) * np.cos(np.sum(s) * a) + a**3
    return -np.concatenate([[rates["hider"] * of_hider], rates["seeker"] * (s - GOAL * np.tanh(a))])


def solved(field, z, t):
    return scipy.integrate.solve_ivp(lambda _, y: field(y), (0, t), z, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]


@pytest.mark.slow
def test_rates_scale_the_field_and_the_order_is_kept(x64):
    rates = {"seeker": 0.3, "hider": 1.7}
    start = np.concatenate([[PLACES["hider"]], PLACES["seeker"]])
    exact = solved(functools.partial(hunt, rates), start, 1.6)
    errors = []
    for steps in (8, 16):
        path, _ = trajectory(game(HUNT, 1.6 / steps, "rk4", rates=rates), PLACES, steps, goal=GOAL)
        errors.append(np.linalg.norm(path[-1] - exact))
    assert 12 < errors[0] / errors[1] < 22  # order 4; a rate that scaled h would leave an error of order 0
    tight = rk_optax.gradient_flow(
        None, PLACES, [0.0, 1.6], grad_fn=game(HUNT, 0.1, rates=rates).field, data={"goal": GOAL}, rtol=1e-9, atol=1e-11
    )
    end = tight.params
    np.testing.assert_allclose(np.concatenate([[end["hider"]], end["seeker"]]), exact, rtol=1e-7)


# --- Drift -----------------------------------------------------------------------------------------------------------


def steps_by_hand(field, z, h, order, blocks):
    """Euler's method for the players in turn, or for all at once."""
    z = np.array(z)
    if order is None:
        return z + h * field(z)
    for name in order:
        z[blocks[name]] += h / order.count(name) * field(z)[blocks[name]]
    return z


BLOCKS = {"hider": [0], "seeker": [1, 2]}
ORDERS = [None, ("hider", "seeker"), ("seeker", "hider"), ("seeker", "hider", "seeker", "seeker")]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_modified_flow_follows_the_discrete_steps_to_order_three(order, x64):
    rates = {"seeker": 0.6, "hider": 1.7}
    start = np.concatenate([[PLACES["hider"]], PLACES["seeker"]])
    plain = functools.partial(hunt, rates)
    errors = []
    for h in (0.04, 0.02):
        drift = Drift.simultaneous(h, HUNT) if order is None else Drift.alternating(h, order)
        field = jax.jit(functools.partial(game(HUNT, h, rates=rates, drift=drift).field, goal=GOAL))

        def modified(z, field=field):
            f = field({"hider": z[0], "seeker": z[1:]})
            return -np.concatenate([[f["hider"]], f["seeker"]])

        stepped = steps_by_hand(plain, start, h, order, BLOCKS)
        errors.append([np.linalg.norm(stepped - solved(f, start, h)) for f in (modified, plain)])
        # The transformation makes these very steps; against the drift, Euler's method follows the flow.
        path, state = trajectory(game(HUNT, h, "euler", rates=rates, alternating=order), PLACES, 1, goal=GOAL)
        np.testing.assert_allclose(path[1], stepped, rtol=1e-12)
        assert int(state.cost.gradients) == (1 if order is None else -(-(len(order) + 1) // 2))
        against = game(HUNT, h, "euler", rates=rates, alternating=order, drift=-drift)
        errors[-1].append(np.linalg.norm(trajectory(against, PLACES, 1, goal=GOAL)[0][1] - solved(plain, start, h)))
    (modified, plain, against), ratios = errors[1], np.divide(*errors)
    assert 7 < ratios[0] < 9.5
    assert 3.5 < ratios[1] < 4.6
    assert 6.5 < ratios[2] < 9.5
    assert max(modified, against) < 0.2 * plain


@pytest.mark.parametrize(("disc", "gen"), [(0.01, 0.01), (0.01, 0.05), (0.05, 0.01), (0.0001, 0.5)])
def test_drift_coefficients_against_those_of_discretisation_drift(disc, gen):
    """Theirs per player are self_norm and other_dot_prod, of unscaled gradients; h = 1 and rates are ours of theirs."""
    rates = {"disc": disc, "gen": gen}
    both, turns = Drift.simultaneous(1.0, ("disc", "gen")), Drift.alternating(1.0, ("disc", "gen"))
    for drift in (both, turns):
        for player, lr in rates.items():
            assert drift.coefficients[player][player] * lr == pytest.approx(0.5 * lr)  # self_norm
    # With one rate for both, the interaction terms are theirs too; else theirs have the rate of the player itself.
    if disc == gen:
        theirs = {"disc": 0.5 * disc, "gen": 0.5 * gen * (1 - 2 * disc / gen)}
        assert turns.coefficients["disc"]["gen"] * gen == pytest.approx(theirs["disc"])
        assert turns.coefficients["gen"]["disc"] * disc == pytest.approx(theirs["gen"])
        assert both.coefficients["disc"]["gen"] * gen == pytest.approx(0.5 * disc)
    # Several updates of a player divide its self_norm: 1/(2·num_updates).
    assert Drift.alternating(1.0, ("disc",) * 5 + ("gen",)).coefficients["disc"]["disc"] == pytest.approx(0.1)


@pytest.mark.parametrize("order", [None, ("x", "y")], ids=str)
def test_the_two_dimensional_figures_of_discretisation_drift(order, x64):
    """Their strongly rotating example: x' = −εx + y, y' = −x − εy with ε = h = 0.2, from (0.08, −0.05)."""
    eps, h = 0.2, 0.2
    losses = {
        "x": lambda p: eps * p["x"] ** 2 / 2 - p["x"] * p["y"],
        "y": lambda p: p["x"] * p["y"] + eps * p["y"] ** 2 / 2,
    }
    drift = Drift.simultaneous(h, losses) if order is None else Drift.alternating(h, order)
    field = game(losses, h, drift=drift).field
    matrix = -np.array([list(field({"x": x, "y": y}).values()) for x, y in ((1.0, 0.0), (0.0, 1.0))]).T
    if order is None:  # the right-hand side that the authors write out by hand for the figure
        theirs = [
            [-eps - h / 2 * (eps**2 - 1), 1 - h / 2 * (-eps - eps)],
            [-1 - h / 2 * (eps + eps), -eps - h / 2 * (-1 + eps**2)],
        ]
        np.testing.assert_allclose(matrix, theirs, rtol=1e-12)
    path, _ = trajectory(game(losses, h, "euler", alternating=order), {"x": 0.08, "y": -0.05}, 99)
    times = np.arange(100) * h

    def distance(generator):
        values, vectors = np.linalg.eig(generator)
        flow = (vectors * np.exp(np.outer(times, values))[:, None, :]) @ np.linalg.solve(vectors, path[0])
        return np.linalg.norm(flow.real - path, axis=1)

    modified, original = distance(matrix), distance(np.array([[-eps, 1], [-1, -eps]]))
    # Simultaneous steps spiral in far more slowly than the flow, alternating ones at its pace.
    assert modified.max() < 0.25 * original.max()
    radius = np.linalg.norm(path, axis=1)
    assert (radius[50] > 2.5 * radius[0] * np.exp(-eps * times[50])) == (order is None)


# --- ODE-GAN's penalty -----------------------------------------------------------------------------------------------


def test_the_penalty_is_the_gradient_of_the_other_players_gradient_norm(x64):
    weight = 0.3
    tx = game(HUNT, 0.1, rates={"seeker": 0.5}, gradient_penalty={"seeker": weight})
    found = tx.field(PLACES, goal=GOAL)
    s, a = PLACES["seeker"], PLACES["hider"]

    def norm(s):  # of the hider's gradient, squared, by hand
        return (-np.sum(s) * np.cos(np.sum(s) * a) + a**3) ** 2

    eps = 1e-6
    slope = np.array([(norm(s + eps * e) - norm(s - eps * e)) / (2 * eps) for e in np.eye(2)])
    np.testing.assert_allclose(found["seeker"], 0.5 * (s - GOAL * np.tanh(a) + weight * slope), rtol=1e-8)
    np.testing.assert_allclose(found["hider"], game(HUNT, 0.1).field(PLACES, goal=GOAL)["hider"])


def test_the_penalty_damps_what_circles(x64):
    path, _ = trajectory(game(BILINEAR, 0.1, "rk4", gradient_penalty={"x": 0.1, "y": 0.1}), START, 50)
    # F = (y + 0.2x, −x + 0.2y): both are 2w times themselves more, and the radius falls as exp(−2wt).
    np.testing.assert_allclose(np.linalg.norm(path[-1]), np.exp(-0.2 * 5.0), rtol=1e-5)


# --- With the rest of the package ------------------------------------------------------------------------------------


def test_an_alternating_game_takes_whole_steps_of_its_solver(x64):
    order, h = ("seeker", "hider"), 0.2
    path, state = trajectory(game(HUNT, h, "rk4", alternating=order), PLACES, 1, goal=GOAL)
    z = np.concatenate([[PLACES["hider"]], PLACES["seeker"]])
    for name in order:
        own = BLOCKS[name]

        def part(y, z=z, own=own):
            w = z.copy()
            w[own] = y
            return hunt({"seeker": 1, "hider": 1}, w)[own]

        k1 = part(z[own])
        k2 = part(z[own] + h / 2 * k1)
        k3 = part(z[own] + h / 2 * k2)
        z[own] = z[own] + h / 6 * (k1 + 2 * k2 + 2 * k3 + part(z[own] + h * k3))
    np.testing.assert_allclose(path[1], z, rtol=1e-12)
    assert int(state.cost.gradients) == 5  # (2·4 + 1)/2, rounded up


def small_game(**options):
    """Two players with trees of parameters, and a mini-batch."""
    losses = {
        "g": lambda p, x: -jnp.mean(jnp.tanh(x @ p["g"]["w"] + p["g"]["b"]) * p["d"]["v"]),
        "d": lambda p, x: jnp.mean(jnp.tanh(x @ p["g"]["w"]) @ p["d"]["v"]) + jnp.sum(p["d"]["v"] ** 2),
    }
    params = {"g": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}, "d": {"v": jnp.array([0.5, -1.0, 2.0])}}
    return game(losses, **({"learning_rate": 0.1} | options)), params, {"x": jnp.array([[1.0, 0.5], [-0.3, 0.2]])}


@pytest.mark.covering(most=3)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"preconditioner": rk_optax.precondition_by_adagrad()},
        {"learning_rate": rk_optax.dal(0.3)},
        {"learning_rate": rk_optax.error_control(), "solver": "bogacki_shampine"},
        {"learning_rate": optax.constant_schedule(0.1), "alternating": ("d", "g"), "momentum": 0.5},
        {"solver": rk_optax.Stabilized("rkc2"), "gradient_penalty": {"d": 0.1}},
        {"mask": {"g": {"w": True, "b": False}, "d": True}},
        {"drift": -Drift.simultaneous(0.1, ("g", "d")).interaction_terms, "solver": "euler"},
        {"stage_batches": "split", "batch_argnames": ["x"], "solver": "heun"},
    ],
    ids=lambda o: ",".join(o),
)
def test_a_game_is_an_optax_transformation(options):
    tx, params, data = small_game(**options)
    chained = optax.chain(tx, optax.clip(1e3))

    @jax.jit
    def step(params, state):
        seen = {"x": data["x"][:1]} if "stage_batches" in options else data
        updates, state = chained.update(tx.grad(params, **seen), state, params, **data, value=1.0)
        return optax.apply_updates(params, updates), state

    state = chained.init(params)
    for _ in range(2):
        moved, state = step(params, state)
    assert jax.tree.structure(moved) == jax.tree.structure(params)
    assert bool(state[0].accepted)
    assert float(jnp.sum(jnp.abs(moved["d"]["v"] - params["d"]["v"]))) > 0
    stays = "mask" in options
    assert (float(jnp.sum(jnp.abs(moved["g"]["b"]))) == 0) == stays


def test_values_aux_and_the_precision_of_params():
    losses = {"x": lambda p, scale=2.0: (scale * p["x"] * p["y"], "of x"), "y": lambda p: (-p["x"] * p["y"], None)}
    tx = game(losses, 0.1, has_aux=True)
    params = {"x": jnp.array(1.0, jnp.bfloat16), "y": jnp.array(2.0, jnp.bfloat16)}
    values, grads = tx.value_and_grad(params)
    assert values["x"] == (4.0, "of x")
    assert float(tx.value_and_grad(params, scale=3.0)[0]["x"][0]) == 6.0
    updates, _ = tx.update(grads, tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_complex_players_descend(x64):
    """|z − w|² for z and −|z − w|² for w move both by conjugated gradients: each at the speed 2(z − w)."""
    losses = {"z": lambda p: jnp.abs(p["z"] - p["w"]) ** 2, "w": lambda p: -(jnp.abs(p["z"] - p["w"]) ** 2)}
    params = {"z": jnp.array(1.0 + 2.0j), "w": jnp.array(0.5j)}
    field = game(losses, 0.1, gradient_penalty={"z": 0.1}).field(params)
    gap = params["z"] - params["w"]
    np.testing.assert_allclose(field["w"], 2 * gap)
    np.testing.assert_allclose(field["z"], 2 * gap + 0.1 * 8 * gap)  # ‖∇_w‖² = 4|z − w|²


def test_new_data_do_not_retrace_and_hyperparameters_can_be_injected():
    traces = []
    losses = {"x": lambda p, a: traces.append(1) or a * p["x"] * p["y"], "y": lambda p: -p["x"] * p["y"]}
    outside = game(losses, 0.1)
    tx = rk_optax.inject_hyperparams(game)(losses, learning_rate=0.1)
    params = jax.tree.map(jnp.asarray, START)
    state = tx.init(params)
    step = jax.jit(lambda p, s, a: tx.update(outside.grad(p, a=a), s, p, a=a))
    _, state = step(params, state, 1.0)
    first = len(traces)
    step(params, state, 2.0)
    assert len(traces) == first


# --- What is refused -------------------------------------------------------------------------------------------------

PARAMS = {"x": jnp.array(1.0), "y": jnp.array(2.0)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rates": {"z": 1.0}}, ValueError, r"rates names 'z', which is no player: the losses are of \['x', 'y'\]"),
        ({"rates": {"y": -1.0}}, ValueError, r"rates\['y'\] must be positive.*has the negative of it"),
        ({"rates": 2.0}, ValueError, "rates must be a mapping from players"),
        ({"gradient_penalty": 0.1}, ValueError, "gradient_penalty must be a mapping from players"),
        ({"gradient_penalty": {"x": -1}}, ValueError, r"gradient_penalty\['x'\] must be finite and not negative"),
        ({"drift": 0.1}, TypeError, r"drift must be a rk_optax.Drift.*Drift.simultaneous\(h, players\)"),
        ({"drift": Drift.simultaneous(0.1, ("x", "z"))}, ValueError, "drift names 'z'"),
        ({"drift": Drift({}), "mask": {"x": True, "y": False}}, ValueError, "drift with a mask"),
        ({"alternating": ("x",)}, ValueError, r"alternating must name every player.*the others would stay"),
        ({"alternating": "x"}, ValueError, "alternating must be names of players"),
        (
            {"alternating": ("x", "y"), "learning_rate": rk_optax.error_control()},
            ValueError,
            "Alternating does not offer",
        ),
        ({"l2": 0.1}, ValueError, "l2 would not know the players' rates"),
        ({"grad_fn": lambda p: p}, ValueError, "a game makes its own field"),
        ({"learning_rate": rk_optax.descent_control()}, ValueError, "a game, whose players have no loss in common"),
        ({"solver": "sdirk3"}, ValueError, "'symmetric'.*linear_solver=rk_optax.Gmres"),
        ({"momemtum": 0.9}, TypeError, "did you mean 'momentum'"),
        ({"losses": {"x": BILINEAR["x"]}}, ValueError, "two players or more"),
        ({"losses": [BILINEAR["x"]]}, TypeError, "losses must map the names of players to losses"),
        ({"losses": {"x": BILINEAR["x"], "y": 3.0}}, TypeError, r"losses\['y'\] must be callable"),
        ({"losses": {"x": BILINEAR["x"], "y": lambda p, *data: 0.0}}, ValueError, r"losses\['y'\] cannot be read"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        game(**({"losses": BILINEAR, "learning_rate": 0.1} | options))


def test_mistakes_in_updates_and_params():
    tx = game(BILINEAR, 0.1)
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match=r"updates must be what tx.grad\(params, \*\*data\).*not the field of the game"):
        tx.update(jax.grad(BILINEAR["x"])(PARAMS), state, PARAMS)
    claimed, _ = tx.update(PlayerGradients(x=jnp.array(2.0), y=jnp.array(-1.0)), state, PARAMS)
    expected, _ = tx.update(tx.grad(PARAMS), state, PARAMS)
    assert claimed == expected
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    anew, _ = game(BILINEAR, 0.1, reuse_updates=False).update(zeros, state, PARAMS)
    assert anew == expected
    with pytest.raises(
        ValueError, match=r"params must be a dict with a key for each player, \['x', 'y'\], got \['x'\]"
    ):
        tx.grad({"x": PARAMS["x"]})
    with pytest.raises(ValueError, match="params is None"):
        tx.update(tx.grad(PARAMS), state)
    with pytest.raises(ValueError, match=r"update\(\) got grad_fn="):
        tx.update(tx.grad(PARAMS), state, PARAMS, grad_fn=lambda p: p)
    vector = game({"x": lambda p: p["x"] * jnp.ones(2), "y": BILINEAR["y"]}, 0.1)
    with pytest.raises(TypeError, match=r"losses\['x'\] must return a scalar, got shape \(2,\)"):
        vector.grad(PARAMS)


def test_data_are_those_of_all_losses():
    tx = game({"x": lambda p, real: p["x"] * real, "y": lambda p, noise, gain=1.0: p["y"] * noise * gain}, 0.1)
    assert list(inspect.signature(tx.field).parameters) == ["params", "real", "noise", "gain"]
    with pytest.raises(TypeError, match="missing 'noise', needed by the game"):
        tx.grad(PARAMS, real=1.0)
    with pytest.raises(TypeError, match="did you mean 'noise'"):
        tx.update(tx.grad(PARAMS, real=1.0, noise=2.0), tx.init(PARAMS), PARAMS, real=1.0, noisy=2.0)
    assert float(tx.grad(PARAMS, real=1.0, noise=2.0, gain=3.0, epoch=7)["y"]) == 6.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Drift({"x": 0.1}), TypeError, "coefficients must map each player"),
        (lambda: Drift({"x": {"y": "much"}}), ValueError, r"coefficients\['x'\]\['y'\] must be a real number"),
        (lambda: Drift.simultaneous(-0.1, ("x", "y")), ValueError, "step_size must be positive"),
        (lambda: Drift.simultaneous(0.1, ("x", "x")), ValueError, "must name each player once"),
        (lambda: Drift.alternating(0.1, "xy"), ValueError, "order must be names of players"),
    ],
)
def test_mistakes_in_a_drift(make, error, message):
    with pytest.raises(error, match=message):
        make()
