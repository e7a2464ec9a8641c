"""Floats of 4 and 6 bits (compressed-tensors compressors/{nvfp4,mxfp4,mxfp6}).

weight_packed        uint8 [out, in * bits / 8]: the first of neighbours in the low bits
weight_scale         MX: uint8 [out, in / 32], a power of two. NVFP4: float8_e4m3fn [out, in / 16]
weight_global_scale  NVFP4: float32 [1], by which scales are divided
"""

from collections.abc import Mapping

import torch
from jaxtyping import UInt8
from torch import Tensor

from halfbyte.containers.compressed.layout import Layout, arguments
from halfbyte.containers.container import ONE, Config, PartSpec, any_of, stored
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.grid import Grid, Shape
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.grids.scalar import NVFP4, SCALAR_GRIDS


class MX(Layout):
    """MXFP4 and MXFP6: a power of two per 32 in-features."""

    def __init__(self, format: str, grid: Grid, bits: int):
        self.format, self.grid, self.width_bits = format, grid, bits

    def writes(self, scheme: Scheme) -> bool:
        """Its own grid, whatever the activations."""
        return scheme.weight == self.grid

    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        """Packed codes, and a byte of scale per 32 in-features."""
        out, width = shape
        return {
            "weight_packed": Spec((out, width * self.width_bits // 8), torch.uint8),
            "weight_scale": Spec((out, width // 32), torch.uint8),
        }

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """Two 4-bit codes to a byte, or four 6-bit codes to three."""
        return {"weight_packed": _pack(q.codes, self.width_bits), "weight_scale": q.params["scale"]}

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        """The inverse of `pack`."""
        return Quantized(grid, unpack(tensors["weight_packed"], self.width_bits), {"scale": tensors["weight_scale"]})

    def find(self, entries: Mapping[str, Entry], module: str, weight_args: list[Config]) -> tuple[Grid, Shape] | None:
        """A module whose words and scales are bytes that fit each other."""
        packed, scale = entries.get(f"{module}.weight_packed"), entries.get(f"{module}.weight_scale")
        if (
            packed is None
            or scale is None
            or packed.dtype != torch.uint8
            or scale.dtype != torch.uint8
            or len(scale.shape) != 2
        ):
            return None
        out, width = scale.shape[0], scale.shape[1] * 32
        return (self.grid, (out, width)) if packed.shape == (out, width * self.width_bits // 8) else None

    def arguments(self, grid: Grid) -> Config:
        """Groups of 32 with scales in bytes."""
        return arguments(self.width_bits, "float", "group", 32, scale_dtype="torch.uint8")


class NV4(Layout):
    """NVFP4: an E4M3 scale per 16 in-features, under one divisor."""

    format = "nvfp4-pack-quantized"
    grid = NVFP4

    def writes(self, scheme: Scheme) -> bool:
        """NVFP4, whatever the activations."""
        return scheme.weight == self.grid

    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        """Packed codes, an E4M3 scale per 16 in-features, and the divisor."""
        out, width = shape
        return {
            "weight_packed": Spec((out, width // 2), torch.uint8),
            "weight_scale": Spec((out, width // 16), torch.float8_e4m3fn),
            "weight_global_scale": Spec((1,), torch.float32),
        }

    def parts(self, grid: Grid, shape: Shape) -> dict[str, PartSpec]:
        """As `plan`; the divisor may have no dimension."""
        return {**super().parts(grid, shape), "weight_global_scale": any_of(ONE, [torch.float32])}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """Two codes to a byte, the first in the low bits."""
        return {
            "weight_packed": _pack(q.codes, 4),
            "weight_scale": q.params["scale"].view(torch.float8_e4m3fn),
            "weight_global_scale": q.params["divisor"].view(1),
        }

    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        """The inverse of `pack`."""
        params = {
            "scale": tensors["weight_scale"].view(torch.uint8),
            "divisor": tensors["weight_global_scale"].float().view(1, 1),
        }
        return Quantized(grid, unpack(tensors["weight_packed"], 4), params)

    def find(self, entries: Mapping[str, Entry], module: str, weight_args: list[Config]) -> tuple[Grid, Shape] | None:
        """A module with bytes of codes and E4M3 scales. Raises Unsupported where these do not fit each other."""
        packed, scale = entries.get(f"{module}.weight_packed"), entries.get(f"{module}.weight_scale")
        if packed is None or scale is None or packed.dtype != torch.uint8 or scale.dtype != torch.float8_e4m3fn:
            return None
        out, width = stored(entries, f"{module}.weight_packed", [torch.uint8]).shape[0], packed.shape[1] * 2
        if scale.shape != (out, width // 16) or f"{module}.weight_global_scale" not in entries:
            raise Unsupported(f"{module}: {tuple(scale.shape)} scales for {out} x {width} weights are no NVFP4")
        return self.grid, (out, width)

    def arguments(self, grid: Grid) -> Config:
        """Groups of 16 with E4M3 scales under one of the tensor."""
        return arguments(4, "float", "tensor_group", 16, scale_dtype="torch.float8_e4m3fn")


MXFP4 = MX("mxfp4-pack-quantized", SCALAR_GRIDS["mxfp4"], 4)
MXFP6 = MX("mxfp6-pack-quantized", SCALAR_GRIDS["mxfp6-e2m3"], 6)


def _pack(codes: UInt8[Tensor, "out in"], bits: int) -> UInt8[Tensor, "out bytes"]:
    if bits == 4:
        return codes[:, ::2] | codes[:, 1::2] << 4
    a, b, c, d = codes.unflatten(1, (-1, 4)).unbind(-1)
    return torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], -1).flatten(1)


def unpack(packed: UInt8[Tensor, "out bytes"], bits: int) -> UInt8[Tensor, "out in"]:
    """Codes of 4 or 6 bits, one to a byte."""
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    x, y, z = packed.unflatten(1, (-1, 3)).unbind(-1)
    return torch.stack([x & 63, (x >> 6 | y << 2) & 63, (y >> 4 | z << 4) & 63, z >> 2], -1).flatten(1)
