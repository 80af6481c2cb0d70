"""What there is, read off the package, for the tests that all optimizers, tableaus and rules have to pass."""

import inspect

import rk_optax

ALIASES = {
    name: function
    for name, function in vars(rk_optax).items()
    if inspect.isfunction(function)
    and [*inspect.signature(function).parameters][:2] == ["loss_fn", "learning_rate"]
    and name not in ("runge_kutta", "scale_by_rk")
}
EXPLICIT = [name for name in ALIASES if name in rk_optax.TABLEAUS]
# Each for a first step size of h, which may be traced.
RULES = {
    "constant": lambda h: h,
    "dal": rk_optax.dal,
    "dal, difference": lambda h: rk_optax.dal(h, estimate="difference"),
    "dal, free": lambda h: rk_optax.dal(h, estimate="free"),
    "descent": rk_optax.descent_control,
    "error": lambda h: rk_optax.error_control(0.3, 1e-37, initial_step_size=h),
    "trust": rk_optax.trust_ratio_control,
    "path": rk_optax.path_control,
    "search": rk_optax.line_search,
    "sgd_g2": rk_optax.sgd_g2,
}
