"""Every kind of learning rate becomes a schedule, and a bad one says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rk_optax import Reason
from rk_optax.step_size import as_schedule

ZERO = jnp.zeros([], jnp.int32)


@pytest.mark.parametrize("rate", [0.25, 1, np.float64(0.25), np.float32(0.25), np.int32(2), np.array(0.25)])
def test_a_number_stays_a_python_float_that_promotes_nothing(rate):
    h = as_schedule(rate)(ZERO)
    assert type(h) is float
    assert h == float(rate)
    assert (jnp.ones(1, jnp.bfloat16) * h).dtype == jnp.bfloat16


def test_a_python_number_keeps_all_its_digits():
    assert as_schedule(0.1)(ZERO) == 0.1  # which float32 does not hold


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_a_jax_scalar_is_taken_as_it_is(dtype):
    h = as_schedule(jnp.asarray(2, dtype))(ZERO)
    assert (h, h.dtype, h.shape) == (2, dtype, ())


def test_a_jax_scalar_may_be_zero_where_a_number_may_not():
    assert as_schedule(jnp.array(0.0))(ZERO) == 0.0
    with pytest.raises(ValueError, match="schedule that returns 0"):
        as_schedule(0.0)


def test_a_traced_rate_is_taken_without_being_read():
    np.testing.assert_array_equal(jax.jit(lambda rate: as_schedule(rate)(ZERO))(-3.0), -3.0)
    np.testing.assert_array_equal(jax.vmap(lambda rate: as_schedule(rate)(ZERO))(jnp.arange(3.0)), [0.0, 1.0, 2.0])


def test_a_complex_rate_from_inject_hyperparams_is_its_real_part():
    h = as_schedule(jnp.asarray(0.5, jnp.complex64))(ZERO)
    assert (h, h.dtype) == (0.5, jnp.float32)


@pytest.mark.parametrize("rate", [jnp.array(0.1 + 0.1j), jnp.array(0.1j)])
def test_a_rate_with_an_imaginary_part_is_refused(rate):
    with pytest.raises((TypeError, ValueError), match="learning_rate must be"):
        as_schedule(rate)


@pytest.mark.parametrize(
    "schedule",
    [
        optax.constant_schedule(0.5),
        lambda count: 0.5,
        lambda count: np.float64(0.5),
        lambda count: jnp.float32(0.5),
        lambda count: np.array(0.5),
    ],
)
def test_a_schedule_gives_a_real_scalar_array(schedule):
    h = as_schedule(schedule)(ZERO)
    assert isinstance(h, jax.Array)
    assert (h, h.shape) == (0.5, ())


def test_a_schedule_is_called_with_the_count():
    schedule = as_schedule(optax.linear_schedule(1.0, 0.0, 10))
    np.testing.assert_allclose([schedule(jnp.int32(n)) for n in (0, 5, 10)], [1.0, 0.5, 0.0], atol=1e-7)


@pytest.mark.parametrize("bad", [jnp.ones(2), np.ones((1, 1)), True, jnp.array(False)])
def test_a_schedule_that_gives_no_real_scalar_is_refused(bad):
    with pytest.raises(ValueError, match="learning_rate schedule must be a real scalar"):
        as_schedule(lambda count: bad)(ZERO)


@pytest.mark.parametrize("rate", [0, -1, -0.0, np.nan, np.inf, -np.inf, np.float32(-1), np.array(-2.0)])
def test_a_number_that_is_not_finite_and_positive_is_refused(rate):
    with pytest.raises(ValueError, match=r"learning_rate must be finite and positive, got .*already steps downhill"):
        as_schedule(rate)


@pytest.mark.parametrize("rate", [-1.0, np.nan, np.inf])
def test_a_concrete_jax_scalar_that_is_not_finite_or_negative_is_refused(rate):
    with pytest.raises(ValueError, match="learning_rate must be finite and positive"):
        as_schedule(jnp.array(rate))


@pytest.mark.parametrize("rate", ["0.1", None, True, np.True_, 0.1j, [0.1], {"lr": 0.1}, np.ones(1), np.array("a")])
def test_what_is_not_a_rate_at_all_is_refused(rate):
    with pytest.raises(TypeError, match="learning_rate must be a positive number, a JAX scalar or an Optax schedule"):
        as_schedule(rate)


@pytest.mark.parametrize("rate", [jnp.ones(2), jnp.ones((1, 1)), jnp.array(True)])
def test_a_jax_array_that_is_no_real_scalar_is_refused(rate):
    with pytest.raises(ValueError, match="learning_rate must be a real scalar, got shape"):
        as_schedule(rate)


def test_every_reason_has_a_sentence_of_its_own():
    messages = [Reason(int(reason)).message for reason in Reason]
    assert len(set(messages)) == len(messages) >= 3
    assert all(len(message.split()) >= 3 for message in messages)
    assert Reason.ACCEPTED == 0
