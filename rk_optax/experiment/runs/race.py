"""A race: solvers and optimizers on a full-batch problem, by error against seconds, gradients and V.

V is one `value_and_grad`, timed beside every run; a run's cost in V is its seconds over that, so that Cholesky
factorisations, products and line searches count for what they take.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax.experiment.config import EntrantConfig, RaceConfig, checked
from rk_optax.experiment.entrants import Optimizer, build_optimizer
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.runs.loop import Point, Trainer
from rk_optax.experiment.runs.protocol import Reporter, choose, in_turns, piece, restored
from rk_optax.experiment.store.run_folder import RunFolder
from rk_optax.experiment.tasks.full_batch import FullBatch
from rk_optax.experiment.tasks.problems import PROBLEMS
from rk_optax.experiment.tasks.task import Params


class RaceRun(NamedTuple):
    """A run, point by point; every field but the last an array (point,)."""

    steps: np.ndarray
    seconds: np.ndarray  # in steps alone: no compilation, no evaluation
    gradients: np.ndarray
    losses: np.ndarray
    products: np.ndarray
    rows: np.ndarray
    loss: np.ndarray
    error: np.ndarray
    v_seconds: float  # of one value_and_grad, beside this run

    def first_below(self, target: float) -> int | None:
        """The first point whose error is at most the target."""
        below = np.flatnonzero(self.error <= target)
        return int(below[0]) if len(below) else None

    def shortfall(self, targets: Sequence[float]) -> float:
        """How far the run is from doing well by the targets: less is better, NaN where it diverged.

        Of two runs the one that reaches more targets is better; then the one that reaches its last one sooner; where no
        target is reached, the one of lower loss.
        """
        if not np.isfinite(self.loss[-1]):
            return np.nan
        reached = [i for i in map(self.first_below, targets) if i is not None]
        if not reached:
            return len(targets) + 1 + float(self.loss[-1] / (1 + abs(self.loss[-1])))
        seconds = float(self.seconds[max(reached)])
        return len(targets) - len(reached) + seconds / (1 + seconds)


class Raced(NamedTuple):
    """An entrant's runs."""

    name: str
    value: float | None  # of the tuned argument
    runs: list[RaceRun]


class Race:
    """A race whose configuration is known to be possible."""

    def __init__(self, config: RaceConfig):
        """Builds every entrant once.

        Raises:
            UsageError: if the configuration asks for something impossible.
        """
        self.config = checked(config)
        try:
            problem = self._problem(config.tuning_seed)
        except TypeError as error:
            raise UsageError(f"problem_options = {dict(config.problem_options)!r}: {error}") from error
        for name, entrant in config.entrants.items():
            value = entrant.trials[0] if entrant.trials else None
            optimizer, rate = _build(name, entrant, problem, value)
            optimizer.make(problem.loss_fn, rate, entrant.steps)  # does its schedule fit?
        self.error_name = problem.error_name

    def run(self, folder: RunFolder, report: Reporter) -> list[Raced]:
        """Tunes and runs every entrant on every seed; pieces that a resumed folder holds are taken from there.

        Raises:
            UsageError: if an entrant diverges with every value of its tuned argument.
        """
        config, entrants = self.config, self.config.entrants
        trials = {name: len(e.trials) if len(e.trials) > 1 else 0 for name, e in entrants.items()}
        report.start(sum(trials.values()) + len(config.seeds) * len(entrants))
        values: dict[str, float | None] = {}
        for name, entrant in entrants.items():
            values[name] = entrant.trials[0] if entrant.trials else None
            if trials[name]:
                report.phase(f"tuning {name}")
                tune = functools.partial(self._piece, folder, report, name, config.tuning_seed)
                shortfalls = [
                    tune(v, f"tune-{name}-{i}", config.tuning_fraction).shortfall(config.targets)
                    for i, v in enumerate(entrant.trials)
                ]
                values[name] = entrant.trials[choose(name, shortfalls, f"change entrants.{name}.trials").best]
                tried = ", ".join(map("{:g}".format, entrant.trials))
                report.say(f"tuned {name}: {entrant.tunes} {values[name]:g} of {tried}")
        runs: dict[str, list[RaceRun]] = {name: [] for name in entrants}
        for index, seed in enumerate(config.seeds):
            for name in in_turns(list(entrants), index):
                report.phase(f"{name}, seed {seed}")
                runs[name].append(self._piece(folder, report, name, seed, values[name], f"run-{name}-{seed}", 1.0))
        return [Raced(name, values[name], runs[name]) for name in entrants]

    def _piece(
        self, folder: RunFolder, report: Reporter, name: str, seed: int, value: float | None, key: str, fraction: float
    ) -> RaceRun:
        def do() -> dict[str, Any]:
            run = self._run(name, value, seed, fraction, report)
            report.advance(1)
            return {"entrant": name, "value": value, "seed": seed, **run._asdict()}

        return restored(RaceRun, piece(folder, report, key, 1, do))

    def _problem(self, seed: int) -> FullBatch:
        return PROBLEMS[self.config.problem](seed, **self.config.problem_options)

    def _run(self, name: str, value: float | None, seed: int, fraction: float, report: Reporter) -> RaceRun:
        entrant, problem = self.config.entrants[name], self._problem(seed)
        optimizer, rate = _build(name, entrant, problem, value)
        trainer = Trainer(problem, optimizer, seed, rate, entrant.chunk, steps=entrant.steps)
        v_seconds = _time_gradient(problem)
        points = []
        for point in trainer.run(None):
            points.append(_measured(trainer, point))
            report.advance(0)
            done = entrant.steps is not None and point.steps >= entrant.steps
            if done or point.seconds >= entrant.seconds * fraction or not np.isfinite(points[-1][-1]):
                break
        columns = (np.array(column, float) for column in zip(*points, strict=True))
        return RaceRun(*columns, v_seconds=min(v_seconds, _time_gradient(problem)))


def _build(name: str, config: EntrantConfig, problem: FullBatch, value: float | None) -> tuple[Optimizer, float | None]:
    """The entrant `name` with its tuned argument at `value`, and its learning rate."""
    rate = value if config.tunes == "learning_rate" else None
    if value is not None and rate is None:
        config = dataclasses.replace(config, options={**config.options, config.tunes: value})
    return build_optimizer(f"entrants.{name}", config, problem.loss_fn, has_rate=rate is not None), rate


def _measured(trainer: Trainer, point: Point) -> tuple[float, ...]:
    """A point in the order of RaceRun's fields."""
    score = trainer.score(point)
    return point.steps, point.seconds, *map(float, point.state.cost), float(score.loss), float(score.metrics["error"])


def _time_gradient(problem: FullBatch, repeats: int = 15, calls: int = 10) -> float:
    """Median seconds of one V, of several in a compiled loop as in a run: launching one would count for more."""

    def descend(params: Params) -> Params:
        def step(_: Any, carry: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
            params, total = carry
            value, grads = jax.value_and_grad(problem.loss_fn)(params, **problem.source)
            return jax.tree.map(lambda p, g: p - 1e-9 * g, params, grads), total + value

        return jax.lax.fori_loop(0, calls, step, (params, jnp.zeros([])))

    run = jax.jit(descend)
    jax.block_until_ready(run(problem.params))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run(problem.params))
        seconds.append((time.perf_counter() - began) / calls)
    return float(np.median(seconds))
