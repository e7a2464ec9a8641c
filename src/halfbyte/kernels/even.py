"""Scales and zero points of evenly spaced levels: the torch reference.

A scale is searched per group. Candidates are the one that spans the largest value (min-max), others up to the one that
suits a normal distribution of the group's spread, and at last the best of these. For each, the codes q are fixed by
rounding and the best scale for *those codes* has a closed form, s = sum(h w q) / sum(h q q). Rounded to the precision
of the file, it lowers the error sum(h (w - s q)^2) by s (2 sum(h w q) - s sum(h q q)). The candidate that lowers it
most wins, so none loses more than min-max does. (Alternating rounding and least squares: Lloyd's method on one
parameter.)
"""

import torch
from jaxtyping import Float32
from torch import Tensor

from halfbyte.kernels.levels import Even
from halfbyte.kernels.scales import Number, Params

# Step of the uniform quantizer with the least squared error on a unit normal (Max, 1960, table II), by bits.
NORMAL_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
CANDIDATES = {2: 9, 3: 10, 4: 11, 5: 11, 6: 12, 7: 11, 8: 2}
"""Candidates, by bits: one more costs 0.25 ns of processor time per weight, 0.33 on asymmetric grids, and wins some 0.1
% of the error at 4 and 5 bits.

At 8 bits, min-max and the best scale for its codes: ten more win 9 % of an error that no model shows in groups of 32,
and 1 % in rows.
"""
REACH = {2: (0.3, 2.0), 3: (0.5, 3.0), 4: (0.8, 4.0), 5: (1.5, 4.0), 6: (3.0, 4.0), 7: (4.0, 3.0), 8: (12.0, 2.0)}
"""How far the scales to try reach below and above min-max, in levels: of many levels, more can be given up for a finer
step."""
NORMAL_SHRINK = 1.2
"""How much finer than the step that suits a normal distribution the finest is."""
MAX_SHRINK = 7.2
"""How much finer than min-max the finest is at most."""


def reach(bits: int) -> tuple[float, float]:
    """How much coarser and how much finer than min-max the steps to try are at least."""
    below, above = REACH[bits]
    return 1 - 2 * below / ((1 << bits) - 1), 1 + 2 * above / ((1 << bits) - 1)


def fit(
    levels: Even,
    storage: Number,
    x: Float32[Tensor, "rows groups size"],
    h: Float32[Tensor, "rows groups size"],
    search: bool,
) -> Params:
    """`scale` in the precision of the file and, of asymmetric levels, `zero` codes."""
    top, symmetric = float(levels.top), levels.symmetric
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    if levels.steps > 1 and not search:
        return {"scale": storage.store(torch.maximum(-low, high))}
    # 2^bits levels span [-largest, largest]: the convention of GPTQ and compressed-tensors.
    span = 2 * torch.maximum(-low, high) if symmetric else high - low
    widest = torch.where(span == 0, 1.0, span / top)
    zero = middle = torch.full_like(low, (top + 1) / 2) if symmetric else torch.round(-low / widest).clamp(0, top)
    scale = storage.store(widest)
    # On a symmetric grid, one code less below zero and one more above it is a negative scale.
    shifts = (0, -1) if symmetric else (0, -1, 1)
    mean = torch.zeros_like(low) if symmetric else x.mean(-1)
    deviation = (x.square().mean(-1) - mean.square()).clamp(min=0).sqrt()
    best = torch.full_like(low, -1.0)
    row = _inverses(scale, widest, deviation, levels.bits)
    for k in range(CANDIDATES[levels.bits] if search else 0):
        inverse = row[k] if k < len(row) else scale.float().abs().reciprocal()
        r = torch.round(x * inverse[..., None])
        for shift in shifts:
            candidate = (middle + shift).clamp(0, top)
            q = r.clamp(-candidate[..., None], (top - candidate)[..., None])
            xq, qq = (h * x * q).sum(-1), (h * q * q).sum(-1)
            stored = storage.store(xq / qq)
            gain = stored.float() * (2 * xq - stored.float() * qq)
            # xq <= 0 would turn every code of the group around; such a candidate is no rounding of these weights.
            better = (gain > best) & (xq > 0)
            best = torch.where(better, gain, best)
            scale = torch.where(better, -stored if symmetric and shift else stored, scale)
            zero = torch.where(better, candidate, zero)
    return settled(levels, scale, None if symmetric else zero.to(torch.uint8))


def settled(levels: Even, scale: Tensor, zero: Tensor | None) -> Params:
    """A zero point of 0 is the zero point 2^bits - 1 of the negated scale: the same values, and every container holds
    it."""
    if zero is None:
        return {"scale": scale if levels.steps == 1 else scale * levels.steps}
    return {"scale": torch.where(zero == 0, -scale, scale), "zero": torch.where(zero == 0, levels.top, zero)}


def _inverses(minmax: Tensor, widest: Tensor, deviation: Tensor, bits: int) -> list[Tensor]:
    """Reciprocals of the scales to try: min-max, and a row around and beyond it that grows by nearly equal ratios."""
    coarsest, finest = reach(bits)
    first = coarsest / widest
    last = torch.maximum(finest / widest, NORMAL_SHRINK / NORMAL_STEP[bits] / deviation).minimum(MAX_SHRINK / widest)
    growth = ((last / first).sqrt().sqrt() - 1) / (CANDIDATES[bits] - 3)
    return [minmax.float().reciprocal(), *(first * (1 + k * growth) ** 4 for k in range(CANDIDATES[bits] - 2))]
