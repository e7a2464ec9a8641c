"""What a GGUF says of a model beside its tensors: general.* and {architecture}.*, out of config.json.

Keys and types as in ggml's docs/gguf.md and gguf-py's constants.py, chosen as llama.cpp's conversion/base.py does.
"""

from collections.abc import Callable, Mapping
from math import log, sqrt
from pathlib import Path
from typing import Any

from halfbyte.containers.gguf.families import Family, head_dim, rope_of, settings
from halfbyte.containers.gguf.file import Value

QUANTIZATION_VERSION = 2
"""Of ggml's block formats: GGML_QNT_VERSION."""

Source = str | Callable[[Any], Any]


def _inner(s: Any) -> int:
    """GPT-2 and Falcon leave it to 4 times the width."""
    names = ("intermediate_size", "n_inner", "ffn_hidden_size")
    return next((getattr(s, name) for name in names if getattr(s, name, None)), 4 * s.hidden_size)


def _key_value_heads(s: Any) -> int:
    if s.model_type == "falcon":
        return s.num_kv_heads if s.new_decoder_architecture else 1 if s.multi_query else s.num_attention_heads
    return getattr(s, "num_key_value_heads", None) or s.num_attention_heads


def _rotated(s: Any) -> int | None:
    """In-features of a head that are rotated; None for a family without rotary embeddings."""
    rope = rope_of(s)
    return int(head_dim(s) * rope.get("partial_rotary_factor", 1.0)) if rope else None


def _rope(name: str, of: tuple[str, ...] = ()) -> Source:
    """A rotary parameter; `of`: only where the scaling is one of these."""
    return lambda s: rope_of(s).get(name) if not of or rope_of(s).get("rope_type") in of else None


def _rope_scaling(s: Any) -> str | None:
    kind = rope_of(s).get("rope_type")
    return kind if kind in ("linear", "yarn", "longrope") else None


def _attention_factor(s: Any) -> float | None:
    """What longrope multiplies sine and cosine with."""
    rope = rope_of(s)
    if rope.get("rope_type") != "longrope":
        return None
    known, stretch = rope["original_max_position_embeddings"], s.max_position_embeddings / rope["original_max_position_embeddings"]
    return rope.get("attention_factor") or (sqrt(1 + log(stretch) / log(known)) if stretch > 1 else 1.0)


def _sliding_layers(s: Any) -> list[bool] | None:
    layers = getattr(s, "layer_types", None) or []
    return [kind == "sliding_attention" for kind in layers] if "sliding_attention" in layers else None


def _window(s: Any) -> int | None:
    """Only families with full and sliding layers by turns: llama.cpp has no window in the others, nor have their later models."""
    return s.sliding_window if _sliding_layers(s) else None


KEYS: dict[str, tuple[str, Source]] = {
    "block_count": ("uint32", "num_hidden_layers"),
    "context_length": ("uint32", lambda s: getattr(s, "max_position_embeddings", None) or 2048),  # Falcon's old configs do not say
    "embedding_length": ("uint32", "hidden_size"),
    "feed_forward_length": ("uint32", _inner),
    "vocab_size": ("uint32", "vocab_size"),
    "use_parallel_residual": ("bool", "use_parallel_residual"),
    "attention.head_count": ("uint32", "num_attention_heads"),
    "attention.head_count_kv": ("uint32", _key_value_heads),
    "attention.key_length": ("uint32", head_dim),
    "attention.value_length": ("uint32", head_dim),
    "attention.layer_norm_rms_epsilon": ("float32", "rms_norm_eps"),
    "attention.layer_norm_epsilon": (
        "float32",
        lambda s: next((getattr(s, n) for n in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon") if hasattr(s, n)), None),
    ),
    "attention.clamp_kqv": ("float32", "clip_qkv"),
    "attention.sliding_window": ("uint32", _window),
    "attention.sliding_window_pattern": ("bool", _sliding_layers),
    "attention.scale": ("float32", "attention_multiplier"),
    "embedding_scale": ("float32", "embedding_multiplier"),
    "residual_scale": ("float32", "residual_multiplier"),
    "logit_scale": ("float32", lambda s: getattr(s, "logits_scaling", None) or getattr(s, "logit_scale", None)),
    "attn_logit_softcapping": ("float32", "attn_logit_softcapping"),
    "final_logit_softcapping": ("float32", "final_logit_softcapping"),
    "rope.dimension_count": ("uint32", _rotated),
    "rope.freq_base": ("float32", _rope("rope_theta")),
    "rope.freq_base_swa": ("float32", lambda s: (getattr(s, "rope_parameters", None) or {}).get("sliding_attention", {}).get("rope_theta")),
    "rope.scaling.type": ("string", _rope_scaling),
    "rope.scaling.factor": ("float32", _rope("factor", ("linear", "yarn"))),
    "rope.scaling.original_context_length": ("uint32", _rope("original_max_position_embeddings", ("yarn", "longrope"))),
    "rope.scaling.attn_factor": ("float32", _attention_factor),
    "rope.scaling.yarn_ext_factor": ("float32", _rope("extrapolation_factor", ("yarn",))),
    "rope.scaling.yarn_attn_factor": ("float32", _rope("attention_factor", ("yarn",))),
    "rope.scaling.yarn_beta_fast": ("float32", _rope("beta_fast", ("yarn",))),
    "rope.scaling.yarn_beta_slow": ("float32", _rope("beta_slow", ("yarn",))),
    "expert_count": ("uint32", lambda s: getattr(s, "num_local_experts", None) or getattr(s, "num_experts", None)),
    "expert_used_count": ("uint32", "num_experts_per_tok"),
    "expert_feed_forward_length": ("uint32", "moe_intermediate_size"),
    "expert_shared_feed_forward_length": ("uint32", "shared_expert_intermediate_size"),
}
"""Key without the architecture: type, and the config's name or function of it. What the config lacks is not written."""


def metadata(config: Mapping[str, Any], family: Family, folder: Path) -> dict[str, Value]:
    """Every key but `general.file_type` and the tokenizer's; `folder` is the checkpoint's, and gives the model its name."""
    s = settings(config)
    said = {
        "general.architecture": Value("string", family.arch),
        "general.type": Value("string", "model"),
        "general.name": Value("string", folder.resolve().name),
        "general.quantization_version": Value("uint32", QUANTIZATION_VERSION),
    }
    for key, (kind, source) in KEYS.items():
        value = source(s) if callable(source) else getattr(s, source, None)
        if value is not None:
            said[f"{family.arch}.{key}"] = Value(f"{kind}[]", value) if isinstance(value, list) else Value(kind, float(value) if kind == "float32" else value)
    return said
