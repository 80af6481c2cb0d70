"""Tableaus against independent oracles: nodepy, diffrax, scipy and closed forms."""

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import diffrax
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
from nodepy.runge_kutta_method import RKC1, ExplicitRungeKuttaMethod, loadRKM

import rk_optax
from rk_optax import methods
from rk_optax.methods import TABLEAUS
from rk_optax.tableau import ButcherTableau

KNOWN = ["euler", "heun", "midpoint", "ralston", "kutta3", "heun3", "ralston3", "ssprk3", "bogacki_shampine"]
KNOWN += ["rk4", "rk38", "ralston4", "fehlberg45", "cash_karp", "dopri5", "tsit5", "dopri8"]
NAMES = list(TABLEAUS)
PAIRS = [name for name in NAMES if TABLEAUS[name].b_hat is not None]
named = pytest.mark.parametrize("method", [pytest.param(TABLEAUS[name], id=name) for name in NAMES])
pairs = pytest.mark.parametrize("method", [pytest.param(TABLEAUS[name], id=name) for name in PAIRS])


def nodepy_order(a, b):
    return ExplicitRungeKuttaMethod(a, b).order(tol=1e-9)


def heun_arguments(**changes):
    arguments = {"name": "trial", "a": [[0, 0], [1, 0]], "b": [0.5, 0.5], "c": [0, 1], "order": 2}
    return arguments | {"b_hat": [1, 0], "order_hat": 1} | changes


# --- the named methods ---


def test_tables_hold_exactly_the_named_methods_and_each_has_a_constant_and_a_source():
    assert set(KNOWN) <= set(TABLEAUS)
    constants = [t for t in vars(methods).values() if isinstance(t, ButcherTableau)]
    assert {id(t) for t in constants} == {id(t) for t in (*TABLEAUS.values(), *rk_optax.IMPLICIT_TABLEAUS.values())}
    for name, method in TABLEAUS.items():
        assert method.name == name
        assert getattr(methods, name.upper()) is method
        assert method.source
    with pytest.raises(TypeError):
        TABLEAUS["mine"] = TABLEAUS["rk4"]  # pyright: ignore[reportIndexIssue]


@pytest.mark.covering(most=2)
@named
def test_nodepy_finds_exactly_the_declared_order(method):
    assert nodepy_order(method.a, method.b) == method.order


@pairs
def test_nodepy_finds_exactly_the_declared_embedded_order(method):
    assert nodepy_order(method.a, method.b_hat) == method.order_hat


def test_embedded_orders_are_those_the_methods_are_known_for():
    known = {
        **dict.fromkeys(("heun", "midpoint", "ralston"), (2, 1)),
        "bogacki_shampine": (3, 2),
        "fehlberg45": (4, 5),
        **dict.fromkeys(("cash_karp", "dopri5", "tsit5"), (5, 4)),
        "dopri8": (8, 7),
    }
    assert known.keys() == set(KNOWN) & set(PAIRS)
    assert {name: (TABLEAUS[name].order, TABLEAUS[name].order_hat) for name in known} == known


@named
def test_named_methods_are_explicit_with_row_sums_to_rounding(method):
    assert method.is_explicit
    np.testing.assert_allclose(method.a.sum(axis=1), method.c, rtol=0, atol=2e-15)


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("heun", diffrax.Heun),
        ("midpoint", diffrax.Midpoint),
        ("ralston", diffrax.Ralston),
        ("bogacki_shampine", diffrax.Bosh3),
        ("dopri5", diffrax.Dopri5),
        ("tsit5", diffrax.Tsit5),
        ("dopri8", diffrax.Dopri8),
    ],
)
def test_coefficients_are_those_of_diffrax(name, peer):
    method, peer = TABLEAUS[name], peer.tableau
    s = method.stages  # diffrax's Dopri8 has a 14th stage, of weight 0, for dense output
    assert not np.any(peer.b_sol[s:])
    rows = [np.pad(row, (0, s - len(row))) for row in peer.a_lower[: s - 1]]
    np.testing.assert_allclose(method.a, [np.zeros(s), *rows], rtol=2e-16, atol=2e-16)
    np.testing.assert_allclose(method.c, [0, *peer.c[: s - 1]], rtol=2e-16, atol=0)
    np.testing.assert_allclose(method.b, peer.b_sol[:s], rtol=2e-16, atol=0)
    error = method.b - method.b_hat
    if name == "dopri5":  # diffrax takes Shampine's embedded weights, of which the error is 2/3 of the original one
        error = error * 2 / 3
    sign = np.sign(error[0] * peer.b_error[0])
    np.testing.assert_allclose(sign * error, peer.b_error[:s], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "peer"),
    [("bogacki_shampine", scipy.integrate.RK23), ("dopri5", scipy.integrate.RK45)],
)
def test_coefficients_are_those_of_scipy(name, peer):
    method, s = TABLEAUS[name], peer.n_stages  # scipy keeps the last, error-only stage apart
    np.testing.assert_allclose(method.a[:s, : peer.A.shape[1]], peer.A, rtol=2e-16, atol=0)
    np.testing.assert_allclose(method.a[s, :s], peer.B, rtol=2e-16, atol=0)
    np.testing.assert_allclose(method.b, [*peer.B, 0], rtol=2e-16, atol=0)
    np.testing.assert_allclose(method.c[:s], peer.C, rtol=2e-16, atol=0)
    np.testing.assert_allclose(method.b_hat - method.b, peer.E, rtol=0, atol=2e-16)


