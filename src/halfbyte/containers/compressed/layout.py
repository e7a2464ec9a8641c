"""Layout: one format of compressed-tensors, for the tensors of one module."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from halfbyte.containers.container import Config, PartSpec
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.grid import Grid, Shape
from halfbyte.grids.quantized import Quantized, Scheme
from halfbyte.grids.scalar import SCALE_DTYPES, ScalarGrid

SCALE_NAMES = {dtype: name for name, dtype in SCALE_DTYPES.items()}


class Layout(ABC):
    """How the tensors of a module lie in a file; names and methods are those of Container."""

    format: str

    @abstractmethod
    def writes(self, scheme: Scheme) -> bool:
        """Whether matrices of this scheme are written so."""

    def check(self, grid: Grid, shape: Shape) -> None:
        """Raise Unsupported for a matrix that does not fit."""
        if isinstance(grid.group_size, int) and grid.group_size <= 32 and shape[1] % grid.group_size:
            raise Unsupported(
                f"{self.format} of compressed-tensors has groups of {grid.group_size} in-features, which do not "
                f"divide {shape[1]}"
            )

    @abstractmethod
    def plan(self, grid: Grid, shape: Shape) -> dict[str, Spec]:
        """Suffix, shape and dtype of every tensor that `pack` will return."""

    def parts(self, grid: Grid, shape: Shape) -> dict[str, PartSpec]:
        """Those of `plan`, and where others write them otherwise, that."""
        return {suffix: PartSpec((spec,)) for suffix, spec in self.plan(grid, shape).items()}

    @abstractmethod
    def pack(self, q: Quantized) -> dict[str, Tensor]:
        """The tensors to write, by suffix."""

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], grid: Grid, shape: Shape) -> Quantized:
        """The inverse of `pack`."""

    @abstractmethod
    def find(self, entries: Mapping[str, Entry], module: str, weight_args: list[Config]) -> tuple[Grid, Shape] | None:
        """Grid and shape of a module as its tensors show them; None where they are not of this format.
        `weight_args` are the weights' arguments in the config, and decide where tensors leave a choice."""

    @abstractmethod
    def arguments(self, grid: Grid) -> Config:
        """QuantizationArgs of the weights."""


def arguments(
    bits: int, kind: str, strategy: str, group: int | None = None, symmetric: bool = True, **more: object
) -> Config:
    """QuantizationArgs of weights (compressed-tensors quantization/quant_args.py); `more` wins over its defaults."""
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        **more,
    }


def arguments_of_integers(grid: ScalarGrid) -> Config:
    """The same of integers."""
    strategy = "group" if grid.group_size else str(grid.granularity)
    return arguments(grid.levels.bits, "int", strategy, grid.group_size, grid.symmetric)


def may_be(weight_args: list[Config], word: str, value: object) -> bool:
    """Whether the config says this of some weights, or nothing of any."""
    values = [weights[word] for weights in weight_args if weights.get(word) is not None]
    return not values or value in values
