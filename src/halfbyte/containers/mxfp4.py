"""MXFP4 as gpt-oss has it (openai/gpt-oss-20b; Transformers integrations/mxfp4.py; vLLM
model_executor/layers/quantization/mxfp4.py). Only experts are quantized, and lie fused. Read, not written:
compressed-tensors holds the same values.

X_blocks  uint8 [experts, out, in / 32, 16]: the first of neighbours in the low bits
X_scales  uint8 [experts, out, in / 32], a power of two (E8M0)

The unquantized checkpoint has X itself, [experts, in, out].
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.containers.compressed.small_floats import MXFP4 as PACKED
from halfbyte.containers.container import Config, Has, PartSpec, Reader, any_of
from halfbyte.containers.fused import unfuse
from halfbyte.containers.safetensors import Entry
from halfbyte.errors import Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import Quantized, Scheme


class MXFP4(Reader):
    """Blocks of 32 in-features, 16 bytes each."""

    name = "mxfp4"
    foreign_suffixes = ("blocks", "scales")

    def reads(self, config: Config) -> bool:
        """Whether `quant_method` is mxfp4."""
        return config.get("quant_method") == self.name

    def unfuse_experts(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The experts of a stack, one by one."""
        return unfuse(entries, {"_blocks": "blocks", "_scales": "scales"})

    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[Scheme, Shape]]:
        """Every module with blocks. Raises Unsupported for shapes that are no MXFP4."""
        modules: dict[str, tuple[Scheme, Shape]] = {}
        for name, blocks in entries.items():
            if name.endswith(".blocks"):
                module = name.removesuffix(".blocks")
                scales = entries.get(f"{module}.scales")
                if (
                    len(blocks.shape) != 3
                    or blocks.shape[2] != 16
                    or scales is None
                    or scales.shape != blocks.shape[:2]
                ):
                    raise Unsupported(
                        f"{module}: {tuple(blocks.shape)} blocks and {scales and tuple(scales.shape)} scales "
                        "are no MXFP4"
                    )
                modules[module] = PACKED.grid, (blocks.shape[0], blocks.shape[1] * 32)
        return modules

    def parts(self, scheme: Scheme, shape: Shape, has: Has) -> dict[str, PartSpec]:
        """Blocks of 16 bytes, and a byte of scale for each."""
        out, groups = shape[0], shape[1] // 32
        return {"blocks": any_of([(out, groups, 16)], [torch.uint8]), "scales": any_of([(out, groups)], [torch.uint8])}

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """As compressed-tensors has the same bytes."""
        return PACKED.unpack(
            {"weight_packed": tensors["blocks"].flatten(1), "weight_scale": tensors["scales"]}, PACKED.grid, shape
        )