def test_coefficients_are_those_of_nodepy_where_diffrax_and_scipy_have_none():
    library = loadRKM()
    for name, theirs in {"rk4": "RK44", "heun3": "Heun33", "ssprk3": "SSP33"}.items():
        np.testing.assert_array_equal(TABLEAUS[name].a, library[theirs].A.astype(float))
        np.testing.assert_array_equal(TABLEAUS[name].b, library[theirs].b.astype(float))
    for name, theirs in {"cash_karp": "CK5", "dopri8": "PD8", "fehlberg45": "Fehlberg45"}.items():
        mine, peer = TABLEAUS[name], library[theirs]
        weights = (mine.b, mine.b_hat)
        if name == "fehlberg45":  # nodepy steps with the weights of order 5
            weights = (mine.b_hat, mine.b)
        np.testing.assert_array_equal(mine.a, peer.A.astype(float))
        np.testing.assert_array_equal(weights[0], peer.b.astype(float))
        np.testing.assert_array_equal(weights[1], peer.bhat.astype(float))


# --- the order conditions ---


@pytest.mark.parametrize(
    "name", ["heun", "ssprk3", "bogacki_shampine", "rk4", "fehlberg45", "dopri5", "tsit5", "dopri8"]
)
def test_every_coefficient_wrong_by_1e_6_raises(name):
    method = TABLEAUS[name]
    exact = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}

    def construct(**changes):
        return ButcherTableau(**(exact | changes))

    construct()
    for array in ("a", "b", "c", "b_hat"):
        for index in np.argwhere(exact[array]) if exact[array] is not None else ():
            wrong = exact[array].copy()
            wrong[tuple(index)] += 1e-6
            with pytest.raises(ValueError, match=r"does not sum|misses the order"):
                construct(**{array: wrong})
            if array == "a":  # with the row sum mended it is the order conditions that object
                with pytest.raises(ValueError, match="misses the order"):
                    construct(a=wrong, c=wrong.sum(axis=1))


@named
def test_an_order_one_too_high_raises_and_says_which_to_declare(method):
    arguments = {"a": method.a, "b": method.b, "c": method.c}
    with pytest.raises(ValueError, match=f"misses the order-{method.order + 1} .* or declare order={method.order}$"):
        ButcherTableau("bold", **arguments, order=method.order + 1)


@pairs
def test_an_embedded_order_one_too_high_raises_and_says_which_to_declare(method):
    arguments = {"a": method.a, "b": method.b, "c": method.c, "order": method.order, "b_hat": method.b_hat}
    with pytest.raises(ValueError, match=f"b_hat misses .* or declare order_hat={method.order_hat}$"):
        ButcherTableau("bold", **arguments, order_hat=method.order_hat + 1)


def test_an_absurd_order_fails_at_the_first_condition_missed():
    with pytest.raises(ValueError, match="order-2 condition"):
        ButcherTableau("bold", [[0]], [1], [0], order=10**9)


def test_huge_coefficients_are_not_waved_through():
    with pytest.raises(ValueError, match="misses"):
        ButcherTableau("huge", [[0, 0], [1e200, 0]], [1 - 1e200, 1e200], [0, 1e200], order=4)
    with pytest.raises(ValueError, match="does not sum"):
        ButcherTableau("huge", [[0, 0], [1e12, 0]], [1, 0], [0, 1e12 + 1], order=1)


