"""Grid: which numbers a weight can be. InputGrid: which numbers its inputs become. Quantized: the one value that crosses every border."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

Shape = tuple[int, ...]
Codes = UInt8[Tensor, "out in"]
Params = dict[str, Tensor]
Rounder = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Codes]
"""Grid.round_block, given the parameters."""


class Grid(ABC):
    """A number format: frozen, equal by value, and `parse(str(grid)) == grid`.

    `fit` returns parameters already rounded to the precision in which a file stores them, so whoever
    measures an error against a grid measures the error of the file.
    """

    step: int
    """In-features rounded jointly: 1 for scalar grids, more for lattices and codebooks."""

    @property
    def weight(self) -> "Grid":
        """A grid alone is the scheme of a linear whose inputs stay in 16 bits."""
        return self

    @property
    def input(self) -> "InputGrid | None":
        return None

    @property
    def prominent(self) -> bool:
        """Whether rounding to nearest by importance goes better when an error in a large weight counts for more (solvers.gptq.prominence)."""
        return False

    @property
    def spans_rows(self) -> bool:
        """Whether all rows of a matrix share a parameter."""
        return False

    @property
    @abstractmethod
    def block(self) -> int | None:
        """In-features that share parameters; None: the whole row or more."""

    @abstractmethod
    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        """Choose parameters that minimise the importance-weighted squared error of rounding `w` to nearest.

        Importance is that of in-features, [in], or of each weight, [out, in].

        With `search` off: the plain choice that spans the largest value (min-max).
        """

    @abstractmethod
    def round(
        self, w: Float32[Tensor, "out step"], params: Params, at: int
    ) -> tuple[UInt8[Tensor, "out step"], Float32[Tensor, "out step"]]:
        """The codes nearest to columns `at : at + step`, and the values that they decode to."""

    def round_block(
        self,
        wanted: Float32[Tensor, "out width"],
        target: Float32[Tensor, "out width"],
        error: Float32[Tensor, "out width"],
        coupling: Float32[Tensor, "width width"],
        columns: Int64[Tensor, " width"],
        params: Params,
    ) -> UInt8[Tensor, "out width"]:
        """Round columns from the last to the first; what one misses, the ones after it make up for.

        `error` is what each column misses `target` by. As it changes by d in column k, wanted[:, :k] moves by
        d * coupling[k, :k]. Both change in place. `columns` are the in-features' numbers, in runs of `step`. The diagonal of
        `coupling` says what columns count for: the squared output error is the sum of (left * coupling[k, k])^2 over columns
        k, where `left` is what the columns before k cannot make up for. Columns that are rounded one by one have no use for it.
        """
        codes, at = torch.empty(wanted.shape, dtype=torch.uint8, device=wanted.device), columns.tolist()
        for last in range(len(at), 0, -self.step):
            now = slice(last - self.step, last)
            codes[:, now], value = self.round(wanted[:, now], params, at[last - self.step])
            missed = target[:, now] - value
            wanted[:, : last - self.step] += (missed - error[:, now]) @ coupling[now, : last - self.step]
            error[:, now] = missed
        return codes

    def rounder(self, params: Params, rows: int) -> Rounder:
        """`round_block` with the parameters of a matrix, for all of its columns in turn; compiled on CPUs."""
        on_cpu = all(p.device.type == "cpu" for p in params.values())
        return (self.compiled_rounder(params, rows) if on_cpu else None) or partial(self.round_block, params=params)

    def compiled_rounder(self, params: Params, rows: int) -> Rounder | None:
        """`round_block` made faster for CPUs; None: there is only the reference."""
        return None

    @abstractmethod
    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        """The nearest codes, for every column at once. Where several weights are rounded jointly, `importance` says whose error counts more."""

    @abstractmethod
    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        """The values that the codes stand for, in float32."""

    @abstractmethod
    def bits(self, shape: Shape) -> float:
        """Stored bits per weight of a matrix of this shape, exact, metadata counted."""

    @abstractmethod
    def __str__(self) -> str: ...


class InputGrid(ABC):
    """How an engine rounds what a linear reads: frozen, equal by value, named as `str` says."""

    @property
    def stored(self) -> tuple[str, ...]:
        """Parameters that lie in the file: calibration has to find them."""
        return ()

    @property
    def static(self) -> bool:
        return bool(self.stored)

    @abstractmethod
    def params(self, x: Float[Tensor, "... in"], stored: Mapping[str, Tensor]) -> Params:
        """All that `round` needs: what is stored, and what the engine finds as it runs."""

    @abstractmethod
    def round(self, x: Float[Tensor, "... in"], params: Mapping[str, Tensor]) -> Float32[Tensor, "... in"]:
        """The values that the engine computes with."""

    def fit(self, seen: "Seen", how: str) -> Params:
        """The parameters to store, for inputs such as those seen; `how` is a key of `halfbyte.grids.inputs.RANGES`."""
        return {}

    def limits(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What lies below or above these is cut by the stored parameters."""
        return torch.tensor(-torch.inf), torch.tensor(torch.inf)

    @abstractmethod
    def __str__(self) -> str: ...


