"""The command line `rk-optax`, as far as it works without the `experiment` extra."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import rk_optax
from rk_optax.experiment.errors import UsageError

# What the modules behind the commands import and `pip install rk-optax` does not bring along.
_EXTRA = ("flax", "matplotlib", "orbax", "pydantic", "rich", "scipy", "sklearn", "tyro")
# By name: what it is for, and the module that has a function of that name, which takes the arguments.
COMMANDS = {
    "compare": ("compare optimizers at an equal budget", "commands"),
    "race": ("race solvers on a stiff full-batch problem", "commands"),
    "train": ("train with one optimizer, or go on with a run", "commands"),
    "flow": ("follow gradient descent, its gradient flow and its central flow", "commands"),
    "plot": ("overlay runs by steps, cost or seconds", "commands"),
    "solvers": ("list the solvers with their cost and stability", "commands"),
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits.

    Args:
        argv: the arguments, by default those of the process.

    Raises:
        SystemExit: always; 0 for done, 1 for a failing disk, 2 for wrong usage, 130 for Ctrl-C.
            Everything but 0 comes with one line on stderr, or tyro's description of the mistake.
    """
    try:
        sys.exit(_run(sys.argv[1:] if argv is None else list(argv)))
    except UsageError as error:
        _fail(error, 2)
    except OSError as error:
        _fail(error, 1)
    except KeyboardInterrupt as error:
        _fail(str(error) or "interrupted", 130)


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="rk-optax", description="Runge-Kutta solvers as Optax optimizers: experiments."
    )
    parser.add_argument("--version", action="version", version=f"rk-optax {rk_optax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (purpose, _) in COMMANDS.items():
        # The command itself parses what follows; argparse must not take its --help.
        commands.add_parser(name, add_help=False, help=purpose)
    arguments, rest = parser.parse_known_args(argv)
    try:
        module = importlib.import_module(f"rk_optax.experiment.{COMMANDS[arguments.command][1]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise UsageError(f"{error.name} is not installed: pip install 'rk-optax[experiment]'") from error
    return getattr(module, arguments.command)(rest)


def _fail(message: object, status: int) -> NoReturn:
    print("rk-optax:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)
