import json
import shutil

import numpy as np
import pytest

from rk_optax.experiment.config import OptimizerConfig
from rk_optax.experiment.entrants import build_optimizer
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.loop import Point, Trainer
from rk_optax.experiment.store.checkpoints import Checkpoints, named
from rk_optax.experiment.tasks.supervised import build_task, probe_loss

from ..helpers import TRAIN, read_metrics, run_command


@pytest.fixture(scope="module")
def task():
    return build_task(TRAIN.data, TRAIN.model)


def trainer(task, factory="heun", **options):
    optimizer = build_optimizer(
        "x", OptimizerConfig(factory, (0.1, 1.0), options=options), probe_loss(TRAIN.model), has_rate=True
    )
    return Trainer(task, optimizer, 0, 0.1, 2)


@pytest.fixture(scope="module")
def saved(task, tmp_path_factory, compilation):
    """A folder with the checkpoints of steps 2 and 4, their trainer, and the states as they were."""
    path, own, states = tmp_path_factory.mktemp("saved") / "checkpoints", trainer(task, momentum=0.9), {}
    with Checkpoints(path, 5) as checkpoints:
        for point in own.run(4):
            if point.steps:
                checkpoints.save(point.steps, point.seconds, point.state)
                states[point.steps] = {name: np.array(leaf) for name, leaf in named(point.state).items()}
    return path, own, states


@pytest.fixture
def path(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "checkpoints")


def restore(path, own):
    with Checkpoints(path, 5) as checkpoints:
        restored = checkpoints.restore(own.layout)
    return restored and Point(*restored[:2], own.restored(restored[2]))


@pytest.mark.slow
def test_a_checkpoint_holds_the_whole_state(saved, path):
    point = restore(path, saved[1])
    assert point.steps == 4
    assert point.seconds > 0
    found, wanted = named(point.state), saved[2][4]
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        assert leaf.dtype == wanted[name].dtype
        np.testing.assert_array_equal(leaf, wanted[name])
    # The solver's state with its counts and momentum, BatchNorm's averages, the dropout key.
    assert int(point.state.opt_state.cost.gradients) == int(point.state.cost.gradients) == 8
    for part in ("cost", "accepted", "trace", "batch_stats", "key", "step"):
        assert any(part in name for name in found)


def test_no_checkpoint(saved, tmp_path):
    assert restore(tmp_path / "none", saved[1]) is None


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("factory", "difference"),
    [("euler", r".*trace.* is float32.*expects nothing there"), ("adam", r".*count is missing, .*expects int32")],
)
def test_another_layout_is_refused_by_name(task, path, factory, difference):
    with pytest.raises(
        UsageError, match=rf"4 has another layout: {difference}.*remove that folder to go on from step 2"
    ):
        restore(path, trainer(task, factory))


def test_another_format_is_refused(saved, path):
    about = path / "4" / "about.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 0}))
    with pytest.raises(UsageError, match=r"4 is of another version of rk-optax; remove that folder to go on from"):
        restore(path, saved[1])
    (path / "index.json").write_text("{}")  # as in the first format
    with pytest.raises(UsageError, match=rf"checkpoints of another version of rk-optax; remove {path} to start anew"):
        restore(path, saved[1])


def test_a_damaged_description_is_refused(saved, path):
    for content in (b"", b"{", b"\xff", b"[]", b'{"format": 2}', b'{"format": 2, "layout": {}, "files": {}}'):
        (path / "4" / "about.json").write_bytes(content)
        with pytest.raises(UsageError, match=r"4 is damaged: about\.json: .*; remove that folder to go on from step 2"):
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


def test_a_checkpoint_counts_once_it_is_described(saved, path):
    """A kill between the arrays and their description leaves a folder that does not count."""
    (path / "4" / "about.json").unlink()
    point = restore(path, saved[1])
    assert point.steps == 2
    with Checkpoints(path, 5) as checkpoints:
        for later in saved[1].run(4, point):
            checkpoints.save(later.steps, later.seconds, later.state)
    assert restore(path, saved[1]).steps == 4


@pytest.mark.slow
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
            checkpoints.save(point.steps, point.seconds, point.state)
    assert sorted(path.name for path in (tmp_path / "few").iterdir()) == ["6", "8"]