class Seen(NamedTuple):
    """Inputs of a linear: what they range over, and some of them."""

    low: Float32[Tensor, " in"]
    high: Float32[Tensor, " in"]
    rows: Float32[Tensor, "rows in"]


class Inputs(NamedTuple):
    """How a linear's inputs are rounded, and the parameters of it that are stored."""

    grid: InputGrid
    params: Params

    def round(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... in"]:
        """What the linear computes with, in the dtype of x."""
        return self.grid.round(x, self.grid.params(x, self.params)).to(x.dtype) if x.numel() else x


@dataclass(frozen=True)
class Scheme:
    """What becomes of a linear whose inputs are rounded too: W8A8 is int8-channel/int8-token."""

    weight: Grid
    input: InputGrid

    def __str__(self) -> str:
        return f"{self.weight}/{self.input}"


AnyScheme = Grid | Scheme


class Quantized(NamedTuple):
    """A matrix on a grid: what a solver returns, a container packs and a kernel multiplies by."""

    grid: Grid
    codes: Codes
    params: Params
    input: Inputs | None = None
    """None: what it is multiplied by stays in 16 bits."""

    @property
    def shape(self) -> Shape:
        return tuple(self.codes.shape)

    @property
    def scheme(self) -> AnyScheme:
        return Scheme(self.grid, self.input.grid) if self.input else self.grid

    def decode(self) -> Float32[Tensor, "out in"]:
        return self.grid.decode(self.codes, self.params)

    def equal(self, other: "Quantized") -> bool:
        """Same scheme, same codes, same parameters, bit for bit."""
        return self.scheme == other.scheme and _equal(self.tensors, other.tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every bit of it, by name."""
        stored = {f"input {name}": p for name, p in self.input.params.items()} if self.input else {}
        return {"codes": self.codes, **self.params, **stored}


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in some.items())


def split_rows(q: Quantized, sizes: list[int]) -> list[Quantized]:
    """The matrices that lie below each other in one, which share what all of its rows share."""
    codes = q.codes.split(sizes)
    params = {name: p.split(sizes) if p.shape[0] == q.shape[0] else [p] * len(sizes) for name, p in q.params.items()}
    return [
        Quantized(q.grid, c.contiguous(), {name: p[i].contiguous() for name, p in params.items()}, q.input)
        for i, c in enumerate(codes)
    ]


def same_rows(q: Quantized, rows: Int64[Tensor, " rows"] | slice) -> Quantized:
    """The matrix that has these rows of another, whose rows share no parameters."""
    return q._replace(codes=q.codes[rows], params={name: p[rows] for name, p in q.params.items()})
