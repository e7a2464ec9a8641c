"""Moving planes of bits between codes and bytes: the torch references.

A plane is some bits of every code, from bit `shift` on. Byte j of a run of `stride` bytes holds those of codes j,
j + stride, j + 2 stride, ...; with a stride of 1, byte j those of codes 8 j to 8 j + 7, the first code lowest.
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

from halfbyte.kernels.choose import faster

Bytes = UInt8[Tensor, "blocks _"]


@faster(cpu="planes")
def pack(codes: Bytes, bits: int, shift: int, stride: int) -> Bytes:
    """One plane of the codes of blocks."""
    apart = codes.unflatten(1, (-1, 8 // bits, stride)) >> shift & ((1 << bits) - 1)
    return (apart << _places(codes, bits)).sum(2, dtype=torch.uint8).flatten(1)


@faster(cpu="planes")
def unpack(raw: Bytes, codes: Bytes, bits: int, shift: int, stride: int) -> None:
    """Add one plane to codes that do not have it yet."""
    apart = raw.unflatten(1, (-1, 1, stride)) >> _places(codes, bits) & ((1 << bits) - 1)
    codes |= (apart << shift).flatten(1)


def _places(like: Tensor, bits: int) -> UInt8[Tensor, "places 1"]:
    """Where in a byte each of its codes begins."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)[:, None]
