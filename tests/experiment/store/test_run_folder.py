import dataclasses

import numpy as np
import pytest

from rk_optax import __version__
from rk_optax.experiment.config import CompareConfig, OptimizerConfig
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.store.run_folder import RunFolder, first_difference, stored_config

from ..helpers import read_metrics, strict_loads


def test_what_is_not_finite_becomes_null(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.log("x", a=float("nan"), b=np.float32("inf"), c=np.array([1.0, np.nan]), d="x", e=None, f=np.int32(3))
    assert read_metrics(tmp_path / "run") == [
        {"piece": "x", "a": None, "b": None, "c": [1.0, None], "d": "x", "e": None, "f": 3}
    ]


def test_lines_are_on_disk_at_once(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.log("x", a=1)
        assert read_metrics(tmp_path / "run") == [{"piece": "x", "a": 1}]


def test_resolved_config_and_what_it_ran_on(smoke_config, tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.write_config("compare", "smoke", smoke_config)
    written = strict_loads((tmp_path / "run" / "config.json").read_text())
    assert written["config"]["optimizers"]["momentum"]["options"] == {"momentum": 0.9}
    assert written["config"]["budget"] == {
        "gradients": 48,
        "evaluate_every": 4,
        "updates": None,
        "scored_examples": None,
    }
    assert written["versions"]["rk-optax"] == __version__
    assert {"python", "jax", "optax", "flax"} <= set(written["versions"])
    assert written["device"]["platform"] == "cpu"


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(UsageError, match=r"is not empty: choose another folder with --out"):
        RunFolder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_an_empty_folder_is_taken(tmp_path):
    with RunFolder(tmp_path):
        pass
    assert (tmp_path / "metrics.jsonl").exists()


def test_a_path_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write a run there"):
        RunFolder(tmp_path / "file" / "run")
    with pytest.raises(UsageError, match="cannot write a run there"):
        RunFolder(tmp_path / "file")


@pytest.fixture
def interrupted(smoke_config, tmp_path):
    """A run of two pieces, the second of which was cut short in the middle of a line."""
    with RunFolder(tmp_path / "run") as folder:
        folder.write_config("compare", "smoke", smoke_config)
        folder.log("first", a=1)
        folder.finish("first", {"a": [1.5, float("nan")]})
        folder.log("second", a=2)
    with (folder.path / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"piece": "sec')
    return folder.path


def test_resuming_keeps_what_was_finished_and_forgets_the_rest(interrupted, smoke_config):
    with RunFolder(interrupted, resume=True) as folder:
        folder.write_config("compare", "smoke", smoke_config)
        assert folder.finished("first") == {"a": [1.5, None]}
        assert folder.finished("second") is None
        folder.log("second", a=3)
    assert read_metrics(interrupted) == [{"piece": "first", "a": 1}, {"piece": "second", "a": 3}]


def test_a_stored_config_is_the_one_that_was_written(interrupted, smoke_config):
    stored = stored_config(interrupted, "compare", CompareConfig)
    assert stored == smoke_config
    assert first_difference(stored, smoke_config) is None
    other = dataclasses.replace(smoke_config, budget=dataclasses.replace(smoke_config.budget, gradients=96))
    assert first_difference(stored, other) == "budget.gradients = 48, not 96"
    fewer = {name: optimizer for name, optimizer in smoke_config.optimizers.items() if name != "adam"}
    difference = first_difference(stored, dataclasses.replace(smoke_config, optimizers=fewer))
    assert difference == "optimizers.adam.factory = 'adam', not None"


def test_resuming_another_command_is_refused(interrupted):
    with pytest.raises(UsageError, match=r"holds no run of rk-optax train"):
        stored_config(interrupted, "train", CompareConfig)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "pieces/a.json"])
def test_a_damaged_file_says_which_and_what_to_do(tmp_path, name):
    folder = tmp_path / "run"
    with RunFolder(folder) as run:
        run.write_config("compare", "digits", CompareConfig({"sgd": OptimizerConfig("sgd", (0.1, 1.0))}))
        run.log("a", loss=1.0)
        run.finish("a", {"loss": 1.0})
    (folder / name).write_text('{"piece": nonsense}\n')

    def resume():
        stored_config(folder, "compare", CompareConfig)
        with RunFolder(folder, resume=True) as run:
            run.finished("a")

    with pytest.raises(UsageError, match=rf"{name} is damaged"):
        resume()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UsageError, match=r"holds no run to resume: start one with --out"):
        stored_config(tmp_path / "run", "compare", CompareConfig)
    assert not (tmp_path / "run").exists()
