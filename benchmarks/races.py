"""Collects finished races into benchmarks/results and prints their tables for RESULTS.md.

rk-optax race configs/race_poisson.py --out runs/poisson
python benchmarks/races.py runs/poisson    # writes benchmarks/results/race_poisson.json
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def collect(folder: Path) -> None:
    """Copies the summary of a race under the name of its folder, with the configuration and versions that made it."""
    run, summary = (json.loads((folder / name).read_text()) for name in ("config.json", "summary.json"))
    content = {"config": run["config"], "versions": run["versions"], "device": run["device"], **summary}
    (RESULTS / f"race_{folder.name}.json").write_text(json.dumps(content, indent=1) + "\n")


def table(name: str) -> str:
    """The table of a collected race: gradients / V / seconds to every target, and where each entrant ends."""
    race = json.loads((RESULTS / f"race_{name}.json").read_text())
    targets = [price["error"] for price in race["entrants"][0]["targets"]]
    head = ["entrant", *(f"≤ {target:g}" for target in targets), f"{race['error']} at the end [range]", "after, s"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_row(entrant)) + " |" for entrant in race["entrants"]]
    return "\n".join(lines)


def _row(entrant: dict[str, Any]) -> list[str]:
    tuned = "" if entrant["tuned"] is None else f" ({entrant['tuned']:g})"
    prices = [
        "–" if price["v"] is None else f"{price['gradients']:.0f} / {price['v']:.0f} / {price['seconds']:.3g}"
        for price in entrant["targets"]
    ]
    low, high = ("diverged" if error is None else f"{error:.2g}" for error in entrant["final_error_range"])
    middle = "diverged" if entrant["final_error"] is None else f"{entrant['final_error']:.2g}"
    return [
        entrant["entrant"] + tuned,
        *prices,
        f"{middle} [{low}, {high}]",
        f"{entrant['seconds']:.3g}",
    ]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        collect(Path(argument))
    for path in sorted(RESULTS.glob("race_*.json")):
        print(f"\n{path.stem}\n\n{table(path.stem.removeprefix('race_'))}")
