"""Edition: a job's output as files: which tensors lie where, and what lies beside them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from halfbyte.containers.folder import Shard
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.grids.quantized import AnyScheme, Quantized
from halfbyte.models.checkpoint import Weight
from halfbyte.targets.plan import Job


class Part(NamedTuple):
    """A tensor of the output, or rows of its leading dimension."""

    name: str
    tensor: Tensor
    at: int | None = None
    """The first of these rows; None for the whole tensor."""


class Edition(ABC):
    """What a container makes of a whole checkpoint."""

    def __init__(self, job: Job):
        self.job = job

    @abstractmethod
    def shards(self, stem: str) -> dict[str, Shard]:
        """Every file of tensors, laid out from shapes alone; `stem` is the output's own name."""

    def pieces(self, weight: Weight) -> list[Weight]:
        """Runs of a matrix's rows that can be read, rounded and written each by itself, in order."""
        return [weight]

    @abstractmethod
    def pack(self, weight: Weight, q: Quantized) -> Iterator[Part]:
        """What is written of a matrix."""

    @abstractmethod
    def unpack(self, entries: Mapping[str, Entry], weight: Weight, scheme: AnyScheme) -> Quantized:
        """The inverse of `pack`, from a file."""

    @abstractmethod
    def keep(self, tensor: str, value: Tensor) -> Iterator[Part]:
        """What is written of a tensor that is not quantized."""

    @abstractmethod
    def kept(self, entries: Mapping[str, Entry], tensor: str) -> list[Tensor]:
        """What `keep` wrote, from a file."""

    @abstractmethod
    def restored(self, entries: Mapping[str, Entry], tensor: str) -> Tensor:
        """The value that `keep` was given, from a file."""

    def entrance(self, stem: str) -> str | None:
        """The file that engines are given; None where they are given the folder."""
        return None

    def extra(self) -> Iterator[Part]:
        """Tensors of the output that no tensor of the checkpoint becomes."""
        yield from ()

    @abstractmethod
    def accompany(self, folder: Path) -> None:
        """Write what else belongs to the output, and is not a report."""

    @abstractmethod
    def reopen(self, folder: Path) -> Mapping[str, Entry]:
        """Read the headers of a finished folder as any reader would. Raises BrokenOutput for one that lacks a matrix."""


def rows_of(entry: Entry, first: int | None) -> Tensor:
    return entry.read() if first is None else entry.read(first, first + 1)


def split(specs: Mapping[str, Spec], limit: float) -> list[dict[str, Spec]]:
    """Parts of at most `limit` bytes, in order; a tensor that is larger is a part of its own."""
    parts: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if parts[-1] and size + spec.size_bytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = spec
        size += spec.size_bytes
    return parts
