"""What an experiment is: plain dataclasses, each field with the range that it may have, which `checked` checks."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeAlias

import tyro
from pydantic import AfterValidator, ConfigDict, Field, model_validator

import rk_optax
from rk_optax.experiment.config.load import checked as checked
from rk_optax.experiment.config.load import load as load
from rk_optax.experiment.config.load import parse as parse
from rk_optax.experiment.tasks.data import DATASETS
from rk_optax.experiment.tasks.models import MODELS
from rk_optax.experiment.tasks.problems import PROBLEMS
from rk_optax.methods import TABLEAUS
from rk_optax.step_size import StepSizeRule

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Options = Mapping[str, int | float | bool | str]


def _must(holds: Callable[[Any], Any], message: str) -> AfterValidator:
    """A check of one field."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(message)
        return value

    return AfterValidator(check)


_DIFFERENT = _must(lambda seeds: len(set(seeds)) == len(seeds), "must be different")
_RISING = _must(lambda fractions: list(fractions) == sorted(set(fractions)), "must increase")
_NAME = _must(
    re.compile(r"\w[\w ,+-]*").fullmatch, "is no name for an entrant: use letters, digits, spaces and , + - _"
)
_ABSOLUTE = AfterValidator(lambda path: path and path.absolute())  # a run may go on from another directory
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), _DIFFERENT]
Name = Annotated[str, _NAME]


def _is_rule(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, StepSizeRule)


RULES = {name: value for name, value in vars(rk_optax).items() if _is_rule(value) and name.islower()}
# Hutchinson's is missing: its Hessian-vector products are no whole number of gradients per step.
PRECONDITIONERS = {name: getattr(rk_optax, f"precondition_by_{name}") for name in ("adagrad", "rms", "adam")}
# What is there is known where it is made; at run time these are the literals that the command line shows.
if TYPE_CHECKING:
    DatasetName: TypeAlias = str
    ModelName: TypeAlias = str
    ProblemName: TypeAlias = str
    MethodName: TypeAlias = str
    PreconditionerName: TypeAlias = str
    RuleName: TypeAlias = str
else:
    DatasetName, ModelName, ProblemName, MethodName, PreconditionerName, RuleName = (
        Literal[tuple(names)] for names in (DATASETS, MODELS, PROBLEMS, TABLEAUS, PRECONDITIONERS, ["constant", *RULES])
    )


def _known(title: str, entries: Mapping[str, str]) -> Any:
    """The help of a field whose values stand in a registry."""
    return tyro.conf.arg(help=f"{title}. " + "; ".join(f"{name}: {about}" for name, about in entries.items()))


_DATASETS = _known("Data set", {name: f"{source.about} ({source.kind})" for name, source in DATASETS.items()})
_MODELS = _known("Architecture", {name: f"takes {' or '.join(model.takes)}" for name, model in MODELS.items()})


class _Checked:
    """Strict: no number for a string, no bool for a number, no list for a tuple, no field that is not declared."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, revalidate_instances="always", extra="forbid")

    def _mistakes(self) -> Iterable[str]:
        """What is wrong with the fields together."""
        return ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for mistake in self._mistakes():
            raise ValueError(mistake)
        return self


def _one_of(first: str, a: Any, second: str, b: Any, reason: str) -> Iterable[str]:
    if (a is None) == (b is None):
        yield f"{first}, {second} = {(a, b)} must be one number and one None: {reason}"


@dataclasses.dataclass(frozen=True)
class DataConfig(_Checked):
    """The data set and how it is split and batched."""

    name: Annotated[DatasetName, _DATASETS] = "digits"
    """Data set, a key of DATASETS in rk_optax/experiment/tasks/data.py."""
    data_dir: Annotated[Path | None, tyro.conf.arg(aliases=("--data-dir",)), _ABSOLUTE] = None
    """Directory of the four IDX files of mnist or fashion_mnist, which are fetched from OpenML without it; or of the
    six files of the binary version of cifar10, which needs it."""
    validation_fraction: Fraction = 0.15
    """Fraction of the examples (of the training part, where a data set has parts) on which learning rates are tuned."""
    test_fraction: Fraction = 0.2
    """Fraction of the examples on which accuracies are reported, of a data set without a test part of its own."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the stratified split, the same for every run."""
    batch_size: Positive | None = 256
    """Examples per batch; None takes the whole training set at every step."""
    context: Positive = 64
    """Characters of an example of a text."""

    def _mistakes(self) -> Iterable[str]:
        total = self.validation_fraction + self.test_fraction
        if total >= 1:
            yield f"validation_fraction + test_fraction = {total} must be below 1"


