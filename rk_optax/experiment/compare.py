"""The comparison: tune every entrant, train it on every seed, then time it."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rk_optax.experiment.config import CompareConfig
from rk_optax.experiment.data import Split, load_dataset
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.models import build_model
from rk_optax.experiment.plan import Entrant, make_plan
from rk_optax.experiment.progress import Reporter
from rk_optax.experiment.run_folder import RunFolder
from rk_optax.experiment.training import Point, Score, Task, Trainer


class Tuned(NamedTuple):
    """The outcome of an entrant's learning-rate search."""

    rate: float
    losses: np.ndarray  # (trial,) mean late validation loss; inf where a run diverged
    at_edge: str | None  # "lowest" or "highest" where the best rate bounds the grid

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Tuned":
        """What was written, null being a diverged run."""
        return cls(kept["rate"], np.nan_to_num(np.array(kept["losses"], float), nan=np.inf), kept["at_edge"])


class Curve(NamedTuple):
    """An entrant's runs at the tuned rate."""

    steps: np.ndarray  # (point,)
    train_loss: np.ndarray  # (seed, point)
    test_accuracy: np.ndarray  # (seed, point)

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Curve":
        """What was written, null being NaN."""
        train_loss, test_accuracy = (np.array(kept[field], float) for field in ("train_loss", "test_accuracy"))
        return cls(np.array(kept["steps"]), train_loss, test_accuracy)


class Timing(NamedTuple):
    """An entrant's serial timed runs."""

    steps: np.ndarray  # (point,)
    seconds: np.ndarray  # (point,) median over the runs
    totals: np.ndarray  # (run,) seconds of each run
    compile_seconds: float

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Timing":
        """What was written."""
        steps, seconds, totals = (np.array(kept[field]) for field in ("steps", "seconds", "totals"))
        return cls(steps, seconds, totals, kept["compile_seconds"])


class Result(NamedTuple):
    """All that was found out about an entrant."""

    entrant: Entrant
    tuned: Tuned
    curve: Curve
    timing: Timing

    @property
    def gradients(self) -> np.ndarray:
        """Gradient evaluations spent at every point of the curve."""
        return self.curve.steps * self.entrant.gradients_per_step

    @property
    def seconds(self) -> np.ndarray:
        """Median time at every point of the curve, linear between the points that were timed and beyond them."""
        timed, seconds = self.timing.steps, self.timing.seconds
        # A constant time per step where the timed runs were shorter than the compared ones.
        beyond = np.maximum(self.curve.steps / timed[-1], 1)
        return np.interp(self.curve.steps, timed, seconds) * beyond


