"""Explicit Runge–Kutta steps: against diffrax, scipy, nodepy, NumPy and the exact flow."""

import collections
import dataclasses
import functools
from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from conftest import network, network_gradient, network_loss
from covering import some
from jax.flatten_util import ravel_pytree
from nodepy.runge_kutta_method import ExplicitRungeKuttaMethod

import rk_optax
from rk_optax import TABLEAUS, ButcherTableau, Explicit, VectorField
from rk_optax.solver import as_solver

named = pytest.mark.parametrize("name", some(TABLEAUS.keys(), "euler", "ssprk3", "rk4", "tsit5"))
with_embedded = [name for name, tableau in TABLEAUS.items() if tableau.b_hat is not None]
pairs = pytest.mark.parametrize("name", some(with_embedded, "bogacki_shampine", "tsit5"))

# Tableaus whose stages are easily mixed up: a second one that nothing uses, a third at θ itself, both at once.
ODD = {
    "unused stage": ButcherTableau(
        "unused stage",
        a=[[0, 0, 0, 0, 0], [0.7, 0, 0, 0, 0], [0.5, 0, 0, 0, 0], [0, 0, 0.5, 0, 0], [0, 0, 0, 1, 0]],
        b=np.array([1, 0, 2, 2, 1]) / 6,
        c=[0, 0.7, 0.5, 0.5, 1],
        order=4,
    ),
    "stage at the start": ButcherTableau(
        "stage at the start", [[0, 0, 0], [0, 0, 0], [0.25, 0.25, 0]], b=[0, 0, 1], c=[0, 0, 0.5], order=2
    ),
    "first stage unused": ButcherTableau(
        "first stage unused", [[0, 0, 0], [0, 0, 0], [0, 0.5, 0]], b=[0, 0, 1], c=[0, 0, 0.5], order=2
    ),
    "stage for the error alone": ButcherTableau(
        "stage for the error alone",
        a=[[0, 0, 0, 0], [0.5, 0, 0, 0], [0.3, 0.2, 0, 0], [0.25, 0, 0.25, 0]],
        b=[0, 1, 0, 0],
        c=[0, 0.5, 0.5, 0.5],
        order=2,
        b_hat=[0.5, 0, 0, 0.5],
        order_hat=1,
    ),
}


def take_steps(solver, field, params, h, count):
    """`count` jitted steps of `solver`, one call each."""
    problem = VectorField(lambda theta, stage: field(theta))

    @jax.jit
    def step(theta):
        direction = solver.step(problem, theta, field(theta), h, ()).direction
        return jax.tree.map(lambda p, d: p - h * d, theta, direction)

    for _ in range(count):
        params = step(params)
    return params


def largest_difference(tree, other):
    differences = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), tree, other)
    return max(jax.tree.leaves(differences))


def numpy_step(tableau, gradient, theta, h):
    """Direction, error and stages, straight from the definition; flat NumPy arrays."""
    ks = []
    for row in tableau.a:
        ks.append(gradient(theta - h * sum((a * k for a, k in zip(row, ks, strict=False)), np.zeros_like(theta))))
    direction = sum(b * k for b, k in zip(tableau.b, ks, strict=True))
    if tableau.b_hat is None:
        return direction, None, ks
    return direction, h * sum((b - b_hat) * k for b, b_hat, k in zip(tableau.b, tableau.b_hat, ks, strict=True)), ks


def cubic(theta):
    """A smooth nonlinear field that NumPy and JAX both take."""
    return theta**3 + 0.3 * theta[::-1] * theta - 0.2


THETA = np.array([0.9, -0.4, 0.7, 0.2])


@dataclasses.dataclass(frozen=True)
class Flow:
    """The gradient flow of `network_loss` on flat parameters, with its exact end point."""

    theta: jax.Array
    gradient: Callable[[jax.Array], jax.Array]
    time: float
    end: np.ndarray


@functools.cache
def network_flow():
    """Needs x64. Time and network are such that every method is close to its asymptotic slope before rounding."""
    params, data = network(np.float64)
    theta, unravel = ravel_pytree(params)
    gradient = jax.jit(jax.grad(lambda theta: network_loss(unravel(theta), **data)))
    time = 0.5
    # Tolerances near rounding and short steps: two such runs with different settings agree to 5e-15.
    run = scipy.integrate.solve_ivp(
        lambda t, theta: -np.asarray(gradient(theta)),
        (0, time),
        np.asarray(theta),
        method="DOP853",
        rtol=3e-14,
        atol=1e-15,
        max_step=time / 60,
    )
    return Flow(theta, gradient, time, run.y[:, -1])


