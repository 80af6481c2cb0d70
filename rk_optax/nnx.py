"""The solvers on Flax NNX modules, whose losses act on a live, mutable model.

A solver's later stages evaluate the loss at other parameters, under the dropout masks and batch statistics of the
first stage, which is your own gradient. That gradient moves the live model's random counts and statistics, so the
stages work on copies made from a snapshot taken *before* it: the live model moves exactly once per step.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from rk_optax import _checks
from rk_optax.networks import Controls, integrate

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("rk_optax.nnx needs Flax: pip install 'rk-optax[flax]'") from error
if not hasattr(nnx, "data"):  # before 0.11, nnx.Optimizer held the model itself
    raise ImportError("rk_optax.nnx needs flax>=0.11: pip install --upgrade 'rk-optax[flax]'")

_as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure  # its name in Flax 0.11
# Newer Flax can treat modules as plain pytrees by default; what the loss moves in the model needs its graph mode.
_has_modes = "graph_updates" in inspect.signature(nnx.value_and_grad).parameters
_graph: dict[str, Any] = {"graph": True, "graph_updates": True} if _has_modes else {}


def snapshot(model: Any, wrt: Any = nnx.Param) -> tuple[Any, Any]:
    """What a stage needs of `model` beside its parameters: structure, random counts, statistics, as they are now.

    For a gradient of your own; `Optimizer.take_step` does this itself. Take it *before* the gradient:

    >>> import jax.numpy as jnp, rk_optax, rk_optax.nnx
    >>> from flax import nnx
    >>> def loss_fn(model, x): return jnp.mean(model(x) ** 2)
    >>> tx = rk_optax.rk4(rk_optax.nnx.pure_loss(loss_fn), learning_rate=0.1)
    >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    >>> optimizer, x = nnx.Optimizer(model, tx, wrt=nnx.Param), jnp.ones((4, 3))
    >>> before = rk_optax.nnx.snapshot(model)
    >>> grads = nnx.grad(loss_fn)(model, x)  # draws a mask, so the model's random count moves
    >>> _ = optimizer.update(model, grads, snapshot=before, x=x)

    Args:
      model: an NNX module.
      wrt: the filter of the parameters, as for `nnx.Optimizer`.

    Returns:
      The static structure and, in arrays, the state: what `update` takes as `snapshot=`.
    """
    graphdef, _, rest = nnx.split(model, wrt, ...)
    # In arrays: nnx.split hands out the live variables, which the gradient would move under the snapshot.
    return graphdef, _as_pure(rest)


def pure_loss(loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """Turns `loss_fn(model, *data)` into the function of parameters that a solver takes.

    The result is `loss(params, *data, snapshot=...)`: it evaluates `loss_fn` on a fresh copy of the model, whose
    mutations are dropped. `snapshot` gives an example.

    Args:
      loss_fn: returns a scalar, or `(scalar, aux)` with `has_aux`.
      has_aux: whether `loss_fn` returns aux, which the result drops; leave `has_aux` of the solver off.

    Raises:
      ValueError: `loss_fn` has an argument named snapshot, or `has_aux` is no bool.
    """
    has_aux = _checks.flag(has_aux, "has_aux")
    signature = inspect.signature(loss_fn)
    if "snapshot" in signature.parameters:
        raise ValueError("loss_fn has an argument named 'snapshot', which rk_optax.nnx uses itself; rename it.")

    @functools.wraps(loss_fn)
    def loss(params: Any, *args: Any, snapshot: tuple[Any, Any] | None = None, **data: Any) -> Any:
        if snapshot is None:
            raise TypeError(
                "Stages need the model as it was before your gradient, which has moved its dropout counts and batch "
                "statistics. Call take_step(model, x=x) of rk_optax.nnx.Optimizer; or take before = "
                "rk_optax.nnx.snapshot(model) first and call optimizer.update(model, grads, snapshot=before, x=x)."
            )
        graphdef, rest = snapshot
        result = loss_fn(nnx.merge(graphdef, params, rest), *args, **data)
        return result[0] if has_aux else result

    own = inspect.Parameter("snapshot", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = sorted([*signature.parameters.values(), own], key=lambda parameter: parameter.kind)
    vars(loss)["__signature__"] = signature.replace(parameters=parameters)
    return loss


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` for optimizers that evaluate the loss themselves: gradient and update in one method.

    >>> import jax.numpy as jnp, rk_optax, rk_optax.nnx
    >>> from flax import nnx
    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.inner, self.outer = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
    ...         self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.outer(self.dropout(nnx.tanh(self.norm(self.inner(x)))))
    >>> def loss_fn(model, x, y):
    ...     return jnp.mean((model(x) - y) ** 2)
    >>> @nnx.jit
    ... def train_step(model, optimizer, x, y):
    ...     return optimizer.take_step(model, x=x, y=y)

    >>> model = Net(nnx.Rngs(0))
    >>> optimizer = rk_optax.nnx.Optimizer(
    ...     model, lambda loss: rk_optax.rk4(loss, learning_rate=0.1), loss_fn, wrt=nnx.Param
    ... )
    >>> loss = train_step(model, optimizer, jnp.ones((4, 3)), jnp.zeros((4, 1)))
    >>> int(optimizer.opt_state.cost.gradients[...]), int(model.dropout.rngs.count[...])
    (4, 1)

    Fields, `update`, `nnx.state` and so checkpoints are the stock class's, for any Optax optimizer.

    Args:
      model: an NNX module.
      tx: an Optax transformation, or a function from the loss as a solver takes it to one, such as
        `lambda loss: rk_optax.rk4(loss, learning_rate=0.1)` or `partial(rk_optax.rk4, learning_rate=0.1)`.
      loss_fn: `loss_fn(model, *data)`, a scalar, or `(scalar, aux)` with `has_aux`; may draw from the model's
        random streams and update its statistics.
      wrt: the filter of the parameters, as in the stock class.
      has_aux: whether `loss_fn` returns aux. The solver does not see it: leave its own `has_aux` off.
      **kwargs: further arguments of the stock class.

    Raises:
      TypeError: `tx` is a function and there is no `loss_fn`.
      ValueError: `has_aux` is no bool.
    """

    def __init__(
        self,
        model: Any,
        tx: Any,
        loss_fn: Callable[..., Any] | None = None,
        *,
        wrt: Any,
        has_aux: bool = False,
        **kwargs: Any,
    ):
        has_aux = _checks.flag(has_aux, "has_aux")
        if callable(tx):
            if loss_fn is None:
                raise TypeError("tx is a function of the loss, so give one: Optimizer(model, tx, loss_fn, wrt=...).")
            tx = tx(pure_loss(loss_fn, has_aux=has_aux))
        super().__init__(model, tx, wrt=wrt, **kwargs)
        self.loss_fn = loss_fn
        self.has_aux = has_aux

    def take_step(self, model: Any, /, **data: Any) -> Any:
        """Evaluates loss and gradient on the live model, and updates it: random counts and statistics move once.

        Args:
          model: the module; its parameters, random counts and statistics are updated in place.
          **data: what `loss_fn` takes beside the model: arrays, pytrees and random keys, by keyword.

        Returns:
          The loss before the step, or `(loss, aux)` with `has_aux`.

        Raises:
          TypeError: there is no `loss_fn`; an NNX object among the data; missing or misspelt data.
        """
        loss_fn = self.loss_fn
        if loss_fn is None:
            raise TypeError("take_step needs a loss: Optimizer(model, tx, loss_fn, wrt=...).")
        _refuse_objects(data)
        before = snapshot(model, self.wrt)
        # The one evaluation that moves the live model.
        evaluate = nnx.value_and_grad(
            lambda model: loss_fn(model, **data), argnums=nnx.DiffState(0, self.wrt), has_aux=self.has_aux, **_graph
        )
        try:
            value, grads = evaluate(model)
        except TypeError as error:
            if any(words in str(error) for words in ("scalar-output", "has_aux", "0-d array")):  # JAX's and Flax's
                error.add_note(
                    "Whether loss_fn returns (loss, aux) is said to the optimizer, which tells the solver: "
                    "rk_optax.nnx.Optimizer(model, partial(rk_optax.rk4, learning_rate=0.1), loss_fn, wrt=nnx.Param, "
                    f"has_aux=True). Here has_aux is {self.has_aux}."
                )
            raise
        takes_data = isinstance(self.tx, optax.GradientTransformationExtraArgs)
        self.update(model, grads, **({**data, "snapshot": before} if takes_data else {}))
        return value

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """The stock `update(model, grads, **kwargs)`: `kwargs` go to `tx.update`."""
        try:
            return super().update(*args, **kwargs)
        except TypeError as error:
            if "With has_aux=True, loss_fn must return" in str(error):
                error.add_note(
                    "The loss that rk_optax.nnx.Optimizer hands to tx has dropped aux already: leave has_aux of the "
                    "solver off, and say it to the Optimizer."
                )
            raise


