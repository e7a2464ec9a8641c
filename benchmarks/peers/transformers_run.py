"""Peers' linears in Transformers, as their users load them: classes that processes of `halfbyte bench` run."""

import torch
from transformers import AutoModelForCausalLM

from halfbyte.inference.timing.in_transformers import InTransformers


class StockTransformers(InTransformers):
    """A folder as Transformers loads it by itself: in 16 bits, or with the package that its config names."""

    def load(self, path: str, activations: str) -> dict[str, str]:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        return {}


class TorchAo(StockTransformers):
    """A folder in 16 bits, whose blocks torchao quantizes to 4 bits as its CPU kernel wants them; 0.18 has that among
    its prototypes."""

    def load(self, path: str, activations: str) -> dict[str, str]:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_

        super().load(path, activations)
        quantize_(
            self.model,
            PrototypeInt4WeightOnlyConfig(group_size=64),
            lambda module, name: isinstance(module, torch.nn.Linear) and "lm_head" not in name,
        )
        return {}
