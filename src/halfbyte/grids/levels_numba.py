"""The accelerated twin of levels.py for CPUs: the same candidates in the same order, one pass over each group."""

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.grids import levels as reference
from halfbyte.grids.compiled import in_threads, inline, loose, loose_kernel, part_with, strict
from halfbyte.grids.rounding_numba import _store
from halfbyte.grids.tiles_numba import F, raw, widen

FP16, BYTE, FREE = 0, 1, 2
HALF_PRECISION = F(2**13 + 1), F(0), F(65504)  # see rounding_numba._store; here a scale may be zero
CELLS, MIDDLE = F(reference.CELLS - 1), F(reference.CELLS // 2)


def fit(
    grid: "reference.LevelGrid", w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool
) -> tuple[Float32[Tensor, "out groups"], UInt8[Tensor, "out subs"] | None]:
    rows, width = w.shape
    h = np.ones(width, np.float32) if importance is None else importance.contiguous().numpy()
    h = h.reshape(-1, width)
    scale = np.empty((rows, width // grid.group), np.float32)
    values = reference.cells(grid.levels)[1].numpy()
    kind = {"fp16": FP16, "6-bit": FREE}.get(grid.scale, BYTE)
    table, borders = np.zeros(1, np.float32), np.zeros(0, np.float32)
    if kind == BYTE:
        table, borders = reference.byte_scales(grid.scale).numpy(), reference.borders(grid.scale).numpy()
    in_threads(
        _fit,
        rows,
        raw(w),
        h,
        grid.group,
        values,
        F(grid.reach),
        np.array(grid.tries if search else (), np.int64),
        kind,
        table,
        borders,
        scale,
    )
    if kind != FREE:
        return torch.from_numpy(scale), None
    top, sub = np.empty((rows, width // reference.SUPER), np.float32), np.empty(scale.shape, np.uint8)
    in_threads(_two_levels, rows, raw(w), h, grid.group, values, search, scale, top, sub)
    return torch.from_numpy(top), torch.from_numpy(sub)


def encode(
    grid: "reference.LevelGrid", w: Float[Tensor, "out in"], scales: Float32[Tensor, "out groups"]
) -> UInt8[Tensor, "out in"]:
    codes = np.empty(w.shape, np.uint8)
    in_threads(
        _encode,
        len(w),
        raw(w),
        reference.inverse(scales).contiguous().numpy(),
        reference.cells(grid.levels)[0].int().numpy(),
        grid.group,
        codes,
    )
    return torch.from_numpy(codes)


@inline
def cell_of(x):
    # The mask keeps a weight that is not a number inside the table.
    return np.uint32(np.int32(min(max(F(2) * x + MIDDLE, F(0)), CELLS))) & np.uint32(reference.CELLS - 1)


@inline
def inverse_of(scale):
    return F(0) if scale == 0 else min(max(F(1) / scale, F(-1e38)), F(1e38))


@inline
def _moments_of(x, h, scale, values, count):
    inverse, wq, qq = inverse_of(scale), F(0), F(0)
    for i in range(count):
        q = values[cell_of(x[i] * inverse)]
        t = h[i] * q
        wq += t * x[i]
        qq += t * q
    return wq, qq


@loose
def _moments(x, h, scale, values):
    """sum(h w q) and sum(h q q); a loop of known length is all vectors."""
    return _moments_of(x, h, scale, values, 32) if x.size == 32 else _moments_of(x, h, scale, values, x.size)


@strict
def _half(scale):
    return -_store(-scale, HALF_PRECISION) if scale < 0 else _store(scale, HALF_PRECISION)


# Weights are finite. Where LLVM does not know that, it makes no vectors of a maximum.
@part_with({"reassoc", "nsz", "nnan", "ninf"})
def _largest(x):
    """The value of the largest magnitude."""
    low, high = F(0), F(0)
    for i in range(x.size):
        low, high = min(low, x[i]), max(high, x[i])
    return low if -low > high else high


@loose_kernel
def _fit(start, stop, w, h, group, values, reach, tries, kind, table, borders, scale):
    for row in range(start, stop):
        _fit_row(w[row], h[row % h.shape[0]], group, values, reach, tries, kind, table, borders, scale[row])


@loose
def _fit_row(w, h, group, values, reach, tries, kind, table, borders, scale):
    x = np.empty(group, np.float32)
    for g in range(scale.size):
        widen(w[g * group : (g + 1) * group], x)
        weight = h[g * group : (g + 1) * group]
        if kind == BYTE:
            scale[g] = _search_byte(x, weight, values, reach, tries, table, borders)
        else:
            found = _search(x, weight, values, reach, tries)
            scale[g] = _half(found) if kind == FP16 else found


@inline
def _search(x, h, values, reach, tries):
    largest = _largest(x)
    scale, best = largest / reach, F(0)
    if largest != 0:
        for t in range(tries.size):
            wq, qq = _moments(x, h, largest / F(tries[t]), values)
            if wq * wq > best * qq:
                scale = wq / qq
                best = wq * scale
    return scale


@inline
def _search_byte(x, h, values, reach, tries, table, borders):
    middle, best = np.searchsorted(borders, abs(_largest(x)) / reach, side="right"), F(0)
    scale = table[middle]
    for t in range(tries.size):
        tried = table[min(max(middle + tries[t], 0), table.size - 1)]
        wq, qq = _moments(x, h, tried, values)
        gain = tried * (F(2) * wq - tried * qq)
        if gain > best:
            best, scale = gain, tried
    return scale


@loose_kernel
def _two_levels(start, stop, w, h, group, values, search, scale, top, sub):
    supers = top.shape[1]
    per = scale.shape[1] // supers
    for row in range(start, stop):
        x, weight = np.empty(group, np.float32), h[row % h.shape[0]]
        for s in range(supers):
            own = scale[row, s * per : (s + 1) * per]
            above = _half(_largest(own) / F(-32))
            inverse, numerator, denominator = inverse_of(above), F(0), F(0)
            for g in range(per):
                exact = own[g] * inverse
                if not search:
                    sub[row, s * per + g] = np.uint8(min(max(np.rint(exact), F(-32)), F(31)) + F(32))
                    continue
                at = (s * per + g) * group
                widen(w[row, at : at + group], x)
                best, integer, wq, qq = F(-np.inf), F(0), F(0), F(0)
                for up in range(2):
                    i = min(max(np.floor(exact) + F(up), F(-32)), F(31))
                    a, b = _moments(x, weight[at : at + group], above * i, values)
                    gain = above * i * (F(2) * a - above * i * b)
                    if gain > best:
                        best, integer, wq, qq = gain, i, a, b
                sub[row, s * per + g] = np.uint8(integer + F(32))
                numerator += integer * wq
                denominator += integer * integer * qq
            refined = _half(numerator / denominator if denominator > 0 else F(0))
            better = refined * (F(2) * numerator - refined * denominator) > above * (
                F(2) * numerator - above * denominator
            )
            top[row, s] = refined if better and search else above


@loose_kernel
def _encode(start, stop, w, inverse, code, group, codes):
    for row in range(start, stop):
        _encode_row(w[row], inverse[row], code, group, codes[row])


@loose
def _encode_row(w, inverse, code, group, codes):
    x = np.empty(group, np.float32)
    for g in range(inverse.size):
        widen(w[g * group : (g + 1) * group], x)
        out = codes[g * group : (g + 1) * group]
        if group == 32:  # as in _moments
            for i in range(32):
                out[i] = np.uint8(code[cell_of(x[i] * inverse[g])])
        else:
            for i in range(group):
                out[i] = np.uint8(code[cell_of(x[i] * inverse[g])])