class RKBlock(nnx.Module):
    """A layer whose parameters move with depth, stepped by a solver: `rk_optax.networks.integrate` as a module.

    >>> import jax.numpy as jnp, rk_optax.nnx
    >>> from flax import nnx
    >>> class Layer(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.linear, self.dropout = nnx.Linear(3, 3, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
    ...     def __call__(self, y):
    ...         return self.dropout(nnx.tanh(self.linear(y)))
    >>> block = rk_optax.nnx.RKBlock(Layer, nodes=(0, 1, 2), rngs=nnx.Rngs(0))
    >>> block.controls.linear.kernel.shape
    (3, 3, 3)
    >>> block(jnp.ones((4, 3))).shape
    (4, 3)

    The attribute `controls` is the layer with its parameters stacked along a leading axis. One dropout mask is drawn
    for each call of the block, which moves each random stream by one; a layer with BatchNorm is refused. See
    `rk_optax.linen.RKBlock` for the reasons.

    Args:
      make_layer: `make_layer(rngs) -> module`, a module that maps y to y', like y.
      nodes: of the controls, see `rk_optax.networks.Controls`.
      grid: the times of the steps; None: the nodes.
      solver: as for `integrate`.
      basis: of the controls.
      size: number of polynomials of basis "legendre".
      constant_in_time: whether the parameters start alike at all nodes; False: a draw for each basis function.
      with_time: whether the module is called as `layer(y, t)`.
      remat: as for `integrate`.
      report: as for `integrate`; the call then returns `(y, Report)`.
      rngs: for the initial parameters and the layer's random streams.

    Raises:
      ValueError: a layer that keeps anything beside parameters and random streams; what `integrate` refuses.
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], Any],
        nodes: Sequence[float],
        *,
        grid: Sequence[float] | None = None,
        solver: Any = "rk4",
        basis: Any = "linear",
        size: int = 1,
        constant_in_time: bool = True,
        with_time: bool = False,
        remat: bool = True,
        report: Sequence[Any] = (),
        rngs: nnx.Rngs,
    ):
        self.nodes = tuple(float(t) for t in nodes)
        self.grid = self.nodes if grid is None else tuple(float(t) for t in grid)
        constant_in_time = _checks.flag(constant_in_time, "constant_in_time")
        self.with_time, self.remat = _checks.flag(with_time, "with_time"), _checks.flag(remat, "remat")
        self.solver, self.report = solver, tuple(report)
        layer = make_layer(rngs)
        graphdef, theta, streams, kept = nnx.split(layer, nnx.Param, nnx.RngState, ...)
        if jax.tree.leaves(kept):
            kinds = sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(kept)})
            raise ValueError(
                f"The layer of an RKBlock keeps {', '.join(kinds)} beside its parameters. Every step evaluates it "
                "several times at different features, so that running statistics have no meaning there: use LayerNorm, "
                "GroupNorm or rk_optax.networks.tv_norm instead of BatchNorm, or norm outside the block."
            )
        stacked = Controls.constant_in_time(theta, self.nodes, basis, size)
        self.basis: Any = stacked.basis
        if not constant_in_time:
            others = [nnx.state(make_layer(rngs), nnx.Param) for _ in range(stacked.size - 1)]
            stacked = Controls(jax.tree.map(lambda *x: jax.numpy.stack(x), theta, *others), self.nodes, self.basis)
        self.controls = nnx.merge(graphdef, stacked.theta, streams)

    def __call__(self, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The features after the block; further arguments go to the layer."""
        graphdef, theta, streams = nnx.split(self.controls, nnx.Param, nnx.RngState)
        theta, counts = _as_pure(theta), _as_pure(streams)
        before = _drawn_once(counts)
        drawn = []

        def slope(theta: Any, y: Any, t: Any) -> Any:
            layer = nnx.merge(graphdef, theta, before)
            slope = layer(y, t, *args, **kwargs) if self.with_time else layer(y, *args, **kwargs)
            # Which streams the layer draws from, known when it is traced: a counter that was not moved is still itself.
            after = _as_pure(nnx.state(layer, nnx.RngState))
            drawn[:] = [
                new is not old for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
            ]
            return slope

        controls = Controls(theta, self.nodes, self.basis)
        result = integrate(slope, controls, y, self.grid, self.solver, remat=self.remat, report=self.report)
        moved = [x + 1 if moves else x for x, moves in zip(jax.tree.leaves(counts), drawn, strict=True)]
        nnx.update(self.controls, jax.tree.unflatten(jax.tree.structure(streams), moved))
        return result


def _drawn_once(streams: Any) -> Any:
    """Every stream as a new one, from one draw of it: whatever an evaluation draws from it, the next call's differ."""
    if not isinstance(streams, dict):
        return streams
    if {"key", "count"} <= set(streams):
        count = streams["count"]
        return streams | {"key": jax.random.fold_in(streams["key"], count), "count": count * 0}
    return {name: _drawn_once(value) for name, value in streams.items()}


def _refuse_objects(data: Any) -> None:
    kinds = (nnx.Module, nnx.Rngs, nnx.RngStream, nnx.Variable)
    for path, leaf in jax.tree_util.tree_leaves_with_path(data, is_leaf=lambda leaf: isinstance(leaf, kinds)):
        if isinstance(leaf, kinds):
            raise TypeError(
                f"data{jax.tree_util.keystr(path)} is a live {type(leaf).__name__}, which every stage would move. Keep "
                "it in the model; or pass a random key and make nnx.Rngs(dropout=key) inside loss_fn."
            )
