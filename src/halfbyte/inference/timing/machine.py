"""What a machine can do at most: how fast its memory is read, and how fast it multiplies."""

import time
from collections.abc import Callable
from typing import Any

import torch

from halfbyte.devices import device_named, kind_of, wait

BUFFER_BYTES, SHARE = 1 << 30, 1 / 8
"""Of what is read: more than any cache holds; and at most so much of the free memory."""
ROW = 4096
SIDE = 2048
"""Of the matrices that are multiplied."""
DTYPES = (torch.bfloat16, torch.float32)


class InTorch:
    """By torch's own operations."""

    def open(self, threads: int, device: str) -> dict[str, Any]:
        """Set aside what is read and multiplied, and do so once."""
        torch.set_num_threads(threads)
        self._device = device_named(device)
        size = min(BUFFER_BYTES, int(SHARE * kind_of(self._device).free_bytes(self._device)))
        values = torch.ones(size // (4 * ROW) * ROW, device=self._device)
        half, rows = len(values) // 2, values.view(-1, ROW)
        row, row_of_halves = torch.ones(ROW, device=self._device), torch.ones(2 * ROW, device=self._device).bfloat16()
        self._reads: list[Callable[[], Any]] = [
            lambda: torch.dot(values[:half], values[half : 2 * half]),
            lambda: rows @ row,
            lambda: rows.view(torch.bfloat16) @ row_of_halves,
            lambda: values.view(torch.int64).sum(),
        ]
        self._bytes = values.numel() * values.itemsize
        self._factors = {dtype: torch.ones(SIDE, SIDE, dtype=dtype, device=self._device) for dtype in DTYPES}
        return self.run()

    def run(self) -> dict[str, Any]:
        """Bytes and operations in a second: by the fastest of several ways to read all of a buffer."""
        bandwidth = max(self._bytes / self._seconds(read) for read in self._reads)
        arithmetic = {
            str(dtype).removeprefix("torch."): 2 * SIDE**3 / self._seconds(lambda m=m: m @ m)
            for dtype, m in self._factors.items()
        }
        return {"bandwidth": bandwidth, "arithmetic": arithmetic}

    def _seconds(self, compute: Callable[[], Any]) -> float:
        began = time.perf_counter()
        compute()
        wait(self._device)
        return time.perf_counter() - began
