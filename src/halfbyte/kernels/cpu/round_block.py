"""scalar.round_block on CPUs: one loop for all grids whose weights are rounded one by one.

What differs is how a weight finds the level nearest to it. Lines say it by one of three values: Even, Table or Floats.
The loop is compiled for each of these types, with the function that `_nearest` picks for it.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from numba.extending import overload
from torch import Tensor

from halfbyte.kernels.cpu.compiled import ORDERED, in_threads, inline, kernel
from halfbyte.kernels.cpu.floats import bits_of, code_of, steps_of, value_of
from halfbyte.kernels.cpu.table import cell_of, inverse_of
from halfbyte.kernels.cpu.tiles import F
from halfbyte.kernels.scalar import FloatLookup, Lookup, TableLookup


class EvenArrays(NamedTuple):
    """scalar.EvenLines"""

    scale: np.ndarray
    zero: np.ndarray
    base: np.ndarray
    top: int


class TableArrays(NamedTuple):
    """scalar.TableLines"""

    scale: np.ndarray
    code: np.ndarray
    value: np.ndarray


class FloatArrays(NamedTuple):
    """scalar.FloatLines: floats.Bits says of which floats."""

    scale: np.ndarray
    low: np.int32
    mantissa: np.int32
    dropped: np.int32
    sign: np.int32
    top: np.float32


def round_block(
    lookup: Lookup,
    size: int | None,
    wanted: Float32[Tensor, "rows width"],
    target: Float32[Tensor, "rows width"],
    error: Float32[Tensor, "rows width"],
    coupling: Float32[Tensor, "width width"],
    columns: Int64[Tensor, " width"],
) -> UInt8[Tensor, "rows width"]:
    """Rows are independent: each stays in the cache."""
    codes, group = np.empty(wanted.shape, np.uint8), columns // size if size else torch.zeros_like(columns)
    matrices = wanted.numpy(), target.numpy(), error.numpy(), coupling.contiguous().numpy()
    in_threads(_round_block, -(-len(wanted) // 4), *matrices, group.numpy(), _compiled(lookup), codes)
    return torch.from_numpy(codes)


def _compiled(lookup: Lookup) -> EvenArrays | TableArrays | FloatArrays:
    scale = lookup.scale.contiguous().numpy()
    if isinstance(lookup, FloatLookup):
        return FloatArrays(scale, *bits_of(lookup.levels))
    if isinstance(lookup, TableLookup):
        return TableArrays(scale, lookup.code.numpy(), lookup.value.numpy())
    return EvenArrays(scale, lookup.zero.contiguous().numpy(), lookup.base.contiguous().numpy(), lookup.top)


def nearest(x, levels, row, group) -> tuple[np.uint8, np.float32]:
    """Code and value of the level nearest to a weight of a row and group."""
    raise NotImplementedError("only compiled code calls this")


@overload(nearest, jit_options={"forceinline": True, "fastmath": ORDERED, "error_model": "numpy"})
def _nearest(x, levels, row, group):
    return {EvenArrays: _nearest_even, TableArrays: _nearest_in_table, FloatArrays: _nearest_float}[
        levels.instance_class
    ]


def _nearest_even(x, levels, row, group):
    scale, zero, base = levels.scale[row, group], F(levels.zero[row, group]), levels.base[row, group]
    q = min(max(np.rint((x - base) * (F(1) / scale)) + zero, F(0)), F(levels.top))
    return np.uint8(q), (q - zero) * scale + base


def _nearest_in_table(x, levels, row, group):
    scale = levels.scale[row, group]
    cell = cell_of(x * inverse_of(scale))
    return levels.code[cell], levels.value[cell] * scale


def _nearest_float(x, levels, row, group):
    scale = levels.scale[row, group]
    exponent, steps = steps_of(min(abs(x / scale), levels.top), levels)
    value = value_of(exponent, steps, levels) * scale
    return code_of(x, exponent, steps, levels), value if x >= 0 else -value


@inline
def _round(wanted, target, error, group, levels, codes, row, k):
    """Round one weight; returns by how much its error changed."""
    codes[row, k], value = nearest(wanted[row, k], levels, row, group[k])
    missed = target[row, k] - value
    change = missed - error[row, k]
    error[row, k] = missed
    return change


@kernel
def _round_block(start, stop, wanted, target, error, coupling, group, levels, codes):
    # Four rows at a time: each is a chain of round, subtract, pass on, and while one waits the others go on.
    rows, width = wanted.shape
    for four in range(start, stop):
        a, b, c, d = 4 * four, 4 * four + 1, 4 * four + 2, 4 * four + 3
        if d >= rows:
            continue
        for k in range(width - 1, -1, -1):
            change_a = _round(wanted, target, error, group, levels, codes, a, k)
            change_b = _round(wanted, target, error, group, levels, codes, b, k)
            change_c = _round(wanted, target, error, group, levels, codes, c, k)
            change_d = _round(wanted, target, error, group, levels, codes, d, k)
            # Up to whole vectors: what is beyond k is rounded already and not read again.
            for j in range(min((k + 15) & ~15, width)):
                by = coupling[k, j]
                wanted[a, j] += change_a * by
                wanted[b, j] += change_b * by
                wanted[c, j] += change_c * by
                wanted[d, j] += change_d * by
    for row in range(max(4 * start, rows - rows % 4), min(4 * stop, rows)):
        for k in range(width - 1, -1, -1):
            change = _round(wanted, target, error, group, levels, codes, row, k)
            for j in range(k):
                wanted[row, j] += change * coupling[k, j]
