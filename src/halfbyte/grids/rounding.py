"""Fitting and rounding of evenly spaced levels: the torch reference, and the choice of the accelerated twin.

A scale is searched per group. Candidates are the one that spans the largest value (min-max), and others up to the one that
suits a normal distribution of the group's spread. For each, the codes q are fixed by rounding and the best scale for *those
codes* has a closed form, s = sum(h w q) / sum(h q q). Rounded to the precision of the file, it lowers the error
sum(h (w - s q)^2) by s (2 sum(h w q) - s sum(h q q)). The candidate that lowers it most wins, so none loses more than
min-max does. (Alternating rounding and least squares: Lloyd's method on one parameter.)
"""

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

# Step of the uniform quantizer with the least squared error on a unit normal (Max, 1960, table II), by bits.
NORMAL_STEP = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
CANDIDATES = 14
# Scales of 16 bits stay where fp16 and bf16 both hold every bit of a bf16 number: files in fp16 of bf16 models need both.
# A scale that became zero or infinite would take its weights with it.
SMALLEST, LARGEST = 2.0**-17, 65280.0


def fit(
    w: Float[Tensor, "rows width"], importance: Float32[Tensor, " width"] | None, group: int, bits: int, symmetric: bool, search: bool, dtype: torch.dtype
) -> tuple[Float[Tensor, "rows groups"], UInt8[Tensor, "rows groups"] | None]:
    """Scales in the precision `dtype` and, if asymmetric, zero codes."""
    if w.device.type == "cpu":
        from halfbyte.grids import rounding_numba as accelerated

        return accelerated.fit(w, importance, group, bits, symmetric, search, dtype)
    return fit_reference(w, importance, group, bits, symmetric, search, dtype)


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


def limits(dtype: torch.dtype) -> tuple[float, float]:
    """The smallest and the largest scale to store."""
    return (SMALLEST, LARGEST) if dtype.itemsize == 2 else (torch.finfo(dtype).tiny, torch.finfo(dtype).max)


def store(scale: Float32[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """The nearest scale that a file holds; never zero, never infinite."""
    smallest, largest = limits(dtype)
    return torch.copysign(scale.abs().clamp(smallest, largest), scale).to(dtype)


def fit_reference(
    w: Float[Tensor, "rows width"], importance: Float32[Tensor, " width"] | None, group: int, bits: int, symmetric: bool, search: bool, dtype: torch.dtype
) -> tuple[Float[Tensor, "rows groups"], UInt8[Tensor, "rows groups"] | None]:
    rows, width = w.shape
    x = w.float().view(rows, width // group, group)
    h = torch.ones(width, device=w.device) if importance is None else importance
    h = h.view(1, width // group, group).expand_as(x)
    if symmetric:
        return _fit_symmetric(x, h, bits, search, dtype), None
    return _fit_asymmetric(x, h, bits, search, dtype)


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


def _fit_symmetric(x: Tensor, h: Tensor, bits: int, search: bool, dtype: torch.dtype) -> Tensor:
    half = float(1 << (bits - 1))
    largest = x.abs().amax(-1)
    # 2^bits levels span [-largest, largest]: the convention of GPTQ and compressed-tensors.
    scale = store(torch.where(largest == 0, 1.0, 2 * largest / (2 * half - 1)), dtype)
    if not search:
        return scale
    inverses = _inverses(scale, half / largest, x.square().mean(-1).sqrt(), bits)
    best = torch.full_like(largest, -1.0)
    for inverse in inverses:
        r = torch.round(x * inverse[..., None])
        for sign in (1, -1):
            q = (sign * r).clamp(-half, half - 1)
            best, scale = _better(x, h, sign * q, best, scale, sign)
    return scale


def _fit_asymmetric(x: Tensor, h: Tensor, bits: int, search: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    top = float((1 << bits) - 1)
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    widest = torch.where(high == low, 1.0, (high - low) / top)
    middle = torch.round(-low / widest).clamp(0, top)
    scale = store(widest, dtype)
    if not search:
        return scale, middle.to(torch.uint8)
    spread = (x.square().mean(-1) - x.mean(-1).square()).clamp(min=0).sqrt()
    best, zero = torch.full_like(low, -1.0), middle.clone()
    for inverse in _inverses(scale, 1 / widest, spread, bits):
        r = torch.round(x * inverse[..., None])
        for shift in (-1.0, 0.0, 1.0):
            candidate = (middle + shift).clamp(0, top)
            previous = best
            best, scale = _better(x, h, r.clamp(-candidate[..., None], (top - candidate)[..., None]), best, scale)
            zero = torch.where(best > previous, candidate, zero)
    return scale, zero.to(torch.uint8)


def _inverses(minmax: Tensor, first: Tensor, spread: Tensor, bits: int) -> list[Tensor]:
    """Reciprocals of the scales to try: min-max, and a geometric row around and beyond it."""
    last = torch.maximum(1.2 * first, 1.3 / (NORMAL_STEP[bits] * spread)).minimum(7.2 * first)
    ratio, row = (last / (0.9 * first)) ** (1 / (CANDIDATES - 2)), [0.9 * first]
    while len(row) < CANDIDATES - 1:
        row.append(row[-1] * ratio)
    return [minmax.float().reciprocal(), *row]


def _better(x: Tensor, h: Tensor, q: Tensor, best: Tensor, scale: Tensor, sign: int = 1) -> tuple[Tensor, Tensor]:
    wq, qq = (h * x * q).sum(-1), (h * q * q).sum(-1)
    stored = store(wq / qq, scale.dtype)
    gain = stored.float() * (2 * wq - stored.float() * qq)
    # wq <= 0 would turn every code of the group around; such a candidate is no rounding of these weights.
    better = (gain > best) & (wq > 0)
    return torch.where(better, gain, best), torch.where(better, sign * stored, scale)
