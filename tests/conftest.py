"""Shared set-up: eight CPU devices, float64 on request, and the losses that several test files use."""

import os
from importlib.metadata import version

# Before JAX starts. The sharding tests need several devices. A test's program runs for less time than it takes to
# compile, so XLA leaves out what makes programs fast; what XLA_FLAGS already says has the last word.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        # XLA ends the process at a flag that it does not know, and newer ones do not know this one.
        "--xla_cpu_use_fusion_emitters=false"
        if version("jaxlib").startswith(("0.6.", "0.7.", "0.8.", "0.9.", "0.10."))
        else "",
        os.environ.get("XLA_FLAGS", ""),
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import atexit
import ctypes
import functools
import gc
import math
import platform
import shutil
import tempfile
from pathlib import Path

# What one worker has compiled no other compiles again, nor does it itself once its caches were cleared (`Memory`).
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs = tempfile.mkdtemp(prefix="rk_optax-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    atexit.register(shutil.rmtree, programs, ignore_errors=True)

import covering
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest_plugins = ["pytester"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The runner's own libraries do not change what the solvers compute."""
    covering.mark(items)
    for item in items:
        if "experiment" in item.path.parts:
            item.add_marker(pytest.mark.latest)


def pytest_collection_finish():
    """What is imported stays: the collector need not look at it again, and not as often as a small program asks for."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests share compiled programs, those of the runner whole runs: no worker does what another has done.

    In the order of collection, which begins with the runner, the longest by far, and ends with the short doctests.
    """
    from xdist.scheduler import LoadScopeScheduling

    config.option.loadscopereorder = False

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return "tests/experiment" if path.startswith("tests/experiment/") else path

    return ByFile(config, log)


def memory():
    """Megabytes that this process holds now; infinitely many where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return math.inf
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Memory:
    """Gives back what compiling took: the megabyte of the smallest program is free afterwards, but glibc keeps it."""

    least = 900
    limit = least

    def bound(self):
        if memory() <= self.limit:
            return
        self.give_back()
        if memory() > self.least:  # what JAX keeps, too
            jax.clear_caches()
            self.give_back()
        self.limit = max(self.least, memory() + 300)

    def give_back(self):
        gc.collect()
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)


MEMORY = Memory()


@pytest.fixture(autouse=True)
def _bounded_memory():
    yield
    MEMORY.bound()


@pytest.fixture
def x64():
    """Double precision inside one test."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def network_loss(params, x, y):
    """A nonlinear least-squares loss: a small tanh network of two layers."""
    hidden = jnp.tanh(x @ params["w1"] + params["b1"])
    return jnp.mean((hidden @ params["w2"] - y) ** 2)


network_gradient = jax.jit(jax.grad(network_loss))


def poisoned_loss(params, x, y, poison=False):
    """`network_loss`, or NaN on demand."""
    return jnp.where(poison, jnp.nan, 1.0) * network_loss(params, x, y)


def network(dtype=np.float32, seed=0):
    """Parameters and data for `network_loss`: `(params, {"x": ..., "y": ...})`."""
    rng = np.random.default_rng(seed)
    params = {"w1": rng.normal(size=(3, 5)), "b1": rng.normal(size=5), "w2": rng.normal(size=(5, 2))}
    data = {"x": rng.normal(size=(8, 3)), "y": rng.normal(size=(8, 2))}
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), (params, data))


@pytest.fixture
def evaluations():
    """`evaluations.of(function)` counts how often the function is evaluated at run time, whatever is compiled."""

    class Evaluations:
        def __init__(self):
            self._calls = []

        def of(self, function):
            @functools.wraps(function)
            def counted(*args, **kwargs):
                jax.debug.callback(lambda: self._calls.append(1))
                return function(*args, **kwargs)

            return counted

        @property
        def number(self):
            jax.effects_barrier()
            return len(self._calls)

    return Evaluations()
