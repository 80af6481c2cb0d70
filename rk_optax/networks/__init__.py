"""Networks that are Runge–Kutta methods: features moved by the package's solvers, weights that move with depth."""

from rk_optax.networks import families
from rk_optax.networks.adjoint import Momentum, momentum
from rk_optax.networks.block import integrate, local_report
from rk_optax.networks.controls import Controls, refine, refine_state
from rk_optax.networks.layers import (
    double,
    double_sym,
    hamiltonian,
    hamiltonian_y,
    hamiltonian_z,
    initial,
    preact_double,
    single,
    tv_norm,
)
from rk_optax.networks.report import Report
from rk_optax.networks.reversible import reversible
from rk_optax.networks.stiff import IntegratingFactorEuler, Semilinear, orthogonal, rotated

__all__ = [
    "Controls",
    "IntegratingFactorEuler",
    "Momentum",
    "Report",
    "Semilinear",
    "double",
    "double_sym",
    "families",
    "hamiltonian",
    "hamiltonian_y",
    "hamiltonian_z",
    "initial",
    "integrate",
    "local_report",
    "momentum",
    "orthogonal",
    "preact_double",
    "refine",
    "refine_state",
    "reversible",
    "rotated",
    "single",
    "tv_norm",
]
