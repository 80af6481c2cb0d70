"""Runge–Kutta solvers of the gradient flow as Optax gradient transformations."""

from rk_optax.alias import (
    bogacki_shampine,
    dopri5,
    dopri8,
    euler,
    heun,
    kutta3,
    midpoint,
    ralston,
    rk4,
    rk38,
    ssprk3,
    tsit5,
)
from rk_optax.preconditioner import (
    Preconditioner,
    precondition_by,
    precondition_by_adagrad,
    precondition_by_adam,
    precondition_by_hutchinson,
    precondition_by_rms,
)
from rk_optax.problem import Problem, first_stage_batch
from rk_optax.solver import Cost, Explicit, Solver, Step
from rk_optax.step_size import Reason, StepSizeRule, dal, sgd_g2
from rk_optax.tableau import TABLEAUS, ButcherTableau, rk2, rk3, rk4_family
from rk_optax.transform import RungeKuttaState, inject_hyperparams, runge_kutta, scale_by_rk

__version__ = "0.1.0"

__all__ = [
    "TABLEAUS",
    "ButcherTableau",
    "Cost",
    "Explicit",
    "Preconditioner",
    "Problem",
    "Reason",
    "RungeKuttaState",
    "Solver",
    "Step",
    "StepSizeRule",
    "bogacki_shampine",
    "dal",
    "dopri5",
    "dopri8",
    "euler",
    "first_stage_batch",
    "heun",
    "inject_hyperparams",
    "kutta3",
    "midpoint",
    "precondition_by",
    "precondition_by_adagrad",
    "precondition_by_adam",
    "precondition_by_hutchinson",
    "precondition_by_rms",
    "ralston",
    "rk2",
    "rk3",
    "rk4",
    "rk4_family",
    "rk38",
    "runge_kutta",
    "scale_by_rk",
    "sgd_g2",
    "ssprk3",
    "tsit5",
]
