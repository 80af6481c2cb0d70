import numpy as np
import pytest

from rk_optax.experiment.config import DataConfig, ModelConfig
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.tasks.data import DATASETS, Dataset, Source, Split, batch_indices, load_dataset
from rk_optax.experiment.tasks.models import MODELS
from rk_optax.experiment.tasks.supervised import build_task
from rk_optax.experiment.tasks.text import sums


def test_digits_are_split_without_loss_or_overlap():
    data = load_dataset(DataConfig())
    splits = (data.train, data.validation, data.test)
    assert sum(len(split.labels) for split in splits) == 1797
    assert data.classes == 10
    # Two digits in scikit-learn's set are alike pixel by pixel, so count images, not sets.
    everything = np.concatenate([split.images.reshape(-1, 64) for split in splits])
    from sklearn.datasets import load_digits

    original = load_digits().data.astype(np.float32) / 16
    assert np.array_equal(everything[np.lexsort(everything.T)], original[np.lexsort(original.T)])


def test_fractions_are_of_the_whole():
    data = load_dataset(DataConfig(validation_fraction=0.1, test_fraction=0.3))
    assert len(data.test.labels) == pytest.approx(0.3 * 1797, abs=1)
    assert len(data.validation.labels) == pytest.approx(0.1 * 1797, abs=1)


def test_split_is_stratified():
    data = load_dataset(DataConfig())
    for split in (data.train, data.validation, data.test):
        shares = np.bincount(split.labels) / len(split.labels)
        assert np.all(np.abs(shares - 0.1) < 0.01)


def test_split_depends_on_its_seed_alone():
    a, b = load_dataset(DataConfig()), load_dataset(DataConfig())
    other = load_dataset(DataConfig(split_seed=1))
    assert np.array_equal(a.test.images, b.test.images)
    assert not np.array_equal(a.test.images, other.test.images)


def test_images_and_labels_have_the_promised_types():
    train = load_dataset(DataConfig()).train
    assert train.images.shape[1:] == (8, 8, 1)
    assert train.images.dtype == np.float32
    assert train.labels.dtype == np.int32
    assert train.images.min() == 0
    assert train.images.max() == 1


def test_too_large_a_batch_is_refused():
    with pytest.raises(UsageError, match=r"data\.batch_size = 2000 is more than the \d+ training"):
        load_dataset(DataConfig(batch_size=2000))


def test_too_small_a_split_is_refused():
    with pytest.raises(UsageError, match=r"data\.validation_fraction, data\.test_fraction"):
        load_dataset(DataConfig(test_fraction=0.001))


def test_every_epoch_is_a_fresh_permutation():
    batches = batch_indices(seed=3, examples=20, batch_size=5, start=0, count=8)
    first, second = batches[:4].ravel(), batches[4:].ravel()
    assert sorted(first) == sorted(second) == list(range(20))
    assert not np.array_equal(first, second)


def test_an_epoch_drops_its_remainder():
    batches = batch_indices(seed=3, examples=23, batch_size=5, start=0, count=4)
    assert len(np.unique(batches)) == 20


def test_batches_can_be_asked_for_in_pieces():
    whole = batch_indices(1, 23, 5, 0, 30)
    pieces = [batch_indices(1, 23, 5, start, 6) for start in range(0, 30, 6)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert whole.dtype == np.int32


def test_seeds_draw_different_batches():
    assert not np.array_equal(batch_indices(0, 20, 5, 0, 4), batch_indices(1, 20, 5, 0, 4))


@pytest.mark.parametrize("batch_size", [None, 6])
def test_full_batch(batch_size):
    assert np.array_equal(batch_indices(0, 6, batch_size, 7, 2), [range(6), range(6)])


def test_sums_are_split_as_whole_lines():
    data = load_dataset(DataConfig("sums", batch_size=8, context=32, test_fraction=0.3, validation_fraction=0.2))
    assert data.classes == 24
    sizes = [split.labels.size for split in data[:3]]
    assert np.allclose(np.divide(sizes, sum(sizes)), [0.5, 0.2, 0.3], atol=0.01)
    for split in data[:3]:
        assert split.images.dtype == split.labels.dtype == np.int32
        assert split.images.shape == split.labels.shape == (len(split.labels), 32)
        # The label is the token that comes next, in this example and into the next one.
        assert np.array_equal(split.images.ravel()[1:], split.labels.ravel()[:-1])
    lines = sums(0)
    assert len(set(lines)) == 10_000
    alphabet = sorted(set("".join(lines)))
    test = "".join(alphabet[token] for token in data.test.images.ravel())
    assert "".join(lines[:3000]).startswith(test)


def test_sums_have_to_fill_a_context():
    with pytest.raises(UsageError, match="a part has no 100000 characters"):
        load_dataset(DataConfig("sums", context=100_000))


def wine(config):
    """Rows of a table with a label each, as a data set of one's own may have them."""
    from sklearn.datasets import load_wine

    features, labels = load_wine(return_X_y=True)
    whole = Split(features.astype(np.float32), labels.astype(np.int32))
    return Dataset(whole, whole, whole, classes=3)


def test_a_network_that_does_not_go_with_the_data_is_refused_with_those_that_do(monkeypatch):
    for registry, few in ((DATASETS, ("digits", "mnist", "sums")), (MODELS, ("mlp", "cnn", "transformer", "rk_net"))):
        for name in registry.keys() - few:
            monkeypatch.delitem(registry, name)
    monkeypatch.setitem(DATASETS, "wine", Source(wine, "features", "three cultivars"))
    data = DataConfig(name="wine", batch_size=None)
    with pytest.raises(UsageError) as raised:
        build_task(data, ModelConfig(name="cnn"))
    assert str(raised.value) == (
        "model.name = 'cnn' takes images, and data.name = 'wine' is features: take mlp or rk_net for these data, or "
        "digits or mnist for this network"
    )
    task = build_task(data, ModelConfig(hidden=(4,)))
    assert task.score(*task.init(0)[:2], task.dataset.test).loss.shape == ()


def test_examples_that_are_not_of_their_kind_are_refused(monkeypatch):
    monkeypatch.setitem(DATASETS, "wine", Source(wine, "images", "three cultivars"))
    with pytest.raises(UsageError, match=r"data\.name = 'wine': examples of shape \(13,\) are no images"):
        build_task(DataConfig(name="wine"), ModelConfig(name="cnn"))
