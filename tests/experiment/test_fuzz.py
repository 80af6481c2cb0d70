"""Damaged files: whatever is in them, a UsageError at most, which the command line shows as one line.

RK_OPTAX_FUZZ=20 tries twenty times as many.
"""

import os
import shutil

import numpy as np
import pytest

from rk_optax.experiment.checkpoint import Checkpoints, _named
from rk_optax.experiment.config import CompareConfig, DataConfig, TrainConfig, check, check_train, load
from rk_optax.experiment.curves import read_curves
from rk_optax.experiment.data import load_dataset
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.optimizers import build_optimizer
from rk_optax.experiment.train import Training
from rk_optax.experiment.train_folder import TrainFolder, stored_config
from rk_optax.experiment.training import Trainer

from .helpers import SMOKE, TRAIN, write_idx, write_train_config

ROUNDS = int(os.environ.get("RK_OPTAX_FUZZ", "1"))

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture
def rng(request):
    seed = int(os.environ.get("RK_OPTAX_FUZZ_SEED", "0"))
    return np.random.default_rng([seed, *map(ord, request.node.name)])


def damaged(content, rng):
    """The bytes with one or a few things wrong."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        start, end = sorted(rng.integers(0, len(content) + 1, 2))
        near = min(int(end), int(start) + 12)
        match rng.integers(8):
            case 0:
                content = content[:start]
            case 1:
                del content[start:near]
            case 2:
                content[start:near] = rng.bytes(near - start)
            case 3:
                content[start:start] = rng.bytes(int(rng.integers(1, 20)))
            case 4 if content:
                content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            case 5 if content:  # headers are short and full of meaning
                content[rng.integers(min(16, len(content)))] = rng.integers(256)
            case 6:
                content[start:near] = bytes(near - start)
            case 7:
                content += content[start:end]
    return bytes(content)


def refused(action):
    """Whether it ended in a UsageError; every other exception gets through."""
    try:
        action()
    except UsageError:
        return True
    return False


def test_idx_files(tmp_path, rng):
    plain, zipped = write_idx(tmp_path / "plain", zipped=False), tmp_path / "zipped"
    write_idx(zipped)
    refusals = 0
    for round in range(100 * ROUNDS):
        directory = (tmp_path / "plain", zipped)[round % 2]
        path = directory / (rng.choice(sorted(plain)) + (".gz" if round % 2 else ""))
        original = path.read_bytes()
        path.write_bytes(damaged(original, rng))
        refusals += refused(lambda: load_dataset(DataConfig("mnist", directory, batch_size=8)))
        path.write_bytes(original)
    assert refusals > 40 * ROUNDS


@pytest.mark.parametrize(
    ("config", "kind", "checked"), [(TRAIN, TrainConfig, check_train), (SMOKE, CompareConfig, check)]
)
def test_configs(tmp_path, rng, config, kind, checked):
    path = write_train_config(tmp_path / "config.py", config)
    original = path.read_bytes()
    refusals = 0
    for _ in range(60 * ROUNDS):
        path.write_bytes(damaged(original, rng))
        refusals += refused(lambda: checked(load(path, kind)))
    assert refusals > 40 * ROUNDS


def test_stored_configs(run, rng):
    path = run / "config.json"
    original = path.read_bytes()
    refusals = 0
    for _ in range(100 * ROUNDS):
        path.write_bytes(damaged(original, rng))
        refusals += refused(lambda: check_train(stored_config(run)))
        refused(lambda: read_curves(run))
    assert refusals > 40 * ROUNDS


def test_metrics(run, rng):
    path = run / "metrics.jsonl"
    original = path.read_bytes()
    refusals = 0
    for _ in range(100 * ROUNDS):
        path.write_bytes(damaged(original, rng))
        refused(lambda: read_curves(run))
        with TrainFolder(run, resume=True) as folder:
            refusals += refused(lambda: folder.rewind(24))
    assert refusals > 40 * ROUNDS


@pytest.fixture(scope="module")
def trainer(finished):
    training = Training(stored_config(finished))
    optimizer = build_optimizer("optimizer", TRAIN.optimizer.entrant())._replace(make=training._optimizer.make)
    return Trainer(training._task, optimizer, 0, 0.1, 4)


def restore(run, trainer):
    with Checkpoints(run / "checkpoints", 3) as checkpoints:
        return checkpoints.restore(trainer)


def test_checkpoints(run, trainer, rng, capfd):
    whole = {name: np.asarray(leaf) for name, leaf in _named(restore(run, trainer).state).items()}
    folder, spare = run / "checkpoints", run / "spare"
    folder.rename(spare)
    refusals = 0
    for _ in range(30 * ROUNDS):
        shutil.copytree(spare, folder)
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parts[-2] not in ("16", "20"))
        files += [folder / "index.json"] * 5
        path = files[rng.integers(len(files))]
        if rng.integers(5):
            path.write_bytes(damaged(path.read_bytes(), rng))
        else:
            path.unlink()

        def read():
            point = restore(run, trainer)
            # What is not refused is the last or an earlier checkpoint, as it was written.
            assert point.steps in (16, 20, 24)
            if point.steps == 24:
                for name, leaf in _named(point.state).items():
                    np.testing.assert_array_equal(leaf, whole[name])

        refusals += refused(read)
        shutil.rmtree(folder)
    assert refusals > 8 * ROUNDS
    assert capfd.readouterr().err == ""
