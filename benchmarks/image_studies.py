"""The studies of RESULTS.md on MNIST and Fashion-MNIST from their run folders: small JSON, and the tables in Markdown.

for size in 16 64 1024 8192; do
    rk-optax compare configs/mnist_$size.py --data-dir DIRECTORY_OF_THE_IDX_FILES --out runs/mnist_$size
done
python benchmarks/image_studies.py mnist --runs runs    # writes benchmarks/results/mnist_*.json
python benchmarks/image_studies.py mnist                # prints the tables from the JSON

The other studies are fashion, with batches of 16, 64 and 1024, and fashion_cnn with 64.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
# The batch sizes of every study.
STUDIES = {"mnist": (16, 64, 1024, 8192), "fashion": (16, 64, 1024), "fashion_cnn": (64,)}
NAMES = {
    "sgd": "SGD",
    "momentum": "momentum",
    "adam": "Adam",
    "heun": "Heun",
    "rk4": "RK4",
    "rk4_adagrad": "RK4 + preconditioner",
    "rk4_dal": "RK4 + DAL",
    "rk4_momentum": "RK4 + momentum",
    "rk4_all": "RK4 + all three",
    "rk4_split": "RK4, split batch",
}


def collect(folder: Path) -> dict[str, Any]:
    """What is worth keeping of a finished run: no paths, floats to six digits."""

    def read(name: str) -> Any:
        return json.loads((folder / name).read_text(encoding="utf-8"))

    resolved, summary = read("config.json"), read("summary.json")
    del resolved["config"]["data"]["data_dir"]
    for optimizer in summary["optimizers"]:
        optimizer["curve"] = read(f"pieces/compare-{optimizer['optimizer']}.json")
    return _rounded({"config": resolved["config"], "versions": resolved["versions"], **summary})


def load(study: str, size: int | str) -> dict[str, Any]:
    """The committed results of one batch size of a study."""
    return json.loads((RESULTS / f"{study}_{size}.json").read_text(encoding="utf-8"))


def accuracies(result: dict[str, Any], name: str) -> np.ndarray:
    """Test accuracy in percent after all updates, by seed."""
    return _curve(result, name)[1][:, -1]


def difference(result: dict[str, Any], name: str, other: str) -> str:
    """How far one is ahead of another after all updates, seed by seed: mean, range, and in how many seeds it is."""
    by_seed = accuracies(result, name) - accuracies(result, other)
    ahead = f"{(by_seed > 0).sum()} of {len(by_seed)}"
    return f"{by_seed.mean():+.2f} [{by_seed.min():+.2f}, {by_seed.max():+.2f}], {ahead}".replace("-", "−")


def overview(study: str) -> str:
    """Test accuracy at equal steps, by batch size."""
    results = [load(study, size) for size in STUDIES[study]]
    lines = ["| test accuracy at equal steps, % | " + " | ".join(f"batch {size}" for size in STUDIES[study]) + " |"]
    lines.append("|---" * (1 + len(STUDIES[study])) + "|")
    best = [max(accuracies(result, name).mean() for name in NAMES) for result in results]
    for name, shown in NAMES.items():
        cells = []
        for result, top in zip(results, best, strict=True):
            values = accuracies(result, name)
            mean = f"{values.mean():.2f}"
            mean = f"**{mean}**" if values.mean() == top else mean
            cells.append(f"{mean} [{values.min():.2f}, {values.max():.2f}]")
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against(study: str) -> str:
    """Paired differences in test accuracy at equal steps, by batch size."""
    pairs = [("rk4", "adam"), ("rk4", "momentum"), ("rk4", "sgd"), ("heun", "rk4"), ("rk4_all", "adam")]
    pairs += [(name, "rk4") for name in ("rk4_adagrad", "rk4_dal", "rk4_momentum", "rk4_all", "rk4_split")]
    lines = ["| difference, points | " + " | ".join(f"batch {size}" for size in STUDIES[study]) + " |"]
    lines.append("|---" * (1 + len(STUDIES[study])) + "|")
    for name, other in pairs:
        cells = [difference(load(study, size), name, other) for size in STUDIES[study]]
        lines.append(f"| {NAMES[name]} − {NAMES[other]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def at_equal_loss(study: str) -> str:
    """How far RK4 ends ahead of others in test accuracy where those have the training loss it ends with."""
    lines = [
        "| RK4 ahead at its last training loss, points | "
        + " | ".join(f"batch {size}" for size in STUDIES[study])
        + " |"
    ]
    lines.append("|---" * (1 + len(STUDIES[study])) + "|")
    for name in ("sgd", "momentum", "adam", "rk4_adagrad", "rk4_dal", "rk4_momentum", "rk4_all"):
        cells = []
        for size in STUDIES[study]:
            rk4, other = (_curve(load(study, size), which) for which in ("rk4", name))
            reached = [np.nanmin(loss) <= goal[-1] for loss, goal in zip(other[0], rk4[0], strict=True)]
            # Losses do not fall in every step: what counts is the first time at which one is that low.
            ahead = np.array(
                [
                    mine[-1] - np.interp(-np.log(goal[-1]), -np.log(np.minimum.accumulate(loss)), theirs)
                    for goal, mine, loss, theirs in zip(*rk4, *other, strict=True)
                ]
            )
            spread = f"{ahead.mean():+.2f} [{ahead.min():+.2f}, {ahead.max():+.2f}]".replace("-", "−")
            cells.append(spread if all(reached) else f"not reached in {len(reached) - sum(reached)} of {len(reached)}")
        lines.append(f"| than {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(study: str, size: int) -> str:
    """One batch size at equal steps, cost and seconds."""
    result = load(study, size)
    head = [
        "",
        "rate",
        "ms per update",
        *(f"equal {equal}: accuracy, %; loss" for equal in ("steps", "cost", "seconds")),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    rows = {(row["equal"], row["optimizer"]): row for row in result["table"]}
    optimizers = {optimizer["optimizer"]: optimizer for optimizer in result["optimizers"]}
    timed = result["config"]["timed_updates"]
    for name, shown in NAMES.items():
        totals = 1e3 * np.array(optimizers[name]["timed_seconds"]) / timed
        edge = {"lowest": " (lowest)", "highest": " (highest)", None: ""}[optimizers[name]["at_edge_of_grid"]]
        cells = [
            shown,
            f"{optimizers[name]['learning_rate']:.2g}{edge}",
            f"{np.median(totals):.3g} [{totals.min():.3g}, {totals.max():.3g}]",
        ]
        for equal in ("steps", "gradients", "seconds"):
            row = rows[equal, name]
            cells.append(
                f"{_shown(row['test_accuracy'], 100, '.2f')}; {_shown(row['train_loss'], 1, '.3g')} ({row['steps']})"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder of the runs STUDY_16, STUDY_64 and so on")
    options = parser.parse_args(arguments)
    study = options.study
    if options.runs:
        # A run beside those of the study: DAL with an exact product costs two gradients more.
        for run in (*STUDIES[study], *(["8192_dal"] if study == "mnist" else [])):
            text = json.dumps(collect(options.runs / f"{study}_{run}"), separators=(",", ":"))
            (RESULTS / f"{study}_{run}.json").write_text(text + "\n", encoding="utf-8")
    sizes = (f"batch {size}\n\n{details(study, size)}" for size in STUDIES[study])
    print("\n\n".join([overview(study), against(study), at_equal_loss(study), *sizes]))


def _curve(result: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Training loss and test accuracy in percent, (seed, point) each."""
    (optimizer,) = (optimizer for optimizer in result["optimizers"] if optimizer["optimizer"] == name)
    curve = optimizer["curve"]
    return np.array(curve["train_loss"], float), 100 * np.array(curve["test_accuracy"], float)


def _error(accuracy: float) -> float:
    return 100 * (1 - accuracy)


def _shown(spread: dict[str, float], factor: float, form: str) -> str:
    if any(value is None for value in spread.values()):
        return "diverged"
    mean, low, high = (format(factor * spread[key], form) for key in ("mean", "min", "max"))
    return f"{mean} [{low}, {high}]"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
