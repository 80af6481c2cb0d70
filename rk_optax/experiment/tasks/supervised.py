"""A network to train on a data set: initial parameters, loss, batches and scores."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import rk_optax
from rk_optax.experiment.config import DataConfig, ModelConfig
from rk_optax.experiment.errors import require
from rk_optax.experiment.tasks.data import Dataset, Split, batch_indices, check_kind, load_dataset
from rk_optax.experiment.tasks.models import MODELS, build_model
from rk_optax.experiment.tasks.rk_net import ConvRKNet, RKNet, finer
from rk_optax.experiment.tasks.task import Array, Data, Finer, Params, Score, Task, Variables

# A large split is scored in pieces of so many examples, which bounds the memory that a convolution takes.
_PIECE = 4096
_DROPOUT = 0x64726F70  # keeps the dropout keys of a run apart from those of its initial parameters


def _accuracy(model: nn.Module, variables: Any, piece: Split) -> jax.Array:
    outputs: Any = model.apply(variables, piece.images)
    return outputs.argmax(-1) == piece.labels


def _transfer_gap(model: nn.Module, variables: Any, piece: Split) -> jax.Array:
    """Correct on the network's own grid, less correct with the same weights on a refined one."""
    refined: Any = model.apply(variables, piece.images, refined=True)
    own = _accuracy(model, variables, piece)
    return own.astype(jnp.float32) - (refined.argmax(-1) == piece.labels)


# metric(model, variables, examples) -> a value per example, of which the mean is reported.
METRICS: dict[str, Callable[[nn.Module, Any, Split], jax.Array]] = {
    "accuracy": _accuracy,
    "transfer_gap": _transfer_gap,
}


class Supervised(Task):
    """A network and a data set."""

    sliced = ("images", "labels")

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        batch_size: int | None,
        l2: float = 0.0,
        *,
        squared: bool = False,
        metrics: Sequence[str] = ("accuracy",),
    ):
        """Takes a network of `models`, and for the rest what the fields of the configurations say.

        `squared` is for half the mean squared distance rather than cross-entropy.
        """
        self.model, self._l2, self._batch_size, self._squared, self._metrics = model, l2, batch_size, squared, metrics
        self.dataset: Dataset = jax.device_put(dataset)
        self.source, self.examples = self.dataset.train, len(dataset.train.labels)
        shapes = jax.eval_shape(self._init_run, 0)
        size = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
        # With BatchNorm or dropout an example is no function of its own.
        pointwise = not shapes.statistics and not getattr(model, "dropout", 0)
        self.loss_fn = structured_loss(self._outputs, dataset.classes, l2, squared, size, pointwise)
        if pointwise:  # a row is the gradient of one output of one example
            self.gradients_per_row = 1 / (batch_size or self.examples)
        # Compiled once for all optimizers.
        self._init = jax.jit(self._init_run)
        self._init_seeds = jax.jit(jax.vmap(self._init_run))
        self._score = jax.jit(self._score_run)
        over_rates = jax.vmap(self._score_run, (0, 0, None))
        self._score_grid = jax.jit(jax.vmap(over_rates, (0, 0, None)))

    def finer(self) -> Finer:
        """The same for a network that is a method of its features."""
        if not isinstance(self.model, RKNet | ConvRKNet):
            return super().finer()
        model, *carried = finer(self.model)
        options: dict[str, Any] = {"squared": self._squared, "metrics": self._metrics}
        return Finer(Supervised(model, self.dataset, self._batch_size, self._l2, **options), *carried)

    def init(self, seeds: int | Sequence[int]) -> Variables:
        """What a run starts from, which depends on the seed alone; of several seeds, stacked."""
        init = self._init if isinstance(seeds, int) else self._init_seeds
        return init(jnp.asarray(seeds))

    def batches(self, seed: int, start: int, count: int) -> np.ndarray:
        """Indices (count, batch_size) of the batches from step `start` on."""
        return batch_indices(seed, self.examples, self._batch_size, start, count)

    def data(self, source: Split, batch: jax.Array, statistics: Any, dropout_key: jax.Array) -> Data:
        """One mask, and the statistics of before the step, for all stages."""
        images, labels = source.images[batch], source.labels[batch]
        return {"images": images, "labels": labels, "statistics": statistics, "dropout_key": dropout_key}

    def loss_and_statistics(self, params: Params, **data: Any) -> tuple[jax.Array, Any]:
        """The loss, and the statistics after this batch, which only the caller's own gradient moves."""
        labels = data.pop("labels")
        outputs, moved = self._apply(params, **data)
        return self._of_outputs(outputs, labels).mean() + self._penalty(params), moved

    def score(self, params: Params, statistics: Any, split: Split, *, grid: bool = False) -> Score:
        """Loss and metrics over a whole split, of a run or of a grid of runs."""
        loss, metrics = (self._score_grid if grid else self._score)(params, statistics, split)
        return Score(np.asarray(loss, float), {name: np.asarray(value, float) for name, value in metrics.items()})

    def _apply(self, params: Params, images: Array, statistics: Any = None, dropout_key: Any = None) -> Any:
        return self.model.apply(
            {**params, **(statistics or {})},
            images,
            train=True,
            mutable=list(statistics or {}),
            rngs=None if dropout_key is None else {"dropout": jax.random.wrap_key_data(dropout_key)},
        )

    def _outputs(self, params: Params, images: Array, statistics: Any = None, dropout_key: Any = None) -> Any:
        return self._apply(params, images, statistics, dropout_key)[0]

    def _of_outputs(self, outputs: Any, labels: Array) -> jax.Array:
        """The loss of every example."""
        if self._squared:
            return 0.5 * jnp.sum(_residuals(outputs, labels, self.dataset.classes) ** 2, axis=-1)
        return optax.losses.softmax_cross_entropy_with_integer_labels(outputs, labels)

    def _penalty(self, params: Params) -> jax.Array:
        return 0.5 * self._l2 * optax.tree_utils.tree_norm(params, squared=True)

    def _init_run(self, seed: Any) -> Variables:
        key = jax.random.key(seed)
        statistics = dict(self.model.init(key, self.dataset.train.images[:1]))
        params = {"params": statistics.pop("params")}
        return Variables(params, statistics, jax.random.key_data(jax.random.fold_in(key, _DROPOUT)))

    def _score_run(self, params: Params, statistics: Any, split: Split) -> tuple[jax.Array, dict[str, jax.Array]]:
        def examples(piece: Split) -> Any:
            variables = {**params, **statistics}
            losses = self._of_outputs(self.model.apply(variables, piece.images), piece.labels)
            return losses, {name: METRICS[name](self.model, variables, piece) for name in self._metrics}

        losses, metrics = _in_pieces(examples, split)
        return losses.mean() + self._penalty(params), {name: values.mean() for name, values in metrics.items()}


