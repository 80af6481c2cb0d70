"""Butcher tableaus: the type and its order checks.

A tableau (a, b, c) of s stages is the step k_i = f(y + h Σ_j a_ij k_j), y₊ = y + h Σ_i b_i k_i.
Nothing here imports JAX: a tableau is float64 data that a solver reads when it is built.
"""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.polynomial import Polynomial
from numpy.typing import ArrayLike

from rk_optax._order_conditions import Array, missed_condition, tolerance

# |R| may exceed 1 by this much, so that a polynomial that only touches 1 is not cut off there.
_TOUCH = 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class ButcherTableau:
    """A Runge-Kutta method of s stages, checked against the orders it claims.

    Arrays may be given as anything array-like, nested lists of `fractions.Fraction` included, and
    are stored as read-only float64 NumPy arrays. Construction proves the declared orders: for every
    rooted tree t of up to `order` nodes (200 trees for order 8) it evaluates the condition
    Σ_i b_i Φ_i(t) = 1/γ(t) of Butcher (1963); see Hairer, Nørsett and Wanner, "Solving Ordinary
    Differential Equations I", 1993, chapter II.2. Tableaus compare and hash by identity.

    Attributes:
        name: What messages and listings call the method.
        a: Stage coefficients, shape (s, s); strictly lower triangular for an explicit method.
        b: Weights the step uses, shape (s,).
        c: Abscissae c_i = Σ_j a_ij, shape (s,).
        order: Order of `b`.
        b_hat: Weights of the embedded method, shape (s,), or None; the local error estimate of a
            step is h Σ_i (b_i - b_hat_i) k_i.
        order_hat: Order of `b_hat`, or None.
        source: Where the coefficients were published.
        interpolant: Weights within the step, shape (s, d), or None: with B_i(σ) = Σ_m interpolant[i, m] σ^(m+1),
            y(t + σh) is approximated by y + h Σ_i B_i(σ) k_i, and B(1) = b. None: there is no published one.

    Raises:
        TypeError: If an argument has the wrong type; the message names it.
        ValueError: If shapes disagree, a value is not finite, only one of `b_hat` and `order_hat`
            is given, `b_hat` equals `b`, a row of `a` does not sum to c_i, or a declared order is
            not reached; the message names the condition and its defect.

    Example:
        >>> method = ButcherTableau("my Heun", [[0, 0], [1, 0]], b=[0.5, 0.5], c=[0, 1], order=2)
        >>> method.stages, method.is_explicit, method.b.dtype
        (2, True, dtype('float64'))
        >>> ButcherTableau("too bold", [[0, 0], [1, 0]], b=[0.5, 0.5], c=[0, 1], order=3)
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: too bold: b misses the order-3 condition sum b_i c_i^2 = 1/3 by 0.167; ...
    """

    name: str
    a: Array
    b: Array
    c: Array
    order: int
    b_hat: Array | None = None
    order_hat: int | None = None
    source: str = ""
    interpolant: Array | None = None

    if TYPE_CHECKING:  # what the generated __init__ takes, before __post_init__ converts it

        def __init__(
            self,
            name: str,
            a: ArrayLike | Sequence[Any],
            b: ArrayLike | Sequence[Any],
            c: ArrayLike | Sequence[Any],
            order: int,
            b_hat: ArrayLike | Sequence[Any] | None = None,
            order_hat: int | None = None,
            source: str = "",
            interpolant: ArrayLike | Sequence[Any] | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        for label in ("name", "source"):
            if not isinstance(getattr(self, label), str):
                raise TypeError(f"{label} must be a str, got {getattr(self, label)!r}")
        if (self.b_hat is None) != (self.order_hat is None):
            missing = "b_hat" if self.b_hat is None else "order_hat"
            raise ValueError(f"{self.name}: {missing} is missing; give b_hat and order_hat together, or neither")
        self._set("a", self._numbers("a"))
        if self.a.ndim != 2 or self.a.shape[0] != self.a.shape[1] or self.a.size == 0:
            raise ValueError(f"{self.name}: a must be a square matrix, one row per stage, got shape {self.a.shape}")
        stages = len(self.a)
        for label in ("b", "c") if self.b_hat is None else ("b", "c", "b_hat"):
            self._set(label, self._numbers(label))
            if getattr(self, label).shape != (stages,):
                raise ValueError(
                    f"{self.name}: {label} must have shape ({stages},), one entry per stage of a, "
                    f"got {getattr(self, label).shape}"
                )
        for label in ("order",) if self.order_hat is None else ("order", "order_hat"):
            self._set(label, self._positive_integer(label))
        if self.b_hat is not None and np.array_equal(self.b, self.b_hat):
            raise ValueError(
                f"{self.name}: b_hat equals b, so that every error estimate would be zero; "
                "give the weights of another method, or drop b_hat and order_hat"
            )
        self._check_row_sums()
        self._check_order("b", "order")
        if self.b_hat is not None:
            self._check_order("b_hat", "order_hat")
        if self.interpolant is not None:
            self._set("interpolant", self._numbers("interpolant"))
            if self.interpolant.ndim != 2 or len(self.interpolant) != stages:
                raise ValueError(f"{self.name}: interpolant must have a row per stage, got {self.interpolant.shape}")
            if not np.allclose(self.interpolant.sum(axis=1), self.b, rtol=0, atol=1e-12):
                raise ValueError(f"{self.name}: the rows of interpolant must add up to b, its value at the step's end")

    def __repr__(self) -> str:
        orders = f"{self.order}" if self.order_hat is None else f"{self.order}({self.order_hat})"
        return f"ButcherTableau({self.name!r}, stages={self.stages}, order={orders})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Copies and pickles go through the constructor: NumPy forgets that an array was read-only.
        return type(self), tuple(getattr(self, field.name) for field in fields(self))

    @property
    def stages(self) -> int:
        """Number of stages s.

        >>> from rk_optax.methods import DOPRI5
        >>> DOPRI5.stages
        7
        """
        return len(self.b)

    @property
    def is_explicit(self) -> bool:
        """Whether every stage needs earlier stages only: `a` is strictly lower triangular.

        >>> from rk_optax.methods import RK4
        >>> RK4.is_explicit
        True
        """
        return not np.triu(self.a).any()

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is evaluated at the end of the step, and so is the next step's first (FSAL).

        >>> from rk_optax.methods import DOPRI5, RK4
        >>> DOPRI5.first_same_as_last, RK4.first_same_as_last
        (True, False)
        """
        return self.is_explicit and self.stages > 1 and np.array_equal(self.a[-1], self.b)

    @property
    def effective_stages(self) -> int:
        """Number of stages that a step without error estimate evaluates.

        >>> from rk_optax.methods import DOPRI5
        >>> DOPRI5.effective_stages  # the seventh stage serves the error estimate alone
        6
        """
        return len(self.needed_stages(with_error=False))

    def needed_stages(self, *, with_error: bool) -> tuple[int, ...]:
        """The stages a step must evaluate.

        Args:
            with_error: Whether the error estimate is wanted beside the step.

        Returns:
            In increasing order, the indices (from 0) of the stages that carry weight in `b` (or,
            with error, in `b_hat`) or feed, directly or not, one that does.

        Raises:
            ValueError: If the error estimate is wanted and there is no `b_hat`.

        Example:
            >>> from rk_optax.methods import BOGACKI_SHAMPINE
            >>> BOGACKI_SHAMPINE.needed_stages(with_error=False)
            (0, 1, 2)
            >>> BOGACKI_SHAMPINE.needed_stages(with_error=True)
            (0, 1, 2, 3)
        """
        needed = self.b != 0
        if with_error:
            if self.b_hat is None:
                raise ValueError(
                    f"{self.name} has no embedded weights b_hat to estimate the error with; "
                    "use with_error=False or a method that has them"
                )
            needed = needed | (self.b_hat != 0)
        for _ in range(self.stages):
            needed = needed | (self.a[needed] != 0).any(axis=0)
        return tuple(np.flatnonzero(needed).tolist())

    @property
    def stability_polynomial(self) -> Polynomial:
        """R with y₊ = R(hλ) y on y' = λy, as a polynomial in z = hλ.

        Raises:
            ValueError: If the method is not explicit (R is then a rational function).

        Example:
            >>> from rk_optax.methods import HEUN
            >>> HEUN.stability_polynomial.coef
            array([1. , 1. , 0.5])
        """
        if not self.is_explicit:
            raise ValueError(
                f"{self.name} is not explicit, so that its stability function is not a polynomial; "
                "evaluate 1 + z b^T (I - z a)^(-1) 1 instead"
            )
        coefficients, powers = [1.0], np.ones(self.stages)  # powers: a^(k-1) 1
        for _ in range(self.stages):
            coefficients.append(float(self.b @ powers))
            powers = self.a @ powers
        return Polynomial(coefficients, symbol="z").trim()

    @property
    def real_stability_interval(self) -> float:
        """The largest x such that |R(-t)| <= 1 for all t in [0, x].

        On a quadratic the step is stable up to h = x / (largest eigenvalue). Found from the roots of R(-t) = ±1; where
        |R| touches 1 without exceeding it by more than 1e-9 the interval goes on. Good to nine digits for the named
        methods and for undamped Chebyshev methods of up to ten stages; at twelve, x = 288, rounding makes it too small.

        Raises:
            ValueError: If the method is not explicit.

        Example:
            >>> from rk_optax.methods import RK4
            >>> round(RK4.real_stability_interval, 9)
            2.785293563
        """
        decay = self.stability_polynomial(Polynomial([0.0, -1.0], symbol="z"))
        limit = 1 + _TOUCH
        crossings = _level_crossings(decay, limit)  # never empty: R'(0) = 1, R is not constant
        spans = pairwise([*crossings, 2 * crossings[-1]])
        leaves = (left for left, right in spans if abs(decay((left + right) / 2)) > limit)
        left = next(leaves, crossings[-1])
        exact = min(_level_crossings(decay, 1.0), key=lambda root: abs(root - left), default=left)
        return exact if abs(exact - left) <= 1e-6 * left else left

    def _set(self, label: str, value: Any) -> None:
        object.__setattr__(self, label, value)  # the dataclass is frozen

    def _numbers(self, label: str) -> Array:
        value = getattr(self, label)
        try:
            array = np.asarray(value)
            real = array.dtype.kind in "iuf" or (
                array.dtype == object and all(isinstance(x, numbers.Real) for x in array.flat)
            )
            array = array.astype(np.float64) if real else array  # always a copy
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{self.name}: {label} is not an array of numbers of one shape: {error}") from error
        if not real:
            raise TypeError(f"{self.name}: {label} must hold real numbers (int, float, Fraction), got {value!r}")
        if not np.isfinite(array).all():
            raise ValueError(f"{self.name}: {label} must be finite, got {array.tolist()}")
        array.setflags(write=False)
        return array

    def _positive_integer(self, label: str) -> int:
        value = getattr(self, label)
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{self.name}: {label} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{self.name}: {label} must be at least 1, got {value}")
        return int(value)

    def _check_row_sums(self) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # a non-finite defect is refused below
            defects = self.a.sum(axis=1) - self.c
        for i in np.flatnonzero(~(np.abs(defects) <= tolerance(np.abs(self.a).max())))[:1]:
            raise ValueError(
                f"{self.name}: row {i} of a (from 0) does not sum to c[{i}] = {self.c[i]:.16g}: the "
                f"defect of c_i = sum a_ij is {defects[i]:.3g}; correct that row or that entry of c"
            )

    def _check_order(self, label: str, argument: str) -> None:
        miss = missed_condition(self.a, getattr(self, label), getattr(self, argument), label)
        if miss is not None:
            lower = f", or declare {argument}={miss.order - 1}" if miss.order > 1 else ""
            raise ValueError(
                f"{self.name}: {label} misses the order-{miss.order} condition {miss.text} by "
                f"{miss.defect:.3g}; correct the coefficients (all float64 digits){lower}"
            )


def _level_crossings(polynomial: Polynomial, level: float) -> list[float]:
    """Where |polynomial| = level on the positive axis, ascending; nearly real roots count too."""
    roots = np.concatenate([(polynomial - level).roots(), (polynomial + level).roots()])
    # A point too many does no harm to the search for a sign change, a missing one would.
    near = (roots.real > 1e-6) & (np.abs(roots.imag) <= 1e-3 * np.abs(roots.real))
    return sorted(roots.real[near].tolist())
