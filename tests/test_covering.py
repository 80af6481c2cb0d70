import itertools

import pytest
from covering import cover, some

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
def collected(pytester):
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

        @pytest.mark.covering(strength=2)
        @pytest.mark.parametrize("number", [1, 2])
        def test_two(letter, number):
            pass

        def test_three(letter):
            pass

        @pytest.mark.covering(most=2)
        def test_four(letter):
            pass

        @pytest.mark.covering(most=2)
        def test_five(letter):
            pass
        """
    )

    def run(*args):
        lines = pytester.runpytest_inprocess("--collect-only", "-q", "-p", "no:xdist", *args).outlines
        return [line.partition("::")[2] for line in lines if "::" in line]

    return run


def test_the_marker_leaves_the_rest_of_a_product_to_the_long_tests(collected):
    quick, long = collected("-m", "not slow"), collected("-m", "slow")
    three, two = [f"test_three[{letter}]" for letter in "pqr"], [f"test_two[{c}-{n}]" for c in "pqr" for n in "12"]
    four, five = ["test_four[p]", "test_four[q]"], ["test_five[p]", "test_five[r]"]
    assert quick == ["test_one[p-1]", "test_one[q-2]", "test_one[r-1]", *two, *three, *four, *five]
    rest = [f"test_one[{place}]" for place in ("p-2", "p-3", "q-1", "q-3", "r-2", "r-3")]
    assert long == [*rest, "test_four[r]", "test_five[q]"]


def test_a_test_that_is_asked_for_by_name_runs(collected):
    assert collected("-m", "not slow", "test_it.py::test_one[q-1]") == ["test_one[q-1]"]
