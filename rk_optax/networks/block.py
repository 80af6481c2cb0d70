"""A network whose depth is the time of an ordinary differential equation, stepped by the package's own solvers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from rk_optax import _checks, _tree
from rk_optax.field import VectorField
from rk_optax.methods import TABLEAUS
from rk_optax.networks.controls import Controls, OnStep
from rk_optax.networks.report import QUANTITIES, Quantity, Report, scaled_error, stiffness
from rk_optax.solver import Cost, Explicit, Solver, Step, fitting, stepped
from rk_optax.tableau import ButcherTableau
from rk_optax.traced_tableau import TracedTableau

PyTree = Any
Layer = Callable[[PyTree, PyTree, Any], PyTree]
Method = str | Solver | ButcherTableau | TracedTableau

_WANTS: dict[Quantity, Any] = {"error": "error", "stiffness": "stages"}  # what the solver is asked for
_REMEDIES = {
    "error": "an embedded error estimate, such as 'heun', 'bogacki_shampine', 'tsit5' or Stabilized('rkc2', stages=5)",
    "stiffness": "at least two explicit stages",
}


def integrate(
    layer: Layer,
    controls: Controls,
    y: PyTree,
    grid: Any,
    solver: Method = "rk4",
    *,
    remat: bool = True,
    report: Sequence[Quantity] = (),
    loss: Callable[[PyTree], jax.Array] | None = None,
    atol: float = 1e-6,
    rtol: float = 1e-6,
    allow_kinks: bool = False,
    unroll: int | None = None,
) -> Any:
    """The features at the end of y' = layer(θ(t), y, t), by one step of a solver for each interval of the grid.

    A residual network y + f(θ_k, y) is "euler" on the grid 0, 1, 2, ... . Gradients are those of the discrete network,
    with respect to whatever the arguments hold: controls, features, grid, a tableau's coefficients.

    >>> from rk_optax.networks import Controls, initial, integrate, single
    >>> theta = initial(jax.random.key(0), single, channels=3)
    >>> controls = Controls.constant_in_time(theta, nodes=(0, 1, 2))
    >>> y, report = integrate(single, controls, jnp.ones((5, 3)), (0, 0.5, 1, 2), report=["states"])
    >>> y.shape, report.states.shape, int(report.cost.gradients)
    ((5, 3), (4, 5, 3), 12)

    Args:
      layer: a pure function `layer(theta, y, t)` that returns y', like y. One dropout mask for the whole block is one
        key that the layer closes over.
      controls: θ(t).
      y: the features at `grid[0]`: an array (batch, ...), or a pytree of such.
      grid: strictly monotone times t_0 to t_n; also traced, where neither order nor kinks can be checked.
      solver: a name in `rk_optax.TABLEAUS`; a tableau, also one of `families`; or a solver of features: `Explicit`,
        `Stabilized` with fixed `stages` (for parabolic layers, such as `double_sym`), `Etd(order, "given")` for a
        `Semilinear` layer.
      remat: whether the backward pass evaluates each step anew, so that of each step only its features are stored;
        False stores all that the layer needs, at each stage, and costs a quarter less time.
      report: what to return beside y; "error" and "stiffness" may cost further evaluations of the layer, and "energy"
        costs a backward pass.
      loss: for "energy" alone, the scalar function of the features at the end whose gradient is their momentum.
      atol: absolute tolerance that scales the reported error.
      rtol: relative tolerance likewise.
      allow_kinks: whether to accept a grid that steps over a kink of θ with a method whose order is lost there.
      unroll: steps that are compiled side by side rather than in a loop; None: 1 with remat, whose repeated evaluations
        XLA may merge again with the first ones in unrolled code, which saves nothing, and 4 without.

    Returns:
      y at `grid[-1]`; with a report, `(y, Report)`.

    Raises:
      TypeError: features that are not floating-point arrays, or a layer whose result is not like y.
      ValueError: a solver that a network cannot use, a grid that is not monotone or steps over a kink, a quantity that
        the solver does not offer, or "energy" without a loss.
    """
    block = Block.of(layer, controls, grid, solver, remat=remat, report=report, atol=atol, rtol=rtol, unroll=unroll)
    if not _checks.flag(allow_kinks, "allow_kinks"):
        block.check_kinks()
    if "energy" not in block.report:
        y, steps = block.run(y)
        return (y, steps) if block.report else y
    if loss is None:
        raise ValueError("report='energy' needs loss, a function of the features at the end: p is its gradient.")
    with_states = dataclasses.replace(block, report=(*block.report, "states"))
    y, steps = with_states.run(y)
    _, energy = with_states.back(steps.states, jax.grad(loss)(y))
    return y, steps._replace(energy=energy, states=steps.states if "states" in block.report else None)


def local_report(
    layer: Layer,
    controls: Controls,
    states: PyTree,
    grid: Any,
    key: jax.Array,
    solver: Method = "rk4",
    *,
    report: Sequence[Quantity] = ("error",),
    times: Literal["grid", "random"] = "grid",
    atol: float = 1e-6,
    rtol: float = 1e-6,
    allow_kinks: bool = False,
) -> Report:
    """The report of one step drawn at random: a regulariser at the price of one step, whatever the depth.

    The step starts from a stored state and the gradient stops there, as in locally regularised neural ODEs; it reaches
    θ through this one step.

    >>> from rk_optax.networks import Controls, initial, integrate, local_report, single
    >>> controls = Controls.constant_in_time(initial(jax.random.key(0), single, channels=3), nodes=(0,))
    >>> grid = (0, 0.5, 1)
    >>> y, along = integrate(single, controls, jnp.ones((5, 3)), grid, "heun", report=["states"])
    >>> seen = local_report(single, controls, along.states, grid, jax.random.key(1), "heun", times="random")
    >>> seen.error.shape, int(seen.cost.gradients)
    ((1, 5), 4)

    Args:
      layer: as for `integrate`.
      controls: as for `integrate`.
      states: the features at the times of the grid, as `integrate(..., report=["states"])` gives them.
      grid: as for `integrate`.
      key: of the draw.
      solver: as for `integrate`.
      report: any of "error" and "stiffness".
      times: "grid": one of the grid's own steps, so that the mean over the draws is the mean over the steps; "random":
        a step from any time on, uniform between the first step and the last, as long as the steps around it. One
        further step, without a gradient, leads from the grid to its start.
      atol: as for `integrate`.
      rtol: as for `integrate`.
      allow_kinks: as for `integrate`; a step of times "random" crosses nodes of the controls that lie on the grid.

    Raises:
      ValueError: as for `integrate`, or another quantity.

    Source: Pal et al., "Locally Regularized Neural Differential Equations", ICML 2023 (arXiv 2303.02262), whose biased
    version is "grid" and whose unbiased one is "random".
    """
    if not set(report) <= {"error", "stiffness"}:
        raise ValueError(f"local_report has 'error' and 'stiffness', got {tuple(report)!r}.")
    if times not in ("grid", "random"):
        raise ValueError(f"times must be 'grid' or 'random', got {times!r}.")
    block = Block.of(layer, controls, grid, solver, remat=False, report=report, atol=atol, rtol=rtol)
    if not _checks.flag(allow_kinks, "allow_kinks"):
        block.check_kinks(everywhere=times == "random")
    key_of_step, key_within = jax.random.split(key)
    last = len(block.grid) - 2 if times == "grid" else max(len(block.grid) - 3, 0)
    k = jax.random.randint(key_of_step, (), 0, last + 1)
    y = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(jax.lax.stop_gradient(x), k, keepdims=False), states)
    if times == "grid":
        interval = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, keepdims=False), block.intervals)
        _, seen, cost = block.step(interval, y)
    else:
        block = dataclasses.replace(block, on_step=lambda piece, fraction, t: controls.at(t))
        starts, lengths, _ = block.intervals
        h, following = lengths[k], lengths[jnp.minimum(k + 1, len(lengths) - 1)]
        before = jax.random.uniform(key_within, (), h.dtype) * (h if len(lengths) > 1 else 0 * h)
        y, _, cost_of_start = block.step((starts[k], before, ()), y)
        length = h + before / h * (following - h)
        _, seen, cost = block.step((starts[k] + before, length, ()), jax.lax.stop_gradient(y))
        cost = jax.tree.map(jnp.add, cost_of_start, cost)
    return Report(cost, **{name: values[None] for name, values in seen.items()})


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A layer under controls on a grid: what `integrate` and its like share.

    Attributes:
      intervals: (start, h, piece of the controls) of each step, stacked.
    """

    layer: Layer
    controls: Controls
    grid: Any
    solver: Solver
    intervals: PyTree
    on_step: OnStep
    remat: bool
    report: tuple[Quantity, ...]
    atol: float
    rtol: float
    unroll: int

    @classmethod
    def of(
        cls,
        layer: Layer,
        controls: Controls,
        grid: Any,
        solver: Method,
        *,
        remat: bool = True,
        report: Sequence[Quantity] = (),
        atol: float = 1e-6,
        rtol: float = 1e-6,
        unroll: int | None = None,
    ) -> Block:
        """A block of checked arguments."""
        if not callable(layer):
            raise TypeError(f"layer must be a function of (theta, y, t), got {layer!r}.")
        if not isinstance(controls, Controls):
            raise TypeError(
                f"controls must be Controls, got {type(controls).__name__}; weights that do not move with depth are "
                "Controls.constant_in_time(theta, (0,))."
            )
        remat = _checks.flag(remat, "remat")
        unroll = (1 if remat else 4) if unroll is None else _checks.count(unroll, "unroll")
        asked = cast("tuple[Quantity, ...]", (report,) if isinstance(report, str) else tuple(report))
        unknown = sorted(set(asked) - set(QUANTITIES))
        if unknown:
            raise ValueError(f"report must name {', '.join(QUANTITIES)}; got {unknown}.")
        if not isinstance(grid, jax.Array):
            grid = np.asarray(grid, np.float64)
        if grid.ndim != 1 or len(grid) < 2:
            raise ValueError(f"grid must be at least two times, got shape {grid.shape}.")
        if not isinstance(grid, jax.core.Tracer):
            grid = np.asarray(grid, np.float64)
            h = np.diff(grid)
            if not np.isfinite(h).all() or not ((h > 0).all() or (h < 0).all()):
                raise ValueError(f"grid must be finite and strictly monotone, got {grid.tolist()}.")
        method = _solver_of_features(solver, layer)
        clock = _tree.default_float()
        pieces, on_step = controls.along(grid)
        intervals = (jnp.asarray(grid[:-1], clock), jnp.asarray(grid[1:] - grid[:-1], clock), pieces)
        block = cls(layer, controls, grid, method, intervals, on_step, remat, asked, atol, rtol, unroll)
        for name in asked:
            if name in _WANTS and _WANTS[name] not in method.offers:
                raise ValueError(f"report={name!r} needs a method with {_REMEDIES[name]}; {method!r} has none.")
        return block

    def check_kinks(self, *, everywhere: bool = False) -> None:
        """Raises a ValueError where a step over a kink of θ, or of θ on the grid too, costs the method its order."""
        order = getattr(self.solver, "order", None)
        keeps = self.controls.order_across_kinks
        if isinstance(self.grid, jax.Array) or (order is not None and order <= keeps):
            return
        inside = self.controls.kinks_inside(self.grid[[0, -1]] if everywhere else self.grid)
        if inside:
            remedy = "Draw a step of the grid, times='grid'" if everywhere else "Add these times to the grid"
            raise ValueError(
                f"θ(t) has kinks at {', '.join(f'{t:g}' for t in inside)}, inside steps, where a method of order "
                f"{order} has order {keeps:g} only. {remedy}, or pass allow_kinks=True."
            )

    def run(self, y: PyTree) -> tuple[PyTree, Report]:
        """All steps from y."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(y):
            if not (hasattr(leaf, "dtype") and _tree.is_inexact(leaf)):
                raise TypeError(f"y{jax.tree_util.keystr(path)} must be a floating-point array, got {leaf!r}.")
            if not leaf.ndim and {"error", "stiffness", "energy"} & set(self.report):
                raise ValueError("A report needs a batch: give y a leading axis.")

        def step(y: PyTree, interval: PyTree) -> tuple[PyTree, dict[str, Any]]:
            after, seen, cost = self.step(interval, y)
            return after, seen | {"cost": cost}

        steps = len(self.grid) - 1
        body = jax.checkpoint(step, prevent_cse=self.unroll > 1) if self.remat else step
        end, seen = jax.lax.scan(body, y, self.intervals, unroll=min(self.unroll, steps))
        seen["cost"] = jax.tree.map(lambda x: x.sum(dtype=x.dtype), seen["cost"])
        if "states" in self.report:
            seen["states"] = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), y, seen["states"])
        if "variation" in self.report:
            seen["variation"] = self.controls.total_variation()
        return end, Report(**seen)

    def step(self, interval: PyTree, y: PyTree) -> tuple[PyTree, dict[str, Any], Cost]:
        """One step: the features after it, what is reported of it, and its cost."""
        start, h, piece = interval
        layer: Any = self.layer
        # The solvers know no time: a clock that runs since the step's start moves along with the features.
        params = {"clock": jnp.zeros_like(h), "y": y}

        def field(moving: PyTree, stage: Any) -> PyTree:
            del stage
            clock = moving["clock"]
            slope = self.slope(interval, clock, moving["y"])
            # A solver follows a gradient downhill.
            return {"clock": -jnp.ones_like(clock), "y": jax.tree.map(jnp.negative, slope)}

        def decay(moving: PyTree) -> PyTree:
            theta = self.on_step(piece, moving["clock"] / h, start + moving["clock"])
            rate = layer.decay(theta, start + moving["clock"])
            return {"clock": jnp.zeros_like(h), "y": _spread(rate, moving["y"])}

        problem = VectorField(field, decay=decay if hasattr(layer, "decay") else None)
        first, state = problem(params), self.solver.init(params)
        wants = frozenset(_WANTS[name] for name in self.report if name in _WANTS)
        step = fitting(self.solver, stepped(self.solver, problem, params, first, h, state, wants), first, state)
        after = _tree.add_scaled(y, -h, step.direction["y"])
        return after, self._seen(step, y, after, h), step.cost

    def back(self, states: PyTree, p_end: PyTree) -> tuple[PyTree, jax.Array]:
        """P = ∂loss/∂y and H = p · y' at all times, from the states there and from p at the end; see `momentum`."""

        def back(p: PyTree, at: tuple[PyTree, PyTree]) -> tuple[PyTree, tuple[PyTree, jax.Array]]:
            interval, y = at
            (p,) = jax.vjp(lambda y: self.step(interval, y)[0], y)[1](p)
            return p, (p, _energy(p, self.slope(interval, jnp.zeros_like(interval[1]), y)))

        starts, end = (jax.tree.map(lambda x, part=part: x[part], states) for part in (slice(-1), -1))
        _, (momenta, energy) = jax.lax.scan(back, p_end, (self.intervals, starts), reverse=True)
        last = jax.tree.map(lambda x: x[-1], self.intervals)
        energy_end = _energy(p_end, self.slope(last, last[1], end))
        momenta = jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), momenta, p_end)
        return momenta, jnp.concatenate([energy, energy_end[None]])

    def slope(self, interval: PyTree, clock: jax.Array, y: PyTree) -> PyTree:
        """Y' at the time `clock` after the start of a step."""
        start, h, piece = interval
        theta = self.on_step(piece, clock / h, start + clock)
        return _like(self.layer(theta, y, start + clock), y)

    def _seen(self, step: Step, y: PyTree, after: PyTree, h: Any) -> dict[str, Any]:
        seen = {}
        if "states" in self.report:
            seen["states"] = after
        if "error" in self.report:
            seen["error"] = scaled_error(step.quantities["error"]["y"], y, after, self.atol, self.rtol)
        if "stiffness" in self.report:
            ks = [k["y"] for k in step.quantities["stages"]]
            seen["stiffness"] = stiffness(TracedTableau.of(cast(Explicit, self.solver).tableau), ks, h)
        return seen


