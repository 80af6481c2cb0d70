"""The 2-D Poisson problem by one hidden layer of 64 in float64: error over seconds, five seeds; see _pinn.py."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    return runpy.run_path(str(Path(__file__).with_name("_pinn.py")))["poisson_small"](x64=True)
