"""One byte for each weight (compressed-tensors compressors/{naive_quantized,mxfp8}/base.py).

weight             float8_e4m3fn or int8 [out, in]
weight_scale       [1], [out, 1], [ceil(out / 128), ceil(in / 128)] or [out, groups]; MXFP8: uint8 [out, in / 32], a power of two
weight_zero_point  int8, like the scales; absent when symmetric

naive-quantized, float-quantized and int-quantized differ in their name only: the last two are for quantized inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.containers.compressed.layout import SCALE_NAMES, Layout, arguments, float_grid
from halfbyte.containers.container import Config, span_of
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.floats import FLOAT_GRIDS, SIDE, FloatGrid
from halfbyte.grids.grid import Grid, Quantized, Shape
from halfbyte.grids.scalar import SCALE_DTYPES, IntGrid

MXFP8 = FLOAT_GRIDS["mxfp8-e4m3"]


class Unpacked(Layout):
    """FP8 is written and read. INT8 with quantized inputs is read, as the weights that it has; those alone are pack-quantized."""

    format = "naive-quantized"

    def writes(self, grid: Grid) -> bool:
        return isinstance(grid, FloatGrid) and grid.element.name == "e4m3" and grid.scale in SCALE_DTYPES

    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        grid = float_grid(grid)
        scales = (1,) if grid.span == "tensor" else grid.scales_shape(shape)
        return {"weight": Spec(shape, torch.float8_e4m3fn), "weight_scale": Spec(scales, SCALE_DTYPES[grid.scale])}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        scale = q.params["scale"]
        return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": scale.reshape(-1) if float_grid(q.grid).span == "tensor" else scale}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        codes = tensors["weight"].view(torch.uint8)
        scale = tensors["weight_scale"]
        if isinstance(grid, FloatGrid):
            return Quantized(grid, codes, {"scale": scale.reshape(grid.scales_shape(shape))})
        params = {"scale": scale.reshape(1 if scale.numel() == 1 else shape[0], -1)}
        if "weight_zero_point" in tensors:
            params["zero"] = tensors["weight_zero_point"].reshape(params["scale"].shape).view(torch.uint8) ^ 128
        return Quantized(grid, codes ^ 128, params)  # from signed to unsigned

    def find(self, entries: Mapping[str, Entry], module: str, said: list[Config]) -> tuple[Grid, Shape] | None:
        weight, scale = entries.get(f"{module}.weight"), entries.get(f"{module}.weight_scale")
        if weight is None or scale is None or weight.dtype not in (torch.int8, torch.float8_e4m3fn) or scale.dtype not in SCALE_NAMES:
            return None
        out, width = weight.shape
        rows, groups = scale.shape if len(scale.shape) == 2 else (1, 1)
        if weight.dtype == torch.int8:
            span = "tensor" if rows == 1 and out > 1 else span_of(width, groups, {weights.get("group_size") for weights in said})
            return IntGrid(8, span, f"{module}.weight_zero_point" not in entries, SCALE_NAMES[scale.dtype]), (out, width)
        for span in ("channel", "tensor", "block"):
            grid = FloatGrid(MXFP8.element, span, SCALE_NAMES[scale.dtype])
            if grid.scales_shape((out, width)) == (rows, groups):
                return grid, (out, width)
        raise Unsupported(f"{module}: {rows} x {groups} scales for {out} x {width} weights are not read; blocks of {SIDE} x {SIDE} are, and rows")

    def arguments(self, grid: Grid) -> Config:
        span = str(float_grid(grid).span)
        return arguments(8, "float", span, block_structure=[SIDE, SIDE] if span == "block" else None)


class MX8(Layout):
    """MXFP8: scales are bytes."""

    format = "mxfp8-quantized"

    def writes(self, grid: Grid) -> bool:
        return grid == MXFP8

    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        return {"weight": Spec(shape, torch.float8_e4m3fn), "weight_scale": Spec(MXFP8.scales_shape(shape), torch.uint8)}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": q.params["scale"]}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        return Quantized(grid, tensors["weight"].view(torch.uint8), {"scale": tensors["weight_scale"]})

    def find(self, entries: Mapping[str, Entry], module: str, said: list[Config]) -> tuple[Grid, Shape] | None:
        weight, scale = entries.get(f"{module}.weight"), entries.get(f"{module}.weight_scale")
        if weight is None or scale is None or weight.dtype != torch.float8_e4m3fn or scale.dtype != torch.uint8:
            return None
        if scale.shape != MXFP8.scales_shape(weight.shape):
            raise Unsupported(f"{module}: {tuple(scale.shape)} scales for {tuple(weight.shape)} weights are no MXFP8")
        return MXFP8, weight.shape

    def arguments(self, grid: Grid) -> Config:
        return arguments(8, "float", "group", 32, scale_dtype="torch.uint8")
