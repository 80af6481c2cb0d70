"""Damaged files: whatever is in them, a UsageError at most, which the command line shows as one line.

RK_OPTAX_FUZZ=20 tries twenty times as many.
"""

import os
import shutil

import numpy as np
import pytest

from rk_optax.experiment.config import CompareConfig, DataConfig, TrainConfig, load
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.train import Training
from rk_optax.experiment.show.curves import read_curves
from rk_optax.experiment.store.checkpoints import Checkpoints, named
from rk_optax.experiment.store.run_folder import TrainFolder, stored_config
from rk_optax.experiment.tasks.data import load_dataset

from .helpers import SMOKE, TRAIN, write_idx, write_train_config

ROUNDS = int(os.environ.get("RK_OPTAX_FUZZ", "1"))


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


@pytest.mark.parametrize(("config", "kind"), [(TRAIN, TrainConfig), (SMOKE, CompareConfig)])
def test_configs(tmp_path, rng, config, kind):
    path = write_train_config(tmp_path / "config.py", config)
    original = path.read_bytes()
    refusals = 0
    for _ in range(60 * ROUNDS):
        path.write_bytes(damaged(original, rng))
        refusals += refused(lambda: load(path, kind))
    assert refusals > 40 * ROUNDS


def test_stored_configs(run, rng):
    path = run / "config.json"
    original = path.read_bytes()
    refusals = 0
    for _ in range(100 * ROUNDS):
        path.write_bytes(damaged(original, rng))
        refusals += refused(lambda: stored_config(run, "train", TrainConfig))
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
    return Training(stored_config(finished, "train", TrainConfig)).trainer()


def restore(run, trainer):
    with Checkpoints(run / "checkpoints", 3) as checkpoints:
        return checkpoints.restore(trainer.layout)


@pytest.mark.slow
def test_checkpoints(run, trainer, rng, capfd):
    whole = {name: np.asarray(leaf) for name, leaf in named(restore(run, trainer)[2]).items()}
    folder, spare = run / "checkpoints", run / "spare"
    folder.rename(spare)
    refusals = 0
    for _ in range(30 * ROUNDS):
        shutil.copytree(spare, folder)
        files = sorted(
            path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] == "24"
        )
        files += [folder / "24" / "about.json"] * 5
        path = files[rng.integers(len(files))]
        if rng.integers(5):
            path.write_bytes(damaged(path.read_bytes(), rng))
        else:
            path.unlink()

        def read():
            steps, _, state = restore(run, trainer)
            # What is not refused is the last or an earlier checkpoint, as it was written.
            assert steps in (16, 20, 24)
            if steps == 24:
                for name, leaf in named(state).items():
                    np.testing.assert_array_equal(leaf, whole[name])

        refusals += refused(read)
        shutil.rmtree(folder)
    assert refusals > 8 * ROUNDS
    assert capfd.readouterr().err == ""
