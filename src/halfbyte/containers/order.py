"""Activation order: files where a tensor says of which group an in-feature is, because columns were sorted before
scales were fitted. Read, and not written.

    g_idx  int32 [in], the group of each in-feature: i // group unless columns were sorted
"""

import torch
from torch import Tensor

from halfbyte.containers.safetensors import Entry
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.actorder import ActOrderGrid
from halfbyte.grids.grid import Grid
from halfbyte.grids.scalar import ScalarGrid, is_integer


def plain_order(width: int, grid: ScalarGrid) -> Tensor:
    """The groups of in-features that were not sorted."""
    return torch.arange(width, dtype=torch.int32) // (grid.group_size or width)


def as_ordered(name: str, entry: Entry | None, grid: Grid, width: int) -> Grid:
    """The grid, as the columns' groups make it. Raises BadCheckpoint for groups of unequal size, and for such as have
    no scale; Unsupported for columns of what is no integer."""
    if entry is None or (entry.shape, entry.dtype) != ((width,), torch.int32):
        return grid  # what is of another shape, a container's `parts` refuse
    if not is_integer(grid):
        raise Unsupported(f"{name}: activation order is read of integers, not of {grid}")
    order, plain = entry.read(), plain_order(width, grid)
    if torch.equal(order, plain):
        return grid
    if not torch.equal(order.sort().values, plain):
        groups = grid.groups(width)
        raise BadCheckpoint(
            f"{name} does not give each of {groups} groups {width // groups} of {width} in-features; download it again"
        )
    return ActOrderGrid(grid)
