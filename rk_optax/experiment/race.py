"""A race: solvers and optimizers on a full-batch problem, by error against seconds, gradients and V.

V is one `value_and_grad`, timed beside every run; a run's cost in V is its seconds over that, so that Cholesky
factorisations, products and line searches count for what they take.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rk_optax
from rk_optax.experiment.config import check_types
from rk_optax.experiment.errors import UsageError
from rk_optax.experiment.problems import PROBLEMS, Params, Problem
from rk_optax.experiment.progress import Reporter
from rk_optax.experiment.run_folder import RunFolder


@dataclasses.dataclass(frozen=True)
class EntrantConfig:
    """One entrant of a race."""

    method: str
    """adam, nesterov, gradient_descent, lbfgs, adam_then_lbfgs, or an optimizer of rk_optax such as rkc."""
    trials: tuple[int | float, ...] = ()
    """Values of the tuned argument that are tried; empty where nothing is tuned."""
    tunes: str = "learning_rate"
    """The argument that is tuned."""
    options: Mapping[str, float | int | bool | str] = dataclasses.field(default_factory=dict)
    """Further arguments."""
    steps: int | None = None
    """Steps of a run; None for as many as `seconds` allow."""
    seconds: float = 60.0
    """Training seconds after which a run ends."""
    chunk: int = 10
    """Steps between two looks at clock and error."""


@dataclasses.dataclass(frozen=True)
class RaceConfig:
    """A race over several seeds, each entrant tuned on a seed of its own."""

    problem: Literal["poisson", "burgers", "logistic", "gp_dual", "digits"]
    """The problem."""
    entrants: Mapping[str, EntrantConfig]
    """Who runs, by the name they are shown under."""
    problem_options: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    """Arguments of the problem, such as condition of logistic."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the problem: data and initial parameters."""
    tuning_seed: int = 100
    """The seed on which the tuned argument is chosen, by the loss at the end."""
    tuning_fraction: float = 1.0
    """Fraction of a run's seconds that a tuning run gets."""
    x64: bool = False
    """Whether to compute in float64."""
    targets: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    """Errors whose first crossing is reported."""


class Method(Protocol):
    """An optimizer as two functions, with its own count of the work."""

    def init(self, params: Params) -> Any:
        """What is carried from step to step."""
        ...

    def step(self, carry: Any) -> Any:
        """One step."""
        ...

    def view(self, carry: Any) -> tuple[Params, rk_optax.Cost]:
        """The parameters, and the work so far."""
        ...


class _Carry(NamedTuple):
    params: Params
    state: Any
    cost: rk_optax.Cost


class _Plain:
    """An Optax optimizer that takes a gradient a step, or one of this package, which counts for itself."""

    def __init__(self, problem: Problem, tx: optax.GradientTransformation, counts: bool):
        self._problem, self._tx = problem, optax.with_extra_args_support(tx)
        self._counts = counts

    def init(self, params: Params) -> _Carry:
        return _Carry(params, self._tx.init(params), _no_cost())

    def step(self, carry: _Carry) -> _Carry:
        grads = jax.grad(self._problem.loss_fn)(carry.params, **self._problem.data)
        updates, state = self._tx.update(grads, carry.state, carry.params, **self._problem.data)
        cost: Any = getattr(state, "cost") if self._counts else carry.cost.plus(rk_optax.Cost(gradients=1))  # noqa: B009
        return _Carry(optax.apply_updates(carry.params, updates), state, cost)

    def view(self, carry: _Carry) -> tuple[Params, rk_optax.Cost]:
        return carry.params, carry.cost


class _Lbfgs:
    """optax.lbfgs with its zoom line search, of which every step is a loss and a gradient."""

    def __init__(self, problem: Problem, **options: Any):
        self._tx = optax.lbfgs(**options)
        self._loss = functools.partial(problem.loss_fn, **problem.data)

    def init(self, params: Params) -> _Carry:
        return _Carry(params, self._tx.init(params), _no_cost())

    def step(self, carry: _Carry) -> _Carry:
        value, grad = optax.value_and_grad_from_state(self._loss)(carry.params, state=carry.state)
        updates, state = self._tx.update(grad, carry.state, carry.params, value=value, grad=grad, value_fn=self._loss)
        spent = optax.tree_utils.tree_get(state, "num_linesearch_steps")
        params: Params = optax.apply_updates(carry.params, updates)
        return _Carry(params, state, carry.cost.plus(rk_optax.Cost(gradients=spent)))

    def view(self, carry: _Carry) -> tuple[Params, rk_optax.Cost]:
        return carry.params, carry.cost


