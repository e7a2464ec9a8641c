"""GGUF: rows of blocks, one ggml type for each tensor (ggml's docs/gguf.md)."""

from functools import cache

import torch
from jaxtyping import UInt8
from torch import Tensor

from halfbyte.containers.container import exact_half, fits_half, weights_only
from halfbyte.containers.safetensors import Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.grid import Grid, Shape
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.grids.scalar import SCALE_DTYPES, integers, is_integer
from halfbyte.targets.gguf.lattice_blocks import LATTICE_LAYOUTS
from halfbyte.targets.gguf.layout import BlockLayout
from halfbyte.targets.gguf.names import OTHERWISE
from halfbyte.targets.gguf.scalar_blocks import SCALAR_LAYOUTS

LAYOUTS: dict[str, BlockLayout] = {**SCALAR_LAYOUTS, **LATTICE_LAYOUTS}
TYPE_OF: dict[Grid, str] = {layout.grid: name for name, layout in LAYOUTS.items()}
NAME = "gguf"
READ_ONLY = ("IQ1_S", "IQ1_M")
BLOCK = 32
"""Weights that share a scale in Q4_0, Q5_0 and Q8_0, which are our symmetric integers."""


def check(scheme: Scheme, shape: Shape) -> None:
    """Raise Unsupported unless a type of ggml holds such a matrix."""
    grid = weights_only(scheme, NAME)
    if type_of(grid) in READ_ONLY:
        raise Unsupported(f"{grid} is read from gguf files, not written; the smallest type that is written is iq2_xxs")
    layout_of(grid, shape[-1])


def cast_exact(q: Quantized) -> Quantized | None:
    """Value for value on the grid of a type; None where it must be rounded.

    Symmetric integers in groups of whole blocks are Q4_0, Q5_0 or Q8_0 with the same scale in each block of a group.
    """
    if q.grid in TYPE_OF:
        return q._replace(activations=None)
    grid, width = q.grid, q.shape[1]
    if (
        not is_integer(grid)
        or not grid.symmetric
        or width % BLOCK
        or (grid.group_size or width) % BLOCK
        or not fits_half(q.params["scale"])
    ):
        return None
    bits = next(b for b in (4, 5, 8) if b >= grid.levels.bits)
    blocks = width // BLOCK
    scale = q.params["scale"].to(torch.float16).expand(q.shape[0], -1)
    wider = (1 << (bits - 1)) - grid.midpoint
    return Quantized(
        integers(bits, BLOCK), q.codes + wider, {"scale": scale.repeat_interleave(blocks // scale.shape[1], 1)}
    )


def spec(grid: Grid, shape: Shape) -> Spec:
    """The bytes of a matrix, row by row."""
    layout = layout_of(grid, shape[-1])
    return Spec((shape[0], shape[-1] // layout.block * layout.size_bytes), torch.uint8)


def pack(q: Quantized) -> UInt8[Tensor, "out row_bytes"]:
    """Bytes of blocks, row by row. Raises Unsupported for scales that are not exact in fp16."""
    if is_integer(q.grid):
        q = q._replace(params={"scale": exact_half(q.params["scale"])})
    return layout_of(q.grid, q.shape[1]).pack(q)


def unpack(raw: UInt8[Tensor, "out row_bytes"], grid: Grid) -> Quantized:
    """The inverse of `pack`."""
    q = LAYOUTS[type_of(grid)].unpack(raw, grid)
    if is_integer(grid):
        return q._replace(params={"scale": q.params["scale"].to(SCALE_DTYPES[grid.scale])})
    return q


def with_minimum(q: Quantized) -> Quantized | None:
    """Integers with zero points as Q4_1 or Q5_1, codes and scales the same; only the minimum is rounded, to fp16.

    None for integers that are wider, in groups of no whole blocks, or not exact in fp16.
    """
    grid, width = q.grid, q.shape[1]
    if not is_integer(grid) or grid.symmetric or grid.levels.bits > 5:
        return None
    if width % BLOCK or (grid.group_size or width) % BLOCK or not fits_half(q.params["scale"]):
        return None
    scale, zero = (q.params[name].float().expand(q.shape[0], -1) for name in ("scale", "zero"))
    params = {"d": scale.to(torch.float16), "m": (-scale * zero).to(torch.float16)}
    repeats = width // BLOCK // scale.shape[1]
    wider = LAYOUTS["Q5_1" if grid.levels.bits == 5 else "Q4_1"].grid
    return Quantized(wider, q.codes, {name: value.repeat_interleave(repeats, 1) for name, value in params.items()})


@cache
def type_of(grid: Grid) -> str:
    """ggml's name of a grid. Raises Unsupported."""
    stored_grid = grid.with_scale("fp16") if is_integer(grid) else grid
    if stored_grid not in TYPE_OF:
        types = (f"{name} (the grid {OTHERWISE[name]})" if name in OTHERWISE else name for name in LAYOUTS)
        raise Unsupported(f"gguf has no type for {grid}; it has {', '.join(types)}")
    return TYPE_OF[stored_grid]


def layout_of(grid: Grid, width: int) -> BlockLayout:
    """Raises Unsupported where blocks do not fill a row."""
    layout = LAYOUTS[type_of(grid)]
    if width % layout.block:
        raise Unsupported(
            f"gguf: {type_of(grid)} stores blocks of {layout.block} weights, which rows of {width} do not fill"
        )
    return layout
