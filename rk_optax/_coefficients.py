"""The published coefficients of the named Runge-Kutta methods, as exact fractions or decimals.

Read by `tableau.py`, which checks every claim made here and rounds to float64.
"""

import math
from fractions import Fraction
from typing import NamedTuple


class Published(NamedTuple):
    """Arguments of a `ButcherTableau`, in its order and without the name."""

    a: list[list[Fraction]]
    b: list[Fraction]
    c: list[Fraction]
    order: int
    b_hat: list[Fraction] | None
    order_hat: int | None
    source: str
    interpolant: list[list[Fraction]] | None = None


def _fractions(text: str) -> list[Fraction]:
    return [Fraction(word) for word in text.split()]


def _explicit(
    order: int,
    c: str,
    a: str,
    b: str,
    source: str,
    b_hat: str = "",
    order_hat: int | None = None,
    interpolant: list[list[Fraction]] | None = None,
) -> Published:
    """A method as it is printed: `a` holds the rows below the first, separated by semicolons."""
    abscissae = _fractions(c)
    rows = [[], *map(_fractions, filter(None, a.split(";")))]
    square = [row + [Fraction()] * (len(abscissae) - len(row)) for row in rows]
    embedded = _fractions(b_hat) if b_hat else None
    return Published(square, _fractions(b), abscissae, order, embedded, order_hat, source, interpolant)


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

PUBLISHED = {
    "euler": _explicit(1, "0", "", "1", _EULER),
    "heun": _explicit(2, "0 1", "1", "1/2 1/2", _HEUN, "1 0", 1),
    "midpoint": _explicit(2, "0 1/2", "1/2", "0 1", _RUNGE, "1 0", 1),
    "ralston": _explicit(2, "0 2/3", "2/3", "1/4 3/4", _RALSTON, "1 0", 1),
    "kutta3": _explicit(3, "0 1/2 1", "1/2; -1 2", "1/6 2/3 1/6", _KUTTA),
    "heun3": _explicit(3, "0 1/3 2/3", "1/3; 0 2/3", "1/4 0 3/4", _HEUN),
    "ralston3": _explicit(3, "0 1/2 3/4", "1/2; 0 3/4", "2/9 1/3 4/9", _RALSTON),
    "ssprk3": _explicit(3, "0 1 1/2", "1; 1/4 1/4", "1/6 1/6 2/3", _SHU),
    "bogacki_shampine": _explicit(
        order=3,
        c="0 1/2 3/4 1",
        a="1/2; 0 3/4; 2/9 1/3 4/9",
        b="2/9 1/3 4/9 0",
        b_hat="7/24 1/4 1/3 1/8",
        order_hat=2,
        source=_BOGACKI,
    ),
    "rk4": _explicit(4, "0 1/2 1/2 1", "1/2; 0 1/2; 0 0 1", "1/6 1/3 1/3 1/6", _KUTTA),
    "rk38": _explicit(4, "0 1/3 2/3 1", "1/3; -1/3 1; 1 -1 1", "1/8 3/8 3/8 1/8", _KUTTA),
    "ralston4": Published(_RALSTON4_A, _RALSTON4_B, _RALSTON4_C, 4, None, None, _RALSTON),
    "fehlberg45": _explicit(  # the step has order 4, the embedded method order 5
        order=4,
        c="0 1/4 3/8 12/13 1 1/2",
        a="1/4; 3/32 9/32; 1932/2197 -7200/2197 7296/2197; 439/216 -8 3680/513 -845/4104;"
        "-8/27 2 -3544/2565 1859/4104 -11/40",
        b="25/216 0 1408/2565 2197/4104 -1/5 0",
        b_hat="16/135 0 6656/12825 28561/56430 -9/50 2/55",
        order_hat=5,
        source=_FEHLBERG,
    ),
    "cash_karp": _explicit(
        order=5,
        c="0 1/5 3/10 3/5 1 7/8",
        a="1/5; 3/40 9/40; 3/10 -9/10 6/5; -11/54 5/2 -70/27 35/27; 1631/55296 175/512 575/13824 44275/110592 253/4096",
        b="37/378 0 250/621 125/594 0 512/1771",
        b_hat="2825/27648 0 18575/48384 13525/55296 277/14336 1/4",
        order_hat=4,
        source=_CASH,
    ),
    "dopri5": _explicit(
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
    ),
    "tsit5": _explicit(
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
    ),
    "dopri8": _explicit(
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
    ),
}
