"""Explicit Runge–Kutta coefficients that may be JAX arrays: a method that is an input of the computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

Scalar = Any  # a Python or NumPy number, or a scalar jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class TracedTableau:
    """The coefficients of an explicit method, some of them arrays; `rk_optax.networks.families` makes them.

    Nothing can be proved of a traced coefficient, so that, unlike a `ButcherTableau`, this holds what it is given.

    Attributes:
      name: what messages call the method.
      a: the rows below the diagonal of the stage coefficients, row i of length i + 1 for stage i + 2.
      b: weights, one for each stage.
      c: abscissae, one for each stage.
      order: of `b`.
      b_hat: weights of the embedded method, or None.
      order_hat: of `b_hat`, or None.

    Raises:
      ValueError: lengths that do not fit.
    """

    name: str
    a: Sequence[Sequence[Scalar]]
    b: Sequence[Scalar]
    c: Sequence[Scalar]
    order: int
    b_hat: Sequence[Scalar] | None = None
    order_hat: int | None = None

    def __post_init__(self):
        s = len(self.b)
        lengths = [len(row) for row in self.a], len(self.c), len(self.b_hat or self.b)
        if lengths != (list(range(1, s)), s, s):
            raise ValueError(f"{self.name}: {s} weights need rows of 1 to {s - 1} coefficients and {s} abscissae.")

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.b)
