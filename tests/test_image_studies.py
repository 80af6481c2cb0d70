"""The committed results of the studies on images are those of their configs, and RESULTS.md says what they say."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from rk_optax.experiment.config import CompareConfig, load
from rk_optax.experiment.runs.plan import make_plan

ROOT = Path(__file__).parents[1]
STUDY = runpy.run_path(str(ROOT / "benchmarks" / "image_studies.py"))
STUDIES = STUDY["STUDIES"]
RUNS = [(study, size) for study, sizes in STUDIES.items() for size in sizes]
TEXT = (ROOT / "RESULTS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("study", "size"), RUNS)
def test_the_results_are_those_of_the_config(study, size):
    config, result = load(ROOT / "configs" / f"{study}_{size}.py", CompareConfig), STUDY["load"](study, size)
    assert result["config"]["data"]["batch_size"] == size
    assert result["config"]["budget"]["updates"] == config.budget.updates
    assert result["config"]["seeds"] == list(config.seeds)
    for entrant, optimizer in zip(make_plan(config), result["optimizers"], strict=True):
        assert entrant.name == optimizer["optimizer"]
        assert [trial["learning_rate"] for trial in optimizer["trials"]] == pytest.approx(entrant.rates, rel=1e-4)
        assert np.shape(optimizer["curve"]["test_accuracy"]) == (
            5,
            1 + entrant.whole.steps // config.budget.evaluate_every,
        )
        assert len(optimizer["timed_seconds"]) == config.timed_runs
    assert "/" not in json.dumps(result)  # no path of a machine


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("table", ["overview", "against", "at_equal_loss"])
def test_the_tables_over_all_batch_sizes_are_in_the_text(table, study):
    assert STUDY[table](study) in TEXT


@pytest.mark.parametrize(("study", "size"), RUNS)
def test_the_table_of_a_batch_size_is_in_the_text(study, size):
    assert STUDY["details"](study, size) in TEXT


def test_every_claim_has_its_config_and_verdict():
    table = next(part for part in TEXT.split("\n\n") if part.startswith("| claim")).splitlines()
    assert table[0].startswith("| claim")
    for row in table[2:]:
        claim, config, verdict, cost = (cell.strip() for cell in row.strip("|").split("|"))
        assert claim
        assert cost
        assert verdict.startswith(("held", "not held", "partly held"))
        assert all((ROOT / "configs" / name.strip("` ")).is_file() for name in config.split(","))


def test_a_run_is_collected_without_its_paths(tmp_path):
    (tmp_path / "pieces").mkdir()
    curve = {"steps": [0, 2], "train_loss": [[1.0, None]], "test_accuracy": [[0.123456789, 0.5]]}
    files = {
        "config.json": {"config": {"data": {"data_dir": "/secret", "name": "mnist"}}, "versions": {"jax": "1"}},
        "summary.json": {"table": [], "optimizers": [{"optimizer": "sgd"}]},
        "pieces/compare-sgd.json": curve,
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    collected = STUDY["collect"](tmp_path)
    assert "/secret" not in json.dumps(collected)
    assert collected["optimizers"][0]["curve"]["test_accuracy"] == [[0.123457, 0.5]]
