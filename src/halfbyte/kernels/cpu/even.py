"""Evenly spaced levels on CPUs: the candidates of kernels/even.py in the same order, many groups at a time (tiles.py).

The torch reference moves every weight through memory some hundred times, this reads it once. Weights of 16 bits are
widened as they are read; nothing of the size of the matrix is allocated but the codes.
"""

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.kernels.cpu import tiles
from halfbyte.kernels.cpu.compiled import in_threads, inline, kernel, loose_kernel, part, strict
from halfbyte.kernels.cpu.tiles import LANES, F, fold, load, raw, rounded, spread, widen
from halfbyte.kernels.even import CANDIDATES, MAX_SHRINK, NORMAL_SHRINK, NORMAL_STEP, reach, settled
from halfbyte.kernels.levels import Even
from halfbyte.kernels.scales import Number, Params

DROPPED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # of the 23 that float32 has

# What is known of the groups of a tile: rows of one flat array, at offsets that the compiler knows, so that it sees
# that they do not overlap. The codes of zero that are tried lie from MIDDLE on, the sums of each from SUMS on.
LOW, HIGH, WIDEST, SCALE, ZERO, TOTAL, SQUARES = (LANES * row for row in range(7))
INVERSE, FIRST, GROWTH, GAIN = (LANES * row for row in range(7, 11))
MIDDLE, BELOW, ABOVE = (LANES * row for row in range(11, 14))
XQ_MIDDLE, QQ_MIDDLE, XQ_BELOW, QQ_BELOW, XQ_ABOVE, QQ_ABOVE = (LANES * row for row in range(14, 20))
ROWS = 20


