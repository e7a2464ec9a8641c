"""The accelerated twin of rounding.py for CPUs: the same candidates in the same order, one pass over each group.

A group stays in the first-level cache while all candidates are tried, so the search costs arithmetic, not memory:
the torch reference moves every weight through memory some hundred times, this reads it once.
bfloat16 weights are widened as they are read; nothing of the size of the matrix is allocated but the codes.
"""

import math

import numba
import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from halfbyte.grids.rounding import CANDIDATES, NORMAL_STEP, limits, store

jit = numba.njit(cache=True, parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True)
inline = numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True, inline="always")
PIECE = 4096  # in-features handled at once by one thread when a row holds several groups
F = np.float32
DROPPED_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}  # of the 23 that float32 has


def fit(
    w: Float[Tensor, "rows width"], importance: Float32[Tensor, " width"] | None, group: int, bits: int, symmetric: bool, search: bool, dtype: torch.dtype
) -> tuple[Float[Tensor, "rows groups"], UInt8[Tensor, "rows groups"] | None]:
    rows, width = w.shape
    h = np.ones(width, np.float32) if importance is None else importance.contiguous().numpy()
    scale = np.empty((rows, width // group), np.float32)
    zero = np.zeros((rows, 0 if symmetric else width // group), np.uint8)
    candidates = CANDIDATES if search else 0
    held = F(2 ** DROPPED_BITS[dtype] + 1), *(F(limit) for limit in limits(dtype))
    _fit(_raw(w), h, group, bits, symmetric, candidates, F(NORMAL_STEP[bits]), held, scale, zero)
    return store(torch.from_numpy(scale), dtype), None if symmetric else torch.from_numpy(zero)


def encode(
    w: Float[Tensor, "rows width"],
    scale: Float32[Tensor, "rows groups"],
    zero: UInt8[Tensor, "rows groups"] | None,
    group: int,
    bits: int,
) -> UInt8[Tensor, "rows width"]:
    codes = np.empty(w.shape, np.uint8)
    offset = np.zeros((scale.shape[0], 0), np.uint8) if zero is None else zero.numpy()
    _encode(_raw(w), scale.contiguous().numpy(), offset, group, bits, codes)
    return torch.from_numpy(codes)


def round_block(
    wanted: Float32[Tensor, "out width"],
    target: Float32[Tensor, "out width"],
    error: Float32[Tensor, "out width"],
    coupling: Float32[Tensor, "width width"],
    scale: Float32[Tensor, "rows groups"],
    zero: UInt8[Tensor, "rows groups"] | None,
    group: Int64[Tensor, " width"],
    top: int,
    base: Float32[Tensor, "rows groups"] | None = None,
) -> UInt8[Tensor, "out width"]:
    """Grid.round_block, given the group of each column: codes 0 to `top` stand for base + scale * (code - zero).

    Rows are independent: each stays in the cache.
    """
    codes = np.empty(wanted.shape, np.uint8)
    offset = np.full(scale.shape, (top + 1) // 2, np.uint8) if zero is None else zero.numpy()
    base = torch.zeros(scale.shape) if base is None else base
    arrays = wanted.numpy(), target.numpy(), error.numpy(), coupling.contiguous().numpy(), scale.contiguous().numpy(), offset, base.contiguous().numpy()
    _round_block(*arrays, group.numpy(), F(top), codes)
    return torch.from_numpy(codes)


def _raw(w: Tensor) -> np.ndarray:
    """bfloat16 as its 16 bits (numba has no such type), everything else as float32."""
    w = w.detach().contiguous()
    return w.view(torch.uint16).numpy() if w.dtype == torch.bfloat16 else w.float().numpy()


@inline
def _widen(raw, x):
    # A slice, not an array and a start: numba tests every index whose sign it does not know, and makes no vectors then.
    if raw.itemsize == 4:
        for i in range(x.size):
            x[i] = raw[i]
    else:
        bits = x.view(np.uint32)
        for i in range(x.size):
            bits[i] = np.uint32(raw[i]) << np.uint32(16)


@jit
def _fit(w, h, group, bits, symmetric, candidates, normal_step, held, scale, zero):
    rows, groups = scale.shape
    per_task = max(1, PIECE // group)
    tasks_per_row = (groups + per_task - 1) // per_task
    for task in numba.prange(rows * tasks_per_row):
        row, first = task // tasks_per_row, (task % tasks_per_row) * per_task
        x, ends = np.empty(group, np.float32), np.empty(2, np.float32)
        for g in range(first, min(first + per_task, groups)):
            _widen(w[row, g * group : (g + 1) * group], x)
            weight = h[g * group : (g + 1) * group]
            if symmetric:
                scale[row, g] = _symmetric(x, ends, weight, bits, candidates, normal_step, held)
            else:
                scale[row, g], zero[row, g] = _asymmetric(x, ends, weight, bits, candidates, normal_step, held)


@inline
def _range(x, ends):
    """Smallest and largest value, and zero between them. By their bits: LLVM makes no vectors of a maximum of floats that may be NaN."""
    bits, low, high = x.view(np.int32), np.int32(0), np.int32(0)
    for i in range(x.size):
        ordered = np.int32(bits[i] ^ ((bits[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)))  # negative floats shrink as their bits grow
        low = min(low, ordered)
        high = max(high, ordered)
    bits = ends.view(np.int32)
    bits[0], bits[1] = low ^ np.int32(0x7FFFFFFF) if low < 0 else low, high
    return ends[0], ends[1]


@numba.njit(cache=True, fastmath=False, error_model="numpy", nogil=True)
def _store(scale, held):
    """rounding.store for a positive scale, as float32."""
    splitter, smallest, largest = held
    scale = min(max(scale, smallest), largest)
    if splitter == F(2**13 + 1) and scale < F(2**-14):  # fp16 has steps of 2^-24 there
        return np.rint(scale * F(2**24)) * F(2**-24)
    high = scale * splitter  # Veltkamp's splitting needs the order of operations: without fastmath=False it takes the caller's
    return high - (high - scale)


@inline
def _ratio(candidates, first, spread, normal_step):
    """What the reciprocals of the scales to try grow by, from around min-max to beyond it."""
    last = min(max(F(1.2) * first, F(1.3) / (normal_step * spread)), F(7.2) * first)
    return (last / (F(0.9) * first)) ** F(1 / (candidates - 2))


@inline
def _better(wq, qq, held, best, scale, sign):
    if wq > 0:
        stored = _store(wq / qq, held)
        gain = stored * (F(2) * wq - stored * qq)
        if gain > best:
            return gain, sign * stored, True
    return best, scale, False


@numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True)
def _symmetric(x, ends, h, bits, candidates, normal_step, held):
    half = F(1 << (bits - 1))
    top = half - F(1)
    low, high = _range(x, ends)
    largest = max(-low, high)
    if largest == 0:
        return F(1)
    scale = _store(F(2) * largest / (F(2) * half - F(1)), held)
    if candidates == 0:
        return scale
    squares = F(0)
    for i in range(x.size):
        squares += x[i] * x[i]
    best, inverse, following = F(-1), F(1) / scale, F(0.9) * (half / largest)
    ratio = _ratio(candidates, half / largest, F(math.sqrt(squares / F(x.size))), normal_step)
    for _ in range(candidates):
        wq, qq, wq_minus, qq_minus = F(0), F(0), F(0), F(0)
        for i in range(x.size):
            r = np.rint(x[i] * inverse)
            q = min(max(r, -half), top)
            t = h[i] * q
            wq += t * x[i]
            qq += t * q
            q = min(max(r, -top), half)
            t = h[i] * q
            wq_minus += t * x[i]
            qq_minus += t * q
        best, scale, _ = _better(wq, qq, held, best, scale, F(1))
        best, scale, _ = _better(wq_minus, qq_minus, held, best, scale, F(-1))
        inverse, following = following, following * ratio
    return scale


@numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True)
def _asymmetric(x, ends, h, bits, candidates, normal_step, held):
    top = F((1 << bits) - 1)
    low, high = _range(x, ends)
    if high == low:
        return F(1), np.uint8(0)
    widest = (high - low) / top
    middle = min(max(np.rint(-low / widest), F(0)), top)
    if candidates == 0:
        return _store(widest, held), np.uint8(middle)
    total, squares = F(0), F(0)
    for i in range(x.size):
        total += x[i]
        squares += x[i] * x[i]
    mean = total / F(x.size)
    spread = F(math.sqrt(max(squares / F(x.size) - mean * mean, F(0))))
    scale = _store(widest, held)
    best, zero, inverse, following = F(-1), middle, F(1) / scale, F(0.9) / widest
    below, above = max(middle - F(1), F(0)), min(middle + F(1), top)
    ratio = _ratio(candidates, F(1) / widest, spread, normal_step)
    for _ in range(candidates):
        wq0, qq0, wq1, qq1, wq2, qq2 = F(0), F(0), F(0), F(0), F(0), F(0)
        for i in range(x.size):
            r = np.rint(x[i] * inverse)
            q = min(max(r, -below), top - below)
            t = h[i] * q
            wq0 += t * x[i]
            qq0 += t * q
            q = min(max(r, -middle), top - middle)
            t = h[i] * q
            wq1 += t * x[i]
            qq1 += t * q
            q = min(max(r, -above), top - above)
            t = h[i] * q
            wq2 += t * x[i]
            qq2 += t * q
        best, scale, better = _better(wq0, qq0, held, best, scale, F(1))
        zero = below if better else zero
        best, scale, better = _better(wq1, qq1, held, best, scale, F(1))
        zero = middle if better else zero
        best, scale, better = _better(wq2, qq2, held, best, scale, F(1))
        zero = above if better else zero
        inverse, following = following, following * ratio
    return scale, np.uint8(zero)


@jit
def _encode(w, scale, zero, group, bits, codes):
    rows, groups = scale.shape
    top, half = F((1 << bits) - 1), F(1 << (bits - 1))
    per_task = max(1, PIECE // group)
    tasks_per_row = (groups + per_task - 1) // per_task
    for task in numba.prange(rows * tasks_per_row):
        row, first = task // tasks_per_row, (task % tasks_per_row) * per_task
        x = np.empty(group, np.float32)
        for g in range(first, min(first + per_task, groups)):
            _widen(w[row, g * group : (g + 1) * group], x)
            inverse = F(1) / scale[row, g]
            offset = half if zero.shape[1] == 0 else F(zero[row, g])
            out = codes[row, g * group : (g + 1) * group]
            for i in range(group):
                out[i] = np.uint8(np.int32(min(max(np.rint(x[i] * inverse) + offset, F(0)), top)))


@inline
def _step(wanted, target, error, scale, offset, base, group, top, codes, row, k):
    """Round one weight; returns by how much its error changed."""
    by = scale[row, group[k]]
    zero = F(offset[row, group[k]])
    start = base[row, group[k]]
    q = min(max(np.rint((wanted[row, k] - start) * (F(1) / by)) + zero, F(0)), top)
    codes[row, k] = np.uint8(q)
    missed = target[row, k] - ((q - zero) * by + start)
    change = missed - error[row, k]
    error[row, k] = missed
    return change


@jit
def _round_block(wanted, target, error, coupling, scale, offset, base, group, top, codes):
    # Four rows at a time: each is a chain of round, subtract, pass on, and while one waits the others go on.
    rows, width = wanted.shape
    for four in numba.prange(rows // 4):
        a, b, c, d = 4 * four, 4 * four + 1, 4 * four + 2, 4 * four + 3
        for k in range(width - 1, -1, -1):
            change_a = _step(wanted, target, error, scale, offset, base, group, top, codes, a, k)
            change_b = _step(wanted, target, error, scale, offset, base, group, top, codes, b, k)
            change_c = _step(wanted, target, error, scale, offset, base, group, top, codes, c, k)
            change_d = _step(wanted, target, error, scale, offset, base, group, top, codes, d, k)
            # Up to whole vectors: what is beyond k is rounded already and not read again.
            for j in range(min((k + 15) & ~15, width)):
                by = coupling[k, j]
                wanted[a, j] += change_a * by
                wanted[b, j] += change_b * by
                wanted[c, j] += change_c * by
                wanted[d, j] += change_d * by
    for row in range(rows - rows % 4, rows):
        for k in range(width - 1, -1, -1):
            change = _step(wanted, target, error, scale, offset, base, group, top, codes, row, k)
            for j in range(k):
                wanted[row, j] += change * coupling[k, j]
