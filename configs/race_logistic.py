"""Logistic regression of prescribed condition number at the optimum; --problem-options.condition 1e6 and so on."""

from rk_optax.experiment.config import EntrantConfig, RaceConfig


def get_config() -> RaceConfig:
    return RaceConfig(
        problem="logistic",
        problem_options={"condition": 1e4},
        x64=True,
        entrants={
            "gradient_descent": EntrantConfig("sgd", trials=(3.0, 6.0), seconds=4, chunk=200),
            "nesterov": EntrantConfig("nesterov", trials=(0.6, 2.0), seconds=4, chunk=100),
            "adam": EntrantConfig("adam", trials=(0.1, 0.5), schedule="cosine", steps=20_000, seconds=4, chunk=100),
            "lbfgs": EntrantConfig("lbfgs", trials=(10, 50), tunes="memory_size", seconds=4, chunk=5),
            "rkc": EntrantConfig("rkc", seconds=4, chunk=1),
            "rosenbrock_euler": EntrantConfig("rosenbrock_euler", options={"curvature": "hessian"}, seconds=4, chunk=1),
        },
        targets=(1e-1, 1e-2, 1e-4),
    )
