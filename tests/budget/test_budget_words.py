"""Budgets that are none, in one line."""

import pytest

from halfbyte.budget.budget import Budget
from halfbyte.errors import BadRequest


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"bits": 4, "size": "3GB"}, "--bits and --size are 2 budgets; give one of them"),
        ({"bits": 0}, "--bits is 0, and has to be above 0"),
        ({"bits": float("nan")}, "--bits is nan"),
        ({"max_kl": -1.0}, "--max-kl is -1.0"),
        ({"size": "3 zettabytes"}, "'3 zettabytes' is no size"),
        ({"size": -3}, "--size is -3"),
        ({"fit": "GiB"}, "'GiB' is no size"),
        ({"bits": 4, "context": 4096}, "--context is of a budget; give one too, such as --fit 22GiB"),
        ({"candidates": "Q4_K"}, "--candidates is of a budget"),
        ({"fit": "1GB", "context": -5}, "--context is -5"),
    ],
)
def test_what_is_no_budget_is_refused(words, said):
    with pytest.raises(BadRequest, match="^" + said.replace("(", r"\(")):
        Budget.of(**words)


def test_units_and_lists():
    assert Budget.of() is None
    assert Budget.of(size="1.5MiB").size == 3 << 19
    assert Budget.of(size=1234).size == Budget.of(size="1234").size == 1234
    assert Budget.of(bits=4, candidates="Q4_K, Q6_K").candidates == ("Q4_K", "Q6_K")
