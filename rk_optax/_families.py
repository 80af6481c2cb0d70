"""The parametric families of explicit methods as formulas, in whatever arithmetic their parameters have.

Fractions give `tableau.py` exact coefficients; floats and JAX arrays give `rk_optax.networks.families` traced ones.
"""

from typing import Any, NamedTuple


class Formula(NamedTuple):
    """Rows of a below its diagonal, and b; c_i is the sum of row i."""

    a: tuple[tuple[Any, ...], ...]
    b: tuple[Any, ...]


def rk2(u: Any) -> Formula:
    """Order 2, c = (0, u)."""
    weight = 1 / (2 * u)
    return Formula(((u,),), (1 - weight, weight))


def rk3(u: Any, v: Any) -> Formula:
    """Order 3, c = (0, u, v)."""
    b2 = (3 * v - 2) / (6 * u * (v - u))
    b3 = (2 - 3 * u) / (6 * v * (v - u))
    a32 = v * (v - u) / (u * (2 - 3 * u))
    return Formula(((u,), (v - a32, a32)), (1 - b2 - b3, b2, b3))


def rk4(u: Any, v: Any) -> Formula:
    """Order 4, c = (0, u, v, 1)."""
    d = 6 * u * v - 4 * (u + v) + 3
    b2 = (2 * v - 1) / (12 * u * (v - u) * (1 - u))
    b3 = (1 - 2 * u) / (12 * v * (v - u) * (1 - v))
    b4 = d / (12 * (1 - u) * (1 - v))
    a32 = v * (v - u) / (2 * u * (1 - 2 * u))
    a42 = (1 - u) * (u + v - 1 - (2 * v - 1) ** 2) / (2 * u * (v - u) * d)
    a43 = (1 - 2 * u) * (1 - u) * (1 - v) / (v * (v - u) * d)
    return Formula(((u,), (v - a32, a32), (1 - a42 - a43, a42, a43)), (1 - b2 - b3 - b4, b2, b3, b4))


# The lines of order 4 on which the formulas of rk4 divide by zero, with u a weight.


def rk4_u1(u: Any) -> Formula:
    """Order 4, c = (0, 1/2, 0, 1), u the weight of the third stage."""
    one = u * 0 + 1
    a32 = 1 / (12 * u)
    return Formula(
        ((one / 2,), (-a32, a32), (1 - one * 3 / 2 - 6 * u, one * 3 / 2, 6 * u)),
        (one / 6 - u, one * 2 / 3, u, one / 6),
    )


def rk4_u2(u: Any) -> Formula:
    """Order 4, c = (0, 1/2, 1/2, 1), u the weight of the third stage; the classical method is u = 1/3."""
    one = u * 0 + 1
    a32 = 1 / (6 * u)
    return Formula(((one / 2,), (one / 2 - a32, a32), (0, 1 - 3 * u, 3 * u)), (one / 6, one * 2 / 3 - u, u, one / 6))


def rk4_u3(u: Any) -> Formula:
    """Order 4, c = (0, 1, 1/2, 1), u the weight of the fourth stage."""
    one = u * 0 + 1
    a42, a43 = -1 / (12 * u), 1 / (3 * u)
    return Formula(((one,), (one * 3 / 8, one / 8), (1 - a42 - a43, a42, a43)), (one / 6, one / 6 - u, one * 2 / 3, u))
