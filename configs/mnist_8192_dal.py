"""A supplement to mnist_8192.py: RK4 + DAL with ‖Hg‖ by an exact product, two gradients more a step; two seeds."""

import dataclasses
import runpy
from pathlib import Path

from rk_optax.experiment.config import CompareConfig


def get_config() -> CompareConfig:
    study = runpy.run_path(str(Path(__file__).with_name("_images.py")))["study"]("mnist", 8192)
    free = study.optimizers["rk4_dal"]
    exact = dataclasses.replace(free, rule_options={"estimate": "product"})
    return dataclasses.replace(study, optimizers={"rk4_dal_product": exact}, seeds=(0, 1), timed_runs=3)
