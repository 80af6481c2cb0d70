"""CIFAR-10 from the files of its binary version."""

from pathlib import Path

import numpy as np

from rk_optax.experiment.errors import UsageError

_TRAIN, _TEST = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
_RECORD = 1 + 3 * 32 * 32  # the label, then the channels one after the other


def read_directory(directory: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images (example, 32, 32, 3), float32 in [0, 1], and labels, int32, of the training and the test part.

    Raises:
        UsageError: if a file is missing or damaged.
    """
    return _read(directory, _TRAIN), _read(directory, _TEST)


def _read(directory: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    records = []
    for name in names:
        try:
            content = (directory / name).read_bytes()
        except OSError as error:
            raise UsageError(f"data.data_dir: {directory / name} cannot be read: {error.strerror}") from error
        if not content or len(content) % _RECORD:
            raise UsageError(f"data.data_dir: {directory / name} is damaged: {len(content)} bytes are no whole records")
        records.append(np.frombuffer(content, np.uint8).reshape(-1, _RECORD))
    whole = np.concatenate(records)
    if whole[:, 0].max() > 9:
        raise UsageError(f"data.data_dir: {directory} is damaged: a label is above 9")
    images = whole[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return (images / np.float32(255)).astype(np.float32), whole[:, 0].astype(np.int32)
