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
    residual_euler,
    rk4,
    rk38,
    rkc,
    rkl,
    ros2,
    rosenbrock_euler,
    ssprk3,
    tsit5,
)
from rk_optax.control import descent_control, error_control, trust_ratio_control
from rk_optax.preconditioner import (
    Preconditioner,
    precondition_by,
    precondition_by_adagrad,
    precondition_by_adam,
    precondition_by_hutchinson,
    precondition_by_rms,
)
from rk_optax.problem import Problem, first_stage_batch
from rk_optax.solver import Cost, Explicit, ResidualEuler, Ros2, RosenbrockEuler, Solver, Stabilized, Step
from rk_optax.step_size import Attempt, Reason, StepSizeRule, Verdict, dal, sgd_g2
from rk_optax.structured_loss import LeastSquares, ModelLoss
from rk_optax.tableau import TABLEAUS, ButcherTableau, rk2, rk3, rk4_family
from rk_optax.transform import RungeKuttaState, inject_hyperparams, runge_kutta, scale_by_rk

__version__ = "0.1.0"

__all__ = [
    "TABLEAUS",
    "Attempt",
    "ButcherTableau",
    "Cost",
    "Explicit",
    "LeastSquares",
    "ModelLoss",
    "Preconditioner",
    "Problem",
    "Reason",
    "ResidualEuler",
    "Ros2",
    "RosenbrockEuler",
    "RungeKuttaState",
    "Solver",
    "Stabilized",
    "Step",
    "StepSizeRule",
    "Verdict",
    "bogacki_shampine",
    "dal",
    "descent_control",
    "dopri5",
    "dopri8",
    "error_control",
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
    "residual_euler",
    "rk2",
    "rk3",
    "rk4",
    "rk4_family",
    "rk38",
    "rkc",
    "rkl",
    "ros2",
    "rosenbrock_euler",
    "runge_kutta",
    "scale_by_rk",
    "sgd_g2",
    "ssprk3",
    "trust_ratio_control",
    "tsit5",
]
