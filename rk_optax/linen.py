"""A Flax Linen `TrainState` whose `apply_gradients` hands the loss's data on to the solver.

The stock class calls `tx.update(grads, opt_state, params)` and nothing else, so a solver could not evaluate its
stages. This one has the same fields, `create` and serialization, and one argument more: `data`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import optax

try:
    from flax.training import train_state
except ImportError as error:
    raise ImportError("rk_optax.linen needs Flax: pip install 'rk-optax[flax]'") from error


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
