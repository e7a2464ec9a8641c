"""Grids that round weights one by one say which levels lie beside each, and take other scales and offsets as files can
store them."""

import pytest
import torch

from halfbyte.grids.grid import SteppedGrid
from halfbyte.grids.kquant import KQUANTS
from halfbyte.grids.scalar import SCALAR_GRIDS, fp8, integers
from halfbyte.solvers import SOLVERS

GRIDS: list[SteppedGrid] = [
    *SCALAR_GRIDS.values(),
    *KQUANTS.values(),
    integers(3, 64, symmetric=False),
    fp8("e4m3", "block"),
]


@pytest.fixture(scope="module")
def w() -> torch.Tensor:
    return torch.randn(48, 512, generator=torch.Generator().manual_seed(0)) * 0.03


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_levels_lie_on_the_lines_of_their_groups(grid, w):
    q = SOLVERS["nearest"](w, grid)
    codes, lines, ladder = grid.grouped(q.codes), grid.lines(q.params), grid.ladder
    level = ladder.levels[ladder.ranks[codes.int()].int()]
    level = level if lines.zero is None else level - lines.zero[..., None]
    value = level * lines.scale[..., None]
    value = value if lines.offset is None else value + lines.offset[..., None]
    torch.testing.assert_close(grid.ungrouped(value, q.shape), q.decode(), rtol=1e-5, atol=1e-7)
    assert (ladder.levels.diff() > 0).all()
    assert torch.equal(ladder.ranks[ladder.codes.int()], torch.arange(len(ladder.codes), dtype=torch.uint8))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_lines_that_are_stored_are_the_nearest_to_themselves(grid, w):
    q = SOLVERS["nearest"](w, grid)
    lines = grid.lines(q.params)
    again = q._replace(params=grid.with_lines(q.params, lines.scale, lines.offset))
    assert torch.equal(again.decode(), q.decode())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_other_lines_are_stored_as_near_as_the_file_can(grid, w):
    """Moved by a third of a percent, lines are at most so much farther away than they have moved."""
    q = SOLVERS["nearest"](w, grid)
    lines = grid.lines(q.params)
    offset = None if lines.offset is None else lines.offset * 1.003
    stored = grid.lines(grid.with_lines(q.params, lines.scale * 1.003, offset))
    assert ((stored.scale - lines.scale * 1.003).abs() <= lines.scale.abs() * 0.00301 + 1e-12).all()
