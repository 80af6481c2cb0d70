"""SGD, momentum, Adam, Heun and RK4 on scikit-learn's digits, at equally many gradients."""

from rk_optax.experiment.config import (
    BudgetConfig,
    CompareConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TuningConfig,
)


def get_config() -> CompareConfig:
    return CompareConfig(
        data=DataConfig(name="digits", batch_size=256),
        model=ModelConfig(name="mlp", hidden=(64, 64), activation="tanh", l2=1e-3),
        optimizers={
            "sgd": OptimizerConfig("sgd", learning_rates=(0.1, 3.0)),
            "momentum": OptimizerConfig("momentum", (0.03, 0.9), options={"momentum": 0.9}),
            "adam": OptimizerConfig("adam", (0.001, 0.03)),
            "heun": OptimizerConfig("heun", (0.1, 3.0)),
            "rk4": OptimizerConfig("rk4", (0.1, 3.0)),
        },
        # RK4 takes a quarter of the steps of SGD.
        budget=BudgetConfig(gradients=2400, evaluate_every=10),
        tuning=TuningConfig(trials=11, seeds=(100, 101, 102)),
        seeds=(0, 1, 2),
        timed_runs=7,
    )
