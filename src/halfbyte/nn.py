"""load(): any checkpoint that we can read, as a Transformers model that runs."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from halfbyte.grids.grid import Quantized
from halfbyte.models import kv, skeleton
from halfbyte.models.checkpoint import Checkpoint


class QuantLinear(nn.Module):
    """A linear whose weight stays on its grid; the reference: decode, then multiply."""

    codes: Tensor

    def __init__(self, q: Quantized, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.grid, self.dtype, self.names = q.grid, dtype, list(q.params)
        self.register_buffer("codes", q.codes)
        for name, value in q.params.items():
            self.register_buffer(name, value)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        w = self.grid.decode(self.codes, {name: getattr(self, name) for name in self.names})
        return functional.linear(x, w.to(self.dtype), self.bias)


def load(path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"):
    """The model in `dtype` (the checkpoint's own by default), on `device`.

    Linears that are quantized stay so in memory; fused experts and transposed matrices are decoded. A KV cache that is quantized
    holds the values that an engine would read from it, in 16 bits.
    """
    checkpoint = Checkpoint.open(path)
    dtype = dtype or checkpoint.dtype
    model = skeleton.build(checkpoint, dtype)
    places = skeleton.places(model, checkpoint.tensors())
    skeleton.require_whole(model, checkpoint, places)
    packed: dict[str, str] = {}
    for module in checkpoint.quantized:
        place = places.get(f"{module}.weight")
        if place and place.expert is None and not place.transposed:
            home = place.parameter.removesuffix(".weight")
            if isinstance(model.get_submodule(home), nn.Linear) and model.get_parameter(place.parameter).shape == checkpoint.quantized[module][1]:
                packed[f"{module}.weight"] = home
    for tensor, home in packed.items():
        q, bias = checkpoint.read_quantized(tensor.removesuffix(".weight")), model.get_submodule(home).bias
        bias = torch.empty_like(bias, device=device) if isinstance(bias, Tensor) else None
        model.set_submodule(home, QuantLinear(q, bias, dtype))
    skeleton.materialize(model, device)
    skeleton.fill(model, checkpoint, places, [t for t in places if t not in packed], device)
    model.tie_weights()
    if checkpoint.kv:
        kv.apply(model, places, checkpoint.kv)
    return model
