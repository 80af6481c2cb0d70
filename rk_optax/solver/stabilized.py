"""Chebyshev- and Legendre-stabilised explicit methods: with s gradients, a stable step as long as s² of Euler's."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rk_optax import _checks, _tree
from rk_optax.field import Capability, VectorField
from rk_optax.solver._base import Cost, Quantity, Solver, Step, check_offers

PyTree = Any
Family = Literal["rkc1", "rkc2", "rkl1", "rkl2"]

# The damping of the literature, made for parabolic equations; see `Stabilized`.
_USUAL_DAMPING = {"rkc1": 0.05, "rkc2": 2 / 13, "rkl1": 0.0, "rkl2": 0.0}


class StabilizedState(NamedTuple):
    """State of a `Stabilized` solver that chooses its stages."""

    spectral_radius: jax.Array  # shape=(), float: ρ, the latest estimate, safety factor included; 0 before the first
    stages: jax.Array  # shape=(), int32: stages of the latest step
    age: jax.Array  # shape=(), int32: steps since ρ was estimated; `estimate_every` where an estimate is due
    eigenvector: PyTree  # like params, of length 1: where the power method starts the next time; 0 before the first


@dataclasses.dataclass(frozen=True)
class Stabilized(Solver):
    """RKC (Chebyshev) or RKL (Legendre) of order 1 or 2, with s stages or as many as the curvature asks for.

    A step costs s gradients, k1 included, and is stable for h·λ up to `real_stability_interval`: about 2s² ("rkc1"),
    0.65s² ("rkc2"), s² + s ("rkl1") and (s² + s − 2)/2 ("rkl2"). Memory beside params: two trees, k1 and the newest
    gradient, whatever s is; the loss is traced once, whatever s is.

    With `stages="auto"` the spectral radius ρ of the field's Jacobian is estimated by the nonlinear power method of the
    RKC code, one gradient an iteration and one to find how long a difference can be, at the first step, then every
    `estimate_every` steps and after a refused step;
    s is the least number for which h·ρ is stable. An h that needs more than `max_stages` is refused (NOT_SOLVED). An
    estimate can be too low, so use a learning rate that checks each step, such as `rk_optax.descent_control()`.

    Args:
      family: "rkc1", "rkc2", "rkl1" or "rkl2"; the digit is the order.
      stages: s of every step, at least 2, or "auto".
      damping: ε ≥ 0 of the Chebyshev families, by default that of the literature (0.05 and 2/13). Interior modes shrink
        by about 1/(1 + ε) per step (order 1) *whatever s is*: fine for parabolic equations, slow for optimisation,
        where 1 to 5 does far better at the price of a shorter interval. RKL has no such parameter.
      max_stages: bound on the stages of "auto".
      estimate_every: accepted steps between estimates of ρ ("auto").
      power_iterations: bound on the gradients of one estimate ("auto").
      safety: factor on the estimate of ρ, which comes from below ("auto").

    Raises:
      ValueError: an argument out of its range, or damping with "rkl1" or "rkl2".

    Source: Sommeijer, Shampine and Verwer (1998) and Verwer, Sommeijer and Hundsdorfer (2004) for RKC; Meyer, Balsara
      and Aslam (2014) for RKL; Eftekhari et al. (2021) for RKC as an optimiser.
    """

    family: Family = "rkc1"
    stages: int | Literal["auto"] = "auto"
    damping: float | None = None
    max_stages: int = 500
    estimate_every: int = 25
    power_iterations: int = 50
    safety: float = 1.2

    def __post_init__(self):
        if self.family not in _USUAL_DAMPING:
            raise ValueError(f"family must be one of {', '.join(_USUAL_DAMPING)}, got {self.family!r}.")
        if self.stages != "auto" and (_checks.count(self.stages, "stages") < 2):
            raise ValueError("stages must be 'auto' or at least 2: with one stage the method is rk_optax.euler.")
        if self.damping is not None:
            if self.family in ("rkl1", "rkl2"):
                raise ValueError(f"damping is a parameter of the Chebyshev families; {self.family!r} has none.")
            _checks.number(self.damping, "damping", "not negative")
        for name in ("max_stages", "estimate_every", "power_iterations"):
            _checks.count(getattr(self, name), name)
        if self.max_stages < 2:
            raise ValueError(f"max_stages must be at least 2, got {self.max_stages}.")
        if not _checks.number(self.safety, "safety", "positive") >= 1:
            raise ValueError(f"safety must be at least 1, got {self.safety}.")

    @property
    def needs(self) -> frozenset[Capability]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """No noise in the differences of the power method, where that finds s."""
        return frozenset({"deterministic"}) if self.stages == "auto" else frozenset()

    @property
    def gradients_per_step(self) -> int | None:
        """s, where it is fixed."""
        return None if self.stages == "auto" else self.stages

    @property
    def order(self) -> int:
        """Order of a step."""
        return int(self.family[-1])

    @property
    def error_order(self) -> int | None:
        """Order of the embedded error estimate, of which only the methods of order 2 have one."""
        return 2 if self.order == 2 else None

    def real_stability_interval(self, stages: int) -> float:
        """The largest h·λ, for a curvature λ, at which a step of `stages` stages does not grow.

        >>> round(Stabilized("rkc1").real_stability_interval(10), 1)
        193.6
        """
        return _interval(self.family, stages, self._damping)

    def init(self, params: PyTree) -> PyTree:
        """No estimate yet; the power method starts from k1."""
        if self.stages != "auto":
            return ()
        return StabilizedState(
            jnp.zeros([], _tree.default_float()),
            jnp.zeros([], jnp.int32),
            jnp.full([], self.estimate_every, jnp.int32),
            jax.tree.map(jnp.zeros_like, params),
        )

    def step(
        self,
        field: VectorField,
        params: PyTree,
        k1: PyTree,
        h: Any,
        state: PyTree,
        *,
        wants: frozenset[Quantity] = frozenset(),
    ) -> Step:
        """One step; see `Solver.step`. An error estimate costs one gradient more."""
        check_offers(self, wants, "This step")
        want_error = "error" in wants
        if self.stages == "auto":
            return self._automatic_step(field, params, k1, h, state, want_error)
        table = jnp.asarray(_coefficients(self.family, self.stages, self._damping))
        direction = _recurrence(field, params, k1, h, table, self.stages)
        error = _error(field, params, k1, h, direction, self.stages) if want_error else None
        return Step(direction, Cost(gradients=self.stages + want_error), quantities=_quantities(error), state=state)

    @property
    def _damping(self) -> float:
        return _USUAL_DAMPING[self.family] if self.damping is None else float(self.damping)

    def _automatic_step(
        self, field: VectorField, params: PyTree, k1: PyTree, h: Any, state: StabilizedState, want_error: bool
    ) -> Step:
        due = state.age >= self.estimate_every
        radius, eigenvector, spent = jax.lax.cond(
            due,
            lambda: self._estimate(field, params, k1, h, state),
            lambda: (state.spectral_radius, state.eigenvector, jnp.zeros([], jnp.int32)),
        )
        choices, intervals, tables = _all_coefficients(self.family, self.max_stages, self._damping)
        stiffness = h * radius
        index = jnp.searchsorted(jnp.asarray(intervals, radius.dtype), stiffness)
        fits = index < len(choices)
        index = jnp.minimum(index, len(choices) - 1)
        stages = jnp.where(fits, jnp.asarray(choices)[index], 0)  # 0: nothing is spent on a step that cannot be taken
        table = jnp.asarray(tables)[index]
        direction = _recurrence(field, params, k1, h, table, stages)
        error = _error(field, params, k1, h, direction, stages) if want_error else None
        known = jnp.isfinite(radius)
        age = jnp.where(known, jnp.where(due, 1, state.age + 1), self.estimate_every).astype(jnp.int32)
        # An estimate that is not finite, of one bad batch say, tells nothing: the last one is kept, and another is due.
        kept, eigenvector = _tree.select(known, (radius, eigenvector), (state.spectral_radius, state.eigenvector))
        new = StabilizedState(kept, stages, age, eigenvector)
        return Step(
            direction,
            Cost(gradients=jnp.maximum(stages, 1) + spent + int(want_error)),
            solved=fits,
            # Stages as a continuous function of h, or a controller that compares steps takes rounding for a loss.
            work=float(choices[0]) * jnp.sqrt(stiffness / float(intervals[0])),
            quantities=_quantities(error),
            largest_step=jnp.where(known, jnp.asarray(intervals[-1], radius.dtype) / radius, jnp.inf),
            state=new,
            # What was learnt of the curvature holds where we stay; one learnt elsewhere may be why the step failed.
            refused_state=new._replace(age=jnp.where(due & known, 0, self.estimate_every).astype(jnp.int32)),
        )

    def _estimate(
        self, field: VectorField, params: PyTree, k1: PyTree, h: Any, state: StabilizedState
    ) -> tuple[jax.Array, PyTree, jax.Array]:
        """ρ by the nonlinear power method, v ← (g(θ + εv) − g(θ))/ε with ‖v‖ = 1, one gradient an iteration.

        ε is as long as g can resolve: ε·ρ is √u of what rounding to u acts on, ‖k1‖ and the ‖Hz‖ of a z = ±θ, for
        which one gradient more is spent. So no length is absolute, none mixes leaves of different size, and one that
        the field does not see has no part in it.
        """
        dtype = state.spectral_radius.dtype
        roundoff = math.sqrt(max(_tree.unit_roundoff(params), field.rounding))

        # Compiled by itself, so that the loss is traced once for the two places that call it.
        field_at = jax.jit(lambda place: field(place, 0))

        def change_along(v: PyTree) -> PyTree:
            return jax.tree.map(jnp.subtract, field_at(jax.tree.map(jnp.add, params, v)), k1)

        signs = _tree.random_signs(jax.random.key(0), params)
        step = _tree.scale(roundoff, jax.tree.map(jnp.multiply, signs, params))
        change = change_along(step)
        response = _tree.norm(change) + roundoff * _tree.norm(k1)
        # A ρ to begin with. One too large costs an iteration; one too small would leave the place where H is sought.
        by_leaf = [
            _tree.ratio(_tree.norm(c), _tree.norm(s)).astype(response.dtype)
            for c, s in zip(jax.tree.leaves(change), jax.tree.leaves(step), strict=True)
        ]
        first = functools.reduce(jnp.maximum, by_leaf, jnp.zeros([], response.dtype))
        first = jnp.where(first > 0, first, _tree.ratio(jnp.ones_like(first), jnp.asarray(h, first.dtype)))
        known = jnp.isfinite(state.spectral_radius) & (state.spectral_radius > 0)
        first = jnp.where(known, state.spectral_radius.astype(first.dtype), first)

        def iterate(carry: Any) -> Any:
            v, scale, radius, _, i = carry
            length = _tree.ratio(response, scale)
            length = jnp.where(length > 0, length, roundoff)  # θ, g and h are 0, and nothing has a length
            change, size = _tree.unit(change_along(_tree.scale(length, v)))
            new = (size / length).astype(dtype)
            # A change that is zero or not finite has no direction: keep the old one.
            usable = jnp.isfinite(new) & (new > 0)
            scale = jnp.where(usable, new.astype(scale.dtype), scale)
            return _tree.select(usable, change, v), scale, new, radius, i + 1

        def go_on(carry: Any) -> jax.Array:
            *_, new, old, i = carry
            settled = (jnp.abs(new - old) <= 0.01 * new) & (i >= 2)
            return (i < self.power_iterations) & ~settled & (jnp.isfinite(new) | (i == 0))

        start = _tree.select(
            _tree.norm(state.eigenvector) > 0, _tree.cast_like(state.eigenvector, params), _spread(k1, params)
        )
        nothing = jnp.zeros([], dtype)
        v, _, radius, _, spent = jax.lax.while_loop(
            go_on, iterate, (_tree.unit(start)[0], first, nothing, nothing, jnp.zeros([], jnp.int32))
        )
        return self.safety * radius, _tree.cast_like(v, state.eigenvector), spent + 1


def _spread(k1: PyTree, params: PyTree) -> PyTree:
    """A start for the power method: k1, and a little of every direction, which k1 may be orthogonal to."""
    leaves, structure = jax.tree.flatten(k1)
    size = _tree.norm(k1)
    noise = [
        jax.random.normal(jax.random.key(i), jnp.shape(leaf), _tree.real_dtype(leaf)) for i, leaf in enumerate(leaves)
    ]
    factor = _tree.ratio(jnp.where(size > 0, 0.1 * size, 1), _tree.norm(noise))
    return structure.unflatten([leaf + factor.astype(n.dtype) * n for leaf, n in zip(leaves, noise, strict=True)])


def _recurrence(field: VectorField, params: PyTree, k1: PyTree, h: Any, table: jax.Array, stages: Any) -> PyTree:
    """g* = D_s of D_j = D_{j−1} + d_j, d_j = −ν_j d_{j−1} + σ_j D_{j−1} + κ_j g(θ − h D_{j−1}) + γ_j k1, D_1 = κ_1 k1.

    In displacements, θ_j = θ − h·D_j, because differences of the iterates, divided by h, lose all digits for small h;
    and by their increments, because the three-term recurrence in D itself has an error of 4e-5 in float32 after 200
    short stages. (What is left of D beside a straight line c_j k1 is better still for them, and useless for long ones.)
    """

    def stage(j: Any, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        displacement, increment = carry
        nu, excess, kappa, gamma = table[j - 1]
        k = field(_tree.add_scaled(params, -h, displacement), j - 1)
        new = _tree.scale(-nu, increment)
        for weight, tree in ((excess, displacement), (kappa, k), (gamma, k1)):
            new = _tree.add_scaled(new, weight, tree)
        return jax.tree.map(jnp.add, displacement, new), new

    first = _tree.scale(table[0, 2], k1)
    return jax.lax.fori_loop(2, stages + 1, stage, (first, first))[0]


def _error(field: VectorField, params: PyTree, k1: PyTree, h: Any, direction: PyTree, stages: Any) -> PyTree:
    """The RKC code's estimate (12(θ₀ − θ₁) − 6h(g₀ + g₁))/15, with g₁ the field at the end of the step."""
    end = field(_tree.add_scaled(params, -h, direction), stages - 1)
    return _tree.scale(h, jax.tree.map(lambda d, a, b: (12 * d - 6 * (a + b)) / 15, direction, k1, end))


