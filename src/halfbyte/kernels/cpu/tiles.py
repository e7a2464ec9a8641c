"""What the searches for scales share on CPUs: tiles of weights, so laid out that all that is done per group is done in
whole vectors.

A tile is a matrix [steps, LANES] that holds many groups side by side. A short group is one lane; a longer one has
several, as far apart as there are groups, and what is summed by lane is folded to sums by group. However short the
groups are, no sum is ever taken across a vector. A tile stays in the first-level cache while all candidates are tried.
"""

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from halfbyte.kernels.cpu.compiled import part, strict

LANES = 128
STEPS = 32  # weights of a group in one lane, where it has more: 128 times that are half of a first-level cache
F = np.float32


def raw(w: Tensor) -> np.ndarray:
    """Weights as `widen` reads them: numba has no types for bfloat16 and fp16, so int16 stands for the one, uint16 for
    the other."""
    w = w.detach().contiguous()
    if w.dtype == torch.bfloat16:
        return w.view(torch.int16).numpy()
    return w.view(torch.uint16).numpy() if w.dtype == torch.float16 else w.float().numpy()


def widen(raw, x):
    """Write what `raw` made of weights as float32: x[: raw.size]. A slice, not an array and a start: numba makes no
    vectors where it has to test an index whose sign it does not know."""
    raise NotImplementedError("only compiled code calls this")


@overload(widen, inline="always")
def _widen(raw, x):
    return {numba.float32: _widen_float, numba.int16: _widen_bfloat, numba.uint16: _widen_half}[raw.dtype]


def _widen_float(raw, x):
    for i in range(raw.size):
        x[i] = raw[i]


def _widen_bfloat(raw, x):
    for i in range(raw.size):
        x[i] = np.int32(np.int32(raw[i]) << np.int32(16)).view(np.float32)


def _widen_half(raw, x):
    for i in range(raw.size):
        half = np.uint32(raw[i])
        bits = (half & np.uint32(0x8000)) << np.uint32(16) | (half & np.uint32(0x7FFF)) << np.uint32(13)
        x[i] = np.uint32(bits).view(np.float32) * F(
            2.0**112
        )  # the exponent moves by 112; the product does it for subnormal numbers too


@part
def rounded(value):
    """np.rint up to 2^22, and no less than that beyond: two additions run on more ports than the instruction for it."""
    return (value + F(3 * 2.0**22)) - F(3 * 2.0**22)


@strict
def half(value):
    """The nearest number of fp16, never infinite. Veltkamp's splitting needs the order of operations."""
    size = min(abs(value), F(65504))
    if size < F(2.0**-14):
        size = np.rint(size * F(2.0**24)) * F(2.0**-24)
    else:
        high = size * F(2.0**13 + 1)
        size = high - (high - size)
    return size if value >= 0 else -size


def lanes_per_group(size: int) -> int:
    """A power of two, so that groups fill a tile."""
    lanes = 1
    while lanes < LANES and lanes * STEPS < size:
        lanes *= 2
    return lanes


def steps_per_lane(size: int) -> int:
    """A multiple of four: the loops take four weights at a time. The rest of a lane is zeros."""
    return -(-size // lanes_per_group(size) // 4) * 4


@part
def load(w, h, size, first, line, x, weight):
    """Groups `first` and on of flat weights, and their importance. `line` has room for the groups of a tile; x and
    weight were zeros."""
    count = min(line.size // size, w.size // size - first)
    line[count * size :] = 0
    widen(w[first * size : (first + count) * size], line)
    _transpose(line, size, x)
    if h is not None:
        for g in range(count):
            at = (first + g) * size % h.size
            for i in range(size):
                line[g * size + i] = h[at + i]
        _transpose(line, size, weight)


@part
def _transpose(line, size, x):
    """Lane l gets weights of group l, of as many groups as there are; so do the lanes that lie that number, and its
    multiples, after it."""
    steps, groups = x.shape[0], line.size // size
    if (
        groups < 16
    ):  # each lane every so many weights, one row after another; else, each a run of weights, all groups at once
        lanes = LANES // groups
        for g in range(groups):
            for start in range(0, size, lanes):
                row = x[start // lanes]
                for i in range(min(lanes, size - start)):
                    row[i * groups + g] = line[g * size + start + i]
        return
    for start in range(0, size, steps):
        lane = start // steps * groups
        for i in range(min(steps, size - start)):
            row = x[i, lane : lane + groups]
            for g in range(groups):
                row[g] = line[g * size + start + i]


@part
def fold(sums, groups):
    """From sums by lane to sums by group: in the first `groups` lanes."""
    half = LANES // 2
    while half >= groups:
        for lane in range(half):
            sums[lane] += sums[lane + half]
        half //= 2


@part
def spread(values, groups):
    """From what holds for a group to what holds for its lanes."""
    for lane in range(groups, LANES):
        values[lane] = values[lane & (groups - 1)]
