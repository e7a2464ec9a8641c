"""pack-quantized: integers of 2 to 8 bits (compressed-tensors compressors/pack_quantized/base.py).

weight_packed      int32 [out, ceil(in * bits / 32)], packed along in, stored unsigned
weight_scale       [out, groups], in the dtype of the model
weight_zero_point  int32 [ceil(out * bits / 32), groups], packed along out; absent when symmetric
weight_shape       int64 [2]
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from halfbyte.containers import bits
from halfbyte.containers.compressed.layout import SCALE_NAMES, Layout, arguments_of_integers, may_be
from halfbyte.containers.container import ONE, Config, PartSpec, any_of, described, granularity_of, integer, stored
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.activations import FLOATS, ScaledActivations
from halfbyte.grids.grid import Grid, Shape
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.grids.scalar import SCALE_DTYPES, integers, is_integer

NAME = "compressed-tensors"


class Packed(Layout):
    """Words of codes, with inputs of 16 bits or in FP8 (W2A16 to W8A16, W4AFP8)."""

    format = "pack-quantized"

    def writes(self, scheme: Scheme) -> bool:
        """Integers, under activations in 16 bits or FP8."""
        return is_integer(scheme.weight) and (
            scheme.activations is None
            or (isinstance(scheme.activations, ScaledActivations) and scheme.activations.number in FLOATS)
        )

    def check(self, grid: Grid, shape: Shape) -> None:
        """Raise Unsupported for zero points of a whole matrix, which are not packed."""
        grid = integer(grid, NAME)
        if grid.granularity == "tensor" and not grid.symmetric:
            raise Unsupported(f"compressed-tensors packs zero points per channel or group only, not {grid}")

    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        """Packed codes, scales, zero points if asymmetric, and the shape."""
        grid, (out, width) = integer(grid, NAME), shape
        groups = grid.groups(width)
        specs = {
            "weight_packed": Spec((out, -(-width * grid.levels.bits // 32)), torch.int32),
            "weight_scale": Spec((1,) if grid.granularity == "tensor" else (out, groups), SCALE_DTYPES[grid.scale]),
            "weight_shape": Spec((2,), torch.int64),
        }
        if not grid.symmetric:
            specs["weight_zero_point"] = Spec((-(-out * grid.levels.bits // 32), groups), torch.int32)
        return specs

    def parts(self, grid: Grid, shape: Shape) -> dict[str, PartSpec]:
        """As `plan`; one scale may have no dimension, and the shape be int32."""
        parts, tensor = super().parts(grid, shape), integer(grid, NAME).granularity == "tensor"
        scale = (
            {"weight_scale": any_of((*ONE, (1, 1)), [self.plan(grid, shape)["weight_scale"].dtype])} if tensor else {}
        )
        return {**parts, **scale, "weight_shape": any_of([(2,)], [torch.int64, torch.int32])}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """Codes packed along in-features, zero points along out-features."""
        grid = integer(q.grid, NAME)
        tensors = {
            "weight_packed": bits.pack(q.codes, grid.levels.bits),
            "weight_scale": q.params["scale"].reshape(-1) if grid.granularity == "tensor" else q.params["scale"],
            "weight_shape": torch.tensor(q.shape),
        }
        if not grid.symmetric:
            tensors["weight_zero_point"] = bits.pack(q.params["zero"].T, grid.levels.bits).T.contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        """The inverse of `pack`; a padded last word is cut."""
        grid, (out, width) = integer(grid, NAME), shape
        scale = tensors["weight_scale"]
        params = {"scale": scale.reshape(1, 1) if grid.granularity == "tensor" else scale}
        if not grid.symmetric:
            params["zero"] = bits.unpack(tensors["weight_zero_point"].T, grid.levels.bits, out).T.contiguous()
        return Quantized(grid, bits.unpack(tensors["weight_packed"], grid.levels.bits, width), params)

    def find(self, entries: Mapping[str, Entry], module: str, weight_args: list[Config]) -> tuple[Grid, Shape] | None:
        """A module with int32 words, of the shape that is stored beside them."""
        if f"{module}.weight_packed" not in entries or entries[f"{module}.weight_packed"].dtype != torch.int32:
            return None
        shape = stored(entries, f"{module}.weight_shape", [torch.int64, torch.int32], 1)
        if shape.shape != (2,):
            raise BadCheckpoint(f"'{module}.weight_shape' is {described(shape)}, which should be two numbers")
        out, width = shape.read().tolist()
        return _grid(entries, module, weight_args, out, width), (out, width)

    def arguments(self, grid: Grid) -> Config:
        """Bits, granularity and symmetry of the integers."""
        return arguments_of_integers(integer(grid, NAME))


def _grid(entries: Mapping[str, Entry], module: str, weight_args: list[Config], out: int, width: int) -> Grid:
    """The grid as the tensors show it, whatever the label; where shapes leave a choice, `weight_args` decide."""
    packed, name = stored(entries, f"{module}.weight_packed", [torch.int32]), f"{module}.weight_scale"
    scale = stored(entries, name, SCALE_NAMES, len(entries[name].shape) if name in entries else 2)
    groups = scale.shape[-1] if len(scale.shape) == 2 else 1
    named = {weights["num_bits"] for weights in weight_args if "num_bits" in weights} or range(2, 9)
    width_bits = next((b for b in range(2, 9) if b in named and -(-width * b // 32) == packed.shape[1]), None)
    if width_bits is None or not groups:
        raise BadCheckpoint(
            f"{module}: {described(packed)} words and {described(scale)} scales are no packing of {out} x {width} in "
            f"{' or '.join(map(str, named))} bits"
        )
    is_tensor = prod(scale.shape) == 1 and out > 1 and may_be(weight_args, "strategy", "tensor")
    symmetric = f"{module}.weight_zero_point" not in entries
    if symmetric and not may_be(weight_args, "symmetric", True):
        raise BadCheckpoint(
            f"'{module}.weight_zero_point' is not stored, and config.json says that there is one; the checkpoint "
            "is not whole"
        )
    granularity = (
        "tensor"
        if is_tensor
        else granularity_of(module, width, groups, [weights.get("group_size") for weights in weight_args])
    )
    return integers(width_bits, granularity, symmetric, SCALE_NAMES[scale.dtype])
