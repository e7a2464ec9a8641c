"""Weights as they are: safetensors in 16 or 32 bits, whose config.json says nothing of quantization."""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.containers.container import Config, ConfigContainer
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import AnyScheme, Quantized


class Plain(ConfigContainer):
    """What `dequantize` writes: it holds no quantized matrix."""

    name = "safetensors"

    def native(self, scheme: AnyScheme, dtype: torch.dtype) -> AnyScheme:
        return scheme

    def check(self, scheme: AnyScheme, shape: Shape) -> None:
        raise Unsupported(f"plain safetensors hold no {scheme}; compressed-tensors does")

    def plan(self, scheme: AnyScheme, shape: Shape) -> dict[str, Spec]:
        return {}

    def pack(self, q: Quantized) -> dict[str, Tensor]:
        raise Unsupported(f"plain safetensors hold no {q.scheme}; compressed-tensors does")

    def unpack(self, tensors: Mapping[str, Tensor], scheme: AnyScheme, shape: Shape) -> Quantized:
        raise Unsupported(f"plain safetensors hold no {scheme}")

    def config(self, schemes: Mapping[str, AnyScheme], kept: list[str], dtype: torch.dtype) -> Config:
        return {}

    def reads(self, config: Config) -> bool:
        return False

    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[AnyScheme, Shape]]:
        return {}
