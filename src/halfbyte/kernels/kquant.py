"""Operations of K-quants, two levels of scales: fit and encode. The torch references.

1. Coarse: for several ways to lay the levels over a group, codes by rounding, then scale and minimum by least squares
   for those codes. The best of them says which scale and minimum the group would have if any number could be stored.
2. d and dmin, so that the largest scale and the largest minimum of a block become the largest integers, rounded up to
   fp16.
3. Integers: of each group, all pairs of an integer scale and an integer minimum near the wanted ones are tried as they
   will decode, and the one with the least error wins. (Rounding the wanted ones instead, as llama.cpp does, gives up
   much of what step 1 won.)
4. d and dmin once more, by least squares over the whole block; kept if they are better after rounding to fp16.

Codes are not chosen here: `encode` rounds to the nearest level that was fitted, which can only be better.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.formats import KFormat
from halfbyte.kernels.choose import faster
from halfbyte.kernels.scalar import half
from halfbyte.kernels.scales import NEAR, STEPS, Params, pairs

FLOOR = 1e-6
"""Least importance, as a share of the mean: weights that no input reaches are still fitted, to themselves."""
MIN_VARIANCE = 1e-5
"""Least variance of the codes of a group, as a share of their mean square: below, a slope through them is noise."""
MIN_GAIN = 1 + 1e-6
"""A candidate must win by more than float32 sums are wrong by: of equals, the first wins."""
SCALE_FOR_ZERO = 2.0**30
"""Stands for a scale of 0 while rounding: every code is the one of zero."""
SPLIT = 1 << 24
"""Weights that the reference handles at once."""


class Effort(NamedTuple):
    """What a search tries."""

    coarse: list[tuple[float, float]]
    """Steps over the span of a group's weights, and the share of the clipped rest that is cut off below; 0 steps: again
    from the best so far."""
    scales: tuple[int, ...] = ()
    """Integer scales, less the wanted one. The wanted one first: of equals, the first wins."""
    minima: tuple[int, ...] = ()


def _coarse(
    fewest: float, most: float, count: int, tilts: tuple[float, ...] = (0.5,), again: int = 0
) -> list[tuple[float, float]]:
    steps = [fewest + (most - fewest) * k / (count - 1) for k in range(count)]
    return [(step, tilt) for step in steps for tilt in tilts] + [(0.0, 0.0)] * again


def _near(radius: int) -> tuple[int, ...]:
    return tuple(sorted(range(-radius, radius + 1), key=abs))


SIDES, THIRDS = (0.1, 0.5, 0.9), (0.0, 1 / 3, 2 / 3, 1.0)

# Measured on normal, Student-t and trained weights; each step of these costs about 0.2 ns of processor time per weight.
EFFORT = {
    "q2_k": Effort(_coarse(2.0, 3.6, 3, (0.2, 0.8)), _near(1), _near(0)),
    "q3_k": Effort(_coarse(3.1, 4.9, 4), _near(2)),
    "q4_k": Effort(_coarse(13.0, 15.5, 4, SIDES), _near(1), _near(1)),
    "q5_k": Effort(_coarse(28.5, 31.5, 3, SIDES), _near(1), _near(1)),
    "q6_k": Effort(_coarse(30.0, 32.5, 4), _near(1)),
    "q4_1": Effort(_coarse(12.0, 16.0, 4, THIRDS, 2)),
    "q5_1": Effort(_coarse(28.0, 32.0, 4, THIRDS, 2)),
    "tq1_0": Effort(_coarse(0.9, 5.0, 16)),
    "tq2_0": Effort(_coarse(0.9, 5.0, 16)),
}
# Where weights differ in importance, a few of them decide, and luckier grids are to be found.
EFFORT_WITH_IMPORTANCE = {
    "q2_k": Effort(_coarse(1.8, 3.8, 6, SIDES, 2), _near(2), _near(2)),
    "q3_k": Effort(_coarse(3.0, 4.9, 8), _near(8)),
    "q4_k": Effort(_coarse(12.0, 16.0, 8, SIDES, 2), _near(3), _near(1)),
    "q5_k": Effort(_coarse(27.0, 32.0, 8, SIDES, 2), _near(3), _near(1)),
    "q6_k": Effort(_coarse(30.0, 33.5, 8), _near(12)),
    "q4_1": Effort(_coarse(11.0, 17.0, 16, THIRDS, 4)),
    "q5_1": Effort(_coarse(26.0, 33.0, 16, THIRDS, 4)),
    "tq1_0": Effort(_coarse(0.9, 6.0, 48)),
    "tq2_0": Effort(_coarse(0.9, 6.0, 48)),
}
MINMAX = Effort([])
NEAR_MINIMA = (-0.25, 0.25)
"""By how many steps of the levels a minimum that is a number changes, to be one near it."""


def fit(
    grid: KFormat, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool
) -> Params:
    """Parameters that minimise the squared error of rounding to nearest, weighted by importance."""
    if importance is not None:
        # By a power of two, which rounds nothing: the last bits of a mean depend on how many threads have summed it up.
        mean, power = math.frexp(importance.mean())
        importance = (importance / 2.0**power).clamp(min=FLOOR) if mean > 0 else None
    effort = MINMAX if not search else EFFORT[grid.name] if importance is None else EFFORT_WITH_IMPORTANCE[grid.name]
    return _stored(grid, *find(grid, w, importance, effort))


def near(grid: KFormat, params: Params) -> list[Params]:
    """What scale and minimum of a group may become, both at once, while the fp16 numbers above them stay; where there
    are none above, these numbers."""
    if grid.scales is None:
        d = params["d"].float()
        scales: list[Params] = [{"d": half(d * (1 + share)).half()} for share in NEAR]
        if not grid.has_minimum:
            return scales
        return pairs(scales[1:-1], [{"m": half(params["m"].float() + by * d).half()} for by in NEAR_MINIMA])
    low, high = grid.scales
    scales = [{"scale": (params["scale"].int() + t).clamp(low, high).to(params["scale"].dtype)} for t in STEPS]
    if not grid.has_minimum:
        return scales
    return pairs(scales, [{"min": (params["min"].int() + t).clamp(0, high).to(torch.uint8)} for t in STEPS])


def safe_scale(scale: Float32[Tensor, "*groups"]) -> Float32[Tensor, "*groups"]:
    """Scales to round by."""
    return torch.where(scale == 0, SCALE_FOR_ZERO, scale)


def _nearest(
    grid: KFormat, w: Float32[Tensor, "*shape"], scale: Tensor, offset: Tensor | None
) -> UInt8[Tensor, "*shape"]:
    """Nearest codes, given scale and offset of every weight."""
    t = (w if offset is None else w - offset) * safe_scale(scale).reciprocal()
    return (torch.round(t) + grid.middle).clamp_(0, grid.top).to(torch.uint8)


@faster(cpu="kquant")
def encode(
    grid: KFormat,
    w: Float[Tensor, "out in"],
    scale: Float32[Tensor, "out groups"],
    offset: Float32[Tensor, "out groups"] | None,
) -> Tensor:
    """Nearest code of every weight."""
    grouped = w.float().reshape(*scale.shape, -1)
    return _nearest(grid, grouped, scale[..., None], None if offset is None else offset[..., None]).view(w.shape)


def _stored(grid: KFormat, d: Tensor, dmin: Tensor, scale: Tensor, minimum: Tensor) -> Params:
    """Params of the values found, which the stored types hold as they are."""
    d, dmin = d.to(torch.float16), dmin.to(torch.float16)
    if grid.scales is None:
        return {"d": d, "m": dmin} if grid.has_minimum else {"d": d}
    if grid.has_minimum:
        return {"d": d, "scale": scale.to(torch.uint8), "dmin": dmin, "min": minimum.to(torch.uint8)}
    return {"d": d, "scale": scale.to(torch.int8)}


def stored_lines(grid: KFormat, params: Params, scale: Tensor, offset: Tensor | None) -> Params:
    """The parameters that come nearest to these scales and offsets of groups; below fp16 numbers, which stay."""
    if grid.scales is None:
        return {"d": half(scale).half()} | ({} if offset is None else {"m": half(offset).half()})
    low, high = grid.scales

    def integers(values: Tensor, above: Tensor, lowest: int, dtype: torch.dtype) -> Tensor:
        each = above.float().repeat_interleave(values.shape[1] // above.shape[1], 1)
        return torch.where(each != 0, torch.round(values / each), 0).clamp(lowest, high).to(dtype)

    stored = {"scale": integers(scale, params["d"], low, params["scale"].dtype)}
    return stored if offset is None else stored | {"min": integers(-offset, params["dmin"], 0, params["min"].dtype)}


def _half_up(value: Tensor) -> Tensor:
    """A number of fp16 that is not smaller, by at most two units: the largest integer times it must reach the largest
    scale."""
    return torch.where(value > 0, half(value * (1 + 2.0**-11) + 2.0**-25), 0)


@faster(cpu="kquant")
def find(
    grid: KFormat, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, effort: Effort
) -> tuple[
    Float32[Tensor, "out blocks"],
    Float32[Tensor, "out blocks"],
    Float32[Tensor, "out groups"],
    Float32[Tensor, "out groups"],
]:
    """d, dmin (or m), and the integer scales and minima, in float32."""
    per_part = max(1, SPLIT // w.shape[1])
    weights = torch.ones(w.shape[1], device=w.device) if importance is None else importance
    parts = zip(w.split(per_part), weights.expand(w.shape).split(per_part), strict=True)
    fitted = [_fit_rows(grid, rows, h, effort) for rows, h in parts]
    d, dmin, scale, minimum = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    return d, dmin, scale, minimum


def _fit_rows(grid: KFormat, w: Tensor, h: Tensor, effort: Effort) -> tuple[Tensor, ...]:
    x = w.float().reshape(len(w), -1, grid.super_block // grid.group, grid.group)
    h = h.reshape(x.shape)
    total, mass = (h * x).sum(-1), h.sum(-1).expand(x.shape[:-1])
    bottom, top = float(-grid.middle), float(grid.top - grid.middle)
    step, offset, mean = (_coarse_with_minimum if grid.has_minimum else _coarse_without)(
        x, h, total, mass, bottom, top, effort
    )
    if grid.scales is None:
        return (
            half(step.abs())[..., 0],
            half(offset)[..., 0],
            torch.zeros_like(step)[..., 0],
            torch.zeros_like(step)[..., 0],
        )
    low, high = (float(limit) for limit in grid.scales)
    d, dmin = (_half_up(values.abs().amax(-1, keepdim=True) / high) for values in (step, offset))
    scale = torch.where(d > 0, torch.round(step / d), 0).clamp(low, high)
    minimum = torch.where(dmin > 0, torch.round(-offset / dmin), 0).clamp(0, high)
    if effort.scales:
        scale, minimum = _integers(x, h, total / mass, mean, d, dmin, scale, minimum, (bottom, top, low, high), effort)
        unit = safe_scale(d * scale)
        q1, q2, xq = _sums(x, h, 1 / unit, dmin * minimum / unit, bottom, top)
        d, dmin = _refit(d, dmin, scale, minimum, q1, q2, xq, total, mass)
    return d[..., 0], dmin[..., 0], scale.view(len(w), -1), minimum.view(len(w), -1)


def _sums(
    x: Tensor, h: Tensor, inverse: Tensor, shift: Tensor, bottom: float, top: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of codes q = round(x * inverse + shift): the weighted sums of q, q^2 and x q."""
    q = torch.round(x * inverse[..., None] + shift[..., None]).clamp(bottom, top)
    return (h * q).sum(-1), (h * q * q).sum(-1), (h * q * x).sum(-1)


