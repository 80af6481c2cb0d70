"""The 2-D Poisson problem by a physics-informed network: error over seconds, five seeds; see _pinn.py."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import EntrantConfig, RaceConfig


def get_config() -> RaceConfig:
    pinn = runpy.run_path(str(Path(__file__).with_name("_pinn.py")))
    return pinn["race"](
        "poisson",
        seconds=25.0,
        adam_steps=15_000,
        targets=(1e-2, 1e-3, 1e-5),
        first_order=True,
        further={
            # What it reaches with more time.
            "lbfgs": EntrantConfig("lbfgs", trials=(50, 200), tunes="memory_size", seconds=60.0, chunk=20),
            **pinn["libraries"](x64=False, seconds=25.0, iterations=False),
        },
    )
