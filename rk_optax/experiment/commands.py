"""The commands of `rk-optax`; importing this needs the `experiment` extra."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from rk_optax.experiment.compare import Comparison
from rk_optax.experiment.config import CompareConfig, load
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.plot import plot_comparison
from rk_optax.experiment.progress import ProgressBar
from rk_optax.experiment.report import (
    comparison_notes,
    comparison_table,
    make_console,
    solver_table,
)
from rk_optax.experiment.run_folder import RunFolder, default_path
from rk_optax.experiment.summary import as_json, summarize
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
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            print(_COMPARE_HELP)
            return 0
        raise UsageError("name a config file right after compare, e.g. rk-optax compare configs/digits.py")
    path = Path(argv[0])
    command = tyro.cli(
        CompareCommand,
        default=CompareCommand(load(path, CompareConfig)),
        args=argv[1:],
        prog=f"rk-optax compare {path}",
    )
    config, resume = command.config, command.resume
    if resume and command.out:
        raise UsageError("--out is for a new run and --resume for an old one: give one of them")
    comparison = Comparison(config)
    with RunFolder(resume or command.out or default_path(path.stem), resume=resume is not None) as folder:
        try:
            folder.write_config("compare", path.stem, config)
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