# --- arguments ---


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": 3}, TypeError, "name must be a str"),
        ({"source": None}, TypeError, "source must be a str"),
        ({"a": [["x", 0], [1, 0]]}, TypeError, "a must hold real numbers"),
        ({"a": [[None, 0], [1, 0]]}, TypeError, "a must hold real numbers"),
        ({"b": [0.5, 0.5j]}, TypeError, "b must hold real numbers"),
        ({"b": [True, False]}, TypeError, "b must hold real numbers"),
        ({"b": [Fraction(1, 2), "1/2"]}, TypeError, "b must hold real numbers"),
        ({"c": "01"}, TypeError, "c must hold real numbers"),
        ({"a": [[0], [1, 0]]}, ValueError, "a is not an array of numbers of one shape"),
        ({"a": 0.0}, ValueError, "a must be a square matrix"),
        ({"a": [[0, 0]]}, ValueError, "a must be a square matrix"),
        ({"a": np.zeros((0, 0))}, ValueError, "a must be a square matrix"),
        ({"b": [1]}, ValueError, r"b must have shape \(2,\)"),
        ({"c": [[0, 1]]}, ValueError, r"c must have shape \(2,\)"),
        ({"b_hat": [1, 0, 0]}, ValueError, r"b_hat must have shape \(2,\)"),
        ({"a": [[0, 0], [np.inf, 0]]}, ValueError, "a must be finite"),
        ({"b": [np.nan, 1]}, ValueError, "b must be finite"),
        ({"b_hat": [np.nan, 1]}, ValueError, "b_hat must be finite"),
        ({"order": 2.0}, TypeError, "order must be an int"),
        ({"order": True}, TypeError, "order must be an int"),
        ({"order_hat": "1"}, TypeError, "order_hat must be an int"),
        ({"order": 0}, ValueError, "order must be at least 1"),
        ({"order_hat": -1}, ValueError, "order_hat must be at least 1"),
        ({"order_hat": None}, ValueError, "order_hat is missing"),
        ({"b_hat": None}, ValueError, "b_hat is missing"),
        ({"b_hat": [0.5, 0.5]}, ValueError, "b_hat equals b"),
        ({"c": [0, 0.9]}, ValueError, r"row 1 of a .* does not sum to c\[1\] = 0.9.* is 0.1;"),
        ({"b": [0.5, 0.6]}, ValueError, r"b misses the order-1 condition sum b_i = 1 by 0.1; .* digits\)$"),
        ({"b_hat": [1, 1]}, ValueError, "b_hat misses the order-1 condition sum b_hat_i = 1 by 1;"),
    ],
)
def test_bad_argument_raises_with_a_message_that_names_it(changes, error, message):
    ButcherTableau(**heun_arguments())
    with pytest.raises(error, match=message):
        ButcherTableau(**heun_arguments(**changes))


def test_fractions_integers_and_float32_become_float64():
    third = Fraction(1, 3)
    method = ButcherTableau(
        "mixed", a=((0, 0), (2 * third, 0)), b=np.array([0.25, 0.75], np.float32), c=[0, 2 * third], order=np.int64(2)
    )
    assert {array.dtype for array in (method.a, method.b, method.c)} == {np.dtype(np.float64)}
    assert method.a[1, 0] == 2 / 3
    assert type(method.order) is int


@pairs
def test_arrays_are_read_only_copies_and_fields_are_frozen(method):
    given = method.a.copy()
    mine = ButcherTableau("mine", given, method.b, method.c, method.order, method.b_hat, method.order_hat)
    given[1, 0] = 7
    assert mine.a[1, 0] == method.a[1, 0]
    for twin in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        for array in (twin.a, twin.b, twin.c, twin.b_hat):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            twin.order = 1
        np.testing.assert_array_equal(twin.b_hat, method.b_hat)


def test_tableaus_hash_by_identity_so_that_they_can_be_static_arguments():
    twin = copy.copy(TABLEAUS["rk4"])
    assert len({TABLEAUS["rk4"], TABLEAUS["rk4"], twin}) == 2
    assert repr(TABLEAUS["dopri5"]) == "ButcherTableau('dopri5', stages=7, order=5(4))"


