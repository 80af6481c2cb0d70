"""The dual quadratic of Gaussian-process regression: error over seconds, five seeds; the last two are the bounds."""

from rk_optax.experiment.config import EntrantConfig, RaceConfig


def get_config() -> RaceConfig:
    return RaceConfig(
        problem="gp_dual",
        entrants={
            "gradient_descent": EntrantConfig("sgd", trials=(3.0, 6.0), seconds=2, chunk=100),
            "nesterov": EntrantConfig("nesterov", trials=(1.0, 3.0), seconds=2, chunk=100),
            "adam": EntrantConfig("adam", trials=(0.03, 0.3), schedule="cosine", steps=20_000, seconds=2, chunk=100),
            "lbfgs": EntrantConfig("lbfgs", trials=(10, 50), tunes="memory_size", seconds=2, chunk=5),
            "rkc": EntrantConfig("rkc", seconds=2, chunk=2),
            "rosenbrock_euler": EntrantConfig("rosenbrock_euler", options={"curvature": "hessian"}, seconds=2, chunk=1),
            "sdd": EntrantConfig("stochastic_dual_descent", trials=(1.0, 3.0), seconds=2, chunk=500),
            "cg": EntrantConfig("conjugate_gradients", steps=400, seconds=2, chunk=4),
            "cholesky": EntrantConfig("cholesky", steps=1, seconds=2, chunk=1),
        },
        targets=(1e-1, 1e-2, 1e-3),
    )
