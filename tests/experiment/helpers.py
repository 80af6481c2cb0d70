"""What the tests of the experiment runner share."""

import contextlib
import dataclasses
import gzip
import io
import json

import numpy as np
import pytest

from rk_optax.experiment.cli import main
from rk_optax.experiment.config import (
    BudgetConfig,
    CompareConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TrainOptimizerConfig,
    TuningConfig,
)

SMOKE = CompareConfig(
    optimizers={
        "sgd": OptimizerConfig("sgd", (0.05, 0.5)),
        "momentum": OptimizerConfig("momentum", (0.01, 0.1), options={"momentum": 0.9}),
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

# What is really run: a method whose steps cost one gradient, one whose steps cost two, and one whose steps differ.
RUN = dataclasses.replace(
    SMOKE,
    optimizers={
        "momentum": OptimizerConfig("momentum", (0.01, 0.1), options={"momentum": 0.9}),
        "heun": OptimizerConfig("heun", (0.05, 0.5)),
        "rkc": OptimizerConfig("rkc", options={"max_stages": 10}),
    },
    model=ModelConfig(hidden=()),
)

RACE = """
from rk_optax.experiment.config import EntrantConfig, RaceConfig

def get_config():
    return RaceConfig(
        problem="gp_dual",
        problem_options={"points": 20},
        entrants={
            "gd": EntrantConfig("sgd", trials=(0.5, 1.0), steps=20, chunk=10),
            "adam": EntrantConfig("adam", trials=(0.1,), schedule="cosine", steps=20, chunk=10),
            "both": EntrantConfig("adam_then_lbfgs", trials=(0.1,), options={"adam_steps": 4}, steps=8, chunk=4),
            "rkc": EntrantConfig("rkc", options={"max_stages": 20}, steps=20, chunk=10),
        },
        seeds=(0, 1),
        targets=(0.9, 1e-30),
    )
"""

# BatchNorm, dropout, momentum and a schedule: all that a checkpoint has to bring back. A batch that no two of the eight
# devices of the tests can share.
TRAIN = TrainConfig(
    TrainOptimizerConfig("heun", 0.1, schedule="cosine", warmup_steps=2, options={"momentum": 0.9}),
    data=DataConfig(batch_size=63),
    model=ModelConfig("cnn", hidden=(4,), activation="relu", dropout=0.3),
    steps=24,
    evaluate_every=4,
)


def write_train_config(path, config=TRAIN):
    """Writes a config file that returns this configuration."""
    imports = "from rk_optax.experiment.config import *\nfrom pathlib import *\n"
    path.write_text(f"{imports}def get_config():\n    return {config!r}\n")
    return path


def run_command(*argv):
    """Runs the command line in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_info:
        main([str(argument) for argument in argv])
    return exit_info.value.code, out.getvalue(), err.getvalue()


def race(*argv):
    """Runs `rk-optax race`: the exit code."""
    with pytest.raises(SystemExit) as done:
        main(["race", *map(str, argv)])
    return done.value.code


def without_time(records):
    """Metrics as they have to be the same in every run."""
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


class Silent:
    """A reporter that remembers, and tells another one where there is one."""

    def __init__(self, other=None):
        self.work, self.done, self.said, self._other = 0, 0, [], other

    def start(self, work):
        self.work = work
        if self._other:
            self._other.start(work)

    def phase(self, description):
        if self._other:
            self._other.phase(description)

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
        images[np.arange(examples), labels % size[0], :] = 255
        contents[f"{part}-images-idx3-ubyte"] = idx_bytes(images)
        contents[f"{part}-labels-idx1-ubyte"] = idx_bytes(labels)
    for name, content in contents.items():
        if zipped:
            (directory / f"{name}.gz").write_bytes(gzip.compress(content, 1))
        else:
            (directory / name).write_bytes(content)
    return contents
