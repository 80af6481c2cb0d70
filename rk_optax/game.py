"""Games: players that each descend a loss of their own, as one field that every solver integrates."""

from __future__ import annotations

import collections
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from rk_optax import _checks, _tree
from rk_optax._arguments import DataFunction, read_data_function
from rk_optax._options import with_options_of
from rk_optax.alias import AliasOptions
from rk_optax.field import SmoothField
from rk_optax.objective import scalar_loss
from rk_optax.solver import Solver, as_solver
from rk_optax.solver.alternating import Alternating
from rk_optax.step_size import LearningRate
from rk_optax.tableau import ButcherTableau
from rk_optax.transform import runge_kutta

PyTree = Any
Players = dict[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Drift:
    """What Euler's method adds to the flow of a game: Σ_j c_ij (∂F_i/∂θ_j) F_j for player i, beside F_i itself.

    The discrete steps of gradient descent do not follow the flow dθ/dt = −F(θ) of the game but, an order in h better,
    that of F with these terms. `rk_optax.game(..., drift=drift)` puts them into the field: an accurate solver then
    follows the discrete steps, and Euler's method with `-drift` follows the flow. j = i is the drift of a player by
    itself, which damps; j ≠ i that by the others, which in a zero-sum game of simultaneous steps drives the players
    away from the equilibrium, and in one of alternating steps may bring them to it.

    >>> drift = Drift.alternating(0.1, ("discriminator", "generator"))
    >>> drift.coefficients["generator"]
    {'discriminator': -0.05, 'generator': 0.05}
    >>> (-drift.interaction_terms).coefficients["generator"]
    {'discriminator': 0.05}

    The coefficients are those of one flow, in which player i moves at its rate r_i and which F_i holds. Those of the
    source agree where the rates do; elsewhere it gives each player a time of its own, and its interaction terms have
    the player's own rate where these, through F_j, have that of the other.

    Args:
      coefficients: `{i: {j: c_ij}}` in the units of h, of players by name; those left out are zero.

    Raises:
      TypeError: `coefficients` is no mapping of mappings.
      ValueError: a coefficient is no real number.

    Source: Rosca, Wu, Dherin and Barrett, "Discretization drift in two-player games", arXiv 2105.13922.
    """

    coefficients: Mapping[str, Mapping[str, float | jax.Array]]

    def __post_init__(self):
        if not (isinstance(self.coefficients, Mapping) and all(isinstance(c, Mapping) for c in self._rows)):
            raise TypeError(
                "coefficients must map each player to a mapping of players to numbers, as in {'x': {'x': 0.05, 'y': "
                "0.05}}; Drift.simultaneous(h, players) and Drift.alternating(h, order) make them."
            )
        checked = {
            i: {j: _checks.number(c, f"coefficients[{i!r}][{j!r}]", "real") for j, c in row.items()}
            for i, row in self.coefficients.items()
        }
        object.__setattr__(self, "coefficients", checked)

    @property
    def _rows(self) -> Sequence[Any]:
        return list(self.coefficients.values())

    @classmethod
    def simultaneous(cls, step_size: float | jax.Array, players: Sequence[str]) -> Drift:
        """That of steps of all players at once, of length `step_size`, positive: all c_ij = h/2."""
        h = _checks.number(step_size, "step_size", "positive")
        names = sorted(_names(players, "players"))
        half: float | jax.Array = h / 2
        return cls(dict.fromkeys(names, dict.fromkeys(names, half)))  # a Drift copies the rows

    @classmethod
    def alternating(cls, step_size: float | jax.Array, order: Sequence[str]) -> Drift:
        """That of steps one after the other, in `order`, as `rk_optax.game(..., alternating=order)` takes them.

        A player that moves k times moves by h/k each time. c_ij = h/2 − h·(the share of pairs of moves in which j goes
        before i): h/2 for a player that goes before the other, −h/2 for one that goes after, h/(2k) for itself.
        """
        h = _checks.number(step_size, "step_size", "positive")
        moves = collections.Counter(_names(order, "order", once=False))

        def before(j: str, i: str) -> float:
            pairs = sum(second == i and first == j for n, second in enumerate(order) for first in order[:n])
            return pairs / (moves[i] * moves[j])

        return cls({i: {j: h * (0.5 - before(j, i)) for j in sorted(moves)} for i in sorted(moves)})

    @property
    def self_terms(self) -> Drift:
        """The terms j = i alone."""
        return Drift({i: {j: c for j, c in row.items() if i == j} for i, row in self.coefficients.items()})

    @property
    def interaction_terms(self) -> Drift:
        """The terms j ≠ i alone."""
        return Drift({i: {j: c for j, c in row.items() if i != j} for i, row in self.coefficients.items()})

    def scaled(self, factor: float | jax.Array) -> Drift:
        """This drift times a real number; −1, or `-drift`, cancels it."""
        return Drift({i: {j: factor * c for j, c in row.items()} for i, row in self.coefficients.items()})

    def __neg__(self) -> Drift:
        """The drift that cancels this one."""
        return self.scaled(-1.0)


@jax.tree_util.register_pytree_with_keys_class
class PlayerGradients(dict):
    """What `Game.grad` returns and `Game.update` takes: the field of a game at params, a dict of players.

    A type of its own, since every gradient of one loss has the same keys and shapes, and is not the field.
    """

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, PyTree]], tuple[str, ...]]:
        """As a dict's."""
        names = tuple(sorted(self))
        return [(jax.tree_util.DictKey(name), self[name]) for name in names], names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], children: Sequence[PyTree]) -> PlayerGradients:
        """As a dict's."""
        return cls(zip(names, children, strict=True))


