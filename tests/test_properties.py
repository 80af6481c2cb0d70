"""Properties of every optimizer, on random trees, dtypes, scales, tableaus, keywords and sequences of batches.

`RK_OPTAX_EXAMPLES=5000 python -m pytest tests/test_properties.py` draws as many examples of each, at random; by default
there are 200, always the same.
"""

import functools
import os

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from test_scale import three_updates
from training import assert_same, types

import rk_optax
from rk_optax import Reason
from rk_optax.traced_tableau import TracedTableau

pytestmark = pytest.mark.latest

EXAMPLES = int(os.environ.get("RK_OPTAX_EXAMPLES", "200"))


def properties(share=1):
    """Draws a share of the examples, fewer where each is a program of its own."""
    return hypothesis.settings(
        max_examples=max(EXAMPLES // share, 1),
        derandomize=EXAMPLES <= 200,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # x64 may stay on between examples
    )


def fractions(most, parts=8):
    """Numbers k/parts, so that zeros are frequent and examples are short."""
    return st.integers(-most * parts, most * parts).map(lambda k: k / parts)


def nested(leaf):
    """Trees of one to three such leaves and of None, in lists, tuples and dicts."""
    children = functools.partial(st.lists, st.one_of(leaf, st.none()), min_size=1, max_size=3)
    containers = children().flatmap(
        lambda leaves: st.sampled_from(
            [leaves, tuple(leaves), dict(zip("abc", leaves, strict=False)), {"deeper": [tuple(leaves), {}]}]
        )
    )
    return st.one_of(leaf, containers)


# --- Tableaus --------------------------------------------------------------------------------------------------------


@st.composite
def tableaus(draw):
    """Any explicit tableau of order 1 with up to five stages; with embedded weights, or without."""
    s = draw(st.integers(1, 5))
    a = np.zeros((s, s))
    a[np.tril_indices(s, -1)] = draw(st.lists(fractions(1), min_size=s * (s - 1) // 2, max_size=s * (s - 1) // 2))
    if draw(st.booleans()):
        a *= np.eye(s, k=-1)  # each stage looks back only to the one before it

    def weights():
        free = draw(st.lists(fractions(1), min_size=s - 1, max_size=s - 1))
        return np.array([1 - sum(free), *free])

    b, b_hat = weights(), weights()
    embedded = {} if s == 1 or np.array_equal(b, b_hat) else {"b_hat": b_hat, "order_hat": 1}
    return rk_optax.ButcherTableau("random", a, b, a.sum(axis=1), 1, **embedded)


def coupled_loss(params, rates):
    """Every number is seen by the gradient of every other."""
    leaves = jax.tree.leaves(params)
    total = sum((jnp.sum(leaf) for leaf in leaves), 0.0)
    return sum((0.5 * r * jnp.sum(leaf**2) for r, leaf in zip(rates, leaves, strict=False)), total**4 / 4)


def coupled_gradient(leaves, rates):
    total = sum(float(np.sum(leaf)) for leaf in leaves)
    return [r * leaf + total**3 for r, leaf in zip(rates, leaves, strict=False)]


def textbook_step(tableau, theta, rates, h):
    """The update of some arrays, and the gradient at them."""
    ks = []
    for row in tableau.a:
        moved = [x - h * sum((a * k[i] for a, k in zip(row, ks, strict=False)), 0 * x) for i, x in enumerate(theta)]
        ks.append(coupled_gradient(moved, rates))
    return [-h * sum(b * k[i] for b, k in zip(tableau.b, ks, strict=True)) for i in range(len(theta))], ks[0]


RATES = st.lists(fractions(2), min_size=3, max_size=3)
STEPS = st.sampled_from([0.0, 0.1, 0.5])
SHAPES = st.sampled_from([(), (2,), (1, 2), (0,)])


@properties(8)
@hypothesis.given(tableaus(), nested(st.tuples(SHAPES, fractions(1))), RATES, STEPS, st.booleans())
def test_a_step_of_any_tree_is_that_of_the_textbook(x64, tableau, tree, rates, h, unroll):
    def is_leaf(x):
        return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], float)

    def array(leaf):
        shape, first = leaf
        return first + 0.25 * np.arange(np.prod(shape)).reshape(shape)

    params = jax.tree.map(array, tree, is_leaf=is_leaf)
    expected, k1 = textbook_step(tableau, jax.tree.leaves(params), rates, h)
    with jax.disable_jit():
        tx = rk_optax.runge_kutta(coupled_loss, lambda count: h, rk_optax.Explicit(tableau, unroll=unroll))
        params = jax.tree.map(jnp.asarray, params)
        gradient = jax.tree.unflatten(jax.tree.structure(params), [jnp.asarray(k) for k in k1])
        updates, state = tx.update(gradient, tx.init(params), params, rates=rates)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for found, right in zip(jax.tree.leaves(updates), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-10, atol=1e-12)
    assert int(state.cost.gradients) == len(tableau.needed_stages(with_error=False))


@jax.jit
def traced_update(method, theta, rates, h):
    """One program for each number of stages."""
    s = len(method["b"])
    tableau = TracedTableau("random", method["rows"], method["b"], [0.0] * s, 1)
    tx = rk_optax.runge_kutta(coupled_loss, h, rk_optax.Explicit(tableau))
    gradient = jax.grad(coupled_loss)(theta, rates)
    return tx.update(gradient, tx.init(theta), theta, rates=rates)[0]


@pytest.mark.slow
@properties()
@hypothesis.given(tableaus(), st.lists(fractions(2), min_size=3, max_size=3), RATES, STEPS)
def test_a_step_with_coefficients_that_are_inputs_is_that_of_the_textbook(x64, tableau, start, rates, h):
    theta = [np.array(start[:2]), np.array(start[2])]
    method = {"b": tableau.b.tolist(), "rows": [tableau.a[i, :i].tolist() for i in range(1, tableau.stages)]}
    expected, _ = textbook_step(tableau, theta, rates, h)
    for found, right in zip(traced_update(method, theta, rates, h), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-10, atol=1e-12)


# --- Trees and dtypes ------------------------------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "float16", "complex64")
STABILITY = {
    "euler": lambda z: z,
    "heun": lambda z: z + z**2 / 2,
    "rk4": lambda z: z + z**2 / 2 + z**3 / 6 + z**4 / 24,
}
LEAVES = st.tuples(
    st.sampled_from(DTYPES), st.sampled_from([(), (2,), (0,)]), st.sampled_from([0.0, 0.5, 3.0]), st.booleans()
)


@properties(4)
@hypothesis.given(nested(LEAVES), st.sampled_from(sorted(STABILITY)), st.booleans(), st.booleans())
def test_updates_are_like_the_parameters_whatever_those_are(tree, method, momentum, broken):
    """And a step that is refused is zero and leaves the state as it was."""

    def is_leaf(x):
        return isinstance(x, tuple) and len(x) == 4 and x[0] in DTYPES

    def of(part):
        return jax.tree.map(part, tree, is_leaf=is_leaf)

    params = of(lambda leaf: jnp.full(leaf[1], 1.5, leaf[0]) * (1 - 0.5j if leaf[0] == "complex64" else 1))
    mask, rates = of(lambda leaf: leaf[3]), of(lambda leaf: leaf[2])

    def loss(params, factor):
        def size(rate, p):
            return 0.5 * rate * jnp.sum(jnp.abs(p.astype(jnp.result_type(p, 1.0))) ** 2)

        sizes = jax.tree.map(size, rates, params)
        return factor * sum(jax.tree.leaves(sizes), jnp.zeros([]))

    h, factor = 0.25, np.float32(np.nan if broken else 1)
    with jax.disable_jit():
        tx = getattr(rk_optax, method)(loss, h, mask=mask, momentum=0.9 if momentum else None)
        gradient = jax.tree.map(lambda r, p: (factor * r * p).astype(p.dtype), rates, params)
        before = tx.init(params)
        updates, state = tx.update(gradient, before, params, factor=factor)
    assert types(updates) == types(params)
    assert types(state) == types(before)
    moving = [leaf for leaf, moves in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True) if moves]
    refused = broken and any(leaf.size for leaf in moving)
    assert bool(state.accepted) != refused
    if refused:
        assert_same(updates, jax.tree.map(jnp.zeros_like, params))
        assert_same((state.after, state.solver, state.time), (before.after, before.solver, before.time))
        assert (int(state.reason), int(state.rejected)) == (Reason.NOT_FINITE, 1)
        return
    for update, p, r, moves in zip(*map(jax.tree.leaves, (updates, params, rates, mask)), strict=True):
        right = np.asarray(p.astype(jnp.result_type(p, np.float32))) * (STABILITY[method](-h * r) if moves else 0)
        tolerance = 3 * float(jnp.finfo(p.dtype).eps)
        np.testing.assert_allclose(update.astype(right.dtype), right, rtol=tolerance)


