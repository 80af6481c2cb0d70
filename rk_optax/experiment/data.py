"""Data sets, their splits, and the order in which batches are drawn."""

from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from rk_optax.experiment.config import DataConfig
from rk_optax.experiment.errors import UsageError

Array: TypeAlias = np.ndarray | jax.Array  # on the host, then on a device


class Split(NamedTuple):
    """Images (example, row, column, channel), float32 in [0, 1], and labels (example,), int32."""

    images: Array
    labels: Array


class Dataset(NamedTuple):
    """The three parts of a data set; only `validation` may choose a hyperparameter."""

    train: Split
    validation: Split
    test: Split
    classes: int


def load_dataset(config: DataConfig) -> Dataset:
    """Loads and splits the data: the same configuration always gives the same split.

    Raises:
        UsageError: if the split leaves too few examples, or fewer than a batch.
    """
    images, labels = _LOADERS[config.name]()
    classes = int(labels.max()) + 1
    rest, test = _stratified(images, labels, config.test_fraction, config.split_seed)
    # Of the rest, so that both fractions are of the whole.
    fraction = config.validation_fraction / (1 - config.test_fraction)
    train, validation = _stratified(*rest, fraction, config.split_seed)
    if config.batch_size is not None and config.batch_size > len(train.labels):
        raise UsageError(
            f"data.batch_size = {config.batch_size} is more than the {len(train.labels)} training "
            "examples; None takes all of them"
        )
    return Dataset(train, validation, test, classes)


def batch_indices(seed: int, examples: int, batch_size: int | None, start: int, count: int) -> np.ndarray:
    """The training examples in batches `start` to `start + count` of a run.

    Every epoch is a fresh permutation without its remainder. The order depends on nothing but
    the arguments, so every entrant sees the same one and a run can continue at any step.

    Returns:
        An int32 array (count, batch_size).
    """
    batch_size = batch_size or examples
    if batch_size == examples:  # the order within a batch does not matter
        return np.broadcast_to(np.arange(examples, dtype=np.int32), (count, examples))
    per_epoch = examples // batch_size
    first, last = start // per_epoch, (start + count - 1) // per_epoch
    epochs = [
        np.random.default_rng([seed, epoch]).permutation(examples)[: per_epoch * batch_size]
        for epoch in range(first, last + 1)
    ]
    batches = np.concatenate(epochs).reshape(-1, batch_size)
    offset = start - first * per_epoch
    return batches[offset : offset + count].astype(np.int32)


def _stratified(images: Array, labels: Array, fraction: float, seed: int) -> tuple[Split, Split]:
    try:
        parts = train_test_split(images, labels, test_size=fraction, random_state=seed, stratify=labels)
    except ValueError as error:
        raise UsageError(f"data.validation_fraction, data.test_fraction: cannot split: {error}") from error
    a, b, labels_a, labels_b = map(np.asarray, parts)
    return Split(a, labels_a), Split(b, labels_b)


def _digits() -> tuple[np.ndarray, np.ndarray]:
    digits: Any = load_digits()
    images = digits.images[..., np.newaxis] / 16
    return images.astype(np.float32), digits.target.astype(np.int32)


_LOADERS = {"digits": _digits}