class Game(optax.GradientTransformationExtraArgs):
    """An Optax transformation that `game` makes, and the field it integrates.

    Attributes:
      field: `field(params, **data)`, a `SmoothField`: what `rk_optax.gradient_flow(None, params, ts,
        grad_fn=game.field)` follows, and `rk_optax.scale_by_rk(None, h, grad_fn=game.field)` takes. Like params.
    """

    field: SmoothField
    _evaluate: Callable[..., tuple[dict[str, Any], Players]]

    def value_and_grad(self, params: Players, **data: Any) -> tuple[dict[str, Any], PlayerGradients]:
        """The losses of the players at `params`, `(loss, aux)` with `has_aux`, and what `update` takes.

        Costs a gradient of each player. Data as for `update`, by name.

        Raises:
          TypeError: missing or misspelt data; a loss that is not a real scalar.
          ValueError: params whose keys are not the players.
        """
        values, field = self._evaluate(params, data)
        return values, PlayerGradients(field)

    def grad(self, params: Players, **data: Any) -> PlayerGradients:
        """What `update` takes as updates: the field of the game at `params`, rates and all. As `value_and_grad`."""
        return self.value_and_grad(params, **data)[1]


@with_options_of(runge_kutta)
def game(
    losses: Mapping[str, Callable[..., Any]],
    learning_rate: LearningRate,
    solver: str | ButcherTableau | Solver = "rk4",
    *,
    rates: Mapping[str, float | jax.Array] | None = None,
    drift: Drift | None = None,
    gradient_penalty: Mapping[str, float | jax.Array] | None = None,
    alternating: Sequence[str] | None = None,
    **options: Unpack[AliasOptions],
) -> Game:
    """Players that each descend their own loss in their own parameters: dθ_i/dt = −r_i ∇_i L_i(θ), one flow of all.

    Its field is the gradient of no loss. Where players circle around each other, as in a GAN, gradient descent, which
    is Euler's method, leaves the circle at any learning rate, and a method of higher order does not.

    >>> import jax.numpy as jnp, optax, rk_optax
    >>> tx = rk_optax.game({"x": lambda p: p["x"] * p["y"], "y": lambda p: -p["x"] * p["y"]}, 0.1)
    >>> params = {"x": jnp.array(1.0), "y": jnp.array(0.0)}
    >>> losses, grads = tx.value_and_grad(params)
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> {k: f"{v:.4f}" for k, v in optax.apply_updates(params, updates).items()}  # cos(0.1) and sin(0.1)
    {'x': '0.9950', 'y': '0.0998'}

    Args:
      losses: `{player: loss_fn(params, *data) -> scalar}`, two or more. `params` is a dict with the players for keys;
        each loss sees all of it. Data are keywords of `update`, matched by name to each loss's signature.
      learning_rate: h > 0, in the units of a gradient-descent learning rate, as for `rk_optax.runge_kutta`. Rules that
        judge a step by its loss are refused: no loss is to fall for all.
      solver: as for `rk_optax.runge_kutta`. Implicit ones solve nonsymmetric systems here:
        `rk_optax.Implicit(tableau, linear_solver=rk_optax.Gmres())`.
      rates: r_i > 0 by player, 1 for those left out. They scale the field, so all stages are at one time of one flow;
        the player's learning rate is h·r_i.
      drift: terms added to the field, see `Drift`. A Jacobian product for each player beside each gradient.
      gradient_penalty: w_i ≥ 0 by player: adds w_i ∇_i Σ_{j≠i} ‖∇_j L_j‖² to ∇_i L_i, at every stage. ODE-GAN's
        regulariser is `{"discriminator": 0.02}`, of the norm of the *generator's* gradient, in the descent of the
        discriminator alone; as published it acts on the first stage only. A product for each such player.
      alternating: None: all players move at once. Or the order in which they move, each by a whole step of the solver
        and seeing the moves before: `("discriminator", "generator")`; one that is named k times moves k times, by h/k.
        It costs about one field evaluation more a step, has order 1 whatever the solver, and takes a number or a
        schedule for learning rate. Solver states and data are as in one step.
      **options: as for `rk_optax.runge_kutta`, but for `grad_fn` and `l2`; `argnames` is a mapping from players to
        names here. With `has_aux` each loss returns `(loss, aux)`.

    Returns:
      A `Game`, an optax.GradientTransformationExtraArgs whose `update(updates, state, params, **data)` takes what its
      `grad(params, **data)` or `value_and_grad` returned as updates, and emits the update to add. A gradient of
      `state.cost` is one of each player.

    Raises:
      TypeError: losses that are no mapping of callables; at `update`, updates that are not from `grad`.
      ValueError: fewer than two players, players that are none in rates, drift, gradient_penalty, alternating or
        params; a rate or weight out of its range; an option that a game does not have.
      TypeError, ValueError: as for `rk_optax.runge_kutta`.

    Source: Qin et al., "Training generative adversarial networks by solving ordinary differential equations", arXiv
    2010.15040; `Drift` has that of drift.
    """
    rest: dict[str, Any] = dict(options)
    rules = _Rules.of(
        losses,
        rates=rates,
        drift=drift,
        gradient_penalty=gradient_penalty,
        has_aux=rest.pop("has_aux", False),
        argnames=rest.pop("argnames", None),
    )
    if rest.pop("grad_fn", None) is not None:
        raise ValueError("grad_fn: a game makes its own field of its losses; give your own to rk_optax.runge_kutta.")
    if rest.get("l2") is not None:
        raise ValueError("l2 would not know the players' rates: add the term to each loss that is to have it.")
    if drift is not None and rest.get("mask") is not None:
        raise ValueError("drift with a mask: the drift would count moves that the masked leaves do not make.")
    method = as_solver(solver)
    if alternating is not None:
        method = Alternating(method, _check_players(alternating, rules.players, "alternating", all_of_them=True))
    field = SmoothField(rules.grad_fn())
    inner = runge_kutta(None, learning_rate, method, grad_fn=field, **rest)
    reuses = rest.get("reuse_updates", True)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        if extra_args.get("grad_fn") is not None:
            raise ValueError("update() got grad_fn=: a game makes its own field of its losses.")
        if reuses and not isinstance(updates, PlayerGradients):
            raise TypeError(
                f"updates must be what tx.grad(params, **data) or tx.value_and_grad returned, got "
                f"{type(updates).__name__}: the gradient of one loss has the same shapes and is not the field of the "
                "game. For gradients of your own making, rk_optax.PlayerGradients({player: ...}) says that they are."
            )
        return inner.update(dict(updates) if isinstance(updates, dict) else updates, state, params, **extra_args)

    made = Game(inner.init, update)
    made.field, made._evaluate = field, rules.evaluate
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class _Rules:
    """The losses of a game, checked, and what its field is made of beside them."""

    losses: Mapping[str, DataFunction]
    rates: Mapping[str, Any]
    drift: Drift | None
    penalties: Mapping[str, Any]
    has_aux: bool

    @classmethod
    def of(cls, losses: Any, *, rates: Any, drift: Any, gradient_penalty: Any, has_aux: bool, argnames: Any) -> _Rules:
        """Checks what `game` was given, against the names of the players."""
        if not isinstance(losses, Mapping) or not all(isinstance(name, str) for name in losses):
            raise TypeError(
                "losses must map the names of players to losses, {'x': loss_x, 'y': loss_y}, got "
                f"{type(losses).__name__}."
            )
        if len(losses) < 2:
            raise ValueError("losses must have two players or more; for one loss, use rk_optax.runge_kutta.")
        players = tuple(sorted(losses))
        names = _by_player({} if argnames is None else argnames, players, "argnames")
        read = {p: read_data_function(losses[p], f"losses[{p!r}]", names.get(p)) for p in players}
        why = "a player that ascends a loss has the negative of it for a loss of its own"
        rates = {
            p: _checks.number(r, f"rates[{p!r}]", "positive", why)
            for p, r in _by_player(rates or {}, players, "rates").items()
        }
        penalties = {
            p: _checks.number(w, f"gradient_penalty[{p!r}]", "not negative")
            for p, w in _by_player(gradient_penalty or {}, players, "gradient_penalty").items()
        }
        if drift is not None:
            if not isinstance(drift, Drift):
                raise TypeError(
                    f"drift must be a rk_optax.Drift, got {type(drift).__name__}; Drift.simultaneous(h, players) is "
                    "that of simultaneous steps."
                )
            for row in (drift.coefficients, *drift.coefficients.values()):
                _by_player(row, players, "drift")
        return cls(read, rates, drift, penalties, _checks.flag(has_aux, "has_aux"))

    @property
    def players(self) -> tuple[str, ...]:
        """Their names, sorted."""
        return tuple(self.losses)

    def grad_fn(self) -> Callable[..., Players]:
        """`grad_fn(params, **data)`, whose signature names the data of all losses."""

        def field(params: Players, **data: Any) -> Players:
            return self._at(params, data)[1]

        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        parameters += [inspect.Parameter(name, keyword) for name in self._data.required]
        parameters += [inspect.Parameter(name, keyword, default=None) for name in self._data.optional]
        vars(field)["__signature__"] = inspect.Signature(parameters)
        return field

    def evaluate(self, params: Players, data: Mapping[str, Any]) -> tuple[dict[str, Any], Players]:
        """The losses, with aux where there is any, and the field, on the data that the losses ask for by name."""
        return self._at(params, self._data.select(data))

    @property
    def _data(self) -> DataFunction:
        """The data of all losses, as of one function."""
        required = list(dict.fromkeys(name for loss in self.losses.values() for name in loss.required))
        optional = dict.fromkeys(name for loss in self.losses.values() for name in loss.optional)
        return DataFunction(
            self.grad_fn, "the game", tuple(required), tuple(name for name in optional if name not in required)
        )

    def _at(self, params: Players, data: Mapping[str, Any]) -> tuple[dict[str, Any], Players]:
        if not isinstance(params, dict) or set(params) != set(self.players):
            found = sorted(params) if isinstance(params, dict) else type(params).__name__
            raise ValueError(f"params must be a dict with a key for each player, {list(self.players)}, got {found}.")
        values, field = {}, {}
        for name in self.players:
            values[name], field[name] = self._player(name, params, data)
        if self.drift is None:
            return values, field
        drifting = dict(field)
        for name, row in self.drift.coefficients.items():
            if row:
                moves = {j: _tree.scale(row.get(j, 0.0), field[j]) for j in self.players}
                change = jax.jvp(lambda p, name=name: self._player(name, p, data)[1], (params,), (moves,))[1]
                drifting[name] = jax.tree.map(jnp.add, field[name], change)
        return values, drifting

    def _player(self, name: str, params: Players, data: Mapping[str, Any]) -> tuple[Any, PyTree]:
        """The loss of a player, and its part of the field without drift."""
        value, gradient = self._gradient(name, name, params, data)
        weight = self.penalties.get(name)
        for other in self.players if weight is not None else ():
            if other != name:
                gradient = jax.tree.map(jnp.add, gradient, self._penalty(name, other, weight, params, data))
        return value, _tree.scale(self.rates.get(name, 1.0), gradient)

    def _penalty(self, name: str, other: str, weight: Any, params: Players, data: Mapping[str, Any]) -> PyTree:
        """The gradient in θ_i of w‖∇_j L_j‖², which is 2w (∂/∂θ_j ∇_i L_j) ∇_j L_j: one product forwards."""
        _, steepest = self._gradient(other, other, params, data)

        def cross(theirs: PyTree) -> PyTree:
            return self._gradient(other, name, {**params, other: theirs}, data)[1]

        change = jax.jvp(cross, (params[other],), (steepest,))[1]
        return _tree.scale(2 * weight, change)

    def _gradient(self, whose: str, wrt: str, params: Players, data: Mapping[str, Any]) -> tuple[Any, PyTree]:
        """The loss of `whose`, and its gradient in the parameters of `wrt`, in Optax's convention."""
        loss = self.losses[whose]
        mine = {key: data[key] for key in (*loss.required, *loss.optional) if key in data}

        def value(own: PyTree) -> tuple[jax.Array, Any]:
            result = loss({**params, wrt: own}, mine)
            scalar = scalar_loss(result, self.has_aux, loss.role)
            return scalar, (scalar, result[1]) if self.has_aux else scalar

        gradient, result = jax.grad(value, has_aux=True)(params[wrt])
        return result, jax.tree.map(jnp.conj, gradient)


def _names(names: Any, what: str, once: bool = True) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names) or not names:
        raise ValueError(f"{what} must be names of players, such as ('discriminator', 'generator'), got {names!r}.")
    if once and len(set(names)) < len(names):
        raise ValueError(f"{what} must name each player once, got {names!r}.")
    return tuple(names)


def _by_player(given: Any, players: tuple[str, ...], what: str) -> Mapping[str, Any]:
    """A mapping from players to something, as it is."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must be a mapping from players to their own, as in {{{players[0]!r}: ...}}.")
    _check_players(given, players, what)
    return given


def _check_players(given: Any, players: tuple[str, ...], what: str, all_of_them: bool = False) -> tuple[str, ...]:
    names = _names(given, what, once=False) if given else ()
    for name in names:
        if name not in players:
            raise ValueError(f"{what} names {name!r}, which is no player: the losses are of {list(players)}.")
    if all_of_them and set(names) != set(players):
        raise ValueError(f"{what} must name every player, {list(players)}, got {list(names)}: the others would stay.")
    return names
