"""Quantized: the one value that crosses every border. Scheme: what becomes of a linear."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from halfbyte.errors import Unsupported
from halfbyte.grids.activations import ActivationGrid, ActivationQuant
from halfbyte.grids.grid import Codes, Grid, Params, Shape
from halfbyte.kernels.panels import CHUNK, Panels, pack

ROOM = 1.1
"""What a matrix in memory may take, as a share of what it takes in its file."""


@dataclass(frozen=True)
class WeightActivation:
    """The scheme of a linear whose activations are rounded too: W8A8 is int8-channel/int8-token."""

    weight: Grid
    activations: ActivationGrid

    def __str__(self) -> str:
        return f"{self.weight}/{self.activations}"


Scheme = Grid | WeightActivation
"""A grid alone rounds weights only."""


class Quantized(NamedTuple):
    """A matrix on a grid: what a solver returns, a container packs and a kernel multiplies by."""

    grid: Grid
    codes: Codes
    params: Params
    activations: ActivationQuant | None = None
    """None: what it is multiplied by stays in 16 bits."""
    size: Shape | None = None
    """Out-features and in-features, where codes are not one for each weight: of vectors of weights, or several for each
    vector."""

    @property
    def shape(self) -> Shape:
        """Out-features and in-features."""
        return self.size or tuple(self.codes.shape)

    @property
    def scheme(self) -> Scheme:
        """The grid of the weights, and that of the activations if these are rounded."""
        return WeightActivation(self.grid, self.activations.grid) if self.activations else self.grid

    def decode(self) -> Float32[Tensor, "out in"]:
        """The weights that it stands for, in float32."""
        return self.grid.decode(self.codes, self.params)

    def panels(self, room: float = ROOM) -> Panels | None:
        """As kernels multiply by it; None where they know no way, or none that takes at most `room` times its bits."""
        operands = self.grid.operands(self.codes, self.params)
        panels = pack(operands) if operands else None
        if panels is None or panels.row_bytes > room * self.grid.bits(self.shape) / 8 * panels.chunks * CHUNK:
            return None
        return panels

    def equal(self, other: "Quantized") -> bool:
        """Same scheme, same codes, same parameters, bit for bit."""
        return self.scheme == other.scheme and _equal(self.tensors, other.tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every bit of it, by name."""
        stored = {f"input {name}": p for name, p in self.activations.params.items()} if self.activations else {}
        return {"codes": self.codes, **self.params, **stored}


class PackedMatrix(NamedTuple):
    """A quantized matrix as it lies in a file, and what makes codes and parameters of it."""

    tensors: dict[str, Tensor]
    unpack: Callable[[Mapping[str, Tensor]], Quantized]
    by_rows: bool = False
    """Whether the same rows of all tensors are those rows of the matrix."""

    @property
    def quantized(self) -> Quantized:
        """Unpacked: codes and parameters."""
        return self.unpack(self.tensors)

    def rows(self, rows: Int64[Tensor, " rows"]) -> Float32[Tensor, "rows in"]:
        """Some rows of it, decoded; no more than those are unpacked, if `by_rows`."""
        if self.by_rows:
            return self.unpack({name: value[rows] for name, value in self.tensors.items()}).decode()
        return self.decode()[rows]

    def decode(self) -> Float32[Tensor, "out in"]:
        """The weights that it stands for, in float32."""
        return self.quantized.decode()

    def holding(self, tensors: dict[str, Tensor]) -> "PackedMatrix":
        """The same of other tensors: moved ones."""
        return self._replace(tensors=tensors)


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in some.items())


def split_rows(q: Quantized, sizes: list[int]) -> list[Quantized]:
    """The matrices that lie below each other in one, which share what all of its rows share.

    Raises Unsupported where some rows share what others do not have.
    """
    row_params = q.grid.row_params(q.shape)
    if partly := [name for name, p in q.params.items() if name not in row_params and p.shape[0] != 1]:
        raise Unsupported(f"rows of {q.grid} that share a {partly[0]} cannot be parted")
    borders = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = (slice(first, first + size) for first, size in zip(borders, sizes, strict=True))
    return [select_rows(q, part) for part in parts]


def select_rows(q: Quantized, rows: Int64[Tensor, " rows"] | slice) -> Quantized:
    """The matrix that has these rows of another, and all that its rows share."""
    row_params, codes = q.grid.row_params(q.shape), q.codes[rows].contiguous()
    params = {name: p[rows].contiguous() if name in row_params else p for name, p in q.params.items()}
    return q._replace(codes=codes, params=params, size=q.size and (len(codes), *q.size[1:]))
