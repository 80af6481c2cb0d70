"""The four MNIST comparisons of RESULTS.md: RK4 with each ingredient of the paper and with all, beside SGD and Adam.

    rk-optax compare configs/mnist_16.py --data-dir DIRECTORY_OF_THE_IDX_FILES

Every entrant has the same number of updates, of tuning trials and of seeds, and a grid of the same width. The middles
of the grids come from one short run per rate of every entrant, at the smallest and the largest batch size.
"""

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
# By batch size: updates, updates between two evaluations, updates of a timed run.
_LENGTHS = {16: (12_000, 1_000, 400), 64: (4_000, 200, 200), 1024: (300, 25, 20), 8192: (240, 20, 8)}


def study(batch_size: int) -> CompareConfig:
    """The comparison at one batch size."""
    updates, evaluate_every, timed_updates = _LENGTHS[batch_size]
    return CompareConfig(
        optimizers=_optimizers(batch_size),
        data=DataConfig("mnist", validation_fraction=1 / 6, batch_size=batch_size),
        # A smooth activation: the order of a method is a statement about smooth fields.
        model=ModelConfig("mlp", hidden=(128,), activation="tanh", l2=0.0),
        budget=BudgetConfig(updates=updates, evaluate_every=evaluate_every, scored_examples=10_000),
        tuning=TuningConfig(trials=5, seeds=(100,), fraction=0.5),
        seeds=(0, 1, 2, 3, 4),
        timed_runs=7,
        timed_updates=timed_updates,
        vectorized=False,
    )


def _optimizers(batch_size: int) -> dict[str, OptimizerConfig]:
    def grid(smallest: float, largest: float) -> tuple[float, float]:
        """A factor of 2.5 from rate to rate, about a middle between those of the smallest and the largest batch."""
        way = _WAYS[batch_size]
        middle = smallest ** (1 - way) * largest**way
        return middle / 6.25, middle * 6.25

    momentum, free = {"momentum": 0.9}, {"estimate": "free"}
    return {
        "sgd": OptimizerConfig("sgd", grid(0.15, 0.4)),
        "momentum": OptimizerConfig("momentum", grid(0.015, 0.3), options=momentum),
        "adam": OptimizerConfig("adam", grid(0.001, 0.008)),
        "heun": OptimizerConfig("heun", grid(0.15, 0.5)),
        "rk4": OptimizerConfig("rk4", grid(0.25, 0.6)),
        "rk4_adagrad": OptimizerConfig("rk4", grid(0.3, 0.8), preconditioner="adagrad"),
        "rk4_dal": OptimizerConfig("rk4", grid(1.0, 6.0), rule="dal", rule_options=free),
        "rk4_momentum": OptimizerConfig("rk4", grid(0.015, 0.3), options=momentum),
        "rk4_all": OptimizerConfig(
            "rk4", grid(0.03, 0.6), options=momentum, preconditioner="adagrad", rule="dal", rule_options=free
        ),
        "rk4_split": OptimizerConfig("rk4", grid(0.2, 0.6), stage_batches="split"),
    }
