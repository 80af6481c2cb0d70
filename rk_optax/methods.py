"""The named Runge-Kutta methods, as they were published, and the parametric families of explicit ones.

Every constant here that is a tableau is a named method, in `TABLEAUS` or in `IMPLICIT_TABLEAUS`. Fractions and decimals
are exact; `ButcherTableau` checks them and rounds to float64 once.
"""

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np

from rk_optax import _families
from rk_optax.tableau import ButcherTableau

# Families refuse larger coefficients: products of two of them cost float32 over half its digits.
_LARGEST_COEFFICIENT = 100


def _fractions(text: str) -> list[Fraction]:
    return [Fraction(word) for word in text.split()]


def _explicit(
    name: str,
    order: int,
    c: str,
    a: str,
    b: str,
    source: str,
    b_hat: str = "",
    order_hat: int | None = None,
    interpolant: list[list[Fraction]] | None = None,
) -> ButcherTableau:
    """A method as it is printed: `a` holds the rows below the first, separated by semicolons."""
    abscissae = _fractions(c)
    rows = [[], *map(_fractions, filter(None, a.split(";")))]
    square = [row + [Fraction()] * (len(abscissae) - len(row)) for row in rows]
    embedded = _fractions(b_hat) if b_hat else None
    return ButcherTableau(name, square, _fractions(b), abscissae, order, embedded, order_hat, source, interpolant)


def _product(*factors: str) -> list[Fraction]:
    """The coefficients, ascending, of a product of polynomials given by theirs."""
    total = [Fraction(1)]
    for factor in map(_fractions, factors):
        new = [Fraction()] * (len(total) + len(factor) - 1)
        for i, x in enumerate(total):
            for j, y in enumerate(factor):
                new[i + j] += x * y
        total = new
    return total


def _shampine(b: str, d: str) -> list[list[Fraction]]:
    """The weights of σ to σ⁴ of dopri5's dense output: Hermite's cubic, and σ²(1 − σ)² d."""
    rows = []
    for i, (weight, extra) in enumerate(zip(_fractions(b), _fractions(d), strict=True)):
        first, last = Fraction(i == 0), Fraction(i == 6)
        rows.append([first, 3 * weight - 2 * first - last + extra, first + last - 2 * weight - 2 * extra, extra])
    return rows


_EULER = "L. Euler, Institutionum calculi integralis I (1768)"
_RUNGE = "C. Runge, Math. Ann. 46 (1895) 167-178"
_HEUN = "K. Heun, Z. Math. Phys. 45 (1900) 23-38"
_KUTTA = "W. Kutta, Z. Math. Phys. 46 (1901) 435-453"
_RALSTON = "A. Ralston, Math. Comp. 16 (1962) 431-437"
_SHU = "C.-W. Shu, S. Osher, J. Comput. Phys. 77 (1988) 439-471, eq. (2.18)"
_BOGACKI = "P. Bogacki, L. F. Shampine, Appl. Math. Lett. 2 (1989) 321-325"
_FEHLBERG = "E. Fehlberg, NASA TR R-315 (1969), RK4(5) formula 2, table III"
_CASH = "J. R. Cash, A. H. Karp, ACM Trans. Math. Softw. 16 (1990) 201-222"
_DORMAND = "J. R. Dormand, P. J. Prince, J. Comput. Appl. Math. 6 (1980) 19-26, RK5(4)7M"
_TSITOURAS = "Ch. Tsitouras, Comput. Math. Appl. 62 (2011) 770-775, table 1"
_ALEXANDER = "R. Alexander, SIAM J. Numer. Anal. 14 (1977) 1006-1021"
_HAIRER = "E. Hairer, G. Wanner, Solving Ordinary Differential Equations II (1996), IV.5"
_PRINCE = "P. J. Prince, J. R. Dormand, J. Comput. Appl. Math. 7 (1981) 67-75, RK8(7)13M"

