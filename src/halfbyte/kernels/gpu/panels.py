"""Products with panels on GPUs, in Triton: what `kernels.panels` lays out for vector registers suits them too.

A panel's codes lie one after another, those of all its rows and in-features, so that what a program takes of it is one
run of bytes: a word of the 16 rows is 64 of them, two of the sectors of 32 bytes that memory is read in, and a chunk at
4 bits 256. A thread loads the words of four rows at once, 16 bytes, and a warp what lies side by side; words of planes
of fewer bits than 8 are loaded once for each four in-features that they hold codes of, again from the first-level
cache. Scales of 16 rows lie together too: 32 bytes, of fp16.

Codes become numbers in registers. One token is multiplied in float32; some tokens by tensor cores, which take the very
numbers that the reference decodes, in the type of the activations, and add up in float32; for many, weights are decoded
and torch multiplies. In-features are split among programs where a matrix has too few rows for all multiprocessors, and
the parts are added up in a fixed order.
"""

from functools import lru_cache
from types import NotImplementedType
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from halfbyte.devices import entered, has_capability, multiprocessors
from halfbyte.kernels.levels import E2M1, Levels, Table, table_of, values_of
from halfbyte.kernels.levels import Float as FloatLevels
from halfbyte.kernels.panels import CHUNK, ROWS, STRIDE, SUPER, Activations, Panels

MANY = 64
"""Tokens from which weights are decoded, and torch multiplies."""
DECODED_BYTES = 1 << 26
"""Of a weight, at once."""
PROGRAMS = 4
"""On each multiprocessor, so that one computes while others wait for memory."""
WARPS = 4
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUADS, SUPER_QUADS = CHUNK // STRIDE, SUPER // STRIDE
"""Of four in-features, whose codes are the bytes of a word: in a chunk, and under one `d`."""
EVEN, TABLE, FLOAT = (tl.constexpr(kind) for kind in range(3))
ONE, BYTE, BYTES = tl.constexpr(1), tl.constexpr(255), tl.constexpr(0x01010101)
MAGIC, MAGIC_BITS = tl.constexpr(2.0**23), 0x4B000000
"""A float32, and its bits: an integer that is put into these is added to the number, and needs no conversion. Kernels
are given the bits: an instruction (LOP3) that masks and adds takes no two constants."""
HIGH = tl.constexpr(2.0**-8)
"""What makes the second byte of a word, left where it is, an integer of its own."""
HALF_UNIT = tl.constexpr(2.0**8)
"""What the bits of an E4M3 number, read as those of a float of 16 bits, stand for too little."""
_ROWS, _STRIDE, _QUADS, _SUPER_QUADS = (tl.constexpr(size) for size in (ROWS, STRIDE, QUADS, SUPER_QUADS))


def worth_making(like: Tensor) -> bool:
    """Whether the GPU's tensor cores take bfloat16."""
    return has_capability(like.device, 8, 0)


def product(
    x: Float[Tensor, "tokens in"], panels: Panels, bias: Float[Tensor, " out"] | None, activations: Activations
) -> Float[Tensor, "tokens out"] | NotImplementedType:
    """As `kernels.panels.product`, of activations as they are; NotImplemented for those of 64 bits, and on GPUs that
    panels are not made for."""
    if x.dtype not in DTYPES or not worth_making(x):
        return NotImplemented
    if "order" in panels.tensors:
        x = x[:, panels.tensors["order"]]
    with entered(x.device):
        return (_product_of_few if len(x) < MANY else _product_of_many)(x.contiguous(), panels, bias)


