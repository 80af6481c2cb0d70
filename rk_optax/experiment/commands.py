"""The commands of `rk-optax`; importing this needs the `experiment` extra."""

import argparse
import dataclasses
import datetime
import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import jax
import numpy as np
import tyro

from rk_optax.experiment.config import CompareConfig, FlowConfig, RaceConfig, TrainConfig, checked, load
from rk_optax.experiment.errors import UsageError, refusing, require
from rk_optax.experiment.runs.compare import Comparison
from rk_optax.experiment.runs.flow import FlowStudy
from rk_optax.experiment.runs.progress import ProgressBar
from rk_optax.experiment.runs.race import Race
from rk_optax.experiment.runs.summary import as_json, summarize
from rk_optax.experiment.runs.train import Training
from rk_optax.experiment.show import tables
from rk_optax.experiment.show.curves import read_curves
from rk_optax.experiment.show.figures import AXES, plot_comparison, plot_curves, plot_flows, plot_race
from rk_optax.experiment.show.flow_summary import flow_summary
from rk_optax.experiment.show.race_summary import race_summary
from rk_optax.experiment.store.run_folder import RunFolder, TrainFolder, first_difference, stored_config
from rk_optax.methods import TABLEAUS

Config = TypeVar("Config", TrainConfig, CompareConfig, RaceConfig, FlowConfig)

_HELP = """\
usage: rk-optax {verb} CONFIG [--out DIR] [--FIELD VALUE ...]
       rk-optax {verb} --resume DIR

{summary}

  CONFIG         Python file whose get_config() returns a {kind}, e.g. configs/{example}
  --out DIR      folder for what the run writes (default: runs/<config>-<time>)
  --resume DIR   go on with an interrupted run, with the config it has: what it finished is kept
  --FIELD VALUE  overrides a field of the config, e.g. {override}

`rk-optax {verb} CONFIG --help` lists the fields of a config with their values."""


class _Verb(NamedTuple, Generic[Config]):
    """A command that runs an experiment."""

    name: str
    kind: type[Config]
    study: Callable[[Config], Any]  # the experiment: `study.run(folder, bar)` returns its results
    shown: Callable[[Any, RunFolder, Any], Sequence[Any]]  # writes summary and figure; what is to be printed
    example: str  # a file in configs/
    override: str
    folder: type[RunFolder] = RunFolder


@dataclasses.dataclass(frozen=True)
class _Line(Generic[Config]):
    """What stands on the command line."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """New folder for what the run writes; by default runs/<config>-<time>."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of an interrupted run that is to go on. Its config governs; a different one is refused."""


def _trained(training: Training, folder: RunFolder, last: Any) -> Sequence[Any]:
    return tables.training_summary(last)


def _compared(comparison: Comparison, folder: RunFolder, results: Any) -> Sequence[Any]:
    rows = summarize(results)
    folder.write_json("summary.json", as_json(results, rows))
    plot_comparison(results, folder.path / "comparison.png")
    return [tables.comparison_table(rows), *tables.comparison_notes(comparison.config, results)]


def _raced(race: Race, folder: RunFolder, results: Any) -> Sequence[Any]:
    rows = race_summary(results, race.config.targets)
    folder.write_json("summary.json", {"error": race.error_name, "entrants": rows})
    plot_race(results, race.error_name, folder.path / "race.png")
    return [tables.race_table(rows, race.error_name)]


def _followed(study: FlowStudy, folder: RunFolder, results: Any) -> Sequence[Any]:
    summary = flow_summary(results, study.config.learning_rate)
    folder.write_json("summary.json", summary)
    plot_flows(results, study.config.learning_rate, folder.path / "flow.png")
    return [tables.flow_table(summary), *tables.flow_notes(summary)]


_VERBS = [
    _Verb("train", TrainConfig, Training, _trained, "train_digits.py", "--optimizer.learning-rate 0.1", TrainFolder),
    _Verb("compare", CompareConfig, Comparison, _compared, "digits.py", "--budget.gradients 1200"),
    _Verb("race", RaceConfig, Race, _raced, "race_poisson.py", "--seeds 0 1, or --x64"),
    _Verb("flow", FlowConfig, FlowStudy, _followed, "edge_of_stability.py", "--learning-rate 0.1"),
]


def _run(verb: _Verb[Config], argv: Sequence[str]) -> int:
    """Runs an experiment, or goes on with one; a KeyboardInterrupt says how to go on."""
    asked = _read(argv, verb)
    if asked is None:
        return 0
    name, config, path, resumed = asked
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", getattr(config, "x64", False) or before)
    try:
        study = verb.study(config)
        with verb.folder(path, resume=resumed) as folder:
            try:
                folder.write_config(verb.name, name, config)
                with ProgressBar(tables.make_console(stderr=True)) as bar:
                    lines = verb.shown(study, folder, study.run(folder, bar))
            except KeyboardInterrupt:
                again = f"rk-optax {verb.name} --resume {folder.path}"
                raise KeyboardInterrupt(f"interrupted; go on with: {again}") from None
    finally:
        jax.config.update("jax_enable_x64", before)
    console = tables.make_console()
    for line in lines:
        console.print(line, markup=False)
    return _written(path)