_DOPRI5_B = "35/384 0 500/1113 125/192 -2187/6784 11/84 0"
# Shampine, Math. Comp. 46 (1986) 135-150, as in Hairer, Nørsett and Wanner's DOPRI5.
_DOPRI5_DENSE = _shampine(
    _DOPRI5_B,
    "-12715105075/11282082432 0 87487479700/32700410799 -10690763975/1880347072 701980252875/199316789632"
    " -1453857185/822651844 69997945/29380423",
)
# Tsitouras (2011), as its factors are printed there; all but the first weight begin with σ².
_TSIT5_DENSE = [
    row[1:]
    for row in (
        _product("0 -1.0530884977290216", "-1.3299890189751412 1", "0.7139816917074209 -1.4364028541716351 1"),
        _product("0 0 0.1017", "1.2949852507374631 -2.1966568338249754 1"),
        _product("0 0 2.490627285651252793", "1.57803468208092486 -2.38535645472061657 1"),
        _product("0 0 -16.54810288924490272", "-1.21712927295533244 1", "-0.61620406037800089 1"),
        _product("0 0 47.37952196281928122", "-1.203071208372362603 1", "-0.658047292653547382 1"),
        _product("0 0 -34.87065786149660974", "-1.2 1", "-0.666666666666666667 1"),
        _product("0 0 2.5", "-1 1", "-0.6 1"),
    )
]

_SQRT5 = Fraction(math.isqrt(5 * 10**60), 10**30)  # to thirty digits
_RALSTON4_A = [
    [Fraction(0)] * 4,
    [Fraction(2, 5), *[Fraction(0)] * 3],
    [(-2889 + 1428 * _SQRT5) / 1024, (3785 - 1620 * _SQRT5) / 1024, *[Fraction(0)] * 2],
    [
        (-3365 + 2094 * _SQRT5) / 6040,
        (-975 - 3046 * _SQRT5) / 2552,
        (467040 + 203968 * _SQRT5) / 240845,
        Fraction(0),
    ],
]
_RALSTON4_B = [
    (263 + 24 * _SQRT5) / 1812,
    (125 - 1000 * _SQRT5) / 3828,
    (3426304 + 1661952 * _SQRT5) / 5924787,
    (30 - 4 * _SQRT5) / 123,
]
_RALSTON4_C = [Fraction(0), Fraction(2, 5), (14 - 3 * _SQRT5) / 16, Fraction(1)]

