"""Solvers: each turns a vector field into an effective gradient."""

import difflib

from rk_optax.methods import IMPLICIT_TABLEAUS, TABLEAUS
from rk_optax.solver._base import (
    Cost,
    Quantity,
    Solver,
    Step,
    check_offers,
    fitting,
    name_of,
    needs_of,
    saturating_sum,
    stepped,
)
from rk_optax.solver._diagonal import DiagonalCurvature
from rk_optax.solver._path import Factored, Path, underivable
from rk_optax.solver.explicit import Explicit
from rk_optax.solver.exponential import Etd
from rk_optax.solver.implicit import Implicit
from rk_optax.solver.linear_solvers import ConjugateGradients, Gmres, LinearSolver
from rk_optax.solver.linearly_implicit import Ros2, RosenbrockEuler
from rk_optax.solver.residual_euler import ResidualEuler
from rk_optax.solver.stabilized import Stabilized
from rk_optax.tableau import ButcherTableau

__all__ = [
    "ConjugateGradients",
    "Cost",
    "DiagonalCurvature",
    "Etd",
    "Explicit",
    "Factored",
    "Gmres",
    "Implicit",
    "LinearSolver",
    "Path",
    "Quantity",
    "ResidualEuler",
    "Ros2",
    "RosenbrockEuler",
    "Solver",
    "Stabilized",
    "Step",
    "as_solver",
    "check_offers",
    "fitting",
    "name_of",
    "needs_of",
    "saturating_sum",
    "stepped",
    "underivable",
]


def as_solver(solver: str | ButcherTableau | Solver) -> Solver:
    """A solver from a name in `TABLEAUS` or `IMPLICIT_TABLEAUS`, a tableau, or a solver.

    Raises:
      ValueError: the name is unknown, or the tableau is one that no solver takes.
      TypeError: anything else.
    """
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, ButcherTableau):
        return Explicit(solver) if solver.is_explicit else Implicit(solver)
    if isinstance(solver, str):
        known = {**TABLEAUS, **IMPLICIT_TABLEAUS}
        if solver in known:
            return as_solver(known[solver])
        near = difflib.get_close_matches(solver.lower(), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known names: {', '.join(known)}."
        raise ValueError(f"Unknown solver {solver!r}; {hint}")
    raise TypeError(
        f"solver must be a name, a ButcherTableau or a Solver, got {type(solver).__name__}"
        + ("; pass an instance, not the class." if isinstance(solver, type) else ".")
    )