def _coarse_with_minimum(
    x: Tensor, h: Tensor, total: Tensor, mass: Tensor, bottom: float, top: float, effort: Effort
) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1).clamp(max=0), x.amax(-1)
    span = high - low
    step, offset, mean, best = span / top, low, torch.zeros_like(low), torch.full_like(low, -1)
    for steps, tilt in effort.coarse:
        inverse = torch.where(span > 0, steps / span, 0) if steps else torch.where(step > 0, 1 / step, 0)
        shift = tilt * (top - steps) - low * inverse if steps else -offset * inverse
        q1, q2, xq = _sums(x, h, inverse, shift, bottom, top)
        determinant = mass * q2 - q1 * q1
        s = (mass * xq - total * q1) / determinant
        o = (total - s * q1) / mass
        s = torch.where(o > 0, xq / q2, s)  # a minimum above zero cannot be stored
        o = o.clamp(max=0)
        gain = s * xq + o * total
        better = (gain > MIN_GAIN * best) & (s > 0) & (determinant > MIN_VARIANCE * mass * q2)
        best, step, offset, mean = (
            torch.where(better, new, old) for new, old in ((gain, best), (s, step), (o, offset), (q1 / mass, mean))
        )
    return step, offset, mean


def _coarse_without(
    x: Tensor, h: Tensor, total: Tensor, mass: Tensor, bottom: float, top: float, effort: Effort
) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1), x.amax(-1)
    extreme = torch.where(high > -low, -high, -low)  # turned round: below zero there is one level more
    step, best = extreme / -bottom, torch.full_like(low, -1)
    for steps, _ in effort.coarse:
        _, q2, xq = _sums(x, h, torch.where(extreme != 0, steps / extreme, 0), torch.zeros_like(low), bottom, top)
        s = xq / q2
        better = (s * xq > MIN_GAIN * best) & (s * extreme > 0)
        best, step = torch.where(better, s * xq, best), torch.where(better, s, step)
    return step, torch.zeros_like(step), torch.zeros_like(step)


