"""One training run: evaluated, logged and checkpointed as it goes, and resumed from where it was."""

import contextlib
import math
from typing import Any

import jax
import numpy as np
import optax

from rk_optax.experiment.checkpoint import Checkpoints
from rk_optax.experiment.config import TrainConfig, check_train
from rk_optax.experiment.data import load_dataset
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.models import build_model
from rk_optax.experiment.optimizers import LossFn, Make, build_optimizer
from rk_optax.experiment.plan import check_slices
from rk_optax.experiment.progress import Reporter
from rk_optax.experiment.train_folder import TrainFolder
from rk_optax.experiment.training import Point, Task, Trainer

# Steps between two looks at Ctrl-C and at the progress bar.
_LONGEST_CHUNK = 50


class Training:
    """A training run whose configuration is known to be possible, ready to run."""

    def __init__(self, config: TrainConfig):
        """Checks the configuration, loads the data and plans the run.

        Raises:
            UsageError: if the configuration asks for something impossible.
        """
        check_train(config)
        self._config = config
        self._summary_writer = _summary_writer() if config.tensorboard else None
        optimizer = build_optimizer("optimizer", config.optimizer.entrant())
        check_slices("optimizer", config.optimizer.entrant(), config.data.batch_size)
        data = load_dataset(config.data)
        self._task = Task(build_model(config.model, data.classes), data, config.data.batch_size, config.model.l2)
        examples = len(data.train.labels)
        batch = config.data.batch_size or examples
        self._per_epoch = examples // batch
        self.steps, self._evaluate_every, self._checkpoint_every = _plan(config, self._per_epoch)
        self._optimizer = optimizer._replace(make=_scheduled(optimizer.make, config, self.steps))
        # All devices there are, as far as they can share a batch.
        devices = jax.devices()[: math.gcd(batch, jax.device_count())]
        self._mesh = jax.sharding.Mesh(np.array(devices), ("batch",)) if len(devices) > 1 else None

    def run(self, folder: TrainFolder, report: Reporter) -> dict[str, Any]:
        """Trains from the latest checkpoint in the folder, or else from the start.

        Args:
            folder: where metrics and checkpoints go; what it holds beyond the checkpoint is dropped.
            report: hears about progress.

        Returns:
            The last line of the metrics.

        Raises:
            UsageError: if a checkpoint or the metrics are damaged.
        """
        config = self._config
        report.start(self.steps)
        if self._mesh is not None:
            report.say(f"{self._mesh.size} devices share each batch")
        report.stage("compiling")
        chunk = _largest_divisor(self._evaluate_every, _LONGEST_CHUNK)
        rate = config.optimizer.learning_rate
        trainer = Trainer(self._task, self._optimizer, config.seed, rate, chunk, mesh=self._mesh)
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(Checkpoints(folder.path / "checkpoints", config.keep_checkpoints))
            start = checkpoints.restore(trainer)
            record = folder.rewind(None if start is None else start.steps)
            board = None
            if self._summary_writer is not None:
                after = None if start is None else start.steps + 1  # what was written beyond is dropped
                board = stack.enter_context(self._summary_writer(str(folder.path / "tensorboard"), purge_step=after))
            if start is not None:
                report.advance(start.steps)
            losses: list[float] = []
            for point in trainer.run(self.steps, start):
                if start is not None and point.steps == start.steps:
                    continue
                if point.steps:
                    losses.append(float(point.loss))
                    report.stage(f"loss {losses[-1]:.4g}")
                    report.advance(chunk)
                if point.steps % self._evaluate_every == 0:
                    record = self._evaluate(trainer, point, losses)
                    losses = []
                    folder.log("train", **record)
                    if board is not None:
                        _write(board, record)
                    # After its metrics: those beyond a checkpoint are dropped, those before it could not be had again.
                    if point.steps and (point.steps % self._checkpoint_every == 0 or point.steps == self.steps):
                        checkpoints.save(point)
        assert record is not None
        return record

    def _evaluate(self, trainer: Trainer, point: Point, losses: list[float]) -> dict[str, Any]:
        validation, test = (trainer.score(point, split) for split in (self._task.data.validation, self._task.data.test))
        return {
            "steps": point.steps,
            "epochs": point.steps / self._per_epoch,
            "gradients": point.steps * self._optimizer.gradients_per_step,
            "seconds": point.seconds,
            # Over the mini-batches since the last line, as they were trained on.
            "train_loss": math.fsum(losses) / len(losses) if losses else None,
            "validation_loss": float(validation.loss),
            "validation_accuracy": float(validation.accuracy),
            "test_loss": float(test.loss),
            "test_accuracy": float(test.accuracy),
        }


def _plan(config: TrainConfig, per_epoch: int) -> tuple[int, int, int]:
    """Steps in all, between two evaluations, and between two checkpoints."""
    steps = config.steps if config.steps is not None else (config.epochs or 0) * per_epoch
    evaluate_every = config.evaluate_every or min(per_epoch, steps)
    checkpoint_every = config.checkpoint_every or evaluate_every
    if steps % evaluate_every:
        length = (
            f"steps = {steps}" if config.steps is not None else f"epochs = {config.epochs}, which are {steps} steps,"
        )
        raise UsageError(
            f"{length} must be a multiple of evaluate_every = {evaluate_every}: take steps = "
            f"{max(1, round(steps / evaluate_every)) * evaluate_every}, or evaluate_every = "
            f"{_largest_divisor(steps, evaluate_every)}"
        )
    if checkpoint_every % evaluate_every:
        raise UsageError(
            f"checkpoint_every = {checkpoint_every} must be a multiple of evaluate_every = {evaluate_every}: take "
            f"{max(1, round(checkpoint_every / evaluate_every)) * evaluate_every}"
        )
    return steps, evaluate_every, checkpoint_every


def _scheduled(make: Make, config: TrainConfig, steps: int) -> Make:
    """The optimizer with its learning rate multiplied by a schedule that starts from 1 after the warm-up."""
    warmup, kind = config.optimizer.warmup_steps, config.optimizer.schedule
    if kind == "constant" and not warmup:
        return make
    if warmup >= steps:
        raise UsageError(f"optimizer.warmup_steps = {warmup} must be less than the {steps} steps of the run")
    schedules = {
        "constant": lambda: optax.constant_schedule(1.0),
        "cosine": lambda: optax.cosine_decay_schedule(1.0, steps - warmup),
        "linear": lambda: optax.linear_schedule(1.0, 0.0, steps - warmup),
    }
    warm = optax.linear_schedule(0.0, 1.0, warmup)
    factor = optax.join_schedules([warm, schedules[kind]()], [warmup])

    def scheduled(loss_fn: LossFn, learning_rate: float | jax.Array) -> optax.GradientTransformationExtraArgs:
        rate: Any = lambda count: learning_rate * factor(count)  # noqa: E731
        return make(loss_fn, rate)

    return scheduled


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _summary_writer() -> Any:
    """The class that writes for TensorBoard."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UsageError(
            "tensorboard = True needs tensorboardX, which is not installed: pip install 'rk-optax[tensorboard]'"
        ) from error
    return SummaryWriter


def _write(board: Any, record: dict[str, Any]) -> None:
    for name, value in record.items():
        if value is not None and name != "steps":
            board.add_scalar(name, value, record["steps"])
    board.flush()