def _product_of_few(
    x: Float[Tensor, "tokens in"], panels: Panels, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    tokens, out = len(x), panels.shape[0]
    rows, quads = (ROWS, 64) if tokens == 1 else (4 * ROWS, 16)
    blocks = -(-out // rows)
    parts = max(1, min(PROGRAMS * multiprocessors(x.device) // blocks, panels.chunks * QUADS // (4 * quads)))
    y = torch.empty(parts, tokens, out, dtype=x.dtype if parts == 1 else torch.float32, device=x.device)
    kernel: Any = _multiply_one if tokens == 1 else _multiply_some
    few = {} if tokens == 1 else {"tokens": tokens, "padded": max(16, triton.next_power_of_2(tokens))}
    kernel[(blocks, parts)](
        x, y, bias if parts == 1 else None, *_matrix(panels), **_form(panels), **few,
        rows=rows, quads=quads, num_warps=WARPS,
    )  # fmt: skip
    if parts == 1:
        return y[0]
    total = y.sum(0)
    return (total if bias is None else total + bias).to(x.dtype)


def _product_of_many(
    x: Float[Tensor, "tokens in"], panels: Panels, bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "tokens out"]:
    (out, width), rows, quads = panels.shape, 4 * ROWS, 16
    step = min(out, max(1, DECODED_BYTES // (width * x.itemsize * rows)) * rows)
    values, y = x.new_empty(step, width), x.new_empty(len(x), out)
    kernel: Any = _decode
    for first in range(0, out, step):
        part = slice(first, min(first + step, out))
        kernel[(triton.cdiv(step, rows), triton.cdiv(width, quads * STRIDE))](
            values, first, step, *_matrix(panels), **_form(panels), rows=rows, quads=quads, num_warps=WARPS
        )
        y[:, part] = functional.linear(x, values[: part.stop - first], None if bias is None else bias[part])
    return y


def _matrix(panels: Panels) -> tuple[Tensor | int | float | None, ...]:
    """What kernels are given of it."""
    tensors, (levels, unit) = panels.tensors, _read(panels.form.levels)
    scale = tensors["scale"]
    lines = (tensors.get(name) for name in ("zero", "offset", "d", "dmin"))
    table = _table(levels, scale.device) if isinstance(levels, Table) else None
    groups = scale.numel() // (panels.panels * ROWS)
    # GPUs before Ada know no E4M3.
    scale = scale.view(torch.uint8) if scale.dtype == torch.float8_e4m3fn else scale
    return (
        tensors["codes"].view(torch.int32),
        scale,
        *lines,
        table,
        *panels.shape,
        groups,
        panels.unit * unit,
        MAGIC_BITS,
    )


def _form(panels: Panels) -> dict[str, Any]:
    """What they are compiled for."""
    form, (levels, _) = panels.form, _read(panels.form.levels)
    is_float = isinstance(levels, FloatLevels)
    return {
        "group_quads": 0 if panels.group >= panels.shape[1] else panels.group // STRIDE,
        "bits": levels.bits,
        "kind": (FLOAT if is_float else TABLE if isinstance(levels, Table) else EVEN).value,
        "mantissa": levels.mantissa if is_float else 0,
        "middle": form.middle,
        "has_offset": form.is_split or form.offset is not None,
        "is_e4m3": form.scale == torch.float8_e4m3fn,
        "is_split": form.is_split,
    }


@lru_cache
def _read(levels: Levels) -> tuple[Levels, float]:
    """How codes become numbers, and what these are then multiplied by. The bits of small floats are put where those of
    a float of 16 bits are; floats of 4 bits too: to look a number up takes longer."""
    unit = 1.0
    if isinstance(levels, Table) and levels.levels == table_of(E2M1, E2M1.top).levels:
        levels, unit = E2M1, 2.0
    if isinstance(levels, FloatLevels):
        unit *= 2.0 ** (16 - (1 << (levels.exponent - 1)))
    return levels, unit


@lru_cache
def _table(levels: Table, device: torch.device) -> Float32[Tensor, " codes"]:
    return values_of(levels).to(device)


@triton.jit
def _multiply_one(
    x, y, bias, codes, scale, zero, offset, d, dmin, table, out, width, groups, unit, magic,
    group_quads: tl.constexpr, bits: tl.constexpr, kind: tl.constexpr, mantissa: tl.constexpr, middle: tl.constexpr,
    has_offset: tl.constexpr, is_e4m3: tl.constexpr, is_split: tl.constexpr, rows: tl.constexpr, quads: tl.constexpr,
):  # fmt: skip
    """Levels are multiplied, and each four products together by their scale: of a weight that takes one operation."""
    row, part, parts = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1), tl.num_programs(1)
    sums = tl.zeros((rows, quads), tl.float32)
    for begin in range(part * quads, tl.cdiv(width, _STRIDE), parts * quads):
        quad = begin + tl.arange(0, quads)
        here = _here(row, quad, out, width)
        scales, zeros, offsets = _lines(
            scale, zero, offset, d, dmin, row, quad, here, width, groups,
            group_quads, middle, has_offset, is_e4m3, is_split,
        )  # fmt: skip
        word = _word(codes, row, quad, here, width, bits)
        first, second, third, fourth = _levels(word, zeros, table, magic, bits, kind, mantissa)
        x_first, x_second = _feature(x, quad * _STRIDE, width), _feature(x, quad * _STRIDE + 1, width)
        x_third, x_fourth = _feature(x, quad * _STRIDE + 2, width), _feature(x, quad * _STRIDE + 3, width)
        if has_offset:
            sums += offsets * (x_first + x_second + x_third + x_fourth)[None, :]
        if kind == EVEN:
            x_third, x_fourth = x_third * HIGH, x_fourth * HIGH
        products = first * x_first[None, :]
        products += second * x_second[None, :]
        products += third * x_third[None, :]
        products += fourth * x_fourth[None, :]
        sums += products * scales
    total = tl.sum(sums, 1) * unit
    if bias is not None:
        total += tl.load(bias + row, mask=row < out, other=0.0).to(tl.float32)
    tl.store(y + part * out + row, total.to(y.dtype.element_ty), mask=row < out)


@triton.jit
def _multiply_some(
    x, y, bias, codes, scale, zero, offset, d, dmin, table, out, width, groups, unit, magic,
    group_quads: tl.constexpr, bits: tl.constexpr, kind: tl.constexpr, mantissa: tl.constexpr, middle: tl.constexpr,
    has_offset: tl.constexpr, is_e4m3: tl.constexpr, is_split: tl.constexpr, rows: tl.constexpr, quads: tl.constexpr,
    tokens, padded: tl.constexpr,
):  # fmt: skip
    row, part, parts = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1), tl.num_programs(1)
    token = tl.arange(0, padded)
    sums = tl.zeros((rows, padded), tl.float32)
    for begin in range(part * quads, tl.cdiv(width, _STRIDE), parts * quads):
        weight = _weight(
            codes, scale, zero, offset, d, dmin, table, row, begin + tl.arange(0, quads), out, width, groups, unit,
            magic, group_quads, bits, kind, mantissa, middle, has_offset, is_e4m3, is_split,
        )  # fmt: skip
        feature = begin * _STRIDE + tl.arange(0, quads * _STRIDE)
        here = (feature < width)[:, None] & (token < tokens)[None, :]
        read = tl.load(x + token[None, :] * width + feature[:, None], mask=here, other=0.0)
        sums = tl.dot(weight.to(read.dtype), read, sums, input_precision="ieee")
    if bias is not None:
        sums += tl.load(bias + row, mask=row < out, other=0.0).to(tl.float32)[:, None]
    at = (part * tokens + token)[None, :] * out + row[:, None]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(row < out)[:, None] & (token < tokens)[None, :])


@triton.jit
def _decode(
    values, first, step, codes, scale, zero, offset, d, dmin, table, out, width, groups, unit, magic,
    group_quads: tl.constexpr, bits: tl.constexpr, kind: tl.constexpr, mantissa: tl.constexpr, middle: tl.constexpr,
    has_offset: tl.constexpr, is_e4m3: tl.constexpr, is_split: tl.constexpr, rows: tl.constexpr, quads: tl.constexpr,
):  # fmt: skip
    """`step` rows from the `first` on."""
    row, begin = tl.program_id(0) * rows + tl.arange(0, rows), tl.program_id(1) * quads
    weight = _weight(
        codes, scale, zero, offset, d, dmin, table, first + row, begin + tl.arange(0, quads), out, width, groups, unit,
        magic, group_quads, bits, kind, mantissa, middle, has_offset, is_e4m3, is_split,
    )  # fmt: skip
    feature = begin * _STRIDE + tl.arange(0, quads * _STRIDE)
    here = ((row < step) & (first + row < out))[:, None] & (feature < width)[None, :]
    tl.store(values + row[:, None] * width + feature[None, :], weight.to(values.dtype.element_ty), mask=here)


@triton.jit
def _weight(
    codes, scale, zero, offset, d, dmin, table, row, quad, out, width, groups, unit, magic,
    group_quads: tl.constexpr, bits: tl.constexpr, kind: tl.constexpr, mantissa: tl.constexpr, middle: tl.constexpr,
    has_offset: tl.constexpr, is_e4m3: tl.constexpr, is_split: tl.constexpr,
):  # fmt: skip
    """Some rows, and quads of in-features, decoded: rows x 4 quads."""
    here = _here(row, quad, out, width)
    scales, zeros, offsets = _lines(
        scale, zero, offset, d, dmin, row, quad, here, width, groups,
        group_quads, middle, has_offset, is_e4m3, is_split,
    )  # fmt: skip
    word = _word(codes, row, quad, here, width, bits)
    first, second, third, fourth = _levels(word, zeros, table, magic, bits, kind, mantissa)
    scales *= unit
    high_scales = scales * HIGH if kind == EVEN else scales
    first, second, third, fourth = first * scales, second * scales, third * high_scales, fourth * high_scales
    if has_offset:
        offsets *= unit
        first, second, third, fourth = first + offsets, second + offsets, third + offsets, fourth + offsets
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit
def _here(row, quad, out, width):
    """Panels are whole, whatever `out`: a mask that is the same for 16 rows leaves loads as wide as they can be."""
    rows, quads = tl.cdiv(out, _ROWS) * _ROWS, tl.cdiv(width, _QUADS * _STRIDE) * _QUADS
    return (row < rows)[:, None] & (quad < quads)[None, :]


@triton.jit
def _feature(x, feature, width):
    return tl.load(x + feature, mask=feature < width, other=0.0).to(tl.float32)


@triton.jit
def _lines(
    scale, zero, offset, d, dmin, row, quad, here, width, groups,
    group_quads: tl.constexpr, middle: tl.constexpr, has_offset: tl.constexpr, is_e4m3: tl.constexpr,
    is_split: tl.constexpr,
):  # fmt: skip
    """Scale, zero and offset of each quad."""
    panel, lane = row // _ROWS, row % _ROWS
    group = quad // group_quads if group_quads > 0 else quad * 0
    of_group = (panel * groups * _ROWS + lane)[:, None] + (group * _ROWS)[None, :]
    supers = tl.cdiv(width, _SUPER_QUADS * _STRIDE)
    of_super = (panel * supers * _ROWS + lane)[:, None] + (quad // _SUPER_QUADS * _ROWS)[None, :]
    line = tl.load(scale + of_group, mask=here, other=0)
    if is_e4m3:
        scales = (line.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * HALF_UNIT
    elif is_split:
        scales = (line & 15).to(tl.float32)
    else:
        scales = line.to(tl.float32)
    if d is not None:
        scales *= tl.load(d + of_super, mask=here, other=0.0).to(tl.float32)
    zeros = middle if zero is None else tl.load(zero + of_group, mask=here, other=0).to(tl.float32)
    offsets = scales
    if has_offset:
        offsets = (line >> 4 if is_split else tl.load(offset + of_group, mask=here, other=0)).to(tl.float32)
    if dmin is not None:
        offsets *= tl.load(dmin + of_super, mask=here, other=0.0).to(tl.float32)
    return scales, zeros, offsets


@triton.jit
def _word(codes, row, quad, here, width, bits: tl.constexpr):
    """The codes of each quad, the bytes of one word: of planes of 8, or 4, 2 and 1 bits."""
    chunk_words: tl.constexpr = bits * _ROWS
    panel = (row // _ROWS).to(tl.int64) * tl.cdiv(width, _QUADS * _STRIDE) * chunk_words
    chunk = codes + (panel + row % _ROWS)[:, None] + (quad // _QUADS * chunk_words)[None, :]
    place = (quad % _QUADS)[None, :]
    if bits == 8:
        return tl.load(chunk + place * _ROWS, mask=here, other=0)
    word = place & 0
    if bits & 4:
        word |= _plane(chunk, place, here, 4)
    if bits & 2:
        word |= _plane(chunk + (bits & 4) * _ROWS, place, here, 2) << (bits & 4)
    if bits & 1:
        word |= _plane(chunk + (bits & 6) * _ROWS, place, here, 1) << (bits & 6)
    return word


@triton.jit
def _plane(plane, place, here, bits: tl.constexpr):
    word = tl.load(plane + place * bits // 8 * _ROWS, mask=here, other=0)
    return word >> (place * bits % 8) & ((ONE << bits) - 1) * BYTES


@triton.jit
def _levels(word, zeros, table, magic, bits: tl.constexpr, kind: tl.constexpr, mantissa: tl.constexpr):
    """What codes stand for, by in-features, which are of bytes 0, 2, 1, 3. Of integers in the odd bytes 256 times as
    much, for these stay where they are; of floats but for a power of two."""
    return (
        _level(word, 0, zeros, table, magic, bits, kind, mantissa),
        _level(word >> 16, 0, zeros, table, magic, bits, kind, mantissa),
        _level(word, 8, zeros, table, magic, bits, kind, mantissa),
        _level(word >> 16, 8, zeros, table, magic, bits, kind, mantissa),
    )


@triton.jit
def _level(
    word, at: tl.constexpr, zeros, table, magic, bits: tl.constexpr, kind: tl.constexpr, mantissa: tl.constexpr
):  # fmt: skip
    if kind == EVEN:
        return (word & (BYTE << at) | magic).to(tl.float32, bitcast=True) - (zeros * (ONE << at) + MAGIC)
    code = word >> at & 255
    if kind == TABLE:
        return tl.load(table + code)
    else:
        sign, size = code >> (bits - 1) << 15, code & ((ONE << (bits - 1)) - 1)
        return (sign | size << (10 - mantissa)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
