"""Names of grids: what prints is what parses."""

import pytest

from halfbyte.errors import UnknownName
from halfbyte.grids import GRIDS, parse
from halfbyte.grids.scalar import integers

EVERY = [
    integers(bits, span, symmetric, scale)
    for bits in range(2, 9)
    for span in (1, 16, 32, 64, 128, 100, 1024, "channel", "tensor")
    for symmetric in (True, False)
    for scale in ("fp16", "bf16", "fp32")
]


@pytest.mark.parametrize("grid", EVERY, ids=str)
def test_parse_reads_what_str_writes(grid):
    assert parse(str(grid)) == grid


@pytest.mark.parametrize("name", GRIDS)
def test_listed_names_are_canonical(name):
    assert str(parse(name)) == name


def test_grids_are_values():
    assert parse("int4-g128") == integers(4, 128) != parse("int4-g128-asym")
    assert len({parse("int4-g128"), integers(4, 128), parse("int4-g128-bf16")}) == 2


@pytest.mark.parametrize(
    "name",
    [
        "int4",
        "int1-g128",
        "int9-g128",
        "int4-g0",
        "int4-g-128",
        "int4-g128-sym",
        "Int4-g128",
        "int4-g128 ",
        "int4-g0128",
        "",
    ],
)
def test_other_names_are_refused(name):
    with pytest.raises(UnknownName, match="unknown grid"):
        parse(name)
