import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from rk_optax import TABLEAUS
from rk_optax.experiment.runs.summary import summarize
from rk_optax.experiment.show.tables import (
    comparison_notes,
    comparison_table,
    make_console,
    optimizer_table,
    race_table,
    solver_table,
)


def printed(renderable, width=100):
    stream = io.StringIO()
    Console(width=width, file=stream).print(renderable)
    return stream.getvalue()


def test_comparison_fits_100_columns_without_folding(smoke):
    rows = summarize(smoke.results)
    lines = printed(comparison_table(rows)).splitlines()
    assert max(map(len, lines)) <= 100
    filled = [line for line in lines if line.strip()]
    assert len(filled) == len(rows) + 2  # heading and rule


def test_comparison_has_three_blocks_of_all_entrants(smoke):
    text = printed(comparison_table(summarize(smoke.results)))
    for name in smoke.config.optimizers:
        assert sum(name in line.split() for line in text.splitlines()) == 3
    starts = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert [start for start in starts if start in ("steps", "gradients", "seconds")] == [
        "steps",
        "gradients",
        "seconds",
    ]


def test_numbers_are_shown_as_mean_and_range(smoke):
    row = summarize(smoke.results)[0]
    text = printed(comparison_table([row]))
    accuracy, loss = row.test_accuracy, row.train_loss
    assert f"{100 * accuracy.mean:.1f} [{100 * accuracy.min:.1f}, {100 * accuracy.max:.1f}]" in text
    assert f"{loss.mean:#.3g} [{loss.min:#.3g}, {loss.max:#.3g}]" in text


def test_a_diverged_seed_is_called_so(smoke):
    result = smoke.results[0]
    loss = result.runs.train_loss.copy()
    loss[0, -1] = np.nan
    diverged = result._replace(runs=result.runs._replace(train_loss=loss))
    assert "diverged" in printed(comparison_table(summarize([diverged])))


def test_notes_say_where_a_grid_was_too_narrow(smoke):
    results = [
        result._replace(
            tuned=result.tuned._replace(at_edge=None), timing=result.timing._replace(totals=np.array([1.0, 1.2]))
        )
        for result in smoke.results
    ]
    assert not any("Caution" in note for note in comparison_notes(smoke.config, results))
    results[0] = results[0]._replace(tuned=results[0].tuned._replace(at_edge="highest"))
    (caution,) = [note for note in comparison_notes(smoke.config, results) if "Caution" in note]
    assert "momentum" in caution
    assert "highest" in caution
    assert "optimizers.momentum.learning_rates" in caution


def test_notes_say_when_times_are_not_to_be_trusted(smoke):
    timing = smoke.results[0].timing._replace(totals=np.array([0.2, 0.2, 0.5]))
    notes = comparison_notes(smoke.config, [smoke.results[0]._replace(timing=timing)])
    assert any("factor of up to 2.5" in note and "equal seconds" in note for note in notes)


def test_notes_say_what_was_tuned_and_timed(smoke):
    config = dataclasses.replace(smoke.config, timed_runs=9)
    text = " ".join(comparison_notes(config, smoke.results))
    assert "3 seeds" in text
    assert "best of 3" in text
    assert "median of 9" in text
    assert "heun" in text
    assert "a Hessian-vector product counts as two" in text  # because of rkc


def test_every_solver_is_listed_with_its_properties():
    lines = printed(solver_table(TABLEAUS), width=200).splitlines()
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert set(TABLEAUS) <= set(rows)
    assert rows["dopri5"].split()[1:4] == ["5(4)", "7", "6"]
    assert rows["rk4"].split()[1:6] == ["4", "4", "4", "2.785", "0.696"]
    for name, tableau in TABLEAUS.items():
        assert rows[name].rstrip().endswith(tableau.source)


def test_every_other_optimizer_is_listed_with_what_it_needs():
    text = printed(optimizer_table(TABLEAUS), width=200)
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    for name in ("rkc", "rkl", "rosenbrock_euler", "ros2", "residual_euler"):
        assert rows[name].split()[1] == "nothing"
    for name in ("backward_euler", "sdirk3", "gauss4", "etdrk2"):
        assert "a learning rate" in rows[name]
    assert "no stability limit" in rows["backward_euler"]
    assert all(name in text for name in ("lbfgs", "adamw", "ssbroyden", "cholesky"))


def test_a_race_never_cuts_a_name():
    """At 100 columns the name "adam, then lbfgs, 0.003" ended in an ellipsis."""
    price = {"error": 1e-3, "reached": 5, "gradients": 123456.0, "v": 123456.0, "seconds": 123.45}
    row = {"entrant": "adam, then lbfgs", "tuned": 0.003, "seeds": 5, "final_error": 1.2e-5, "seconds": 123.0}
    row |= {"final_error_range": [1.1e-5, 2.2e-4], "targets": [price] * 3}
    text = printed(race_table([row], "relative L2 error"))
    assert max(map(len, text.splitlines())) <= 100
    assert "adam, then lbfgs, 0.003" in text
    assert "…" not in text
    joined = "".join(line[25:] for line in text.splitlines()).replace(" ", "")
    assert joined.count("123456") >= 1


@pytest.mark.parametrize(("columns", "width"), [(None, 100), ("73", 73)])
def test_width_in_a_pipe(monkeypatch, columns, width):
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", columns)
    assert make_console().width == width
