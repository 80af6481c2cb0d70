"""SGD, momentum, Adam and RK4 with the ingredients of the paper on Fashion-MNIST, batches of 8192; see _images.py."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import CompareConfig


def get_config() -> CompareConfig:
    return runpy.run_path(str(Path(__file__).with_name("_images.py")))["study"]("fashion", 8192)