def build_task(data: DataConfig, model: ModelConfig, metrics: Sequence[str] = ("accuracy",)) -> Supervised:
    """The network and the data that a configuration describes."""
    for name in metrics:
        require(name in METRICS, f"metrics = {name!r} must be one of {', '.join(METRICS)}")
    refining = ", ".join(name for name, architecture in MODELS.items() if architecture.refines)
    require(
        "transfer_gap" not in metrics or MODELS[model.name].refines,
        f"metrics = 'transfer_gap' needs a network with a grid to refine ({refining}), not {model.name}",
    )
    check_kind(data, model)
    dataset = load_dataset(data)
    network = build_model(model, dataset.classes)
    squared = model.loss == "squared_error"
    return Supervised(network, dataset, data.batch_size, model.l2, squared=squared, metrics=metrics)


def structured_loss(
    outputs: Callable[..., Any], classes: int, l2: float, squared: bool, size: int, pointwise: bool
) -> rk_optax.ModelLoss:
    """The loss as a function of `outputs(params, images, statistics, dropout_key)` or of residuals, and the penalty.

    `size` is the number of parameters; `pointwise` says that the outputs of an example depend on that example alone.
    """
    if squared:

        def fit(params: Params, images: Array, labels: Array, statistics: Any = None, dropout_key: Any = None) -> Any:
            if pointwise:
                return _residuals(outputs(params, images[None])[0], labels, classes)
            return _residuals(outputs(params, images, statistics, dropout_key), labels, classes)

        terms: dict[str, Callable[..., Any]] = {"fit": fit}
        if l2:
            terms["penalty"] = lambda params: jax.flatten_util.ravel_pytree(params)[0]
        # The mean is over residuals, of which an example has as many as classes and the penalty one per parameter.
        weights = {"fit": classes, "penalty": l2 * size}
        return rk_optax.LeastSquares(
            terms,
            weights={name: weights[name] for name in terms},
            pointwise=("images", "labels") if pointwise else (),
            reduction="mean",
        )

    def with_params(params: Params, images: Array, statistics: Any = None, dropout_key: Any = None) -> Any:
        # The weights are outputs too: so the penalty is part of the Gauss–Newton model.
        return outputs(params, images, statistics, dropout_key), params

    def of_outputs(outputs: Any, labels: Array) -> jax.Array:
        logits, params = outputs
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean() + 0.5 * l2 * optax.tree_utils.tree_norm(params, squared=True)

    return rk_optax.ModelLoss(with_params, of_outputs)


def probe_loss(config: ModelConfig) -> rk_optax.ModelLoss:
    """A loss of the same structure, with which an optimizer's arguments are checked before there are data."""

    def outputs(params: Params, images: Array, statistics: Any = None, dropout_key: Any = None) -> Any:
        raise NotImplementedError

    return structured_loss(outputs, 1, config.l2, config.loss == "squared_error", 1, pointwise=False)


def _residuals(outputs: Any, labels: Array, classes: int) -> jax.Array:
    return outputs - jax.nn.one_hot(labels, classes, dtype=outputs.dtype)


def _in_pieces(function: Callable[[Split], Any], split: Split) -> Any:
    """A function of examples, evaluated on so many at a time."""

    def of_one(example: Split) -> Any:
        return jax.tree.map(lambda values: values[0], function(Split(*(part[None] for part in example))))

    return jax.lax.map(of_one, split, batch_size=_PIECE)
