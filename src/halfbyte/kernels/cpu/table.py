"""Tables of levels on CPUs, with scales of groups of in-features: the candidates of kernels/scalar.py, one pass over
each group."""

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.kernels.cpu.compiled import in_threads, inline, loose, loose_kernel, part_with, strict
from halfbyte.kernels.cpu.even import _store
from halfbyte.kernels.cpu.tiles import F, raw, widen
from halfbyte.kernels.levels import CELLS, Table, cells, inverse
from halfbyte.kernels.scales import SUPER, Byte, Number, Params, UnderHalf

FP16, BYTE, FREE = 0, 1, 2
HALF_PRECISION = F(2**13 + 1), F(0), F(65504)  # see even._store; here a scale may be zero
LAST, MIDDLE = F(CELLS - 1), F(CELLS // 2)


def fit(
    table: Table,
    storage: Number | Byte | UnderHalf,
    group: int,
    w: Float[Tensor, "out in"],
    importance: Float32[Tensor, "... in"] | None,
    search: bool,
) -> Params:
    """Scales of every group as the storage has them, row by row."""
    rows, width = w.shape
    h = np.ones(width, np.float32) if importance is None else importance.contiguous().numpy()
    h = h.reshape(-1, width)
    scale, values = np.empty((rows, width // group), np.float32), cells(table)[1].numpy()
    weights = raw(w), h, group, values
    if isinstance(storage, Byte):
        stored_values, borders = storage.ascending(table.unit).numpy(), storage.borders(table.unit).numpy()
        tried = np.array(storage.tries if search else (), np.int64)
        in_threads(_fit, rows, *weights, F(table.reach), tried, BYTE, stored_values, borders, scale)
        return {"scale": torch.searchsorted(torch.from_numpy(stored_values), torch.from_numpy(scale)).to(torch.uint8)}
    number = storage.first if isinstance(storage, UnderHalf) else storage
    tried = np.array([round(table.reach / share) for share in number.tries] if search else (), np.int64)
    kind = FREE if isinstance(storage, UnderHalf) else FP16
    in_threads(
        _fit, rows, *weights, F(table.reach), tried, kind, np.zeros(1, np.float32), np.zeros(0, np.float32), scale
    )
    if kind == FP16:
        return {"scale": torch.from_numpy(scale).half()}
    top, sub = np.empty((rows, width // SUPER), np.float32), np.empty(scale.shape, np.uint8)
    in_threads(_two_levels, rows, *weights, search, scale, top, sub)
    return {"d": torch.from_numpy(top).half(), "scale": torch.from_numpy(sub)}


def encode(
    table: Table, group: int, w: Float[Tensor, "out in"], scales: Float32[Tensor, "out groups"]
) -> UInt8[Tensor, "out in"]:
    """The nearest code of every weight, as cells find it."""
    codes, code = np.empty(w.shape, np.uint8), cells(table)[0].int().numpy()
    in_threads(_encode, len(w), raw(w), inverse(scales).contiguous().numpy(), code, group, codes)
    return torch.from_numpy(codes)


@inline
def cell_of(x):
    """The cell of a scaled weight: `kernels.levels.cell_of`."""
    # The mask keeps a weight that is not a number inside the table.
    return np.uint32(np.int32(min(max(F(2) * x + MIDDLE, F(0)), LAST))) & np.uint32(CELLS - 1)


@inline
def inverse_of(scale):
    """The reciprocal; of zero, zero: `kernels.levels.inverse`."""
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
            best = _search(x, weight, values, reach, tries)
            scale[g] = _half(best) if kind == FP16 else best


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
            group_scales = scale[row, s * per : (s + 1) * per]
            above = _half(_largest(group_scales) / F(-32))
            inverse, numerator, denominator = inverse_of(above), F(0), F(0)
            for g in range(per):
                exact = group_scales[g] * inverse
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
