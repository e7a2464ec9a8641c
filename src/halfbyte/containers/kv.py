"""The KV cache of a checkpoint: which scales of it are stored, and how files say so.

Stored scales are tensors named after the attention, fp32, which the cache's numbers are multiplied by:

model.layers.0.self_attn.k_scale   [1], or [heads, 1, 1]
model.layers.0.self_attn.v_scale

as compressed-tensors and llm-compressor have them, and as vLLM reads them (model_executor/model_loader/weight_utils.py
maybe_remap_kv_scale_name). It reads them under two kinds of `quantization_config`: compressed-tensors, whose
`kv_cache_scheme` turns the cache to FP8 by itself (compressed_tensors.py CompressedTensorsKVCacheMethod;
model_executor/layers/attention), and fp8 (fp8.py Fp8KVCacheMethod), with --kv-cache-dtype fp8.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfbyte.containers.container import Config
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.activations import ActivationQuant, ScaledActivations
from halfbyte.grids.ggml_cache import GGMLCacheGrid
from halfbyte.grids.grid import Params
from halfbyte.grids.kv import KVGrid

STRATEGIES = {"static": "tensor", "head": "attn_head"}
"""Spans of stored scales, as compressed-tensors calls them."""
# compressed-tensors' names, ModelOpt's, and those of compressed-tensors before its version 0.8.
SCALE = re.compile(
    r"(?P<module>.+?)(?:\.[kv]_proj)?\.(?P<part>[kv])_scale|(?P<older>.+)\.(?P<was>[kv])_proj\.output_scale"
)


@dataclass(frozen=True)
class KVCache:
    """A grid and, by module of attention, the parameters that are stored."""

    grid: KVGrid
    keys: Mapping[str, Params] = field(default_factory=dict)
    values: Mapping[str, Params] = field(default_factory=dict)
    latent: bool = False
    """Latent attention (DeepSeek): keys are latents, values the part of keys that has positions, under one scale."""

    def of(self, module: str) -> tuple[ActivationQuant, ActivationQuant]:
        """How this attention's keys and values are rounded."""
        if self.grid.static and module not in self.keys:
            raise BadCheckpoint(f"no scale of the KV cache is stored for {module}; write them with: halfbyte kv")
        return ActivationQuant(self.grid.key, dict(self.keys.get(module, {}))), ActivationQuant(
            self.grid.value, dict(self.values.get(module, {}))
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a file stores."""
        tensors = {}
        for part, modules in (("k", self.keys), ("v", self.values)):
            # Of latent attention, vLLM knows the scales by ModelOpt's names only.
            inside = f"{part}_proj." if self.latent else ""
            tensors.update(
                {f"{module}.{inside}{part}_scale": params["scale"] for module, params in modules.items() if params}
            )
        return dict(sorted(tensors.items()))


def specs(cache: KVCache) -> dict[str, Spec]:
    """What a file says of the scales."""
    return {name: Spec(tuple(scale.shape), scale.dtype) for name, scale in cache.tensors().items()}


def config(existing: Config | None, grid: KVGrid) -> Config:
    """The `quantization_config` of a checkpoint, given a cache; `existing` is what it says now.

    Raises Unsupported where no engine would read the scales.
    """
    method = (existing or {}).get("quant_method")
    if method not in (None, "compressed-tensors", "fp8"):
        raise Unsupported(
            f"engines read scales of a KV cache beside compressed-tensors and fp8, not beside {method}; halfbyte "
            "convert --to compressed-tensors moves weights"
        )
    scheme = _scheme_of(grid)
    if method == "fp8":
        if scheme["strategy"] != "tensor":
            raise Unsupported(
                f"a cache of {grid} is read from compressed-tensors only; beside fp8 weights, fp8-e4m3 is"
            )
        return dict(existing or {})
    empty = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {},
        "ignore": [],
    }
    return {**(existing or empty), "kv_cache_scheme": scheme}


def _scheme_of(grid: KVGrid) -> Config:
    """`kv_cache_scheme` of compressed-tensors (its QuantizationArgs). Raises Unsupported for a cache that engines do
    not read from files."""
    part = grid.key
    if not isinstance(part, ScaledActivations) or not part.static:
        raise Unsupported(
            f"nothing of a cache of {grid} is stored: engines choose it as they start. {served(grid)}; halfbyte eval "
            f"--kv {grid} measures it"
        )
    if part != grid.value:
        raise Unsupported(f"compressed-tensors has one kind of cache for keys and values, not {grid}")
    if part.number != "fp8-e4m3":
        raise Unsupported(
            f"vLLM takes every stored cache for fp8-e4m3, so {grid} would be misread; write fp8-e4m3, or serve with "
            "one found as it runs (int8)"
        )
    return {
        "num_bits": 8,
        "type": "float",
        "strategy": STRATEGIES[str(part.granularity)],
        "symmetric": True,
        "dynamic": False,
    }


SERVED = {
    "fp8-e4m3-static": "vLLM: reads it by itself from compressed-tensors, else --kv-cache-dtype fp8; SGLang: "
    "--kv-cache-dtype fp8_e4m3",
    "fp8-e4m3-head": "vLLM: reads it by itself (FlashAttention 3 has scales of heads)",
    "fp8-e4m3-token": "vLLM: --kv-cache-dtype fp8_per_token_head",
    "int8-token": "vLLM: --kv-cache-dtype int8_per_token_head",
    "int4-token-asym": "vLLM: --kv-cache-dtype int4_per_token_head (which also rotates heads)",
    "int8-g32": "near to it is --kv q8_0, llama.cpp's",
    "int4-g32": "near to it is --kv q4_0, llama.cpp's",
}
"""What an engine is told (vllm config/cache.py CacheDType and v1/kv_cache_interface.py; llama.cpp common/arg.cpp
kv_cache_types)."""
LLAMA_CPP = "with -ctk q8_0 -ctv q8_0 or the like; halfbyte eval --kv q8_0 measures such a cache"


def served(grid: KVGrid) -> str:
    """What to tell an engine, in words."""
    if isinstance(grid.key, GGMLCacheGrid) and isinstance(grid.value, GGMLCacheGrid):
        return f"llama.cpp: -ctk {grid.key} -ctv {grid.value}"
    return SERVED.get(str(grid), "no engine that we know of has it")


def find(config: Config, entries: Mapping[str, Entry]) -> KVCache | None:
    """The cache that a checkpoint says it has."""
    by_part: dict[str, dict[str, Params]] = {"k": {}, "v": {}}
    names = scales(entries)
    for match in filter(None, map(SCALE.fullmatch, names)):
        scale = entries[match[0]].read().float()
        by_part[match["part"] or match["was"]][match["module"] or match["older"]] = {"scale": scale}
    if not by_part["k"] or not by_part["v"]:
        return None
    scheme = config.get("kv_cache_scheme") or {}
    bits, granularity = scheme.get("num_bits", 8), "head" if scheme.get("strategy") == "attn_head" else "static"
    if scheme.get("type", "float") == "float" and bits != 8:
        raise Unsupported(f"a KV cache of floats of {bits} bits is not read; FP8 and integers are")
    part = ScaledActivations("fp8-e4m3" if scheme.get("type", "float") == "float" else f"int{bits}", granularity)
    shape = (-1, 1, 1) if part.granularity == "head" else (-1,)
    shaped = {
        which: {module: {"scale": p["scale"].reshape(shape)} for module, p in modules.items()}
        for which, modules in by_part.items()
    }
    return KVCache(
        KVGrid(part, part), shaped["k"], shaped["v"], latent=any(name.endswith("_proj.k_scale") for name in names)
    )


def scales(entries: Mapping[str, Entry]) -> list[str]:
    """Tensors that belong to a cache and to no weight."""
    return [
        name
        for name, entry in entries.items()
        if SCALE.fullmatch(name) and entry.dtype in (torch.float32, torch.float16, torch.bfloat16)
    ]
