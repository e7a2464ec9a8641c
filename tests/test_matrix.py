"""Every method x scheme x container comes back bit for bit or is refused with a reason; the table in docs/support.md is
that loop's."""

from pathlib import Path

import pytest

from halfbyte.recipe import METHODS
from halfbyte.report import support
from halfbyte.targets.table import TARGETS


@pytest.fixture(scope="module")
def found() -> list[tuple[str, str, str, str]]:
    return list(support.triples())


@pytest.mark.slow
def test_every_triple_round_trips_or_says_why_not(found):
    assert len(found) == len(METHODS) * len(support.SCHEMES) * len(TARGETS)
    held = [t for t in found if not t[3]]
    assert {c for _, _, c, _ in held} == set(TARGETS)
    assert all(container in reason for _, _, container, reason in found if reason)


@pytest.mark.slow
def test_the_documentation_shows_the_table(found, monkeypatch):
    monkeypatch.setattr(support, "triples", lambda: iter(found))  # which takes seconds
    page = (Path(__file__).parents[1] / "docs/support.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- support -->")[2].partition("<!-- /support -->")[0].strip()
    assert shown == support.markdown(), (
        "docs/support.md is behind: put the output of `halfbyte support` between its markers"
    )
