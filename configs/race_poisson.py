"""The 2-D Poisson problem by a physics-informed network: error over seconds, five seeds; see _pinn.py."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    pinn = runpy.run_path(str(Path(__file__).with_name("_pinn.py")))
    return pinn["race"](
        "poisson",
        seconds=20.0,
        adam_steps=10_000,
        targets=(1e-2, 1e-3, 1e-5),
        first_order=True,
        further=pinn["libraries"](x64=False, seconds=20.0, iterations=False),
    )
