"""The comparisons of RESULTS.md on images: RK4 with each ingredient of the paper and with all, beside SGD and Adam.

    rk-optax compare configs/mnist_16.py --data-dir DIRECTORY_OF_THE_IDX_FILES

Every entrant has the same number of updates, of tuning trials and of seeds, and a grid of the same width. The middles
of the grids come from one short run per rate of every entrant, at the smallest and the largest batch size.
"""

from typing import Any, Literal, NamedTuple

from rk_optax.experiment.config import (
    BudgetConfig,
    CompareConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TuningConfig,
)

# How far the grids have moved from those of the smallest batch to those of the largest: at 64 by the logarithm of the
# batch size; at 1024, with about as few updates as at 8192, all the way.
_WAYS = {16: 0.0, 64: 2 / 9, 1024: 1.0, 8192: 1.0}


# The middles of every entrant's grid at the smallest and at the largest batch size.
_Middles = dict[str, tuple[float, float]]


# By batch size: updates, updates between two evaluations, updates of a timed run.
_Lengths = dict[int, tuple[int, int, int]]
_LENGTHS: _Lengths = {16: (12_000, 1_000, 400), 64: (4_000, 200, 200), 1024: (300, 25, 20), 8192: (240, 20, 8)}


class _Study(NamedTuple):
    data: Literal["mnist", "fashion_mnist"]
    model: ModelConfig
    middles: _Middles
    ways: dict[int, float] = _WAYS
    lengths: _Lengths = _LENGTHS


# A smooth activation: the order of a method is a statement about smooth fields.
_MLP = ModelConfig("mlp", hidden=(128,), activation="tanh", l2=0.0)
_CNN = ModelConfig("cnn", hidden=(8, 16), activation="tanh", l2=0.0)

_MNIST: _Middles = {
    "sgd": (0.15, 0.4),
    "momentum": (0.015, 0.3),
    "adam": (0.001, 0.008),
    "heun": (0.15, 0.5),
    "rk4": (0.25, 0.6),
    "rk4_adagrad": (0.3, 0.8),
    "rk4_dal": (1.0, 6.0),
    "rk4_momentum": (0.015, 0.3),
    "rk4_all": (0.03, 0.6),
    "rk4_split": (0.2, 0.6),
}
_FASHION: _Middles = {
    "sgd": (0.08, 0.3),
    "momentum": (0.01, 0.25),
    "adam": (0.001, 0.008),
    "heun": (0.12, 0.4),
    "rk4": (0.1, 0.5),
    "rk4_adagrad": (0.12, 0.7),
    "rk4_dal": (0.25, 15.0),
    "rk4_momentum": (0.008, 0.3),
    "rk4_all": (0.012, 1.2),
    "rk4_split": (0.08, 0.4),
}
_FASHION_CNN: _Middles = {  # at batches of 64 and of 1024
    "sgd": (0.19, 0.16),
    "momentum": (0.03, 0.12),
    "adam": (0.003, 0.008),
    "heun": (0.2, 0.2),
    "rk4": (0.3, 0.5),
    "rk4_adagrad": (0.37, 0.35),
    "rk4_dal": (0.5, 1.5),
    "rk4_momentum": (0.03, 0.12),
    "rk4_all": (0.025, 0.25),
    "rk4_split": (0.25, 0.3),
}
_STUDIES = {
    "mnist": _Study("mnist", _MLP, _MNIST),
    "fashion": _Study("fashion_mnist", _MLP, _FASHION),
    "fashion_cnn": _Study(
        "fashion_mnist", _CNN, _FASHION_CNN, {64: 0.0, 1024: 1.0}, {64: (1_000, 50, 40), 1024: (120, 10, 4)}
    ),
}


def study(name: str, batch_size: int) -> CompareConfig:
    """One of the studies at one batch size."""
    data, model, middles, ways, lengths = _STUDIES[name]
    updates, evaluate_every, timed_updates = lengths[batch_size]
    return CompareConfig(
        optimizers=_optimizers(middles, ways[batch_size]),
        data=DataConfig(data, validation_fraction=1 / 6, batch_size=batch_size),
        model=model,
        budget=BudgetConfig(updates=updates, evaluate_every=evaluate_every, scored_examples=10_000),
        tuning=TuningConfig(trials=5, seeds=(100,), fraction=0.5),
        seeds=(0, 1, 2, 3, 4),
        timed_runs=7,
        timed_updates=timed_updates,
        vectorized=False,
    )


def _optimizers(middles: _Middles, way: float) -> dict[str, OptimizerConfig]:
    momentum: dict[str, Any] = {"momentum": 0.9}
    free: dict[str, Any] = {"estimate": "free"}
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "sgd": ("sgd", {}),
        "momentum": ("momentum", {"options": momentum}),
        "adam": ("adam", {}),
        "heun": ("heun", {}),
        "rk4": ("rk4", {}),
        "rk4_adagrad": ("rk4", {"preconditioner": "adagrad"}),
        "rk4_dal": ("rk4", {"rule": "dal", "rule_options": free}),
        "rk4_momentum": ("rk4", {"options": momentum}),
        "rk4_all": ("rk4", {"options": momentum, "preconditioner": "adagrad", "rule": "dal", "rule_options": free}),
        "rk4_split": ("rk4", {"stage_batches": "split"}),
    }
    optimizers = {}
    for name, (factory, options) in methods.items():
        smallest, largest = middles[name]
        middle = smallest ** (1 - way) * largest**way
        # A factor of 2.5 from rate to rate.
        optimizers[name] = OptimizerConfig(factory, (middle / 6.25, middle * 6.25), **options)
    return optimizers
