"""The comparison: tune every entrant, train it on every seed, then time it."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rk_optax.experiment.config import CompareConfig
from rk_optax.experiment.runs.loop import Point, Trainer, check_refinement
from rk_optax.experiment.runs.plan import Entrant, Length, make_plan
from rk_optax.experiment.runs.progress import ProgressBar
from rk_optax.experiment.runs.protocol import choose, in_turns, piece, seconds_at
from rk_optax.experiment.store.run_folder import RunFolder
from rk_optax.experiment.tasks.data import Split
from rk_optax.experiment.tasks.supervised import build_task


class Tuned(NamedTuple):
    """The outcome of an entrant's learning-rate search."""

    rate: float | None  # None where the entrant finds its own
    losses: np.ndarray  # (trial,) mean late validation loss; NaN where a run diverged
    at_edge: str | None  # "lowest" or "highest" where the best rate bounds the grid


class Runs(NamedTuple):
    """An entrant's runs at the tuned rate."""

    steps: np.ndarray  # (point,)
    gradients: np.ndarray  # (seed, point) spent so far
    train_loss: np.ndarray  # (seed, point)
    test_accuracy: np.ndarray  # (seed, point)


class Timing(NamedTuple):
    """An entrant's serial timed runs."""

    steps: np.ndarray  # (point,)
    seconds: np.ndarray  # (point,) median over the runs
    totals: np.ndarray  # (run,) seconds of each run
    compile_seconds: float


class Compared(NamedTuple):
    """All that was found out about an entrant."""

    entrant: Entrant
    tuned: Tuned
    runs: Runs
    timing: Timing

    @property
    def seconds(self) -> np.ndarray:
        """Median time at every point of the runs."""
        return seconds_at(self.runs.steps, self.timing.steps, self.timing.seconds)


