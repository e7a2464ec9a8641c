"""Moving planes of bits between codes and bytes on CPUs, eight codes in a 64-bit word at a time."""

from types import NotImplementedType

import numpy as np
import torch
from torch import Tensor

from halfbyte.kernels.cpu.compiled import in_threads, inline, kernel
from halfbyte.kernels.planes import Bytes

W = np.uint64
EVERY = 0x0101010101010101  # a word with this number in every byte, times the number
ONE, TWO, FOUR = (W(EVERY * ((1 << bits) - 1)) for bits in (1, 2, 4))


def pack(codes: Bytes, bits: int, shift: int, stride: int) -> Bytes | NotImplementedType:
    """One plane of the codes of blocks, all of it in whole words."""
    if stride > 1 and stride % 8:
        return NotImplemented
    words = _words(codes)
    plane = np.empty((len(codes), codes.shape[1] * bits // 8), np.uint8)
    if stride == 1:
        in_threads(_pack_neighbours, len(words), words, plane, shift)
    else:
        raw, run = plane.view(W).reshape(-1), stride // 8
        in_threads(_pack, raw.size // run, words.reshape(-1), raw, bits, shift, run)
    return torch.from_numpy(plane)


def unpack(raw: Bytes, codes: Bytes, bits: int, shift: int, stride: int) -> NotImplementedType | None:
    """Add one plane to codes that do not have it yet."""
    if stride > 1 and stride % 8:
        return NotImplemented
    plane, words = np.ascontiguousarray(raw.numpy()), _words(codes)
    if stride == 1:
        in_threads(_unpack_neighbours, len(words), plane, words, shift)
    else:
        flat, run = plane.view(W).reshape(-1), stride // 8
        in_threads(_unpack, flat.size // run, flat, words.reshape(-1), bits, shift, run)
    return None


def _words(codes: Tensor) -> np.ndarray:
    return codes.numpy().view(W)


@kernel
def _pack(first, last, codes, raw, bits, shift, stride):
    # Shifts are written out: a loop over two to eight of them is no faster than one.
    right = W(shift)
    for start in range(first * stride, last * stride, stride):
        c, r = codes[start * 8 // bits : (start + stride) * 8 // bits], raw[start : start + stride]
        if bits == 4:
            for i in range(stride):
                r[i] = _of(c[i], right, FOUR) | _of(c[i + stride], right, FOUR) << W(4)
        elif bits == 2:
            for i in range(stride):
                low = _of(c[i], right, TWO) | _of(c[i + stride], right, TWO) << W(2)
                r[i] = low | _of(c[i + 2 * stride], right, TWO) << W(4) | _of(c[i + 3 * stride], right, TWO) << W(6)
        else:
            for i in range(stride):
                low = _of(c[i], right, ONE) | _of(c[i + stride], right, ONE) << W(1)
                low |= _of(c[i + 2 * stride], right, ONE) << W(2) | _of(c[i + 3 * stride], right, ONE) << W(3)
                low |= _of(c[i + 4 * stride], right, ONE) << W(4) | _of(c[i + 5 * stride], right, ONE) << W(5)
                r[i] = low | _of(c[i + 6 * stride], right, ONE) << W(6) | _of(c[i + 7 * stride], right, ONE) << W(7)


@kernel
def _unpack(first, last, raw, codes, bits, shift, stride):
    left = W(shift)
    for start in range(first * stride, last * stride, stride):
        c, r = codes[start * 8 // bits : (start + stride) * 8 // bits], raw[start : start + stride]
        if bits == 4:
            for i in range(stride):
                c[i] |= (r[i] & FOUR) << left
                c[i + stride] |= _of(r[i], W(4), FOUR) << left
        elif bits == 2:
            for i in range(stride):
                c[i] |= (r[i] & TWO) << left
                c[i + stride] |= _of(r[i], W(2), TWO) << left
                c[i + 2 * stride] |= _of(r[i], W(4), TWO) << left
                c[i + 3 * stride] |= _of(r[i], W(6), TWO) << left
        else:
            for i in range(stride):
                for k in range(8):
                    c[i + k * stride] |= _of(r[i], W(k), ONE) << left


@inline
def _of(word, right, mask):
    return (word >> right) & mask


@kernel
def _pack_neighbours(first, last, codes, raw, shift):
    for block in range(first, last):
        for word in range(raw.shape[1]):
            ones = (codes[block, word] >> W(shift)) & W(EVERY)
            raw[block, word] = np.uint8(
                (ones * W(0x0102040810204080)) >> W(56)
            )  # byte k meets the factor that lifts it to bit 56 + k


@kernel
def _unpack_neighbours(first, last, raw, codes, shift):
    for block in range(first, last):
        for word in range(raw.shape[1]):
            apart = (W(raw[block, word]) * W(EVERY)) & W(0x8040201008040201)  # byte k keeps bit k only
            codes[block, word] |= ((apart + W(EVERY * 127)) >> W(7) & W(EVERY)) << W(shift)
