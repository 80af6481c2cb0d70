"""Images and labels in files: IDX, the format of MNIST and Fashion-MNIST, and the binary version of CIFAR-10."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from rk_optax.experiment.errors import UsageError, refusing, require

_CLASSES = 10
_UNSIGNED_BYTE = 8  # the type code of every file of these data sets
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # the label, then the channels one after the other


# Images (example, row, column) or (example, row, column, channel) and labels (example,), bytes as the files hold them.
Labelled = tuple[np.ndarray, np.ndarray]


def read_idx(directory: Path) -> tuple[Labelled, Labelled]:
    """Reads the four files of a data set, training and test part, each file plain or gzipped."""
    where = f"data.data_dir = {str(directory)!r}"
    require(directory.is_dir(), f"{where} is not a directory")
    train, test = _read_pair(directory, "train"), _read_pair(directory, "t10k")
    sizes = [" x ".join(map(str, images.shape[1:])) for images, _ in (train, test)]
    require(
        sizes[0] == sizes[1],
        f"{where}: training images are {sizes[0]} and test images {sizes[1]}; the files belong to different data sets",
    )
    return train, test


def read(path: Path, dimensions: int) -> np.ndarray:
    """Reads one IDX file of unsigned bytes from the first byte to the last, gzipped or not, whatever its name."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: damaged gzip file ({error}); download it again") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    header, magic = 4 * (1 + dimensions), bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    starts = f"it starts with {content[:4].hex(' ') or 'nothing'} instead of {magic.hex(' ')}"
    require(content[:4] == magic, f"{path}: not an IDX file of bytes in {dimensions} dimensions: {starts}")
    length = len(content)
    require(length >= header, f"{path}: truncated: the header alone has {header} bytes, the file has {length}")
    shape = [int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4)]
    announced, found = math.prod(shape), length - header
    what = f"{' x '.join(map(str, shape))} bytes announced, {found} found; download it again"
    require(found >= announced, f"{path}: truncated: {what}")
    require(found == announced and found, f"{path}: damaged: {what}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_pair(directory: Path, part: str) -> Labelled:
    images_path = _find(directory, f"{part}-images-idx3-ubyte")
    labels_path = _find(directory, f"{part}-labels-idx1-ubyte")
    images, labels = read(images_path, 3), read(labels_path, 1)
    own = f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path.name}"
    require(len(images) == len(labels), own)
    require(labels.max() < _CLASSES, f"{labels_path}: has the label {labels.max()}, more than {_CLASSES - 1}")
    return images, labels


def _find(directory: Path, name: str) -> Path:
    found = [path for path in (directory / name, directory / f"{name}.gz") if path.is_file()]
    require(found, f"data.data_dir = {str(directory)!r} has no {name} or {name}.gz")
    return found[0]


def read_cifar10(directory: Path) -> tuple[Labelled, Labelled]:
    """Reads the six files of the binary version, training and test part."""
    train = [f"data_batch_{i}.bin" for i in range(1, 6)]
    return _read_records(directory, train), _read_records(directory, ["test_batch.bin"])


def _read_records(directory: Path, names: list[str]) -> Labelled:
    contents = []
    for path in (directory / name for name in names):
        with refusing(f"data.data_dir: {path} cannot be read", OSError):
            contents.append(path.read_bytes())
        size = len(contents[-1])
        whole = size and size % _CIFAR10_RECORD == 0
        require(whole, f"data.data_dir: {path} is damaged: {size} bytes are no whole records")
    records = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, _CIFAR10_RECORD)
    require(records[:, 0].max() < _CLASSES, f"data.data_dir: {directory} is damaged: a label is above {_CLASSES - 1}")
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, 0]
