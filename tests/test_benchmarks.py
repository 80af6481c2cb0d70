"""The benchmarks run and report what they promise; their figures are nobody's business here."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest

pytestmark = pytest.mark.latest

BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"


INGREDIENTS = ["rk_optax, AdaGrad", "rk_optax, momentum", "rk_optax, DAL free", "rk_optax, DAL product"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmarks") / "step_cost.json"
    # A process of its own, on one device, as a person running it has.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(BENCHMARKS / "step_cost.py"), "--smoke", "--json", str(file)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, json.loads(file.read_text())


@pytest.mark.slow
def test_step_cost_prints_every_program_beside_its_competitors(smoke):
    printed, result = smoke
    rows = {(row["method"], row["program"]): row for row in result["steps"]}
    assert set(rows) == {
        *(("euler", program) for program in ("s x value_and_grad", "optax.sgd", "rk_optax")),
        *(
            ("rk4", program)
            for program in (
                "s x value_and_grad",
                "rk_optax",
                "hand-written",
                "hand-written scan",
                "diffrax",
                *INGREDIENTS,
            )
        ),
        *(("dopri5", program) for program in ("s x value_and_grad", "rk_optax", "unrolled", "diffrax")),
    }
    lines = printed.splitlines()
    for method, program in rows:
        assert any(line.startswith(method) and program in line for line in lines)
    for row in rows.values():
        q1, q3 = row["time_quartiles"]
        assert 0 < q1 <= row["time"] <= q3
        assert row["milliseconds"] > 0
        assert row["temporaries"] > 0


@pytest.mark.slow
def test_step_cost_counts_gradients_and_traces_of_the_loss(smoke):
    _, result = smoke
    rows = {(row["method"], row["program"]): row for row in result["steps"]}
    assert {key: (row["gradients"], row["traces"]) for key, row in rows.items() if key[1] == "rk_optax"} == {
        ("euler", "rk_optax"): (1, 1),
        ("rk4", "rk_optax"): (4, 2),
        ("dopri5", "rk_optax"): (6, 2),
    }
    # One gradient of the caller's, one of the solver's, and for DAL's product one more.
    assert [rows["rk4", name]["traces"] for name in INGREDIENTS] == [2, 2, 2, 3]
    assert rows["rk4", "hand-written"]["traces"] == 4
    assert rows["dopri5", "unrolled"]["traces"] == 6


@pytest.mark.slow
def test_step_cost_reports_compilation_of_a_deep_network_and_the_machine_without_its_name(smoke):
    _, result = smoke
    assert {(row["method"], row["program"]) for row in result["deep"]} == {
        (method, program) for method in ("rk4", "dopri5") for program in ("rk_optax", "unrolled")
    }
    assert all(row["compile_s"] > 0 for row in result["deep"])
    assert set(result["machine"]) == {
        *("device", "cpu_cores", "architecture"),
        *("python", "jax", "jaxlib", "optax", "diffrax"),
    }


@pytest.mark.parametrize("arguments", [("--widths", "5"), ("--rounds", "0"), ("--methods", "rk5")])
def test_step_cost_refuses_bad_flags_and_says_which(arguments, capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(BENCHMARKS / "step_cost.py"))["parse"](arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_stored_results_are_those_of_a_full_run():
    result = json.loads((BENCHMARKS / "results" / "step_cost.json").read_text())
    assert not result["settings"]["smoke"]
    assert result["settings"]["widths"] == [784, 512, 512, 10]
    assert {row["method"] for row in result["steps"]} == {"euler", "rk4", "dopri5", "dopri8"}


@pytest.mark.parametrize(("file", "batch"), [("step_cost_ingredients", 128), ("step_cost_ingredients_1024", 1024)])
def test_the_stored_costs_of_the_ingredients_are_those_of_a_full_run(file, batch):
    result = json.loads((BENCHMARKS / "results" / f"{file}.json").read_text())
    assert not result["settings"]["smoke"]
    assert (result["settings"]["widths"], result["settings"]["batch"]) == ([784, 512, 512, 10], batch)
    rows = {row["program"]: row["time"] for row in result["steps"] if row["method"] == "rk4"}
    assert {"rk_optax", *INGREDIENTS} < set(rows)
    page = (BENCHMARKS.parent / "docs" / "cost.md").read_text(encoding="utf-8")
    for name in ("rk_optax", *INGREDIENTS):
        assert f"| {rows[name]:.2f} (" in page, name


# --- Games -----------------------------------------------------------------------------------------------------------


def test_the_rows_of_the_games_are_those_of_their_figures():
    games = runpy.run_path(str(BENCHMARKS / "games.py"))
    result = json.loads((BENCHMARKS / "results" / "games.json").read_text())
    page = (BENCHMARKS.parent / "RESULTS.md").read_text(encoding="utf-8")
    assert [row["name"] for row in result["results"]] == list(games["ENTRANTS"])
    for row in result["results"]:
        assert row["steps"] * row["gradients_per_step"] == result["about"]["gradients"]
        assert games["cells"](row) in page, row["name"]
