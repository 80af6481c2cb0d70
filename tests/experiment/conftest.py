import contextlib
import dataclasses
import io
import os
import shutil
import types

import jax
import pytest

from rk_optax.experiment.cli import main
from rk_optax.experiment.runs.compare import Comparison

from .helpers import RACE, RUN, SMOKE, Silent, race, read_metrics, run_command, write_train_config


@pytest.fixture(scope="package", autouse=True)
def compilation(tmp_path_factory):
    """Compiles without optimizing, and a program once for all the tests and subprocesses that run it.

    The value is for the environment of the subprocesses.
    """
    changes = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR")
        or str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: jax.config.values[name] for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in changes.items()}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="package")
def finished(tmp_path_factory, compilation):
    """The folder of a whole training run from the command line, to be looked at."""
    folder = tmp_path_factory.mktemp("train")
    status, out, err = run_command("train", write_train_config(folder / "tiny.py"), "--out", folder / "run")
    assert (status, err) == (0, "")
    assert out.startswith("24 steps, 48 gradients, ")
    assert out.endswith(f"Written to {folder / 'run'}\n")
    return folder / "run"


@pytest.fixture(scope="package")
def raced(tmp_path_factory, compilation):
    """Config and folder of a whole race from the command line."""
    folder = tmp_path_factory.mktemp("race")
    config = folder / "small.py"
    config.write_text(RACE)
    assert race(config, "--out", folder / "run") == 0
    return config, folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the whole run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def smoke_config():
    return SMOKE


@pytest.fixture
def config_file(tmp_path):
    """Writes a config file with this body of `get_config()`, after the usual imports."""

    def write(body):
        path = tmp_path / "some.py"
        path.write_text(f"from rk_optax.experiment.config import *\ndef get_config():\n    {body}\n")
        return path

    return write


@pytest.fixture
def smoke_file(config_file):
    return config_file(f"return {SMOKE!r}")


@pytest.fixture
def run_file(config_file):
    return config_file(f"return {RUN!r}")


@pytest.fixture
def command(capsys):
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in argv])
        return exit_info.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="package")
def smoke(tmp_path_factory, compilation):
    """One small comparison from the command line, which many tests look at."""
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "tiny.py").write_text(
        "from rk_optax.experiment.config import *\n"
        f"def get_config(): return {dataclasses.replace(RUN, timed_runs=1, seeds=(7,))!r}\n"
    )
    seen = {}

    def run(comparison, run_folder, report):
        seen["reporter"] = Silent(report)
        seen["results"] = original(comparison, run_folder, seen["reporter"])
        return seen["results"]

    original, out, err = Comparison.run, io.StringIO(), io.StringIO()
    overrides = ["--timed-runs", str(RUN.timed_runs), "--seeds", *map(str, RUN.seeds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparison, "run", run)
        patch.delenv("COLUMNS", raising=False)  # the table is as wide as it is in a pipe
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_info:
            main(["compare", str(folder / "tiny.py"), "--out", str(folder / "run"), *overrides])
    return types.SimpleNamespace(
        config=RUN,
        path=folder / "run",
        metrics=read_metrics(folder / "run"),
        status=exit_info.value.code,
        out=out.getvalue(),
        err=err.getvalue(),
        **seen,
    )