def _quantities(error: PyTree | None) -> dict[Quantity, Any]:
    return {} if error is None else {"error": error}


@functools.cache
def _coefficients(family: str, s: int, damping: float) -> np.ndarray:
    """(ν_j, σ_j, κ_j, γ_j) for j = 1 to s, with σ_j = μ_j + ν_j − 1: an array (s, 4) in float64."""
    mu, nu, kappa, gamma = _three_term_coefficients(family, s, damping).T
    return np.stack([nu, np.where(mu == 0, 0, mu + nu - 1), kappa, gamma], axis=1)


def _three_term_coefficients(family: str, s: int, damping: float) -> np.ndarray:
    """(μ_j, ν_j, κ_j, γ_j) of D_j = μ_j D_{j−1} + ν_j D_{j−2} + κ_j g_{j−1} + γ_j k1, as the literature has them."""
    j = np.arange(2, s + 1, dtype=np.float64)
    table = np.zeros((s, 4))
    if family in ("rkl1", "rkl2"):
        mu, nu = (2 * j - 1) / j, (1 - j) / j
        if family == "rkl1":
            w1 = 2 / (s**2 + s)
            table[0, 2] = w1
            table[1:] = np.stack([mu, nu, mu * w1, 0 * j], axis=1)
            return table
        w1 = 4 / (s**2 + s - 2)
        n = np.arange(s + 1, dtype=np.float64)
        b = np.where(n >= 2, (n**2 + n - 2) / (2 * np.maximum(n, 1) * (n + 1)), 1 / 3)
        a = 1 - b  # Legendre polynomials are 1 at 1
        mu, nu = mu * b[2:] / b[1:-1], nu * b[2:] / b[:-2]
        kappa = (2 * j - 1) / j * b[2:] / b[1:-1] * w1
    else:
        w0 = 1 + damping / s**2
        t, dt, d2t = _chebyshev(s, w0)
        if family == "rkc1":
            w1 = t[s] / dt[s]
            table[0, 2] = w1 / w0
            mu = 2 * w0 * t[1:-1] / t[2:]
            table[1:] = np.stack([mu, 1 - mu, 2 * w1 * t[1:-1] / t[2:], 0 * j], axis=1)
            return table
        w1 = dt[s] / d2t[s]
        b = np.ones(s + 1)
        b[2:] = d2t[2:] / dt[2:] ** 2
        # Verwer, Sommeijer and Hundsdorfer's b₁ (2004); that of 1998, b₂, has the same stability polynomial.
        b[0], b[1] = b[2], 1 / w0
        a = 1 - b * t
        mu, nu = 2 * w0 * b[2:] / b[1:-1], -b[2:] / b[:-2]
        kappa = 2 * w1 * b[2:] / b[1:-1]
    table[0, 2] = b[1] * w1
    table[1:] = np.stack([mu, nu, kappa, -a[1:-1] * kappa], axis=1)
    return table


