"""Words to a scheme: a grid of weights, and after a slash how inputs are rounded. Some have names
(`formats.SCHEMES`)."""

from halfbyte import grids
from halfbyte.errors import UnknownName
from halfbyte.formats import ALIASES, SCHEMES
from halfbyte.grids import activations
from halfbyte.grids.quantized import Scheme, WeightActivation


def parse(name: str) -> Scheme:
    """`str(parse(name)) == name` for names that are no presets."""
    name = name.lower()
    words = SCHEMES[name].scheme if name in SCHEMES else name
    weight, slash, read = words.partition("/")
    try:
        grid = grids.parse(weight)
    except UnknownName:
        raise UnknownName("grid", weight, (*grids.GRIDS, *ALIASES, *SCHEMES)) from None
    return WeightActivation(grid, activations.parse(read)) if slash else grid
