"""What one update is: errors, against steps by hand in NumPy, Optax and closed forms."""

import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import PARAMS, X, loss_fn

import rk_optax

# --- Bad input -----------------------------------------------------------------------------------------------------
IMPLICIT_EULER = rk_optax.ButcherTableau("implicit Euler", [[1.0]], [1.0], [1.0], 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: rk_optax.rk4(loss_fn, 0.0), ValueError, r"learning_rate must be finite and positive, got 0\.0"),
        (lambda: rk_optax.rk4(loss_fn, -0.1), ValueError, r"must be finite and positive, got -0\.1.*schedule"),
        (lambda: rk_optax.rk4(loss_fn, jnp.array(-0.1)), ValueError, "learning_rate must be finite and positive"),
        (lambda: rk_optax.rk4(loss_fn, np.nan), ValueError, "learning_rate must be finite and positive, got nan"),
        (lambda: rk_optax.rk4(loss_fn, np.inf), ValueError, "learning_rate must be finite and positive, got inf"),
        (lambda: rk_optax.rk4(loss_fn, jnp.array(jnp.inf)), ValueError, "must be finite and positive, got inf"),
        (lambda: rk_optax.rk4(loss_fn, "0.1"), TypeError, "learning_rate must be a positive number.*'0.1'"),
        (lambda: rk_optax.rk4(loss_fn, True), TypeError, "learning_rate must be a positive number.*True"),
        (lambda: rk_optax.rk4(loss_fn, None), TypeError, "learning_rate must be a positive number.*None"),
        (lambda: rk_optax.rk4(loss_fn, 0.1j), TypeError, "learning_rate must be a positive number"),
        (lambda: rk_optax.rk4(loss_fn, [0.1]), TypeError, "learning_rate must be a positive number"),
        (lambda: rk_optax.rk4(loss_fn, np.ones(2)), TypeError, "learning_rate must be a positive number"),
        (lambda: rk_optax.rk4(loss_fn, jnp.ones(2)), ValueError, r"learning_rate must be a real scalar.*\(2,\)"),
        (lambda: rk_optax.rk4(loss_fn, jnp.array(True)), ValueError, "learning_rate must be a real scalar.*bool"),
        (lambda: rk_optax.rk4(None, 0.1), TypeError, "loss_fn is None: pass loss_fn, or grad_fn="),
        (lambda: rk_optax.rk4(0.1, loss_fn), TypeError, "loss_fn must be callable, got float"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, grad_fn=PARAMS), TypeError, "grad_fn must be callable, got dict"),
        (lambda: rk_optax.runge_kutta(loss_fn, 0.1, "RK5"), ValueError, "Unknown solver 'RK5'; did you mean 'rk4'"),
        (lambda: rk_optax.runge_kutta(loss_fn, 0.1, "zzz"), ValueError, "Unknown solver 'zzz'; known names: euler"),
        (lambda: rk_optax.runge_kutta(loss_fn, 0.1, None), TypeError, "solver must be a name, a ButcherTableau or"),
        (lambda: rk_optax.runge_kutta(loss_fn, 0.1, rk_optax.Explicit), TypeError, "an instance, not the class"),
        (lambda: rk_optax.Explicit(IMPLICIT_EULER), ValueError, "'implicit Euler' is not explicit"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=1.0), ValueError, r"momentum must be in \[0, 1\), got 1\.0"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=-0.1), ValueError, r"momentum must be in \[0, 1\), got -0\.1"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=np.nan), ValueError, r"momentum must be in \[0, 1\), got nan"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=True), ValueError, r"momentum must be in \[0, 1\), got True"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=np.float32(1.5)), ValueError, r"momentum must be in \[0, 1\)"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=jnp.array(1.5)), ValueError, r"momentum must be in \[0, 1\)"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum="0.9"), (TypeError, ValueError), "momentum must be"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentum=[0.9]), (TypeError, ValueError), "momentum must be"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, nesterov=True), ValueError, "nesterov=True does nothing without momentum"),
        (
            lambda: rk_optax.rk4(loss_fn, 0.1, momentum=0.9, after=optax.trace(0.9)),
            ValueError,
            "momentum and after are two ways.*pass one",
        ),
        (lambda: rk_optax.rk4(loss_fn, 0.1, momentun=0.9), TypeError, "'momentun'; did you mean 'momentum'"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, has_aus=True), TypeError, "'has_aus'; did you mean 'has_aux'"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, zzz=1), TypeError, "'zzz'; what every optimizer takes: grad_fn, has_aux"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, after=0.9), TypeError, "after must be an optax.GradientTransformation"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, stage_dtype=int), ValueError, "stage_dtype must be a real floating-point"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, stage_dtype="float33"), (TypeError, ValueError), "stage_dtype must be"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, stage_dtype=32), (TypeError, ValueError), "stage_dtype must be"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, stage_dtype="float64"), ValueError, "float64 needs.*jax_enable_x64"),
        (lambda: rk_optax.rk4(loss_fn, 0.1, has_auxx=True), TypeError, "has_auxx"),
        (lambda: rk_optax.scale_by_rk(loss_fn, 0.1, "rk4", momentum=0.9), TypeError, "momentum"),
    ],
)
def test_bad_arguments_are_refused_at_construction_with_what_to_do(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (lambda p: p["w"], {}, r"must return a scalar, got shape \(3,\): reduce it.*jnp\.mean"),
        (lambda p: jnp.sum(p["w"])[None], {}, r"must return a scalar, got shape \(1,\)"),
        (lambda p: jnp.argmax(p["w"]), {}, "real floating-point scalar, got int32"),
        (lambda p: jnp.sum(p["w"]) > 0, {}, "real floating-point scalar, got bool"),
        (lambda p: 3, {}, "real floating-point scalar, got int"),
        (lambda p: jnp.sum(p["w"]) * 1j, {}, "real floating-point scalar, got complex64"),
        (lambda p: (jnp.sum(p["w"]), 1.0), {}, "returned a tuple.*has_aux=True"),
        (lambda p: jnp.sum(p["w"]), {"has_aux": True}, r"must return \(loss, aux\)"),
        (lambda p: {"loss": jnp.sum(p["w"])}, {}, "real floating-point scalar, got dict"),
        (lambda p: None, {}, "real floating-point scalar, got NoneType"),
    ],
)
def test_a_loss_that_does_not_return_a_real_scalar_is_refused_with_what_to_do(loss, options, message):
    tx = rk_optax.rk4(loss, 0.1, **options)
    with pytest.raises(TypeError, match=message):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"w": PARAMS["w"]}, "updates must have the tree structure of params"),
        ({**PARAMS, "c": PARAMS["b"]}, "updates must have the tree structure of params"),
        ({**PARAMS, "b": None}, "updates must have the tree structure of params"),
        ({**PARAMS, "b": np.ones(3)}, r"updates must have the leaf shapes of params: at params\['b'\] got \(3,\)"),
        ({**PARAMS, "b": np.ones(())}, r"at params\['b'\] got \(\), expected \(2,\)"),
        ({**PARAMS, "b": np.ones(2) * 1j}, "updates are complex where params are real"),
    ],
)
def test_updates_unlike_params_are_refused(updates, message):
    tx = rk_optax.rk4(loss_fn, 0.1)
    with pytest.raises(ValueError, match=message):
        tx.update(updates, tx.init(PARAMS), PARAMS, x=X)


def test_params_left_out_are_an_error_that_shows_the_call():
    tx = rk_optax.rk4(loss_fn, 0.1)
    with pytest.raises(ValueError, match=re.escape("tx.update(grads, state, params, **data)")):
        tx.update(PARAMS, tx.init(PARAMS), x=X)


def test_a_schedule_that_returns_no_real_scalar_is_refused():
    tx = rk_optax.rk4(loss_fn, lambda count: jnp.ones(2))
    with pytest.raises(ValueError, match=r"learning_rate schedule must be a real scalar, got shape \(2,\)"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, x=X)