# --- Scales ----------------------------------------------------------------------------------------------------------

COMBINATIONS = [("rk4", "descent"), ("rkc", "descent"), ("rosenbrock_euler", "trust"), ("residual_euler", "descent")]
EXPONENTS = st.floats(-25, 25)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("optimizer", "rule"), COMBINATIONS)
@properties()
@hypothesis.given(EXPONENTS, EXPONENTS, st.floats(-30, 30))
def test_no_scale_of_loss_parameters_or_inert_leaf_changes_a_step(optimizer, rule, of_loss, of_length, of_inert):
    # h goes with length²/c and the gradient with c/length: both are to be numbers of float32, with room.
    hypothesis.assume(abs(2 * of_length - of_loss) <= 27 and abs(of_loss - of_length) <= 27)
    run = three_updates(optimizer, rule)
    expected, _, accepted = run(1.0, 1.0, 1.0)
    found, inert, taken = run(*(10.0**exponent for exponent in (of_loss, of_length, of_inert)))
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    assert np.all(taken == accepted)
    assert not np.any(inert)


# --- Keywords --------------------------------------------------------------------------------------------------------


def loss_fn(w, x):
    return jnp.sum((w - x) ** 2)


# Values that are right, and values that are wrong, for which a message has to name the argument.
KEYWORDS = {
    "learning_rate": ([0.1, optax.constant_schedule(0.1), rk_optax.dal(0.5)], [-1.0, np.nan, "fast", rk_optax.dal]),
    "momentum": ([None, 0.0, 0.9], [1.0, -0.1, "much"]),
    "weight_decay": ([None, 0.0, 1e-3], [-1.0, np.inf]),
    "l2": ([None, 0.0, 1e-3], [-1.0, "some"]),
    "preconditioner": ([None, rk_optax.precondition_by_adam()], [rk_optax.precondition_by_adam, optax.adam(1e-3)]),
    "after": ([optax.trace(0.5)], [optax.adam(1e-3), optax.trace, 3, rk_optax.precondition_by_adam()]),
    "stage_dtype": (["float32", None, jnp.float32], ["int32", "float33"]),
    "stage_batches": (["same"], ["other", 3]),
    "has_aux": ([False], []),
    "reuse_updates": ([True, False], []),
    "skip_nonfinite": ([True, False], []),
    "mask": ([None, True, lambda w: True], []),
    "argnames": ([None, ["x"]], []),
    "grad_fn": ([None, jax.grad(loss_fn)], [3]),
    "batch_argnames": ([()], [["x"]]),  # which does nothing with stage_batches="same"
    "nesterov": ([False], []),
}
MISSPELT = ("learning_rte", "momentun", "weight_decy", "hasaux", "stage_dtpye", "preconditoner", "skip_nonfinit")


