"""The accelerated twin of kquant.py for CPUs: the same candidates in the same order.

A tile holds 128 groups transposed, one group per lane, so that all that is done per group (sums, divisions, choices) is
done in whole vectors, however short the groups are. A tile stays in the first-level cache while all candidates are
tried.
"""

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.formats import KFormat
from halfbyte.kernels import kquant
from halfbyte.kernels.cpu.compiled import in_threads, kernel, part, strict
from halfbyte.kernels.cpu.tiles import LANES, F, half, load, raw, rounded, widen
from halfbyte.kernels.kquant import Effort, safe_scale

STRETCH = 4096  # weights encoded at once by one thread
SCALE_FOR_ZERO, MIN_VARIANCE, MIN_GAIN = F(kquant.SCALE_FOR_ZERO), F(kquant.MIN_VARIANCE), F(kquant.MIN_GAIN)

# What is known of the groups of a tile: rows of one flat array, at offsets that the compiler knows, so that it sees
# that they do not overlap. (It gives up vectorizing loops over as many arrays as are used here.)
LOW, HIGH, TOTAL, MASS, Q1, Q2, XQ, GAIN, ERROR, BEST = (LANES * row for row in range(10))
INVERSE, SHIFT, UNIT, STEP, OFFSET, MEAN, D, DMIN = (LANES * row for row in range(10, 18))
SCALE, MIN, TRY_SCALE, TRY_MIN, FROM, WANTED = (LANES * row for row in range(18, 24))
ROWS = 24


