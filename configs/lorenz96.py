"""A learned closure of the two-scale Lorenz 96 system, trained through RK4 rollouts of the known coarse dynamics."""

from rk_optax.experiment.config import EntrantConfig, RaceConfig


def get_config() -> RaceConfig:
    return RaceConfig(
        problem="lorenz96",
        entrants={
            "adam": EntrantConfig("adam", trials=(3e-3, 1e-2), schedule="cosine", steps=2000, seconds=20, chunk=100),
            "lbfgs": EntrantConfig("lbfgs", trials=(10,), tunes="memory_size", seconds=20, chunk=5),
            "rosenbrock_euler": EntrantConfig("rosenbrock_euler", seconds=20, chunk=2),
        },
        seeds=(0, 1, 2),
        targets=(1.5, 1.0, 0.6),
    )
