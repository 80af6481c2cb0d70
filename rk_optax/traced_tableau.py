"""Explicit Runge–Kutta coefficients that may be JAX arrays: a method that is an input of the computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rk_optax.tableau import ButcherTableau

Scalar = Any  # a Python or NumPy number, or a scalar jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class TracedTableau:
    """The coefficients of an explicit method, some of them arrays; `rk_optax.networks.families` makes them.

    Nothing can be proved of a traced coefficient, so that, unlike a `ButcherTableau`, this holds what it is given.

    Attributes:
      name: what messages call the method.
      rows: the stage coefficients below the diagonal, row i of length i + 1 for stage i + 2.
      b: weights, one for each stage.
      c: abscissae, one for each stage.
      order: of `b`.
      b_hat: weights of the embedded method, or None.
      order_hat: of `b_hat`, or None.

    Raises:
      ValueError: lengths that do not fit.
    """

    name: str
    rows: Sequence[Sequence[Scalar]]
    b: Sequence[Scalar]
    c: Sequence[Scalar]
    order: int
    b_hat: Sequence[Scalar] | None = None
    order_hat: int | None = None

    def __post_init__(self):
        s = len(self.b)
        lengths = [len(row) for row in self.rows], len(self.c), len(self.b if self.b_hat is None else self.b_hat)
        if lengths != (list(range(1, s)), s, s):
            raise ValueError(f"{self.name}: {s} weights need rows of 1 to {s - 1} coefficients and {s} abscissae.")

    @classmethod
    def of(cls, tableau: ButcherTableau | TracedTableau, stages: Sequence[int] | None = None) -> TracedTableau:
        """The coefficients of an explicit tableau as plain numbers, of all its stages or of those given."""
        if isinstance(tableau, TracedTableau):
            return tableau
        kept = list(range(tableau.stages)) if stages is None else list(stages)
        b_hat = None if tableau.b_hat is None else tableau.b_hat[kept].tolist()
        rows = [tableau.a[i, kept[:n]].tolist() for n, i in enumerate(kept) if n]
        b, c = tableau.b[kept].tolist(), tableau.c[kept].tolist()
        return cls(tableau.name, rows, b, c, tableau.order, b_hat, tableau.order_hat)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.b)

    @property
    def is_explicit(self) -> bool:
        """Always."""
        return True

    @property
    def effective_stages(self) -> int:
        """All stages."""
        return self.stages

    def needed_stages(self, *, with_error: bool) -> tuple[int, ...]:
        """All stages."""
        del with_error
        return tuple(range(self.stages))
