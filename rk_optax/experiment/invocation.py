"""How `compare`, `race` and `train` read their command line: a config file, overrides, --out or --resume."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import tyro

from rk_optax.experiment.config import load
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.run_folder import default_path


class Command(Protocol):
    """What the dataclass of a command has: its config, and the folder of a new or of an old run."""

    @property
    def config(self) -> Any:
        """The configuration."""
        ...

    @property
    def out(self) -> Path | None:
        """Folder of a new run."""
        ...

    @property
    def resume(self) -> Path | None:
        """Folder of an old one."""
        ...


C = TypeVar("C", bound=Command)


class Invocation(NamedTuple):
    """A command line that has been read."""

    name: str  # of the config
    config: Any
    folder: Path
    resumed: bool


def read(argv: Sequence[str], verb: str, kind: type[C], config: type, example: str, usage: str) -> Invocation | None:
    """Reads `rk-optax VERB CONFIG [--out DIR | --resume DIR] [--FIELD VALUE ...]`.

    Args:
        argv: what follows the verb.
        verb: the command.
        kind: the dataclass that tyro fills.
        config: the type that the config file has to return.
        example: a config file, for the message when there is none.
        usage: what --help without a config prints.

    Returns:
        What was asked for, or None where that was the usage, which has been printed.

    Raises:
        UsageError: no config file, one that cannot be used, or --out together with --resume.
    """
    if not argv or argv[0].startswith("-"):
        if {"-h", "--help"} & set(argv):
            print(usage)
            return None
        raise UsageError(f"name a config file right after {verb}, e.g. rk-optax {verb} {example}")
    path = Path(argv[0])
    make: Any = kind
    command = tyro.cli(kind, default=make(load(path, config)), args=argv[1:], prog=f"rk-optax {verb} {path}")
    return of(command, path.stem)


def of(command: Command, name: str) -> Invocation:
    """The invocation of a command that has been filled.

    Raises:
        UsageError: --out together with --resume.
    """
    if command.resume and command.out:
        raise UsageError("--out is for a new run and --resume for an old one: give one of them")
    folder = command.resume or command.out or default_path(name)
    return Invocation(name, command.config, folder, command.resume is not None)
