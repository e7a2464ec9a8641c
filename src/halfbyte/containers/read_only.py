"""ReadOnly: a layout of other tools' checkpoints that are sources and never outputs."""

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from halfbyte.containers.container import Config, ConfigContainer
from halfbyte.containers.safetensors import Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import AnyScheme, Quantized


class ReadOnly(ConfigContainer):
    """The tensors of a module are those in `read_too`; whatever writes raises Unsupported, saying what does write."""

    instead: str
    """The container to write such weights in."""

    def refuse(self) -> NoReturn:
        raise Unsupported(f"{self.name} is read and not written; such weights are written with --to {self.instead}")

    def native(self, scheme: AnyScheme, dtype: torch.dtype) -> AnyScheme:
        self.refuse()

    def check(self, scheme: AnyScheme, shape: Shape) -> None:
        self.refuse()

    def plan(self, scheme: AnyScheme, shape: Shape) -> dict[str, Spec]:
        return {}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        self.refuse()

    def config(self, schemes: Mapping[str, AnyScheme], kept: list[str], dtype: torch.dtype) -> Config:
        self.refuse()
