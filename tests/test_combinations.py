"""What composes: solver × preconditioner × rate × what comes after × stage batches; and a table of what does not."""

import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import network_gradient, network_loss
from covering import cover, some

import rk_optax
from rk_optax import TABLEAUS, dal, first_stage_batch, sgd_g2

pytestmark = pytest.mark.latest

PRECONDITIONERS = {
    "none": None,
    "adagrad": rk_optax.precondition_by_adagrad(),
    "rms": rk_optax.precondition_by_rms(),
    "adam": rk_optax.precondition_by_adam(),
    "hutchinson": rk_optax.precondition_by_hutchinson(every=2),
    "clip": rk_optax.precondition_by(optax.clip_by_global_norm(1.0)),
}
RATES = {
    "constant": 0.05,
    "schedule": optax.linear_schedule(0.0, 0.05, 2),
    "dal": dal(0.05),
    "dal, difference": dal(0.05, 2.0, form="clipped", estimate="difference", every=2),
    "dal, free": dal(0.05, estimate="free"),
    "sgd_g2": sgd_g2(0.01),
}
AFTER = {
    "nothing": {},
    "momentum": {"momentum": 0.9},
    "nesterov and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "adam": {"after": optax.scale_by_adam(), "l2": 1e-2},
}
POLICIES = ["same", "fresh", "split"]
FACTORS = (list(TABLEAUS), list(PRECONDITIONERS), list(RATES), list(AFTER), POLICIES)

# Which combinations of the five cannot be built, and a part of the reason they give.
REFUSED = {
    "sgd_g2 with another solver than Euler's": (
        lambda solver, scale, rate, after, policy: rate == "sgd_g2" and solver != "euler",
        "gradient-descent step",
    ),
    "the free estimate without a second stage": (
        lambda solver, scale, rate, after, policy: rate == "dal, free" and solver == "euler",
        "first two stages",
    ),
    "the free estimate of two stages on different data": (
        lambda solver, scale, rate, after, policy: rate == "dal, free" and policy != "same",
        "stage_batches",
    ),
}


def reasons(combination):
    return [message for refuses, message in REFUSED.values() if refuses(*combination)]


def build(loss, combination, names):
    solver, scale, rate, after, policy = combination
    batches = {} if policy == "same" else {"stage_batches": policy, "batch_argnames": names}
    return rk_optax.runge_kutta(
        loss, RATES[rate], solver, preconditioner=PRECONDITIONERS[scale], **AFTER[after], **batches
    )


# --- All of them, built and traced -----------------------------------------------------------------------------------


def product_loss(params, x):
    return jnp.sum(params["w"] * params["w"] * x)


# One solver of each kind of program: no later stage, chained stages, stored stages, a stage that no weight uses. The
# others differ in coefficients.
KINDS = ["euler", "heun", "rk4", "ssprk3", "bogacki_shampine"]


def valid_combinations(factors):
    return [combination for combination in itertools.product(*factors) if not reasons(combination)]


def pairs_of(combination):
    return set(itertools.combinations(enumerate(combination), 2))


def pairwise_cover(factors):
    """Few valid combinations in which every pair of values that can meet does meet."""
    valid = valid_combinations(factors)
    return [valid[place] for place in cover(valid, 2)]


@pytest.mark.parametrize(
    ("solvers", "stride"),
    # Seven shares no factor with the numbers of values, so every seventh still meets each three values together.
    [pytest.param(KINDS, 7, id="one of each kind"), pytest.param(list(TABLEAUS), 1, id="all", marks=pytest.mark.slow)],
)
def test_a_combination_is_refused_at_construction_if_and_only_if_the_table_says_so(solvers, stride):
    wrong = []
    for combination in itertools.islice(itertools.product(solvers, *FACTORS[1:]), 0, None, stride):
        expected = reasons(combination)
        try:
            build(product_loss, combination, ["x"])
            message = None
        except ValueError as error:
            message = str(error)
        if (message is not None) != bool(expected) or (message and not any(part in message for part in expected)):
            wrong.append((combination, message))
    assert not wrong, (len(wrong), wrong[:5])


