"""The order conditions of Runge-Kutta methods, from rooted trees, to any order.

A method has order p if Σ_i b_i Φ_i(t) = 1/γ(t) for every rooted tree t of up to p nodes (Butcher 1963; Hairer, Nørsett
and Wanner, "Solving Ordinary Differential Equations I", 1993, chapter II.2): 200 conditions for order 8.
"""

import functools
import math
from collections.abc import Iterator
from itertools import combinations_with_replacement, count
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
_Tree: TypeAlias = "tuple[_Tree, ...]"  # a rooted tree is the tuple of the subtrees at its root

# The named methods, rounded to float64, miss their conditions by at most 2e-14. Terms of larger
# coefficients round more coarsely, so the tolerance grows with them, but never past 1e-8.
_TOLERANCE = 1e-12
_LARGEST_SCALE = 1e4


class MissedCondition(NamedTuple):
    """A condition that does not hold: the order it belongs to, its text and its defect."""

    order: int
    text: str
    defect: float


def tolerance(scale: float) -> float:
    """How far a sum of terms of this size may be off by rounding.

    >>> tolerance(0.5), tolerance(20.0)
    (1e-12, 2e-11)
    """
    return _TOLERANCE * min(max(1.0, scale), _LARGEST_SCALE)


def missed_condition(a: Array, b: Array, order: int, label: str = "b") -> MissedCondition | None:
    """The lowest-order condition up to `order` that a method misses, or None if it has that order.

    Args:
        a: Stage coefficients, float64 of shape (s, s), explicit or not.
        b: Weights, float64 of shape (s,).
        order: The order to prove, at least 1. The number of conditions grows about threefold with
            each order: 8 takes a fraction of a millisecond, 12 about a tenth of a second.
        label: What the text calls `b`.

    Returns:
        Among the conditions missed at the lowest order that fails, the one missed by most.

    Example:
        >>> heun = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([0.5, 0.5])
        >>> missed_condition(*heun, order=2)
        >>> missed_condition(*heun, order=3).text
        'sum b_i c_i^2 = 1/3'
    """
    allowed = tolerance(float(np.abs(b).max()) * max(1.0, float(np.abs(a).max())))
    # Order by order, so that an overclaimed order fails before its many trees are generated.
    for nodes, weights in zip(range(1, order + 1), _elementary_weights(a), strict=False):
        trees, _, densities = _trees(nodes)
        with np.errstate(over="ignore", invalid="ignore"):
            defects = b @ weights - 1 / densities
        failing = ~(np.abs(defects) <= allowed)  # NaN fails
        if failing.any():
            worst = int(np.argmax(np.where(failing, np.abs(defects), -1.0)))
            target = "1" if nodes == 1 else f"1/{densities[worst]:.0f}"
            text = f"sum {label}_i{_factors(trees[worst])} = {target}"
            return MissedCondition(nodes, text, float(defects[worst]))
    return None


@functools.cache
def _forests(nodes: int, largest: int) -> tuple[tuple[_Tree, ...], ...]:
    """All multisets of trees with `nodes` nodes in all and at most `largest` in each tree.

    Put on a common root such a multiset is a tree with one node more, and every tree is one.
    """
    if largest == 0:
        return ((),) if nodes == 0 else ()
    return tuple(
        (*trees, *smaller)
        for copies in range(nodes // largest + 1)
        for trees in combinations_with_replacement(_forests(largest - 1, largest - 1), copies)
        for smaller in _forests(nodes - copies * largest, largest - 1)
    )


@functools.cache
def _trees(nodes: int) -> tuple[tuple[_Tree, ...], NDArray[np.intp], Array]:
    """The trees with so many nodes: themselves, their subtrees' numbers and their densities γ.

    Numbers count all smaller trees by order; a row of subtrees is filled up with -1.
    """
    trees = _forests(nodes - 1, nodes - 1)
    smaller = (tree for n in range(1, nodes) for tree in _forests(n - 1, n - 1))
    number = {tree: i for i, tree in enumerate(smaller)}
    subtrees = np.full((len(trees), nodes - 1), -1)
    for row, tree in zip(subtrees, trees, strict=True):
        row[: len(tree)] = [number[subtree] for subtree in tree]
    return trees, subtrees, np.array([_density(tree) for tree in trees], np.float64)


def _size(tree: _Tree) -> int:
    return 1 + sum(map(_size, tree))


def _density(tree: _Tree) -> int:
    return _size(tree) * math.prod(map(_density, tree))


def _elementary_weights(a: Array) -> Iterator[Array]:
    """Φ_i(t), order by order, one column for each tree: Φ(t) = Π over subtrees u of (a Φ(u))."""
    factors = np.ones((len(a), 1))  # a Φ(u) of all smaller trees, then the 1 that -1 refers to
    for nodes in count(1):
        with np.errstate(over="ignore", invalid="ignore"):
            phi = factors[:, _trees(nodes)[1]].prod(axis=2)
            factors = np.hstack([factors[:, :-1], a @ phi, factors[:, -1:]])
        yield phi


def _factors(tree: _Tree, node: str = "i", used: Iterator[int] | None = None) -> str:
    """The factors of Φ_i(tree) in words: a leaf is c_i, a larger subtree a_ij and its factors."""
    used = count(1) if used is None else used
    leaves = sum(not subtree for subtree in tree)
    text = f" c_{node}" * min(leaves, 1) + f"^{leaves}" * (leaves > 1)
    for subtree in filter(None, tree):
        child = chr(ord("i") + next(used))
        text += f" a_{node}{child}" + _factors(subtree, child, used)
    return text
