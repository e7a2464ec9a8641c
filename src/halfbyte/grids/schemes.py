"""Words to a scheme: a grid of weights, and after a slash how inputs are rounded. Presets are rows of a table."""

from typing import NamedTuple

from halfbyte import grids
from halfbyte.errors import UnknownName
from halfbyte.grids import activations
from halfbyte.grids.quantized import AnyScheme, Scheme


class Preset(NamedTuple):
    """A name that users know for a scheme, and the method that suits it."""

    scheme: str
    method: str


PRESETS: dict[str, Preset] = {
    "fp8": Preset("fp8-e4m3-channel/fp8-e4m3-token", "nearest"),
    "fp8-static": Preset("fp8-e4m3-tensor/fp8-e4m3-static", "nearest"),
    "fp8-block": Preset("fp8-e4m3-block/fp8-e4m3-g128", "nearest"),
    "mxfp8": Preset("mxfp8-e4m3/mxfp8-e4m3", "nearest"),
    "w8a16": Preset("int8-channel", "nearest"),
    "w4a16": Preset("int4-g128", "gptq"),
    "w8a8": Preset("int8-channel/int8-token", "smoothquant+gptq"),
    "w8a8-static": Preset("int8-channel/int8-static", "smoothquant+gptq"),
    "w4a8": Preset("int4-g128/int8-token", "gptq"),
    "w4a8-fp8": Preset("int4-g128/fp8-e4m3-token", "gptq"),
    "w4a4": Preset("int4-channel/int4-token", "smoothquant+gptq"),
    "w4a4-nvfp4": Preset("nvfp4/nvfp4", "gptq"),
    "w4a4-mxfp4": Preset("mxfp4/mxfp4", "gptq"),
}


def parse(name: str) -> AnyScheme:
    """`str(parse(name)) == name` for names that are no presets."""
    name = name.lower()
    words = PRESETS[name].scheme if name in PRESETS else name
    weight, slash, read = words.partition("/")
    try:
        grid = grids.parse(weight)
    except UnknownName:
        raise UnknownName("grid", weight, (*grids.GRIDS, *grids.ALIASES, *PRESETS)) from None
    return Scheme(grid, activations.parse(read)) if slash else grid
