"""The Poisson problem in five dimensions, new points in each step: error over seconds, five seeds."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    return runpy.run_path(str(Path(__file__).with_name("_pinn.py")))["poisson_5d"](new_points=True)