@st.composite
def keyword_sets(draw):
    """Some keywords, and the names of those that are wrong."""
    names = draw(st.sets(st.sampled_from(sorted(KEYWORDS)), max_size=5))
    chosen, wrong = {}, set()
    for name in sorted(names | {"learning_rate"}):
        right_ones, wrong_ones = KEYWORDS[name]
        bad = bool(wrong_ones) and draw(st.integers(0, 5)) == 0
        chosen[name] = draw(st.sampled_from(wrong_ones if bad else right_ones))
        wrong |= {name} if bad else set()
    if "after" in chosen and chosen.get("momentum") is not None:
        wrong |= {"after"}
    if draw(st.integers(0, 5)) == 0:
        name = draw(st.sampled_from(MISSPELT))
        chosen[name] = 1.0
        wrong |= {name}
    return chosen, wrong


@properties()
@hypothesis.given(keyword_sets(), st.sampled_from(["euler", "heun", "rk4", "dopri5"]))
def test_a_set_of_keywords_works_or_the_message_names_a_wrong_one(keywords, method):
    chosen, wrong = keywords
    make = getattr(rk_optax, method)
    if wrong:
        with pytest.raises((TypeError, ValueError)) as error:
            make(loss_fn, **chosen)
        assert any(name in str(error.value) for name in wrong), str(error.value)
        return
    w = jnp.ones(2)
    tx = make(loss_fn, **chosen)
    updates, state = jax.eval_shape(lambda w: tx.update(w, tx.init(w), w, x=w), w)
    assert types(updates) == types(w)
    assert types(state) == types(tx.init(w))


