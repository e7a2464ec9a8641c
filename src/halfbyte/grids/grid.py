"""Grid: which numbers a weight can be."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Float32, Int64, Integer, Shaped
from torch import Tensor

from halfbyte.kernels.levels import Ladder
from halfbyte.kernels.panels import Operands
from halfbyte.kernels.scales import Params

Shape = tuple[int, ...]
Rows = slice | Int64[Tensor, " rows"]
ALL = slice(None)
Codes = Integer[Tensor, "out codes"]
"""Of any integer type; a unit is a weight, or of codebooks and the like, a vector of weights or a part of one."""


@runtime_checkable
class Rounder(Protocol):
    """Rounds some columns from the last to the first; what one misses, the ones after it make up for.

    `error` is what each column misses `target` by. As it changes by d in column k, wanted[:, :k] moves by d *
    coupling[k, :k]. Both change in place. `columns` are the in-features' numbers, in runs of `vector_size`. The
    diagonal of `coupling` says what columns count for: the squared output error is the sum of (left * coupling[k, k])^2
    over columns k, where `left` is what the columns before k cannot make up for. Columns that are rounded one by one
    have no use for it.
    """

    def __call__(
        self,
        wanted: Float32[Tensor, "out width"],
        target: Float32[Tensor, "out width"],
        error: Float32[Tensor, "out width"],
        coupling: Float32[Tensor, "width width"],
        columns: Int64[Tensor, " width"],
        /,
    ) -> Codes:
        """The codes of these columns."""
        ...


class Neighbours(NamedTuple):
    """Parameters near others."""

    group: int
    """In-features of a row that take one of them by themselves, whatever those beside them take."""
    near: Sequence[Params]
    """The parameters that change, [out, in / group] each."""


class Grid(ABC):
    """A number format: frozen, equal by value, and `parse(str(grid)) == grid`.

    `fit` returns parameters already rounded to the precision in which a file stores them, so whoever
    measures an error against a grid measures the error of the file.
    """

    vector_size: int
    """In-features rounded jointly: 1 for scalar grids, more for lattices and codebooks."""
    fitting_bytes: int = 32
    """For each weight, what the torch reference of `fit` holds at most: copies in float32, what a search compares."""

    @property
    def weight(self) -> "Grid":
        """A grid alone is the scheme of a linear whose activations stay in 16 bits."""
        return self

    @property
    def activations(self) -> None:
        """None: activations stay in 16 bits."""
        return None

    @property
    def weighs_magnitude(self) -> bool:
        """Whether rounding to nearest by importance loses less where an error in a large weight counts for more."""
        return False

    @property
    def shares_params_across_rows(self) -> bool:
        """Whether all rows of a matrix share a parameter."""
        return False

    @property
    @abstractmethod
    def group_size(self) -> int | None:
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
    def rounder(self, params: Params, shape: Shape, rows: Rows = ALL) -> Rounder:
        """What rounds columns of a matrix of this shape, or of some of its rows, made once for all columns in turn."""

    @abstractmethod
    def row_params(self, shape: Shape) -> frozenset[str]:
        """Parameters whose first dimension is that of the rows of such a matrix; others are shared by all of its
        rows."""

    @abstractmethod
    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        """The nearest codes, for every column at once. Where several weights are rounded jointly, `importance` says
        whose error counts more."""

    @abstractmethod
    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        """The values that the codes stand for, in float32."""

    def neighbours(self, params: Params) -> Neighbours | None:
        """Parameters near these, as a file stores them; None where groups of a row have none of their own."""
        return None

    def numbers(self, params: Params) -> Params:
        """Parameters that may change by a little while codes stay, as the numbers that they stand for in float32:
        scales and offsets, but for what engines have matrices share. Empty: there are none."""
        return {}

    def nearest_params(self, params: Params, numbers: Params) -> Params:
        """The parameters that a file holds nearest to these numbers."""
        return params

    def expand(self, codes: Codes, params: Params, numbers: Params) -> Float32[Tensor, "out in"]:
        """`decode` with these numbers in place of what is stored of them; differentiable with respect to them."""
        return self.decode(codes, params)

    def operands(self, codes: Codes, params: Params) -> Operands | None:
        """As levels and lines, which kernels for packed weights multiply by; None: they know no way."""
        return None

    @abstractmethod
    def bits(self, shape: Shape) -> float:
        """Stored bits per weight of a matrix of this shape, exact, metadata counted."""

    @abstractmethod
    def __str__(self) -> str: ...


class GroupLines(NamedTuple):
    """What the levels of each group stand for: (level - zero) * scale + offset, with what is stored of them."""

    scale: Float32[Tensor, "rows groups"]
    zero: Float32[Tensor, "rows groups"] | None = None
    """A level; None: zero."""
    offset: Float32[Tensor, "rows groups"] | None = None
    """None: zero."""

    def each(self, rows: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Those of some rows, with a dimension for the weights of a group."""
        zero, offset = (None if line is None else line[rows, :, None] for line in (self.zero, self.offset))
        return self.scale[rows, :, None], zero, offset


class SteppedGrid(Grid):
    """A grid that rounds weights one by one, to levels that lie on a line for each group: each has a next one above and
    below."""

    vector_size = 1

    @property
    @abstractmethod
    def ladder(self) -> Ladder:
        """Its levels in order."""

    @abstractmethod
    def lines(self, params: Params) -> GroupLines:
        """What levels stand for, by group."""

    @abstractmethod
    def with_lines(self, params: Params, scale: Tensor, offset: Tensor | None) -> Params:
        """The same parameters but for scales and offsets: what a file can store that is nearest to these."""

    @abstractmethod
    def grouped(self, x: Shaped[Tensor, "out in"]) -> Shaped[Tensor, "rows groups size"]:
        """Numbers of weights by the groups that have lines; zeros for what is missing in the last."""

    @abstractmethod
    def ungrouped(self, x: Shaped[Tensor, "rows groups size"], shape: Shape) -> Shaped[Tensor, "out in"]:
        """The inverse of `grouped`."""
