"""Gradient descent at the edge of stability: a tanh network on 200 of scikit-learn's digits, squared error."""

from rk_optax.experiment.config import FlowConfig


def get_config() -> FlowConfig:
    return FlowConfig(
        learning_rate=0.2,
        steps=2000,
        save_every=20,
        examples=200,
        initial_scale=0.7,
        edge_eigenvalues=3,
        central_steps=2,
    )
