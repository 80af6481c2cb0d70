"""Adam on sums in words, character by character: a small causal transformer with dropout."""

from rk_optax.experiment.config import DataConfig, ModelConfig, TrainConfig, TrainOptimizerConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        optimizer=TrainOptimizerConfig("adam", learning_rate=3e-3, schedule="cosine", warmup_steps=50),
        data=DataConfig("sums", batch_size=64, context=64),
        model=ModelConfig("transformer", width=64, blocks=2, heads=4, activation="gelu", dropout=0.1, l2=0.0),
        epochs=10,
    )
