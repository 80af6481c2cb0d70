"""Typed configurations: the dataclasses, the loader of `configs/<name>.py`, and the checks."""

import dataclasses
import importlib.util
import math
import re
import sys
import traceback
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typeguard
import tyro

from rk_optax.experiment.errors import UsageError

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set and how it is split and batched."""

    name: Literal["digits", "mnist", "fashion_mnist", "sums"] = "digits"
    """Data set: digits are those inside scikit-learn, sums a text of sums in words, to be predicted by characters."""
    data_dir: Annotated[Path | None, tyro.conf.arg(aliases=("--data-dir",))] = None
    """Directory of the four IDX files of mnist or fashion_mnist; without it they are fetched from OpenML."""
    validation_fraction: float = 0.15
    """Fraction of the examples (of the training part, where a data set has parts) on which learning rates are tuned."""
    test_fraction: float = 0.2
    """Fraction of the digits or sums on which accuracies are reported; MNIST's kin have a test part of their own."""
    split_seed: int = 0
    """Seed of the stratified split, the same for every run."""
    batch_size: int | None = 256
    """Examples per batch; None takes the whole training set at every step."""
    context: int = 64
    """Characters of an example of sums."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network."""

    name: Literal["mlp", "cnn", "transformer"] = "mlp"
    """Architecture: mlp and cnn are for images, transformer is for sums."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of an mlp, channels of the convolutions of a cnn."""
    activation: Literal["tanh", "relu", "gelu"] = "tanh"
    """Activation function of the hidden layers."""
    dropout: float = 0.0
    """Fraction of the features that are dropped in training."""
    width: int = 64
    """Features per position of a transformer."""
    blocks: int = 2
    """Blocks of attention and feed-forward layers of a transformer."""
    heads: int = 4
    """Attention heads of each block of a transformer."""
    l2: float = 1e-3
    """The loss is the mean cross-entropy plus l2/2 times the squared norm of the parameters."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """One entrant of a comparison."""

    factory: str
    """sgd, momentum, adam, or the name of a solver (see `rk-optax solvers`)."""
    learning_rates: tuple[float, float]
    """Lowest and highest learning rate of the log-spaced grid that is searched."""
    options: Mapping[str, float | bool] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of the factory, such as momentum."""
    preconditioner: Literal["adagrad", "rms", "adam"] | None = None
    """Scales every stage of a solver: rk_optax.precondition_by_adagrad and so on, with their defaults."""
    rule: Literal["constant", "dal"] = "constant"
    """With dal, what is searched is its max_learning_rate."""
    rule_options: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of rk_optax.dal, such as estimate."""
    stage_batches: Literal["same", "split"] = "same"
    """With split, each stage of a solver sees its own slice of the batch, so a step costs one gradient in all."""


@dataclasses.dataclass(frozen=True)
class TrainOptimizerConfig:
    """The optimizer of a single training run."""

    factory: str
    """sgd, momentum, adam, or the name of a solver (see `rk-optax solvers`)."""
    learning_rate: float
    """Step size h; with a schedule, that after the warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes down to 0 until the last step: Optax's cosine_decay_schedule or linear_schedule."""
    warmup_steps: int = 0
    """Steps over which the learning rate first rises from 0, linearly."""
    options: Mapping[str, float | bool] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of the factory, such as momentum."""
    preconditioner: Literal["adagrad", "rms", "adam"] | None = None
    """Scales every stage of a solver: rk_optax.precondition_by_adagrad and so on, with their defaults."""
    rule: Literal["constant", "dal"] = "constant"
    """With dal, learning_rate is its max_learning_rate."""
    rule_options: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of rk_optax.dal, such as estimate."""
    stage_batches: Literal["same", "split"] = "same"
    """With split, each stage of a solver sees its own slice of the batch, so a step costs one gradient in all."""

    def entrant(self) -> OptimizerConfig:
        """The same as an entrant of a comparison, which has a range of learning rates."""
        fields = {field.name for field in dataclasses.fields(OptimizerConfig)} - {"learning_rates"}
        rates = (self.learning_rate, self.learning_rate)
        return OptimizerConfig(learning_rates=rates, **{name: getattr(self, name) for name in fields})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run of one optimizer."""

    optimizer: TrainOptimizerConfig
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    steps: int | None = None
    """Length of the run in steps. Give either these or epochs."""
    epochs: int | None = None
    """Length of the run in passes over the training examples."""
    evaluate_every: int | None = None
    """Steps between two evaluations; None is an epoch, or the whole run if that is shorter."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints, a multiple of evaluate_every; None writes one at every evaluation."""
    keep_checkpoints: int = 3
    """Checkpoints that are kept, the latest ones."""
    seed: int = 0
    """Seed of the initial parameters, the order of the batches and the dropout masks."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too."""


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """What every run may spend, and where it is looked at."""

    gradients: int | None = None
    """Gradient evaluations of every run, whatever its solver. Give either these or updates."""
    evaluate_every: int = 10
    """Steps between two evaluation points."""
    updates: int | None = None
    """Steps of every run, whatever they cost."""
    scored_examples: int | None = None
    """Training examples on which the training loss is evaluated, always the same; None takes all."""


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """The search for each entrant's learning rate, by validation loss late in the run."""

    trials: int = 11
    """Learning rates tried for every entrant."""
    seeds: tuple[int, ...] = (100, 101, 102)
    """Seeds of the tuning runs; none of them may be a seed of the comparison."""
    fraction: float = 1.0
    """Length of a tuning run, of that of a compared run."""


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """A comparison of optimizers at an equal budget of gradient evaluations or of updates."""

    optimizers: Mapping[str, OptimizerConfig]
    """The entrants, by the name they are shown under."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    budget: BudgetConfig = BudgetConfig(gradients=2400)
    tuning: TuningConfig = TuningConfig()
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the compared runs: initial parameters and order of the batches."""
    timed_runs: int = 7
    """Serial timed runs of every entrant, of which the median time is reported."""
    timed_updates: int | None = None
    """Length of a timed run, from which the time of a whole one is extrapolated; None times whole runs."""
    vectorized: bool = True
    """Tune and train all runs of an entrant side by side. False makes them take turns in one program: on a CPU that
    is faster with small batches, and needs less memory."""