def _integers(
    x: Tensor,
    h: Tensor,
    level: Tensor,
    mean: Tensor,
    d: Tensor,
    dmin: Tensor,
    scale: Tensor,
    minimum: Tensor,
    limits: tuple,
    effort: Effort,
) -> tuple[Tensor, Tensor]:
    bottom, top, low, high = limits
    wanted_scale, best = scale, torch.full_like(scale, torch.inf)
    for k in effort.scales:
        try_scale = (wanted_scale + k).clamp(low, high)
        wanted = torch.where(dmin > 0, torch.round((d * try_scale * mean - level) / dmin), 0)
        for j in effort.minima or (0,):
            try_min = (wanted + j).clamp(0, high) if effort.minima else torch.zeros_like(scale)
            unit = safe_scale(d * try_scale)
            t = x * (1 / unit)[..., None] + (dmin * try_min / unit)[..., None]
            lost = (h * (t - torch.round(t).clamp(bottom, top)).square()).sum(-1) * unit.square()
            better = lost < best
            best, scale, minimum = (
                torch.where(better, new, old) for new, old in ((lost, best), (try_scale, scale), (try_min, minimum))
            )
    return scale, minimum


def _refit(
    d: Tensor,
    dmin: Tensor,
    scale: Tensor,
    minimum: Tensor,
    q1: Tensor,
    q2: Tensor,
    xq: Tensor,
    total: Tensor,
    mass: Tensor,
) -> tuple[Tensor, Tensor]:
    """d and dmin by least squares over a block, where they are better once they are rounded."""
    s, m = scale.double(), minimum.double()
    ss, sm, mm, sx, mx = (
        (a * b * c).sum(-1, keepdim=True)
        for a, b, c in ((s, s, q2), (s, m, q1), (m, m, mass), (s, xq, 1), (m, total, 1))
    )

    def error(d: Tensor, dmin: Tensor) -> Tensor:
        d, dmin = d.double(), dmin.double()
        return d * d * ss - 2 * d * dmin * sm + dmin * dmin * mm - 2 * d * sx + 2 * dmin * mx

    determinant = ss * mm - sm * sm
    both = determinant > 1e-6 * ss * mm
    new = torch.where(both, (sx * mm - mx * sm) / determinant, (sx + dmin * sm) / ss)
    new_min = half(torch.where(both, (sm * new - mx) / mm, dmin).float())
    new = half(new.float())
    better = (new > 0) & (new_min >= 0) & (error(new, new_min) < error(d, dmin))
    return torch.where(better, new, d), torch.where(better, new_min, dmin)
