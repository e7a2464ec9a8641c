"""Small floats on CPUs: rounding as in levels.Float.nearest, in the bits of float32, one pass over the weights."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from halfbyte.kernels import levels
from halfbyte.kernels.cpu.compiled import in_threads, inline, kernel, loose, part
from halfbyte.kernels.cpu.tiles import F, raw, widen

CHUNK = 4096  # in-features that one thread handles before it reads on
I = np.int32  # noqa: E741
EXPONENT = I(levels.EXPONENT)


class Bits(NamedTuple):
    """A levels.Float, as the loops need it."""

    low: np.int32
    mantissa: np.int32
    dropped: np.int32
    sign: np.int32
    top: np.float32


def bits_of(element: levels.Float) -> Bits:
    """The constants of a floating-point format."""
    return Bits(I(element.low), I(element.mantissa), I(23 - element.mantissa), I(element.bits - 1), F(element.top))


def largest(w: Float[Tensor, "out in"], size: int) -> Float32[Tensor, "out groups"]:
    """The largest magnitude of every group of a row."""
    result = np.empty((w.shape[0], -(-w.shape[1] // size)), np.float32)
    in_threads(_largest, len(w), raw(w), size, result)
    return torch.from_numpy(result)


def moments(
    element: levels.Float,
    w: Float[Tensor, "out in"],
    importance: Float32[Tensor, "... in"] | None,
    scales: Float32[Tensor, "out groups tries"],
    size: int,
) -> tuple[Float32[Tensor, "out groups tries"], Float32[Tensor, "out groups tries"]]:
    """sum(h |w| q) and sum(h q q) of every group, for each scale that is tried."""
    h = (
        np.ones((1, w.shape[1]), np.float32)
        if importance is None
        else importance.reshape(-1, w.shape[1]).contiguous().numpy()
    )
    wq, qq = np.zeros(scales.shape, np.float32), np.zeros(scales.shape, np.float32)
    in_threads(_moments, len(w), raw(w), h, scales.reciprocal().contiguous().numpy(), size, bits_of(element), wq, qq)
    return torch.from_numpy(wq), torch.from_numpy(qq)


def encode(
    element: levels.Float, w: Float[Tensor, "out in"], scales: Float32[Tensor, "out groups"], size: int
) -> UInt8[Tensor, "out in"]:
    """The nearest code of every weight, ties to even."""
    codes = np.empty(w.shape, np.uint8)
    in_threads(_encode, len(w), raw(w), scales.contiguous().numpy(), size, bits_of(element), codes)
    return torch.from_numpy(codes)


def decode(
    element: levels.Float, codes: UInt8[Tensor, "out in"], scales: Float32[Tensor, "out groups"], size: int
) -> Float32[Tensor, "out in"]:
    """Values of the codes times the scale of their group."""
    w = np.empty(codes.shape, np.float32)
    in_threads(
        _decode,
        len(codes),
        codes.contiguous().numpy(),
        levels.values_of(element).numpy(),
        scales.contiguous().numpy(),
        size,
        w,
    )
    return torch.from_numpy(w)


@inline
def _as_int(x):
    return F(x).view(np.int32)


@inline
def _as_float(x):
    return I(x).view(np.float32)


@inline
def steps_of(size, e):
    """The exponent of a number that is no larger than the largest, and the number in steps of that exponent, to the
    nearest."""
    exponent = max(_as_int(size) & EXPONENT, e.low)
    magic = I(exponent + (e.dropped << I(23)))
    return exponent, I(_as_int(size + _as_float(magic)) - magic)


@inline
def value_of(exponent, steps, e):
    """The number without its sign that is so many steps of an exponent."""
    return F(steps) * _as_float(exponent - (e.mantissa << I(23)))


@inline
def code_of(x, exponent, steps, e):
    """The code of a number with the sign of x."""
    sign = ((_as_int(x) >> I(31)) & I(1)) << e.sign
    return np.uint8((((exponent - e.low) >> e.dropped) + steps) | sign)


@kernel
def _largest(start, stop, w, size, result):
    for row in range(start, stop):
        x = np.empty(CHUNK, np.float32)
        for g in range(result.shape[1]):
            last, most = min((g + 1) * size, w.shape[1]), F(0)
            for at in range(g * size, last, CHUNK):
                chunk = x[: min(CHUNK, last - at)]
                widen(w[row, at : at + chunk.size], chunk)
                most = max(most, _most(chunk))
            result[row, g] = most


@inline
def _most(x):
    """The largest magnitude: of numbers without sign, the order is that of their bits, whose maximum LLVM finds in
    vectors."""
    most = I(0)
    bits = x.view(np.int32)
    for i in range(bits.size):
        most = max(most, bits[i] & I(0x7FFFFFFF))
    return _as_float(most)


@kernel
def _moments(start, stop, w, h, inverse, size, e, wq, qq):
    for row in range(start, stop):
        x = np.empty(CHUNK, np.float32)
        for g in range(inverse.shape[1]):
            last = min((g + 1) * size, w.shape[1])
            for at in range(g * size, last, CHUNK):
                chunk = x[: min(CHUNK, last - at)]
                widen(w[row, at : at + chunk.size], chunk)
                weight = (h[0] if h.shape[0] == 1 else h[row])[at : at + chunk.size]
                for t in range(inverse.shape[2]):
                    a, b = _sums(chunk, weight, inverse[row, g, t], e)
                    wq[row, g, t] += a
                    qq[row, g, t] += b


# Sums may be taken in any order; what is rounded is rounded in its bits, which no reordering undoes.
@loose
def _sums(x, h, inverse, e):
    return (
        _sums_of(x, h, inverse, e, 16) if x.size == 16 else _sums_of(x, h, inverse, e, x.size)
    )  # a known length is all vectors


@inline
def _sums_of(x, h, inverse, e, count):
    wq, qq = F(0), F(0)
    for i in range(count):
        size = abs(x[i])
        exponent, steps = steps_of(min(size * inverse, e.top), e)
        q = value_of(exponent, steps, e)
        t = h[i] * q
        wq += t * size
        qq += t * q
    return wq, qq


@kernel
def _encode(start, stop, w, scales, size, e, codes):
    for row in range(start, stop):
        x = np.empty(CHUNK, np.float32)
        for g in range(scales.shape[1]):
            last = min((g + 1) * size, w.shape[1])
            for at in range(g * size, last, CHUNK):
                chunk = x[: min(CHUNK, last - at)]
                widen(w[row, at : at + chunk.size], chunk)
                _encode_chunk(chunk, scales[row, g], e, codes[row, at : at + chunk.size])


@part
def _encode_chunk(x, scale, e, codes):
    for i in range(x.size):
        exponent, steps = steps_of(min(abs(x[i] / scale), e.top), e)
        codes[i] = code_of(x[i], exponent, steps, e)


@kernel
def _decode(start, stop, codes, values, scales, size, w):
    for row in range(start, stop):
        for g in range(scales.shape[1]):
            group, out = codes[row, g * size : (g + 1) * size], w[row, g * size : (g + 1) * size]
            for i in range(group.size):
                out[i] = values[group[i] & (values.size - 1)] * scales[row, g]
