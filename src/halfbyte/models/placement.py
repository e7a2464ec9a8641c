"""Where a pass over a model computes, and where what it needs between two blocks is kept."""

from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from halfbyte.devices import kind_of

CPU = torch.device("cpu")
HIDDEN_BYTES = 4_000_000_000
"""Hidden states in memory; more than these are pages of files, which the system writes out as it needs."""
MEMORY_SHARE = 1 / 3
"""Of this machine's memory: for Hessians, without a GPU."""
HIDDEN_SHARE, STATISTICS_SHARE = 1 / 4, 1 / 4
"""Of a GPU's free memory: the rest is for the block, the next one, and what a solver and the block compute with."""
BATCH_TOKENS, DEVICE_BATCH_TOKENS = 2048, 8192
"""Tokens that run through a block at once. A GPU is busy only with more of them."""
SIDE_BY_SIDE = 1 << 28
"""Weights that are worked on at a time, where no single matrix has more."""


CHUNK, DEVICE_CHUNK = 1 << 20, 1 << 24
"""Weights of a chunk of a matrix's rows, where it can be cut: few enough for a core's cache, and enough to keep a GPU
busy."""


def chunk_size(device: torch.device) -> int:
    """Weights that are best worked on at a time."""
    return CHUNK if kind_of(device).is_host else DEVICE_CHUNK


def tasks_together(largest: int, device: torch.device = CPU, each: int = 0) -> int:
    """How many tasks of at most so many weights share the cores out; and a GPU's memory, of which a weight takes `each`
    bytes."""
    together = max(1, min(torch.get_num_threads(), SIDE_BY_SIDE // max(largest, 1)))
    kind = kind_of(device)
    return together if kind.is_host else max(1, min(together, kind.free_bytes(device) // max(each * largest, 1)))


@dataclass(frozen=True)
class Placement:
    """A device and budgets in bytes. Nothing that is computed depends on the budgets: what does not fit is kept
    elsewhere, or done in parts."""

    device: torch.device = CPU
    scratch: Path | None = None
    """A folder on a disk, for hidden states beyond the memory's budget; None: they stay in memory."""
    hidden_device_bytes: int = 0
    hidden_memory_bytes: int = HIDDEN_BYTES
    statistics_bytes: int = field(default_factory=lambda: int(MEMORY_SHARE * psutil.virtual_memory().total))
    batch_tokens: int = BATCH_TOKENS
    reads_ahead: bool = False
    """Whether a thread reads the next block while one runs, and another writes results: for devices that compute beside
    the CPU."""

    @classmethod
    def on(cls, device: torch.device, scratch: Path | None = None, free_bytes: int | None = None) -> "Placement":
        """Budgets for a device with so much memory free; by default, with what is free now."""
        kind = kind_of(device)
        if kind.is_host:
            return cls(device, scratch, hidden_memory_bytes=HIDDEN_BYTES)
        free = kind.free_bytes(device) if free_bytes is None else free_bytes
        return cls(
            device,
            scratch,
            hidden_device_bytes=int(HIDDEN_SHARE * free),
            hidden_memory_bytes=HIDDEN_BYTES,
            statistics_bytes=int(STATISTICS_SHARE * free),
            batch_tokens=DEVICE_BATCH_TOKENS,
            reads_ahead=True,
        )

    @property
    def is_host(self) -> bool:
        """Whether the device computes in this machine's memory, beside which there is no other."""
        return kind_of(self.device).is_host

    def of_hidden(self, size_bytes: int) -> str:
        """Where hidden states of so many bytes in all are kept: on the "device", in "memory", or in "files"."""
        if size_bytes <= self.hidden_device_bytes:
            return "device"
        return "memory" if self.scratch is None or size_bytes <= self.hidden_memory_bytes else "files"
