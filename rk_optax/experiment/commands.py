"""The commands of `rk-optax`; importing this needs the `experiment` extra."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from rk_optax.experiment import invocation
from rk_optax.experiment.compare import Comparison
from rk_optax.experiment.config import CompareConfig, TrainConfig
from rk_optax.experiment.curves import read_curves
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.plot import AXES, plot_comparison, plot_curves
from rk_optax.experiment.progress import ProgressBar
from rk_optax.experiment.report import (
    comparison_notes,
    comparison_table,
    make_console,
    solver_table,
    training_summary,
)
from rk_optax.experiment.run_folder import RunFolder
from rk_optax.experiment.summary import as_json, summarize
from rk_optax.experiment.train import Training
from rk_optax.experiment.train_folder import TrainFolder, stored_config
from rk_optax.tableau import TABLEAUS

_COMPARE_HELP = """\
usage: rk-optax compare CONFIG [--out DIR | --resume DIR] [--FIELD VALUE ...]

Tunes the learning rate of every optimizer over equally many trials, trains each over several
seeds at an equal budget of gradient evaluations or of updates, times it, and shows how they compare.

  CONFIG         Python file whose get_config() returns a CompareConfig, e.g. configs/digits.py
  --out DIR      folder for metrics, config and figure (default: runs/<config>-<time>)
  --resume DIR   go on with an interrupted run, with the same config: what it finished is kept
  --FIELD VALUE  overrides a field of the config, e.g. --budget.gradients 1200

`rk-optax compare CONFIG --help` lists the fields of a config with their values."""


_TRAIN_HELP = """\
usage: rk-optax train CONFIG [--out DIR] [--FIELD VALUE ...]
       rk-optax train --resume DIR

Trains a network with one optimizer, writing metrics and checkpoints as it goes.

  CONFIG         Python file whose get_config() returns a TrainConfig, e.g. configs/train_digits.py
  --out DIR      folder for config, metrics and checkpoints (default: runs/<config>-<time>)
  --resume DIR   go on with an interrupted run from its latest checkpoint, with the config it has
  --FIELD VALUE  overrides a field of the config, e.g. --optimizer.learning-rate 0.1

`rk-optax train CONFIG --help` lists the fields of a config with their values."""


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """Trains a network with one optimizer."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """New folder for config, metrics and checkpoints; by default runs/<config>-<time>."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of an interrupted run that is to go on. Its config governs; a different one is refused."""


@dataclasses.dataclass(frozen=True)
class CompareCommand:
    """Compares optimizers at an equal budget of gradient evaluations or of updates."""

    config: Annotated[CompareConfig, tyro.conf.arg(name="")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """New folder for metrics, config and figure; by default runs/<config>-<time>."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of an interrupted run that is to go on, with the same config."""


def compare(argv: Sequence[str]) -> int:
    """`rk-optax compare`.

    Args:
        argv: the config file, then overrides.

    Returns:
        The exit status.

    Raises:
        UsageError: if the comparison is not possible as asked for.
        KeyboardInterrupt: with a message that says where the finished part is.
    """
    asked = invocation.read(argv, "compare", CompareCommand, CompareConfig, "configs/digits.py", _COMPARE_HELP)
    if asked is None:
        return 0
    config = asked.config
    comparison = Comparison(config)
    with RunFolder(asked.folder, resume=asked.resumed) as folder:
        try:
            folder.write_config("compare", asked.name, config)
            with ProgressBar(make_console(stderr=True)) as bar:
                results = comparison.run(folder, bar)
            rows = summarize(results)
            folder.write_json("summary.json", as_json(results, rows))
            plot_comparison(results, folder.path / "comparison.png")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; what was finished is in {folder.path}, go on with --resume {folder.path}"
            ) from None
    console = make_console()
    console.print(comparison_table(rows))
    for note in comparison_notes(config, results):
        console.print(note, markup=False)
    console.print(f"Written to {folder.path}", markup=False, soft_wrap=True)
    return 0


def train(argv: Sequence[str]) -> int:
    """`rk-optax train`.

    Args:
        argv: the config file, then overrides; or --resume and a folder.

    Returns:
        The exit status.

    Raises:
        UsageError: if the training is not possible as asked for.
        KeyboardInterrupt: with a message that says how to go on.
    """
    if argv and argv[0].partition("=")[0] == "--resume":
        folder = argv[0].partition("=")[2] or (argv[1] if len(argv) > 1 else "")
        if not folder or len(argv) > (1 if "=" in argv[0] else 2):
            raise UsageError("--resume takes the folder of a run and nothing else: the run goes on with its own config")
        resume = Path(folder)
        asked = invocation.of(TrainCommand(stored_config(resume), resume=resume), resume.name)
    else:
        asked = invocation.read(argv, "train", TrainCommand, TrainConfig, "configs/train_digits.py", _TRAIN_HELP)
        if asked is None:
            return 0
    config = asked.config
    if config.data.data_dir is not None:  # the run may go on from another directory
        data = dataclasses.replace(config.data, data_dir=config.data.data_dir.absolute())
        config = dataclasses.replace(config, data=data)
    if asked.resumed:
        stored_config(asked.folder)  # says what is wrong with a folder before anything is trained
    training = Training(config)
    with TrainFolder(asked.folder, resume=asked.resumed) as folder:
        try:
            folder.write_config("train", asked.name, config)
            with ProgressBar(make_console(stderr=True)) as bar:
                last = training.run(folder, bar)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; go on with: rk-optax train --resume {folder.path}") from None
    console = make_console()
    for line in training_summary(last):
        console.print(line, markup=False)
    console.print(f"Written to {folder.path}", markup=False, soft_wrap=True)
    return 0


def plot(argv: Sequence[str]) -> int:
    """`rk-optax plot`.

    Args:
        argv: run folders and options.

    Returns:
        The exit status.

    Raises:
        UsageError: if a folder holds no run that can be drawn, or the figure cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="rk-optax plot", description="Draws training loss and test error of runs, overlaid."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of train or compare")
    parser.add_argument("--x", choices=tuple(AXES), default="steps", help="what the runs are laid over (steps)")
    parser.add_argument("--out", type=Path, default=Path("plot.png"), metavar="FILE.png", help="the figure (plot.png)")
    arguments = parser.parse_args(argv)
    out = arguments.out
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out} must be a PNG file: take {out.with_suffix('.png')}")
    curves = [curve for path in arguments.runs for curve in read_curves(path)]
    if arguments.x == "seconds":
        for curve in curves:
            if not np.isfinite(curve.seconds).any():
                raise UsageError(f"{curve.label} has not been timed yet: take --x steps or --x cost")
    try:
        plot_curves(curves, arguments.x, out)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    make_console().print(f"Written to {out}", markup=False, soft_wrap=True)
    return 0


def solvers() -> int:
    """`rk-optax solvers`: one line per solver in a pipe, folded to the width of a terminal.

    Returns:
        The exit status.
    """
    console = make_console(piped_width=200)
    console.print(solver_table(TABLEAUS))
    console.print(
        "order: of the step (of the embedded error estimate). real interval: a step h is stable on a "
        "quadratic up to h = interval / largest eigenvalue.",
        markup=False,
    )
    return 0