def load(path: Path, kind: type[Config]) -> Config:
    """Runs a configuration file and returns what its `get_config()` returns.

    Args:
        path: a Python file.
        kind: the dataclass that `get_config()` has to return.

    Returns:
        The configuration, its fields checked to have the declared types.

    Raises:
        UsageError: if the file is missing, fails, or returns something else.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such config file")
    module_name = f"_rk_optax_config_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: a config is a Python file whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up the module that defines them, so it has to be registered.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UsageError(f"{path}: define get_config() and let it return a {kind.__name__} (see configs/digits.py)")
        config = get_config()
    except UsageError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file does wrong is the file's error
        raise UsageError(f"{_place(error, path)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, kind):
        raise UsageError(f"{path}: get_config() must return a {kind.__name__}, got {type(config).__name__}")
    try:
        check_types(config)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    return config


def check_types(config: Any, prefix: str = "") -> None:
    """Checks that every field of a (nested) dataclass has its declared type.

    Raises:
        UsageError: if one has not; the message names the field.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value, hint = prefix + field.name, getattr(config, field.name), hints[field.name]
        try:
            typeguard.check_type(
                value,
                hint,
                collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS,
            )
        except typeguard.TypeCheckError as error:
            raise UsageError(f"{name} = {value!r}: {error}") from error
        if isinstance(value, bool) and bool not in (hint, *typing.get_args(hint)):  # Python counts bool among the ints
            raise UsageError(f"{name} = {value!r}: bool is not a number")
        children = value.items() if isinstance(value, Mapping) else [(None, value)]
        for key, child in children:
            if dataclasses.is_dataclass(child):
                check_types(child, f"{name}." if key is None else f"{name}.{key}.")


def check(config: CompareConfig) -> None:
    """Checks types and values of a comparison.

    Raises:
        UsageError: if a value is out of range; the message names the field and what it may be.
    """
    check_types(config)
    budget, tuning = config.budget, config.tuning
    _check_task(config.data, config.model)
    for name, count in [
        ("budget.gradients", 1 if budget.gradients is None else budget.gradients),
        ("budget.updates", 1 if budget.updates is None else budget.updates),
        ("budget.scored_examples", 1 if budget.scored_examples is None else budget.scored_examples),
        ("budget.evaluate_every", budget.evaluate_every),
        ("timed_runs", config.timed_runs),
        ("timed_updates", 1 if config.timed_updates is None else config.timed_updates),
    ]:
        _require(count > 0, name, count, "must be positive")
    _require(
        (budget.gradients is None) != (budget.updates is None),
        "budget.gradients, budget.updates",
        (budget.gradients, budget.updates),
        "must be one number and one None: a budget is in gradients or in updates",
    )
    _require(
        config.timed_updates is None or budget.updates is not None,
        "timed_updates",
        config.timed_updates,
        "needs a budget in updates: set budget.updates, or leave it None",
    )
    _require(tuning.trials >= 2, "tuning.trials", tuning.trials, "must be at least 2")
    _require(0 < tuning.fraction <= 1, "tuning.fraction", tuning.fraction, "must be above 0, at most 1")
    for name, seeds in [("seeds", config.seeds), ("tuning.seeds", tuning.seeds)]:
        valid = len(seeds) > 0 and all(0 <= seed < 2**31 for seed in seeds)
        _require(
            valid and len(set(seeds)) == len(seeds),
            name,
            seeds,
            "must be one or more different integers from 0 to 2**31 - 1",
        )
    _require(
        not set(config.seeds) & set(tuning.seeds),
        "tuning.seeds",
        tuning.seeds,
        "must not contain a seed of the comparison: a rate tuned on the compared runs flatters it",
    )
    _require(len(config.optimizers) > 0, "optimizers", config.optimizers, "must name an entrant")
    for name, entrant in config.optimizers.items():
        where = f"optimizers.{name}"
        _require(
            re.fullmatch(r"\w[\w-]*", name) is not None,
            "optimizers",
            name,
            "is no name for an entrant: use letters, digits, _ and -",
        )
        low, high = entrant.learning_rates
        _require(
            0 < low < high < math.inf,
            f"{where}.learning_rates",
            entrant.learning_rates,
            "must be positive, finite, the lowest first",
        )


