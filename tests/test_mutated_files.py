"""A seeded part of the harness: `python tests/fuzz.py` tries more."""

import pytest

import fuzz


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return fuzz.make(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_mutated_files_are_read_or_refused_in_one_line(reader, home):
    found = fuzz.fuzz(reader, home, cases=60)
    assert sum(found.values()) == 60
    assert found["refused"] or reader == "report"  # of which nothing is taken that is not as it should be
