"""The study of Fashion-MNIST on a small convolutional network, batches of 64; see _images.py."""

import runpy
from pathlib import Path

from rk_optax.experiment.config import CompareConfig


def get_config() -> CompareConfig:
    return runpy.run_path(str(Path(__file__).with_name("_images.py")))["study"]("fashion_cnn", 64)
