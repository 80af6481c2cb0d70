"""Activity perturbation in Linen networks: right in the mean, of the variance of the paper, each block by its loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rk_optax import forward_gradient
from rk_optax.linen import LocalLoss, activity_forward_gradient

KEY = jax.random.key(5)
rng = np.random.default_rng(0)
X, Y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 4), (3,)))


class Net(nn.Module):
    """A skip connection, a layer with parameters that is not perturbed, a readout; with local losses or without."""

    local: bool = False

    @nn.compact
    def __call__(self, x, y):
        x = self.perturb("first_output", nn.Dense(5, name="first")(x))
        x = nn.LayerNorm(name="norm")(nn.tanh(x))
        if self.local:
            x = LocalLoss()(x, (nn.Dense(1, name="head")(x)[:, 0] - y) ** 2)
        second = self.perturb("second_output", nn.Dense(5, name="second")(x))
        x = x + nn.tanh(second)
        return (nn.Dense(1, name="readout")(x)[:, 0] - y) ** 2


def perturbed(layer):
    return layer.name.startswith(("first", "second"))


def losses_of(net):
    def losses_fn(params, x, y):
        return net.apply({"params": params}, x, y)

    return losses_fn


PARAMS = jax.jit(Net(local=True).init)(KEY, X, Y)["params"]


def estimates(field, params=PARAMS, count=20_000):
    draw = jax.jit(jax.vmap(lambda key: field(params, X, Y, key=key)))
    # Means over so many numbers lose digits in float32.
    return jax.tree.map(lambda x: np.asarray(x, float), draw(jax.random.split(KEY, count)))


def gradient_of_outputs(net):
    """∂/∂z of every example's losses, by Flax's own `perturb` and reverse mode."""

    def total(perturbations):
        variables = {"params": PARAMS, "perturbations": perturbations}
        losses, sown = net.apply(variables, X, Y, mutable=["local_losses"])
        return losses.sum() + sum(x.sum() for x in jax.tree.leaves(sown))

    gradient = jax.jit(jax.grad(total))({f"{name}_output": jnp.zeros((3, 5)) for name in ("first", "second")})
    return {name.removesuffix("_output"): leaf for name, leaf in gradient.items()}


def exact_gradient(net):
    def total(params):
        losses, sown = net.apply({"params": params}, X, Y, mutable=["local_losses"])
        return losses.mean() + sum(x.mean() for x in jax.tree.leaves(sown))

    return jax.jit(jax.grad(total))(PARAMS)


@pytest.mark.parametrize("local", [False, True], ids=["FG-A", "LG-FG-A"])
def test_the_mean_is_the_gradient_and_the_variance_is_the_formula(local):
    net = Net(local)
    values = estimates(activity_forward_gradient(losses_of(net), perturbed=perturbed))
    exact = exact_gradient(net)
    for value, mean in zip(jax.tree.leaves(values), jax.tree.leaves(exact), strict=True):
        error = value.std(0) / np.sqrt(len(value))
        np.testing.assert_array_less(np.abs(value.mean(0) - mean), 4.5 * error + 1e-5)
    for name in ("readout", "head"):  # no perturbed output behind them: exact
        np.testing.assert_allclose(values[name]["kernel"][0], exact[name]["kernel"], rtol=1e-4, atol=1e-6)
    # Of a layer with q outputs: Σ_n ‖x_n‖² (q‖a_n‖² + ‖a_n of the layer‖²)/N², with a the gradient with respect to all
    # perturbed outputs of the layer's own block.
    a = {name: np.sum(np.square(g), axis=1) for name, g in gradient_of_outputs(net).items()}
    every = a if local else dict.fromkeys(a, a["first"] + a["second"])
    inputs = np.sum(np.square(X), axis=1)
    variance = np.var(values["first"]["kernel"], axis=0).sum()
    assert variance == pytest.approx(np.sum(inputs * (5 * every["first"] + a["first"])) / 9, rel=0.1)
    variance = np.var(values["second"]["bias"], axis=0).sum()
    assert variance == pytest.approx(np.sum(5 * every["second"] + a["second"]) / 9, rel=0.1)


def test_several_directions_divide_the_variance():
    net = Net()
    one, four = (
        estimates(activity_forward_gradient(losses_of(net), k, perturbed=perturbed))["first"]["kernel"] for k in (1, 4)
    )
    assert np.var(one, axis=0).sum() == pytest.approx(4 * np.var(four, axis=0).sum(), rel=0.1)
    np.testing.assert_allclose(four.mean(0), exact_gradient(net)["first"]["kernel"], atol=0.1)


def test_the_paper_s_variances_of_weights_and_activities_over_batches_drawn_from_the_data():
    """(pq+2)/N·V + (pq+1)·S by weights, (q+2)/N·V + (q+1)/N·S by activities: averages over the p × q weights.

    V is the variance of the gradient over the examples, S the square of its mean. Ren et al., section 3.
    """
    p, q, n = 3, 2, 4
    layer = nn.Dense(q, use_bias=False)
    points, slopes = (jnp.asarray(rng.normal(size=(6, k)) + 0.5, jnp.float32) for k in (p, q))
    params = {"kernel": jnp.ones((p, q))}

    def losses_fn(params, x, a):  # linear: ∂L/∂z is a
        return jnp.sum(layer.apply({"params": params}, x) * a, axis=1)

    def mean_loss(params, x, a):
        return losses_fn(params, x, a).mean()

    gradients = np.einsum("ni,nj->nij", points, slopes)
    v, s = np.mean(np.var(gradients, axis=0)), np.mean(np.mean(gradients, axis=0) ** 2)

    def variance(field):
        def draw(key):
            chosen = jax.random.choice(jax.random.fold_in(key, 0), 6, (n,))
            return field(params, points[chosen], slopes[chosen], key=jax.random.fold_in(key, 1))["kernel"]

        return np.mean(np.var(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 40_000)), axis=0))

    by_weights, by_activities = variance(forward_gradient(mean_loss)), variance(activity_forward_gradient(losses_fn))
    assert by_weights == pytest.approx((p * q + 2) / n * v + (p * q + 1) * s, rel=0.06)
    assert by_activities == pytest.approx((q + 2) / n * v + (q + 1) / n * s, rel=0.06)


def test_a_function_is_asked_of_layers_and_not_of_the_network():
    asked = []
    field = activity_forward_gradient(losses_of(Net()), perturbed=lambda layer: asked.append(layer.name) or True)
    jax.eval_shape(lambda key: field(PARAMS, X, Y, key=key), KEY)
    assert set(asked) == {"first", "norm", "second", "readout"}


def test_aux_is_handed_on_and_keys_are_fresh_at_every_stage():
    def losses_fn(params, x, y):
        losses = Net().apply({"params": params}, x, y)
        return losses, losses.sum()

    field = activity_forward_gradient(losses_fn, has_aux=True)
    assert field.keys == ("key",)
    aux, expected = jax.jit(lambda key: (field(PARAMS, X, Y, key=key)[1], losses_fn(PARAMS, X, Y)[1]))(KEY)
    np.testing.assert_allclose(aux, expected, rtol=1e-6)


class Odd(nn.Module):
    """What cannot be perturbed."""

    kind: str

    @nn.compact
    def __call__(self, x, y):
        if self.kind == "norm":
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(2)(x))
        elif self.kind == "inferred norm":
            x = nn.BatchNorm()(nn.Dense(2)(x), True)
        elif self.kind == "reshaped":
            x = nn.Dense(2)(x.reshape(-1, 2)).reshape(len(x), -1)
        elif self.kind == "none":
            x = jnp.tanh(x)
        elif self.kind == "remat":
            x = nn.remat(nn.Dense)(2)(x)
        losses = (x.sum(axis=1) - y) ** 2
        return losses.mean() if self.kind == "mean" else losses


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("norm", ValueError, r"BatchNorm in training mode.*LayerNorm"),
        ("reshaped", ValueError, r"output of Dense_0 has shape \(6, 2\), and its block has 3 losses"),
        ("none", ValueError, "chooses no layer"),
        ("remat", jax.errors.UnexpectedTracerError, "leaked"),
    ],
)
def test_what_cannot_be_perturbed_says_so(kind, error, message):
    net = Odd(kind)
    params = jax.jit(net.init)(KEY, X, Y).get("params", {})

    def losses_fn(params, x, y):
        return net.apply({"params": params}, x, y, mutable=["batch_stats"])[0]

    with pytest.raises(error, match=message):
        activity_forward_gradient(losses_fn)(params, X, Y, key=KEY)


def test_a_mean_is_refused_and_batch_norm_with_running_averages_is_not():
    params = jax.jit(Net().init)(KEY, X, Y)["params"]
    field = activity_forward_gradient(lambda p, x, y: Net().apply({"params": p}, x, y).mean())
    with pytest.raises(TypeError, match="one real loss for each example"):
        field(params, X, Y, key=KEY)
    net = Odd("inferred norm")
    variables = jax.jit(net.init)(KEY, X, Y)
    rest = {"batch_stats": variables["batch_stats"]}
    field = activity_forward_gradient(lambda p, x, y: net.apply({"params": p, **rest}, x, y))
    assert jax.tree.structure(field(variables["params"], X, Y, key=KEY)) == jax.tree.structure(variables["params"])