class _AdamThenLbfgs:
    """Adam for the first `adam_steps`, then L-BFGS from where it stopped."""

    def __init__(self, problem: Problem, learning_rate: float, adam_steps: int, **options: Any):
        self._adam = _Plain(problem, _cosine_adam(adam_steps, learning_rate), counts=False)
        self._lbfgs = _Lbfgs(problem, **options)
        self._adam_steps = adam_steps

    def init(self, params: Params) -> Any:
        return jnp.zeros([], jnp.int32), self._adam.init(params), self._lbfgs.init(params)

    def step(self, carry: Any) -> Any:
        count, adam, lbfgs = carry

        def first() -> Any:
            new = self._adam.step(adam)
            return new, lbfgs._replace(params=new.params, cost=new.cost)

        adam, lbfgs = jax.lax.cond(count < self._adam_steps, first, lambda: (adam, self._lbfgs.step(lbfgs)))
        return count + 1, adam, lbfgs

    def view(self, carry: Any) -> tuple[Params, rk_optax.Cost]:
        return self._lbfgs.view(carry[2])


def _no_cost() -> rk_optax.Cost:
    return rk_optax.Cost(*(jnp.zeros([], jnp.int32) for _ in rk_optax.Cost._fields))


def build_method(name: str, config: EntrantConfig, problem: Problem, value: float | None) -> Method:
    """The entrant `name` with its tuned argument at `value`.

    Raises:
        UsageError: if there is no such method, or it does not take the options.
    """
    options: dict[str, Any] = dict(config.options)
    if value is not None:
        options[config.tunes] = value
    method = _METHODS.get(config.method, _ours if config.method in rk_optax.__all__ else None)
    if method is None:
        known = ", ".join(_METHODS)
        raise UsageError(f"entrants.{name}.method = {config.method!r} is neither of {known} nor in rk_optax")
    try:
        return method(problem, config, options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"entrants.{name}.options = {options!r}: {error}") from error


def _ours(problem: Problem, config: EntrantConfig, options: dict[str, Any]) -> Method:
    factory: Any = getattr(rk_optax, config.method)
    return _Plain(problem, factory(problem.loss_fn, **options), counts=True)


def _adam(problem: Problem, config: EntrantConfig, options: dict[str, Any]) -> Method:
    if config.steps is None:
        raise ValueError("adam decays its rate over `steps`, which must be given")
    return _Plain(problem, _cosine_adam(steps=config.steps, **options), counts=False)


def _cosine_adam(steps: int, learning_rate: float, **options: Any) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps), **options)


def _sgd(problem: Problem, config: EntrantConfig, options: dict[str, Any]) -> Method:
    momentum = 0.9 if config.method == "nesterov" else None
    options = {"momentum": momentum, "nesterov": momentum is not None} | options
    return _Plain(problem, optax.sgd(**options), counts=False)


_METHODS: dict[str, Callable[[Problem, EntrantConfig, dict[str, Any]], Method]] = {
    "adam": _adam,
    "nesterov": _sgd,
    "gradient_descent": _sgd,
    "lbfgs": lambda problem, config, options: _Lbfgs(problem, **options),
    "adam_then_lbfgs": lambda problem, config, options: _AdamThenLbfgs(problem, **options),
}


class Run(NamedTuple):
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


class Result(NamedTuple):
    """An entrant's runs."""

    name: str
    value: float | None  # of the tuned argument
    runs: list[Run]


