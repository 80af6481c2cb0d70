"""What the tests of the experiment runner share."""

import gzip
import json

import numpy as np

from rk_optax.experiment.config import (
    BudgetConfig,
    CompareConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TuningConfig,
)

SMOKE = CompareConfig(
    optimizers={
        "sgd": OptimizerConfig("sgd", (0.05, 0.5)),
        "momentum": OptimizerConfig("momentum", (0.01, 0.1), {"momentum": 0.9}),
        "adam": OptimizerConfig("adam", (0.001, 0.01)),
        "heun": OptimizerConfig("heun", (0.05, 0.5)),
        "rk4": OptimizerConfig("rk4", (0.05, 0.5)),
    },
    data=DataConfig(batch_size=64),
    model=ModelConfig(hidden=(8,)),
    budget=BudgetConfig(gradients=48, evaluate_every=4),
    tuning=TuningConfig(trials=3, seeds=(100,)),
    seeds=(0, 1, 2),
    timed_runs=2,
)


class Silent:
    """A reporter that remembers, and tells another one where there is one."""

    def __init__(self, other=None):
        self.work, self.done, self.said, self._other = 0, 0, [], other

    def start(self, work):
        self.work = work
        if self._other:
            self._other.start(work)

    def stage(self, description):
        if self._other:
            self._other.stage(description)

    def advance(self, work):
        self.done += work
        if self._other:
            self._other.advance(work)

    def say(self, message):
        self.said.append(message)
        if self._other:
            self._other.say(message)


def strict_loads(text):
    """Parses JSON, refusing the NaN and Infinity that Python would accept."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def read_metrics(folder):
    return [strict_loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def idx_bytes(array):
    """A uint8 array as an IDX file."""
    array = np.asarray(array, np.uint8)
    shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def write_idx(directory, train=60, test=20, size=(28, 28), zipped=True):
    """Writes the four files of a made-up data set whose images show their label; returns their content by name."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {}
    for part, examples in [("train", train), ("t10k", test)]:
        labels = np.arange(examples) % 10
        images = np.random.default_rng(examples).integers(0, 20, (examples, *size))
        images[np.arange(examples), labels, :] = 255
        contents[f"{part}-images-idx3-ubyte"] = idx_bytes(images)
        contents[f"{part}-labels-idx1-ubyte"] = idx_bytes(labels)
    for name, content in contents.items():
        if zipped:
            (directory / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        else:
            (directory / name).write_bytes(content)
    return contents
