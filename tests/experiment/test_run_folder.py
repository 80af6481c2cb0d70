import numpy as np
import pytest

from rk_optax import __version__
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.run_folder import RunFolder, default_path

from .helpers import read_metrics, strict_loads


def test_what_is_not_finite_becomes_null(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.log(a=float("nan"), b=np.float32("inf"), c=np.array([1.0, np.nan]), d="x", e=None, f=np.int32(3))
    assert read_metrics(tmp_path / "run") == [{"a": None, "b": None, "c": [1.0, None], "d": "x", "e": None, "f": 3}]


def test_lines_are_on_disk_at_once(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.log(a=1)
        assert read_metrics(tmp_path / "run") == [{"a": 1}]


def test_resolved_config_and_what_it_ran_on(smoke_config, tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.write_config("compare", "smoke", smoke_config)
    written = strict_loads((tmp_path / "run" / "config.json").read_text())
    assert written["config"]["optimizers"]["momentum"]["options"] == {"momentum": 0.9}
    assert written["config"]["budget"] == {"gradients": 48, "evaluate_every": 4}
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


def test_default_path_has_config_and_time():
    assert default_path("digits").parts[0] == "runs"
    assert default_path("digits").name.startswith("digits-2")