class Comparison:
    """Tunes, trains and times every optimizer, and shows how they compare.

    Each has equally many trials for its learning rate, and is trained over several seeds at an equal budget of gradient
    evaluations or of updates.
    """

    def __init__(self, config: CompareConfig):
        """Plans the comparison and loads its data."""
        self.config, self.entrants = config, make_plan(config)
        self._task = build_task(config.data, config.model)
        for entrant in self.entrants if config.model.refine_at else ():
            check_refinement(self._task, entrant.optimizer, entrant.whole.steps)
        self._scored = Split(*(part[: config.budget.scored_examples] for part in self._task.dataset.train))

    def run(self, folder: RunFolder, report: ProgressBar) -> list[Compared]:
        """Tunes, trains and times every entrant, logging to the folder as it goes.

        Tuning and training of each entrant, and the timing of all, are pieces that a resumed folder may hold already.
        """
        entrants, config, do = self.entrants, self.config, functools.partial(piece, folder, report)
        self._folder, self._report = folder, report
        tunings = [len(e.rates) * len(config.tuning.seeds) if e.optimizer.takes_rate else 0 for e in entrants]
        tuning = [_work(e, e.tuning) * runs for e, runs in zip(entrants, tunings, strict=True)]
        training = [_work(e, e.whole) * len(config.seeds) for e in entrants]
        timing = sum(_work(e, e.timed) for e in entrants) * config.timed_runs
        report.start(sum(tuning) + sum(training) + timing)
        tuned = [do(Tuned, f"tune-{e.name}", work, self._tune, e) for e, work in zip(entrants, tuning, strict=True)]
        rates = [best.rate for best in tuned]
        each = zip(entrants, training, rates, strict=True)
        runs = [do(Runs, f"compare-{e.name}", work, self._train, e, rate) for e, work, rate in each]
        timings = do(Timing, "time", timing, self._time, rates)
        return [Compared(*parts) for parts in zip(entrants, tuned, runs, timings, strict=True)]

    def _tune(self, entrant: Entrant) -> Tuned:
        """Searches the grid; nothing but the validation split is looked at."""
        if not entrant.optimizer.takes_rate:
            return Tuned(None, np.array([]), None)
        self._report.phase(f"tuning {entrant.name}")
        seeds, rates, length = self.config.tuning.seeds, entrant.rates, entrant.tuning
        trainer = self._trainer(entrant, seeds, rates, length)
        loss, accuracy, looks, before = np.zeros((4, len(seeds), len(rates)))
        done = 0
        whole = min(length.budget, length.steps * (entrant.optimizer.gradients_per_step or np.inf))
        for point, spent in self._points(trainer, entrant, length):
            # A rate at the edge of stability can end well between two spikes, so that the last point alone would
            # choose it. A run that has spent its budget while others go on is not looked at any more.
            late = (spent > whole / 2 if whole < np.inf else 2 * point.steps > length.steps) & (before < whole)
            before, done = spent, point.steps
            if late.any():
                score = trainer.score(point, self._task.dataset.validation)
                loss, accuracy = loss + np.where(late, score.loss, 0), accuracy + np.where(late, score.accuracy, 0)
                looks = looks + late
        loss, accuracy = loss / looks, accuracy / looks
        for row, trial in np.ndindex(loss.shape):
            measured = {"validation_loss": loss[row, trial], "validation_accuracy": accuracy[row, trial]}
            about = "tune", entrant, rates[trial], seeds[row], done, before[row, trial]
            self._log(*about, trial=trial, **measured)
        best, losses = choose(entrant.name, loss.mean(axis=0), f"lower optimizers.{entrant.name}.learning_rates")
        diverged = int(np.isinf(losses).sum())
        self._report.say(
            f"tuned {entrant.name}: learning rate {rates[best]:.3g}, the best of {len(rates)} from {rates[0]:.3g} to "
            f"{rates[-1]:.3g}" + (f" ({diverged} diverged)" if diverged else "")
        )
        return Tuned(rates[best], losses, {0: "lowest", len(rates) - 1: "highest"}.get(best))

    def _train(self, entrant: Entrant, rate: float | None) -> Runs:
        """Trains on every seed at the tuned rate."""
        self._report.phase(f"training {entrant.name}")
        seeds = self.config.seeds
        trainer = self._trainer(entrant, seeds, [rate], entrant.whole)
        columns: list[tuple[Any, ...]] = []
        for point, spent in self._points(trainer, entrant, entrant.whole):
            loss, accuracy = (values[:, 0] for values in self._measure(trainer, point))
            columns.append((point.steps, spent[:, 0], loss, accuracy))
            for row, seed in enumerate(seeds):
                measured = {"train_loss": loss[row], "test_accuracy": accuracy[row]}
                self._log("compare", entrant, rate, seed, point.steps, spent[row, 0], **measured)
        steps, *curves = zip(*columns, strict=True)
        return Runs(np.array(steps), *(np.stack(curve, axis=-1) for curve in curves))

    def _time(self, rates: Sequence[float | None]) -> list[Timing]:
        """Times every entrant, one run at a time and nothing else meanwhile."""
        seed, timed = self.config.seeds[0], []
        for entrant, rate in zip(self.entrants, rates, strict=True):
            self._report.phase(f"compiling {entrant.name}")
            timed.append((entrant, rate, self._trainer(entrant, seed, rate, entrant.timed), []))
        for repeat in range(self.config.timed_runs):
            for entrant, rate, trainer, runs in in_turns(timed, repeat):
                self._report.phase(f"timing {entrant.name}")
                runs.append([])
                for point, spent in self._points(trainer, entrant, entrant.timed):
                    runs[-1].append((point.steps, point.seconds))
                    loss, accuracy = self._measure(trainer, point)
                    measured = {"seconds": point.seconds, "train_loss": loss, "test_accuracy": accuracy}
                    self._log("time", entrant, rate, seed, point.steps, spent, repeat=repeat, **measured)
        timings = []
        for _, _, trainer, runs in timed:
            least = min(map(len, runs))  # rounding may end one of them a point earlier
            steps, seconds = np.moveaxis(np.array([run[:least] for run in runs], float), -1, 0)
            timings.append(Timing(steps[0], np.median(seconds, axis=0), seconds[:, -1], trainer.compile_seconds))
        return timings

    def _measure(self, trainer: Trainer, point: Point) -> tuple[np.ndarray, np.ndarray]:
        """Training loss and test accuracy."""
        return trainer.score(point, self._scored).loss, trainer.score(point, self._task.dataset.test).accuracy

    def _trainer(self, entrant: Entrant, seeds: Any, rates: Any, length: Length) -> Trainer:
        options: dict[str, Any] = {"steps": length.schedule, "refine_at": length.refine_at}
        options["vectorized"] = self.config.vectorized
        return Trainer(self._task, entrant.optimizer, seeds, rates, length.chunk, **options)

    def _points(self, trainer: Trainer, entrant: Entrant, length: Length) -> Iterator[tuple[Point, Any]]:
        """The points of a training, reported as progress, with the gradients spent by each run."""
        done, budget = 0.0, length.budget
        for point in trainer.run(length.steps):
            spent = trainer.spent(point)
            each = np.minimum(spent, budget) if budget < np.inf else _work(entrant, length._replace(steps=point.steps))
            now = float(np.broadcast_to(each, spent.shape).sum())
            self._report.advance(now - done)
            done = now
            yield point, spent
            if np.min(spent) >= budget:
                return

    def _log(
        self, phase: str, entrant: Entrant, rate: Any, seed: int, steps: int, gradients: Any, **measured: Any
    ) -> None:
        piece = phase if phase == "time" else f"{phase}-{entrant.name}"
        about = {"phase": phase, "optimizer": entrant.name, "seed": seed, "learning_rate": rate}
        self._folder.log(piece, **about, steps=steps, gradients=float(gradients), **measured)


def _work(entrant: Entrant, length: Length) -> float:
    """Gradients that a run reports as progress; where the cost of a step varies, in updates, it is not known."""
    return min(length.steps * (entrant.optimizer.gradients_per_step or 1), length.budget)
