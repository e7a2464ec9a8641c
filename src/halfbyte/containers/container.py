"""Container: how the bits of a Quantized lie in a checkpoint, and how the checkpoint says so.

A container moves bits and never does arithmetic on weights: `unpack(pack(q), q.grid, q.shape) == q`.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.grid import Grid, Quantized, Shape
from halfbyte.grids.scalar import IntGrid

Config = dict[str, Any]


class Container(ABC):
    """One layout of quantized matrices in files."""

    name: str
    mixes = True
    """Whether one checkpoint may hold several grids."""
    read_too: tuple[str, ...] = ()
    """Suffixes of tensors that belong to a module in files of others, beside those of `plan`."""

    @abstractmethod
    def native(self, grid: Grid, dtype: torch.dtype) -> Grid:
        """`grid` with scales in the precision that engines compute with when the model is of `dtype`."""

    @abstractmethod
    def check(self, grid: Grid, shape: Shape) -> None:
        """Raise Unsupported, saying what the container can hold, unless it holds such a matrix."""

    def same(self, q: Quantized) -> Quantized | None:
        """A matrix from elsewhere, value for value on a grid that this container may hold; None where it must be rounded."""
        return q if isinstance(q.grid, IntGrid) else None

    def holding(self, q: Quantized) -> "Container":
        """The version of this container that holds such a matrix too."""
        return self

    @abstractmethod
    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        """Suffix, shape and dtype of every tensor that `pack` will return."""

    @abstractmethod
    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """The tensors to write, by suffix."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        """The inverse of `pack`."""


class ConfigContainer(Container):
    """A layout of safetensors in a Hugging Face folder, whose config.json says which one it is.

    Modules are named without their `.weight`; tensors of a module by the suffix that follows `module.`.
    """

    @abstractmethod
    def config(self, grids: Mapping[str, Grid], kept: list[str], dtype: torch.dtype) -> Config:
        """`quantization_config` for these modules; `kept` are linear modules left as they were."""

    @abstractmethod
    def reads(self, config: Config) -> bool:
        """Whether a `quantization_config` is of this container."""

    def apart(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The tensors of a checkpoint, those that several modules share (fused experts) cut up."""
        return dict(entries)

    @abstractmethod
    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[Grid, Shape]]:
        """Grid and shape of every quantized module of a checkpoint."""

    def extra_files(self, config: Config) -> dict[str, Config]:
        """Further JSON files that readers of this container look for."""
        return {}


def integer(grid: Grid, container: str) -> IntGrid:
    if not isinstance(grid, IntGrid):
        raise Unsupported(f"{container} holds integer grids only, not {grid}")
    return grid


def span_of(width: int, groups: int, sizes: Collection[int | None]) -> int | str:
    """What shares a scale, from shapes; a row of one group is a channel unless the config speaks of groups that wide."""
    return width // groups if groups > 1 or width in sizes else "channel"


def commonest(grids: Mapping[str, Grid]) -> Grid:
    return Counter(grids.values()).most_common(1)[0][0]


def patterns(chosen: list[str], others: list[str]) -> list[str]:
    """Regular expressions that match every name in `chosen` and none in `others`, few where layers repeat."""
    foreign = {_collapse(name) for name in others}
    found: dict[str, None] = {}
    for name in chosen:
        found[re.escape(name) if _collapse(name) in foreign else _collapse(name)] = None
    return list(found)


def _collapse(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def fits_half(scale: Tensor) -> bool:
    return torch.equal(scale.to(torch.float16).to(scale.dtype), scale)


def exact_half(scale: Tensor) -> Tensor:
    if not fits_half(scale):
        raise Unsupported("a scale does not fit fp16, the only precision of this container; scale the model or use compressed-tensors")
    return scale.to(torch.float16)