def keep_structure_and_dtypes(combinations):
    params = {"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
    for combination in combinations:
        x = jax.ShapeDtypeStruct((TABLEAUS[combination[0]].effective_stages, 2), jnp.float32)
        tx = build(product_loss, combination, ["x"])

        def init_and_update(params, x, tx=tx):
            state = tx.init(params)
            return state, *tx.update(params, state, params, x=x)

        before, updates, after = jax.eval_shape(init_and_update, params, x)
        assert updates == params, combination
        assert jax.tree.structure(after) == jax.tree.structure(before), combination
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
            assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, old.weak_type), combination


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["a pairwise cover", pytest.param("all", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("solver", TABLEAUS)
def test_every_valid_combination_keeps_structure_and_dtypes(solver, chosen):
    """Of updates those of params, of the new state those of the old, down to weak types: so that nothing retraces."""
    choose = valid_combinations if chosen == "all" else pairwise_cover
    combinations = choose(([solver], *FACTORS[1:]))
    keep_structure_and_dtypes(combinations)
    if chosen == "all":
        # Six scales, four things after, three policies; four rates and the free one, or Euler's five.
        assert len(combinations) == 6 * 4 * (3 * 5 if solver == "euler" else 3 * 4 + 1)


# Solvers of other kinds than tableaus: they ask for a diagonal scale and have no second stage to compare with.
OTHERS = {"sdirk3": "sdirk3", "radau3": "radau3", "etd1": rk_optax.Etd(1), "ros2": rk_optax.Ros2("diagonal")}


@pytest.mark.parametrize("solver", some(OTHERS, "etd1"))
def test_implicit_and_exponential_solvers_go_with_diagonal_preconditioners_and_rates_for_any_solver(solver):
    params, x = {"w": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}, jax.ShapeDtypeStruct((2,), jnp.float32)
    for scale, rate in itertools.product(PRECONDITIONERS, RATES):

        def build_it(scale=scale, rate=rate):
            options = {"preconditioner": PRECONDITIONERS[scale], **AFTER["adam"]}
            return rk_optax.runge_kutta(product_loss, RATES[rate], solver, **options)

        if scale == "clip" or rate in ("dal, free", "sgd_g2"):
            with pytest.raises(
                ValueError, match=r"only with a diagonal preconditioner|first two stages|gradient-descent step"
            ):
                build_it()
            continue

        def init_and_update(params, x, build_it=build_it):
            tx = build_it()
            state = tx.init(params)
            return state, *tx.update(params, state, params, x=x)

        before, updates, after = jax.eval_shape(init_and_update, params, x)
        assert updates == params
        assert jax.tree.structure(after) == jax.tree.structure(before)
        for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
            assert (new.shape, new.dtype, new.weak_type) == (old.shape, old.dtype, old.weak_type), (scale, rate)


# --- Every pair of them, compiled and run ----------------------------------------------------------------------------

COVER = pairwise_cover((KINDS, *FACTORS[1:]))
QUICK = [COVER[place] for place in cover(COVER)]


@pytest.mark.slow
def test_a_pairwise_cover_keeps_structure_and_dtypes():
    keep_structure_and_dtypes(COVER)


def test_the_cover_meets_every_pair_that_can_meet():
    seen = set().union(*map(pairs_of, COVER))
    factors = (KINDS, *FACTORS[1:])
    missing = {
        (first, second)
        for (i, one), (j, other) in itertools.combinations(enumerate(factors), 2)
        for first, second in itertools.product([(i, a) for a in one], [(j, b) for b in other])
        if ((first, second)) not in seen
    }
    solver, rate, policy = 0, 2, 4
    assert missing == {
        *(((solver, kind), (rate, "sgd_g2")) for kind in KINDS if kind != "euler"),
        ((solver, "euler"), (rate, "dal, free")),
        *(((rate, "dal, free"), (policy, other)) for other in ("fresh", "split")),
    }


@pytest.mark.parametrize("combination", some({", ".join(c): c for c in COVER}, *map(", ".join, QUICK)))
def test_a_pairwise_cover_trains_and_traces_the_loss_in_the_first_step_only(combination):
    solver, _, rate, _, policy = combination
    stages = TABLEAUS[solver].effective_stages
    traces = []

    def loss(params, x, y):
        traces.append(1)
        return network_loss(params, x, y)

    rng = np.random.default_rng(0)
    shapes = {"w1": (3, 5), "b1": (5,), "w2": (5, 2)}
    params = {key: jnp.asarray(rng.normal(size=shape), jnp.float32) for key, shape in shapes.items()}
    tx = build(loss, combination, ["x", "y"])

    @jax.jit
    def step(params, state, data):
        first = data if policy == "same" else first_stage_batch(data, stages, policy, ["x", "y"])
        updates, state = tx.update(network_gradient(params, **first), state, params, **data)
        return optax.apply_updates(params, updates), state

    lead = (stages, 4) if policy == "fresh" else (12,)
    state, count, visited = tx.init(params), [], [params]
    for _ in range(4):
        data = {
            "x": jnp.asarray(rng.normal(size=(*lead, 3)), jnp.float32),
            "y": jnp.asarray(rng.normal(size=(*lead, 2)), jnp.float32),
        }
        params, state = step(params, state, data)
        count.append(len(traces))
        visited.append(params)
    assert count == [count[0]] * 4
    assert count[0] <= (0 if solver == "euler" else 1) + ("dal" in rate or rate == "sgd_g2") + 1 + 1
    assert int(state.count) == 4
    assert int(state.rejected) == 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, state.step_size, state.preconditioner)))
    moved = [any(np.any(a[key] != b[key]) for key in a) for a, b in itertools.pairwise(visited)]
    assert moved == [rate != "schedule", True, True, True]  # the schedule begins with 0