# --- trajectories, step by step ---


def peer_of(name):
    """The diffrax solver of the same method: its own where it has one, else its machinery on our coefficients."""
    own = {
        "euler": diffrax.Euler,
        "heun": diffrax.Heun,
        "midpoint": diffrax.Midpoint,
        "ralston": diffrax.Ralston,
        "bogacki_shampine": diffrax.Bosh3,
        "tsit5": diffrax.Tsit5,
        "dopri5": diffrax.Dopri5,
        "dopri8": diffrax.Dopri8,
    }
    if name in own:
        return own[name]()
    tableau = TABLEAUS[name]
    theirs = diffrax.ButcherTableau(
        a_lower=tuple(tableau.a[i, :i] for i in range(1, tableau.stages)),
        b_sol=tableau.b,
        b_error=np.zeros(tableau.stages),
        c=tableau.c[1:],
    )
    methods = {
        "tableau": theirs,
        "interpolation_cls": diffrax.LocalLinearInterpolation,
        "order": lambda self, terms: tableau.order,
        "__annotations__": {},
    }
    return type(name, (diffrax.AbstractERK,), methods)()


@named
def test_ten_steps_are_those_of_diffrax(name, x64):
    params, data = network(np.float64)
    h = 0.05

    def field(theta):
        return network_gradient(theta, **data)

    peer = peer_of(name)
    terms = diffrax.ODETerm(lambda t, theta, args: jax.tree.map(jnp.negative, field(theta)))

    @jax.jit
    def peer_step(theta):
        # A new state at every step: in training the next step sees other data, so no stage carries over.
        state = peer.init(terms, 0.0, h, theta, None)
        return peer.step(terms, 0.0, h, theta, None, state, made_jump=True)[0]

    expected = params
    for _ in range(10):
        expected = peer_step(expected)
    result = take_steps(Explicit(TABLEAUS[name]), field, params, h, 10)
    assert largest_difference(result, params) > 1e-2
    assert largest_difference(result, expected) <= 1e-12


@pytest.mark.parametrize(
    ("name", "peer"), [("bogacki_shampine", scipy.integrate.RK23), ("dopri5", scipy.integrate.RK45)]
)
def test_ten_steps_are_those_of_scipy_at_fixed_step_size(name, peer, x64):
    flow, h = network_flow(), 0.05
    run = peer(
        lambda t, theta: -np.asarray(flow.gradient(theta)),
        0.0,
        np.asarray(flow.theta),
        np.inf,
        first_step=h,
        max_step=h,
        rtol=1e3,
        atol=1e3,
    )
    for _ in range(10):
        run.step()
    assert run.t == pytest.approx(10 * h, rel=1e-14)
    assert largest_difference(take_steps(Explicit(TABLEAUS[name]), flow.gradient, flow.theta, h, 10), run.y) <= 1e-12


@pytest.mark.parametrize("tableau", [pytest.param(t, id=name) for name, t in ({**TABLEAUS, **ODD}).items()])
def test_a_step_is_the_definition(tableau, x64):
    direction, error, _ = numpy_step(tableau, cubic, THETA, 0.3)
    problem = VectorField(lambda theta, stage: cubic(theta))
    step = Explicit(tableau).step(problem, jnp.asarray(THETA), cubic(jnp.asarray(THETA)), 0.3, ())
    np.testing.assert_allclose(step.direction, direction, rtol=1e-14)
    assert not step.quantities
    if tableau.b_hat is not None:
        step = Explicit(tableau).step(problem, jnp.asarray(THETA), cubic(jnp.asarray(THETA)), 0.3, (), wants={"error"})
        np.testing.assert_allclose(step.direction, direction, rtol=1e-14)
        np.testing.assert_allclose(step.quantities["error"], error, rtol=1e-11, atol=1e-16)


def test_a_step_of_size_zero_has_the_gradient_as_direction(x64):
    theta = jnp.asarray(THETA)
    for tableau in TABLEAUS.values():
        step = Explicit(tableau).step(VectorField(lambda theta, stage: cubic(theta)), theta, cubic(theta), 0, ())
        np.testing.assert_allclose(step.direction, cubic(THETA), rtol=1e-13)


