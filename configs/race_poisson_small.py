"""The 2-D Poisson problem by one hidden layer of 64 in float64: error over seconds, five seeds; see _pinn.py."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    pinn = runpy.run_path(str(Path(__file__).with_name("_pinn.py")))
    return pinn["race"](
        "poisson",
        seconds=12.0,
        adam_steps=20_000,
        targets=(1e-4, 1e-6, 1e-8),
        x64=True,
        chunk=10,
        further=pinn["libraries"](x64=True, seconds=12.0, iterations=True),
        width=64,
        layers=1,
    )
