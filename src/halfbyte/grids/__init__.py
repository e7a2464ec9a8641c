"""Which numbers a weight can be. To add a scalar grid: one line here, and a layout in each container that can hold it."""

from halfbyte.errors import UnknownName
from halfbyte.grids import actorder
from halfbyte.grids.absmax import AbsmaxGrid
from halfbyte.grids.actorder import ActOrderGrid
from halfbyte.grids.floats import FLOAT_GRIDS, FloatGrid
from halfbyte.grids.grid import Grid
from halfbyte.grids.kquant import KQUANTS
from halfbyte.grids.lattice import LATTICE_GRIDS
from halfbyte.grids.levels import LEVEL_GRIDS
from halfbyte.grids.llm_int8 import LLMInt8
from halfbyte.grids.scalar import IntGrid

# Integer grids and those of bitsandbytes are read by pattern; these are the ones that help, completion and the matrix test show.
GRIDS: dict[str, Grid] = {
    **{
        name: IntGrid.parse(name)
        for bits in range(2, 9)
        for span in ("g32", "g64", "g128", "channel", "tensor")
        for name in (f"int{bits}-{span}", *([f"int{bits}-{span}-asym"] if span != "tensor" else []))
    },
    **KQUANTS,
    **LEVEL_GRIDS,
    **LATTICE_GRIDS,
    **FLOAT_GRIDS,
    **{name: AbsmaxGrid.parse(name) for name in ("nf4-g64", "nf4-g64-double", "fp4-g64", "fp4-g64-double")},
    "llm-int8": LLMInt8(),
}
# Types of ggml that are integer grids, and what bitsandbytes takes where no block is named.
ALIASES = {"q4_0": "int4-g32", "q5_0": "int5-g32", "q8_0": "int8-g32", "nf4": "nf4-g64", "fp4": "fp4-g64"}


def parse(name: str) -> Grid:
    """The grid of a name: `str(parse(name)) == name` for every canonical name."""
    name = ALIASES.get(name, name)
    if IntGrid.pattern.fullmatch(name.removesuffix(actorder.SUFFIX)):
        return (ActOrderGrid if name.endswith(actorder.SUFFIX) else IntGrid).parse(name)
    if AbsmaxGrid.pattern.fullmatch(name):
        return AbsmaxGrid.parse(name)
    if FloatGrid.pattern.fullmatch(name):
        return FloatGrid.parse(name)
    if name not in GRIDS:
        raise UnknownName("grid", name, (*GRIDS, *ALIASES))
    return GRIDS[name]