# --- quadratics: one step is the stability polynomial ---


@named
def test_one_step_on_a_quadratic_is_the_stability_polynomial(name, x64):
    tableau, h, rng = TABLEAUS[name], 0.7, np.random.default_rng(1)
    numerator, denominator = ExplicitRungeKuttaMethod(tableau.a, tableau.b).stability_function(mode="float")
    assert denominator.order == 0
    eigenvalues = np.array([-0.8, 0.0, 0.3, 1.0, 2.5, 4.0])
    start = rng.normal(size=6)

    def loss_fn(theta, matrix):
        return theta @ matrix @ theta / 2

    tx = rk_optax.runge_kutta(loss_fn, h, name)
    step = jax.jit(lambda theta, matrix: tx.update(matrix @ theta, tx.init(theta), theta, matrix=matrix)[0])
    for basis in (np.eye(6), np.linalg.qr(rng.normal(size=(6, 6)))[0]):  # a diagonal and a dense matrix
        matrix = (basis * eigenvalues) @ basis.T
        expected = basis @ (numerator(-h * eigenvalues) / denominator(0) * (basis.T @ start))
        result = start + step(jnp.asarray(start), jnp.asarray(matrix))
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


# Hairer and Wanner, "Solving Ordinary Differential Equations II", table IV.2.1 for R of s = p stages: 2, 2, 2.513,
# 2.785. The others are the roots of |R(-x)| = 1 of the published polynomials.
@pytest.mark.covering(most=4)
@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("euler", 2.0),
        ("heun", 2.0),
        ("midpoint", 2.0),
        ("ralston", 2.0),
        ("kutta3", 2.512745),
        ("ssprk3", 2.512745),
        ("bogacki_shampine", 2.512745),
        ("rk4", 2.785294),
        ("rk38", 2.785294),
        ("dopri5", 3.306568),
        ("tsit5", 3.506870),
    ],
)
def test_iterates_decay_just_inside_the_stability_limit_and_grow_just_outside(name, limit, x64):
    curvature = 4.0

    def loss_fn(theta):
        return curvature * theta**2 / 2

    def after_many_steps(h):
        tx = rk_optax.runge_kutta(loss_fn, h, name)

        def step(_, carry):
            theta, state = carry
            updates, state = tx.update(jax.grad(loss_fn)(theta), state, theta)
            return theta + updates, state

        theta = jnp.asarray(1.0)
        return abs(jax.jit(lambda: jax.lax.fori_loop(0, 400, step, (theta, tx.init(theta))))()[0])

    assert after_many_steps(0.999 * limit / curvature) < 0.9
    assert after_many_steps(1.001 * limit / curvature) > 1.1


# --- convergence ---

COUNTS = sorted({2**k for k in range(11)} | {3 * 2**k for k in range(9)})


def convergence_slopes(tableau):
    """log2 of how much the error at a fixed time falls when the number of steps doubles.

    The window reaches from 5e-13, a hundred times what rounding and the reference leave, to 1e-2, where the network
    (its parameters are of order 1) is still far from its asymptotic behaviour. In it, the three finest pairs of runs
    count: the fewest powers of h are mixed in there, and first-order methods end at 1024 steps before reaching 1e-4.
    """
    flow, solver = network_flow(), Explicit(tableau)
    problem = VectorField(lambda theta, stage: flow.gradient(theta))

    @jax.jit
    def run(h, count):
        def step(_, theta):
            return theta - h * solver.step(problem, theta, flow.gradient(theta), h, ()).direction

        return jax.lax.fori_loop(0, count, step, flow.theta)

    errors = {n: np.linalg.norm(run(flow.time / n, n) - flow.end) for n in COUNTS}
    window = [n for n in COUNTS if 2 * n in errors and errors[2 * n] > 5e-13 and errors[n] < 1e-2]
    assert len(window) >= 3
    return [np.log2(errors[n] / errors[2 * n]) for n in window[-3:]]


@named
def test_the_error_at_a_fixed_time_falls_with_the_declared_order(name, x64):
    assert min(convergence_slopes(TABLEAUS[name])) >= TABLEAUS[name].order - 0.15


