"""The Allen–Cahn equation in float64: error over seconds, five seeds; see _pinn.py."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    pinn = runpy.run_path(str(Path(__file__).with_name("_pinn.py")))
    return pinn["race"](
        "allen_cahn",
        seconds=30.0,
        adam_steps=2400,
        targets=(1e-1, 1e-2, 1e-4),
        x64=True,
    )
