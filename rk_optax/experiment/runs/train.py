"""One training run: evaluated, logged and checkpointed as it goes, and resumed from where it was."""

import contextlib
import math
from typing import Any

import jax
import numpy as np

from rk_optax.experiment.config import TrainConfig, checked
from rk_optax.experiment.entrants import build_optimizer, check_slices
from rk_optax.experiment.errors import optional, require
from rk_optax.experiment.runs.loop import Point, Trainer, check_refinement, refinements
from rk_optax.experiment.runs.progress import ProgressBar
from rk_optax.experiment.runs.protocol import nearest_multiple
from rk_optax.experiment.store.checkpoints import Checkpoints
from rk_optax.experiment.store.run_folder import TrainFolder
from rk_optax.experiment.tasks.supervised import Supervised, build_task, probe_loss

# Steps between two looks at Ctrl-C and at the progress bar.
_LONGEST_CHUNK = 50


class Training:
    """Trains a network with one optimizer, writing metrics and checkpoints as it goes."""

    def __init__(self, config: TrainConfig):
        """Checks the configuration, loads the data and plans the run."""
        self.config = checked(config)
        self._summary_writer = _summary_writer() if config.tensorboard else None
        probe, rate = probe_loss(config.model), config.optimizer.learning_rate
        options: dict[str, Any] = {"has_rate": rate is not None, "sliced": Supervised.sliced}
        self.optimizer = build_optimizer("optimizer", config.optimizer, probe, **options)
        check_slices("optimizer", config.optimizer, config.data.batch_size)
        self.task = build_task(config.data, config.model, config.metrics)
        batch = config.data.batch_size or self.task.examples
        self._per_epoch = self.task.examples // batch
        self.steps, self._evaluate_every, self._checkpoint_every = _plan(config, self._per_epoch)
        self._refine_at = refinements(config.model.refine_at, self.steps, self._evaluate_every)
        self.optimizer.make(probe, rate, self.steps)  # does its schedule fit?
        if self._refine_at:
            check_refinement(self.task, self.optimizer, self.steps)
        # All devices there are, as far as they can share a batch.
        devices = jax.devices()[: math.gcd(batch, jax.device_count())]
        self._mesh = jax.sharding.Mesh(np.array(devices), ("batch",)) if len(devices) > 1 else None

    def trainer(self) -> Trainer:
        """The compiled run."""
        chunk = _largest_divisor(self._evaluate_every, _LONGEST_CHUNK)
        rate, seed = self.config.optimizer.learning_rate, self.config.seed
        at = self._refine_at
        return Trainer(self.task, self.optimizer, seed, rate, chunk, steps=self.steps, mesh=self._mesh, refine_at=at)

    def run(self, folder: TrainFolder, report: ProgressBar) -> dict[str, Any]:
        """Trains from the latest checkpoint in the folder, or else from the start."""
        report.start(self.steps)
        if self._mesh is not None:
            report.say(f"{self._mesh.size} devices share each batch")
        report.phase("compiling")
        trainer = self.trainer()
        with contextlib.ExitStack() as stack:
            keep = self.config.keep_checkpoints
            checkpoints = stack.enter_context(Checkpoints(folder.path / "checkpoints", keep))
            start, done, losses, board = None, 0, [], None
            restored = checkpoints.restore(trainer.layout)
            if restored is not None:
                done, seconds, leaves = restored
                start = Point(done, seconds, trainer.restored(leaves))
            record = folder.rewind(None if start is None else done)
            if self._summary_writer is not None:
                after = None if start is None else done + 1  # what was written beyond is dropped
                board = stack.enter_context(self._summary_writer(str(folder.path / "tensorboard"), purge_step=after))
            report.advance(done)
            for point in trainer.run(self.steps, start):
                if start is not None and point.steps == start.steps:
                    continue
                if point.steps:
                    losses.append(float(point.loss))
                    report.phase(f"loss {losses[-1]:.4g}")
                    report.advance(point.steps - done)
                    done = point.steps
                if point.steps % self._evaluate_every == 0:
                    record = self._evaluate(trainer, point, losses)
                    losses = []
                    folder.log("train", **record)
                    if board is not None:
                        _write(board, record)
                    # After its metrics: those beyond a checkpoint are dropped, those before it could not be had again.
                    if point.steps and (point.steps % self._checkpoint_every == 0 or point.steps == self.steps):
                        checkpoints.save(point.steps, point.seconds, point.state)
        assert record is not None
        return record

    def _evaluate(self, trainer: Trainer, point: Point, losses: list[float]) -> dict[str, Any]:
        record = {
            "steps": point.steps,
            "epochs": point.steps / self._per_epoch,
            "gradients": float(trainer.spent(point)),
            "seconds": point.seconds,
            # Over the mini-batches since the last line, as they were trained on.
            "train_loss": math.fsum(losses) / len(losses) if losses else None,
        }
        for name in ("validation", "test"):
            score = trainer.score(point, getattr(self.task.dataset, name))
            record |= {f"{name}_{key}": float(value) for key, value in {"loss": score.loss, **score.metrics}.items()}
        return record


def _plan(config: TrainConfig, per_epoch: int) -> tuple[int, int, int]:
    """Steps in all, between two evaluations, and between two checkpoints."""
    steps = config.steps if config.steps is not None else (config.epochs or 0) * per_epoch
    evaluate_every = config.evaluate_every or min(per_epoch, steps)
    checkpoint_every = config.checkpoint_every or evaluate_every
    length = f"steps = {steps}" if config.steps is not None else f"epochs = {config.epochs}, which are {steps} steps,"
    require(
        steps % evaluate_every == 0,
        f"{length} must be a multiple of evaluate_every = {evaluate_every}: take steps = "
        f"{nearest_multiple(steps, evaluate_every)}, or evaluate_every = {_largest_divisor(steps, evaluate_every)}",
    )
    require(
        checkpoint_every % evaluate_every == 0,
        f"checkpoint_every = {checkpoint_every} must be a multiple of evaluate_every = {evaluate_every}: take "
        f"{nearest_multiple(checkpoint_every, evaluate_every)}",
    )
    return steps, evaluate_every, checkpoint_every


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _summary_writer() -> Any:
    """The class that writes for TensorBoard."""
    extra = "'rk-optax[tensorboard]'"
    return optional("tensorboardX", "tensorboard = True needs tensorboardX", extra).SummaryWriter


def _write(board: Any, record: dict[str, Any]) -> None:
    for name, value in record.items():
        if value is not None and name != "steps":
            board.add_scalar(name, value, record["steps"])
    board.flush()