@pytest.mark.parametrize("name", ["heun", "bogacki_shampine", "dopri5", "dopri8"])
def test_the_measurement_tells_one_order_less(name, x64):
    full = TABLEAUS[name]
    lower = ButcherTableau("lower", full.a, full.b_hat, full.c, full.order_hat)
    assert min(convergence_slopes(lower)) < full.order - 0.15


# --- the embedded error estimate ---


@pairs
def test_the_error_estimate_scales_with_the_lower_order_plus_one(name, x64):
    flow, tableau = network_flow(), TABLEAUS[name]
    problem = VectorField(lambda theta, stage: flow.gradient(theta))

    @jax.jit
    def size(h):
        step = Explicit(tableau).step(problem, flow.theta, flow.gradient(flow.theta), h, (), wants={"error"})
        return jnp.linalg.norm(step.quantities["error"])

    # Terms of size h sum up to the estimate, so that it is good to a few percent while it is above 1e-14 h. For an
    # eighth-order pair that ends at h = 1/64, with the slope still 0.22 below its limit.
    sizes = {h: float(size(h)) for h in 0.5 ** np.arange(1, 13)}
    finest = min(h for h in sizes if sizes[h] > 1e-14 * h)
    slope = np.log2(sizes[2 * finest] / sizes[finest])
    assert abs(slope - (min(tableau.order, tableau.order_hat) + 1)) < 0.3


def test_an_error_estimate_without_embedded_weights_raises_and_names_the_method():
    theta = jnp.ones(2)
    with pytest.raises(ValueError, match=r"embedded.*'rk4'"):
        Explicit(TABLEAUS["rk4"]).step(VectorField(lambda theta, stage: theta), theta, theta, 0.1, (), wants={"error"})


# --- what a step evaluates ---


@pytest.mark.covering
@pytest.mark.parametrize("want_error", [False, True], ids=["step", "step and error"])
@pytest.mark.parametrize("tableau", [pytest.param(t, id=name) for name, t in ({**TABLEAUS, **ODD}).items()])
def test_a_step_evaluates_the_stages_it_needs_where_the_tableau_says_and_no_others(tableau, want_error, x64):
    if want_error and tableau.b_hat is None:
        pytest.skip("no embedded weights")
    seen = []

    def field(theta, stage):
        jax.debug.callback(lambda i, x: seen.append((int(i), np.asarray(x))), stage, theta, ordered=False)
        return cubic(theta)

    solver, h, theta = Explicit(tableau), 0.3, jnp.asarray(THETA)
    step = jax.jit(
        lambda: solver.step(VectorField(field), theta, cubic(theta), h, (), wants={"error"} if want_error else set())
    )()
    jax.block_until_ready(step)
    jax.effects_barrier()
    needed = tableau.needed_stages(with_error=want_error)
    assert len(seen) == len(needed) - 1
    assert step.cost.gradients == len(needed)

    _, _, ks = numpy_step(tableau, cubic, THETA, h)
    points = [THETA - h * sum(a * k for a, k in zip(tableau.a[i], ks, strict=True)) for i in needed[1:]]
    seen.sort(key=lambda pair: pair[0])
    for (_, point), expected in zip(seen, points, strict=True):
        np.testing.assert_allclose(point, expected, rtol=1e-13)
    numbers = [i for i, _ in seen]
    assert all(before < after for before, after in zip([0, *numbers], numbers, strict=False))


def test_gradients_per_step_are_the_known_ones():
    gradients = {name: Explicit(tableau).tableau.effective_stages for name, tableau in TABLEAUS.items()}
    known = {"euler": 1, "heun": 2, "bogacki_shampine": 3, "rk4": 4, "fehlberg45": 5, "dopri5": 6, "dopri8": 13}
    assert gradients | known == gradients


@named
def test_the_loss_is_traced_once_by_an_update_whatever_the_number_of_stages(name):
    traces = collections.Counter()
    params, data = network()

    def loss_fn(params, x, y):
        traces["loss"] += 1
        return network_loss(params, x, y)

    tx = rk_optax.runge_kutta(loss_fn, 0.1, name)
    grads = network_gradient(params, **data)
    jax.jit(tx.update).lower(grads, tx.init(params), params, **data)
    assert traces["loss"] == (0 if name == "euler" else 1)


