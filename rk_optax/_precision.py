"""Float64 inside of a program whose other numbers are in float32."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax import _tree

_within = contextvars.ContextVar("_within", default=False)


def widest_float() -> np.dtype:
    """Float64 where `doubled` has it, and else the default of floats.

    `jax.enable_x64` came with JAX 0.8, and TPUs have no factorisations in float64.
    """
    there = hasattr(jax, "enable_x64") and jax.default_backend() != "tpu"
    return np.dtype(np.float64) if there else _tree.default_float()


@contextlib.contextmanager
def doubled(dtype: np.dtype) -> Iterator[None]:
    """In it arrays of `dtype` keep it, where that is float64 and `jax_enable_x64` is off, too.

    What is traced in it is lowered out of it: matrix products, sums, factorisations and loops are none the worse,
    argmax and frexp fail.
    """
    if jnp.finfo(dtype).bits < 64 or _tree.default_float() == dtype:
        yield
        return
    token = _within.set(True)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        _within.reset(token)


@contextlib.contextmanager
def callers() -> Iterator[None]:
    """In it the functions of a caller are evaluated as everywhere, within `doubled`, too."""
    if not _within.get():
        yield
        return
    token = _within.set(False)
    try:
        with jax.enable_x64(False):
            yield
    finally:
        _within.reset(token)
