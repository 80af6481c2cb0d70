"""CIFAR-10 from the files of its binary version."""

from pathlib import Path

import numpy as np

from rk_optax.experiment.errors import refusing, require

_TRAIN, _TEST = [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]
_RECORD = 1 + 3 * 32 * 32  # the label, then the channels one after the other


def read_directory(directory: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images (example, 32, 32, 3), float32 in [0, 1], and labels, int32, of the training and the test part."""
    return _read(directory, _TRAIN), _read(directory, _TEST)


def _read(directory: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    contents = []
    for path in (directory / name for name in names):
        with refusing(f"data.data_dir: {path} cannot be read", OSError):
            contents.append(path.read_bytes())
        size = len(contents[-1])
        whole = size and size % _RECORD == 0
        require(whole, f"data.data_dir: {path} is damaged: {size} bytes are no whole records")
    records = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, _RECORD)
    require(records[:, 0].max() <= 9, f"data.data_dir: {directory} is damaged: a label is above 9")
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return (images / np.float32(255)).astype(np.float32), records[:, 0].astype(np.int32)
