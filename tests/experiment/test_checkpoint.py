import json
import shutil

import numpy as np
import pytest

from rk_optax.experiment.checkpoint import Checkpoints, _named
from rk_optax.experiment.config import OptimizerConfig
from rk_optax.experiment.data import load_dataset
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.models import build_model
from rk_optax.experiment.optimizers import build_optimizer
from rk_optax.experiment.training import Task, Trainer

from .helpers import TRAIN, read_metrics, run_command

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def task():
    return Task(build_model(TRAIN.model, 10), load_dataset(TRAIN.data), 63)


def trainer(task, factory="rk4", **options):
    return Trainer(task, build_optimizer("x", OptimizerConfig(factory, (0.1, 1.0), options)), 0, 0.1, 2)


@pytest.fixture(scope="module")
def saved(task, tmp_path_factory, compilation_cache):
    """A folder with the checkpoints of steps 2 and 4, their trainer, and the states as they were."""
    path, own, states = tmp_path_factory.mktemp("saved") / "checkpoints", trainer(task, momentum=0.9), {}
    with Checkpoints(path, 5) as checkpoints:
        for point in own.run(4):
            if point.steps:
                checkpoints.save(point)
                states[point.steps] = {name: np.array(leaf) for name, leaf in _named(point.state).items()}
    return path, own, states


@pytest.fixture
def path(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "checkpoints")


def restore(path, own):
    with Checkpoints(path, 5) as checkpoints:
        return checkpoints.restore(own)


def test_a_checkpoint_holds_the_whole_state(saved, path):
    point = restore(path, saved[1])
    assert point.steps == 4
    assert point.seconds > 0
    found, wanted = _named(point.state), saved[2][4]
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        assert leaf.dtype == wanted[name].dtype
        np.testing.assert_array_equal(leaf, wanted[name])
    # The solver's state with its counts and momentum, BatchNorm's averages, the dropout key.
    assert int(point.state.opt_state.cost.gradients) == 16
    for part in ("cost", "accepted", "trace", "batch_stats", "key", "step"):
        assert any(part in name for name in found)


def test_no_checkpoint(saved, tmp_path):
    assert restore(tmp_path / "none", saved[1]) is None


@pytest.mark.parametrize(
    ("factory", "difference"),
    [("euler", r".*trace.* is float32.*expects nothing there"), ("adam", r".*count is missing, .*expects int32")],
)
def test_another_layout_is_refused_by_name(task, path, factory, difference):
    with pytest.raises(
        UsageError, match=rf"4 has another layout: {difference}.*remove that folder to go on from step 2"
    ):
        restore(path, trainer(task, factory))


def test_an_older_format_is_refused(saved, path):
    index = path / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 0}))
    with pytest.raises(UsageError, match=rf"checkpoints of another version of rk-optax; remove {path} to start anew"):
        restore(path, saved[1])


def test_a_damaged_index_is_refused(saved, path):
    for content in (b"", b"{", b"\xff", b"[]", b'{"format": 1}', b'{"format": 1, "checkpoints": {"4": {}}}'):
        (path / "index.json").write_bytes(content)
        with pytest.raises(UsageError, match=rf"index\.json is damaged .*; remove {path} to start the run anew"):
            restore(path, saved[1])


@pytest.mark.parametrize("damage", ["changed", "missing", "more"])
def test_a_damaged_file_is_noticed(saved, path, damage):
    file = max((path / "4").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "changed":
            file.write_bytes(content)
        case "missing":
            file.unlink()
        case "more":
            (path / "4" / "more").write_bytes(content)
    with pytest.raises(
        UsageError, match=r"4 is damaged: .* not what was written; remove that folder to go on from step 2"
    ):
        restore(path, saved[1])
    shutil.rmtree(path / "4")
    assert restore(path, saved[1]).steps == 2


def test_a_checkpoint_counts_once_it_is_listed(saved, path):
    """A kill between the arrays and the index leaves a folder that is not listed."""
    index = json.loads((path / "index.json").read_text())
    del index["checkpoints"]["4"]
    (path / "index.json").write_text(json.dumps(index))
    point = restore(path, saved[1])
    assert point.steps == 2
    with Checkpoints(path, 5) as checkpoints:
        for later in saved[1].run(4, point):
            checkpoints.save(later)
    assert restore(path, saved[1]).steps == 4


def test_a_damaged_checkpoint_is_one_line(run):
    for file in (run / "checkpoints" / "24").rglob("*"):
        if file.is_file():
            file.write_bytes(b"x" + file.read_bytes()[:20])
    before = (run / "metrics.jsonl").read_bytes()
    status, out, err = run_command("train", "--resume", run)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"checkpoint {run / 'checkpoints' / '24'} is damaged" in err
    assert err.endswith("remove that folder to go on from step 20\n")
    assert (run / "metrics.jsonl").read_bytes() == before
    shutil.rmtree(run / "checkpoints" / "24")
    assert run_command("train", "--resume", run)[0] == 0
    assert read_metrics(run)[-1]["steps"] == 24


def test_an_index_that_is_lost(run):
    (run / "checkpoints" / "index.json").unlink()
    status, _, err = run_command("train", "--resume", run)
    assert (status, err.count("\n")) == (2, 1)
    assert "index.json is missing; remove" in err


def test_metrics_that_do_not_reach_the_checkpoint(run):
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes().splitlines(keepends=True)[0])
    status, _, err = run_command("train", "--resume", run)
    assert (status, err.count("\n")) == (2, 1)
    assert f"{metrics} is damaged: no metrics of step 24" in err


def test_a_file_in_the_way(saved, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file: cannot hold checkpoints"):
        Checkpoints(tmp_path / "file", 3)


def test_keeps_the_last_few(saved, tmp_path):
    with Checkpoints(tmp_path / "few", 2) as checkpoints:
        for point in saved[1].run(8):
            checkpoints.save(point)
    assert sorted(path.name for path in (tmp_path / "few").iterdir()) == ["6", "8", "index.json"]
