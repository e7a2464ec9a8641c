"""Tables of 16 levels on CPUs, with scales of weights that follow one another: the candidates of kernels/scalar.py, one
pass over each block."""

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.kernels.cpu.compiled import in_threads, inline, loose, loose_kernel, strict, strict_kernel
from halfbyte.kernels.cpu.tiles import F, raw, widen
from halfbyte.kernels.levels import CELLS, Table, ascending, borders, cells, inverse, values_of
from halfbyte.kernels.scales import Number

CHUNK = 4096  # weights handled at once by one thread
FINITE = F(1e38)  # weights whose squares are not keep their absmax
HALF, LAST = F(CELLS // 2), F(CELLS - 1)


def fit(
    table: Table,
    number: Number,
    group: int,
    blocks: int,
    w: Float[Tensor, "out in"],
    importance: Float32[Tensor, "... in"] | None,
    search: bool,
) -> Float32[Tensor, " blocks"]:
    """The scale of every block of `group` weights that follow one another through the matrix."""
    h = np.ones(group, np.float32) if importance is None else importance.contiguous().view(-1).numpy()
    if len(h) % group:  # blocks begin anywhere in a row, and the last is filled up
        h = np.resize(h, blocks * group)
    scale, tries = np.empty(blocks, np.float32), np.array(number.tries if search else (), np.float32)
    values = (cells(table)[1] * table.unit).numpy()
    in_threads(_fit, _tasks(blocks, group), raw(w).reshape(-1), h, group, values, tries, scale)
    return torch.from_numpy(scale)


def encode(
    table: Table, group: int, w: Float[Tensor, "out in"], scales: Float32[Tensor, " blocks"]
) -> UInt8[Tensor, "out in"]:
    """The nearest code of every weight, ties to the level below."""
    codes, order = np.empty(w.numel(), np.uint8), np.array(ascending(table), np.uint8)
    lookup = tuple((borders(table) * table.unit).numpy()), order, list(order) != sorted(order)
    in_threads(
        _encode, _tasks(scales.numel(), group), raw(w).reshape(-1), inverse(scales).numpy(), *lookup, group, codes
    )
    return torch.from_numpy(codes).view(w.shape)


def decode(
    table: Table, group: int, codes: UInt8[Tensor, "out in"], scales: Float32[Tensor, " blocks"]
) -> Float32[Tensor, "out in"]:
    """Levels times the scale of their block."""
    w, values = np.empty(codes.numel(), np.float32), (values_of(table) * table.unit).numpy()
    read = codes.contiguous().view(-1).numpy()
    in_threads(_decode, scales.numel(), read, scales.contiguous().numpy(), values, group, w)
    return torch.from_numpy(w).view(codes.shape)


def _tasks(blocks: int, group: int) -> int:
    """CHUNK weights each."""
    return -(-blocks // max(1, CHUNK // group))


@inline
def _cell(x):
    # The mask keeps a weight that is not a number inside the table.
    return np.uint32(np.int32(min(max(HALF * x + HALF, F(0)), LAST))) & np.uint32(CELLS - 1)


@loose_kernel
def _fit(first, last, w, h, group, values, tries, scale):
    per_task = max(1, CHUNK // group)
    for task in range(first, last):
        x, largest = np.zeros((per_task, group), np.float32), np.empty(per_task, np.float32)
        widen(w[task * x.size : (task + 1) * x.size], x.reshape(-1))
        _largest(x.view(np.int32), largest.view(np.int32))
        start = task * x.size % h.size
        for b in range(min(per_task, scale.size - task * per_task)):
            scale[task * per_task + b] = _search(x[b], h[start : start + group], values, tries, largest[b])
            start = start + group if start + group < h.size else 0


@strict
def _largest(x, largest):
    # By their bits: LLVM makes no vectors of a maximum of floats that may be NaN.
    for b in range(x.shape[0]):
        bits = np.int32(0)
        for i in range(x.shape[1]):
            bits = max(bits, x[b, i] & np.int32(0x7FFFFFFF))
        largest[b] = bits


@loose
def _search(x, h, values, tries, largest):
    scale, best = largest, F(0)
    if largest > 0:
        for t in range(tries.size):
            wq, qq = _moments(x, h, F(1) / (largest * tries[t]), values)
            if best * qq < wq * wq < FINITE:
                scale = wq / qq
                best = wq * scale
    return scale


@inline
def _moments(x, h, by, values):
    """sum(h w q) and sum(h q q), 32 at a time: a loop of known length is all vectors."""
    wq, qq = F(0), F(0)
    for start in range(0, x.size, 32):
        a, b = x[start : start + 32], h[start : start + 32]
        for i in range(32):
            q = values[_cell(a[i] * by)]
            t = b[i] * q
            wq += t * a[i]
            qq += t * q
    return wq, qq


# Exact, and all vectors: of ascending levels, the nearest is the one with as many borders below the weight.
@strict_kernel
def _encode(first, last, w, inverse, borders, order, reordered, group, codes):
    per_task = max(1, CHUNK // group)
    for task in range(first, last):
        x = np.empty(per_task * group, np.float32)
        out = codes[task * x.size : (task + 1) * x.size]
        widen(w[task * x.size : (task + 1) * x.size], x)
        for b in range(min(per_task, inverse.size - task * per_task)):
            part = x[b * group : (b + 1) * group]
            by = inverse[task * per_task + b]
            for i in range(part.size):
                part[i] *= by
        _count(x, borders, out)
        if reordered:
            for i in range(out.size):
                out[i] = order[out[i] & np.uint8(15)]


@strict
def _count(x, b, out):
    # Written out: LLVM unrolls such a loop too late to make vectors of it.
    for i in range(out.size):
        v = x[i]
        low = np.int32(v > b[0]) + np.int32(v > b[1]) + np.int32(v > b[2]) + np.int32(v > b[3]) + np.int32(v > b[4])
        middle = np.int32(v > b[5]) + np.int32(v > b[6]) + np.int32(v > b[7]) + np.int32(v > b[8]) + np.int32(v > b[9])
        high = (
            np.int32(v > b[10]) + np.int32(v > b[11]) + np.int32(v > b[12]) + np.int32(v > b[13]) + np.int32(v > b[14])
        )
        out[i] = np.uint8(low + middle + high)


@strict_kernel
def _decode(first, last, codes, scales, levels, group, w):
    for b in range(first, last):
        at = b * group
        read, out = codes[at : at + group], w[at : at + group]
        for i in range(out.size):
            out[i] = levels[read[i] & np.uint8(15)] * scales[b]
