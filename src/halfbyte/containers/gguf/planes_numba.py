"""Moving planes of bits between codes and bytes, eight codes in a 64-bit word at a time: see Plane in scalar_blocks.py."""

import numba
import numpy as np

jit = numba.njit(cache=True, parallel=True, nogil=True)
W = np.uint64
EVERY = 0x0101010101010101  # a word with this number in every byte, times the number


@jit
def pack(codes, raw, bits, shift, stride):
    """One plane of `codes` [blocks, words] into `raw` [blocks, words]; `stride` in words."""
    mask, per_byte, right = W(EVERY * ((1 << bits) - 1)), 8 // bits, W(shift)
    # The top bit of a whole byte is turned: ggml's int8 is the code less 128.
    turned = W(EVERY * 128 if bits == 8 else 0)
    for block in numba.prange(codes.shape[0]):
        for start in range(0, raw.shape[1], stride):
            for word in range(start, start + stride):
                found = turned
                for k in range(per_byte):
                    found ^= ((codes[block, start * (per_byte - 1) + word + k * stride] >> right) & mask) << W(k * bits)
                raw[block, word] = found


@jit
def unpack(raw, codes, bits, shift, stride):
    """Add one plane to codes that do not have it yet."""
    mask, per_byte, left = W(EVERY * ((1 << bits) - 1)), 8 // bits, W(shift)
    turned = W(EVERY * 128 if bits == 8 else 0)
    for block in numba.prange(codes.shape[0]):
        for start in range(0, raw.shape[1], stride):
            for word in range(start, start + stride):
                found = raw[block, word] ^ turned
                for k in range(per_byte):
                    codes[block, start * (per_byte - 1) + word + k * stride] |= ((found >> W(k * bits)) & mask) << left


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
