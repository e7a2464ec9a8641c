"""Choosing the parameters of K-quants: the torch reference, and the choice of the accelerated twin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from halfbyte.grids.kquant import KQuant


def _row(first, last, count):
    return [first + (last - first) * k / max(count - 1, 1) for k in range(count)]


EFFORT = {
    "q2_k": (_row(2.0, 3.8, 6), 2, 1),
    "q3_k": (_row(3.1, 4.9, 6), 4, 1),
    "q4_k": (_row(13.5, 16.0, 6), 2, 1),
    "q5_k": (_row(29.0, 32.0, 6), 2, 1),
    "q6_k": (_row(30.0, 32.5, 4), 6, 1),
    "q4_1": (_row(12.5, 16.5, 16), 0, 1),
    "q5_1": (_row(28.0, 32.5, 16), 0, 1),
    "tq1_0": (_row(0.9, 5, 16), 0, 1),
    "tq2_0": (_row(0.9, 5, 16), 0, 1),
}


def fit(grid: KQuant, w, importance, search):
    from halfbyte.grids import kquant_numba

    zero = grid.zero or 0
    levels = -zero, grid.top - zero
    numerators, radius, passes = EFFORT[grid.name] if search else ([], 0, 0)
    d, dmin, scale, minimum = kquant_numba.fit(w, importance, grid.group, grid.block, levels, grid.scales, numerators, radius, passes)
    d, dmin = d.to(torch.float16), dmin.to(torch.float16)
    if grid.scales is None:
        return {"d": d, "m": dmin} if grid.has_minimum else {"d": d}
    if grid.has_minimum:
        return {"d": d, "dmin": dmin, "scale": scale.to(torch.uint8), "min": minimum.to(torch.uint8)}
    return {"d": d, "scale": scale.to(torch.int8)}


def encode(w, scale, offset, zero, top):
    if w.device.type == "cpu":
        from halfbyte.grids import kquant_numba

        return kquant_numba.encode(w, scale, offset, zero, top)
    grouped = w.float().reshape(*scale.shape, -1)
    return nearest(grouped, scale[..., None], None if offset is None else offset[..., None], zero, top).view(w.shape)


def nearest(w: Tensor, scale: Tensor, offset: Tensor | None, zero: int, top: int) -> Tensor:
    inverse = torch.where(scale == 0, 0, scale.reciprocal())
    return (torch.round((w if offset is None else w - offset) * inverse) + zero).clamp_(0, top).to(torch.uint8)


def values(codes: Tensor, scale: Tensor, offset: Tensor | None, zero: int) -> Tensor:
    product = (codes.float() - zero) * scale
    return product if offset is None else product + offset