DATA = ("x", "labels", "rng")
OTHERS = ("value", "grad", "value_fn", "step", "loss", "lables", "X", "rgn", "epoch", "teacher")


@pytest.mark.slow
@properties()
@hypothesis.given(st.sets(st.sampled_from(DATA)), st.sets(st.sampled_from(OTHERS)), st.sets(st.sampled_from(DATA)))
def test_data_that_are_missing_or_misspelt_are_named_and_others_are_ignored(names, others, given):
    body = "+".join(["jnp.sum(w)", *(f"0 * {name}" for name in sorted(names))])
    loss = eval(f"lambda w, {', '.join(sorted(names))}: {body}" if names else f"lambda w: {body}", {"jnp": jnp})
    w = jnp.ones(2)
    tx = rk_optax.heun(loss, 0.1)
    data = dict.fromkeys(given | others, 1.0)

    def update():
        return jax.eval_shape(lambda w: tx.update(w, tx.init(w), w, **data)[0], w)

    missing = names - given
    if not missing:
        assert update().shape == (2,)
        return
    with pytest.raises(TypeError) as error:
        update()
    assert any(repr(name) in str(error.value) for name in missing), str(error.value)


# --- What comes one after the other ----------------------------------------------------------------------------------

KINDS = ("good", "no gradient", "not finite", "not finite at a later stage", "steep", "flat")
RULES = {
    "constant": (rk_optax.rk4, 0.05),
    "dal": (rk_optax.heun, rk_optax.dal(0.5)),
    "free": (rk_optax.heun, rk_optax.dal(0.5, estimate="free")),
    "sgd_g2": (rk_optax.euler, rk_optax.sgd_g2(0.1)),
    "error": (rk_optax.bogacki_shampine, rk_optax.error_control(1e-2, 1e-3)),
    "descent": (rk_optax.rk4, rk_optax.descent_control()),
    "rkc": (rk_optax.rkc, rk_optax.descent_control()),
}
LENGTH = 12


def batch_loss(w, slope, curvature, edge):
    """A quadratic, with a gradient that is not finite left of the edge."""
    value = slope * jnp.sum(w) + 0.5 * curvature * jnp.sum(jnp.array([1.0, 3.0]) * w**2)
    return jnp.where(w[0] < edge, jnp.nan, 1.0) * value


BATCHES = {
    "good": (0.1, 1.0, -1e9),
    "no gradient": (0.0, 0.0, -1e9),
    "not finite": (np.nan, 1.0, -1e9),
    "not finite at a later stage": (1e3, 1.0, 0.999),
    "steep": (1e20, 1e20, -1e9),
    "flat": (1e-20, 1e-20, -1e9),
}


@functools.cache
def runner(rule):
    make, rate = RULES[rule]
    tx = make(batch_loss, rate)

    @jax.jit
    def run(batches):
        def step(carry, batch):
            w, state = carry
            batch = dict(zip(("slope", "curvature", "edge"), batch, strict=True))
            updates, state = tx.update(jax.grad(batch_loss)(w, **batch), state, w, **batch)
            return (w, state), (updates, state)  # always from the same place

        w = jnp.array([1.0, -2.0])
        return jax.lax.scan(step, (w, tx.init(w)), batches)[1]

    return run


@pytest.mark.covering(most=3)
@pytest.mark.parametrize("rule", RULES)
@properties()
@hypothesis.given(st.lists(st.sampled_from(KINDS), min_size=LENGTH, max_size=LENGTH))
def test_whatever_comes_state_stays_finite_and_what_is_refused_is_zero(rule, kinds):
    """And a stage 1 that is not finite moves no step size."""
    batches = tuple(np.array([BATCHES[kind] for kind in kinds], np.float32).T)
    updates, state = jax.tree.map(np.asarray, runner(rule)(batches))
    for leaf in jax.tree.leaves((updates, state)):
        assert np.isfinite(leaf).all()
    assert not updates[~state.accepted].any()
    assert (state.accepted == (state.reason == Reason.ACCEPTED)).all()
    assert (state.rejected == np.cumsum(~state.accepted)).all()
    assert (np.diff(state.cost.gradients, prepend=0) >= 1).all()
    poisoned = np.array([kind == "not finite" for kind in kinds])
    assert not state.accepted[poisoned].any()
    if hasattr(state.rule, "next_step_size"):
        h = state.rule.next_step_size
        assert (h > 0).all()
        assert all(h[i] == h[i - 1] for i in np.flatnonzero(poisoned) if i)