def fit(
    w: Float[Tensor, "rows width"],
    importance: Float32[Tensor, "... width"] | None,
    group: int,
    levels: Even,
    storage: Number,
    search: bool,
) -> Params:
    """As `kernels.even.fit`, for groups of `group` weights that follow one another in memory."""
    rows, width = w.shape
    h = None if importance is None or not search else importance.contiguous().numpy().reshape(-1)
    scale = np.empty((rows, width // group), np.float32)
    zero = np.zeros((rows, 0 if levels.symmetric else width // group), np.uint8)
    held = F(2 ** DROPPED_BITS[storage.dtype] + 1), F(storage.smallest), F(storage.largest)
    steps_to_try = (*reach(levels.bits), NORMAL_SHRINK / NORMAL_STEP[levels.bits])
    row = (CANDIDATES[levels.bits], *(F(value) for value in steps_to_try)) if search else None
    lanes, steps = tiles.lanes_per_group(group), tiles.steps_per_lane(group)
    tasks = -(-scale.size * lanes // LANES)
    flat = raw(w).reshape(-1), h, group, lanes, steps, F(levels.top), levels.symmetric, row, held
    in_threads(_fit, tasks, *flat, scale.reshape(-1), zero.reshape(-1))
    stored = storage.store(torch.from_numpy(scale))
    return settled(levels, stored, None if levels.symmetric else torch.from_numpy(zero))


def encode(
    w: Float[Tensor, "rows width"],
    scale: Float32[Tensor, "rows groups"],
    zero: UInt8[Tensor, "rows groups"] | None,
    group: int,
    bits: int,
) -> UInt8[Tensor, "rows width"]:
    """Nearest codes, given a scale and a zero point of each group."""
    codes = np.empty(w.shape, np.uint8)
    offset = np.zeros((scale.shape[0], 0), np.uint8) if zero is None else zero.numpy()
    in_threads(_encode, len(w), raw(w), scale.contiguous().numpy(), offset, group, bits, codes)
    return torch.from_numpy(codes)


@strict
def _store(scale, held):
    """Number.store for a positive scale, as float32. Without branches, so that vectors can be made of it."""
    splitter, smallest, largest = held
    scale = min(max(scale, smallest), largest)
    fixed = np.rint(scale * F(2**24)) * F(2**-24)  # fp16 has steps of 2^-24 below 2^-14
    high = (
        scale * splitter
    )  # Veltkamp's splitting needs the order of operations: without fastmath=False it takes the caller's
    return fixed if (splitter == F(2**13 + 1)) & (scale < F(2**-14)) else high - (high - scale)


@kernel
def _fit(start, stop, w, h, size, lanes, steps, top, symmetric, row, held, scale, zero):
    """Tiles from number `start` on."""
    groups = LANES // lanes
    line, m = np.zeros(groups * size, np.float32), np.zeros(ROWS * LANES, np.float32)
    x = np.zeros((steps, LANES), np.float32)
    weight = None if h is None else np.zeros((steps, LANES), np.float32)
    for tile in range(start, stop):
        first = tile * groups
        load(w, h, size, first, line, x, weight)
        _span(x, m, groups, top, symmetric, held)
        if row is not None:
            _row(x, m, groups, size, symmetric, row)
            tried = row[0]
            for k in range(tried):
                _try(x, weight, m, groups, top, symmetric, held)
                _next(m, groups, F(k), k == tried - 2)
        for g in range(min(groups, scale.size - first)):
            scale[first + g] = m[SCALE + g]
            if not symmetric:
                zero[first + g] = np.uint8(np.int32(m[ZERO + g]))


@part
def _span(x, m, groups, top, symmetric, held):
    """Min-max: the step that spans all weights, and the code of zero; the codes of zero to try."""
    m[LOW : LOW + 2 * LANES] = 0
    for i in range(x.shape[0]):
        weights = x[i]
        for lane in range(LANES):
            m[LOW + lane] = min(m[LOW + lane], weights[lane])
            m[HIGH + lane] = max(m[HIGH + lane], weights[lane])
    half = LANES // 2
    while half >= groups:
        for lane in range(half):
            m[LOW + lane] = min(m[LOW + lane], m[LOW + half + lane])
            m[HIGH + lane] = max(m[HIGH + lane], m[HIGH + half + lane])
        half //= 2
    for g in range(groups):
        low, high = m[LOW + g], m[HIGH + g]
        span = F(2) * max(-low, high) if symmetric else high - low
        widest = span / top if span > 0 else F(1)
        middle = F(0.5) * (top + F(1)) if symmetric else min(max(np.rint(-low / widest), F(0)), top)
        m[WIDEST + g], m[SCALE + g], m[ZERO + g] = widest, _store(widest, held), middle
        m[MIDDLE + g], m[BELOW + g], m[ABOVE + g] = middle, max(middle - F(1), F(0)), min(middle + F(1), top)


@part
def _row(x, m, groups, size, symmetric, row):
    """Where the reciprocals of the scales to try begin, and how they grow."""
    m[TOTAL : TOTAL + 2 * LANES] = 0
    for i in range(x.shape[0]):
        weights = x[i]
        for lane in range(LANES):
            m[TOTAL + lane] += weights[lane]
            m[SQUARES + lane] += weights[lane] * weights[lane]
    fold(m[TOTAL : TOTAL + LANES], groups)
    fold(m[SQUARES : SQUARES + LANES], groups)
    tried, nearest, furthest, clipped = row
    for g in range(groups):
        mean = F(0) if symmetric else m[TOTAL + g] / F(size)
        deviation = np.sqrt(max(m[SQUARES + g] / F(size) - mean * mean, F(0)))
        first = nearest / m[WIDEST + g]
        last = min(max(furthest / m[WIDEST + g], clipped / deviation), F(MAX_SHRINK) / m[WIDEST + g])
        m[FIRST + g], m[GROWTH + g] = first, (np.sqrt(np.sqrt(last / first)) - F(1)) / F(tried - 3)
        m[GAIN + g], m[INVERSE + g] = F(-1), F(1) / m[SCALE + g]
    spread(m[MIDDLE : MIDDLE + LANES], groups)
    spread(m[BELOW : BELOW + LANES], groups)
    spread(m[ABOVE : ABOVE + LANES], groups)


@part
def _try(x, h, m, groups, top, symmetric, held):
    """One candidate, with every code of zero."""
    spread(m[INVERSE : INVERSE + LANES], groups)
    m[XQ_MIDDLE : XQ_MIDDLE + 6 * LANES] = 0
    if symmetric:
        _sums_of_zeros(x, h, m, top, None)
    else:
        _sums_of_zeros(x, h, m, top, ABOVE)
        _better(m, groups, ABOVE, XQ_ABOVE, QQ_ABOVE, held, F(1))
    _better(m, groups, MIDDLE, XQ_MIDDLE, QQ_MIDDLE, held, F(1))
    # On a symmetric grid, one code less below zero and one more above it is a negative scale.
    _better(m, groups, BELOW, XQ_BELOW, QQ_BELOW, held, F(-1) if symmetric else F(1))


@part
def _next(m, groups, k, last):
    """The k-th candidate of the row, or the last: the best scale so far."""
    for g in range(groups):
        root = F(1) + k * m[GROWTH + g]
        m[INVERSE + g] = F(1) / abs(m[SCALE + g]) if last else m[FIRST + g] * (root * root) * (root * root)


@part
def _sums_of_zeros(x, h, m, top, above):
    """Sums for each code of zero. Where `above` is None, the one above is left out, when this is compiled."""
    for i in range(0, x.shape[0], 2):
        x0, x1 = x[i], x[i + 1]
        for lane in range(LANES):
            r0, r1 = rounded(x0[lane] * m[INVERSE + lane]), rounded(x1[lane] * m[INVERSE + lane])
            if h is None:
                h0, h1 = F(1), F(1)
            else:
                h0, h1 = h[i, lane], h[i + 1, lane]
            xq, qq = _sums(x0[lane], x1[lane], r0, r1, h0, h1, m[MIDDLE + lane], top)
            m[XQ_MIDDLE + lane] += xq
            m[QQ_MIDDLE + lane] += qq
            xq, qq = _sums(x0[lane], x1[lane], r0, r1, h0, h1, m[BELOW + lane], top)
            m[XQ_BELOW + lane] += xq
            m[QQ_BELOW + lane] += qq
            if above is not None:
                xq, qq = _sums(x0[lane], x1[lane], r0, r1, h0, h1, m[ABOVE + lane], top)
                m[XQ_ABOVE + lane] += xq
                m[QQ_ABOVE + lane] += qq


@part
def _sums(x0, x1, r0, r1, h0, h1, zero, top):
    """Of two weights, to add to memory less often: the weighted sums of x q and q^2, where q is r within the codes
    there are."""
    q0, q1 = min(max(r0, -zero), top - zero), min(max(r1, -zero), top - zero)
    p0, p1 = h0 * q0, h1 * q1
    return p0 * x0 + p1 * x1, p0 * q0 + p1 * q1


@inline
def _better(m, groups, zero, xq, qq, held, sign):
    fold(m[xq : xq + LANES], groups)
    fold(m[qq : qq + LANES], groups)
    for g in range(groups):
        # Read before it is chosen from: LLVM makes no vectors of a read that depends on the choice.
        sum_xq, sum_qq, tried, zero_before, scale_before, before = (
            m[xq + g],
            m[qq + g],
            m[zero + g],
            m[ZERO + g],
            m[SCALE + g],
            m[GAIN + g],
        )
        stored = _store(sum_xq / sum_qq, held)
        gain = stored * (F(2) * sum_xq - stored * sum_qq)
        better = (gain > before) & (sum_xq > 0)
        m[GAIN + g] = gain if better else before
        m[SCALE + g] = sign * stored if better else scale_before
        m[ZERO + g] = tried if better else zero_before


@loose_kernel
def _encode(start, stop, w, scale, zero, group, bits, codes):
    """Rows from number `start` on."""
    top, half = F((1 << bits) - 1), F(1 << (bits - 1))
    x = np.empty(group, np.float32)
    for row in range(start, stop):
        for g in range(scale.shape[1]):
            widen(w[row, g * group : (g + 1) * group], x)
            inverse = F(1) / scale[row, g]
            offset = half if zero.shape[1] == 0 else F(zero[row, g])
            out = codes[row, g * group : (g + 1) * group]
            for i in range(group):
                out[i] = np.uint8(np.int32(min(max(np.rint(x[i] * inverse) + offset, F(0)), top)))