def _solver_of_features(method: Method, layer: Layer) -> Solver:
    if isinstance(method, str):
        if method not in TABLEAUS:
            raise ValueError(
                f"solver={method!r} is not in rk_optax.TABLEAUS ({', '.join(TABLEAUS)}); other methods are solvers: "
                "Stabilized('rkc2', stages=5), Etd(2, 'given')."
            )
        method = TABLEAUS[method]
    if isinstance(method, ButcherTableau | TracedTableau):
        method = Explicit(method, unroll=True)
    if not isinstance(method, Solver):
        raise TypeError(f"solver must be a name, a tableau or a Solver, got {type(method).__name__}.")
    if "decay" in method.needs and not hasattr(layer, "decay"):
        raise ValueError(
            f"{method!r} integrates a linear part exactly that the layer gives: make the layer a "
            "rk_optax.networks.Semilinear(decay, rest)."
        )
    beyond = method.needs - {"decay", "diagonal_scale"}
    if beyond or method.gradients_per_step is None or getattr(method, "linear", "") == "l2":
        raise ValueError(
            f"{method!r} cannot step the features of a network: implicit and linearly implicit methods take the "
            "field's Jacobian for symmetric, which that of a layer is not, and a loop whose length depends on the data "
            "has no reverse mode. Use an explicit tableau, Stabilized with a number of stages, or Etd(linear='given')."
        )
    return method


def _energy(p: PyTree, slope: PyTree) -> jax.Array:
    products = jax.tree.map(lambda a, b: jnp.real(a * b).reshape(a.shape[0], -1).sum(axis=1), p, slope)
    return functools.reduce(jnp.add, jax.tree.leaves(products))


def _like(slope: PyTree, y: PyTree) -> PyTree:
    """`slope` in the dtypes of y, which it has to be like."""
    expected, got = (jax.tree.map(lambda x: (jnp.shape(x), jnp.iscomplexobj(x)), tree) for tree in (y, slope))
    if expected != got:
        raise TypeError(f"The layer's result must be like y in structure, shapes and realness: {got} for {expected}.")
    return jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), slope, y)


def _spread(rate: PyTree, y: PyTree) -> PyTree:
    return jax.tree.map(lambda r, x: jnp.broadcast_to(jnp.asarray(r, _tree.real_dtype(x)), x.shape), rate, y)