def find(
    grid: KFormat, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, effort: Effort
) -> tuple[
    Float32[Tensor, "out blocks"],
    Float32[Tensor, "out blocks"],
    Float32[Tensor, "out groups"],
    Float32[Tensor, "out groups"],
]:
    """kquant.find"""
    out, width = w.shape
    h = None if importance is None else importance.contiguous().numpy().reshape(-1)
    d, dmin = np.empty((2, out * width // grid.super_block), np.float32)
    scale, minimum = np.empty((2, out * width // grid.group), np.float32)
    low, high = grid.scales or (0, 0)
    limits = F(-grid.middle), F(grid.top - grid.middle), F(low), F(high)
    tried = (
        np.array(effort.coarse, np.float32).reshape(-1, 2),
        np.array(effort.scales, np.float32),
        np.array(effort.minima, np.float32),
    )
    tiles = -(-w.numel() // (grid.group * LANES))
    in_threads(
        _fit,
        tiles,
        raw(w).reshape(-1),
        h,
        grid.group,
        grid.super_block // grid.group,
        limits,
        *tried,
        d,
        dmin,
        scale,
        minimum,
    )
    d, dmin, scale, minimum = (torch.from_numpy(array).view(out, -1) for array in (d, dmin, scale, minimum))
    return d, dmin, scale, minimum


def encode(
    grid: KFormat,
    w: Float[Tensor, "out in"],
    scale: Float32[Tensor, "out groups"],
    offset: Float32[Tensor, "out groups"] | None,
) -> UInt8[Tensor, "out in"]:
    """As `kernels.kquant.encode`."""
    codes = np.empty(w.shape, np.uint8)
    offset = torch.zeros_like(scale) if offset is None else offset
    per_task = max(1, STRETCH // grid.group)
    given = raw(w).reshape(-1), _flat(safe_scale(scale)), _flat(offset), F(grid.middle), F(grid.top)
    in_threads(_encode, -(-scale.numel() // per_task), *given, codes.reshape(-1), grid.group, per_task)
    return torch.from_numpy(codes)


def _flat(values: Tensor) -> np.ndarray:
    return values.contiguous().numpy().reshape(-1)


@strict
def _half_up(value):
    """A number of fp16 that is not smaller, by at most two units: the largest integer times it must reach the largest
    scale."""
    return half(value * F(1 + 2.0**-11) + F(2.0**-25)) if value > 0 else F(0)


@part
def _extent(x, h, m):
    """Smallest and largest weight of every group, the weighted sum of the weights, the sum of their importance."""
    for lane in range(LANES):
        m[LOW + lane] = m[HIGH + lane] = x[0, lane]
        m[TOTAL + lane] = m[MASS + lane] = F(0)
    for i in range(x.shape[0]):
        row = x[i]
        for lane in range(LANES):
            m[LOW + lane] = min(m[LOW + lane], row[lane])
            m[HIGH + lane] = max(m[HIGH + lane], row[lane])
            if h is None:
                m[TOTAL + lane] += row[lane]
                m[MASS + lane] += F(1)
            else:
                m[TOTAL + lane] += h[i, lane] * row[lane]
                m[MASS + lane] += h[i, lane]


@part
def _code(x, inverse, shift, bottom, top):
    return min(max(rounded(x * inverse + shift), bottom), top)


@part
def _miss(x, inverse, shift, bottom, top):
    t = x * inverse + shift
    return t - min(max(rounded(t), bottom), top)


@part
def _sums(x, h, m, bottom, top):
    """Of codes q = round(x * inverse + shift): the weighted sums of q, q^2 and x q. Four weights at a time, to add to
    memory less often."""
    m[Q1 : Q1 + 3 * LANES] = 0
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        for lane in range(LANES):
            inverse, shift = m[INVERSE + lane], m[SHIFT + lane]
            q0, q1 = _code(x0[lane], inverse, shift, bottom, top), _code(x1[lane], inverse, shift, bottom, top)
            q2, q3 = _code(x2[lane], inverse, shift, bottom, top), _code(x3[lane], inverse, shift, bottom, top)
            if h is None:
                p0, p1, p2, p3 = q0, q1, q2, q3
            else:
                p0, p1, p2, p3 = h[i, lane] * q0, h[i + 1, lane] * q1, h[i + 2, lane] * q2, h[i + 3, lane] * q3
            m[Q1 + lane] += (p0 + p1) + (p2 + p3)
            m[Q2 + lane] += (p0 * q0 + p1 * q1) + (p2 * q2 + p3 * q3)
            m[XQ + lane] += (p0 * x0[lane] + p1 * x1[lane]) + (p2 * x2[lane] + p3 * x3[lane])


@part
def _missed(x, h, m, bottom, top):
    """Weighted squared error of the same codes, in units of inverse^-2."""
    m[ERROR : ERROR + LANES] = 0
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        for lane in range(LANES):
            inverse, shift = m[INVERSE + lane], m[SHIFT + lane]
            e0, e1 = _miss(x0[lane], inverse, shift, bottom, top), _miss(x1[lane], inverse, shift, bottom, top)
            e2, e3 = _miss(x2[lane], inverse, shift, bottom, top), _miss(x3[lane], inverse, shift, bottom, top)
            if h is None:
                m[ERROR + lane] += (e0 * e0 + e1 * e1) + (e2 * e2 + e3 * e3)
            else:
                m[ERROR + lane] += (h[i, lane] * e0 * e0 + h[i + 1, lane] * e1 * e1) + (
                    h[i + 2, lane] * e2 * e2 + h[i + 3, lane] * e3 * e3
                )


@part
def _coarse_with_minimum(x, h, m, top, candidates):
    """Scale and offset by least squares for the codes of every candidate; the mean code of the best."""
    for lane in range(LANES):
        m[LOW + lane] = min(m[LOW + lane], F(0))
        m[STEP + lane], m[OFFSET + lane] = (m[HIGH + lane] - m[LOW + lane]) / top, m[LOW + lane]
        m[GAIN + lane], m[MEAN + lane] = F(-1), F(0)
    for k in range(candidates.shape[0]):
        numerator, tilt = candidates[k]
        for lane in range(LANES):
            span = m[HIGH + lane] - m[LOW + lane]
            inverse = numerator / span if span > 0 else F(0)
            shift = tilt * (top - numerator) - m[LOW + lane] * inverse
            if numerator == 0:
                inverse = F(1) / m[STEP + lane] if m[STEP + lane] > 0 else F(0)
                shift = -m[OFFSET + lane] * inverse
            m[INVERSE + lane], m[SHIFT + lane] = inverse, shift
        _sums(x, h, m, F(0), top)
        for lane in range(LANES):
            mass, total, q1, q2, xq = m[MASS + lane], m[TOTAL + lane], m[Q1 + lane], m[Q2 + lane], m[XQ + lane]
            determinant = mass * q2 - q1 * q1
            s = (mass * xq - total * q1) / determinant
            o = (total - s * q1) / mass
            s = xq / q2 if o > 0 else s
            o = min(o, F(0))
            gain = s * xq + o * total
            better = (gain > MIN_GAIN * m[GAIN + lane]) & (s > 0) & (determinant > MIN_VARIANCE * mass * q2)
            m[GAIN + lane] = gain if better else m[GAIN + lane]
            m[STEP + lane] = s if better else m[STEP + lane]
            m[OFFSET + lane] = o if better else m[OFFSET + lane]
            m[MEAN + lane] = q1 / mass if better else m[MEAN + lane]


@part
def _coarse(x, h, m, bottom, top, candidates):
    """Scale by least squares for the codes of every candidate; the extreme weight lies on the longer side, below
    zero."""
    for lane in range(LANES):
        m[HIGH + lane] = -m[HIGH + lane] if m[HIGH + lane] > -m[LOW + lane] else -m[LOW + lane]
        m[STEP + lane], m[GAIN + lane] = m[HIGH + lane] / -bottom, F(-1)
        m[SHIFT + lane] = F(0)
    for k in range(candidates.shape[0]):
        numerator = candidates[k, 0]
        for lane in range(LANES):
            m[INVERSE + lane] = numerator / m[HIGH + lane] if m[HIGH + lane] != 0 else F(0)
        _sums(x, h, m, bottom, top)
        for lane in range(LANES):
            s = m[XQ + lane] / m[Q2 + lane]
            gain = s * m[XQ + lane]
            better = (gain > MIN_GAIN * m[GAIN + lane]) & (s * m[HIGH + lane] > 0)
            m[GAIN + lane] = gain if better else m[GAIN + lane]
            m[STEP + lane] = s if better else m[STEP + lane]


@part
def _spread(m, values, limit, per_block, result):
    """One fp16 number per block, so that `limit` times it reaches the largest of its values."""
    for first in range(0, LANES, per_block):
        largest = F(0)
        for lane in range(first, first + per_block):
            largest = max(largest, abs(m[values + lane]))
        m[result + first : result + first + per_block] = _half_up(largest / limit)


@part
def _lines(m, scale, minimum):
    """What turns weights into codes, for these integers: x * inverse + shift."""
    for lane in range(LANES):
        s = m[D + lane] * m[scale + lane]
        m[UNIT + lane] = s if s != 0 else SCALE_FOR_ZERO
        m[INVERSE + lane] = F(1) / m[UNIT + lane]
        m[SHIFT + lane] = m[DMIN + lane] * m[minimum + lane] * m[INVERSE + lane]


@part
def _try(x, h, m, bottom, top):
    _lines(m, TRY_SCALE, TRY_MIN)
    _missed(x, h, m, bottom, top)
    for lane in range(LANES):
        lost = m[ERROR + lane] * (m[UNIT + lane] * m[UNIT + lane])
        better = lost < m[BEST + lane]
        m[BEST + lane] = lost if better else m[BEST + lane]
        m[SCALE + lane] = m[TRY_SCALE + lane] if better else m[SCALE + lane]
        m[MIN + lane] = m[TRY_MIN + lane] if better else m[MIN + lane]


@part
def _integers(x, h, m, limits, near_scale, near_min):
    """The best integer scale and minimum of every group, by the error of the codes they give: all near the wanted ones
    are tried."""
    bottom, top, low, high = limits
    for lane in range(LANES):
        m[BEST + lane], m[FROM + lane] = F(np.inf), m[SCALE + lane]
    for k in near_scale:
        for lane in range(LANES):
            m[TRY_SCALE + lane] = min(max(m[FROM + lane] + k, low), high)
            m[TRY_MIN + lane] = F(0)
        if bottom != 0:
            _try(x, h, m, bottom, top)
            continue
        for lane in range(LANES):
            wanted = m[D + lane] * m[TRY_SCALE + lane] * m[MEAN + lane] - m[TOTAL + lane] / m[MASS + lane]
            m[WANTED + lane] = np.rint(wanted / m[DMIN + lane]) if m[DMIN + lane] > 0 else F(0)
        for j in near_min:
            for lane in range(LANES):
                m[TRY_MIN + lane] = min(max(m[WANTED + lane] + j, F(0)), high)
            _try(x, h, m, bottom, top)


@part
def _refit(m, per_block):
    """d and dmin by least squares over a block once codes and integers are chosen; kept if better after rounding to
    fp16."""
    for first in range(0, LANES, per_block):
        ss, sm, mm, sx, mx = 0.0, 0.0, 0.0, 0.0, 0.0
        for lane in range(first, first + per_block):
            s, n = m[SCALE + lane], m[MIN + lane]
            ss += s * s * m[Q2 + lane]
            sm += s * n * m[Q1 + lane]
            mm += n * n * m[MASS + lane]
            sx += s * m[XQ + lane]
            mx += n * m[TOTAL + lane]
        d, dmin = np.float64(m[D + first]), np.float64(m[DMIN + first])
        before = _quadratic(d, dmin, ss, sm, mm, sx, mx)
        determinant = ss * mm - sm * sm
        if determinant > 1e-6 * ss * mm:
            d = (sx * mm - mx * sm) / determinant
            dmin = (sm * d - mx) / mm
        elif ss > 0:
            d = (sx + dmin * sm) / ss
        d, dmin = np.float64(half(F(d))), np.float64(half(F(dmin)))
        if d > 0 and dmin >= 0 and _quadratic(d, dmin, ss, sm, mm, sx, mx) < before:
            m[D + first : D + first + per_block] = F(d)
            m[DMIN + first : DMIN + first + per_block] = F(dmin)


@part
def _quadratic(d, dmin, ss, sm, mm, sx, mx):
    return d * d * ss - 2 * d * dmin * sm + dmin * dmin * mm - 2 * d * sx + 2 * dmin * mx


@kernel
def _fit(start, stop, w, h, size, per_block, limits, candidates, near_scale, near_min, d, dmin, scale, minimum):
    """Tiles from number `start` on."""
    bottom, top, scale_low, scale_high = limits
    groups = w.size // size
    line, m = np.empty(size * LANES, np.float32), np.zeros(ROWS * LANES, np.float32)
    x = np.empty((size, LANES), np.float32)
    weight = None if h is None else np.empty((size, LANES), np.float32)
    for tile in range(start, stop):
        first = tile * LANES
        load(w, h, size, first, line, x, weight)
        _extent(x, weight, m)
        if bottom == 0:
            _coarse_with_minimum(x, weight, m, top, candidates)
        else:
            _coarse(x, weight, m, bottom, top, candidates)
        if scale_high > 0:
            _spread(m, STEP, scale_high, per_block, D)
            _spread(m, OFFSET, scale_high, per_block, DMIN)
            for lane in range(LANES):
                s = np.rint(m[STEP + lane] / m[D + lane]) if m[D + lane] > 0 else F(0)
                n = np.rint(-m[OFFSET + lane] / m[DMIN + lane]) if m[DMIN + lane] > 0 else F(0)
                m[SCALE + lane], m[MIN + lane] = min(max(s, scale_low), scale_high), min(max(n, F(0)), scale_high)
            if near_scale.size:
                _integers(x, weight, m, limits, near_scale, near_min)
                _lines(m, SCALE, MIN)
                _sums(x, weight, m, bottom, top)
                _refit(m, per_block)
        else:
            for lane in range(LANES):
                m[D + lane], m[DMIN + lane] = half(abs(m[STEP + lane])), half(m[OFFSET + lane])
        for lane in range(min(LANES, groups - first)):
            block = (first + lane) // per_block
            scale[first + lane], minimum[first + lane], d[block], dmin[block] = (
                m[SCALE + lane],
                m[MIN + lane],
                m[D + lane],
                m[DMIN + lane],
            )


@kernel
def _encode(start, stop, w, scale, offset, zero, top, codes, size, per_task):
    """Stretches of `per_task` groups, from number `start` on."""
    x = np.empty(per_task * size, np.float32)
    for task in range(start, stop):
        first, last = task * per_task, min((task + 1) * per_task, scale.size)
        widen(w[first * size : last * size], x)
        for g in range(first, last):
            inverse, base = F(1) / scale[g], offset[g]
            group, out = x[(g - first) * size : (g - first + 1) * size], codes[g * size : (g + 1) * size]
            for i in range(size):
                out[i] = np.uint8(np.int32(min(max(np.rint((group[i] - base) * inverse) + zero, F(0)), top)))
