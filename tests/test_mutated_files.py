"""A seeded part of the harness: `python tests/fuzz.py` tries more."""

import pytest

import fuzz

CASES, SLOW = 25, 4
"""Of each reader; and of those that start a process for each case."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return fuzz.make(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_mutated_files_are_read_or_refused_in_one_line(reader, home):
    cases = SLOW if fuzz.READERS[reader].is_slow else CASES
    ends = fuzz.fuzz(reader, home, cases).ends
    assert sum(ends.values()) == cases
    # of which nothing is taken that is not as it should be, or it says nothing
    assert ends["refused"] or fuzz.READERS[reader].ignores
