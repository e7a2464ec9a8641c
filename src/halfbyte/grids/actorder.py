"""Integer grids whose groups are not runs of in-features: what GPTQ leaves where it sorts columns before it fits their
scales (`desc_act`).

    int4-g128-actorder     as int4-g128, and which group a column is of is a parameter

Read and never written: here columns are sorted once the scales are fitted, which needs no order in a file.
"""

from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from halfbyte.errors import Unsupported
from halfbyte.grids.grid import ALL, Codes, Grid, Params, Rounder, Rows, Shape
from halfbyte.grids.scalar import ScalarGrid
from halfbyte.kernels.panels import Operands

SUFFIX = "-actorder"


@dataclass(frozen=True)
class ActOrderGrid(Grid):
    """`g_idx` [1, in] is the group of each in-feature, and all groups are of one size; other parameters are those of
    the integers."""

    integers: ScalarGrid

    vector_size = 1

    def __str__(self) -> str:
        return f"{self.integers}{SUFFIX}"

    @property
    def group_size(self) -> int | None:
        """That of the integers, though groups are no runs of in-features here."""
        return self.integers.group_size

    @property
    def shares_params_across_rows(self) -> bool:
        """True: all rows share `g_idx`."""
        return True

    def bits(self, shape: Shape) -> float:
        """Those of the integers, and 32 bits for the group of each in-feature."""
        return self.integers.bits(shape) + 32 / shape[0]

    def _refuse(self) -> NoReturn:
        raise Unsupported(f"{self} is read, not written; {self.integers} is")

    def fit(
        self, w: Float[Tensor, "out in"], importance: Float32[Tensor, "... in"] | None, search: bool = True
    ) -> Params:
        """Raises Unsupported: such grids are read alone."""
        self._refuse()

    def rounder(self, params: Params, shape: Shape, rows: Rows = ALL) -> Rounder:
        """Raises Unsupported: such grids are read alone."""
        self._refuse()

    def row_params(self, shape: Shape) -> frozenset[str]:
        """Those of the integers: `g_idx` is shared by all rows."""
        return self.integers.row_params(shape)

    def encode(
        self, w: Float[Tensor, "out in"], params: Params, importance: Float32[Tensor, " in"] | None = None
    ) -> Codes:
        """Raises Unsupported: such grids are read alone."""
        self._refuse()

    def operands(self, codes: Codes, params: Params) -> Operands | None:
        """With columns sorted by group."""
        columns = torch.argsort(params["g_idx"][0], stable=True)
        sorted_operands = self.integers.operands(codes[:, columns], params)
        return sorted_operands._replace(order=columns) if sorted_operands else None

    def decode(self, codes: Codes, params: Params) -> Float32[Tensor, "out in"]:
        """Decode with columns sorted by group, and put them back in order."""
        columns = torch.argsort(params["g_idx"][0], stable=True)
        values = self.integers.decode(codes[:, columns], {name: p for name, p in params.items() if name != "g_idx"})
        return values[:, torch.argsort(columns)]
