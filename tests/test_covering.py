import itertools

import pytest
from covering import cover, some

pytestmark = pytest.mark.latest

SIZES = [(1,), (7,), (3, 5), (2, 2, 2), (6, 4, 3, 2)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("strength", [1, 2])
def test_every_value_or_pair_of_values_occurs_and_few_combinations_do(sizes, strength):
    product = list(itertools.product(*map(range, sizes)))
    kept = [product[place] for place in cover(product, strength)]
    places = list(itertools.combinations(range(len(sizes)), min(strength, len(sizes))))
    for chosen in places:
        assert {tuple(c[i] for i in chosen) for c in kept} == set(itertools.product(*(range(sizes[i]) for i in chosen)))
    # No fewer can do, of values; pairs take a few more than the largest product of two.
    least = max(len(set(itertools.product(*(range(sizes[i]) for i in chosen)))) for chosen in places)
    assert least <= len(kept) <= (least if strength == 1 else 2 * least)


def test_what_never_meets_is_not_asked_for():
    product = [c for c in itertools.product(range(3), range(3)) if c != (0, 0)]
    assert {product[place] for place in cover(product, 2)} == set(product)


def test_some_are_quick_and_none_is_lost():
    parameters = some({"a": 1, "b": 2, "c": 3}, "b")
    assert [(p.id, p.values, [m.name for m in p.marks]) for p in parameters] == [
        ("a", (1,), ["slow"]),
        ("b", (2,), []),
        ("c", (3,), ["slow"]),
    ]
    with pytest.raises(ValueError, match="no such parameter: \\['d'\\]"):
        some(["a"], "d")


@pytest.fixture
def _collects(pytester):
    """Collects a file with this directory's own hook."""
    pytester.makeconftest(
        """
        import covering
        import pytest

        @pytest.hookimpl(tryfirst=True)
        def pytest_collection_modifyitems(items):
            covering.mark(items)
        """
    )
    pytester.makeini("[pytest]\nmarkers =\n    slow\n    covering\n")
    pytester.makepyfile(
        test_it="""
        import pytest

        @pytest.fixture(params=["p", "q", "r"])
        def letter(request):
            return request.param

        @pytest.mark.covering
        @pytest.mark.parametrize("number", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
        def test_one(letter, number):
            pass

        @pytest.mark.covering(2)
        @pytest.mark.parametrize("number", [1, 2])
        def test_two(letter, number):
            pass

        def test_three(letter):
            pass
        """
    )

    def run(*args):
        lines = pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:xdist", *args).outlines
        return [line.partition("::")[2] for line in lines if "::" in line]

    return run


def test_the_marker_leaves_the_rest_of_a_product_to_the_long_tests(_collects):
    quick, long = _collects("-m", "not slow"), _collects("-m", "slow")
    three, two = [f"test_three[{letter}]" for letter in "pqr"], [f"test_two[{c}-{n}]" for c in "pqr" for n in "12"]
    assert quick == ["test_one[p-1]", "test_one[q-2]", "test_one[r-1]", *two, *three]
    assert long == ["test_one[p-2]", "test_one[p-3]", "test_one[q-1]", "test_one[q-3]", "test_one[r-2]", "test_one[r-3]"]


def test_a_test_that_is_asked_for_by_name_runs(_collects):
    assert _collects("-m", "not slow", "test_it.py::test_one[q-1]") == ["test_one[q-1]"]
