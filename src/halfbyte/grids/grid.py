"""Grid: which numbers a weight can be. Quantized: the one value that crosses every border."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

Shape = tuple[int, ...]
Codes = UInt8[Tensor, "out in"]
Params = dict[str, Tensor]


class Grid(ABC):
    """A number format: frozen, equal by value, and `parse(str(grid)) == grid`.

    `fit` returns parameters already rounded to the precision in which a file stores them, so whoever
    measures an error against a grid measures the error of the file.
    """

    step: int
    """In-features rounded jointly: 1 for scalar grids, more for lattices and codebooks."""

    @property
    @abstractmethod
    def block(self) -> int | None:
        """In-features that share parameters; None: the whole row or more."""

    @abstractmethod
    def fit(self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True) -> Params:
        """Choose parameters that minimise the importance-weighted squared error of rounding `w` to nearest.

        Importance is that of in-features, [in], or of each weight, [out, in].

        With `search` off: the plain choice that spans the largest value (min-max).
        """

    @abstractmethod
    def round(self, w: Float32[Tensor, "out step"], params: Params, at: int) -> tuple[UInt8[Tensor, "out step"], Float32[Tensor, "out step"]]:
        """The codes nearest to columns `at : at + step`, and the values that they decode to."""

    def round_block(
        self,
        wanted: Float32[Tensor, "out width"],
        target: Float32[Tensor, "out width"],
        error: Float32[Tensor, "out width"],
        coupling: Float32[Tensor, "width width"],
        params: Params,
        columns: list[int],
    ) -> UInt8[Tensor, "out width"]:
        """Round columns from the last to the first; what one misses, the ones after it make up for.

        `error` is what each column misses `target` by. As it changes by d in column k, wanted[:, :k] moves by
        d * coupling[k, :k]. Both change in place. `columns` are the in-features' numbers, in runs of `step`. The diagonal of
        `coupling` says what columns count for: the squared output error is the sum of (left * coupling[k, k])^2 over columns
        k, where `left` is what the columns before k cannot make up for. Columns that are rounded one by one have no use for it.
        """
        codes = torch.empty(wanted.shape, dtype=torch.uint8, device=wanted.device)
        for last in range(len(columns), 0, -self.step):
            now = slice(last - self.step, last)
            codes[:, now], value = self.round(wanted[:, now], params, columns[last - self.step])
            missed = target[:, now] - value
            wanted[:, : last - self.step] += (missed - error[:, now]) @ coupling[now, : last - self.step]
            error[:, now] = missed
        return codes

    @abstractmethod
    def encode(self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None) -> Codes:
        """The nearest codes, for every column at once. Where several weights are rounded jointly, `importance` says whose error counts more."""

    @abstractmethod
    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        """The values that the codes stand for, in float32."""

    @abstractmethod
    def bits(self, shape: Shape) -> float:
        """Stored bits per weight of a matrix of this shape, exact, metadata counted."""

    @abstractmethod
    def __str__(self) -> str: ...


class Quantized(NamedTuple):
    """A matrix on a grid: what a solver returns, a container packs and a kernel multiplies by."""

    grid: Grid
    codes: Codes
    params: Params

    @property
    def shape(self) -> Shape:
        return tuple(self.codes.shape)

    def decode(self) -> Float32[Tensor, "out in"]:
        return self.grid.decode(self.codes, self.params)

    def equal(self, other: "Quantized") -> bool:
        """Same grid, same codes, same parameters, bit for bit."""
        return (
            self.grid == other.grid
            and torch.equal(self.codes, other.codes)
            and self.params.keys() == other.params.keys()
            and all(torch.equal(p, other.params[name]) for name, p in self.params.items())
        )


def same_rows(q: Quantized, rows: Int64[Tensor, " rows"] | slice) -> Quantized:
    """The matrix that has these rows of another, whose rows share no parameters."""
    return q._replace(codes=q.codes[rows], params={name: p[rows] for name, p in q.params.items()})
