"""A network that is RK4 of its features, on MNIST: accuracy and transfer gap; --data-dir DIRECTORY_OF_THE_IDX_FILES."""

from rk_optax.experiment.config import DataConfig, ModelConfig, TrainConfig, TrainOptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        TrainOptimizerConfig("adam", learning_rate=2e-3, schedule="cosine"),
        data=DataConfig("mnist", batch_size=128, validation_fraction=1 / 6),
        model=ModelConfig("rk_net", width=128, depth=4, steps=4, method="rk4", layer="double_sym", l2=0.0),
        epochs=4,
        metrics=("accuracy", "transfer_gap"),
    )
