"""A tanh network on scikit-learn's digits with an L2 penalty, all examples at every step: loss over seconds."""

from rk_optax.experiment.config import EntrantConfig, RaceConfig


def get_config() -> RaceConfig:
    return RaceConfig(
        problem="digits",
        entrants={
            "gradient_descent": EntrantConfig("sgd", trials=(0.3, 1.0), seconds=4, chunk=50),
            "nesterov": EntrantConfig("nesterov", trials=(0.1, 0.3), seconds=4, chunk=50),
            "adam": EntrantConfig("adam", trials=(3e-3, 1e-2), schedule="cosine", steps=2_000, seconds=4, chunk=50),
            "lbfgs": EntrantConfig("lbfgs", trials=(10, 50), tunes="memory_size", seconds=4, chunk=5),
            "adam, lbfgs": EntrantConfig(
                "adam_then_lbfgs",
                trials=(0.003, 0.01),
                options={"adam_steps": 300, "memory_size": 50},
                seconds=4,
                chunk=20,
            ),
            "rkc": EntrantConfig("rkc", seconds=4, chunk=2),
            "rosenbrock_euler": EntrantConfig("rosenbrock_euler", seconds=4, chunk=1),
            "rosenbrock_euler, limited secant": EntrantConfig(
                "rosenbrock_euler", options={"curvature": "limited_secant"}, seconds=4, chunk=5
            ),
            "rosenbrock_euler, path": EntrantConfig(
                "rosenbrock_euler", rule="path_control", options={"curvature": "hessian"}, seconds=4, chunk=1
            ),
        },
        targets=(0.2, 0.13, 0.1236),
    )