def _written(path: Path) -> int:
    tables.make_console().print(f"Written to {path}", markup=False, soft_wrap=True)
    return 0


train, compare, race, flow = (functools.partial(_run, verb) for verb in _VERBS)


def plot(argv: Sequence[str]) -> int:
    """`rk-optax plot`."""
    parser = argparse.ArgumentParser(
        prog="rk-optax plot", description="Draws training loss and error of runs, overlaid."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of train, compare or race")
    parser.add_argument("--x", choices=tuple(AXES), default="steps", help="what the runs are laid over (steps)")
    parser.add_argument("--out", type=Path, default=Path("plot.png"), metavar="FILE", help="the figure (plot.png)")
    arguments = parser.parse_args(argv)
    out = arguments.out
    drawable = out.suffix.lower() in (".png", ".pdf", ".svg")
    require(drawable, f"--out {out} must be a PNG, PDF or SVG file: take {out.with_suffix('.png')}")
    curves = [curve for path in arguments.runs for curve in read_curves(path)]
    for curve in curves if arguments.x == "seconds" else ():
        timed = np.isfinite(curve.seconds).any()
        require(timed, f"{curve.label} has not been timed yet: take --x steps or --x cost")
    with refusing(f"--out {out}: cannot be written", OSError):
        plot_curves(curves, arguments.x, out)
    return _written(out)


def solvers(argv: Sequence[str]) -> int:
    """`rk-optax solvers`: one line per optimizer in a pipe, folded to the width of a terminal."""
    parser = argparse.ArgumentParser(prog="rk-optax solvers", description="Lists the optimizers, cost and stability.")
    parser.parse_args(argv)
    console = tables.make_console(piped_width=200)
    console.print(tables.solver_table(TABLEAUS))
    console.print(
        "order: of the step (of the embedded error estimate). real interval: a step h is stable on a "
        "quadratic up to h = interval / largest eigenvalue.\n",
        markup=False,
    )
    console.print(tables.optimizer_table(TABLEAUS))
    return 0


def _read(argv: Sequence[str], verb: _Verb[Config]) -> tuple[str, Config, Path, bool] | None:
    """Reads `CONFIG [--out DIR | --resume DIR] [--FIELD VALUE ...]` or `--resume DIR`.

    Returns the name of the config, the config, the folder and whether a run goes on there; None where that was --help.
    """
    if argv and argv[0].partition("=")[0] == "--resume":
        named = [argument for argument in (argv[0].partition("=")[2], *argv[1:]) if argument]
        alone = "--resume takes the folder of a run and nothing else: the run goes on with its own config"
        require(len(named) == 1, alone)
        path = Path(named[0])
        return path.name, stored_config(path, verb.name, verb.kind), path, True
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            summary = (inspect.getdoc(verb.study) or "").partition("\n\nAttributes:")[0]
            names = {"verb": verb.name, "kind": verb.kind.__name__, "summary": summary}
            print(_HELP.format(**verb._asdict() | names))
            return None
        example = f"rk-optax {verb.name} configs/{verb.example}"
        raise UsageError(f"name a config file right after {verb.name}, e.g. {example}")
    path = Path(argv[0])
    config = load(path, verb.kind)
    _suggest_initials(argv[1:], dataclasses.asdict(config))
    default: Any = _Line(config)
    line: Any = tyro.cli(_Line[type(config)], default=default, args=argv[1:], prog=f"rk-optax {verb.name} {path}")
    config = checked(line.config)
    one = not (line.resume and line.out)
    require(one, "--out is for a new run and --resume for an old one: give one of them")
    if line.resume:
        different = first_difference(stored_config(line.resume, verb.name, type(config)), config)
        remedy = "go on with --resume alone, or start afresh with --out"
        require(not different, f"{line.resume} holds a run with {different}: {remedy}")
    default_folder = Path("runs") / f"{path.stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return path.stem, config, line.resume or line.out or default_folder, line.resume is not None


def _suggest_initials(argv: Sequence[str], fields: dict[str, Any]) -> None:
    """Names the field that an unknown option abbreviates: --optimizer.lr is --optimizer.learning-rate."""
    for option in (argument.partition("=")[0][2:] for argument in argv if argument.startswith("--")):
        *parents, last = option.replace("-", "_").split(".")
        level: Any = fields
        for parent in parents:
            level = level.get(parent, {}) if isinstance(level, dict) else {}
        for field in level if isinstance(level, dict) and last not in level else ():
            if last == "".join(word[0] for word in field.split("_")) and "_" in field:
                meant = "--" + ".".join([*parents, field]).replace("_", "-")
                raise UsageError(f"unrecognized option --{option}: did you mean {meant}?")
