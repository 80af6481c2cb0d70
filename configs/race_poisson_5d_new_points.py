"""The Poisson problem in five dimensions, new points in each step: error over seconds, five seeds."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    race = runpy.run_path(str(Path(__file__).with_name("_pinn.py")))["race"]
    return race("poisson_5d", seconds=600.0, targets=(1e-2, 1e-3, 1e-4), x64=True, new_points=True)
