"""Viscous Burgers' equation (ν = 0.01/π) by a physics-informed network: error over seconds, five seeds."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import RaceConfig


def get_config() -> RaceConfig:
    pinn = runpy.run_path(str(Path(__file__).with_name("_pinn.py")))
    return pinn["race"](
        "burgers",
        seconds=20.0,
        adam_steps=10_000,
        targets=(3e-1, 1e-1, 3e-2),
        first_order=True,
    )
