"""The 2-D Poisson problem of `race_poisson.py` in float64: error over seconds, five seeds; see _pinn.py."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    pinn = runpy.run_path(str(Path(__file__).with_name("_pinn.py")))
    return pinn["race"](
        "poisson",
        seconds=25.0,
        adam_steps=8_000,
        targets=(1e-3, 1e-5, 1e-7),
        x64=True,
        further=pinn["libraries"](x64=True, seconds=25.0, iterations=False),
    )