# --- a solver on its own ---


def test_a_solver_steps_a_problem_written_by_hand_on_any_tree():
    """A decay with a rate of its own for each leaf: after one step of RK4, the Taylor polynomial of exp(-rate h)."""
    rates = {"fast": 2.0, "slow": (0.5,)}
    problem = VectorField(lambda theta, stage: jax.tree.map(jnp.multiply, rates, theta))
    theta = {"fast": jnp.ones(3), "slow": (jnp.full((2, 2), 4.0),)}
    solver, h = Explicit(TABLEAUS["rk4"]), 0.5
    step = solver.step(problem, theta, problem(theta), h, solver.init(theta))
    new = jax.tree.map(lambda p, d: p - h * d, theta, step.direction)
    expected = {"fast": 1 - 1 + 1 / 2 - 1 / 6 + 1 / 24, "slow": (4 * (1 - 1 / 4 + 1 / 32 - 1 / 384 + 1 / 6144),)}
    assert jax.tree.structure(new) == jax.tree.structure(theta)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-7), new, expected)
    assert bool(step.finite)
    assert step.cost.gradients == 4
    assert (step.cost.losses, step.cost.products, step.cost.rows) == (0, 0, 0)
    assert not step.quantities
    assert step.state == ()


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_a_step_can_be_differentiated_and_vectorised_over_its_size(name, x64):
    solver, theta = Explicit(TABLEAUS[name]), jnp.asarray(THETA)
    problem = VectorField(lambda theta, stage: cubic(theta))

    @jax.jit
    def end(h):
        return jnp.sum((theta - h * solver.step(problem, theta, cubic(theta), h, ()).direction) ** 2)

    numerical = (end(0.3 + 1e-6) - end(0.3 - 1e-6)) / 2e-6
    assert float(jax.jit(jax.grad(end))(0.3)) == pytest.approx(float(numerical), rel=1e-8)
    sizes = [0.1, 0.2, 0.4]
    np.testing.assert_allclose(jax.jit(jax.vmap(end))(np.array(sizes)), [end(h) for h in sizes], rtol=1e-14)


def test_solvers_of_one_tableau_are_equal_and_can_be_static_arguments():
    traces = collections.Counter()

    @functools.partial(jax.jit, static_argnums=0)
    def step(solver, theta):
        traces[solver] += 1
        return solver.step(VectorField(lambda theta, stage: theta), theta, theta, 0.1, ()).direction

    for solver in (Explicit(TABLEAUS["rk4"]), Explicit(TABLEAUS["rk4"]), as_solver("rk4")):
        step(solver, jnp.ones(2))
    assert sum(traces.values()) == 1
    step(Explicit(TABLEAUS["rk38"]), jnp.ones(2))
    assert sum(traces.values()) == 2
    assert Explicit(TABLEAUS["rk4"]) != Explicit(TABLEAUS["rk38"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        Explicit(TABLEAUS["rk4"]).tableau = TABLEAUS["rk38"]  # pyright: ignore[reportAttributeAccessIssue]


# --- what is refused ---

IMPLICIT = ButcherTableau("implicit midpoint", [[0.5]], b=[1], c=[0.5], order=2)


def test_a_tableau_that_is_not_explicit_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"'implicit midpoint' is not explicit.*lower triangular.*TABLEAUS"):
        Explicit(IMPLICIT)


def test_a_tableau_gets_the_solver_that_it_is_for():
    assert isinstance(as_solver(TABLEAUS["rk4"]), Explicit)
    assert isinstance(as_solver(IMPLICIT), rk_optax.Implicit)


def test_a_name_in_place_of_a_tableau_is_refused():
    with pytest.raises(TypeError, match="must be a ButcherTableau, got str"):
        Explicit("rk4")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("solver", "error", "message"),
    [
        ("RK4", ValueError, "did you mean 'rk4'"),
        ("dopri", ValueError, "did you mean 'dopri"),
        ("sgd", ValueError, "known names: euler, .*dopri8"),
        (Explicit, TypeError, "pass an instance, not the class"),
        (4, TypeError, "must be a name, a ButcherTableau or a Solver, got int"),
    ],
)
def test_what_is_no_solver_is_refused_with_a_hint(solver, error, message):
    with pytest.raises(error, match=message):
        as_solver(solver)
