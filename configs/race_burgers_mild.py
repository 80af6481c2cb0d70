"""Burgers' equation with ν = 0.01 in float64: error over seconds, five seeds; see _pinn.py."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    return runpy.run_path(str(Path(__file__).with_name("_pinn.py")))["periodic"](
        "burgers_mild", (1e-2, 1e-4, 1e-6), x64=True
    )
