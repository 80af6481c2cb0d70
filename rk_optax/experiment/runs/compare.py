"""The comparison: tune every entrant, train it on every seed, then time it."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from rk_optax.experiment.config import CompareConfig
from rk_optax.experiment.runs.loop import Point, Trainer
from rk_optax.experiment.runs.plan import Entrant, make_plan
from rk_optax.experiment.runs.protocol import Reporter, choose, in_turns, piece, seconds_at
from rk_optax.experiment.store.run_folder import RunFolder
from rk_optax.experiment.tasks.data import Split
from rk_optax.experiment.tasks.supervised import build_task


class Tuned(NamedTuple):
    """The outcome of an entrant's learning-rate search."""

    rate: float | None  # None where the entrant finds its own
    losses: np.ndarray  # (trial,) mean late validation loss; inf where a run diverged
    at_edge: str | None  # "lowest" or "highest" where the best rate bounds the grid

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Tuned":
        """What was written, null being a diverged run."""
        return cls(kept["rate"], np.nan_to_num(np.array(kept["losses"], float), nan=np.inf), kept["at_edge"])


class Runs(NamedTuple):
    """An entrant's runs at the tuned rate."""

    steps: np.ndarray  # (point,)
    gradients: np.ndarray  # (seed, point) spent so far
    train_loss: np.ndarray  # (seed, point)
    test_accuracy: np.ndarray  # (seed, point)

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Runs":
        """What was written, null being NaN."""
        return cls(np.array(kept["steps"]), *(np.array(kept[field], float) for field in cls._fields[1:]))


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
    """A comparison whose configuration is known to be possible, ready to run."""

    def __init__(self, config: CompareConfig):
        """Plans the comparison and loads its data.

        Raises:
            UsageError: if the configuration asks for something impossible.
        """
        self.entrants = make_plan(config)
        self._task = build_task(config.data, config.model)
        self._scored = Split(*(part[: config.budget.scored_examples] for part in self._task.dataset.train))
        self._config = config

    def run(self, folder: RunFolder, report: Reporter) -> list[Compared]:
        """Tunes, trains and times every entrant, logging to the folder as it goes.

        Tuning and training of each entrant, and the timing of all, are pieces that a resumed folder may hold already.

        Args:
            folder: where metrics and finished pieces go.
            report: hears about progress.

        Returns:
            What was found out about each entrant, in the order of the configuration.

        Raises:
            UsageError: if an entrant diverges at every learning rate.
        """
        entrants = self.entrants
        self._folder, self._report = folder, report
        do = functools.partial(piece, folder, report)
        report.start(sum(map(self._tuning_work, entrants)) + sum(map(self._training_work, entrants)) + self._timing_work)
        tuned = []
        for entrant in entrants:
            tune = functools.partial(self._tune, entrant)
            tuned.append(Tuned.from_json(do(f"tune-{entrant.name}", self._tuning_work(entrant), tune)))
        runs, rates = [], [best.rate for best in tuned]
        for entrant, rate in zip(entrants, rates, strict=True):
            train = functools.partial(self._train, entrant, rate)
            runs.append(Runs.from_json(do(f"compare-{entrant.name}", self._training_work(entrant), train)))
        timings = map(Timing.from_json, do("time", self._timing_work, lambda: self._time(rates)))
        return [Compared(*parts) for parts in zip(entrants, tuned, runs, timings, strict=True)]

    def _tuning_work(self, entrant: Entrant) -> float:
        trials = len(entrant.rates) if entrant.optimizer.takes_rate else 0
        return _work(entrant, entrant.tuning_steps, entrant.tuning_budget) * trials * len(self._config.tuning.seeds)

    def _training_work(self, entrant: Entrant) -> float:
        return _work(entrant, entrant.steps, entrant.budget) * len(self._config.seeds)

    @property
    def _timing_work(self) -> float:
        return sum(_work(e, e.timed_steps, e.budget) * self._config.timed_runs for e in self.entrants)

    def _tune(self, entrant: Entrant) -> dict[str, Any]:
        """Searches the grid; nothing but the validation split is looked at."""
        if not entrant.optimizer.takes_rate:
            return Tuned(None, np.array([]), None)._asdict()
        self._report.phase(f"tuning {entrant.name}")
        seeds, rates = self._config.tuning.seeds, entrant.rates
        trainer = self._grid(entrant, seeds, rates, entrant.tuning_steps)
        totals, counts, before = {"loss": 0.0, "accuracy": 0.0}, 0.0, np.zeros(())
        whole = min(entrant.tuning_budget, entrant.tuning_steps * (entrant.optimizer.gradients_per_step or np.inf))
        for point, spent in self._points(trainer, entrant, entrant.tuning_steps, entrant.tuning_budget):
            # A rate at the edge of stability can end well between two spikes, so that the last point alone would
            # choose it. A run that has spent its budget while others go on is not looked at any more.
            late = spent > whole / 2 if np.isfinite(whole) else np.full(spent.shape, 2 * point.steps > entrant.tuning_steps)
            late = late & (before < whole)
            before = spent
            if late.any():
                score = trainer.score(point, self._task.dataset.validation)
                for name, values in (("loss", score.loss), ("accuracy", score.accuracy)):
                    totals[name] = totals[name] + np.where(late, values, 0)
                counts = counts + late
        loss, accuracy = totals["loss"] / counts, totals["accuracy"] / counts
        for (row, trial), validation_loss in np.ndenumerate(loss):
            self._log(
                "tune",
                entrant,
                rates[trial],
                seeds[row],
                point.steps,
                float(before[row, trial]),
                trial=trial,
                validation_loss=validation_loss,
                validation_accuracy=accuracy[row, trial],
            )
        remedy = f"lower optimizers.{entrant.name}.learning_rates"
        best = choose(entrant.name, loss.mean(axis=0), remedy)
        self._report.say(
            f"tuned {entrant.name}: learning rate {rates[best.index]:.3g}, the best of {len(rates)} "
            f"from {rates[0]:.3g} to {rates[-1]:.3g}" + (f" ({best.diverged} diverged)" if best.diverged else "")
        )
        return Tuned(rates[best.index], best.losses, best.at_edge)._asdict()

    def _train(self, entrant: Entrant, rate: float | None) -> dict[str, Any]:
        """Trains on every seed at the tuned rate."""
        self._report.phase(f"training {entrant.name}")
        seeds = self._config.seeds
        trainer = self._grid(entrant, seeds, [rate], entrant.steps)
        columns: list[tuple[Any, ...]] = []
        for point, spent in self._points(trainer, entrant, entrant.steps, entrant.budget):
            loss = trainer.score(point, self._scored).loss[:, 0]
            accuracy = trainer.score(point, self._task.dataset.test).accuracy[:, 0]
            columns.append((point.steps, spent[:, 0], loss, accuracy))
            for row, seed in enumerate(seeds):
                measured = {"train_loss": loss[row], "test_accuracy": accuracy[row]}
                self._log("compare", entrant, rate, seed, point.steps, float(spent[row, 0]), **measured)
        steps, *curves = zip(*columns, strict=True)
        return Runs(np.array(steps), *(np.stack(curve, axis=-1) for curve in curves))._asdict()

    def _time(self, rates: Sequence[float | None]) -> list[dict[str, Any]]:
        """Times every entrant, one run at a time and nothing else meanwhile."""
        seed = self._config.seeds[0]
        trainers = []
        for entrant, rate in zip(self.entrants, rates, strict=True):
            self._report.phase(f"compiling {entrant.name}")
            trainers.append(
                Trainer(self._task, entrant.optimizer, seed, rate, entrant.timed_chunk, steps=entrant.steps)
            )
        timed = list(zip(self.entrants, rates, trainers, strict=True))
        seconds: dict[str, list[list[float]]] = {entrant.name: [] for entrant in self.entrants}
        steps: dict[str, list[int]] = {}
        for repeat in range(self._config.timed_runs):
            for entrant, rate, trainer in in_turns(timed, repeat):
                self._report.phase(f"timing {entrant.name}")
                points = []
                for point, spent in self._points(trainer, entrant, entrant.timed_steps, entrant.budget):
                    points.append((point.steps, point.seconds))
                    self._log(
                        "time",
                        entrant,
                        rate,
                        seed,
                        point.steps,
                        float(spent),
                        repeat=repeat,
                        seconds=point.seconds,
                        train_loss=trainer.score(point, self._scored).loss,
                        test_accuracy=trainer.score(point, self._task.dataset.test).accuracy,
                    )
                steps[entrant.name] = [step for step, _ in points]
                seconds[entrant.name].append([second for _, second in points])
        timings = []
        for entrant, _, trainer in timed:
            runs = np.array(seconds[entrant.name])
            median = np.median(runs, axis=0)
            timing = Timing(np.array(steps[entrant.name]), median, runs[:, -1], trainer.compile_seconds)
            timings.append(timing._asdict())
        return timings

    def _grid(self, entrant: Entrant, seeds: tuple[int, ...], rates: Sequence[float | None], steps: int) -> Trainer:
        every, vectorized = self._config.budget.evaluate_every, self._config.vectorized
        return Trainer(self._task, entrant.optimizer, seeds, rates, every, steps=steps, vectorized=vectorized)

    def _points(
        self, trainer: Trainer, entrant: Entrant, steps: int, budget: float
    ) -> Iterator[tuple[Point, np.ndarray]]:
        """The points of a training, reported as progress, with the gradients spent by each run."""
        done = 0.0
        for point in trainer.run(steps):
            spent = trainer.spent(point)
            each = np.minimum(spent, budget) if budget < np.inf else np.full_like(spent, _work(entrant, point.steps, budget))
            self._report.advance(float(each.sum()) - done)
            done = float(each.sum())
            yield point, spent
            if np.min(spent) >= budget:
                return

    def _log(
        self, phase: str, entrant: Entrant, rate: Any, seed: int, steps: int, gradients: float, **measured: Any
    ) -> None:
        self._folder.log(
            phase if phase == "time" else f"{phase}-{entrant.name}",
            phase=phase,
            optimizer=entrant.name,
            seed=seed,
            learning_rate=rate,
            steps=steps,
            gradients=gradients,
            **measured,
        )


def _work(entrant: Entrant, steps: int, budget: float) -> float:
    """Gradients that a run reports as progress; where the cost of a step varies, in updates, it is not known."""
    return min(steps * (entrant.optimizer.gradients_per_step or 1), budget)
