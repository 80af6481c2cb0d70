"""Processes that are killed or stopped at any moment, and go on."""

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ..helpers import TRAIN, read_metrics, run_command, without_time, write_train_config

MAIN = "from rk_optax.experiment.cli import main; main()"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")]


def start(cache, *argv, devices=None):
    environment = os.environ | cache
    if devices:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-c", MAIN, "train", *map(str, argv)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_lines(run, number, process):
    """Until the metrics have so many lines."""
    path, deadline = run / "metrics.jsonl", time.monotonic() + 100
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= number:
            return
        time.sleep(0.005)


def test_killed_and_interrupted_runs_go_on(tmp_path, compilation):
    path = write_train_config(tmp_path / "tiny.py", dataclasses.replace(TRAIN, steps=160))
    assert run_command("train", path, "--out", tmp_path / "whole")[0] == 0
    run, rng = tmp_path / "run", random.Random(0)
    # The moments are random, the whereabouts are not: in the first steps, between checkpoints, late.
    for lines, number in [(1, signal.SIGKILL), (9, signal.SIGKILL), (20, signal.SIGINT)]:
        process = start(compilation, *(["--resume", run] if run.exists() else [path, "--out", run]))
        wait_for_lines(run, lines, process)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, process.communicate()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        if number == signal.SIGINT:
            assert (process.returncode, out) == (130, "")
            assert err == f"rk-optax: interrupted; go on with: rk-optax train --resume {run}\n"
        else:
            assert process.returncode == -signal.SIGKILL
    assert len(read_metrics(run)) < 41
    assert run_command("train", "--resume", run)[0] == 0
    assert without_time(read_metrics(run)) == without_time(read_metrics(tmp_path / "whole"))


def test_another_number_of_devices(finished, run, compilation):
    """From one device to three and back; a batch of 63 goes on three."""
    for folder in ("20", "24"):
        shutil.rmtree(run / "checkpoints" / folder)
    process = start(compilation, "--resume", run, devices=3)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "3 devices share each batch\n"), (out, err)
    shutil.rmtree(run / "checkpoints" / "24")  # now from the checkpoint that three devices wrote
    assert run_command("train", "--resume", run)[0] == 0
    for found, wanted in zip(read_metrics(run), read_metrics(finished), strict=True):
        for name, value in without_time([wanted])[0].items():
            if isinstance(value, float):
                assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-6), name
            else:
                assert found[name] == value