EULER = _explicit("euler", 1, "0", "", "1", _EULER)
HEUN = _explicit("heun", 2, "0 1", "1", "1/2 1/2", _HEUN, "1 0", 1)
MIDPOINT = _explicit("midpoint", 2, "0 1/2", "1/2", "0 1", _RUNGE, "1 0", 1)
RALSTON = _explicit("ralston", 2, "0 2/3", "2/3", "1/4 3/4", _RALSTON, "1 0", 1)
KUTTA3 = _explicit("kutta3", 3, "0 1/2 1", "1/2; -1 2", "1/6 2/3 1/6", _KUTTA)
HEUN3 = _explicit("heun3", 3, "0 1/3 2/3", "1/3; 0 2/3", "1/4 0 3/4", _HEUN)
RALSTON3 = _explicit("ralston3", 3, "0 1/2 3/4", "1/2; 0 3/4", "2/9 1/3 4/9", _RALSTON)
SSPRK3 = _explicit("ssprk3", 3, "0 1 1/2", "1; 1/4 1/4", "1/6 1/6 2/3", _SHU)
BOGACKI_SHAMPINE = _explicit(
    name="bogacki_shampine",
    order=3,
    c="0 1/2 3/4 1",
    a="1/2; 0 3/4; 2/9 1/3 4/9",
    b="2/9 1/3 4/9 0",
    b_hat="7/24 1/4 1/3 1/8",
    order_hat=2,
    source=_BOGACKI,
)
RK4 = _explicit("rk4", 4, "0 1/2 1/2 1", "1/2; 0 1/2; 0 0 1", "1/6 1/3 1/3 1/6", _KUTTA)
RK38 = _explicit("rk38", 4, "0 1/3 2/3 1", "1/3; -1/3 1; 1 -1 1", "1/8 3/8 3/8 1/8", _KUTTA)
RALSTON4 = ButcherTableau("ralston4", _RALSTON4_A, _RALSTON4_B, _RALSTON4_C, 4, source=_RALSTON)
FEHLBERG45 = _explicit(  # the step has order 4, the embedded method order 5
    name="fehlberg45",
    order=4,
    c="0 1/4 3/8 12/13 1 1/2",
    a="1/4; 3/32 9/32; 1932/2197 -7200/2197 7296/2197; 439/216 -8 3680/513 -845/4104;"
    "-8/27 2 -3544/2565 1859/4104 -11/40",
    b="25/216 0 1408/2565 2197/4104 -1/5 0",
    b_hat="16/135 0 6656/12825 28561/56430 -9/50 2/55",
    order_hat=5,
    source=_FEHLBERG,
)
CASH_KARP = _explicit(
    name="cash_karp",
    order=5,
    c="0 1/5 3/10 3/5 1 7/8",
    a="1/5; 3/40 9/40; 3/10 -9/10 6/5; -11/54 5/2 -70/27 35/27; 1631/55296 175/512 575/13824 44275/110592 253/4096",
    b="37/378 0 250/621 125/594 0 512/1771",
    b_hat="2825/27648 0 18575/48384 13525/55296 277/14336 1/4",
    order_hat=4,
    source=_CASH,
)
DOPRI5 = _explicit(
    name="dopri5",
    order=5,
    c="0 1/5 3/10 4/5 8/9 1 1",
    a="1/5; 3/40 9/40; 44/45 -56/15 32/9; 19372/6561 -25360/2187 64448/6561 -212/729;"
    "9017/3168 -355/33 46732/5247 49/176 -5103/18656;"
    "35/384 0 500/1113 125/192 -2187/6784 11/84",
    b=_DOPRI5_B,
    b_hat="5179/57600 0 7571/16695 393/640 -92097/339200 187/2100 1/40",
    order_hat=4,
    source=_DORMAND,
    interpolant=_DOPRI5_DENSE,
)
TSIT5 = _explicit(
    name="tsit5",
    order=5,
    c="0 0.161 0.327 0.9 0.9800255409045097 1 1",
    a="0.161; -0.008480655492356989 0.335480655492357;"
    "2.8971530571054935 -6.359448489975075 4.3622954328695815;"
    "5.325864828439257 -11.748883564062828 7.4955393428898365 -0.09249506636175525;"
    "5.86145544294642 -12.92096931784711 8.159367898576159 -0.071584973281401"
    " -0.028269050394068383;"
    "0.09646076681806523 0.01 0.4798896504144996 1.379008574103742 -3.290069515436081"
    " 2.324710524099774",
    b="0.09646076681806523 0.01 0.4798896504144996 1.379008574103742 -3.290069515436081 2.324710524099774 0",
    b_hat="0.09468075576583946 0.009183565540343253 0.4877705284247616 1.2342975669304790"
    " -2.7077123499835255 1.8666284181705870 1/66",
    order_hat=4,
    source=_TSITOURAS,
    interpolant=_TSIT5_DENSE,
)
DOPRI8 = _explicit(
    name="dopri8",
    order=8,
    c="0 1/18 1/12 1/8 5/16 3/8 59/400 93/200 5490023248/9719169821 13/20 1201146811/1299019798 1 1",
    a="1/18; 1/48 1/16; 1/32 0 3/32; 5/16 0 -75/64 75/64; 3/80 0 0 3/16 3/20;"
    "29443841/614563906 0 0 77736538/692538347 -28693883/1125000000 23124283/1800000000;"
    "16016141/946692911 0 0 61564180/158732637 22789713/633445777 545815736/2771057229"
    " -180193667/1043307555;"
    "39632708/573591083 0 0 -433636366/683701615 -421739975/2616292301 100302831/723423059"
    " 790204164/839813087 800635310/3783071287;"
    "246121993/1340847787 0 0 -37695042795/15268766246 -309121744/1061227803"
    " -12992083/490766935 6005943493/2108947869 393006217/1396673457 123872331/1001029789;"
    "-1028468189/846180014 0 0 8478235783/508512852 1311729495/1432422823"
    " -10304129995/1701304382 -48777925059/3047939560 15336726248/1032824649"
    " -45442868181/3398467696 3065993473/597172653;"
    "185892177/718116043 0 0 -3185094517/667107341 -477755414/1098053517 -703635378/230739211"
    " 5731566787/1027545527 5232866602/850066563 -4093664535/808688257 3962137247/1805957418"
    " 65686358/487910083;"
    "403863854/491063109 0 0 -5068492393/434740067 -411421997/543043805 652783627/914296604"
    " 11173962825/925320556 -13158990841/6184727034 3936647629/1978049680 -160528059/685178525"
    " 248638103/1413531060 0",
    b="14005451/335480064 0 0 0 0 -59238493/1068277825 181606767/758867731"
    " 561292985/797845732 -1041891430/1371343529 760417239/1151165299 118820643/751138087"
    " -528747749/2220607170 1/4",
    b_hat="13451932/455176623 0 0 0 0 -808719846/976000145 1757004468/5645159321"
    " 656045339/265891186 -3867574721/1518517206 465885868/322736535 53011238/667516719 2/45 0",
    order_hat=7,
    source=_PRINCE,
)

