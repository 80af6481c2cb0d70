"""The 2-D Poisson problem of `race_poisson.py` in float32 against published methods: error over seconds, five seeds."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    race = runpy.run_path(str(Path(__file__).with_name("_pinn.py")))["race"]
    return race("poisson", seconds=30.0, targets=(1e-3, 1e-5, 1e-7), x64=False, small=True)