# --- The table of what raises ----------------------------------------------------------------------------------------


class NoFixedStages(rk_optax.Solver):
    """A solver of one's own whose gradients per step are not fixed in number."""

    def step(self, problem, params, k1, h, state, *, wants=frozenset()):
        return rk_optax.Step(k1, rk_optax.Cost(gradients=1), state=state)


GRADIENT = jax.grad(network_loss)
SPLIT = {"stage_batches": "split", "batch_argnames": ["x", "y"]}
PARAMS = {"w1": jnp.ones((3, 5)), "b1": jnp.ones(5), "w2": jnp.ones((5, 2))}


def updated(tx, **data):
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, **data)


def table():
    """What is combined, how, what it raises, and what the message says."""
    rk, rk4, euler, scale = rk_optax.runge_kutta, rk_optax.rk4, rk_optax.euler, rk_optax.scale_by_rk
    free, loss = dal(1.0, estimate="free"), network_loss
    hutchinson = rk_optax.precondition_by_hutchinson()
    return [
        ("sgd_g2, rk4", lambda: rk4(loss, sgd_g2()), ValueError, r"another solver's stability limit.*rk_optax\.euler"),
        ("sgd_g2, own solver", lambda: rk(loss, sgd_g2(), NoFixedStages()), ValueError, "gradient-descent step"),
        (
            "dal free, euler",
            lambda: euler(loss, free),
            ValueError,
            "first two stages, which the tableau 'euler' does not offer",
        ),
        ("dal free, own solver", lambda: rk(loss, free, NoFixedStages()), ValueError, "first two stages.*'product'"),
        ("dal free, split", lambda: rk4(loss, free, **SPLIT), ValueError, "free.*stage_batches|stage_batches.*free"),
        ("dal free, every", lambda: dal(1.0, estimate="free", every=2), ValueError, "costs nothing: leave it at 1"),
        (
            "dal product, bare grad_fn",
            lambda: rk4(None, dal(1.0), grad_fn=GRADIENT),
            ValueError,
            "'product': pass loss",
        ),
        (
            "hutchinson, bare grad_fn",
            lambda: rk4(None, 0.1, grad_fn=GRADIENT, preconditioner=hutchinson),
            ValueError,
            "needs a 'product': pass loss_fn",
        ),
        ("dal, scale_by_rk", lambda: scale(loss, dal(1.0)), ValueError, "adaptive one cannot reach you.*runge_kutta"),
        ("sgd_g2, scale_by_rk", lambda: scale(loss, sgd_g2(), "euler"), ValueError, "adaptive one cannot reach you"),
        (
            "split, own solver",
            lambda: rk(loss, 0.1, NoFixedStages(), **SPLIT),
            ValueError,
            "fixed number of gradients per step",
        ),
        ("split, no names", lambda: rk4(loss, 0.1, stage_batches="split"), ValueError, "needs batch_argnames"),
        ("same, names", lambda: rk4(loss, 0.1, batch_argnames=["x"]), ValueError, "does nothing with .*'same'"),
        (
            "split, a name the loss lacks",
            lambda: rk4(loss, 0.1, stage_batches="split", batch_argnames=["z"]),
            ValueError,
            "batch_argnames has 'z', which loss_fn does not take",
        ),
        (
            "split, a batch that does not divide",
            lambda: updated(rk4(loss, 0.1, **SPLIT), x=jnp.ones((7, 3)), y=jnp.ones((7, 2))),
            ValueError,
            r"does not divide.*multiple of 4",
        ),
        (
            "fresh, another number of batches than stages",
            lambda: updated(
                rk4(loss, 0.1, stage_batches="fresh", batch_argnames=["x", "y"]),
                x=jnp.ones((3, 2, 3)),
                y=jnp.ones((3, 2, 2)),
            ),
            ValueError,
            r"leading axis of length 4, got shape \(3, 2, 3\)",
        ),
        (
            "momentum, after",
            lambda: rk4(loss, 0.1, momentum=0.9, after=optax.identity()),
            ValueError,
            "two ways to say",
        ),
        ("nesterov, no momentum", lambda: rk4(loss, 0.1, nesterov=True), ValueError, "does nothing without momentum"),
        (
            "nesterov, after",
            lambda: rk4(loss, 0.1, nesterov=True, after=optax.trace(0.9)),
            ValueError,
            "does nothing without momentum",
        ),
        ("momentum, scale_by_rk", lambda: scale(loss, 0.1, momentum=0.9), TypeError, "momentum"),
        (
            "an Optax transformation as preconditioner",
            lambda: rk4(loss, 0.1, preconditioner=optax.scale_by_rss()),
            TypeError,
            r"becomes one with rk_optax\.precondition_by",
        ),
        (
            "a preconditioner as after",
            lambda: rk4(loss, 0.1, after=rk_optax.precondition_by_adagrad),
            TypeError,
            r"after must be an optax\.GradientTransformation",
        ),
        (
            "optax.masked around it",
            lambda: optax.masked(rk4(loss, dal(1.0)), {"w1": True, "b1": False, "w2": True}).init(PARAMS),
            ValueError,
            "the solver's own mask= instead",
        ),
    ]


