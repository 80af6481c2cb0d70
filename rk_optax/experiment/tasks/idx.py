"""Images and labels in IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rk_optax.experiment.errors import UsageError

_CLASSES = 10
_UNSIGNED_BYTE = 8  # the type code of every file of these data sets


class Labelled(NamedTuple):
    """Images (example, row, column) and labels (example,), both bytes as the files hold them."""

    images: np.ndarray
    labels: np.ndarray


def read_directory(directory: Path) -> tuple[Labelled, Labelled]:
    """Reads the four files of a data set, each of them plain or gzipped.

    Raises:
        UsageError: if a file is missing or damaged, or does not go with the others.
    """
    if not directory.is_dir():
        raise UsageError(f"data.data_dir = {str(directory)!r} is not a directory")
    train, test = _read_pair(directory, "train"), _read_pair(directory, "t10k")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise UsageError(
            f"data.data_dir = {str(directory)!r}: training images are {_size(train)} and test images {_size(test)}; "
            "the files belong to different data sets"
        )
    return train, test


def read(path: Path, dimensions: int) -> np.ndarray:
    """Reads one IDX file of unsigned bytes, gzipped or not, whatever its name.

    Raises:
        UsageError: if the file cannot be read or is not such a file from the first byte to the last.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: damaged gzip file ({error}); download it again") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    header, magic = 4 * (1 + dimensions), bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise UsageError(
            f"{path}: not an IDX file of bytes in {dimensions} dimensions: it starts with "
            f"{content[:4].hex(' ') or 'nothing'} instead of {magic.hex(' ')}"
        )
    if len(content) < header:
        raise UsageError(f"{path}: truncated: the header alone has {header} bytes, the file has {len(content)}")
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    announced, found = math.prod(shape), len(content) - header
    what = f"{' x '.join(map(str, shape))} bytes announced, {found} found; download it again"
    if found < announced:
        raise UsageError(f"{path}: truncated: {what}")
    if found > announced or found == 0:
        raise UsageError(f"{path}: damaged: {what}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_pair(directory: Path, part: str) -> Labelled:
    images_path, labels_path = (
        _find(directory, f"{part}-images-idx3-ubyte"),
        _find(directory, f"{part}-labels-idx1-ubyte"),
    )
    pair = Labelled(read(images_path, 3), read(labels_path, 1))
    if len(pair.images) != len(pair.labels):
        raise UsageError(
            f"{labels_path}: {len(pair.labels)} labels for the {len(pair.images)} images of {images_path.name}"
        )
    if pair.labels.max() >= _CLASSES:
        raise UsageError(f"{labels_path}: has the label {pair.labels.max()}, more than {_CLASSES - 1}")
    return pair


def _find(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise UsageError(f"data.data_dir = {str(directory)!r} has no {name} or {name}.gz")


def _size(pair: Labelled) -> str:
    return " x ".join(map(str, pair.images.shape[1:]))
