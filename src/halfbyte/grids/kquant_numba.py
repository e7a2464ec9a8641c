"""The accelerated twin of kquant_search.py for CPUs: the same candidates in the same order.

A tile holds 128 groups transposed, one group per lane, so that all that is done per group (sums, divisions, choices) is done in
whole vectors, however short the groups are. A tile stays in the first-level cache while all candidates are tried.
"""

import numba
import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

LANES = 128
TILES = 8  # handled one after another by one thread, in the same memory
F = np.float32
FLAT = F(2.0**-30)  # "1 / scale" of a group without a scale: every code becomes 0, and squared errors stay in float32's range

# Without reassoc: sums are taken in the reference's order, and a change of order would undo the splitting in _half.
jit = numba.njit(cache=True, parallel=True, fastmath={"contract", "nsz"}, error_model="numpy", nogil=True)
part = numba.njit(cache=True, fastmath={"contract", "nsz"}, error_model="numpy", nogil=True)
strict = numba.njit(cache=True, fastmath=False, error_model="numpy", nogil=True)


def _raw(w: Tensor) -> tuple[np.ndarray, bool]:
    """Numbers of 16 bits as their bits (numba has no such types) and whether those are fp16; everything else as float32."""
    w = w.detach().contiguous()
    if w.dtype in (torch.bfloat16, torch.float16):
        return w.view(torch.uint16).numpy(), w.dtype == torch.float16
    return w.float().numpy(), False


