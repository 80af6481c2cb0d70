"""Viscous Burgers' equation (ν = 0.01/π) by a physics-informed network: error over seconds, five seeds."""

from rk_optax.experiment.race import EntrantConfig, RaceConfig


def get_config() -> RaceConfig:
    return RaceConfig(
        problem="burgers",
        entrants={
            "adam": EntrantConfig("adam", trials=(3e-3, 1e-2), steps=10_000, seconds=600, chunk=250),
            "lbfgs": EntrantConfig("lbfgs", trials=(10, 50), tunes="memory_size", seconds=30, chunk=20),
            "residual_euler": EntrantConfig("residual_euler", seconds=30, chunk=2),
        },
        tuning_fraction=0.25,
        targets=(1e-1, 3e-2, 1e-2),
    )