class Comparison:
    """A comparison whose configuration is known to be possible, ready to run."""

    def __init__(self, config: CompareConfig):
        """Plans the comparison and loads its data.

        Raises:
            UsageError: if the configuration asks for something impossible.
        """
        self.entrants = make_plan(config)
        data = load_dataset(config.data)
        model = build_model(config.model, data.classes)
        self._task = Task(model, data, config.data.batch_size, config.model.l2)
        self._scored = Split(*(part[: config.budget.scored_examples] for part in self._task.data.train))
        self._config = config

    def run(self, folder: RunFolder, report: Reporter) -> list[Result]:
        """Tunes, trains and times every entrant, logging to the folder as it goes.

        Tuning and training of each entrant, and the timing of all, are pieces that a resumed folder may hold already.

        Args:
            folder: where metrics and finished pieces go.
            report: hears about progress.

        Returns:
            One result per entrant, in the order of the configuration.

        Raises:
            UsageError: if an entrant diverges at every learning rate.
        """
        entrants = self.entrants
        self._folder, self._report = folder, report
        report.start(
            sum(map(self._tuning_work, entrants)) + sum(map(self._training_work, entrants)) + self._timing_work
        )
        tuned = []
        for entrant in entrants:
            tune = functools.partial(self._tune, entrant)
            tuned.append(Tuned.from_json(self._piece(f"tune-{entrant.name}", self._tuning_work(entrant), tune)))
        curves, rates = [], [best.rate for best in tuned]
        for entrant, rate in zip(entrants, rates, strict=True):
            train = functools.partial(self._train, entrant, rate)
            curves.append(Curve.from_json(self._piece(f"compare-{entrant.name}", self._training_work(entrant), train)))
        timings = map(Timing.from_json, self._piece("time", self._timing_work, lambda: self._time(rates)))
        return [Result(*parts) for parts in zip(entrants, tuned, curves, timings, strict=True)]

    def _piece(self, name: str, work: int, do: Callable[[], Any]) -> Any:
        """The result of a piece as JSON has it, so that a resumed run goes on with the same values as another."""
        if self._folder.finished(name) is None:
            self._folder.finish(name, do())
        else:
            self._report.advance(work)
        return self._folder.finished(name)

    def _tuning_work(self, entrant: Entrant) -> int:
        return entrant.gradients_per_step * entrant.tuning_steps * len(entrant.rates) * len(self._config.tuning.seeds)

    def _training_work(self, entrant: Entrant) -> int:
        return entrant.gradients_per_step * entrant.steps * len(self._config.seeds)

    @property
    def _timing_work(self) -> int:
        runs = self._config.timed_runs
        return sum(entrant.gradients_per_step * entrant.timed_steps * runs for entrant in self.entrants)

    def _tune(self, entrant: Entrant) -> dict[str, Any]:
        """Searches the grid; nothing but the validation split is looked at."""
        self._report.stage(f"tuning {entrant.name}")
        seeds, rates, trials = self._config.tuning.seeds, entrant.rates, len(entrant.rates)
        trainer = self._grid(entrant, seeds, rates)
        late, steps = [], entrant.tuning_steps
        for point in self._run(trainer, entrant, steps, len(seeds) * trials):
            # A rate at the edge of stability can end well between two spikes, so that the last
            # point alone would choose it.
            if point.steps > steps / 2:
                late.append(trainer.score(point, self._task.data.validation))
        score = Score(*np.mean(late, axis=0))
        for (row, trial), loss in np.ndenumerate(score.loss):
            self._log(
                "tune",
                entrant,
                rates[trial],
                seeds[row],
                steps,
                trial=trial,
                validation_loss=loss,
                validation_accuracy=score.accuracy[row, trial],
            )
        losses = score.loss.mean(axis=0)
        losses = np.where(np.isfinite(losses), losses, np.inf)
        best, diverged = int(losses.argmin()), int(np.isinf(losses).sum())
        if diverged == trials:
            raise UsageError(
                f"{entrant.name} diverged at every one of its {trials} learning rates: lower "
                f"optimizers.{entrant.name}.learning_rates"
            )
        self._report.say(
            f"tuned {entrant.name}: learning rate {rates[best]:.3g}, the best of {trials} "
            f"from {rates[0]:.3g} to {rates[-1]:.3g}" + (f" ({diverged} diverged)" if diverged else "")
        )
        at_edge = {0: "lowest", trials - 1: "highest"}.get(best)
        return Tuned(rates[best], losses, at_edge)._asdict()

    def _train(self, entrant: Entrant, rate: float) -> dict[str, Any]:
        """Trains on every seed at the tuned rate."""
        self._report.stage(f"training {entrant.name}")
        seeds, data = self._config.seeds, self._task.data
        trainer = self._grid(entrant, seeds, [rate])
        steps, losses, accuracies = [], [], []
        for point in self._run(trainer, entrant, entrant.steps, len(seeds)):
            steps.append(point.steps)
            losses.append(trainer.score(point, self._scored).loss[:, 0])
            accuracies.append(trainer.score(point, data.test).accuracy[:, 0])
            for seed, loss, accuracy in zip(seeds, losses[-1], accuracies[-1], strict=True):
                self._log("compare", entrant, rate, seed, point.steps, train_loss=loss, test_accuracy=accuracy)
        return Curve(np.array(steps), np.stack(losses, axis=-1), np.stack(accuracies, axis=-1))._asdict()

    def _time(self, rates: list[float]) -> list[dict[str, Any]]:
        """Times serial runs of every entrant, each at its tuned rate."""
        entrants, seed, data = self.entrants, self._config.seeds[0], self._task.data
        trainers = []
        for entrant, rate in zip(entrants, rates, strict=True):
            self._report.stage(f"compiling {entrant.name}")
            trainers.append(Trainer(self._task, entrant.optimizer, seed, rate, entrant.timed_chunk))
        timed = list(zip(entrants, rates, trainers, strict=True))
        seconds: dict[str, list[list[float]]] = {entrant.name: [] for entrant in entrants}
        for repeat in range(self._config.timed_runs):
            # In turns, forth and back, so that a slow spell of the machine hits all alike.
            for entrant, rate, trainer in timed if repeat % 2 == 0 else reversed(timed):
                self._report.stage(f"timing {entrant.name}")
                seconds[entrant.name].append([])
                for point in self._run(trainer, entrant, entrant.timed_steps, 1):
                    seconds[entrant.name][-1].append(point.seconds)
                    self._log(
                        "time",
                        entrant,
                        rate,
                        seed,
                        point.steps,
                        repeat=repeat,
                        seconds=point.seconds,
                        train_loss=trainer.score(point, self._scored).loss,
                        test_accuracy=trainer.score(point, data.test).accuracy,
                    )
        timings = []
        for entrant, _, trainer in timed:
            runs = np.array(seconds[entrant.name])
            steps = np.linspace(0, entrant.timed_steps, runs.shape[1])
            timing = Timing(steps, np.median(runs, axis=0), runs[:, -1], trainer.compile_seconds)
            timings.append(timing._asdict())
        return timings

    def _grid(self, entrant: Entrant, seeds: tuple[int, ...], rates: Sequence[float]) -> Trainer:
        every, vectorized = self._config.budget.evaluate_every, self._config.vectorized
        return Trainer(self._task, entrant.optimizer, seeds, rates, every, vectorized=vectorized)

    def _run(self, trainer: Trainer, entrant: Entrant, steps: int, runs: int) -> Iterator[Point]:
        """The points of a training, reported as progress."""
        done = 0
        for point in trainer.run(steps):
            self._report.advance((point.steps - done) * entrant.gradients_per_step * runs)
            done = point.steps
            yield point

    def _log(self, phase: str, entrant: Entrant, rate: float, seed: int, steps: int, **measured: Any) -> None:
        self._folder.log(
            phase if phase == "time" else f"{phase}-{entrant.name}",
            phase=phase,
            optimizer=entrant.name,
            seed=seed,
            learning_rate=rate,
            steps=steps,
            gradients=steps * entrant.gradients_per_step,
            **measured,
        )
