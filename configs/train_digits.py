"""RK4 on scikit-learn's digits: a run of a few seconds."""

from rk_optax.experiment.config import DataConfig, ModelConfig, TrainConfig, TrainOptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        optimizer=TrainOptimizerConfig("rk4", learning_rate=1.0, schedule="cosine"),
        data=DataConfig("digits", batch_size=256),
        model=ModelConfig("mlp", hidden=(64, 64), activation="tanh", l2=1e-3),
        steps=600,
        evaluate_every=20,
    )
