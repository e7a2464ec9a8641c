"""One byte for each weight (compressed-tensors compressors/{naive_quantized,mxfp8}/base.py).

weight             float8_e4m3fn or int8 [out, in]
weight_scale       [1], [out, 1], [ceil(out / 128), ceil(in / 128)] or [out, groups]; MXFP8: uint8 [out, in / 32], a
power of two weight_zero_point  int8, like the scales; absent when symmetric

naive-quantized, float-quantized and int-quantized differ in their name only: the last two are for quantized inputs.
Integers of fewer bits take a byte too where inputs are integers (W4A8), as the readers have it.
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from halfbyte.containers.compressed.layout import SCALE_NAMES, Layout, arguments, arguments_of_integers, may_be
from halfbyte.containers.container import ONE, Config, PartSpec, any_of, granularity_of, integer, stored
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.grid import Grid, Shape
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.grids.scalar import SCALAR_GRIDS, SCALE_DTYPES, fp8, integers, is_float, is_integer
from halfbyte.kernels.scales import SIDE

MXFP8 = SCALAR_GRIDS["mxfp8-e4m3"]


class Unpacked(Layout):
    """Bytes. `format` says what the inputs are: the names in the file are the same."""

    def __init__(self, name: str):
        self.format = name

    def writes(self, scheme: Scheme) -> bool:
        """Integers under rounded activations, and FP8: each under the name that says so."""
        grid = scheme.weight
        if is_integer(grid):
            return self.format == "int-quantized" and scheme.activations is not None
        is_fp8 = is_float(grid) and grid.levels.name == "e4m3" and grid.scale in SCALE_DTYPES
        return is_fp8 and self.format == ("float-quantized" if scheme.activations else "naive-quantized")

    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        """A byte for each weight, scales, and zero points if asymmetric."""
        if is_float(grid):
            scales = (1,) if grid.granularity == "tensor" else grid.scales_shape(shape)
            return {"weight": Spec(shape, torch.float8_e4m3fn), "weight_scale": Spec(scales, SCALE_DTYPES[grid.scale])}
        grid = integer(grid, self.format)
        scales = (1,) if grid.granularity == "tensor" else (shape[0], grid.groups(shape[1]))
        zero = {} if grid.symmetric else {"weight_zero_point": Spec(scales, torch.int8)}
        return {"weight": Spec(shape, torch.int8), "weight_scale": Spec(scales, SCALE_DTYPES[grid.scale]), **zero}

    def parts(self, grid: Grid, shape: Shape) -> dict[str, PartSpec]:
        """As `plan`; scales of a tensor or of channels may have fewer dimensions."""
        plan, granularity = (
            self.plan(grid, shape),
            grid.granularity if is_float(grid) else integer(grid, self.format).granularity,
        )
        shapes = {"tensor": (*ONE, (1, 1)), "channel": ((shape[0], 1), (shape[0],))}.get(
            str(granularity), (plan["weight_scale"].shape,)
        )
        return {
            name: PartSpec((spec,)) if name == "weight" else any_of(shapes, [spec.dtype]) for name, spec in plan.items()
        }

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """FP8 as it is, integers as signed bytes."""
        scale = q.params["scale"].reshape(self.plan(q.grid, q.shape)["weight_scale"].shape)
        if is_float(q.grid):
            return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": scale}
        middle = integer(q.grid, self.format).midpoint
        zero = {"weight_zero_point": _signed(q.params["zero"], middle)} if "zero" in q.params else {}
        return {"weight": _signed(q.codes, middle), "weight_scale": scale, **zero}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        """The inverse of `pack`."""
        scale = tensors["weight_scale"]
        if is_float(grid):
            return Quantized(
                grid, tensors["weight"].view(torch.uint8), {"scale": scale.reshape(grid.scales_shape(shape))}
            )
        middle = integer(grid, self.format).midpoint
        params = {"scale": scale.reshape(1 if scale.numel() == 1 else shape[0], -1)}
        if "weight_zero_point" in tensors:
            params["zero"] = _unsigned(tensors["weight_zero_point"].reshape(params["scale"].shape), middle)
        return Quantized(grid, _unsigned(tensors["weight"], middle), params)

    def find(self, entries: Mapping[str, Entry], module: str, weight_args: list[Config]) -> tuple[Grid, Shape] | None:
        """A module of bytes; the config decides between blocks and rows where shapes leave a choice."""
        weight, scale = entries.get(f"{module}.weight"), entries.get(f"{module}.weight_scale")
        if (
            weight is None
            or scale is None
            or weight.dtype not in (torch.int8, torch.float8_e4m3fn)
            or scale.dtype not in SCALE_NAMES
        ):
            return None
        out, width = stored(entries, f"{module}.weight", [weight.dtype]).shape
        rows, groups = scale.shape if len(scale.shape) == 2 else (prod(scale.shape), 1)
        granularities = [
            granularity
            for granularity in ("channel", "tensor", "block")
            if may_be(weight_args, "strategy", granularity)
        ]
        if weight.dtype == torch.int8:
            if (rows, groups) == (1, 1) and out > 1 and "tensor" not in granularities:
                raise BadCheckpoint(f"'{module}.weight_scale' is one number, and config.json says that there are more")
            if f"{module}.weight_zero_point" not in entries and not may_be(weight_args, "symmetric", True):
                raise BadCheckpoint(
                    f"'{module}.weight_zero_point' is not stored, and config.json says that there is one; the "
                    "checkpoint is not whole"
                )
            granularity = (
                "tensor"
                if rows == 1 and out > 1
                else granularity_of(module, width, groups, [weights.get("group_size") for weights in weight_args])
            )
            return integers(
                _bits(weight, weight_args),
                granularity,
                f"{module}.weight_zero_point" not in entries,
                SCALE_NAMES[scale.dtype],
            ), (out, width)
        for granularity in granularities:
            grid = fp8("e4m3", granularity, SCALE_NAMES[scale.dtype])
            if grid.scales_shape((out, width)) == (rows, groups):
                return grid, (out, width)
        raise Unsupported(
            f"{module}: {rows} x {groups} scales for {out} x {width} weights are not read; blocks of {SIDE} x {SIDE} "
            "are, and rows"
        )

    def arguments(self, grid: Grid) -> Config:
        """Bits and granularity of integers, or of FP8."""
        if is_float(grid):
            return arguments(
                8, "float", str(grid.granularity), block_structure=[SIDE, SIDE] if grid.granularity == "block" else None
            )
        return arguments_of_integers(integer(grid, self.format))


def _signed(codes: Tensor, middle: int) -> Tensor:
    return (codes.to(torch.int16) - middle).to(torch.int8)


def _unsigned(codes: Tensor, middle: int) -> Tensor:
    return (codes.to(torch.int16) + middle).to(torch.uint8)


def _bits(weight: Entry, weight_args: list[Config]) -> int:
    """Of integers in bytes: what the config says, or, where it names several, the fewest that hold these."""
    named = sorted(
        {
            bits
            for weights in weight_args
            if weights.get("type", "int") == "int" and 2 <= (bits := weights.get("num_bits", 8)) <= 8
        }
        or {8}
    )
    if len(named) == 1:
        return named[0]
    most = int(weight.read().int().add(0.5).abs().max())  # -8 and 7 both take 4 bits
    return next((b for b in named if most < 1 << (b - 1)), 8)


NAIVE, FLOAT, INT = Unpacked("naive-quantized"), Unpacked("float-quantized"), Unpacked("int-quantized")


class MX8(Layout):
    """MXFP8: scales are bytes."""

    format = "mxfp8-quantized"

    def writes(self, scheme: Scheme) -> bool:
        """MXFP8, whatever the activations."""
        return scheme.weight == MXFP8

    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        """FP8 weights, and a byte of scale per 32 in-features."""
        return {
            "weight": Spec(shape, torch.float8_e4m3fn),
            "weight_scale": Spec(MXFP8.scales_shape(shape), torch.uint8),
        }

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """Codes and scales as they are."""
        return {"weight": q.codes.view(torch.float8_e4m3fn), "weight_scale": q.params["scale"]}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        """Codes and scales as they are."""
        return Quantized(grid, tensors["weight"].view(torch.uint8), {"scale": tensors["weight_scale"]})

    def find(self, entries: Mapping[str, Entry], module: str, weight_args: list[Config]) -> tuple[Grid, Shape] | None:
        """A module of FP8 weights with scales in bytes. Raises Unsupported where these do not fit each other."""
        weight, scale = entries.get(f"{module}.weight"), entries.get(f"{module}.weight_scale")
        if weight is None or scale is None or weight.dtype != torch.float8_e4m3fn or scale.dtype != torch.uint8:
            return None
        stored(entries, f"{module}.weight", [weight.dtype])
        if scale.shape != MXFP8.scales_shape(weight.shape):
            raise Unsupported(f"{module}: {tuple(scale.shape)} scales for {tuple(weight.shape)} weights are no MXFP8")
        return MXFP8, weight.shape

    def arguments(self, grid: Grid) -> Config:
        """Groups of 32 with scales in bytes."""
        return arguments(8, "float", "group", 32, scale_dtype="torch.uint8")
