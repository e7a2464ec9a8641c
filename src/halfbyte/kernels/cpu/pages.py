"""Memory in large pages, for what is read from end to end at each product.

A page of 4 KB is looked up for every 4 KB, and a processor's own prefetching ends with it; a page of 2 MB holds whole
matrices.
"""

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE, BLOCK = 2 << 20, 16 << 20
ALIGNMENT = 64
"""A line of every cache."""


class _Blocks:
    """Blocks of pages, filled one after another: most matrices are smaller than a page, or end in the middle of one. A
    block is given back when no tensor lies in it any more."""

    def __init__(self):
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def hold(self, parts: Sequence[Tensor]) -> Tensor:
        """A copy of flat tensors, one after another."""
        size = sum(part.numel() for part in parts) * parts[0].itemsize
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        if start + size > len(self._block):
            self._block, start = _block(max(size, BLOCK)), 0
        self._used = start + size
        whole = self._block[start : self._used].view(parts[0].dtype)
        for room, part in zip(whole.split([len(part) for part in parts]), parts, strict=True):
            room.copy_(part)
        return whole


def _block(size: int) -> Tensor:
    """So many bytes that nobody has touched yet: they take no memory."""
    area = mmap.mmap(-1, size + PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)  # which keeps the area
    first = -whole.data_ptr() % PAGE
    return whole[first : first + size]


_BLOCKS = _Blocks()


def joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Those of each name, in large pages."""
    return {name: _BLOCKS.hold([part[name] for part in parts]) for name in parts[0]}
