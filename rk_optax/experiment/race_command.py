"""`rk-optax race`."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import tyro

from rk_optax.experiment.invocation import read
from rk_optax.experiment.progress import ProgressBar
from rk_optax.experiment.race import Race, RaceConfig
from rk_optax.experiment.race_report import plot_race, race_table, summary
from rk_optax.experiment.report import make_console
from rk_optax.experiment.run_folder import RunFolder

_HELP = """\
usage: rk-optax race CONFIG [--out DIR | --resume DIR] [--FIELD VALUE ...]

Runs solvers and optimizers on a full-batch problem with a known solution, each tuned on a seed of its own, and shows
what every error costs in gradients, V (one value_and_grad) and seconds.

  CONFIG         Python file whose get_config() returns a RaceConfig, e.g. configs/race_poisson.py
  --out DIR      folder for config, runs, table and figure (default: runs/<config>-<time>)
  --resume DIR   go on with an interrupted race, with the same config: finished runs are kept
  --FIELD VALUE  overrides a field of the config, e.g. --seeds 0 1, or --x64

`rk-optax race CONFIG --help` lists the fields of a config with their values."""


@dataclasses.dataclass(frozen=True)
class RaceCommand:
    """Races solvers and optimizers on a full-batch problem."""

    config: Annotated[RaceConfig, tyro.conf.arg(name="")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """New folder for config, runs, table and figure; by default runs/<config>-<time>."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of an interrupted race that is to go on, with the same config."""


def race(argv: Sequence[str]) -> int:
    """`rk-optax race`.

    Args:
        argv: the config file, then overrides.

    Returns:
        The exit status.

    Raises:
        UsageError: if the race is not possible as asked for.
        KeyboardInterrupt: with a message that says where the finished part is.
    """
    asked = read(argv, "race", RaceCommand, RaceConfig, "configs/race_poisson.py", _HELP)
    if asked is None:
        return 0
    config = asked.config
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", config.x64 or before)
    try:
        contest = Race(config)
        with RunFolder(asked.folder, resume=asked.resumed) as folder:
            try:
                folder.write_config("race", asked.name, config)
                with ProgressBar(make_console(stderr=True)) as bar:
                    results = contest.run(folder, bar)
                rows = summary(results, config.targets)
                folder.write_json("summary.json", {"error": contest.error_name, "entrants": rows})
                plot_race(results, contest.error_name, folder.path / "race.png")
            except KeyboardInterrupt:
                raise KeyboardInterrupt(
                    f"interrupted; what was finished is in {folder.path}, go on with --resume {folder.path}"
                ) from None
    finally:
        jax.config.update("jax_enable_x64", before)
    console = make_console()
    console.print(race_table(rows, contest.error_name))
    console.print(f"Written to {folder.path}", markup=False, soft_wrap=True)
    return 0