_R2, _R3 = math.sqrt(2), math.sqrt(3)
_G2 = 1 - 1 / _R2
_G3 = 0.43586652150845899942  # the root of γ³ − 3γ² + (3/2)γ − 1/6 that makes it L-stable
_B3 = -(6 * _G3**2 - 16 * _G3 + 1) / 4, (6 * _G3**2 - 20 * _G3 + 5) / 4

BACKWARD_EULER = ButcherTableau("backward_euler", [[1]], [1], [1], 1, source="A. L. Cauchy (1824)")
IMPLICIT_MIDPOINT = ButcherTableau("implicit_midpoint", [[0.5]], [1], [0.5], 2, source=_HAIRER)
TRAPEZOID = ButcherTableau(
    "trapezoid",
    [[0, 0], [0.5, 0.5]],
    [0.5, 0.5],
    [0, 1],
    2,
    source="J. Crank, P. Nicolson, Proc. Camb. Phil. Soc. 43 (1947)",
)
SDIRK2 = ButcherTableau("sdirk2", [[_G2, 0], [1 - _G2, _G2]], [1 - _G2, _G2], [_G2, 1], 2, [1, 0], 1, _ALEXANDER)
SDIRK3 = ButcherTableau(
    "sdirk3",
    [[_G3, 0, 0], [(1 - _G3) / 2, _G3, 0], [*_B3, _G3]],
    [*_B3, _G3],
    [_G3, (1 + _G3) / 2, 1],
    3,
    [_G3 / (1 - _G3), (1 - 2 * _G3) / (1 - _G3), 0],
    2,
    _ALEXANDER,
)
RADAU3 = ButcherTableau(
    "radau3", [[5 / 12, -1 / 12], [3 / 4, 1 / 4]], [3 / 4, 1 / 4], [1 / 3, 1], 3, source=f"{_HAIRER}, Radau IIA"
)
GAUSS4 = ButcherTableau(
    "gauss4",
    [[1 / 4, 1 / 4 - _R3 / 6], [1 / 4 + _R3 / 6, 1 / 4]],
    [1 / 2, 1 / 2],
    [1 / 2 - _R3 / 6, 1 / 2 + _R3 / 6],
    4,
    source=f"{_HAIRER}, Kuntzmann (1961)",
)

_NAMED = [constant for constant in tuple(globals().values()) if isinstance(constant, ButcherTableau)]
TABLEAUS: Mapping[str, ButcherTableau] = MappingProxyType({t.name: t for t in _NAMED if t.is_explicit})
"""The named explicit methods, by their names."""
IMPLICIT_TABLEAUS: Mapping[str, ButcherTableau] = MappingProxyType({t.name: t for t in _NAMED if not t.is_explicit})
"""The named implicit methods. Backward Euler, SDIRK2, SDIRK3 and Radau IIA are L-stable, the others A-stable only."""


def rk2(alpha: float) -> ButcherTableau:
    """Every two-stage method of order 2, c = (0, α), with the embedded Euler method; Ralston (1962).

    Args:
        alpha: A real number: 1/2 is the midpoint method, 2/3 Ralston's, 1 Heun's. Coefficients are
            formed exactly (a Fraction stays one) and rounded to float64 once.

    Returns:
        The checked tableau, s = 2.

    Raises:
        TypeError: If `alpha` is not a real number.
        ValueError: If it is not finite, is 0 or makes a coefficient exceed 100.

    Example:
        >>> rk2(0.5).b
        array([0., 1.])
    """
    x = _parameter("alpha", alpha)
    member = _Member(f"rk2(alpha={float(x):.6g})", {"alpha = 0": x}, "take rk2(2/3), say")
    return member.tableau(2, _families.rk2(x), _RALSTON, [1, 0])


