"""The convolutional network of 251,866 parameters on CIFAR-10, for a GPU; --data-dir DIRECTORY_OF_THE_BIN_FILES."""

from rk_optax.experiment.config import DataConfig, ModelConfig, TrainConfig, TrainOptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        TrainOptimizerConfig("sgd", learning_rate=0.1, schedule="cosine", options={"momentum": 0.9}),
        data=DataConfig("cifar10", batch_size=125, validation_fraction=0.2),
        model=ModelConfig("rk_conv_net", activation="relu", steps=4, method="rk4", l2=4e-4),
        epochs=120,
        metrics=("accuracy", "transfer_gap"),
    )
