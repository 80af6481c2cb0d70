"""The committed study of forward gradients is that of the script, and RESULTS.md says what it says."""

import json
import runpy
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
STUDY = runpy.run_path(str(ROOT / "benchmarks" / "forward_gradients.py"))
RESULT = json.loads((ROOT / "benchmarks" / "results" / "forward_gradients.json").read_text())


def test_the_table_is_in_the_text_and_of_all_methods():
    rows = RESULT["methods"]
    assert [row["method"] for row in rows] == list(STUDY["METHODS"])
    assert all(row["rate"] in STUDY["RATES"] and len(row["test_error"]) == 3 for row in rows)
    assert STUDY["table"](rows) in (ROOT / "RESULTS.md").read_text(encoding="utf-8")


def test_activities_come_near_back_propagation_and_weights_do_not():
    error = {row["method"]: np.mean(row["test_error"]) for row in RESULT["methods"]}
    assert error["back-propagation"] < min(error["FG-A"], error["LG-FG-A"])
    assert max(error["FG-A"], error["LG-FG-A"]) < error["FG-W"] / 3
