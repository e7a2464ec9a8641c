"""Which numbers a weight can be. To add a scalar grid: one line in `scalar.SCALAR_GRIDS`, and a layout in each
container that can hold it."""

from halfbyte.errors import UnknownName
from halfbyte.grids import scalar
from halfbyte.grids.actorder import SUFFIX, ActOrderGrid
from halfbyte.grids.grid import Grid
from halfbyte.grids.kquant import KQUANTS
from halfbyte.grids.lattice import LATTICE_GRIDS
from halfbyte.grids.scalar import SCALAR_GRIDS, is_integer

# Integer grids, FP8 and those of bitsandbytes are read by pattern; these are the ones that help, completion and the
# matrix test show.
GRIDS: dict[str, Grid] = {**SCALAR_GRIDS, **KQUANTS, **LATTICE_GRIDS}
# Types of ggml that are integer grids, what bitsandbytes takes where no block is named, and NVIDIA's format by a former
# name.
ALIASES = {
    "q4_0": "int4-g32",
    "q5_0": "int5-g32",
    "q8_0": "int8-g32",
    "nf4": "nf4-g64",
    "fp4": "fp4-g64",
    "nvfp4-global": "nvfp4",
}


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