@dataclasses.dataclass(frozen=True)
class ModelConfig(_Checked):
    """The network and its loss."""

    name: Annotated[ModelName, _MODELS] = "mlp"
    """Architecture, a key of MODELS in rk_optax/experiment/tasks/models.py."""
    hidden: tuple[Positive, ...] = (64, 64)
    """Widths of the hidden layers of an mlp, channels of the convolutions of a cnn."""
    activation: Literal["tanh", "relu", "gelu"] = "tanh"
    """Activation function of the hidden layers."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the features that are dropped in training."""
    width: Positive = 64
    """Features per position of a transformer, features of an rk_net."""
    blocks: Positive = 2
    """Blocks of attention and feed-forward layers of a transformer."""
    heads: Positive = 4
    """Attention heads of each block of a transformer."""
    method: MethodName = "rk4"
    """The Runge-Kutta method that moves the features of rk_net and rk_conv_net: a key of rk_optax.TABLEAUS."""
    depth: Positive = 4
    """Time that the features of an rk_net move for, with a node of its weights at every unit; 4 in an rk_conv_net."""
    steps: Positive = 4
    """Steps of the method in rk_net and in each block of rk_conv_net, a multiple of depth."""
    layer: Literal["double_sym", "single"] = "double_sym"
    """Right-hand side of an rk_net, a layer of rk_optax.networks."""
    refine_at: Annotated[tuple[Fraction, ...], _RISING] = ()
    """Fractions of a run, such as 0.5, after which rk_net and rk_conv_net go on with twice as many nodes and steps: at
    the nearest evaluation, with the weights as a function of depth and the optimizer's state carried over."""
    l2: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    """The loss has a term of l2/2 times the squared norm of the parameters."""
    loss: Literal["cross_entropy", "squared_error"] = "cross_entropy"
    """Mean cross-entropy of the logits, or half the mean squared distance of the outputs from the one-hot label, which
    shows a solver such as residual_euler its residuals."""

    def _mistakes(self) -> Iterable[str]:
        if self.width % self.heads:
            yield f"width = {self.width} must be a multiple of {self.heads} heads"
        depth = 4 if self.name == "rk_conv_net" else self.depth
        if MODELS[self.name].refines and self.steps % depth:
            yield (
                f"steps = {self.steps} must be a multiple of depth = {depth}: a step over a node of the weights loses "
                "the method's order"
            )
        if self.refine_at and not MODELS[self.name].refines:
            yield f"refine_at = {self.refine_at} is for rk_net and rk_conv_net, not {self.name}"


