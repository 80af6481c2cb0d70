"""The committed races are those of their configs, and RESULTS.md says what they say."""

import json
import runpy
from pathlib import Path

import pytest

from rk_optax.experiment.config import RaceConfig, load

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("race_*.json"))
table = runpy.run_path(str(ROOT / "benchmarks" / "races.py"))["table"]


@pytest.fixture(params=RESULTS, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_the_results_are_those_of_the_config(path):
    config, result = load(ROOT / "configs" / f"{path.stem}.py", RaceConfig), json.loads(path.read_text())
    assert result["config"]["seeds"] == list(config.seeds)
    assert [row["entrant"] for row in result["entrants"]] == list(config.entrants)
    for row in result["entrants"]:
        entrant = config.entrants[row["entrant"]]
        assert row["tuned"] is None if not entrant.trials else row["tuned"] in entrant.trials
        assert row["seeds"] == len(config.seeds)


def test_the_table_is_in_the_text(path):
    assert table(path.stem.removeprefix("race_")) in (ROOT / "RESULTS.md").read_text(encoding="utf-8")


def test_the_steps_with_new_points_are_in_the_text():
    runs = json.loads((ROOT / "benchmarks" / "results" / "new_points_by_steps.json").read_text())["seeds"]
    error = runs["0"]["error"]
    first = next(count for count, value in enumerate(error, 1) if value <= 1e-4)
    said = f"is at 1e-4 after {first} steps, at {error[66]:.1e} after 67 and at {error[171]:.1e} after 172"
    assert said in (ROOT / "RESULTS.md").read_text(encoding="utf-8")
