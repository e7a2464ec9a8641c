"""BlockLayout: how one type of ggml lays a Quantized down in bytes."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import UInt8
from torch import Tensor

from halfbyte.grids.grid import Grid
from halfbyte.grids.quantized import Quantized


class BlockLayout(NamedTuple):
    """A type of ggml: rows of blocks, each `size_bytes` long. `unpack(pack(q), q.grid)` is `q`."""

    grid: Grid
    block: int
    """Weights per block."""
    size_bytes: int
    """Bytes per block."""
    pack: Callable[[Quantized], UInt8[Tensor, "out row_bytes"]]
    unpack: Callable[[UInt8[Tensor, "out row_bytes"], Grid], Quantized]
