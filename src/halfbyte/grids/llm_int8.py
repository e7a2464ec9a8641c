"""LLM.int8() weights (Dettmers et al., 2208.07339): w = q * absmax / 127, one absmax per out-feature (row), q in [-128, 127].

The integers are those of int8-channel; what is stored of a row is not its scale but what 127 stands for, in fp32, and no fp32
scale is every such number over 127. Kept as bitsandbytes has it, arithmetic included (bitsandbytes/_ops.py: int8_vectorwise_dequant).
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.grids import rounding
from halfbyte.grids.grid import Codes, Grid, Params, Rounder, Shape

TOP, ZERO = 127, 128
"""The integer that the absmax stands for, and the code of zero."""


@dataclass(frozen=True)
class LLMInt8(Grid):
    """Signed bytes, stored plus 128."""

    vector_size = 1

    def __str__(self) -> str:
        return "llm-int8"

    @property
    def group_size(self) -> int | None:
        return None

    def bits(self, shape: Shape) -> float:
        return 8 + 32 / shape[1]

    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        """`absmax` [out], in fp32. Found by a search, it may be less than the largest weight, or negative: then -128 is used."""
        if not search:
            return {"absmax": w.abs().amax(1).float()}
        scale, _ = rounding.fit(w, importance, w.shape[1], 8, True, True, torch.float32)
        return {"absmax": scale[:, 0] * TOP}

    def round(
        self, w: Float32[Tensor, "out vector"], params: Params, at: int
    ) -> tuple[UInt8[Tensor, "out vector"], Float32[Tensor, "out vector"]]:
        codes = self.encode(w, params)
        return codes, self.decode(codes, params)

    def compiled_rounder(self, params: Params, rows: int) -> Rounder:
        from halfbyte.grids.round_block_numba import Even, round_block

        scale = torch.where(params["absmax"] == 0, 1.0, params["absmax"] / TOP)[:, None]
        zero = torch.full_like(scale, ZERO, dtype=torch.uint8)
        return partial(round_block, Even(scale, zero, torch.zeros_like(scale), 2 * ZERO - 1), None)

    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        by = torch.where(params["absmax"] == 0, 0.0, TOP / params["absmax"]).clamp(-1e38, 1e38)
        return (torch.round(w.float() * by[:, None]) + ZERO).clamp_(0, 2 * ZERO - 1).to(torch.uint8)

    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        return (codes.float() - ZERO) * params["absmax"][:, None] * (1 / TOP)
