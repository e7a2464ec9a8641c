"""Codes of panels on CPUs, four codes in a word of 32 bits at a time."""

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from halfbyte.kernels.cpu.compiled import in_threads, inline, kernel

ROWS, QUADS = 16, 8
"""Of a panel, and words of a chunk: those of `kernels.panels`."""
W = np.uint32


def packed_codes(codes: UInt8[Tensor, "out in"], planes: tuple[int, ...]) -> UInt8[Tensor, " bytes"]:
    """Planes of each chunk, word by word, those of the 16 rows side by side."""
    out, width = codes.shape
    words = codes.contiguous().numpy().view(W)
    bits = np.array(planes, np.uint32)
    raw = np.empty((out // ROWS, width // (4 * QUADS), sum(planes), ROWS), W)
    in_threads(_pack, len(raw), words, raw, bits)
    return torch.from_numpy(raw.view(np.uint8)).flatten()


@kernel
def _pack(first, last, codes, raw, planes):
    for panel in range(first, last):
        for row in range(ROWS):
            read = codes[panel * ROWS + row]
            for chunk in range(raw.shape[1]):
                place, shift = 0, W(0)
                for bits in planes:
                    places = 8 // bits
                    mask = W(0x01010101) * ((W(1) << bits) - W(1)) if bits < 8 else W(0xFFFFFFFF)
                    for start in range(0, QUADS, places):
                        word = W(0)
                        for k in range(places):
                            quad = _middle_swapped(read[chunk * QUADS + start + k])
                            word |= ((quad >> shift) & mask) << W(k * bits)
                        raw[panel, chunk, place, row] = word
                        place += 1
                    shift += bits


@inline
def _middle_swapped(quad):
    return (quad & W(0xFF0000FF)) | ((quad & W(0x0000FF00)) << W(8)) | ((quad >> W(8)) & W(0x0000FF00))
