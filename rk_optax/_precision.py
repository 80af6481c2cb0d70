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

    `jax.enable_x64` came with JAX 0.8. TPUs have no factorisations in float64, and other backends no float64 at all.
    """
    there = hasattr(jax, "enable_x64") and jax.default_backend() in ("cpu", "gpu")
    return np.dtype(np.float64) if there else _tree.default_float()


@contextlib.contextmanager
def doubled(dtype: np.dtype) -> Iterator[None]:
    """In it arrays of `dtype` keep it, where that is float64 and `jax_enable_x64` is off, too.

    What is traced in it is lowered out of it: matrix products, sums, factorisations and loops are none the worse,
    argmax and frexp fail.
    """
    needed = jnp.finfo(dtype).bits >= 64 and _tree.default_float() != dtype
    with _switched(True) if needed else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def callers() -> Iterator[None]:
    """In it the functions of a caller are evaluated as everywhere, within `doubled`, too."""
    with _switched(False) if _within.get() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _switched(on: bool) -> Iterator[None]:
    token = _within.set(on)
    try:
        with jax.enable_x64(on):
            yield
    finally:
        _within.reset(token)
