"""A race: solvers and optimizers on a full-batch problem, by error against seconds, gradients and V.

V is one `value_and_grad`, timed beside every run; a run's cost in V is its seconds over that, so that Cholesky
factorisations, products and line searches count for what they take.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax.experiment.config import EntrantConfig, RaceConfig, checked
from rk_optax.experiment.entrants import Optimizer, build_optimizer
from rk_optax.experiment.errors import refusing
from rk_optax.experiment.runs.loop import Trainer
from rk_optax.experiment.runs.progress import ProgressBar
from rk_optax.experiment.runs.protocol import choose, in_turns, piece
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
    """Runs solvers and optimizers on a full-batch problem with a known solution, each tuned on a seed of its own.

    Shows what every error costs in gradients, V (one value_and_grad) and seconds.
    """

    def __init__(self, config: RaceConfig):
        """Builds every entrant once."""
        self.config = checked(config)
        with refusing(f"problem_options = {dict(config.problem_options)!r}", TypeError):
            problem = self._problem(config.tuning_seed)
        for name, entrant in config.entrants.items():
            optimizer, rate = _build(name, entrant, problem, _first(entrant))
            optimizer.make(problem.loss_fn, rate, entrant.steps)  # does its schedule fit?
        self.error_name = problem.error_name

    def run(self, folder: RunFolder, report: ProgressBar) -> list[Raced]:
        """Tunes and runs every entrant on every seed; pieces that a resumed folder holds are taken from there."""
        config, entrants = self.config, self.config.entrants

        def run(key: str, name: str, value: float | None, seed: int, fraction: float = 1.0) -> RaceRun:
            given, about = (name, value, seed, fraction, report), {"entrant": name, "value": value, "seed": seed}
            return piece(folder, report, RaceRun, key, 1, self._run, *given, **about)

        tuned = {name: entrant for name, entrant in entrants.items() if len(entrant.trials) > 1}
        report.start(sum(len(entrant.trials) for entrant in tuned.values()) + len(config.seeds) * len(entrants))
        values = {name: _first(entrant) for name, entrant in entrants.items()}
        for name, entrant in tuned.items():
            report.phase(f"tuning {name}")
            runs = [
                run(f"tune-{name}-{i}", name, value, config.tuning_seed, config.tuning_fraction)
                for i, value in enumerate(entrant.trials)
            ]
            shortfalls = [each.shortfall(config.targets) for each in runs]
            best, _ = choose(name, shortfalls, f"change entrants.{name}.trials")
            values[name] = entrant.trials[best]
            tried = ", ".join(map("{:g}".format, entrant.trials))
            report.say(f"tuned {name}: {entrant.tunes} {entrant.trials[best]:g} of {tried}")
        raced: dict[str, list[RaceRun]] = {name: [] for name in entrants}
        for index, seed in enumerate(config.seeds):
            for name in in_turns(list(entrants), index):
                report.phase(f"{name}, seed {seed}")
                raced[name].append(run(f"run-{name}-{seed}", name, values[name], seed))
        return [Raced(name, values[name], runs) for name, runs in raced.items()]

    def _problem(self, seed: int) -> FullBatch:
        return PROBLEMS[self.config.problem](seed, **self.config.problem_options)

    def _run(self, name: str, value: float | None, seed: int, fraction: float, report: ProgressBar) -> RaceRun:
        entrant, problem = self.config.entrants[name], self._problem(seed)
        optimizer, rate = _build(name, entrant, problem, value)
        trainer = Trainer(problem, optimizer, seed, rate, entrant.chunk, steps=entrant.steps)
        v_seconds = _time_gradient(problem)
        points = []
        for point in trainer.run(None):
            score = trainer.score(point)
            cost, end = map(float, point.state.cost), (float(score.loss), float(score.metrics["error"]))
            points.append((point.steps, point.seconds, *cost, *end))
            report.advance(0)
            done = entrant.steps is not None and point.steps >= entrant.steps
            if done or point.seconds >= entrant.seconds * fraction or not np.isfinite(end[1]):
                break
        columns = (np.array(column, float) for column in zip(*points, strict=True))
        report.advance(1)
        return RaceRun(*columns, v_seconds=min(v_seconds, _time_gradient(problem)))


def _first(entrant: EntrantConfig) -> float | None:
    return entrant.trials[0] if entrant.trials else None


def _build(name: str, config: EntrantConfig, problem: FullBatch, value: float | None) -> tuple[Optimizer, float | None]:
    """The entrant `name` with its tuned argument at `value`, and its learning rate."""
    rate = value if config.tunes == "learning_rate" else None
    if value is not None and rate is None:
        config = dataclasses.replace(config, options={**config.options, config.tunes: value})
    return build_optimizer(f"entrants.{name}", config, problem.loss_fn, has_rate=rate is not None), rate


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
