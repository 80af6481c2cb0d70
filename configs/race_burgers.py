"""Viscous Burgers' equation (ν = 0.01/π) by a physics-informed network: error over seconds, five seeds."""

from rk_optax.experiment.config import EntrantConfig, RaceConfig


def get_config() -> RaceConfig:
    return RaceConfig(
        problem="burgers",
        entrants={
            "adam": EntrantConfig("adam", trials=(3e-3, 1e-2), schedule="cosine", steps=10_000, seconds=600, chunk=250),
            "lbfgs": EntrantConfig("lbfgs", trials=(10, 50), tunes="memory_size", seconds=20, chunk=20),
            "adam, lbfgs": EntrantConfig(
                "adam_then_lbfgs",
                trials=(3e-3, 1e-2),
                options={"adam_steps": 2000, "memory_size": 50},
                seconds=15,
                chunk=50,
            ),
            "nesterov": EntrantConfig("nesterov", trials=(1e-3, 3e-3), seconds=5, chunk=250),
            "rkc": EntrantConfig("rkc", seconds=10, chunk=2),
            "rosenbrock_euler": EntrantConfig("rosenbrock_euler", options={"max_iterations": 100}, seconds=15, chunk=2),
            "ssbroyden": EntrantConfig("ssbroyden", seconds=20, chunk=10),
            "engd_w": EntrantConfig("engd_w", trials=(1e-3, 1e-1), tunes="damping", seconds=20, chunk=2),
            "residual_euler": EntrantConfig("residual_euler", seconds=20, chunk=4),
            "residual_euler, path": EntrantConfig("residual_euler", rule="path_control", seconds=20, chunk=1),
        },
        tuning_fraction=0.25,
        targets=(3e-1, 1e-1, 3e-2),
    )
