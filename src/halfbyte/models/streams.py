"""Hidden states between two blocks, batch by batch: on the device, in memory or in files, by how much room there is."""

from collections.abc import Iterator
from mmap import mmap
from pathlib import Path
from tempfile import TemporaryFile

import torch
from jaxtyping import Float
from torch import Tensor

from halfbyte.models.placement import CPU, Placement

Hidden = Float[Tensor, "... width"]
"""Samples first; of some families (DeepSeek V4, Gemma 3n) with a dimension more than tokens and width."""


class Stream:
    """What a block reads, or what it returns, of every batch."""

    def __init__(self, placement: Placement, tokens: int):
        """`tokens`: how many there are of all streams that share the placement's budgets."""
        self.placement, self.tokens = placement, tokens
        self._batches: list[Hidden] = []
        self._where = ""

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Hidden]:
        return iter(self._batches)

    def __getitem__(self, batch: int) -> Hidden:
        return self._batches[batch]

    def __setitem__(self, batch: int, hidden: Hidden) -> None:
        self._batches[batch] = self._kept(hidden)

    def append(self, hidden: Hidden) -> None:
        """Add a batch; the first decides where all are kept."""
        self._where = self._where or self.placement.of_hidden(self.tokens * hidden.shape[-1] * hidden.dtype.itemsize)
        self._batches.append(self._kept(hidden))

    def fork(self) -> "Stream":
        """One that begins with the same hidden states and goes another way: only what differs takes memory."""
        fork = self.empty()
        fork._batches = list(self._batches)
        return fork

    def empty(self) -> "Stream":
        """One without hidden states as yet, kept where these are."""
        other = Stream(self.placement, self.tokens)
        other._where = self._where
        return other

    @property
    def is_on_device(self) -> bool:
        """Whether they lie on the device that computes."""
        return self._where == "device"

    @property
    def file_bytes(self) -> int:
        """What they take of a disk."""
        return sum(hidden.nbytes for hidden in self._batches) if self._where == "files" else 0

    def leave_device(self) -> None:
        """Move what is on the device to memory."""
        self._where = "memory"
        self._batches = [self._kept(hidden) for hidden in self._batches]

    def _kept(self, hidden: Hidden) -> Hidden:
        """The same values, where they are to be."""
        return kept(hidden, self._where, self.placement)


def kept(values: Tensor, where: str, placement: Placement) -> Tensor:
    """The same values on the "device", in "memory" or in "files" (`Placement.of_hidden`)."""
    values = values.detach()
    if where == "device":
        return values.to(placement.device)
    if where == "files" and placement.scratch is not None:
        return _in_file(values.to(CPU), placement.scratch)
    return values.to(CPU)


def _in_file(hidden: Tensor, folder: Path) -> Tensor:
    """The same values in a file, which is gone when the last tensor in it is."""
    with TemporaryFile(dir=folder) as file:
        file.write(hidden.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        values = torch.frombuffer(mmap(file.fileno(), 0), dtype=hidden.dtype)
    return values.view(hidden.shape)
