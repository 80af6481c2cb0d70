"""The command line `rk-optax`, as far as it works without the `experiment` extra."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import rk_optax
from rk_optax.experiment.errors import UsageError

# What the modules behind the commands import and `pip install rk-optax` does not bring along.
_EXTRA = ("flax", "matplotlib", "orbax", "rich", "sklearn", "typeguard", "tyro")


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
    # tyro parses what follows, once it has seen the config; argparse must not take its --help.
    commands.add_parser("compare", add_help=False, help="compare optimizers at an equal budget")
    commands.add_parser("race", add_help=False, help="race solvers on a stiff full-batch problem")
    commands.add_parser("train", add_help=False, help="train with one optimizer, or go on with a run")
    commands.add_parser("plot", add_help=False, help="overlay runs by steps, cost or seconds")
    commands.add_parser("solvers", help="list the solvers with their cost and stability")
    arguments, rest = parser.parse_known_args(argv)
    try:
        from rk_optax.experiment import commands as implementations
        from rk_optax.experiment.race_command import race
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        raise UsageError(f"{error.name} is not installed: pip install 'rk-optax[experiment]'") from error
    if arguments.command == "compare":
        return implementations.compare(rest)
    if arguments.command == "race":
        return race(rest)
    if arguments.command == "train":
        return implementations.train(rest)
    if arguments.command == "plot":
        return implementations.plot(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return implementations.solvers()


def _fail(message: object, status: int) -> NoReturn:
    print("rk-optax:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)
