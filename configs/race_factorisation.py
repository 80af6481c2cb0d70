"""The factors of an ill-conditioned matrix of rank 4 from half of its entries: five seeds, float64."""

from rk_optax.experiment.config import EntrantConfig, RaceConfig


def get_config() -> RaceConfig:
    return RaceConfig(
        problem="factorisation",
        x64=True,
        entrants={
            "gradient_descent": EntrantConfig("sgd", trials=(0.5, 1.5), seconds=2, chunk=200),
            "adam": EntrantConfig("adam", trials=(1e-3, 1e-2), schedule="cosine", steps=20_000, seconds=2, chunk=200),
            "lbfgs": EntrantConfig("lbfgs", trials=(10, 50), tunes="memory_size", seconds=2, chunk=5),
            "residual_euler": EntrantConfig("residual_euler", seconds=2, chunk=1),
            "rosenbrock_euler": EntrantConfig("rosenbrock_euler", seconds=2, chunk=1),
            "als": EntrantConfig("alternating_least_squares", seconds=2, chunk=20),
        },
        targets=(1e-1, 1e-3, 1e-6),
    )
