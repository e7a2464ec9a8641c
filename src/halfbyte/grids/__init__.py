"""Which numbers a weight can be. To add a scalar grid: one line here, and a layout in each container that can hold it."""

from halfbyte.errors import UnknownName
from halfbyte.grids.grid import Grid
from halfbyte.grids.scalar import IntGrid

# Names that `parse` reads by pattern; these are the ones that help, completion and the matrix test show.
GRIDS: dict[str, type[Grid]] = {
    **{f"int{bits}-{span}{asym}": IntGrid for bits in range(2, 9) for span in ("g32", "g64", "g128", "channel") for asym in ("", "-asym")},
    **{f"int{bits}-tensor": IntGrid for bits in range(2, 9)},
}


def parse(name: str) -> Grid:
    """The grid of a name: `str(parse(name)) == name` for every canonical name."""
    if IntGrid.pattern.fullmatch(name):
        return IntGrid.parse(name)
    raise UnknownName("grid", name, GRIDS)
