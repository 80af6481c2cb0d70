"""Families of tableaus: the named methods are members, random members have the order, bad parameters are refused."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from nodepy.runge_kutta_method import ExplicitRungeKuttaMethod

from rk_optax.methods import TABLEAUS, rk2, rk3, rk4_family


def nodepy_order(a, b):
    return ExplicitRungeKuttaMethod(a, b).order(tol=1e-9)


def assert_same_method(ours, expected):
    np.testing.assert_allclose(ours.a, expected.a, rtol=1e-15, atol=1e-15)  # of parameters rounded to float64
    np.testing.assert_allclose(ours.b, expected.b, rtol=0, atol=1e-15)
    np.testing.assert_allclose(ours.c, expected.c, rtol=0, atol=1e-15)
    assert ours.order == expected.order
    assert ours.order_hat in (expected.order_hat, None)


@pytest.mark.parametrize(
    ("member", "name"),
    [
        (rk2(0.5), "midpoint"),
        (rk2(2 / 3), "ralston"),
        (rk2(1), "heun"),
        (rk3(0.5, 1.0), "kutta3"),
        (rk3(1 / 3, 2 / 3), "heun3"),
        (rk3(0.5, 0.75), "ralston3"),
        (rk3(1, Fraction(1, 2)), "ssprk3"),
        (rk4_family(1 / 3, 2 / 3), "rk38"),
        (rk4_family(0.4, (14 - 3 * math.sqrt(5)) / 16), "ralston4"),
    ],
)
def test_families_pass_through_the_named_methods(member, name):
    assert_same_method(member, TABLEAUS[name])


def test_rk2_embeds_eulers_method():
    np.testing.assert_array_equal(rk2(0.7).b_hat, [1, 0])
    assert rk2(0.7).order_hat == 1


@pytest.mark.parametrize(("family", "order"), [(rk2, 2), (rk3, 3), (rk4_family, 4)])
def test_random_members_have_the_order_of_their_family(family, order):
    draw = random.Random(0)
    accepted = 0
    for _ in range(150):
        parameters = [draw.uniform(-1.5, 2.5) for _ in range(1 if family is rk2 else 2)]
        try:
            member = family(*parameters)
        except ValueError as error:  # near a degenerate set, never a missed condition
            if "a coefficient reaches" not in str(error):
                raise
            continue
        accepted += 1
        assert nodepy_order(member.a, member.b) == order
        np.testing.assert_allclose(member.c[1 : 1 + len(parameters)], parameters, rtol=1e-15)
        assert max(np.abs(member.a).max(), np.abs(member.b).max()) <= 100
    assert accepted >= 100


def test_members_so_near_0_over_0_that_floats_would_cancel_are_exact():
    # u = v = 1/2 is 0/0 in the formulas; on this line towards it the members tend to a method.
    u, v = 0.5 - 2e-9, 0.5 + 1e-9
    assert nodepy_order(rk4_family(u, v).a, rk4_family(u, v).b) == 4


@pytest.mark.parametrize(
    ("family", "parameters", "degenerate"),
    [
        (rk2, (0,), "alpha = 0"),
        (rk3, (0, 0.5), "u = 0"),
        (rk3, (0.5, 0.0), "v = 0"),
        (rk3, (0.5, 0.5), "u = v"),
        (rk3, (Fraction(2, 3), 0.5), "u = 2/3"),
        (rk4_family, (0, 0.5), "u = 0"),
        (rk4_family, (0.3, 0), "v = 0"),
        (rk4_family, (1, 0.5), "u = 1"),
        (rk4_family, (0.3, 1), "v = 1"),
        (rk4_family, (0.3, 0.3), "u = v"),
        (rk4_family, (0.5, 0.3), "u = 1/2"),
        (rk4_family, (Fraction(1, 4), Fraction(4, 5)), r"6uv - 4\(u \+ v\) \+ 3 = 0"),
    ],
)
def test_degenerate_parameters_raise_and_name_the_degenerate_set(family, parameters, degenerate):
    with pytest.raises(ValueError, match=f"{family.__name__}.* divide by zero at {degenerate} .*; take rk"):
        family(*parameters)


@pytest.mark.parametrize(
    ("family", "parameters"),
    [(rk2, (1e-9,)), (rk2, (1e9,)), (rk3, (2 / 3, 0.5)), (rk3, (0.5, 0.5 + 1e-12)), (rk4_family, (0.3, 1 - 1e-9))],
)
def test_nearly_degenerate_parameters_raise(family, parameters):
    with pytest.raises(ValueError, match=f"{family.__name__}.* a coefficient reaches .* away from .*: take rk"):
        family(*parameters)


def test_classical_rk4_is_pointed_to_where_the_generic_formulas_fail():
    with pytest.raises(ValueError, match="RK4 for the classical method u = v = 1/2"):
        rk4_family(0.5, 0.5)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("0.5", TypeError),
        (None, TypeError),
        (True, TypeError),
        (0.5j, TypeError),
        ([0.5], TypeError),
        (math.nan, ValueError),
        (math.inf, ValueError),
    ],
)
def test_bad_family_parameter_raises_with_a_message_that_names_it(value, error):
    for label, call in {
        "alpha": lambda: rk2(value),
        "u": lambda: rk3(value, 0.75),
        "v": lambda: rk4_family(0.4, value),
    }.items():
        with pytest.raises(error, match=f"^{label} must be"):
            call()


def test_family_parameters_may_be_scalars_of_any_real_type():
    for half in (0.5, np.float32(0.5), np.array(0.5), Fraction(1, 2)):
        assert_same_method(rk3(half, np.int64(1)), TABLEAUS["kutta3"])
