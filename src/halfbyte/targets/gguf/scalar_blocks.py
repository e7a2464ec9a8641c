"""Byte layouts of ggml's types with evenly spaced levels (block_q4_0 ... block_tq2_0 in ggml-common.h).

A block is a row of fields. A field is an fp16 number, a packing of the integer scales of its groups, or a plane: some
bits of every code. Planes never split a code over bytes, and interleave codes that lie `stride` apart, so that SIMD
readers need shifts only.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from halfbyte import grids
from halfbyte.grids.grid import Grid, Params
from halfbyte.grids.quantized import Quantized
from halfbyte.kernels import planes
from halfbyte.targets.gguf.layout import BlockLayout
from halfbyte.targets.gguf.names import TYPES

Bytes = UInt8[Tensor, "rows _"]
SIGN = 128
"""The top bit: ggml's int8 is the code less 128."""


class Half(NamedTuple):
    """One fp16 number per block."""

    param: str
    size = 2


class GroupScales(NamedTuple):
    """The integer scales of a block's groups: `pack` takes the params of `names`, a row per block, and `unpack` returns
    them."""

    size: int
    names: tuple[str, ...]
    pack: Callable[..., Bytes]
    unpack: Callable[[Bytes], tuple[Tensor, ...]]


class Plane(NamedTuple):
    """`bits` of every code, from bit `shift` on.

    Byte j of a run of `stride` bytes holds those of codes j, j + stride, j + 2 stride, ...; with a stride of 1, byte j
    those of codes 8 j to 8 j + 7.
    """

    size: int
    bits: int
    shift: int
    stride: int


class Trits(NamedTuple):
    """Codes 0, 1, 2 as base 3, from code `first` on: `digits` of them, `size` codes apart, in each byte.

    A byte is the number of `digits` digits as a fraction of 3^5, in 256ths and rounded up, so that multiplying by 3
    brings up the next digit.
    """

    size: int
    digits: int
    first: int


Field = Half | GroupScales | Plane | Trits


def pack(fields: tuple[Field, ...], q: Quantized) -> UInt8[Tensor, "out row_bytes"]:
    """The rows of a matrix as a file holds them."""
    out, width = q.shape
    block = q.grid.group_size or width
    codes = q.codes.cpu().contiguous().view(-1, block)
    raw = torch.empty(codes.shape[0], sum(field.size for field in fields), dtype=torch.uint8)
    at = 0
    for field in fields:
        here = raw[:, at : at + field.size]
        match field:
            case Half(name):
                here.copy_(q.params[name].cpu().reshape(-1, 1).contiguous().view(torch.uint8))
            case GroupScales():
                here.copy_(field.pack(*(q.params[name].cpu().reshape(codes.shape[0], -1) for name in field.names)))
            case Plane():
                here.copy_(_pack_plane(codes, field))
            case Trits():
                here.copy_(_pack_trits(codes, field))
        at += field.size
    return raw.view(out, -1)


def unpack(fields: tuple[Field, ...], raw: UInt8[Tensor, "out row_bytes"], grid: Grid) -> Quantized:
    """The inverse of `pack`."""
    out = raw.shape[0]
    blocks = raw.contiguous().view(-1, sum(field.size for field in fields))
    codes = torch.zeros(blocks.shape[0], grid.group_size or 0, dtype=torch.uint8, device=raw.device)
    params: Params = {}
    at = 0
    for field in fields:
        here = blocks[:, at : at + field.size]
        match field:
            case Half(name):
                params[name] = here.contiguous().view(torch.float16).view(out, -1)
            case GroupScales():
                params |= {
                    name: values.reshape(out, -1) for name, values in zip(field.names, field.unpack(here), strict=True)
                }
            case Plane():
                _unpack_plane(here, codes, field)
            case Trits():
                _unpack_trits(here, codes, field)
        at += field.size
    return Quantized(grid, codes.view(out, -1), params)


def _pack_plane(codes: Bytes, field: Plane) -> Bytes:
    if field.bits == 8:
        return codes ^ SIGN
    return planes.pack(codes, field.bits, field.shift, field.stride)


def _unpack_plane(raw: Bytes, codes: Bytes, field: Plane) -> None:
    if field.bits == 8:
        codes.copy_(raw ^ SIGN)
        return
    planes.unpack(raw, codes, field.bits, field.shift, field.stride)


