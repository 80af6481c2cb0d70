"""Data sets, their splits, and the order in which batches are drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from sklearn.datasets import fetch_openml, load_digits
from sklearn.model_selection import train_test_split

from rk_optax.experiment.errors import UsageError, refusing, require
from rk_optax.experiment.tasks import image_files, text
from rk_optax.experiment.tasks.models import MODELS
from rk_optax.experiment.tasks.task import Array, Kind

if TYPE_CHECKING:  # the configuration knows what is here
    from rk_optax.experiment.config import DataConfig, ModelConfig


class Split(NamedTuple):
    """Inputs and the labels that they should be given, int32.

    Images (example, row, column, channel) are float32 in [0, 1] and have a label each, as features (example, feature)
    have. A text has tokens (example, position) for images, int32, and the token that comes next for a label at every
    position.
    """

    images: Array
    labels: Array


class Dataset(NamedTuple):
    """The three parts of a data set; only `validation` may choose a hyperparameter."""

    train: Split
    validation: Split
    test: Split
    classes: int


def load_dataset(config: DataConfig) -> Dataset:
    """Loads and splits the data: the same configuration always gives the same split."""
    load, kind, _ = DATASETS[config.name]
    dataset = load(config)
    shape, examples = dataset.train.images.shape[1:], len(dataset.train.labels)
    require(
        len(shape) == _AXES[kind],
        f"data.name = {config.name!r}: examples of shape {shape} are no {kind}, as DATASETS has it",
    )
    require(
        config.batch_size is None or config.batch_size <= examples,
        f"data.batch_size = {config.batch_size} is more than the {examples} training examples; None takes all of them",
    )
    return dataset


def check_kind(data: DataConfig, model: ModelConfig) -> None:
    """Checks that the network takes what the data set is made of."""
    takes, given = MODELS[model.name].takes, DATASETS[data.name].kind
    models = " or ".join(name for name, architecture in MODELS.items() if given in architecture.takes)
    datasets = " or ".join(name for name, source in DATASETS.items() if source.kind in takes)
    require(
        given in takes,
        f"model.name = {model.name!r} takes {' or '.join(takes)}, and data.name = {data.name!r} is {given}: take "
        f"{models} for these data, or {datasets} for this network",
    )


def batch_indices(seed: int, examples: int, batch_size: int | None, start: int, count: int) -> np.ndarray:
    """The training examples in batches `start` to `start + count` of a run.

    Every epoch is a fresh permutation without its remainder. The order depends on nothing but
    the arguments, so every entrant sees the same one and a run can continue at any step.
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


def _stratified(whole: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """A data set without a fraction of it, and that fraction."""
    images, labels = whole
    with refusing("data.validation_fraction, data.test_fraction: cannot split", ValueError):
        parts = train_test_split(images, labels, test_size=fraction, random_state=seed, stratify=labels)
    rest, part, labels_of_rest, labels_of_part = map(np.asarray, parts)
    return Split(rest, labels_of_rest), Split(part, labels_of_part)


def _in_three(examples: Array, labels: Array, classes: int, config: DataConfig) -> Dataset:
    """Examples that come without a test part: the parts have the fractions of the configuration, class by class."""
    whole = Split(examples, labels.astype(np.int32))
    rest, test = _stratified(whole, config.test_fraction, config.split_seed)
    # Of the rest, so that both fractions are of the whole.
    fraction = config.validation_fraction / (1 - config.test_fraction)
    return Dataset(*_stratified(rest, fraction, config.split_seed), test, classes)


def _digits(config: DataConfig) -> Dataset:
    _no_directory(config, "digits come with scikit-learn")
    digits: Any = load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype(np.float32)
    return _in_three(images, digits.target, 10, config)


def _mnist(config: DataConfig) -> Dataset:
    """MNIST or a data set of its shape."""
    parts = _fetch(config.name) if config.data_dir is None else image_files.read_idx(config.data_dir)
    return _images(config, [(images[..., np.newaxis], labels) for images, labels in parts])


def _cifar10(config: DataConfig) -> Dataset:
    if config.data_dir is None:
        raise UsageError("data.name = 'cifar10' needs --data-dir, the directory of its binary version's six .bin files")
    return _images(config, image_files.read_cifar10(config.data_dir))


def _images(config: DataConfig, parts: Iterable[image_files.Labelled]) -> Dataset:
    """Of ten classes: the test part stays whole, the validation split is cut from the other. Nothing is augmented."""
    rest, test = (
        Split((images / np.float32(255)).astype(np.float32), labels.astype(np.int32)) for images, labels in parts
    )
    return Dataset(*_stratified(rest, config.validation_fraction, config.split_seed), test, classes=10)


def _sums(config: DataConfig) -> Dataset:
    """Sums are split as whole lines, so that those of the validation and test texts are new to the network."""
    _no_directory(config, "sums are generated")
    lines = text.sums(config.split_seed)
    alphabet = "".join(sorted(set("".join(lines))))
    tests = round(config.test_fraction * len(lines))
    validations = round(config.validation_fraction * len(lines))
    parts = lines[tests + validations :], lines[tests : tests + validations], lines[:tests]
    train, validation, test = (Split(*text.windows(part, alphabet, config.context)) for part in parts)
    require(
        all(len(part.labels) for part in (train, validation, test)),
        f"data.validation_fraction, data.test_fraction: cannot split: a part has no {config.context} characters",
    )
    return Dataset(train, validation, test, len(alphabet))


def _no_directory(config: DataConfig, reason: str) -> None:
    require(config.data_dir is None, f"data.data_dir = {str(config.data_dir)!r}: {reason}; leave it out")


def _fetch(name: str) -> tuple[image_files.Labelled, image_files.Labelled]:
    """The parts of a data set of OpenML, which scikit-learn keeps in its cache once it has them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of every retry; the error below says it once
            # The default parser needs pandas.
            fetched: Any = fetch_openml(_OPENML[name], version=1, as_frame=False, parser="liac-arff")
        images = np.asarray(fetched.data, np.uint8).reshape(_OPENML_EXAMPLES, 28, 28)
        labels = np.asarray(fetched.target, np.uint8)
        expected = labels.shape == (_OPENML_EXAMPLES,) and labels.max() <= 9
        require(expected, "its labels are not what they should be")
    except Exception as error:  # the network's, the server's, the cache's or the parser's
        raise UsageError(
            f"data.name = {name!r}: cannot be fetched from OpenML: {error}; put its four IDX files into a directory "
            "and name that with --data-dir"
        ) from error
    train, test = slice(_OPENML_TRAINING), slice(_OPENML_TRAINING, None)
    return (images[train], labels[train]), (images[test], labels[test])


class Source(NamedTuple):
    """How a data set is had, what its examples are, and what the help of the command line says of it."""

    load: Callable[[DataConfig], Dataset]
    kind: Kind
    about: str


_AXES: dict[Kind, int] = {"images": 3, "features": 1, "text": 1}  # of an example
_OPENML = {"mnist": "mnist_784", "fashion_mnist": "Fashion-MNIST"}
_OPENML_EXAMPLES, _OPENML_TRAINING = 70_000, 60_000  # the training part comes first
# A new data set needs a line here.
DATASETS: dict[str, Source] = {
    "digits": Source(_digits, "images", "those inside scikit-learn"),
    "mnist": Source(_mnist, "images", "handwritten digits"),
    "fashion_mnist": Source(_mnist, "images", "pieces of clothing"),
    "cifar10": Source(_cifar10, "images", "coloured photographs, from --data-dir"),
    "sums": Source(_sums, "text", "sums in words, to be predicted by characters"),
}