def rk3(u: float, v: float) -> ButcherTableau:
    """The generic three-stage methods of order 3, c = (0, u, v); Kutta (1901).

    Args:
        u: A real number, as in `rk2`.
        v: A real number. (1/2, 1) is Kutta's method, (1/3, 2/3) Heun's, (1/2, 3/4) Ralston's and
            (1, 1/2) the strong-stability-preserving one.

    Returns:
        The checked tableau, s = 3.

    Raises:
        TypeError: If a parameter is not a real number.
        ValueError: If a parameter is not finite, the formulas divide by zero (u = 0, v = 0, u = v
            or u = 2/3) or a coefficient exceeds 100.

    Example:
        >>> rk3(1, 0.5).b * 6
        array([1., 1., 4.])
    """
    x, y = _parameter("u", u), _parameter("v", v)
    member = _Member(
        f"rk3(u={float(x):.6g}, v={float(y):.6g})",
        {"u = 0": x, "v = 0": y, "u = v": y - x, "u = 2/3": 2 - 3 * x},
        "take rk3(1/2, 3/4), say",
    )
    return member.tableau(3, _families.rk3(x, y), _KUTTA)


def rk4_family(u: float, v: float) -> ButcherTableau:
    """Kutta's generic four-stage methods of order 4, c = (0, u, v, 1); Kutta (1901).

    Args:
        u: A real number, as in `rk2`.
        v: A real number. (1/3, 2/3) is the 3/8 rule, (2/5, (14 - 3√5)/16) Ralston's method. The
            classical method, u = v = 1/2, is no member: the formulas divide by zero. Use `RK4`.

    Returns:
        The checked tableau, s = 4.

    Raises:
        TypeError: If a parameter is not a real number.
        ValueError: If a parameter is not finite, the formulas divide by zero (u or v in {0, 1},
            u = v, u = 1/2 or 6uv - 4(u + v) + 3 = 0) or a coefficient exceeds 100.

    Example:
        >>> rk4_family(Fraction(1, 3), Fraction(2, 3)).b * 8
        array([1., 3., 3., 1.])
    """
    x, y = _parameter("u", u), _parameter("v", v)
    d = 6 * x * y - 4 * (x + y) + 3
    member = _Member(
        f"rk4_family(u={float(x):.6g}, v={float(y):.6g})",
        {"u = 0": x, "v = 0": y, "u = 1": 1 - x, "v = 1": 1 - y, "u = v": y - x}
        | {"u = 1/2": 1 - 2 * x, "6uv - 4(u + v) + 3 = 0": d},
        "take rk4_family(1/3, 2/3), say, or RK4 for the classical method u = v = 1/2",
    )
    return member.tableau(4, _families.rk4(x, y), _KUTTA)


def _parameter(label: str, value: Any) -> Fraction:
    # Exact arithmetic from here on: the differences below would otherwise cancel digits.
    if isinstance(value, numbers.Rational) and not isinstance(value, bool):
        return Fraction(int(value.numerator), int(value.denominator))
    array = np.asarray(value)
    if array.ndim or array.dtype.kind not in "iuf":
        raise TypeError(f"{label} must be a real number, got {value!r}")
    if not np.isfinite(array):
        raise ValueError(f"{label} must be finite, got {value!r}")
    return Fraction(float(array))


@dataclass(frozen=True)
class _Member:
    """A member of a family: its call, the parameter sets it must keep away from, the way out."""

    call: str
    zeros: dict[str, Fraction]  # where the formulas divide by zero, and the divisor itself
    remedy: str

    def __post_init__(self) -> None:
        for condition, divisor in self.zeros.items():
            if divisor == 0:
                raise ValueError(
                    f"{self.call}: the family's formulas divide by zero at {condition} (and "
                    f"degenerate at any of {', '.join(self.zeros)}); {self.remedy}"
                )

    def tableau(
        self,
        order: int,
        formula: _families.Formula,
        source: str,
        b_hat: list[int] | None = None,
    ) -> ButcherTableau:
        b = list(formula.b)
        a = [[*row, *[0] * (len(b) - len(row))] for row in ((), *formula.a)]
        largest = max(abs(x) for x in (*b, *(x for row in a for x in row)))
        if largest > _LARGEST_COEFFICIENT:
            raise ValueError(
                f"{self.call}: a coefficient reaches {float(largest):.3g}, more than the "
                f"{_LARGEST_COEFFICIENT} beyond which cancellation costs float32 half its digits; "
                f"keep parameters of order 1 and away from {', '.join(self.zeros)}: {self.remedy}"
            )
        c = [sum(row) for row in a]
        order_hat = None if b_hat is None else 1
        return ButcherTableau(self.call, a, b, c, order, b_hat, order_hat, source)