def _pack_trits(codes: Bytes, field: Trits) -> Bytes:
    digits = (
        codes[:, field.first : field.first + field.digits * field.size]
        .view(-1, field.digits, field.size)
        .to(torch.int32)
    )
    number = torch.zeros_like(digits[:, 0])
    for k in range(5):
        number = number * 3 + (digits[:, k] if k < field.digits else 0)
    return ((number * 256 + 242) // 243).to(torch.uint8)


def _unpack_trits(raw: Bytes, codes: Bytes, field: Trits) -> None:
    for k in range(field.digits):
        start = field.first + k * field.size
        codes[:, start : start + field.size] = ((raw.to(torch.int32) * 3**k & 255) * 3 >> 8).to(torch.uint8)


def _pack_4_4(scale: Bytes, minimum: Bytes) -> Bytes:
    return scale | minimum << 4


def _unpack_4_4(raw: Bytes) -> tuple[Tensor, ...]:
    return raw & 15, raw >> 4


def _pack_6_6(scale: Bytes, minimum: Bytes) -> Bytes:
    """Groups 0-3: six bits each of scale and minimum, and above them the top two bits of groups 4-7, whose low bits
    share bytes."""
    upper = (scale[:, :4] | scale[:, 4:] >> 4 << 6, minimum[:, :4] | minimum[:, 4:] >> 4 << 6)
    return torch.cat([*upper, scale[:, 4:] & 15 | minimum[:, 4:] << 4], 1)


def _unpack_6_6(raw: Bytes) -> tuple[Tensor, ...]:
    scale, minimum, low = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    return torch.cat([scale & 63, low & 15 | scale >> 6 << 4], 1), torch.cat(
        [minimum & 63, low >> 4 | minimum >> 6 << 4], 1
    )


def _pack_6(scale: Tensor) -> Bytes:
    """Sixteen scales + 32: low halves of groups 0-7 beside those of 8-15, then the top two bits of groups j, j + 4, j +
    8, j + 12."""
    code = (scale + 32).view(torch.uint8)
    high = (code >> 4).view(-1, 4, 4)
    return torch.cat(
        [code[:, :8] & 15 | code[:, 8:] << 4, high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6], 1
    )


def _unpack_6(raw: Bytes) -> tuple[Tensor, ...]:
    low, high = raw[:, :8], raw[:, 8:]
    top = torch.cat([(high >> shift & 3) << 4 for shift in (0, 2, 4, 6)], 1)
    return ((torch.cat([low & 15, low >> 4], 1) | top).view(torch.int8) - 32,)


def _pack_8(scale: Tensor) -> Bytes:
    return scale.contiguous().view(torch.uint8)


def _unpack_8(raw: Bytes) -> tuple[Tensor, ...]:
    return (raw.contiguous().view(torch.int8),)


SCALES_4_4 = GroupScales(16, ("scale", "min"), _pack_4_4, _unpack_4_4)
SCALES_6_6 = GroupScales(12, ("scale", "min"), _pack_6_6, _unpack_6_6)
SCALES_6 = GroupScales(12, ("scale",), _pack_6, _unpack_6)
SCALES_8 = GroupScales(16, ("scale",), _pack_8, _unpack_8)

# Plane: size, bits, shift, stride
FIELDS: dict[str, tuple[Field, ...]] = {
    "Q4_0": (Half("scale"), Plane(16, 4, 0, 16)),
    "Q4_1": (Half("d"), Half("m"), Plane(16, 4, 0, 16)),
    "Q5_0": (Half("scale"), Plane(4, 1, 4, 1), Plane(16, 4, 0, 16)),
    "Q5_1": (Half("d"), Half("m"), Plane(4, 1, 4, 1), Plane(16, 4, 0, 16)),
    "Q8_0": (Half("scale"), Plane(32, 8, 0, 32)),
    "Q2_K": (SCALES_4_4, Plane(64, 2, 0, 32), Half("d"), Half("dmin")),
    "Q3_K": (Plane(32, 1, 2, 32), Plane(64, 2, 0, 32), SCALES_6, Half("d")),
    "Q4_K": (Half("d"), Half("dmin"), SCALES_6_6, Plane(128, 4, 0, 32)),
    "Q5_K": (Half("d"), Half("dmin"), SCALES_6_6, Plane(32, 1, 4, 32), Plane(128, 4, 0, 32)),
    "Q6_K": (Plane(128, 4, 0, 64), Plane(64, 2, 4, 32), SCALES_8, Half("d")),
    "TQ1_0": (Trits(32, 5, 0), Trits(16, 5, 160), Trits(4, 4, 240), Half("d")),
    "TQ2_0": (Plane(64, 2, 0, 32), Half("d")),
}


def _layout(grid: Grid, fields: tuple[Field, ...]) -> BlockLayout:
    """Blocks of these fields."""
    size = sum(field.size for field in fields)
    return BlockLayout(grid, grid.group_size or 0, size, partial(pack, fields), partial(unpack, fields))


SCALAR_LAYOUTS: dict[str, BlockLayout] = {
    name: _layout(grids.parse(TYPES[name]), fields) for name, fields in FIELDS.items()
}
"""By ggml's name of the type."""
