"""What an experiment is: checked, serialisable dataclasses, and the files that they come from."""

from rk_optax.experiment.config.load import checked, load, parse
from rk_optax.experiment.config.schema import (
    BudgetConfig,
    CompareConfig,
    DataConfig,
    EntrantConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RaceConfig,
    TrainConfig,
    TrainOptimizerConfig,
    TuningConfig,
)

__all__ = [
    "BudgetConfig",
    "CompareConfig",
    "DataConfig",
    "EntrantConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RaceConfig",
    "TrainConfig",
    "TrainOptimizerConfig",
    "TuningConfig",
    "checked",
    "load",
    "parse",
]
