"""Heun on MNIST: a convolutional network with BatchNorm and dropout, which all stages of a step share.

Name the directory of the four IDX files with --data-dir, or let scikit-learn fetch them.
"""

from rk_optax.experiment.config import DataConfig, ModelConfig, TrainConfig, TrainOptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        optimizer=TrainOptimizerConfig("heun", learning_rate=0.3, schedule="cosine", options={"momentum": 0.9}),
        data=DataConfig("mnist", batch_size=128),
        model=ModelConfig("cnn", hidden=(16, 32), activation="relu", dropout=0.25, l2=1e-4),
        epochs=3,
    )