@pytest.mark.parametrize("row", table(), ids=lambda row: row[0])
def test_what_does_not_combine_raises_and_says_why(row):
    _, make, error, message = row
    with pytest.raises(error, match=message):
        make()


# The page "With the rest of Optax" says the same, to people: each row of its table and the message that a reader gets.
PAGE_MESSAGES = [
    "gradient-descent step",
    "first two stages",
    "they see different batches",
    "costs nothing",
    "needs a 'product'",
    "needs a 'product'",
    "adaptive one cannot reach you",
    "unexpected keyword argument 'momentum'",
    "needs batch_argnames",
    "does nothing with stage_batches='same'",
    "which loss_fn does not take",
    "does not divide",
    "leading axis of length 4",
    "two ways to say",
    "nothing without momentum",
    "becomes one with rk_optax.precondition_by",
    "pass it as preconditioner=",
    "pass a loss_fn whose structure is known",
    "pass a loss_fn whose structure is known",
    "symmetric only with a diagonal",
    "not of one changed by momentum",
    "parts of the solver's own step",
    "itself, which makes a rule: call it",
    "needs an embedded error estimate",
    "which the tableau 'rk4' does not offer",
    "needs a solver for very long steps",
    "needs a 'loss'",
    "the solver's own mask= instead",
]


def page_rows():
    text = (Path(__file__).parents[1] / "docs" / "compose.md").read_text(encoding="utf-8")
    table = text.split("| This raises | because |\n|---|---|\n")[1].split("\n\n")[0]
    return [re.findall(r"`([^`]+)`", line.split(" | ")[0]) for line in table.splitlines()]


def test_the_table_of_the_page_has_a_message_for_every_row():
    assert len(page_rows()) == len(PAGE_MESSAGES)


@pytest.mark.parametrize(("snippets", "message"), list(zip(page_rows(), PAGE_MESSAGES, strict=False)))
def test_what_the_page_says_raises_does(snippets, message):
    w, seven = jnp.ones(3), jnp.ones((7, 3))

    def loss_fn(params, x):
        return jnp.mean((x @ params["w"]) ** 2)

    def update(tx, **data):
        params = {"w": w}
        return tx.update(params, tx.init(params), params, **data)

    names = {**vars(rk_optax), "optax": optax, "grad_fn": jax.grad(loss_fn)}
    names |= {"loss_fn": loss_fn, "update": update, "w": w, "seven": seven}
    *fine, raises = [snippet for snippet in snippets if "(" in snippet]
    for snippet in fine:
        eval(snippet, dict(names))
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        eval(raises, dict(names))