def test_tableau_does_not_import_jax():
    code = """
import sys, types
sys.modules["rk_optax"] = package = types.ModuleType("rk_optax")  # without the package's own imports
package.__path__ = sys.argv[1:]
import rk_optax.methods
assert rk_optax.methods.RK4.order == 4
assert not any(name.partition(".")[0] in ("jax", "jaxlib", "optax") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(Path(rk_optax.__file__).parent)], check=True)


# --- needed stages ---


@pytest.mark.parametrize("name", NAMES)
def test_stages_needed_without_error_estimate(name):
    skipped = {"bogacki_shampine": [3], "fehlberg45": [5], "dopri5": [6], "tsit5": [6]}.get(name, [])
    method = TABLEAUS[name]
    needed = method.needed_stages(with_error=False)
    assert needed == tuple(i for i in range(method.stages) if i not in skipped)
    assert method.effective_stages == len(needed)
    # The rest is a method of its own, of the same order.
    assert nodepy_order(method.a[np.ix_(needed, needed)], method.b[list(needed)]) == method.order


@pairs
def test_error_estimate_needs_every_stage(method):
    assert method.needed_stages(with_error=True) == tuple(range(method.stages))


def test_stage_that_only_feeds_a_needed_stage_is_needed_and_a_dead_one_is_not():
    # 0 feeds 2 feeds 3; stage 1 feeds stage 4 alone, and neither carries weight.
    a = np.zeros((5, 5))
    a[1, 0] = a[2, 0] = a[3, 2] = a[4, 1] = 0.5
    method = ButcherTableau("dead stage", a, [0, 0, 0, 1, 0], a.sum(axis=1), order=2)
    assert method.needed_stages(with_error=False) == (0, 2, 3)


def test_error_estimate_without_embedded_weights_raises():
    with pytest.raises(ValueError, match="rk4 has no embedded weights b_hat"):
        TABLEAUS["rk4"].needed_stages(with_error=True)


# --- stability ---


@pytest.mark.covering(most=2)
@named
def test_stability_polynomial_is_the_one_nodepy_finds(method):
    numerator, denominator = ExplicitRungeKuttaMethod(method.a, method.b).stability_function()
    assert denominator.order == 0
    expected = numerator.coeffs[::-1].astype(float)
    ours = method.stability_polynomial.coef
    assert len(ours) <= len(expected)
    np.testing.assert_allclose(np.pad(ours, (0, len(expected) - len(ours))), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in NAMES if TABLEAUS[name].effective_stages == TABLEAUS[name].order])
def test_stability_polynomial_of_as_many_stages_as_orders_is_the_truncated_exponential(name):
    method = TABLEAUS[name]
    expected = [1 / math.factorial(k) for k in range(method.order + 1)]
    np.testing.assert_allclose(method.stability_polynomial.coef, expected, rtol=1e-14)


# s stages of order s share the truncated exponential; -2.5127 and -2.7853 are the known limits for s = 3 and 4.
INTERVALS = {
    **dict.fromkeys(("euler", "heun", "midpoint", "ralston"), 2.0),
    **dict.fromkeys(("kutta3", "heun3", "ralston3", "ssprk3", "bogacki_shampine"), 2.5127453266183286),
    **dict.fromkeys(("rk4", "rk38", "ralston4"), 2.785293563405282),
    # R(z) = 1 + z + z²/2 + z³/6 + z⁴/24 + z⁵/120 + z⁶/600
    "dopri5": scipy.optimize.brentq(np.poly1d([1 / 600, -1 / 120, 1 / 24, -1 / 6, 1 / 2, -1, 0]), 3, 4, xtol=1e-13),
}


@pytest.mark.parametrize(("name", "interval"), INTERVALS.items())
def test_real_stability_interval_is_the_known_one(name, interval):
    assert TABLEAUS[name].real_stability_interval == pytest.approx(interval, abs=1e-10)


@named
def test_step_is_stable_inside_the_interval_and_unstable_just_outside(method):
    end = method.real_stability_interval

    def growth(t):  # by the stages themselves, not by the polynomial
        eye = np.eye(method.stages)
        return abs(1 - t * method.b @ np.linalg.solve(eye + t * method.a, np.ones(method.stages)))

    assert max(growth(t) for t in np.linspace(0, end, 500)) <= 1 + 1e-9
    assert growth(end * (1 + 1e-6)) > 1


@pytest.mark.parametrize("stages", [2, 3, 5, 8, 10])
def test_interval_goes_on_where_the_polynomial_only_touches_1(stages):
    undamped = RKC1(stages, 0)  # Chebyshev's polynomial, |R| = 1 at s - 1 interior points
    a = undamped.A.astype(float)
    method = ButcherTableau("undamped", a, undamped.b.astype(float), a.sum(axis=1), 1)
    assert method.real_stability_interval == pytest.approx(2 * stages**2, rel=1e-9)


def test_interval_ends_where_the_polynomial_leaves_even_if_it_returns():
    # R(z) = 1 + z + q z² + q p z³; q = 4/27, p = 1/27 is Chebyshev's, which touches -1 at z = -4.5.
    p, q = 1 / 27, 4 / 27 - 1e-3
    method = ButcherTableau("leaves", [[0, 0, 0], [p, 0, 0], [0, q, 0]], [0, 0, 1], [0, p, q], 1)

    def above_minus_1(t):
        return 2 - t + q * t**2 - q * p * t**3

    assert above_minus_1(4.5) < 0 < above_minus_1(10)
    expected = scipy.optimize.brentq(above_minus_1, 2, 4.5, xtol=1e-13)
    assert method.real_stability_interval == pytest.approx(expected, abs=1e-10)


def test_implicit_method_has_no_stability_polynomial():
    method = ButcherTableau("implicit Euler", [[1]], [1], [1], order=1)
    assert not method.is_explicit
    for query in ("stability_polynomial", "real_stability_interval"):
        with pytest.raises(ValueError, match="implicit Euler is not explicit"):
            getattr(method, query)