def fit(
    w: Float[Tensor, "out in"],
    importance: Float32[Tensor, " in"] | None,
    group: int,
    block: int,
    levels: tuple[int, int],
    scales: tuple[int, int] | None,
    numerators: list[float],
    radius: int,
    passes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, width = w.shape
    raw, is_half = _raw(w)
    h = None if importance is None else np.ascontiguousarray(importance.numpy()).reshape(-1, group)
    d, dmin = np.empty((2, out * width // block), np.float32)
    scale, minimum = np.empty((2, out * width // group), np.float32)
    low, high = scales or (0, 0)
    limits = F(levels[0]), F(levels[1]), F(low), F(high)
    _fit(raw.reshape(-1, group), is_half, h, block // group, limits, np.array(numerators, np.float32), radius, passes, d, dmin, scale, minimum)
    return tuple(torch.from_numpy(array).view(out, -1) for array in (d, dmin, scale, minimum))


def encode(
    w: Float[Tensor, "out in"], scale: Float32[Tensor, "out groups"], offset: Float32[Tensor, "out groups"] | None, zero: int, top: int
) -> UInt8[Tensor, "out in"]:
    codes = np.empty(w.shape, np.uint8)
    raw, is_half = _raw(w)
    offset = torch.zeros_like(scale) if offset is None else offset
    group = w.shape[1] // scale.shape[1]
    _encode(raw.reshape(-1, group), is_half, _flat(scale), _flat(offset), F(zero), F(top), codes.reshape(-1, group))
    return torch.from_numpy(codes)


def round_block(
    wanted: Float32[Tensor, "out width"],
    target: Float32[Tensor, "out width"],
    error: Float32[Tensor, "out width"],
    coupling: Float32[Tensor, "width width"],
    scale: Float32[Tensor, "out groups"],
    offset: Float32[Tensor, "out groups"] | None,
    group: Int64[Tensor, " width"],
    zero: int,
    top: int,
) -> UInt8[Tensor, "out width"]:
    """Grid.round_block, given the group of each column. Rows are independent: each stays in the cache."""
    codes = np.empty(wanted.shape, np.uint8)
    offset = torch.zeros_like(scale) if offset is None else offset
    arrays = wanted.numpy(), target.numpy(), error.numpy(), coupling.contiguous().numpy(), scale.contiguous().numpy(), offset.contiguous().numpy()
    _round_block(*arrays, group.numpy(), F(zero), F(top), codes)
    return torch.from_numpy(codes)


def _flat(values: Tensor) -> np.ndarray:
    return values.contiguous().numpy().reshape(-1)


@part
def _widen(raw, is_half, x):
    if raw.itemsize == 4:
        for i in range(x.size):
            x[i] = raw[i]
        return
    bits = x.view(np.uint32)
    if is_half:  # the exponent moves by 112; the product does it for subnormal numbers too
        for i in range(x.size):
            half = np.uint32(raw[i])
            bits[i] = (half & np.uint32(0x8000)) << np.uint32(16) | (half & np.uint32(0x7FFF)) << np.uint32(13)
        for i in range(x.size):
            x[i] *= F(2.0**112)
    else:
        for i in range(x.size):
            bits[i] = np.uint32(raw[i]) << np.uint32(16)


@strict
def _half(value):
    """The nearest number of fp16, never infinite. Veltkamp's splitting needs the order of operations."""
    size = min(abs(value), F(65504))
    if size < F(2.0**-14):
        size = np.rint(size * F(2.0**24)) * F(2.0**-24)
    else:
        high = size * F(2.0**13 + 1)
        size = high - (high - size)
    return size if value >= 0 else -size


@strict
def _half_up(value):
    """A number of fp16 that is not smaller, by at most two units: the largest integer times it must reach the largest scale."""
    return _half(value * F(1 + 2.0**-11) + F(2.0**-25)) if value > 0 else F(0)


@part
def _load(w, is_half, h, first, line, x, weight):
    """Lane l gets group first + l; lanes beyond the last group get zeros."""
    count = min(LANES, w.shape[0] - first)
    for lane in range(count):
        _widen(w[first + lane], is_half, line)
        for i in range(line.size):
            x[i, lane] = line[i]
    if count < LANES:
        x[:, count:] = 0
    if h is not None:
        for lane in range(count):
            source = h[(first + lane) % h.shape[0]]
            for i in range(line.size):
                weight[i, lane] = source[i]
        if count < LANES:
            weight[:, count:] = 0


@part
def _extent(x, h, low, high, total, mass):
    """Smallest and largest weight of every group, the weighted sum of the weights, the sum of their importance."""
    low[:], high[:], total[:], mass[:] = x[0], x[0], 0, x.shape[0]
    for i in range(x.shape[0]):
        row = x[i]
        for lane in range(LANES):
            low[lane] = min(low[lane], row[lane])
            high[lane] = max(high[lane], row[lane])
    if h is None:
        for i in range(x.shape[0]):
            row = x[i]
            for lane in range(LANES):
                total[lane] += row[lane]
    else:
        mass[:] = 0
        for i in range(x.shape[0]):
            row, weight = x[i], h[i]
            for lane in range(LANES):
                total[lane] += weight[lane] * row[lane]
                mass[lane] += weight[lane]


@part
def _sums(x, h, inverse, shift, bottom, top, q1, q2, xq):
    """Of codes q = round(x * inverse + shift): the weighted sums of q, q^2 and x q."""
    q1[:], q2[:], xq[:] = 0, 0, 0
    for i in range(x.shape[0]):
        row = x[i]
        if h is None:
            for lane in range(LANES):
                q = min(max(np.rint(row[lane] * inverse[lane] + shift[lane]), bottom), top)
                q1[lane] += q
                q2[lane] += q * q
                xq[lane] += row[lane] * q
        else:
            weight = h[i]
            for lane in range(LANES):
                q = min(max(np.rint(row[lane] * inverse[lane] + shift[lane]), bottom), top)
                hq = weight[lane] * q
                q1[lane] += hq
                q2[lane] += hq * q
                xq[lane] += hq * row[lane]


@part
def _missed(x, h, inverse, shift, bottom, top, error):
    """Weighted squared error of the same codes, in units of inverse^-2."""
    error[:] = 0
    for i in range(x.shape[0]):
        row = x[i]
        if h is None:
            for lane in range(LANES):
                t = row[lane] * inverse[lane] + shift[lane]
                miss = t - min(max(np.rint(t), bottom), top)
                error[lane] += miss * miss
        else:
            weight = h[i]
            for lane in range(LANES):
                t = row[lane] * inverse[lane] + shift[lane]
                miss = t - min(max(np.rint(t), bottom), top)
                error[lane] += weight[lane] * miss * miss


@part
def _coarse_with_minimum(x, h, top, numerators, low, high, total, mass, inverse, shift, q1, q2, xq, gain, step, offset, mean):
    """Scale and offset by least squares for the codes of every candidate; the mean code of the best."""
    for lane in range(LANES):
        low[lane] = min(low[lane], F(0))
        step[lane], offset[lane] = (high[lane] - low[lane]) / top, low[lane]
        gain[lane], mean[lane] = F(-1), F(0)
    for numerator in numerators:
        for lane in range(LANES):
            span = high[lane] - low[lane]
            inverse[lane] = numerator / span if span > 0 else F(0)
            shift[lane] = F(0.5) * (top - numerator) - low[lane] * inverse[lane]
        _sums(x, h, inverse, shift, F(0), top, q1, q2, xq)
        for lane in range(LANES):
            determinant = mass[lane] * q2[lane] - q1[lane] * q1[lane]
            s = (mass[lane] * xq[lane] - total[lane] * q1[lane]) / determinant
            o = (total[lane] - s * q1[lane]) / mass[lane]
            s, o = (xq[lane] / q2[lane], F(0)) if o > 0 else (s, o)
            gained = s * xq[lane] + o * total[lane]
            better = (gained > gain[lane]) & (s > 0) & (determinant > 0)
            gain[lane] = gained if better else gain[lane]
            step[lane] = s if better else step[lane]
            offset[lane] = o if better else offset[lane]
            mean[lane] = q1[lane] / mass[lane] if better else mean[lane]


@part
def _coarse(x, h, bottom, top, numerators, low, high, inverse, shift, q1, q2, xq, gain, step):
    """Scale by least squares for the codes of every candidate; the extreme weight lies on the longer side, below zero."""
    shift[:] = 0
    for lane in range(LANES):
        high[lane] = -high[lane] if high[lane] > -low[lane] else -low[lane]
        step[lane], gain[lane] = high[lane] / -bottom, F(-1)
    for numerator in numerators:
        for lane in range(LANES):
            inverse[lane] = numerator / high[lane] if high[lane] != 0 else F(0)
        _sums(x, h, inverse, shift, bottom, top, q1, q2, xq)
        for lane in range(LANES):
            s = xq[lane] / q2[lane]
            better = (s * xq[lane] > gain[lane]) & (s * high[lane] > 0)
            gain[lane] = s * xq[lane] if better else gain[lane]
            step[lane] = s if better else step[lane]


@part
def _spread(per_block, values, limit, d, by_lane):
    """One fp16 number per block, so that `limit` times it reaches the largest of its values."""
    for block in range(LANES // per_block):
        largest = F(0)
        for lane in range(block * per_block, (block + 1) * per_block):
            largest = max(largest, abs(values[lane]))
        d[block] = _half_up(largest / limit)
        by_lane[block * per_block : (block + 1) * per_block] = d[block]


@part
def _try(x, h, bottom, top, scale, minimum, d, dmin, inverse, shift, error, best, best_scale, best_minimum):
    for lane in range(LANES):
        s = d[lane] * scale[lane]
        inverse[lane] = F(1) / s if s != 0 else FLAT
        shift[lane] = dmin[lane] * minimum[lane] * inverse[lane]
    _missed(x, h, inverse, shift, bottom, top, error)
    for lane in range(LANES):
        lost = error[lane] / (inverse[lane] * inverse[lane])
        better = lost < best[lane]
        best[lane] = lost if better else best[lane]
        best_scale[lane] = scale[lane] if better else best_scale[lane]
        best_minimum[lane] = minimum[lane] if better else best_minimum[lane]


@part
def _refit(per_block, valid, d, dmin, scale, minimum, mass, total, q1, q2, xq, d_lane, dmin_lane):
    """d and dmin by least squares over a block once codes and integers are chosen; kept if better after rounding to fp16."""
    for block in range(LANES // per_block):
        a, b, c, r, t = 0.0, 0.0, 0.0, 0.0, 0.0
        for lane in range(block * per_block, (block + 1) * per_block):
            s, m = np.float64(scale[lane]), np.float64(minimum[lane])
            a += s * s * q2[lane]
            b += s * m * q1[lane]
            c += m * m * mass[lane]
            r += s * xq[lane]
            t += m * total[lane]
        old, old_min = np.float64(d[block]), np.float64(dmin[block])
        if a * c - b * b > 1e-6 * a * c:
            new = (r * c - t * b) / (a * c - b * b)
            new_min = (b * new - t) / c
        else:
            new, new_min = (r + old_min * b) / a if a > 0 else old, old_min
        new, new_min = np.float64(_half(F(new))), np.float64(_half(F(new_min)))
        before = old * old * a - 2 * old * old_min * b + old_min * old_min * c - 2 * old * r + 2 * old_min * t
        after = new * new * a - 2 * new * new_min * b + new_min * new_min * c - 2 * new * r + 2 * new_min * t
        if after < before and new > 0 and new_min >= 0:
            d[block], dmin[block] = new, new_min
            d_lane[block * per_block : (block + 1) * per_block] = d[block]
            dmin_lane[block * per_block : (block + 1) * per_block] = dmin[block]


@jit
def _fit(w, is_half, h, per_block, limits, numerators, radius, passes, d, dmin, scale, minimum):
    tasks = -(-w.shape[0] // (LANES * TILES))
    for task in numba.prange(tasks):
        _fit_tiles(w, is_half, h, task * LANES * TILES, per_block, limits, numerators, radius, passes, d, dmin, scale, minimum)


@part
def _fit_tiles(w, is_half, h, start, per_block, limits, numerators, radius, passes, d_out, dmin_out, scale_out, min_out):
    bottom, top, scale_low, scale_high = limits
    with_minimum, two_levels = bottom == 0, scale_high > 0
    groups, size = w.shape
    line = np.empty(size, np.float32)
    x = np.empty((size, LANES), np.float32)
    weight = None if h is None else np.empty((size, LANES), np.float32)
    memory = np.zeros((24, LANES), np.float32)
    low, high, total, mass = memory[0], memory[1], memory[2], memory[3]
    inverse, shift, q1, q2, xq, gain = memory[4], memory[5], memory[6], memory[7], memory[8], memory[9]
    step, offset, mean, d, dmin, d_lane, dmin_lane = memory[10], memory[11], memory[12], memory[13], memory[14], memory[15], memory[16]
    scale, minimum, error, best, try_scale, try_min, first_scale = memory[17], memory[18], memory[19], memory[20], memory[21], memory[22], memory[23]
    for first in range(start, min(start + LANES * TILES, groups), LANES):
        _load(w, is_half, h, first, line, x, weight)
        _extent(x, weight, low, high, total, mass)
        if with_minimum:
            _coarse_with_minimum(x, weight, top, numerators, low, high, total, mass, inverse, shift, q1, q2, xq, gain, step, offset, mean)
        else:
            _coarse(x, weight, bottom, top, numerators, low, high, inverse, shift, q1, q2, xq, gain, step)
            offset[:] = 0
        if two_levels:
            _spread(per_block, step, scale_high, d, d_lane)
            _spread(per_block, offset, scale_high, dmin, dmin_lane)
            for lane in range(LANES):
                scale[lane] = np.rint(step[lane] / d_lane[lane]) if d_lane[lane] != 0 else F(0)
                minimum[lane] = np.rint(-offset[lane] / dmin_lane[lane]) if dmin_lane[lane] != 0 else F(0)
            for _ in range(passes):
                best[:] = np.inf
                first_scale[:] = scale
                for k in range(-radius, radius + 1):
                    for lane in range(LANES):
                        try_scale[lane] = min(max(first_scale[lane] + F(k), scale_low), scale_high)
                    if with_minimum:
                        for j in range(-1, 2):
                            for lane in range(LANES):
                                wanted = d_lane[lane] * try_scale[lane] * mean[lane] - total[lane] / mass[lane]
                                wanted = np.rint(wanted / dmin_lane[lane]) + F(j)
                                try_min[lane] = min(max(wanted, F(0)), scale_high) if dmin_lane[lane] > 0 else F(0)
                            _try(x, weight, bottom, top, try_scale, try_min, d_lane, dmin_lane, inverse, shift, error, best, scale, minimum)
                    else:
                        _try(x, weight, bottom, top, try_scale, try_min, d_lane, dmin_lane, inverse, shift, error, best, scale, minimum)
                for lane in range(LANES):
                    s = d_lane[lane] * scale[lane]
                    inverse[lane] = F(1) / s if s != 0 else FLAT
                    shift[lane] = dmin_lane[lane] * minimum[lane] * inverse[lane]
                _sums(x, weight, inverse, shift, bottom, top, q1, q2, xq)
                _refit(per_block, True, d, dmin, scale, minimum, mass, total, q1, q2, xq, d_lane, dmin_lane)
                for lane in range(LANES):
                    mean[lane] = q1[lane] / mass[lane]
        else:
            for lane in range(LANES):
                d[lane], dmin[lane] = _half(step[lane]), _half(offset[lane])
        count = min(LANES, groups - first)
        scale_out[first : first + count], min_out[first : first + count] = scale[:count], minimum[:count]
        count, block = count // per_block, first // per_block
        d_out[block : block + count], dmin_out[block : block + count] = d[:count], dmin[:count]


@jit
def _encode(w, is_half, scale, offset, zero, top, codes):
    groups, size = w.shape
    per_task = max(1, 4096 // size)
    for task in numba.prange((groups + per_task - 1) // per_task):
        x = np.empty(size, np.float32)
        for g in range(task * per_task, min((task + 1) * per_task, groups)):
            _widen(w[g], is_half, x)
            inverse = F(1) / scale[g] if scale[g] != 0 else F(0)
            base, out = offset[g], codes[g]
            for i in range(size):
                out[i] = np.uint8(min(max(np.rint((x[i] - base) * inverse) + zero, F(0)), top))


@part
def _step(wanted, target, error, scale, offset, group, zero, top, codes, row, k):
    """Round one weight; returns by how much its error changed."""
    by, base = scale[row, group[k]], offset[row, group[k]]
    inverse = F(1) / by if by != 0 else F(0)
    q = min(max(np.rint((wanted[row, k] - base) * inverse) + zero, F(0)), top)
    codes[row, k] = np.uint8(q)
    missed = target[row, k] - ((q - zero) * by + base)
    change = missed - error[row, k]
    error[row, k] = missed
    return change


@jit
def _round_block(wanted, target, error, coupling, scale, offset, group, zero, top, codes):
    # Four rows at a time: each is a chain of round, subtract, pass on, and while one waits the others go on.
    rows, width = wanted.shape
    for four in numba.prange((rows + 3) // 4):
        first = min(4 * four, max(rows - 4, 0))
        for k in range(width - 1, -1, -1):
            for row in range(first, min(first + 4, rows)):
                change = _step(wanted, target, error, scale, offset, group, zero, top, codes, row, k)
                for j in range(k):
                    wanted[row, j] += change * coupling[k, j]
