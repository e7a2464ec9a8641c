"""Moving planes of bits between codes and bytes: see Plane in scalar_blocks.py."""

import numba
import numpy as np


@numba.njit(cache=True, parallel=True, nogil=True)
def pack(codes, raw, bits, shift, stride):
    """Write one plane of `codes` [blocks, weights] into `raw` [blocks, bytes]."""
    mask = np.uint8((1 << bits) - 1)
    per_byte = 8 // bits
    # The top bit of a whole byte is turned: ggml's int8 is the code less 128.
    flip = np.uint8(128 if bits == 8 else 0)
    for row in numba.prange(codes.shape[0]):
        for run in range(raw.shape[1] // stride):
            source, target = codes[row, run * stride * per_byte :], raw[row, run * stride : (run + 1) * stride]
            for j in range(stride):
                target[j] = ((source[j] >> np.uint8(shift)) & mask) ^ flip
            for k in range(1, per_byte):
                for j in range(stride):
                    target[j] |= ((source[k * stride + j] >> np.uint8(shift)) & mask) << np.uint8(k * bits)


@numba.njit(cache=True, parallel=True, nogil=True)
def unpack(raw, codes, bits, shift, stride):
    """Add one plane to codes that do not have it yet."""
    mask = np.uint8((1 << bits) - 1)
    per_byte = 8 // bits
    flip = np.uint8(128 if bits == 8 else 0)
    for row in numba.prange(codes.shape[0]):
        for run in range(raw.shape[1] // stride):
            source, target = raw[row, run * stride : (run + 1) * stride], codes[row, run * stride * per_byte :]
            for k in range(per_byte):
                for j in range(stride):
                    target[k * stride + j] |= (((source[j] >> np.uint8(k * bits)) & mask) ^ flip) << np.uint8(shift)
