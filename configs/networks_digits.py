"""A network that is RK4 of its features, on scikit-learn's digits: accuracy and transfer gap; --model.method euler."""

from rk_optax.experiment.config import DataConfig, ModelConfig, TrainConfig, TrainOptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        TrainOptimizerConfig("adam", learning_rate=2e-3, schedule="cosine"),
        data=DataConfig("digits", batch_size=128),
        model=ModelConfig("rk_net", width=64, depth=4, steps=4, method="rk4", layer="double_sym", l2=0.0),
        epochs=60,
        metrics=("accuracy", "transfer_gap"),
    )