class Race:
    """A race whose configuration is known to be possible."""

    def __init__(self, config: RaceConfig):
        """Builds every entrant once.

        Raises:
            UsageError: if the configuration asks for something impossible.
        """
        check_types(config)
        if not config.entrants:
            raise UsageError("entrants must name at least one")
        if not config.seeds or config.tuning_seed in config.seeds:
            raise UsageError("seeds must hold a seed, and not tuning_seed: one tuned on the race's runs flatters")
        if not 0 < config.tuning_fraction <= 1:
            raise UsageError(f"tuning_fraction = {config.tuning_fraction} must be in (0, 1]")
        for name, entrant in config.entrants.items():
            for field in ("seconds", "chunk"):
                if getattr(entrant, field) <= 0:
                    raise UsageError(f"entrants.{name}.{field} = {getattr(entrant, field)} must be positive")
        self._config = config
        try:
            problem = self._problem(config.tuning_seed)
        except TypeError as error:
            raise UsageError(f"problem_options = {dict(config.problem_options)!r}: {error}") from error
        for name, entrant in config.entrants.items():
            build_method(name, entrant, problem, entrant.trials[0] if entrant.trials else None)
        self.error_name = problem.error_name

    def run(self, folder: RunFolder, report: Reporter) -> list[Result]:
        """Tunes and runs every entrant on every seed; pieces that a resumed folder holds are taken from there.

        Args:
            folder: where finished pieces go.
            report: hears about progress.

        Returns:
            One result per entrant, in the order of the configuration.
        """
        config = self._config
        trials = {name: len(e.trials) if len(e.trials) > 1 else 0 for name, e in config.entrants.items()}
        report.start(sum(trials.values()) + len(config.seeds) * len(config.entrants))
        values: dict[str, float | None] = {}
        for name, entrant in config.entrants.items():
            values[name] = entrant.trials[0] if entrant.trials else None
            if trials[name]:
                report.stage(f"tuning {name}")
                losses = [self._tune(folder, name, trial, report) for trial in range(trials[name])]
                values[name] = entrant.trials[int(np.argmin(losses))]
                report.say(
                    f"tuned {name}: {entrant.tunes} {values[name]:g} of {', '.join(map('{:g}'.format, entrant.trials))}"
                )
        runs: dict[str, list[Run]] = {name: [] for name in config.entrants}
        for index, seed in enumerate(config.seeds):
            # In turns, forth and back: a slow spell of the machine hits all alike.
            for name in list(config.entrants)[:: 1 if index % 2 == 0 else -1]:
                report.stage(f"{name}, seed {seed}")
                runs[name].append(self._piece(folder, f"run-{name}-{seed}", name, values[name], seed, 1.0, report))
                report.advance(1)
        return [Result(name, values[name], runs[name]) for name in config.entrants]

    def _tune(self, folder: RunFolder, name: str, trial: int, report: Reporter) -> float:
        config = self._config
        value = config.entrants[name].trials[trial]
        piece = f"tune-{name}-{trial}"
        run = self._piece(folder, piece, name, value, config.tuning_seed, config.tuning_fraction, report)
        report.advance(1)
        return float(run.loss[-1]) if np.isfinite(run.loss[-1]) else np.inf

    def _piece(
        self,
        folder: RunFolder,
        piece: str,
        name: str,
        value: float | None,
        seed: int,
        fraction: float,
        report: Reporter,
    ) -> Run:
        content = folder.finished(piece)
        if content is None:
            run = self._one(name, value, seed, fraction, report)
            content = {"entrant": name, "value": value, "seed": seed, **run._asdict()}
            folder.finish(piece, content)
            content = folder.finished(piece)
        fields = {key: np.array(content[key], float) for key in Run._fields[:-1]}
        return Run(**fields, v_seconds=content["v_seconds"])

    def _problem(self, seed: int) -> Problem:
        return PROBLEMS[self._config.problem](seed, **self._config.problem_options)

    def _one(self, name: str, value: float | None, seed: int, fraction: float, report: Reporter) -> Run:
        entrant, problem = self._config.entrants[name], self._problem(seed)
        method = build_method(name, entrant, problem, value)
        carry = jax.jit(method.init)(problem.params)
        chunk = jax.jit(
            lambda carry: jax.lax.fori_loop(0, entrant.chunk, lambda _, c: method.step(c), carry), donate_argnums=0
        )
        # Compiled beforehand: what is timed are steps alone.
        compiled = chunk.lower(carry).compile()
        view = jax.jit(lambda carry: self._view(problem, method, carry))
        v_seconds = _time_gradient(problem)
        points = [(0, 0.0, *map(float, view(carry)))]
        steps, seconds = 0, 0.0
        limit = entrant.seconds * fraction
        while (entrant.steps is None or steps < entrant.steps) and seconds < limit and np.isfinite(points[-1][-1]):
            jax.block_until_ready(carry)
            began = time.perf_counter()
            carry = jax.block_until_ready(compiled(carry))
            seconds += time.perf_counter() - began
            steps += entrant.chunk
            points.append((steps, seconds, *map(float, view(carry))))
            report.advance(0)
        return Run(*map(np.array, zip(*points, strict=True)), v_seconds=min(v_seconds, _time_gradient(problem)))

    def _view(self, problem: Problem, method: Method, carry: Any) -> tuple[jax.Array, ...]:
        params, cost = method.view(carry)
        return (*cost, problem.loss_fn(params, **problem.data), problem.error(params))


def _time_gradient(problem: Problem, repeats: int = 15, calls: int = 10) -> float:
    """Median seconds of one V, of several in a compiled loop as in a run: launching one would count for more."""

    def descend(params: Params) -> Params:
        def step(_: Any, carry: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
            params, total = carry
            value, grads = jax.value_and_grad(problem.loss_fn)(params, **problem.data)
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
