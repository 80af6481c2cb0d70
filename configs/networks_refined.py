"""A network that is RK4 of its features, on digits: four steps, then eight, then sixteen, as training goes on."""

from rk_optax.experiment.config import DataConfig, ModelConfig, TrainConfig, TrainOptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        TrainOptimizerConfig("adam", learning_rate=2e-3, schedule="cosine"),
        data=DataConfig("digits", batch_size=128),
        model=ModelConfig("rk_net", width=64, depth=4, steps=4, layer="double_sym", refine_at=(0.5, 0.75), l2=0.0),
        epochs=60,
        metrics=("accuracy", "transfer_gap"),
    )
