"""load(): any checkpoint that we can read, as a Transformers model that runs."""

from collections.abc import Iterable
from functools import wraps
from math import prod
from pathlib import Path

import torch
from torch import nn

from halfbyte.devices import device_named
from halfbyte.errors import UnknownName
from halfbyte.formats import MULTIPLIED, Activations
from halfbyte.grids.activations import ActivationQuant
from halfbyte.grids.quantized import PackedMatrix
from halfbyte.models import filling, kv, mapping, skeleton
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.matmuls import rounding
from halfbyte.models.precision import DTYPE_NAMES
from halfbyte.models.weight import Weight
from halfbyte.multiplying import multiply_packed
from halfbyte.packed import QuantEmbedding, QuantLinear

RESCALED = {"rwkv"}
"""Models whose code divides the weights of linears in place before they run."""


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    activations: Activations | None = None,
):
    """The model in `dtype`, on `device`. By default the checkpoint's own; a GGUF does not say what its model was
    computed in, and is loaded in bfloat16: hidden states of Gemma are beyond float16.

    Linears and embeddings that are quantized stay packed, on every device; fused experts, transposed matrices, linears
    whose class does more than multiply (routers) and what a model changes before it looks at it (embeddings with a
    `max_norm`, linears of RWKV) are decoded. A KV cache that is quantized holds the values that an engine would read
    from it, in 16 bits.

    Weights are decoded for each product, which is the reference; with `activations`, they are multiplied by as they are
    packed, on CPUs and on GPUs since Ampere that Triton has kernels for: by "exact" activations, or on CPUs by ones
    that are rounded to "int8" in groups of 32, as llama.cpp does, which is faster and loses a little.
    Raises HalfbyteError.
    """
    if activations is not None and activations not in MULTIPLIED:
        raise UnknownName("way to take activations", activations, MULTIPLIED)
    where = device_named(str(device))
    if isinstance(dtype, str) and dtype not in DTYPE_NAMES:
        raise UnknownName("dtype", dtype, DTYPE_NAMES)
    checkpoint = Checkpoint.open(path)
    model = built(checkpoint, (DTYPE_NAMES[dtype] if isinstance(dtype, str) else dtype), where)
    if activations:
        multiply_packed(model, activations)
    return model


def built(checkpoint: Checkpoint, dtype: torch.dtype | None, where: torch.device):
    """The same of a checkpoint that is open, with the adapter and the cache that it has."""
    dtype = dtype or checkpoint.unquantized_dtype
    model = skeleton.build(checkpoint, dtype)
    weight_map = mapping.places(model, checkpoint.tensors())
    ties = filling.ties(model, weight_map)
    names = filling.inside(model, "")
    filling.require_whole(model, checkpoint, weight_map, names)
    packed = _packed(model, checkpoint, weight_map)
    for tensor, home in packed.items():
        tied = (name.removesuffix(".weight") for name, source in ties.items() if source == f"{home}.weight")
        _replace(model, (home, *tied), checkpoint.read_packed(tensor.removesuffix(".weight")), dtype)
    filling.load(model, checkpoint, weight_map, ties, names, where)
    nn.Module.to(model, where)
    decoded = {
        w: inputs
        for w in checkpoint.weights()
        if f"{w.name}.weight" not in packed and w.tensor in weight_map and (inputs := checkpoint.read_inputs(w.name))
    }
    if decoded:
        _round_inputs(model, checkpoint, weight_map, decoded)
    if checkpoint.kv:
        kv.apply(model, weight_map, checkpoint.kv, where)
    return model


def _replace(model: nn.Module, names: Iterable[str], matrix: PackedMatrix, dtype: torch.dtype) -> None:
    """Modules that share a matrix: one for all linears of the same bias, and one for each embedding."""
    made: dict[int, nn.Module] = {}
    for name in names:
        before = model.get_submodule(name)
        if isinstance(before, nn.Linear):
            model.set_submodule(name, made.setdefault(id(before.bias), QuantLinear(matrix, before.bias, dtype)))
        elif isinstance(before, nn.Embedding) and not isinstance(before, QuantEmbedding):
            model.set_submodule(name, made.setdefault(id(before), QuantEmbedding.of(before, matrix, dtype)))


def loaded_sizes(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each weight of a model that is loaded: as it lies in the file, or decoded where it does not stay so."""
    model, shapes = skeleton.build(checkpoint, dtype), checkpoint.tensors()
    packed = _packed(model, checkpoint, mapping.places(model, shapes))
    return {
        name: sum(checkpoint.entries[part].size_bytes for part in checkpoint.parts_of[name.removesuffix(".weight")])
        if name in packed
        else prod(shape) * dtype.itemsize
        for name, shape in shapes.items()
    }


def schemes(checkpoint: Checkpoint) -> dict[str, str]:
    """What modules of the model are stored as, those that are quantized."""
    model = skeleton.build(checkpoint, checkpoint.unquantized_dtype)
    weight_map = mapping.places(model, checkpoint.tensors())
    stored = {
        view.parameter: str(scheme)
        for module, (scheme, _) in checkpoint.quantized.items()
        if (view := weight_map.get(f"{module}.weight"))
    }
    tied = {name: stored[home] for name, home in filling.ties(model, weight_map).items() if home in stored}
    return {name.removesuffix(".weight"): scheme for name, scheme in (stored | tied).items()}


def loaded_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """The same of all of them together."""
    return sum(loaded_sizes(checkpoint, dtype).values())


def _packed(model: nn.Module, checkpoint: Checkpoint, weight_map: dict[str, mapping.ParamView]) -> dict[str, str]:
    """Tensors that stay packed, and the linears and embeddings that take them."""
    packed: dict[str, str] = {}
    for module in checkpoint.quantized if checkpoint.model_type not in RESCALED else ():
        view = weight_map.get(f"{module}.weight")
        if view and view.expert is None and not view.transposed:
            home = view.parameter.removesuffix(".weight")
            submodule, shape = model.get_submodule(home), checkpoint.quantized[module][1]
            looks_up = isinstance(submodule, nn.Embedding) and submodule.max_norm is None
            multiplies = isinstance(submodule, nn.Linear) and type(submodule).forward is nn.Linear.forward
            if (multiplies or looks_up) and submodule.weight.shape == shape:
                packed[f"{module}.weight"] = home
    return packed


def _round_inputs(
    model: nn.Module,
    checkpoint: Checkpoint,
    weight_map: dict[str, mapping.ParamView],
    inputs: dict[Weight, ActivationQuant],
) -> None:
    """Have the model round what matrices read that are no QuantLinear."""
    shapes = checkpoint.tensors()
    views = {
        w: weight_map[w.tensor].view(filling.tensor(model, weight_map[w.tensor].parameter), shapes[w.tensor])
        for w in inputs
    }
    forward = model.forward

    @wraps(forward)
    def rounded(*args, **kwargs):
        with rounding(views, inputs):
            return forward(*args, **kwargs)

    model.forward = rounded
