import gzip
import itertools

import numpy as np
import pytest

from rk_optax.experiment.config import DataConfig
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.tasks import data
from rk_optax.experiment.tasks.data import load_dataset

from ..helpers import idx_bytes, write_idx

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def mnist(directory, **changes):
    return load_dataset(DataConfig("mnist", directory, **{"batch_size": 8} | changes))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files(tmp_path, name, zipped):
    contents = write_idx(tmp_path, zipped=zipped)
    parts = load_dataset(DataConfig(name, tmp_path, validation_fraction=0.5, batch_size=8))
    assert [len(split.labels) for split in parts[:3]] == [30, 30, 20]
    assert parts.classes == 10
    # The test part is the file's, in its order.
    pixels = np.frombuffer(contents["t10k-images-idx3-ubyte"], np.uint8, offset=16).reshape(20, 28, 28, 1)
    assert np.array_equal(parts.test.labels, np.arange(20) % 10)
    assert np.array_equal(parts.test.images, pixels / np.float32(255))
    assert parts.test.images.dtype == np.float32
    assert parts.test.labels.dtype == np.int32
    # Images keep their labels when they are split, and no training example is lost.
    for split in parts[:3]:
        assert np.all(split.images[np.arange(len(split.labels)), split.labels] == 1)
    assert np.array_equal(np.sort(np.concatenate([parts.train.labels, parts.validation.labels])), np.arange(60) // 6)


def test_a_plain_file_named_gz_is_read_all_the_same(tmp_path):
    contents = write_idx(tmp_path)
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(contents[TRAIN_IMAGES])
    assert len(mnist(tmp_path, validation_fraction=0.5).train.labels) == 30


IMAGES, LABELS = np.zeros((60, 28, 28)), np.arange(60) % 10


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAIN_IMAGES, None, r"has no train-images-idx3-ubyte or train-images-idx3-ubyte\.gz"),
        ("t10k-labels-idx1-ubyte", None, "has no t10k-labels-idx1-ubyte or"),
        (TRAIN_IMAGES, b"", "starts with nothing instead of 00 00 08 03"),
        (TRAIN_IMAGES, b"<html>not found</html>", "starts with 3c 68 74 6d instead of 00 00 08 03"),
        (TRAIN_IMAGES, b"\0\0\x0d" + idx_bytes(IMAGES)[3:], "starts with 00 00 0d 03"),  # floats
        (TRAIN_IMAGES, idx_bytes(IMAGES)[:9], "truncated: the header alone has 16 bytes, the file has 9"),
        (TRAIN_IMAGES, idx_bytes(IMAGES)[:-1], "truncated: 60 x 28 x 28 bytes announced, 47039 found"),
        (TRAIN_IMAGES, idx_bytes(IMAGES) + b"x", "damaged: 60 x 28 x 28 bytes announced, 47041 found"),
        (TRAIN_IMAGES, bytes([0, 0, 8, 3, *b"\xff" * 12]), "truncated: 4294967295 x 4294967295"),
        (TRAIN_IMAGES, idx_bytes(np.zeros((0, 28, 28))), "damaged: 0 x 28 x 28 bytes announced"),
        (TRAIN_IMAGES, gzip.compress(idx_bytes(IMAGES), mtime=0)[:-20], "damaged gzip file"),
        (TRAIN_IMAGES, gzip.compress(idx_bytes(IMAGES), mtime=0)[:-8] + b"12345678", "damaged gzip file"),
        (TRAIN_IMAGES, b"\x1f\x8b" + b"x" * 100, "damaged gzip file"),
        (TRAIN_IMAGES, idx_bytes(np.zeros((60, 27, 28))), "training images are 27 x 28 and test images 28 x 28"),
        (TRAIN_LABELS, idx_bytes(LABELS[:-1]), "59 labels for the 60 images of train-images-idx3-ubyte"),
        (TRAIN_LABELS, idx_bytes(LABELS + 1), r"has the label 10, more than 9"),
        (TRAIN_LABELS, idx_bytes(IMAGES), "starts with 00 00 08 03 instead of 00 00 08 01"),
    ],
    ids=itertools.count(),  # no bytes in the names of tests
)
def test_a_missing_or_damaged_file_is_one_line(command, smoke_file, tmp_path, name, content, message):
    directory = tmp_path / "data"
    write_idx(directory, zipped=False)
    if content is None:
        (directory / name).unlink()
    else:
        (directory / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        mnist(directory)
    status, out, err = command("compare", smoke_file, "--data.name", "mnist", "--data-dir", directory)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert str(directory) in err


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(UsageError, match=r"data\.data_dir = '.*nowhere' is not a directory"):
        mnist(tmp_path / "nowhere")


def test_a_directory_where_a_file_should_be_is_not_taken_for_one(tmp_path):
    write_idx(tmp_path)
    (tmp_path / TRAIN_IMAGES).mkdir()
    assert len(mnist(tmp_path, validation_fraction=0.5).train.labels) == 30


def test_digits_take_no_directory(tmp_path):
    with pytest.raises(UsageError, match="digits come with scikit-learn; leave it out"):
        load_dataset(DataConfig(data_dir=tmp_path))


@pytest.fixture
def openml(monkeypatch):
    """A stand-in for OpenML; its answer can be changed."""

    class Answer:
        data, target, asked = np.zeros((70_000, 784), np.uint8), (np.arange(70_000) % 10).astype(str), None

    def fetch(name, **options):
        Answer.asked = name, options["version"]
        return Answer

    Answer.data[:, 0] = np.arange(70_000) >= 60_000
    monkeypatch.setattr(data, "fetch_openml", fetch)
    return Answer


@pytest.mark.parametrize(("name", "asked"), [("mnist", "mnist_784"), ("fashion_mnist", "Fashion-MNIST")])
def test_openml(openml, name, asked):
    parts = load_dataset(DataConfig(name))
    assert openml.asked == (asked, 1)
    assert [len(split.labels) for split in parts[:3]] == [51_000, 9_000, 10_000]
    assert [float(split.images[:, 0, 0].mean()) for split in parts[:3]] == pytest.approx([0, 0, 1 / 255])


@pytest.mark.parametrize("target", [["0"] * 5, ["10"] * 70_000, ["x"] * 70_000])
def test_a_wrong_answer_of_openml_is_one_line(openml, target):
    openml.target = np.array(target)
    with pytest.raises(UsageError, match=r"data\.name = 'mnist': cannot be fetched from OpenML: .* with --data-dir"):
        load_dataset(DataConfig("mnist"))


def test_no_network_is_one_line(command, smoke_file, monkeypatch):
    def fetch(*_, **__):
        import warnings

        warnings.warn("A network error occurred", stacklevel=1)
        raise OSError("no\nroute")

    monkeypatch.setattr(data, "fetch_openml", fetch)
    status, out, err = command("compare", smoke_file, "--data.name", "fashion_mnist")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "cannot be fetched from OpenML: no route; put its four IDX files" in err
