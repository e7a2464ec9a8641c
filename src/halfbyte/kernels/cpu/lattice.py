"""Lattices on CPUs: the candidates of kernels/lattice.py in the same order, one pass over each group."""

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from halfbyte.kernels import lattice
from halfbyte.kernels.cpu.compiled import in_threads, inline, kernel_with, part_with
from halfbyte.kernels.cpu.even import _store
from halfbyte.kernels.cpu.tiles import F, raw, widen
from halfbyte.kernels.lattice import CANDIDATES, CELLS, EARLY_STOP, SUPER, Lattice

HALF_PRECISION = F(2**13 + 1), F(0), F(65504)  # see even._store
NONE = np.uint16(0xFFFF)
MATH = {"reassoc", "contract", "nsz", "arcp", "nnan", "ninf"}  # weights are finite, and so is what is made of them
kernel, part = kernel_with(MATH), part_with(MATH)


def _tables(grid: Lattice) -> tuple[np.ndarray, ...]:
    """`kernels.lattice.Tables` as arrays of numpy."""
    return tuple(table.numpy() for table in lattice.tables(grid))


def fit(
    grid: Lattice,
    w: Float[Tensor, "out in"],
    importance: Float32[Tensor, "... in"] | None,
    search: bool,
) -> tuple[Float32[Tensor, "out blocks"], UInt8[Tensor, "out groups"]]:
    """As `kernels.lattice.fit`, row by row."""
    rows, width = w.shape
    d, scale = np.empty((rows, width // SUPER), np.float32), np.empty((rows, width // grid.group), np.uint8)
    h, shape = _weights(width, importance), (grid.group, grid.dimension, grid.parity)
    in_threads(
        _fit,
        rows,
        raw(w),
        h,
        _tables(grid),
        *shape,
        F(grid.unit),
        F(grid.spread),
        EARLY_STOP + (importance is not None) if search else 0,
        d,
        scale,
    )
    return torch.from_numpy(d), torch.from_numpy(scale)


def encode(
    grid: Lattice,
    w: Float[Tensor, "out in"],
    scales: Float32[Tensor, "out groups"],
    importance: Float32[Tensor, " in"] | None,
) -> UInt8[Tensor, "out in"]:
    """As `kernels.lattice.encode`, row by row."""
    codes = np.empty(w.shape, np.uint8)
    shape, book = (grid.group, grid.dimension, grid.parity), lattice.codebook(grid.name).numpy()
    in_threads(
        _encode,
        len(w),
        raw(w),
        _weights(w.shape[1], importance),
        _tables(grid),
        *shape,
        book,
        scales.contiguous().numpy(),
        codes,
    )
    return torch.from_numpy(codes)


def _weights(width: int, importance: Tensor | None) -> np.ndarray:
    """Importance of in-features, or of each weight: by rows, in eights."""
    h = np.ones(width, np.float32) if importance is None else importance.contiguous().numpy()
    return h.reshape(-1, width // 8, 8)


@inline
def _cell(a):
    # The mask keeps a weight that is not a number inside the table.
    return np.uint32(np.int32(min(max(F(2) * a, F(0)), F(CELLS - 1)))) & np.uint32(CELLS - 1)


@part
def _scaled(x, inverse, digits, a, digit):
    """Scaled magnitudes of eights, and the index of the nearest magnitude of the grid."""
    for v in range(x.shape[0]):
        for i in range(8):
            y = min(abs(x[v, i] * inverse), F(1e18))
            a[v, i] = y
            digit[v, i] = digits[_cell(y)]


@part
def _make_even(x, h, first, magnitudes, a, digit, flipped):
    """Turn one weight around where the number of negative ones is odd; `flipped` says which, 8 for none."""
    for v in range(x.shape[0]):
        odd = False
        for i in range(8):
            odd ^= x[v, i] < 0
        flipped[v] = 8
        if odd:
            least, at = F(np.inf), 0
            for i in range(8):
                loss = h[first + v, i] * a[v, i] * magnitudes[np.uint32(digit[v, i])]
                if loss < least:
                    least, at = loss, i
            a[v, at], digit[v, at], flipped[v] = -a[v, at], 0, at


@inline
def _entries_of(a, h, first, digit, values, near, exact, listed, cost, entry, radix, dimension):
    wq, qq = F(0), F(0)
    for v in range(a.shape[0]):
        for part in range(8 // dimension):
            key = np.uint32(0)
            for i in range(dimension - 1, -1, -1):
                key = key * np.uint32(radix) + np.uint32(digit[v, part * dimension + i])
            best = 0
            if not exact[key]:
                for t in range(CANDIDATES):
                    c = F(0)
                    for i in range(dimension):
                        miss = a[v, part * dimension + i] - F(listed[key, i, t])
                        c += h[first + v, part * dimension + i] * miss * miss
                    cost[t] = c
                least = cost[0]
                for t in range(1, CANDIDATES):
                    if cost[t] < least:
                        least, best = cost[t], t
            index = near[key, best]
            entry[v, part] = index
            for i in range(dimension):
                q = values[index, i]
                t = h[first + v, part * dimension + i] * q
                wq += t * a[v, part * dimension + i]
                qq += t * q
    return wq, qq


@part
def _entries_of_8(a, h, first, digit, values, near, exact, listed, cost, entry):
    return _entries_of(a, h, first, digit, values, near, exact, listed, cost, entry, 3, 8)


@part
def _entries_of_4(a, h, first, digit, values, near, exact, listed, cost, entry):
    return _entries_of(a, h, first, digit, values, near, exact, listed, cost, entry, 8, 4)


@inline
def _scratch(group, dimension):
    """Room for one group in eights: weights, scaled magnitudes, their indices, entries, flipped weights; and costs."""
    eights = group // 8, 8
    a, digit, entry = (
        np.empty(eights, np.float32),
        np.empty(eights, np.int32),
        np.empty((group // 8, 8 // dimension), np.uint16),
    )
    return (
        np.empty(eights, np.float32),
        a,
        digit,
        entry,
        np.empty(group // 8, np.int64),
        np.empty(CANDIDATES, np.float32),
    )


@inline
def _group(
    inverse,
    h,
    first,
    parity,
    dimension,
    digits,
    magnitudes,
    values,
    near,
    exact,
    listed,
    x,
    a,
    digit,
    entry,
    flipped,
    cost,
):
    """Find the entries of the group x, whose first eight is number `first` of the row. Returns sum(h w q) and sum(h q
    q), scaled."""
    _scaled(x, inverse, digits, a, digit)
    if parity:
        _make_even(x, h, first, magnitudes, a, digit, flipped)
    if dimension == 8:
        return _entries_of_8(a, h, first, digit, values, near, exact, listed, cost, entry)
    return _entries_of_4(a, h, first, digit, values, near, exact, listed, cost, entry)


@part
def _half(scale):
    return _store(scale, HALF_PRECISION)


@inline
def _inverse(scale):
    return F(0) if scale == 0 else min(F(1) / scale, F(1e38))


@kernel
def _fit(start, stop, w, h, table, group, dimension, parity, unit, spread, patience, d, scale):
    for row in range(start, stop):
        _fit_row(
            w[row], h[row % h.shape[0]], table, group, dimension, parity, unit, spread, patience, d[row], scale[row]
        )


@part
def _fit_row(w, h, table, group, dimension, parity, unit, spread, patience, d, scale):
    # Tuples are taken apart once, not in each group: numba counts a reference for each array.
    digits, magnitudes, values, near, exact, listed = table
    x, a, digit, entry, flipped, cost = _scratch(group, dimension)
    per, flat = scale.size // d.size, x.reshape(-1)
    wanted = np.empty(per, np.float32)
    for b in range(d.size):
        for g in range(per):
            at = (b * per + g) * group
            widen(w[at : at + group], flat)
            wanted[g] = spread * _deviation(x, h, at // 8)
        above = _half(_largest(wanted) / (F(31) * unit))
        inverse, wqs, qqs = _inverse(above * unit), F(0), F(0)
        for g in range(per):
            at = (b * per + g) * group
            widen(w[at : at + group], flat)
            middle = np.int64(min(max(np.floor(F(0.5) * (wanted[g] * inverse - F(1))), F(0)), F(15)))
            best, chosen, wq, qq = F(-np.inf), middle, F(0), F(0)
            for direction in (1, -1):
                integer = middle if direction > 0 else middle - 1
                misses = 0
                while 0 <= integer <= 15 and (misses < patience or integer == middle):
                    by = above * unit * F(2 * integer + 1)
                    p, q = _group(
                        _inverse(by),
                        h,
                        at // 8,
                        parity,
                        dimension,
                        digits,
                        magnitudes,
                        values,
                        near,
                        exact,
                        listed,
                        x,
                        a,
                        digit,
                        entry,
                        flipped,
                        cost,
                    )
                    gain = by * by * (F(2) * p - q)
                    if gain > best:
                        best, chosen, wq, qq, misses = gain, integer, by * p, q, 0
                    else:
                        misses += 1
                    integer += direction
            scale[b * per + g] = chosen
            wqs += F(2 * chosen + 1) * wq
            qqs += F(2 * chosen + 1) * F(2 * chosen + 1) * qq
        d[b] = _half(wqs / (qqs * unit)) if wqs > 0 else above


@part
def _deviation(x, h, first):
    """Root of the mean square, weighted."""
    squares, weights = F(0), F(0)
    for v in range(x.shape[0]):
        for i in range(8):
            squares += h[first + v, i] * x[v, i] * x[v, i]
            weights += h[first + v, i]
    return np.sqrt(squares / weights) if weights > 0 else F(0)


@part
def _largest(x):
    top = x[0]
    for i in range(x.size):
        top = max(top, x[i])
    return top


@kernel
def _encode(start, stop, w, h, table, group, dimension, parity, book, scales, codes):
    for row in range(start, stop):
        _encode_row(
            w[row], h[row % h.shape[0]], table, group, dimension, parity, book, scales[row], codes[row].reshape(-1, 8)
        )


@part
def _encode_row(w, h, table, group, dimension, parity, book, scales, codes):
    digits, magnitudes, values, near, exact, listed = table
    x, a, digit, entry, flipped, cost = _scratch(group, dimension)
    eights, flat = group // 8, x.reshape(-1)
    for g in range(scales.size):
        widen(w[g * group : (g + 1) * group], flat)
        inverse, first = _inverse(scales[g]), g * eights
        _group(
            inverse,
            h,
            first,
            parity,
            dimension,
            digits,
            magnitudes,
            values,
            near,
            exact,
            listed,
            x,
            a,
            digit,
            entry,
            flipped,
            cost,
        )
        for v in range(eights):
            for part in range(8 // dimension):
                for i in range(dimension):
                    codes[first + v, part * dimension + i] = book[entry[v, part], i]
            for i in range(8):
                codes[first + v, i] |= np.uint8(128) if x[v, i] < 0 else np.uint8(0)
            if parity and flipped[v] < 8:
                codes[first + v, flipped[v]] ^= np.uint8(128)


def round_block(
    grid: Lattice,
    scales: Float32[Tensor, "out groups"],
    wanted: Float32[Tensor, "out width"],
    target: Float32[Tensor, "out width"],
    error: Float32[Tensor, "out width"],
    coupling: Float32[Tensor, "width width"],
    columns: Int64[Tensor, " width"],
) -> UInt8[Tensor, "out width"]:
    """Grid.round_block, given the scale of each group.

    What is least is sum((d r)^2) over a run, where r_k = e_k + sum_{j>k} e_j coupling[j, k] is what is left of the
    error e after the columns before have made up for it, and d_k the weight of column k: not the distance, but the
    distance that counts.
    """
    codes = np.empty(wanted.shape, np.uint8)
    book, run_scales = (
        lattice.codebook(grid.name).numpy(),
        scales[:, columns[:: grid.vector_size] // grid.group],
    )  # of each run
    arrays = (
        wanted.numpy(),
        target.numpy(),
        error.numpy(),
        coupling.contiguous().numpy(),
        run_scales.contiguous().numpy(),
    )
    in_threads(
        _round_block, len(wanted), *arrays, _tables(grid), grid.vector_size, grid.dimension, grid.parity, book, codes
    )
    return torch.from_numpy(codes)


@kernel
def _round_block(start, stop, wanted, target, error, coupling, scales, table, step, dimension, parity, book, codes):
    for row in range(start, stop):
        _round_row(
            wanted[row],
            target[row],
            error[row],
            coupling,
            scales[row],
            table,
            step,
            dimension,
            parity,
            book,
            codes[row],
        )


@part
def _round_row(wanted, target, error, coupling, scales, table, step, dimension, parity, book, codes):
    digits, magnitudes, values, near, _, listed = table
    y, z, m, left, weight = (
        np.zeros(8, np.float32),
        np.zeros(8, np.float32),
        np.zeros(8, np.float32),
        np.zeros(8, np.float32),
        np.zeros(8, np.float32),
    )
    c, sign, cost = np.zeros((8, 8), np.float32), np.zeros(8, np.float32), np.zeros(CANDIDATES, np.float32)
    for run in range(scales.size - 1, -1, -1):
        at, inverse = run * step, _inverse(scales[run])
        for j in range(step):
            weight[j] = coupling[at + j, at + j] * coupling[at + j, at + j]
            for k in range(j):
                c[j, k] = coupling[at + j, at + k]
        _aim(wanted[at : at + step], target[at : at + step], error[at : at + step], c, inverse, y)
        _signs(y, c, weight, parity, step, digits, magnitudes, m, sign)
        for k in range(step):
            z[k] = y[k] * sign[k]
            for j in range(k + 1, step):
                c[j, k] *= sign[j] * sign[k]
        for part in range(step // dimension - 1, -1, -1):
            first = part * dimension
            for k in range(first, first + dimension):
                left[k] = F(0)
                for j in range(first + dimension, step):
                    left[k] += m[j] * c[j, k]
            if dimension == 8:
                entry = _weighted_8(z, left, c, weight, first, digits, magnitudes, near, listed, m, cost)
            else:
                entry = _weighted_4(z, left, c, weight, first, digits, magnitudes, near, listed, m, cost)
            for k in range(dimension):
                m[first + k] = z[first + k] - values[entry, k]
                codes[at + first + k] = book[entry, k] | (np.uint8(128) if sign[first + k] < 0 else np.uint8(0))
                missed = target[at + first + k] - sign[first + k] * values[entry, k] * scales[run]
                y[first + k] = missed - error[at + first + k]
                error[at + first + k] = missed
        for j in range(step):
            _pass_on(wanted[:at], coupling[at + j, :at], y[j])


@part
def _pass_on(wanted, coupling, change):
    for k in range(wanted.size):
        wanted[k] += change * coupling[k]


@part
def _aim(wanted, target, error, c, inverse, y):
    """Scaled weights that would leave nothing of the errors of the columns after this run, were they rounded to
    themselves."""
    for k in range(wanted.size - 1, -1, -1):
        y[k] = wanted[k] - target[k]
        for j in range(k + 1, wanted.size):
            y[k] -= (error[j] + y[j]) * c[j, k]
    for k in range(wanted.size):
        y[k] = min(max((target[k] + y[k]) * inverse, F(-1e18)), F(1e18))


@part
def _signs(y, c, weight, parity, step, digits, magnitudes, m, sign):
    """Signs of a run whose columns are rounded one after another; where parity asks for it, one is turned around."""
    odd, least, at = False, F(np.inf), 0
    for k in range(step - 1, -1, -1):
        t = y[k]
        for j in range(k + 1, step):
            t += m[j] * c[j, k]
        sign[k] = F(-1) if t < 0 else F(1)
        q = magnitudes[np.uint32(digits[_cell(abs(t))])]
        m[k] = y[k] - sign[k] * q
        odd ^= t < 0
        if weight[k] * abs(t) * q < least:
            least, at = weight[k] * abs(t) * q, k
    if parity and odd:
        sign[at] = -sign[at]


@inline
def _weighted(z, left, c, weight, first, digits, magnitudes, near, listed, m, cost, radix, dimension):
    """The listed entry that costs least, around the one that rounding column after column comes to."""
    key = np.uint32(0)
    for k in range(dimension - 1, -1, -1):
        t = z[first + k] + left[first + k]
        for j in range(k + 1, dimension):
            t += m[first + j] * c[first + j, first + k]
        digit = np.uint32(digits[_cell(t)])
        m[first + k] = z[first + k] - magnitudes[digit]
        key = key * np.uint32(radix) + digit
    for t in range(CANDIDATES):
        total = F(0)
        for k in range(dimension):
            r = left[first + k] + z[first + k] - F(listed[key, k, t])
            for j in range(k + 1, dimension):
                r += (z[first + j] - F(listed[key, j, t])) * c[first + j, first + k]
            total += weight[first + k] * r * r
        cost[t] = total
    best, least = 0, cost[0]
    for t in range(1, CANDIDATES):
        if cost[t] < least:
            least, best = cost[t], t
    return near[key, best]


@part
def _weighted_8(z, left, c, weight, first, digits, magnitudes, near, listed, m, cost):
    return _weighted(z, left, c, weight, first, digits, magnitudes, near, listed, m, cost, 3, 8)


@part
def _weighted_4(z, left, c, weight, first, digits, magnitudes, near, listed, m, cost):
    return _weighted(z, left, c, weight, first, digits, magnitudes, near, listed, m, cost, 8, 4)