@dataclasses.dataclass(frozen=True)
class MethodConfig(_Checked):
    """An optimizer without its learning rate: what train, compare and race have in common."""

    factory: str
    """An optimizer of rk_optax or of Optax: sgd, adam, lbfgs, rk4, rkc, rosenbrock_euler (see `rk-optax solvers`)."""
    _: dataclasses.KW_ONLY
    options: Options = dataclasses.field(default_factory=dict)
    """Further keyword arguments of the factory, such as momentum."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate goes down to 0 until the last step: Optax's cosine_decay_schedule or linear_schedule."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate first rises from 0, linearly."""
    preconditioner: PreconditionerName | None = None
    """Scales every stage of a solver: rk_optax.precondition_by_adagrad and so on, with their defaults."""
    rule: RuleName = "constant"
    """Where the step size comes from: the learning rate (its largest value, with dal and corridor), or a rule that
    finds it."""
    rule_options: Options = dataclasses.field(default_factory=dict)
    """Keyword arguments of the rule, such as estimate of dal."""
    stage_batches: Literal["same", "split"] = "same"
    """With split, each stage of a solver sees its own slice of the batch, so a step costs one gradient in all."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(MethodConfig):
    """One entrant of a comparison."""

    learning_rates: tuple[Rate, Rate] | None = None
    """Lowest and highest learning rate of the log-spaced grid that is searched; None if the method finds its own."""

    def _mistakes(self) -> Iterable[str]:
        if self.learning_rates and self.learning_rates[0] >= self.learning_rates[1]:
            yield f"learning_rates = {self.learning_rates} must have the lowest first"


@dataclasses.dataclass(frozen=True)
class TrainOptimizerConfig(MethodConfig):
    """The optimizer of a single training run."""

    learning_rate: Rate | None = None
    """Step size h; with a schedule, that after the warm-up; None if the method finds its own."""


@dataclasses.dataclass(frozen=True)
class EntrantConfig(MethodConfig):
    """One entrant of a race."""

    trials: tuple[int | float, ...] = ()
    """Values of the tuned argument that are tried; empty where nothing is tuned."""
    tunes: str = "learning_rate"
    """The argument that is tuned."""
    steps: Positive | None = None
    """Steps of a run; None for as many as `seconds` allow."""
    seconds: Rate = 60.0
    """Training seconds after which a run ends."""
    chunk: Positive = 10
    """Steps between two looks at clock and error."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(_Checked):
    """One training run of one optimizer."""

    optimizer: TrainOptimizerConfig
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    steps: Positive | None = None
    """Length of the run in steps. Give either these or epochs."""
    epochs: Positive | None = None
    """Length of the run in passes over the training examples."""
    evaluate_every: Positive | None = None
    """Steps between two evaluations; None is an epoch, or the whole run if that is shorter."""
    checkpoint_every: Positive | None = None
    """Steps between two checkpoints, a multiple of evaluate_every; None writes one at every evaluation."""
    keep_checkpoints: Positive = 3
    """Checkpoints that are kept, the latest ones."""
    metrics: tuple[str, ...] = ("accuracy",)
    """What is measured beside the loss."""
    seed: Seed = 0
    """Seed of the initial parameters, the order of the batches and the dropout masks."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too."""

    def _mistakes(self) -> Iterable[str]:
        return _one_of("steps", self.steps, "epochs", self.epochs, "a run is so many steps or so many epochs long")


@dataclasses.dataclass(frozen=True)
class BudgetConfig(_Checked):
    """What every run may spend, and where it is looked at."""

    gradients: Positive | None = None
    """Gradient evaluations of every run, whatever its solver. Give either these or updates."""
    evaluate_every: Positive = 10
    """Steps between two evaluation points."""
    updates: Positive | None = None
    """Steps of every run, whatever they cost."""
    scored_examples: Positive | None = None
    """Training examples on which the training loss is evaluated, always the same; None takes all."""

    def _mistakes(self) -> Iterable[str]:
        reason = "a budget is in gradients or in updates"
        return _one_of("gradients", self.gradients, "updates", self.updates, reason)


@dataclasses.dataclass(frozen=True)
class TuningConfig(_Checked):
    """The search for each entrant's learning rate, by validation loss late in the run."""

    trials: Annotated[int, Field(ge=2)] = 11
    """Learning rates tried for every entrant."""
    seeds: Seeds = (100, 101, 102)
    """Seeds of the tuning runs; none of them may be a seed of the comparison."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Length of a tuning run, of that of a compared run."""


