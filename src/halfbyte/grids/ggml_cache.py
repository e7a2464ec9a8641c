"""Types of ggml that llama.cpp keeps a KV cache in (ggml/src/ggml-quants.c quantize_row_*_ref), 32 values to a block.

q8_0         an fp16 scale, the largest size over 127
q4_0, q5_0   an fp16 scale: the value of the largest size is the lowest number
q4_1, q5_1   an fp16 scale and an fp16 minimum

Heads of a multiple of 64 are rotated first (src/llama-kv-cache.cpp, of 2026), which spreads what sticks out over the
blocks. A Hadamard matrix is its own inverse, and queries are rotated likewise: so attention computes with rounded
values rotated back.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from halfbyte.errors import BadRequest
from halfbyte.grids.activations import ActivationGrid
from halfbyte.grids.grid import Params

PATTERN = re.compile(r"q(?P<bits>[458])_(?P<minimum>[01])")
BLOCK = 32
ROTATED = 64
"""Heads of a multiple of this are rotated."""


@dataclass(frozen=True)
class GGMLCacheGrid(ActivationGrid):
    """Keys or values of a head."""

    name: str
    whole: bool
    """Whether the largest part of a head is rotated that can be (keys), or 64 values at a time (values)."""

    @property
    def static(self) -> bool:
        """False: llama.cpp finds scales as it runs."""
        return False

    @classmethod
    def parse(cls, name: str, whole: bool) -> "GGMLCacheGrid":
        """The type of a name such as q8_0; `whole` as the field. Raises BadRequest for others."""
        if not PATTERN.fullmatch(name) or name == "q8_1":
            raise BadRequest(f"'{name}' is no type of a KV cache of llama.cpp; it has q8_0, q5_1, q5_0, q4_1, q4_0")
        return cls(name, whole)

    def __str__(self) -> str:
        return self.name

    def params(self, x: Float[Tensor, "... in"], stored: Mapping[str, Tensor]) -> Params:
        """Nothing: `round` finds scales itself. Raises BadRequest for heads that blocks do not divide."""
        if x.shape[-1] % BLOCK:
            raise BadRequest(f"{self} has blocks of {BLOCK}, which do not divide heads of {x.shape[-1]}")
        return {}

    def round(self, x: Float[Tensor, "... in"], params: Mapping[str, Tensor]) -> Float32[Tensor, "... in"]:
        """Rotated, rounded block by block, and rotated back."""
        size = self._rotation(x.shape[-1])
        rotation = _hadamard(size).to(x.device)
        turned = x.float().unflatten(-1, (-1, size)) @ rotation
        return (self._rounded(turned.reshape(-1, BLOCK)).view(turned.shape) @ rotation).flatten(-2)

    def _rotation(self, width: int) -> int:
        if width % ROTATED:
            return 1
        return width & -width if self.whole else ROTATED

    def _rounded(self, x: Float32[Tensor, "blocks 32"]) -> Float32[Tensor, "blocks 32"]:
        bits, has_minimum = int(self.name[1]), self.name.endswith("1")
        top = (1 << bits) - 1
        if has_minimum:
            low = x.amin(-1, keepdim=True)
            scale = (x.amax(-1, keepdim=True) - low) / top
            return torch.floor((x - low) * _inverse(scale) + 0.5).clamp(max=top) * _half(scale) + _half(low)
        if bits == 8:
            scale = x.abs().amax(-1, keepdim=True) / 127
            return torch.round(x * _inverse(scale)) * _half(scale)
        middle = 1 << (bits - 1)
        scale = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -middle
        return (torch.floor(x * _inverse(scale) + middle + 0.5).clamp(max=top) - middle) * _half(scale)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _half(value: Tensor) -> Tensor:
    return value.half().float()


def _hadamard(size: int) -> Float32[Tensor, "size size"]:
    """Orthonormal and symmetric; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
