"""Which numbers a weight can be. To add a scalar grid: one line in `halfbyte.formats`, and a layout in each container
that can hold it."""

from halfbyte.errors import UnknownName
from halfbyte.formats import ALIASES
from halfbyte.grids import scalar
from halfbyte.grids.actorder import SUFFIX, ActOrderGrid
from halfbyte.grids.grid import Grid
from halfbyte.grids.kquant import KQUANTS
from halfbyte.grids.lattice import LATTICE_GRIDS
from halfbyte.grids.scalar import SCALAR_GRIDS, is_integer

GRIDS: dict[str, Grid] = {**SCALAR_GRIDS, **KQUANTS, **LATTICE_GRIDS}


def parse(name: str) -> Grid:
    """The grid of a name: `str(parse(name)) == name` for every canonical name."""
    name = ALIASES.get(name, name)
    plain = name.removesuffix(SUFFIX)
    if grid := scalar.parse(plain):
        if plain == name:
            return grid
        if is_integer(grid):
            return ActOrderGrid(grid)
    if name not in GRIDS:
        raise UnknownName("grid", name, (*GRIDS, *ALIASES))
    return GRIDS[name]
