import contextlib
import dataclasses
import io
import shutil
import types

import jax
import pytest

from rk_optax.experiment.cli import main
from rk_optax.experiment.compare import Comparison

from .helpers import SMOKE, Silent, read_metrics, run_command, write_train_config


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory):
    """Compiles a program once for all the tests and subprocesses that run it; the value is for their environment."""
    changes = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in changes}
    for name, value in changes.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in changes.items()}
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, compilation_cache):
    """The folder of a whole training run from the command line, to be looked at."""
    folder = tmp_path_factory.mktemp("train")
    status, out, err = run_command("train", write_train_config(folder / "tiny.py"), "--out", folder / "run")
    assert (status, err) == (0, "")
    assert out.startswith("24 steps, 48 gradients, ")
    assert out.endswith(f"Written to {folder / 'run'}\n")
    return folder / "run"


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
def command(capsys):
    """Runs the command line in this process: exit code, stdout, stderr."""

    def run(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([str(argument) for argument in argv])
        return exit_info.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """One small comparison from the command line, which many tests look at."""
    folder = tmp_path_factory.mktemp("smoke")
    (folder / "tiny.py").write_text(
        "from rk_optax.experiment.config import *\n"
        f"def get_config(): return {dataclasses.replace(SMOKE, timed_runs=1, seeds=(7,))!r}\n"
    )
    seen = {}

    def run(comparison, run_folder, report):
        seen["reporter"] = Silent(report)
        seen["results"] = original(comparison, run_folder, seen["reporter"])
        return seen["results"]

    original, out, err = Comparison.run, io.StringIO(), io.StringIO()
    overrides = ["--timed-runs", str(SMOKE.timed_runs), "--seeds", *map(str, SMOKE.seeds)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparison, "run", run)
        patch.delenv("COLUMNS", raising=False)  # the table is as wide as it is in a pipe
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_info:
            main(["compare", str(folder / "tiny.py"), "--out", str(folder / "run"), *overrides])
    return types.SimpleNamespace(
        config=SMOKE,
        path=folder / "run",
        metrics=read_metrics(folder / "run"),
        status=exit_info.value.code,
        out=out.getvalue(),
        err=err.getvalue(),
        **seen,
    )
