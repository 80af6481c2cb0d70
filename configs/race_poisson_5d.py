"""The Poisson problem in five dimensions in float64: error over seconds, five seeds; see _pinn.py."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    pinn = runpy.run_path(str(Path(__file__).with_name("_pinn.py")))
    return pinn["race"](
        "poisson_5d",
        seconds=45.0,
        adam_steps=800,
        targets=(1e-1, 1e-2, 3e-3),
        x64=True,
        constant=True,
        small=False,
        new_points=False,
        inside=1100,
        boundary=200,
    )