@functools.cache
def _interval(family: str, s: int, damping: float) -> float:
    """The real stability interval: where the argument of the polynomial reaches −1."""
    if family == "rkl1":
        return float(s**2 + s)
    if family == "rkl2":
        return (s**2 + s - 2) / 2
    w0 = 1 + damping / s**2
    t, dt, d2t = _chebyshev(s, w0)
    return float((w0 + 1) * (dt[s] / t[s] if family == "rkc1" else d2t[s] / dt[s]))


@functools.cache
def _all_coefficients(family: str, most: int, damping: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of stages to choose from, their intervals, and their coefficients (choice, most, 4), padded with zeros.

    From 20 on only about every twelfth part more, so that the tables stay small: 6 % of the gradients are too many.
    """
    grid = np.geomspace(20, max(most, 20), 1 + math.ceil(math.log(max(most, 20) / 20) / math.log(1.12)))
    choices = np.unique([*range(2, min(most, 20) + 1), *np.rint(grid[grid <= most + 0.5]).astype(int)]).astype(np.int32)
    choices = choices[choices <= most]
    tables = np.zeros((len(choices), most, 4))
    for table, s in zip(tables, choices, strict=True):
        table[:s] = _coefficients(family, int(s), damping)
    return choices, np.array([_interval(family, int(s), damping) for s in choices]), tables


def _chebyshev(s: int, x: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """T_j, T_j' and T_j'' at x for j = 0 to s, by their recurrences."""
    t, dt, d2t = np.zeros((3, s + 1))
    t[:2], dt[1] = (1, x), 1
    for j in range(2, s + 1):
        t[j] = 2 * x * t[j - 1] - t[j - 2]
        dt[j] = 2 * t[j - 1] + 2 * x * dt[j - 1] - dt[j - 2]
        d2t[j] = 4 * dt[j - 1] + 2 * x * d2t[j - 1] - d2t[j - 2]
    return t, dt, d2t
