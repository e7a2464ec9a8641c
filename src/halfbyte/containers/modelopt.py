"""Checkpoints of NVIDIA's Model Optimizer (modelopt/torch/export/quant_utils.py; vLLM
model_executor/layers/quantization/modelopt.py). Read, not written: compressed-tensors holds the like, and the same
engines load it.

FP8    weight          float8_e4m3fn [out, in]
       weight_scale    fp32 [], [out] or [ceil(out / 128), 1, ceil(in / 128), 1]; MXFP8: uint8 [out, in / 32],
                    a power of two
NVFP4  weight          uint8 [out, in / 2]: the first of neighbours in the low bits
       weight_scale    float8_e4m3fn [out, in / 16]
       weight_scale_2  fp32 [], which scales are multiplied by
       Fused experts lie as X [experts, out, in / 2] or [experts, in / 2, out], with X_weight_scale and so on.
both   input_scale     fp32 [], where inputs are rounded with a scale that is known
       k_scale, v_scale, k_bias, v_bias: of the KV cache, under k_proj and v_proj
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.containers.compressed.small_floats import unpack
from halfbyte.containers.container import ONE, Config, Has, PartSpec, Reader, any_of, input_parts, inputs_of
from halfbyte.containers.fp8 import FP8, STATIC
from halfbyte.containers.fused import unfuse
from halfbyte.containers.safetensors import Entry
from halfbyte.errors import Unsupported
from halfbyte.grids.activations import ACTIVATION_GRIDS, ActivationGrid, ActivationQuant
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import Quantized, Scheme, WeightActivation
from halfbyte.grids.scalar import NVFP4_FACTOR

NVFP4_INPUTS = ACTIVATION_GRIDS["nvfp4"]
NOT_FOLLOWED = ("pre_quant_scale", "svdquant_lora_a")
"""Parts of a module that change what its weights are multiplied by (AWQ, SVDQuant)."""


class ModelOpt(Reader):
    """FP8, MXFP8 and NVFP4, one beside the other."""

    name = "modelopt"
    foreign_suffixes = (
        "weight",
        "weight_scale",
        "weight_scale_2",
        "input_scale",
        "k_scale",
        "v_scale",
        "k_bias",
        "v_bias",
    )

    def reads(self, config: Config) -> bool:
        """Whether Model Optimizer says that it made the file."""
        producer = config.get("producer")
        return str(config.get("quant_method", "")).startswith(self.name) or (
            isinstance(producer, dict) and producer.get("name") == self.name
        )

    def unfuse_experts(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Fused experts, one by one."""
        return unfuse(
            entries, {"": "weight", **{f"_{part}": part for part in ("weight_scale", "weight_scale_2", "input_scale")}}
        )

    def find(self, config: Config, entries: Mapping[str, Entry]) -> dict[str, tuple[Scheme, Shape]]:
        """FP8 modules as `FP8` finds them, and NVFP4 by its scales. Raises Unsupported for what else Model Optimizer
        has."""
        modules = FP8().find({"activation_scheme": "static"}, entries)
        if fused := next((m for m in modules if re.search(r"\.\d+\.gate_up_proj$", m)), None):
            raise Unsupported(
                f"{fused}: modelopt's fused experts in FP8 are not read, since nothing tells which way they lie; in "
                "NVFP4 they are"
            )
        for name in entries:
            module, _, suffix = name.rpartition(".")
            if suffix in NOT_FOLLOWED:
                raise Unsupported(f"{name}: modelopt's {suffix} is not read; its plain FP8, MXFP8 and NVFP4 are")
            if suffix == "weight_scale" and module not in modules:
                read = _inputs_of_nvfp4(config, module) if f"{module}.input_scale" in entries else None
                modules[module] = (
                    WeightActivation(NVFP4_FACTOR, read) if read else NVFP4_FACTOR,
                    _nvfp4_shape(module, entries),
                )
        return modules

    def parts(self, scheme: Scheme, shape: Shape, has: Has) -> dict[str, PartSpec]:
        """Those of FP8, or NVFP4 weights with scales of groups and of the matrix, either way round."""
        if scheme.weight != NVFP4_FACTOR:
            return FP8().parts(scheme, shape, has)
        out, width = shape
        inputs = (
            {"input_scale": any_of(ONE, [torch.float32])}
            if scheme.activations == NVFP4_INPUTS
            else input_parts(scheme.activations)
        )
        return {
            "weight": any_of(((out, width // 2), (width // 2, out)), [torch.uint8]),
            "weight_scale": any_of(((out, width // 16), (width // 16, out)), [torch.float8_e4m3fn]),
            "weight_scale_2": any_of(ONE, [torch.float32]),
            **inputs,
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, shape: Shape) -> Quantized:
        """FP8, or NVFP4 with a factor in place of the divisor."""
        if scheme.weight != NVFP4_FACTOR:
            return FP8().unpack(tensors, scheme, shape)
        weight, scale = tensors["weight"], tensors["weight_scale"].view(torch.uint8)
        if (
            weight.shape[0] != shape[0] or scale.shape[0] != shape[0]
        ):  # Llama 4's experts and gpt-oss's lie as [in, out]
            weight, scale = weight.T, scale.T.contiguous()
        params = {"scale": scale, "factor": tensors["weight_scale_2"].float().view(1, 1)}
        return Quantized(NVFP4_FACTOR, unpack(weight, 4), params, self.inputs(tensors, scheme.activations))

    def inputs(self, tensors: Mapping[str, Tensor], grid: ActivationGrid | None) -> ActivationQuant | None:
        """The activations' stored scale; of NVFP4 its reciprocal."""
        if grid != NVFP4_INPUTS:
            return inputs_of(tensors, grid)
        return ActivationQuant(
            NVFP4_INPUTS, {"divisor": tensors["input_scale"].float().reciprocal().view(1)}
        )  # engines too divide by the inverse


def _inputs_of_nvfp4(config: Config, module: str) -> ActivationGrid:
    """W4A8 and W4A4 differ in the config alone, which says it for all modules or for each."""
    quantization = config.get("quantization") or config
    layers = quantization.get("quantized_layers") if isinstance(quantization, dict) else None
    layer = layers.get(module, quantization) if isinstance(layers, dict) else quantization
    algorithm = layer.get("quant_algo") if isinstance(layer, dict) else None
    return STATIC if "FP8" in str(algorithm) else NVFP4_INPUTS


def _nvfp4_shape(module: str, entries: Mapping[str, Entry]) -> Shape:
    scale = entries[f"{module}.weight_scale"]
    weight = entries.get(f"{module}.weight", scale)
    if (
        f"{module}.weight_scale_2" in entries
        and weight.dtype == torch.uint8
        and scale.dtype == torch.float8_e4m3fn
        and len(weight.shape) == 2
    ):
        a, b = weight.shape
        if scale.shape == (a, b // 8):
            return a, 2 * b
        if scale.shape == (a // 8, b):
            return b, 2 * a
    raise Unsupported(
        f"{module}: modelopt's {weight.dtype} {tuple(weight.shape)} weights with {scale.dtype} "
        f"{tuple(scale.shape)} scales are not read; "
        "its FP8, MXFP8 and NVFP4 are"
    )
