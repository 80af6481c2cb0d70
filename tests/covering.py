"""Of a product of parameters, a few combinations in which every value occurs; the others are long tests."""

import collections
import itertools

import pytest


def cover(combinations, strength=1):
    """Which combinations together show what any of them shows, in few: places in the list, in ascending order.

    With `strength=1` every value of every parameter, with 2 every pair of values that meet at all, and so on. The first
    of those that show most that is new is taken each time.
    """

    def shown(combination):
        return set(itertools.combinations(enumerate(combination), min(strength, len(combination))))

    every = [shown(combination) for combination in combinations]
    missing = set().union(*every)
    chosen = []
    while missing:
        best = max(range(len(every)), key=lambda place: len(every[place] & missing))
        missing -= every[best]
        chosen.append(best)
    return sorted(chosen)


def some(values, *names):
    """Parameters for `parametrize` or a fixture: those of a dictionary or of names, all but `names` marked as slow."""
    values = values if isinstance(values, dict) else {value: value for value in values}
    if unknown := set(names) - set(values):
        raise ValueError(f"no such parameter: {sorted(unknown)}; there are {list(values)}")
    return [
        pytest.param(value, id=str(name), marks=[] if name in names else [pytest.mark.slow])
        for name, value in values.items()
    ]


def mark(items):
    """Marks as slow what `covering(strength=1, most=None)` leaves out, among the collected tests of each function.

    With `most` no more than so many of them stay, and which they are goes round from one such function of a file to the
    next, so that the file meets them all. A test that is selected by its own name is all that there is of its function,
    and runs.
    """
    functions, turns = {}, collections.Counter()
    for item in items:
        if item.get_closest_marker("covering") and not item.get_closest_marker("slow") and hasattr(item, "callspec"):
            functions.setdefault((item.path, item.originalname, item.cls), []).append(item)
    for (path, *_), of_one in functions.items():
        keywords = of_one[0].get_closest_marker("covering").kwargs
        kept = cover([tuple(map(id, item.callspec.params.values())) for item in of_one], keywords.get("strength", 1))
        if (most := keywords.get("most", len(kept))) < len(kept):
            kept = [kept[(turns[path] + turn) % len(kept)] for turn in range(most)]
            turns[path] += most
        for place in set(range(len(of_one))) - set(kept):
            of_one[place].add_marker(pytest.mark.slow)
