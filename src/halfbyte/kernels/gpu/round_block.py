"""scalar.round_block on GPUs: one launch for a block of columns, where torch takes fifteen for each column.

Rows are independent: a program takes ROWS of them through all columns, which stay in registers meanwhile. What differs
between grids is how a weight finds the level nearest to it; a kernel is compiled for each of the three ways.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from halfbyte.devices import entered
from halfbyte.kernels.levels import CELLS, EXPONENT, values_of
from halfbyte.kernels.scalar import FloatLookup, Lookup, TableLookup

ROWS = 16
EVEN, TABLE, FLOAT = (tl.constexpr(kind) for kind in range(3))
MAGIC = tl.constexpr(1.5 * 2**23)
"""Adding it to a float32 below 2^22 leaves no digits behind the point: rounded, ties to even."""
MAX_STEPS = tl.constexpr(2.0**21)
LARGEST = tl.constexpr(1e38)
_CELLS, _EXPONENT = tl.constexpr(CELLS), tl.constexpr(EXPONENT)


def round_block(
    lookup: Lookup,
    size: int | None,
    wanted: Float32[Tensor, "rows width"],
    target: Float32[Tensor, "rows width"],
    error: Float32[Tensor, "rows width"],
    coupling: Float32[Tensor, "width width"],
    columns: Int64[Tensor, " width"],
) -> UInt8[Tensor, "rows width"]:
    """Does not change `wanted`."""
    rows, width = wanted.shape
    codes = torch.empty(rows, width, dtype=torch.uint8, device=wanted.device)
    group = (columns // size if size else torch.zeros_like(columns)).int()
    matrices = [matrix.contiguous() for matrix in (wanted, target, coupling)]
    new_error, scale = error.contiguous(), lookup.scale.contiguous()
    kind, tables, numbers = _operands(lookup, wanted.device)
    launch: Any = _round_block[(triton.cdiv(rows, ROWS),)]
    with entered(wanted.device):
        launch(
            *matrices, group, scale, *tables, new_error, codes, rows, scale.shape[1], *numbers,
            kind=kind, width=width, padded=triton.next_power_of_2(width), height=ROWS, enable_fp_fusion=False,
        )  # fmt: skip
    if new_error is not error:
        error.copy_(new_error)
    return codes


def _operands(lookup: Lookup, device: torch.device) -> tuple[int, tuple[Tensor, Tensor], tuple[float, int, int, int]]:
    """EVEN, TABLE or FLOAT; zero and base of each group, code and value of each cell, or (twice) the value of each
    code; and the top code, or of floats the largest number, bits that are dropped, lowest exponent and the sign's."""
    if isinstance(lookup, FloatLookup):
        levels, values = lookup.levels, values_of(lookup.levels).to(device)
        return FLOAT.value, (values, values), (levels.top, 23 - levels.mantissa, levels.low, levels.bits - 1)
    if isinstance(lookup, TableLookup):
        return TABLE.value, (lookup.code.to(device), lookup.value.to(device)), (0.0, 0, 0, 0)
    return EVEN.value, (lookup.zero.contiguous(), lookup.base.contiguous()), (float(lookup.top), 0, 0, 0)


@triton.jit
def _round_block(
    wanted, target, coupling, group, scale, first, second, error, codes, rows, groups, top, dropped, low, sign,
    kind: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, height: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * height + tl.arange(0, height)
    here = row < rows
    column = tl.arange(0, padded)
    left = tl.load(
        wanted + row[:, None] * width + column[None, :], mask=here[:, None] & (column < width)[None, :], other=0.0
    )
    for step in range(width):
        k = width - 1 - step
        x = tl.sum(tl.where((column == k)[None, :], left, 0.0), 1)
        at = row * groups + tl.load(group + k)
        s = tl.load(scale + at, mask=here, other=1.0)
        if kind == EVEN:
            code, value = _nearest_even(x, s, first, second, at, here, top)
        elif kind == TABLE:
            code, value = _nearest_in_table(x, s, first, second)
        else:
            code, value = _nearest_float(x, s, first, top, dropped, low, sign)
        place = row * width + k
        missed = tl.load(target + place, mask=here, other=0.0) - value
        change = missed - tl.load(error + place, mask=here, other=0.0)
        tl.store(error + place, missed, mask=here)
        tl.store(codes + place, code.to(tl.uint8), mask=here)
        left += change[:, None] * tl.load(coupling + k * width + column, mask=column < k, other=0.0)[None, :]


@triton.jit
def _nearest_even(x, scale, zeros, bases, at, here, top):
    zero = tl.load(zeros + at, mask=here, other=0).to(tl.float32)
    base = tl.load(bases + at, mask=here, other=0.0)
    steps = tl.minimum(tl.maximum((x - base) * tl.div_rn(1.0, scale), -MAX_STEPS), MAX_STEPS)
    q = tl.minimum(tl.maximum((steps + MAGIC) - MAGIC + zero, 0.0), top)
    return q, (q - zero) * scale + base


@triton.jit
def _nearest_in_table(x, scale, code, value):
    inverse = tl.where(scale == 0.0, 0.0, tl.minimum(tl.maximum(tl.div_rn(1.0, scale), -LARGEST), LARGEST))
    cell = tl.minimum(tl.maximum(2 * (x * inverse) + _CELLS // 2, 0.0), _CELLS - 1.0).to(tl.int32)
    return tl.load(code + cell), tl.load(value + cell) * scale


@triton.jit
def _nearest_float(x, scale, values, top, dropped, low, sign):
    x = tl.div_rn(x, scale)
    size = tl.minimum(tl.abs(x), top)
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) & _EXPONENT, low)
    magic = exponent + (dropped << 23)
    steps = (size + magic.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) - magic
    code = ((exponent - low) >> dropped) + steps
    code = tl.where(x.to(tl.int32, bitcast=True) < 0, code + (1 << sign), code)
    return code, tl.load(values + code) * scale
