"""Forward gradients of Flax Linen networks by perturbing activations instead of weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rk_optax import _checks
from rk_optax._arguments import read_data_function
from rk_optax.forward_gradient import keyed_field, mean_over_keys
from rk_optax.stochastic_field import StochasticField

PyTree = Any
Hook = Callable[[int, jax.Array], jax.Array]


class LocalLoss(nn.Module):
    """The end of a block with a loss of its own: hands the features on, without a gradient to what comes before.

    `activity_forward_gradient` trains the layers since the last such end by this loss alone. Elsewhere the losses are
    sown into the collection "local_losses", so that `apply(..., mutable=["local_losses"])` returns them.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from rk_optax.linen import LocalLoss
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, y):
    ...         x = nn.tanh(nn.Dense(8)(x))
    ...         x = LocalLoss()(x, (nn.Dense(1)(x)[:, 0] - y) ** 2)
    ...         return (nn.Dense(1)(x)[:, 0] - y) ** 2
    >>> x, y = jnp.ones((4, 3)), jnp.ones(4)
    >>> variables = Net().init(jax.random.key(0), x, y)
    >>> losses, sown = Net().apply({"params": variables["params"]}, x, y, mutable=["local_losses"])
    >>> losses.shape, sown["local_losses"]["LocalLoss_0"]["losses"][0].shape
    ((4,), (4,))
    """

    @nn.compact
    def __call__(self, features: PyTree, losses: jax.Array) -> PyTree:
        """The features as constants.

        Args:
          features: what the next block gets.
          losses: of the block that ends here, one for each example, shape (N,).
        """
        self.sow("local_losses", "losses", losses)
        return jax.lax.stop_gradient(features)


def activity_forward_gradient(
    loss_fn: Callable[..., Any],
    directions: int = 1,
    *,
    perturbed: type | tuple[type, ...] | Callable[[nn.Module], bool] = (nn.Dense, nn.DenseGeneral, nn.Conv),
    has_aux: bool = False,
    key_name: str = "key",
    argnames: Sequence[str] | None = None,
) -> StochasticField:
    """The forward gradient of a Linen network by activity perturbation, with or without local losses.

    The outputs z of the perturbed layers are moved along normal directions u, one for each example; the directional
    derivative of an example's loss times its u estimates the gradient with respect to z, and the layer's own backward
    pass, which reaches no other layer, makes the gradient of its weights from it. Weights behind the last perturbed
    output on the way to the loss, such as the readout where it is not perturbed, have their exact gradient. The mean
    is the gradient of the mean loss; the variance grows with the number of perturbed activations of an example, not
    with the number of weights, and falls with the number of examples.

    With `LocalLoss` in the network each block has its own loss, and the derivative of that alone: the variance of a
    layer does not grow with depth. The mean is then the gradient of the sum of all losses.

    >>> import flax.linen as nn, jax, jax.numpy as jnp, rk_optax
    >>> from rk_optax.linen import activity_forward_gradient
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         return nn.Dense(1, name="readout")(nn.tanh(nn.Dense(8)(x)))[:, 0]
    >>> net, x, y = Net(), jnp.ones((4, 3)), jnp.ones(4)
    >>> def losses_fn(params, x, y):  # one for each example
    ...     return (net.apply({"params": params}, x) - y) ** 2
    >>> field = activity_forward_gradient(losses_fn, perturbed=lambda layer: layer.name != "readout")
    >>> tx = rk_optax.heun(None, 0.1, grad_fn=field)
    >>> params = net.init(jax.random.key(0), x)["params"]
    >>> data = dict(x=x, y=y, key=jax.random.key(1))
    >>> updates, state = tx.update(field(params, **data), tx.init(params), params, **data)
    >>> jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    True

    Args:
      loss_fn: `loss_fn(params, *data) -> losses`, one for each example, shape (N,); or `(losses, aux)` with `has_aux`.
      directions: how many are averaged.
      perturbed: the classes of the layers whose outputs are moved, or a function that says so
        of a module inside of the network, by its name say.
      has_aux: as for `rk_optax.forward_gradient`.
      key_name: likewise.
      argnames: likewise.

    Returns:
      A field `field(params, *data, key=key)`, like params, for explicit solvers; see `rk_optax.StochasticField`.

    Raises:
      TypeError: `loss_fn` is not callable; when called, `losses` that are not a vector of real numbers.
      ValueError: `directions` is no positive integer, `has_aux` no bool; when called, nothing is perturbed, an output
        whose first axis is not that of the examples, BatchNorm in training mode, by which the examples' losses hang
        together. A layer inside `nn.scan`, `nn.remat` or `nn.vmap` cannot be perturbed: JAX reports a leaked tracer.

    Cost: two losses a direction, and two losses for the backward passes of the layers; solvers count one gradient.

    Source: Ren et al., "Scaling forward gradient with local losses", arXiv 2210.03310 (FG-A, LG-FG-A).
    """
    _checks.count(directions, "directions")
    has_aux = _checks.flag(has_aux, "has_aux")
    loss = read_data_function(loss_fn, "loss_fn", argnames)

    def chosen(module: nn.Module) -> bool:
        if isinstance(perturbed, type | tuple):
            return isinstance(module, perturbed)
        return module.name is not None and perturbed(module)  # the network itself has no name, and is no layer

    def estimate(params: PyTree, key: jax.Array, data: dict[str, Any]) -> Any:
        def evaluated(params: PyTree, hook: Hook) -> tuple[list[jax.Array], list[int], Any]:
            return _evaluated(lambda: loss(params, data), chosen, hook, has_aux)

        def along(key: jax.Array) -> tuple[list[jax.Array], Any]:
            """What the directional derivatives say of the gradient with respect to every perturbed output."""
            blocks: list[int] = []

            def moved(length: jax.Array) -> tuple[list[jax.Array], Any]:
                noises = []

                def hook(i: int, z: jax.Array) -> jax.Array:
                    noises.append(jax.random.normal(jax.random.fold_in(key, i), z.shape, z.dtype))
                    return z + length.astype(z.dtype) * noises[-1]

                losses, blocks[:], _ = evaluated(params, hook)
                return losses, noises

            at, one = jnp.zeros([]), jnp.ones([])
            _, slopes, noises = jax.jvp(moved, (at,), (one,), has_aux=True)
            pairs = zip(noises, blocks, strict=True)
            return [_outer(slopes[block], noise) for noise, block in pairs], ()

        cotangents, _ = mean_over_keys(along, key, directions)

        def local(params: PyTree) -> tuple[jax.Array, Any]:
            """A number whose gradient is the estimate: no path leads from one perturbed layer to another."""
            terms = []

            def hook(i: int, z: jax.Array) -> jax.Array:
                terms.append(jnp.sum(cotangents[i] * z))
                return jax.lax.stop_gradient(z)

            losses, _, aux = evaluated(params, hook)
            return functools.reduce(jnp.add, [*terms, *map(jnp.mean, losses)]), aux

        gradient, aux = jax.grad(local, has_aux=True)(params)
        return (gradient, aux) if has_aux else gradient

    return keyed_field(estimate, loss, key_name)


def _evaluated(
    call: Callable[[], Any], chosen: Callable[[nn.Module], bool], hook: Hook, has_aux: bool
) -> tuple[list[jax.Array], list[int], Any]:
    """The losses of all blocks, of which block each perturbed output is, and aux; `hook` replaces those outputs."""
    local: list[jax.Array] = []
    blocks: list[int] = []
    outputs: list[tuple[str, Any]] = []

    def intercept(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, result = context.module, method(*args, **kwargs)
        if context.method_name != "__call__":
            return result
        if isinstance(module, nn.BatchNorm):
            _check_batch_norm(module, *args[1:2], **kwargs)
        if isinstance(module, LocalLoss):
            local.append(kwargs["losses"] if "losses" in kwargs else args[1])
        elif chosen(module):
            outputs.append(("/".join(module.path), jnp.shape(result)))
            blocks.append(len(local))
            return hook(len(blocks) - 1, result)
        return result

    with nn.intercept_methods(intercept):
        result = call()
    losses, aux = result if has_aux else (result, ())
    if not outputs:
        raise ValueError("perturbed chooses no layer of this network, so there is nothing to estimate.")
    every = [*local, losses]
    for part in every:
        if jnp.ndim(part) != 1 or not jnp.issubdtype(jnp.result_type(part), jnp.floating):
            raise TypeError(
                "loss_fn and LocalLoss take one real loss for each example, shape (N,): got "
                f"{jnp.result_type(part)} of shape {jnp.shape(part)}. Leave out the mean over the batch."
            )
    for (path, shape), block in zip(outputs, blocks, strict=True):
        if shape[:1] != every[block].shape:
            raise ValueError(
                f"perturbed: the output of {path} has shape {shape}, and its block has {every[block].shape[0]} losses. "
                "The first axis must be that of the examples: reshape inside of the layer, or do not perturb it."
            )
    return every, blocks, aux


def _check_batch_norm(module: nn.BatchNorm, use_running_average: bool | None = None, **others: Any) -> None:
    del others
    if not nn.merge_param("use_running_average", module.use_running_average, use_running_average):
        raise ValueError(
            "BatchNorm in training mode makes the loss of an example depend on the others, whose directions are "
            "their own: use LayerNorm or GroupNorm, or use_running_average=True."
        )


def _outer(slopes: jax.Array, noise: jax.Array) -> jax.Array:
    """(∂L_n·u) u_n/N of each example, the gradient of the mean loss with respect to its part of the output."""
    slopes = slopes.reshape(-1, *([1] * (noise.ndim - 1))) / len(slopes)
    return slopes.astype(noise.dtype) * noise
