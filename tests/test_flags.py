"""Every argument that is True or False refuses all else: "no" would be taken for True, and 0 for what was not meant.

The flags are read off the signatures and the fields of all that is public: a new one without its check fails here.
"""

import dataclasses
import inspect

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rk_optax
import rk_optax.linen
import rk_optax.networks
import rk_optax.nnx
import rk_optax.spectrum

pytestmark = pytest.mark.latest


def loss_fn(params, x):
    return jnp.sum((params - x) ** 2)


LOSS = rk_optax.LeastSquares(lambda params, x: params - x)  # for those that need its structure
W, X = jnp.ones(2), {"x": jnp.zeros(2)}
GRID = (0.0, 1.0)
CONTROLS = rk_optax.networks.Controls.constant_in_time({"kernel": jnp.eye(2), "bias": jnp.zeros(2)}, GRID)
SINGLE = rk_optax.networks.single
# Those that cannot be called with a loss and a learning rate, nor with nothing: what they are called with.
ARGUMENTS = {
    "Explicit": (rk_optax.TABLEAUS["rk4"],),
    "SmoothField": (jax.grad(loss_fn),),
    "VectorField": (jax.grad(loss_fn),),
    "forward_gradient": (loss_fn,),
    "game": ({"a": lambda p: p["a"] * p["b"], "b": lambda p: -p["a"] * p["b"]}, 0.1),
    "gradient_flow": (LOSS, W, GRID),
    "linen.RKBlock": (flax.linen.Dense(2), GRID),
    "linen.activity_forward_gradient": (loss_fn,),
    "networks.initial": (jax.random.key(0), SINGLE, 2),
    "networks.integrate": (SINGLE, CONTROLS, jnp.ones((1, 2)), GRID),
    "networks.local_report": (SINGLE, CONTROLS, jnp.ones((2, 1, 2)), GRID, jax.random.key(0), "heun"),
    "nnx.Optimizer": (None, None),
    "nnx.RKBlock": (lambda rngs: flax.nnx.Linear(2, 2, rngs=rngs), GRID),
    "nnx.pure_loss": (loss_fn,),
    "spectrum.density": (LOSS, W),
    "spectrum.eigenpairs": (LOSS, W, 1),
    "spectrum.matrix_product": (LOSS, W),
}
KEYWORDS = {
    "gradient_flow": {"data": X},
    "nnx.Optimizer": {"wrt": flax.nnx.Param},
    "nnx.RKBlock": {"rngs": flax.nnx.Rngs(0)},
    **{name: {"data": X} for name in ARGUMENTS if name.startswith("spectrum.")},
}


def public():
    yield from ((name, getattr(rk_optax, name)) for name in rk_optax.__all__)
    for room in (rk_optax.networks, rk_optax.spectrum, rk_optax.linen, rk_optax.nnx):
        short = room.__name__.removeprefix("rk_optax.")
        own = [name for name, member in vars(room).items() if getattr(member, "__module__", "") == room.__name__]
        for name in getattr(room, "__all__", own):
            if not name.startswith("_"):
                yield f"{short}.{name}", getattr(room, name)


def is_flag(annotation, default):
    """What is a bool or an array is no flag: it is a result, which may be traced."""
    return annotation in (bool, "bool") or (isinstance(default, bool) and "Array" not in str(annotation))


def flags():
    for name, member in public():
        if not callable(member) or (isinstance(member, type) and issubclass(member, dict)):
            continue  # a dict has no signature
        made_by = [member, member.__init__] if isinstance(member, type) else [member]  # NNX shows the latter
        parameters = [p for function in made_by for p in inspect.signature(function).parameters.values()]
        found = {p.name for p in parameters if is_flag(p.annotation, p.default)}
        if dataclasses.is_dataclass(member):
            found |= {f.name for f in dataclasses.fields(member) if f.init and is_flag(f.type, f.default)}
        yield from ((name, member, flag) for flag in sorted(found))


FLAGS = list(flags())
CASES = [pytest.param(*case, id=f"{case[0]}-{case[2]}") for case in FLAGS]


def make(name, member, flag, value):
    first = [*inspect.signature(member).parameters][:2]
    arguments = ARGUMENTS.get(name, (LOSS, 0.1) if first == ["loss_fn", "learning_rate"] else ())
    return member(*arguments, **KEYWORDS.get(name, {}), **{flag: value})


def test_the_flags_are_found():
    names = {(name, flag) for name, _, flag in FLAGS}
    assert {
        ("rk4", "nesterov"),
        ("Explicit", "unroll"),
        ("gradient_flow", "has_aux"),
        ("PathControl", "precise"),
    } < names
    assert set(ARGUMENTS) <= {name for name, _ in names}


@pytest.mark.parametrize(("name", "member", "flag"), CASES)
def test_a_flag_is_true_or_false_and_known_when_the_program_is_compiled(name, member, flag):
    for value in ("no", 1, 0.0, None, jnp.array(True)):
        with pytest.raises(ValueError, match=f"^{flag} must be True or False, got "):
            make(name, member, flag, value)
    with pytest.raises(ValueError, match=f"^{flag} is static: the program is compiled for it"):
        jax.eval_shape(lambda value: [make(name, member, flag, value), 0][1], jnp.array(True))


def test_a_boolean_of_numpy_is_one():
    assert rk_optax.Explicit(rk_optax.TABLEAUS["rk4"], unroll=np.True_).unroll is True
