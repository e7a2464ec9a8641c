"""The accelerated twin of rounding.py for CPUs: the same candidates in the same order, one pass over each group.

A group stays in the first-level cache while all candidates are tried, so the search costs arithmetic, not memory:
the torch reference moves every weight through memory some hundred times, this reads it once.
bfloat16 weights are widened as they are read; nothing of the size of the matrix is allocated but the codes.
"""

import math

import numba
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.grids.rounding import CANDIDATES, NORMAL_STEP

jit = numba.njit(cache=True, parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True)
inline = numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True, inline="always")
PIECE = 4096  # in-features handled at once by one thread when a row holds several groups
F = np.float32


def fit(
    w: Float[Tensor, "rows width"], importance: Float32[Tensor, " width"] | None, group: int, bits: int, symmetric: bool, search: bool
) -> tuple[Float32[Tensor, "rows groups"], UInt8[Tensor, "rows groups"] | None]:
    rows, width = w.shape
    h = np.ones(width, np.float32) if importance is None else importance.contiguous().numpy()
    scale = np.empty((rows, width // group), np.float32)
    zero = np.zeros((rows, 0 if symmetric else width // group), np.uint8)
    candidates = CANDIDATES if search else 0
    _fit(_raw(w), h, group, bits, symmetric, candidates, F(NORMAL_STEP[bits]), scale, zero)
    return torch.from_numpy(scale), None if symmetric else torch.from_numpy(zero)


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


def _raw(w: Tensor) -> np.ndarray:
    """bfloat16 as its 16 bits (numba has no such type), everything else as float32."""
    w = w.detach().contiguous()
    return w.view(torch.uint16).numpy() if w.dtype == torch.bfloat16 else w.float().numpy()


@inline
def _widen(row, start, x):
    if row.itemsize == 4:
        for i in range(x.size):
            x[i] = row[start + i]
    else:
        bits = x.view(np.uint32)
        for i in range(x.size):
            bits[i] = np.uint32(row[start + i]) << np.uint32(16)


@jit
def _fit(w, h, group, bits, symmetric, candidates, normal_step, scale, zero):
    rows, groups = scale.shape
    per_task = max(1, PIECE // group)
    tasks_per_row = (groups + per_task - 1) // per_task
    for task in numba.prange(rows * tasks_per_row):
        row, first = task // tasks_per_row, (task % tasks_per_row) * per_task
        x = np.empty(group, np.float32)
        for g in range(first, min(first + per_task, groups)):
            _widen(w[row], g * group, x)
            weight = h[g * group : (g + 1) * group]
            if symmetric:
                scale[row, g] = _symmetric(x, weight, bits, candidates, normal_step)
            else:
                scale[row, g], zero[row, g] = _asymmetric(x, weight, bits, candidates, normal_step)


@inline
def _range(half, largest, spread, normal_step):
    first = F(0.9) * half / largest
    last = min(max(F(1.2) * half / largest, F(1.3) / (normal_step * spread)), F(8) * first)
    return first, last


@numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True)
def _symmetric(x, h, bits, candidates, normal_step):
    half = F(1 << (bits - 1))
    top = half - F(1)
    largest, squares = F(0), F(0)
    for i in range(x.size):
        largest = max(largest, abs(x[i]))
        squares += x[i] * x[i]
    if largest == 0:
        return F(1)
    if candidates == 0:
        return F(2) * largest / (F(2) * half - F(1))
    first, last = _range(half, largest, F(math.sqrt(squares / F(x.size))), normal_step)
    best, scale = F(-1), F(1)
    for k in range(candidates):
        inverse = first * (last / first) ** F(k / (candidates - 1))
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
        if wq > 0 and wq * wq / qq > best:
            best, scale = wq * wq / qq, wq / qq
        if wq_minus > 0 and wq_minus * wq_minus / qq_minus > best:
            best, scale = wq_minus * wq_minus / qq_minus, -wq_minus / qq_minus
    return scale


@numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", nogil=True)
def _asymmetric(x, h, bits, candidates, normal_step):
    top = F((1 << bits) - 1)
    low, high, total, squares = F(0), F(0), F(0), F(0)
    for i in range(x.size):
        low = min(low, x[i])
        high = max(high, x[i])
        total += x[i]
        squares += x[i] * x[i]
    if high == low:
        return F(1), np.uint8(0)
    widest = (high - low) / top
    middle = min(max(np.rint(-low / widest), F(0)), top)
    if candidates == 0:
        return widest, np.uint8(middle)
    mean = total / F(x.size)
    first, last = _range(F(1), widest, F(math.sqrt(max(squares / F(x.size) - mean * mean, F(0)))), normal_step)
    best, scale, zero = F(-1), F(1), middle
    below, above = max(middle - F(1), F(0)), min(middle + F(1), top)
    for k in range(candidates):
        inverse = first * (last / first) ** F(k / (candidates - 1))
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
        if wq0 > 0 and wq0 * wq0 / qq0 > best:
            best, scale, zero = wq0 * wq0 / qq0, wq0 / qq0, below
        if wq1 > 0 and wq1 * wq1 / qq1 > best:
            best, scale, zero = wq1 * wq1 / qq1, wq1 / qq1, middle
        if wq2 > 0 and wq2 * wq2 / qq2 > best:
            best, scale, zero = wq2 * wq2 / qq2, wq2 / qq2, above
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
            _widen(w[row], g * group, x)
            inverse = F(1) / scale[row, g]
            offset = half if zero.shape[1] == 0 else F(zero[row, g])
            out = codes[row, g * group : (g + 1) * group]
            for i in range(group):
                out[i] = np.uint8(min(max(np.rint(x[i] * inverse) + offset, F(0)), top))
