"""The traced families: order conditions at random parameters, and training over a family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rk_optax
from rk_optax import Explicit
from rk_optax.networks import families, integrate

from .cases import NODES, controls, features, largest_difference, layer, order

FAMILIES = {
    "rk2": (families.rk2, 1, 2),
    "rk3": (families.rk3, 2, 3),
    "rk4": (families.rk4, 2, 4),
    "u1": (families.rk4_u1, 1, 4),
    "u2": (families.rk4_u2, 1, 4),
    "u3": (families.rk4_u3, 1, 4),
}


def conditions(a, b, c):
    """The conditions of order 1 to 4, as they are in every textbook: their defects, order by order."""
    ac = a @ c
    return [
        [b.sum() - 1],
        [b @ c - 1 / 2],
        [b @ c**2 - 1 / 3, b @ ac - 1 / 6],
        [b @ c**3 - 1 / 4, (b * c) @ ac - 1 / 8, b @ (a @ c**2) - 1 / 12, b @ (a @ ac) - 1 / 24],
    ]


def square(tableau):
    a = np.zeros((tableau.stages,) * 2)
    for i, row in enumerate(tableau.rows, start=1):
        a[i, :i] = row
    return a, np.array(tableau.b, float), np.array(tableau.c, float)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.usefixtures("x64")
def test_order_conditions_at_random_parameters(name):
    member, parameters, expected = FAMILIES[name]
    for us in np.random.default_rng(0).uniform([0.1, 0.7], [0.4, 0.95], size=(20, 2))[:, :parameters]:
        a, b, c = square(member(*us))
        np.testing.assert_allclose(a.sum(axis=1), c, atol=1e-13)
        for defects in conditions(a, b, c)[:expected]:
            np.testing.assert_allclose(defects, 0, atol=1e-12)
        traced = jax.jit(lambda *us: (lambda t: (t.rows, t.b))(member(*us)))(*us)
        assert largest_difference(traced, (member(*us).rows, member(*us).b)) < 1e-13


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_members_are_the_fixed_tableaus_and_a_new_parameter_compiles_nothing():
    block, y = controls(), features()
    traces = []

    @jax.jit
    def run(u):
        traces.append(u)
        return integrate(layer, block, y, NODES, families.rk4_u2(u))

    assert largest_difference(run(1 / 3), integrate(layer, block, y, NODES, "rk4")) < 1e-14
    assert largest_difference(run(0.5), run(1 / 3)) > 1e-6
    assert len(traces) == 1
    for member, name in ((families.rk2(1.0), "heun"), (families.rk3(0.5, 1.0), "kutta3")):
        fixed = integrate(layer, block, y, NODES, name)
        assert largest_difference(integrate(layer, block, y, NODES, member), fixed) < 1e-14
    # An optimizer takes them as well as a network.
    tx = rk_optax.scale_by_rk(lambda w: jnp.sum(w**4), 0.1, Explicit(families.rk4_u2(1 / 3)))
    fixed = rk_optax.scale_by_rk(lambda w: jnp.sum(w**4), 0.1, "rk4")
    w = jnp.array([1.0, 2.0])
    step = [t.update(4 * w**3, t.init(w), w)[0] for t in (tx, fixed)]
    np.testing.assert_allclose(step[0], step[1], rtol=1e-14)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["rk2", "u1", "u2", "u3"])
@pytest.mark.usefixtures("x64")
def test_the_slope_in_the_parameter_falls_with_the_local_order(name):
    member, _, expected = FAMILIES[name]
    block, y = controls((0, 1)), features()
    slope = jax.jit(
        jax.jacfwd(lambda u, h: integrate(layer, block, y, jnp.array([0, 1]) * h, member(u))), static_argnums=()
    )

    def sizes(n):
        return float(jnp.abs(slope(0.4, 1 / n)).max())

    assert expected + 0.6 < order(sizes, (8, 16)) < expected + 1.5


@pytest.mark.usefixtures("x64")
def test_stages_at_one_time_are_known_where_the_family_has_them():
    rate = functools.partial(integrate, lambda theta, y, t: t * 7 - 2 * y, controls(), features(), (0, 0.5))
    for member in (families.rk4_u1(0.3), families.rk4_u2(0.3), families.rk4_u3(0.3)):
        stiffness = rate(member, report=["stiffness"])[1].stiffness
        if member.name == "rk4_u2" or member.name == "rk4_u1":
            np.testing.assert_allclose(stiffness, 2.0, rtol=1e-9)
    assert rate(families.rk2(0.5), report=["error"])[1].error.shape == (1, 4)


def test_sampling_stays_near_and_returns_and_switching_obeys_its_probabilities():
    keys = jax.random.split(jax.random.key(0), 4000)
    us = np.asarray(jax.vmap(lambda key: families.smoothed(key, 1 / 3, 0.05))(keys))
    assert np.abs(us - 1 / 3).max() <= 0.1 + 1e-6
    # |Cauchy| exceeds 2 with probability 1 − (2/π) arctan 2 = 0.295.
    assert np.mean(us == np.float32(1 / 3)) == pytest.approx(0.295, abs=0.03)
    assert np.mean(np.abs(us - 1 / 3) <= 0.05) == pytest.approx(0.295 + 0.5, abs=0.03)
    drawn = np.asarray(
        jax.vmap(lambda key: families.switched(key, jnp.array([0.25, 0.5]), jnp.array([0.2, 0.8])))(keys)
    )
    assert np.mean(drawn == 0.5) == pytest.approx(0.8, abs=0.03)


@pytest.mark.usefixtures("x64")
def test_an_ensemble_is_the_mean_of_its_members():
    block, y = controls(), features()

    def run(u):
        return integrate(layer, block, y, NODES, families.rk2(u))

    mean = families.averaged(run, jnp.array([0.5, 1.0]))
    assert largest_difference(mean, (run(0.5) + run(1.0)) / 2) < 1e-14


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: families.rk2(0.0), "u must be a finite number away from 0"),
        (lambda: families.rk4_u2(np.nan), "u must be"),
        (lambda: families.rk3(2 / 3, 0.5), "0.667"),
        (lambda: families.rk3(0.5, 0.5), "u and v must differ"),
        (lambda: families.rk4(0.5, 0.25), "u must be"),
        (lambda: families.rk4(0.25, 1.0), "v must be"),
    ],
)
def test_parameters_at_a_pole_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
