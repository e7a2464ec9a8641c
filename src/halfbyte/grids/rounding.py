"""Fitting and rounding of evenly spaced levels: the torch reference, and the choice of the accelerated twin.

A scale is searched per group: candidates between the one that spans the largest value and the one that suits a normal
distribution of the group's spread. For each, the codes q are fixed by rounding and the best scale for *those codes* has
a closed form, s = sum(h w q) / sum(h q q), which lowers the error sum(h (w - s q)^2) by sum(h w q)^2 / sum(h q q).
The candidate that lowers it most wins. (Alternating rounding and least squares: Lloyd's method on one parameter.)
"""

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

# Step of the uniform quantizer with the least squared error on a unit normal (Max, 1960, table II), by bits.
NORMAL_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
CANDIDATES = 14


def fit(
    w: Float[Tensor, "rows width"], importance: Float32[Tensor, " width"] | None, group: int, bits: int, symmetric: bool, search: bool
) -> tuple[Float32[Tensor, "rows groups"], UInt8[Tensor, "rows groups"] | None]:
    """Scales (float32, not yet rounded to their stored precision) and, if asymmetric, zero codes."""
    if w.device.type == "cpu":
        from halfbyte.grids import rounding_numba as accelerated

        return accelerated.fit(w, importance, group, bits, symmetric, search)
    return fit_reference(w, importance, group, bits, symmetric, search)


def encode(
    w: Float[Tensor, "rows width"],
    scale: Float32[Tensor, "rows groups"],
    zero: UInt8[Tensor, "rows groups"] | None,
    group: int,
    bits: int,
) -> UInt8[Tensor, "rows width"]:
    """Nearest code of every weight."""
    if w.device.type == "cpu":
        from halfbyte.grids import rounding_numba as accelerated

        return accelerated.encode(w, scale, zero, group, bits)
    return encode_reference(w, scale, zero, group, bits)


def fit_reference(
    w: Float[Tensor, "rows width"], importance: Float32[Tensor, " width"] | None, group: int, bits: int, symmetric: bool, search: bool
) -> tuple[Float32[Tensor, "rows groups"], UInt8[Tensor, "rows groups"] | None]:
    rows, width = w.shape
    x = w.float().view(rows, width // group, group)
    h = torch.ones(width, device=w.device) if importance is None else importance
    h = h.view(1, width // group, group).expand_as(x)
    if symmetric:
        return _fit_symmetric(x, h, bits, search), None
    return _fit_asymmetric(x, h, bits, search)


def encode_reference(
    w: Float[Tensor, "rows width"],
    scale: Float32[Tensor, "rows groups"],
    zero: UInt8[Tensor, "rows groups"] | None,
    group: int,
    bits: int,
) -> UInt8[Tensor, "rows width"]:
    x = w.float().view(w.shape[0], -1, group)
    offset = float(1 << (bits - 1)) if zero is None else zero.float()[..., None]
    q = torch.round(x * scale.reciprocal()[..., None]) + offset
    return q.clamp_(0, (1 << bits) - 1).to(torch.uint8).view(w.shape)


def _fit_symmetric(x: Tensor, h: Tensor, bits: int, search: bool) -> Tensor:
    half = float(1 << (bits - 1))
    largest = x.abs().amax(-1)
    if not search:
        # 2^bits levels span [-largest, largest]: the convention of GPTQ and compressed-tensors.
        return torch.where(largest == 0, 1.0, 2 * largest / (2 * half - 1))
    spread = x.square().mean(-1).sqrt()
    first, last = _inverse_range(half, largest, spread, bits)
    best, scale = torch.full_like(largest, -1.0), torch.ones_like(largest)
    for k in range(CANDIDATES):
        inverse = first * (last / first) ** (k / (CANDIDATES - 1))
        r = torch.round(x * inverse[..., None])
        for sign in (1, -1):
            q = (sign * r).clamp(-half, half - 1)
            best, scale = _better(x, h, sign * q, best, scale, sign)
    return torch.where(largest == 0, 1.0, scale)


def _fit_asymmetric(x: Tensor, h: Tensor, bits: int, search: bool) -> tuple[Tensor, Tensor]:
    top = float((1 << bits) - 1)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    span = high - low
    empty = span == 0
    widest = torch.where(empty, 1.0, span / top)
    middle = torch.round(-low / widest).clamp(0, top)
    if not search:
        return widest, middle.to(torch.uint8)
    spread = (x.square().mean(-1) - x.mean(-1).square()).clamp(min=0).sqrt()
    first, last = _inverse_range(1.0, torch.where(empty, 1.0, widest), spread, bits)
    best, scale, zero = torch.full_like(low, -1.0), torch.ones_like(low), middle.clone()
    for k in range(CANDIDATES):
        inverse = first * (last / first) ** (k / (CANDIDATES - 1))
        r = torch.round(x * inverse[..., None])
        for shift in (-1.0, 0.0, 1.0):
            candidate = (middle + shift).clamp(0, top)
            previous = best
            best, scale = _better(x, h, r.clamp(-candidate[..., None], (top - candidate)[..., None]), best, scale)
            zero = torch.where(best > previous, candidate, zero)
    return torch.where(empty, 1.0, scale), zero.to(torch.uint8)


def _inverse_range(half: float, largest: Tensor, spread: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    first = 0.9 * half / largest
    last = torch.maximum(1.2 * half / largest, 1.3 / (NORMAL_STEP[bits] * spread))
    return first, torch.minimum(last, 8 * first)


def _better(x: Tensor, h: Tensor, q: Tensor, best: Tensor, scale: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
    wq, qq = (h * x * q).sum(-1), (h * q * q).sum(-1)
    gain = torch.where(qq > 0, wq * wq / qq, -1.0)
    # wq <= 0 would turn every code of the group around; such a candidate is no rounding of these weights.
    better = (gain > best) & (wq > 0)
    return torch.where(better, gain, best), torch.where(better, sign * wq / qq, scale)
