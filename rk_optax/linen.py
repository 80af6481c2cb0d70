"""For Flax Linen: a `TrainState` for solvers, a block that is a Runge–Kutta method of its features, forward gradients.

`TrainState.apply_gradients` hands the loss's data on to the solver. The stock class calls
`tx.update(grads, opt_state, params)` and nothing else, so a solver could not evaluate its stages. This one has the same
fields, `create` and serialization, and one argument more: `data`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import optax

from rk_optax import _checks
from rk_optax.networks import Controls, integrate

try:
    import flax.linen as nn
    from flax.training import train_state
except ImportError as error:
    raise ImportError("rk_optax.linen needs Flax: pip install 'rk-optax[flax]'") from error

from rk_optax.activity_gradient import LocalLoss, activity_forward_gradient

__all__ = ["LocalLoss", "RKBlock", "TrainState", "activity_forward_gradient"]


class TrainState(train_state.TrainState):
    """`flax.training.train_state.TrainState` for optimizers that evaluate the loss themselves.

    Whatever the loss takes beside the parameters goes into one mapping, `data`, which serves your own gradient and
    the solver's stages alike: batch, dropout key, and batch statistics as they were *before* the step. Every stage
    then has the dropout mask of your gradient, as a step of one flow must. What your gradient gives back, such as the
    new batch statistics, replaces a field, once per step; the stages discard theirs.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, rk_optax
    >>> from typing import Any
    >>> from rk_optax.linen import TrainState
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
    ...         return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(nn.tanh(x)))
    >>> def loss_fn(params, batch_stats, x, y, dropout_key):
    ...     predicted, new = net.apply(
    ...         {"params": params, "batch_stats": batch_stats},
    ...         x, mutable=["batch_stats"], rngs={"dropout": dropout_key},
    ...     )
    ...     return jnp.mean((predicted - y) ** 2), new["batch_stats"]
    >>> class State(TrainState):  # a field for what the model has beside parameters, as Flax has it
    ...     batch_stats: Any
    >>> @jax.jit
    ... def step(state, x, y, key):
    ...     dropout_key = jax.random.fold_in(key, state.step)
    ...     data = dict(batch_stats=state.batch_stats, x=x, y=y, dropout_key=dropout_key)
    ...     (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, **data)
    ...     return state.apply_gradients(grads=grads, data=data, batch_stats=stats), loss

    >>> net, x, y, key = Net(), jnp.ones((4, 3)), jnp.zeros((4, 1)), jax.random.key(0)
    >>> variables = net.init({"params": key, "dropout": key}, x)
    >>> tx = rk_optax.rk4(loss_fn, learning_rate=0.1, has_aux=True)
    >>> state = State.create(
    ...     apply_fn=net.apply, params=variables["params"], tx=tx, batch_stats=variables["batch_stats"]
    ... )
    >>> state, loss = step(state, x, y, key)
    >>> int(state.step), int(state.opt_state.cost.gradients)
    (1, 4)

    With parameters that hold `_overwrite_with_gradient` (FP8), `tx` sees `params["params"]` alone, as in the stock
    class: a solver's loss takes that tree, and the overwritten collection as data.
    """

    def apply_gradients(self, *, grads: Any, data: Mapping[str, Any] | None = None, **kwargs: Any) -> Self:
        """One step: `tx.update` with `data`, then `optax.apply_updates`, as the stock class does it.

        Args:
          grads: the gradient of the loss at `params` on `data`, a tree like `params`.
          data: what `tx.update` takes by keyword; a solver matches it by name to the arguments of its loss. An
            optimizer that takes no keywords ignores it.
          **kwargs: fields to replace in the returned state, as in the stock class.

        Returns:
          The state after the step, with `step` incremented.

        Raises:
          TypeError: a keyword that names no field; missing or misspelt data.
        """
        fields = {field.name for field in dataclasses.fields(self)}
        unknown = ", ".join(f"{name}=..." for name in kwargs if name not in fields)
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has no field for {unknown} of apply_gradients. Data of the loss go into one "
                f"mapping: apply_gradients(grads=grads, data=dict({unknown}))."
            )
        tx, data = optax.with_extra_args_support(self.tx), {} if data is None else data

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            try:
                return tx.update(updates, state, params, **data)
            except TypeError as error:
                error.add_note("In apply_gradients, keywords of tx.update are entries of data=dict(...).")
                raise

        # The stock step on an optimizer that has its data already.
        bound = self.replace(tx=optax.GradientTransformation(tx.init, update))
        stepped = super(TrainState, bound).apply_gradients(grads=grads, **kwargs)
        return stepped.replace(tx=kwargs.get("tx", self.tx))


class RKBlock(nn.Module):
    """A layer whose parameters move with depth, stepped by a solver: `rk_optax.networks.integrate` as a module.

    The parameters are the layer's under the key "controls", stacked along a leading axis, one entry for each node.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> class Layer(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, y):
    ...         return nn.Dropout(0.1, deterministic=False)(nn.tanh(nn.Dense(y.shape[-1])(y)))
    >>> block = RKBlock(Layer(), nodes=(0, 1, 2))
    >>> y, key = jnp.ones((4, 3)), jax.random.key(0)
    >>> variables = block.init({"params": key, "dropout": key}, y)
    >>> variables["params"]["controls"]["Dense_0"]["kernel"].shape
    (3, 3, 3)
    >>> block.apply(variables, y, rngs={"dropout": key}).shape
    (4, 3)

    One dropout mask is drawn for each call of the block, the same at every stage of every step: otherwise the block is
    no method for any equation. A layer with BatchNorm is refused: a step evaluates it several times, at features that
    are none of the network's, and each evaluation would need statistics of its own, which another grid would not have.

    Attributes:
      layer: a module that maps y to y', like y; or a pure function (theta, y, t), with `initial`.
      nodes: of the controls, see `rk_optax.networks.Controls`.
      grid: the times of the steps; None: the nodes.
      solver: as for `integrate`.
      basis: of the controls.
      size: number of polynomials of basis "legendre".
      initial: `initial(key) -> theta` of a pure function, such as `rk_optax.networks.initial` with its arguments set.
      constant_in_time: whether the parameters start alike at all nodes; False: a draw for each basis function.
      with_time: whether the module is called as `layer(y, t)`.
      remat: as for `integrate`.
      report: as for `integrate`; the call then returns `(y, Report)`.
      streams: random streams that the layer draws from.

    Raises:
      ValueError: at init, a layer that keeps anything beside parameters; what `integrate` refuses.
    """

    layer: Any
    nodes: Sequence[float]
    grid: Sequence[float] | None = None
    solver: Any = "rk4"
    basis: Any = "linear"
    size: int = 1
    initial: Callable[[Any], Any] | None = None
    constant_in_time: bool = True
    with_time: bool = False
    remat: bool = True
    report: Sequence[Any] = ()
    streams: Sequence[str] = ("dropout",)

    def __post_init__(self):
        for name in ("constant_in_time", "with_time", "remat"):
            _checks.flag(getattr(self, name), name)
        super().__post_init__()

    @nn.compact
    def __call__(self, y: Any, *args: Any, **kwargs: Any) -> Any:
        """The features after the block; further arguments go to the layer."""
        rngs = {name: self.make_rng(name) for name in self.streams if self.has_rng(name)}
        layer = self.layer.clone(parent=None) if isinstance(self.layer, nn.Module) else self.layer

        def inputs(y: Any, t: Any) -> tuple[Any, ...]:
            return (y, t, *args) if self.with_time else (y, *args)

        def first(key: Any) -> Any:
            if self.initial is not None:
                return self.initial(key)
            variables = dict(layer.init({"params": key, **rngs}, *inputs(y, self.nodes[0]), **kwargs))
            theta = variables.pop("params", {})
            if variables:
                raise ValueError(
                    f"The layer of an RKBlock keeps {', '.join(variables)} beside its parameters. Every step evaluates "
                    "it several times at different features, so that running statistics have no meaning there: use "
                    "LayerNorm, GroupNorm or rk_optax.networks.tv_norm instead of BatchNorm, or norm outside the block."
                )
            return theta

        def stacked(key: Any) -> Any:
            same = Controls.constant_in_time(first(key), self.nodes, self.basis, self.size).theta
            if self.constant_in_time:
                return same
            return jax.vmap(first)(jax.random.split(key, jax.tree.leaves(same)[0].shape[0]))

        def slope(theta: Any, y: Any, t: Any) -> Any:
            if self.initial is not None:
                return layer(theta, y, t)
            return layer.apply({"params": theta}, *inputs(y, t), rngs=rngs, **kwargs)

        controls = Controls(self.param("controls", stacked), tuple(self.nodes), self.basis)
        grid = self.nodes if self.grid is None else self.grid
        return integrate(slope, controls, y, grid, self.solver, remat=self.remat, report=self.report)