@dataclasses.dataclass(frozen=True)
class CompareConfig(_Checked):
    """A comparison of optimizers at an equal budget of gradient evaluations or of updates."""

    optimizers: Annotated[Mapping[Name, OptimizerConfig], Field(min_length=1)]
    """The entrants, by the name they are shown under."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    budget: BudgetConfig = BudgetConfig(gradients=2400)
    tuning: TuningConfig = TuningConfig()
    seeds: Seeds = (0, 1, 2)
    """Seeds of the compared runs: initial parameters and order of the batches."""
    timed_runs: Positive = 7
    """Serial timed runs of every entrant, of which the median time is reported."""
    timed_updates: Positive | None = None
    """Length of a timed run, from which the time of a whole one is extrapolated; None times whole runs."""
    vectorized: bool = True
    """Tune and train all runs of an entrant side by side. False makes them take turns in one program: on a CPU that
    is faster with small batches, and needs less memory."""

    def _mistakes(self) -> Iterable[str]:
        if set(self.seeds) & set(self.tuning.seeds):
            yield (
                f"tuning.seeds = {self.tuning.seeds} must not contain a seed of the comparison: a rate that was tuned "
                "on the compared runs has an advantage there"
            )
        timed = f"timed_updates = {self.timed_updates}"
        if self.timed_updates is not None and self.budget.updates is None:
            yield f"{timed} needs a budget in updates: set budget.updates, or leave it None"
        if self.timed_updates is not None and self.model.refine_at:
            yield (
                f"{timed} must be None with model.refine_at: a run that is refined has no steps of equal length to "
                "extrapolate from"
            )


@dataclasses.dataclass(frozen=True)
class RaceConfig(_Checked):
    """A race over several seeds, each entrant tuned on a seed of its own."""

    problem: ProblemName
    """The problem."""
    entrants: Annotated[Mapping[Name, EntrantConfig], Field(min_length=1)]
    """Who runs, by the name they are shown under."""
    problem_options: Mapping[str, float | int | bool] = dataclasses.field(default_factory=dict)
    """Arguments of the problem, such as condition of logistic."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """Seeds of the problem: data and initial parameters."""
    tuning_seed: Seed = 100
    """The seed on which the tuned argument is chosen: by targets reached, then by seconds to the last of them."""
    tuning_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Fraction of a run's seconds that a tuning run gets."""
    x64: bool = False
    """Whether to compute in float64."""
    targets: tuple[Rate, ...] = (1e-1, 1e-2, 1e-3)
    """Errors whose first crossing is reported."""

    def _mistakes(self) -> Iterable[str]:
        if self.tuning_seed in self.seeds:
            yield (
                f"seeds = {self.seeds} must not contain tuning_seed: a value that was tuned on the race's own runs has "
                "an advantage there"
            )


@dataclasses.dataclass(frozen=True)
class FlowConfig(_Checked):
    """Full-batch gradient descent beside its gradient flow and its central flow, all from one start."""

    learning_rate: Rate
    """Rate h of gradient descent, whose n-th iterate is at the time nh; its edge of stability is a sharpness of 2/h."""
    steps: Positive
    """Steps of gradient descent."""
    save_every: Positive = 10
    """Steps of gradient descent between two looks at loss, sharpness and distances."""
    data: DataConfig = DataConfig(batch_size=None)
    """The data set, of which the loss is the mean over training examples."""
    model: ModelConfig = ModelConfig(hidden=(32, 32, 32), l2=0.0, loss="squared_error")
    examples: Positive | None = None
    """Training examples of the loss, the first ones; None takes all."""
    micro_batch: Positive | None = None
    """Examples that are held in memory at once; None for all of the loss."""
    initial_scale: Rate = 1.0
    """Factor of the initial parameters: small ones begin with a small sharpness."""
    eigenvalues: Positive = 3
    """Largest eigenvalues of the Hessian that are saved."""
    edge_eigenvalues: Positive = 4
    """Eigenvalues that the central flow can hold at the edge at once."""
    central_steps: Positive = 4
    """Steps of the central flow for one of gradient descent."""
    rtol: Rate = 1e-4
    """Relative tolerance of a step of the gradient flow."""
    atol: Rate = 1e-6
    """Absolute tolerance of a step of the gradient flow."""
    checkpoint_every: Positive = 200
    """Steps between two checkpoints of a flow, and two looks at Ctrl-C."""
    seed: Seed = 0
    """Seed of the initial parameters."""

    def _mistakes(self) -> Iterable[str]:
        if self.steps % self.save_every:
            yield f"steps = {self.steps} must be a multiple of save_every = {self.save_every}"
        if self.data.batch_size is not None:
            yield (
                f"data.batch_size = {self.data.batch_size} must be None: the flow is that of the loss over all "
                "examples (micro_batch saves memory)"
            )
        if self.model.dropout:
            yield f"model.dropout = {self.model.dropout} must be 0: a flow has no random masks"
