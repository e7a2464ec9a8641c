"""Scalar grids: evenly spaced levels times a scale, one rounding per weight.

    int4-g128          q in [-8, 7], w = scale * q, one scale per 128 in-features
    int4-g128-asym     q in [0, 15], w = scale * (q - zero), an integer zero point per group
    int8-channel       one scale per out-feature (row)
    int8-tensor        one scale per matrix

Scales are stored in fp16 unless the name ends in `-bf16` or `-fp32`. Codes are unsigned in memory: a symmetric
grid's q is stored as q + 2^(bits-1). A scale may be negative: on a symmetric grid this gives the extra negative
level to whichever side of zero needs it (as llama.cpp's Q4_0 does), and every kernel multiplies by it just the same.
"""

import re
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.errors import BadRequest
from halfbyte.grids import rounding
from halfbyte.grids.grid import Codes, Grid, Params, Rounder, Shape

SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PATTERN = re.compile(
    r"int(?P<bits>[2-8])-(?P<span>tensor|channel|g(?P<group>[1-9]\d*))(?P<asym>-asym)?(-(?P<scale>fp16|bf16|fp32))?"
)


@dataclass(frozen=True)
class IntGrid(Grid):
    """2^bits evenly spaced levels; `granularity` says how many weights share a scale (and a zero point)."""

    bits_per_code: int
    granularity: int | str
    """In-features per group, or "channel" (the whole row), or "tensor"."""
    symmetric: bool = True
    scale: str = "fp16"

    vector_size = 1
    pattern = PATTERN

    @classmethod
    def parse(cls, name: str) -> "IntGrid":
        match = PATTERN.fullmatch(name)
        if match is None:
            raise BadRequest(
                f"'{name}' is no integer grid; write int<2..8>-<tensor|channel|gN>[-asym], such as int4-g128 or int8-channel"
            )
        span = int(match["group"]) if match["group"] else match["span"]
        return cls(int(match["bits"]), span, not match["asym"], match["scale"] or "fp16")

    def __str__(self) -> str:
        span = f"g{self.granularity}" if isinstance(self.granularity, int) else self.granularity
        return f"int{self.bits_per_code}-{span}{'' if self.symmetric else '-asym'}{'' if self.scale == 'fp16' else '-' + self.scale}"

    @property
    def group_size(self) -> int | None:
        return self.granularity if isinstance(self.granularity, int) else None

    @property
    def midpoint(self) -> int:
        """The code of zero on a symmetric grid."""
        return 1 << (self.bits_per_code - 1)

    @property
    def shares_params_across_rows(self) -> bool:
        return self.granularity == "tensor"

    def with_granularity(self, granularity: int | str) -> "IntGrid":
        return replace(self, granularity=granularity)

    def with_scale(self, scale: str) -> "IntGrid":
        return replace(self, scale=scale)

    def groups(self, width: int) -> int:
        """Groups along a row of `width` in-features."""
        if self.group_size is None:
            return 1
        if width % self.group_size:
            raise BadRequest(f"{self} does not divide a row of {width}")
        return width // self.group_size

    def bits(self, shape: Shape) -> float:
        out, width = shape
        scales = 1 if self.granularity == "tensor" else out * self.groups(width)
        overhead = SCALE_DTYPES[self.scale].itemsize * 8 + (0 if self.symmetric else self.bits_per_code)
        return self.bits_per_code + scales * overhead / (out * width)

    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        out, width = w.shape
        group = self.group_size or width
        if self.granularity == "tensor":
            w, group = w.reshape(1, -1), w.numel()
            importance = importance.expand(out, width).reshape(-1) if importance is not None else None
        self.groups(width)
        scale, zero = rounding.fit(
            w, importance, group, self.bits_per_code, self.symmetric, search, SCALE_DTYPES[self.scale]
        )
        if zero is None:
            return {"scale": scale}
        # A zero point of 0 is the zero point 2^bits - 1 of the negated scale: the same values, and every container holds it.
        return {
            "scale": torch.where(zero == 0, -scale, scale),
            "zero": torch.where(zero == 0, (1 << self.bits_per_code) - 1, zero),
        }

    def columns(self, params: Params, at: int) -> tuple[Tensor, Tensor | int]:
        """Scale [rows, 1] in float32 and zero code of the group that column `at` belongs to."""
        group = at // self.group_size if self.group_size else 0
        zero = self.midpoint if self.symmetric else params["zero"][:, group : group + 1].float()
        return params["scale"][:, group : group + 1].float(), zero

    def round(
        self, w: Float32[Tensor, "out vector"], params: Params, at: int
    ) -> tuple[UInt8[Tensor, "out vector"], Float32[Tensor, "out vector"]]:
        scale, zero = self.columns(params, at)
        q = (torch.round(w * scale.reciprocal()) + zero).clamp_(0, (1 << self.bits_per_code) - 1)
        return q.to(torch.uint8), (q - zero) * scale

    def compiled_rounder(self, params: Params, rows: int) -> Rounder:
        from halfbyte.grids.round_block_numba import Even, round_block

        scale = params["scale"].float().expand(rows, -1)
        zero = (
            torch.full_like(scale, self.midpoint, dtype=torch.uint8)
            if self.symmetric
            else params["zero"].expand(rows, -1)
        )
        return partial(
            round_block, Even(scale, zero, torch.zeros_like(scale), (1 << self.bits_per_code) - 1), self.group_size
        )

    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        zero = None if self.symmetric else params["zero"]
        if self.granularity == "tensor":
            return rounding.encode(w.reshape(1, -1), params["scale"].float(), zero, w.numel(), self.bits_per_code).view(
                w.shape
            )
        return rounding.encode(w, params["scale"].float(), zero, self.group_size or w.shape[1], self.bits_per_code)

    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        scale, zero = params["scale"].float(), self.midpoint if self.symmetric else params["zero"].float()[..., None]
        grouped = codes.view(scale.shape[0], scale.shape[1], -1)
        return ((grouped.float() - zero) * scale[..., None]).view(codes.shape)
