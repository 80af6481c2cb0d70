"""The rooted-tree conditions against printed tables and methods of known order."""

from fractions import Fraction

import numpy as np
import pytest

from rk_optax._order_conditions import _trees, missed_condition
from rk_optax.tableau import ButcherTableau


def gauss(stages):
    """The implicit Gauss method of order 2s, by collocation."""
    nodes, weights = np.polynomial.legendre.leggauss(stages)
    c, powers = (nodes + 1) / 2, np.arange(stages)
    a = (c[:, None] ** (powers + 1) / (powers + 1)) @ np.linalg.inv(c[:, None] ** powers)
    return a, weights / 2, c


def test_number_of_rooted_trees_of_each_order_is_known():
    # The On-Line Encyclopedia of Integer Sequences, A000081.
    assert [len(_trees(n)[0]) for n in range(1, 11)] == [1, 1, 2, 4, 9, 20, 48, 115, 286, 719]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_gauss_methods_have_order_2s_and_no_more(stages):
    a, b, c = gauss(stages)
    ButcherTableau("gauss", a, b, c, 2 * stages)
    with pytest.raises(ValueError, match=f"order-{2 * stages + 1} condition"):
        ButcherTableau("gauss", a, b, c, 2 * stages + 1)


# Hairer, Nørsett and Wanner, "Solving Ordinary Differential Equations I", 1993, table II.2.2.
CONDITIONS = [
    "sum b_i = 1",
    "sum b_i c_i = 1/2",
    "sum b_i c_i^2 = 1/3",
    "sum b_i a_ij c_j = 1/6",
    "sum b_i c_i^3 = 1/4",
    "sum b_i c_i a_ij c_j = 1/8",
    "sum b_i a_ij c_j^2 = 1/12",
    "sum b_i a_ij a_jk c_k = 1/24",
    "sum b_i c_i^4 = 1/5",
    "sum b_i c_i^2 a_ij c_j = 1/10",
    "sum b_i c_i a_ij c_j^2 = 1/15",
    "sum b_i c_i a_ij a_jk c_k = 1/30",
    "sum b_i a_ij c_j a_ik c_k = 1/20",
    "sum b_i a_ij c_j^3 = 1/20",
    "sum b_i a_ij c_j a_jk c_k = 1/40",
    "sum b_i a_ij a_jk c_k^2 = 1/60",
    "sum b_i a_ij a_jk a_kl c_l = 1/120",
]


def read_condition(text, a):
    """The vector Φ_i and the right-hand side of a condition of the table, evaluated as it is printed."""
    left, right = text.removeprefix("sum b_i").split("=")
    factors = [factor.partition("^") for factor in left.split()]
    repeated = [name for name, _, power in factors for _ in range(int(power or 1))]
    indices = ",".join(["i", *(name[2:] for name in repeated)])
    operands = [a if name.startswith("a") else a.sum(axis=1) for name in repeated]
    return np.einsum(f"{indices}->i", np.ones(len(a)), *operands), float(Fraction(right.strip()))


@pytest.mark.parametrize("text", CONDITIONS)
def test_every_condition_to_order_5_is_checked_by_itself_and_named_as_printed(text):
    # On 20 random stages weights exist that meet all 17 conditions, or all but the one in question.
    a = np.random.default_rng(0).uniform(-1, 1, (20, 20)) / 5
    phi, targets = (np.array(x) for x in zip(*(read_condition(t, a) for t in CONDITIONS), strict=True))
    wrong = 0.01 * np.array([t == text for t in CONDITIONS])
    right_weights, wrong_weights = (np.linalg.lstsq(phi, x, rcond=None)[0] for x in (targets, targets + wrong))
    assert missed_condition(a, right_weights, 5) is None
    miss = missed_condition(a, wrong_weights, 5)
    assert miss is not None
    assert miss.text == text
    assert miss.order == 1 + sum(int(f.partition("^")[2] or 1) for f in text.split() if f[0] in "ac")
    assert miss.defect == pytest.approx(0.01, rel=1e-6)
