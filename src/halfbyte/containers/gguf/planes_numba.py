"""Moving planes of bits between codes and bytes, eight codes in a 64-bit word at a time: see Plane in scalar_blocks.py."""

import numba
import numpy as np

jit = numba.njit(cache=True, parallel=True, nogil=True)
part = numba.njit(cache=True, nogil=True, inline="always")
W = np.uint64
EVERY = 0x0101010101010101  # a word with this number in every byte, times the number
ONE, TWO, FOUR = (W(EVERY * ((1 << bits) - 1)) for bits in (1, 2, 4))
RUNS = 1024  # of `stride` words, handled by one thread


@jit
def pack(codes, raw, bits, shift, stride):
    """One plane of `codes` into `raw`, both flat; `stride` in words. Shifts are written out: a loop over two to eight of them is no faster than one."""
    right = W(shift)
    for task in numba.prange((raw.size // stride + RUNS - 1) // RUNS):
        for start in range(task * RUNS * stride, min((task + 1) * RUNS * stride, raw.size), stride):
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


@jit
def unpack(raw, codes, bits, shift, stride):
    """Add one plane to codes that do not have it yet, both flat."""
    left = W(shift)
    for task in numba.prange((raw.size // stride + RUNS - 1) // RUNS):
        for start in range(task * RUNS * stride, min((task + 1) * RUNS * stride, raw.size), stride):
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


@part
def _of(word, right, mask):
    return (word >> right) & mask


@jit
def pack_neighbours(codes, raw, shift):
    """Bit `shift` of each of the eight codes of a word [blocks, words] into one byte [blocks, bytes], the first code lowest."""
    for block in numba.prange(codes.shape[0]):
        for word in range(raw.shape[1]):
            ones = (codes[block, word] >> W(shift)) & W(EVERY)
            raw[block, word] = np.uint8((ones * W(0x0102040810204080)) >> W(56))  # byte k meets the factor that lifts it to bit 56 + k


@jit
def unpack_neighbours(raw, codes, shift):
    """The inverse of `pack_neighbours`, added to codes that do not have the bit yet."""
    for block in numba.prange(codes.shape[0]):
        for word in range(raw.shape[1]):
            apart = (W(raw[block, word]) * W(EVERY)) & W(0x8040201008040201)  # byte k keeps bit k only
            codes[block, word] |= ((apart + W(EVERY * 127)) >> W(7) & W(EVERY)) << W(shift)