def check_train(config: TrainConfig) -> None:
    """Checks types and values of a training run.

    Raises:
        UsageError: if a value is out of range; the message names the field and what it may be.
    """
    check_types(config)
    _check_task(config.data, config.model)
    optimizer = config.optimizer
    _require(
        (config.steps is None) != (config.epochs is None),
        "steps, epochs",
        (config.steps, config.epochs),
        "must be one number and one None: a run is so many steps or so many epochs long",
    )
    for name in ("steps", "epochs", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
        count = getattr(config, name)
        _require(count is None or count > 0, name, count, "must be positive")
    _require(0 <= config.seed < 2**31, "seed", config.seed, "must be an integer from 0 to 2**31 - 1")
    _require(
        0 < optimizer.learning_rate < math.inf,
        "optimizer.learning_rate",
        optimizer.learning_rate,
        "must be positive and finite",
    )
    _require(optimizer.warmup_steps >= 0, "optimizer.warmup_steps", optimizer.warmup_steps, "must not be negative")
    _require(
        optimizer.rule == "constant" or (optimizer.schedule == "constant" and optimizer.warmup_steps == 0),
        "optimizer.rule",
        optimizer.rule,
        "sets the learning rate itself: leave schedule and warmup_steps out",
    )


def from_json(kind: type[Config], content: Any) -> Config:
    """The configuration that `dataclasses.asdict` and JSON have been made of.

    Args:
        kind: its dataclass.
        content: what `json.loads` returned.

    Raises:
        UsageError: if it does not fit the dataclass.
    """
    config = _from_json(kind, content, "")
    check_types(config)
    return config


def _from_json(kind: Any, content: Any, prefix: str) -> Any:
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        choices = typing.get_args(kind)
        if isinstance(content, list):
            return tuple(content)
        return Path(content) if Path in choices and isinstance(content, str) else content
    if not isinstance(content, dict):
        raise UsageError(f"{prefix or 'config.'}: {content!r} is no configuration")
    hints = typing.get_type_hints(kind)
    unknown = [name for name in content if name not in hints]
    if unknown:
        raise UsageError(f"{prefix}{unknown[0]}: no field of this version of rk-optax")
    values = {name: _from_json(hints[name], value, f"{prefix}{name}.") for name, value in content.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UsageError(f"{prefix or 'config.'}: {error}") from error


def _check_task(data: DataConfig, model: ModelConfig) -> None:
    for name, fraction in [
        ("data.validation_fraction", data.validation_fraction),
        ("data.test_fraction", data.test_fraction),
    ]:
        _require(0 < fraction < 1, name, fraction, "must lie between 0 and 1")
    _require(
        data.validation_fraction + data.test_fraction < 1,
        "data.validation_fraction + data.test_fraction",
        data.validation_fraction + data.test_fraction,
        "must be below 1 to leave training examples",
    )
    _require(
        0 <= data.split_seed < 2**32, "data.split_seed", data.split_seed, "must not be negative, nor 2**32 or more"
    )
    _require(0 <= model.l2 < math.inf, "model.l2", model.l2, "must be finite, not negative")
    _require(0 <= model.dropout < 1, "model.dropout", model.dropout, "must be at least 0, below 1")
    for name, count in [
        ("data.batch_size", 1 if data.batch_size is None else data.batch_size),
        ("data.context", data.context),
        *(("model.hidden", width) for width in model.hidden),
        ("model.width", model.width),
        ("model.blocks", model.blocks),
        ("model.heads", model.heads),
    ]:
        _require(count > 0, name, count, "must be positive")
    _require(model.width % model.heads == 0, "model.width", model.width, f"must be a multiple of {model.heads} heads")
    takes, given = ("text" if it else "images" for it in (model.name == "transformer", data.name == "sums"))
    _require(takes == given, "model.name", model.name, f"takes {takes}, and data.name = {data.name!r} is {given}")


def _require(condition: bool, name: str, value: Any, message: str) -> None:
    if not condition:
        raise UsageError(f"{name} = {value!r} {message}")


def _place(error: BaseException, path: Path) -> str:
    """The line of the config file that an error came from, as `file:line`."""
    if isinstance(error, SyntaxError) and error.lineno is not None:
        return f"{path}:{error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename) == path or Path(frame.filename) == path.resolve()
    ]
    return f"{path}:{lines[-1]}" if lines else str(path)
