"""What of a config.json is used, looked at once: types, and sizes that no model has but that somebody's memory would be
taken for."""

from collections.abc import Mapping
from typing import Any

from halfbyte.errors import BadCheckpoint, brief

SIZES: dict[str, int] = {
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "num_decoder_layers",
            "encoder_layers",
            "decoder_layers",
            "depth",
        ),
        1 << 10,
    ),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 1 << 20),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 1 << 14),
    **dict.fromkeys(("vocab_size", "max_seq_len", "n_positions"), 1 << 24),
    "max_position_embeddings": 1 << 32,
}
"""The most that each may be, some ten times what the largest model has."""
LISTS: dict[str, int] = {
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads"), 1 << 14),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
        1 << 22,
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), 1 << 13),
}
"""Likewise; of some models a list, with one for each layer."""
NUMBERS = (
    "rope_theta",
    "partial_rotary_factor",
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_epsilon",
)
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(NUMBERS, (int, float)),
    **dict.fromkeys(
        ("text_config", "quantization_config", "rope_scaling", "rope_parameters", "kv_cache_scheme"), (dict,)
    ),
    **dict.fromkeys(("architectures", "layer_types"), (list,)),
    "model_type": (str,),
    "dtype": (str, dict),
    "torch_dtype": (str, dict),
    "tie_word_embeddings": (bool,),
}
NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


def require_sound(config: Mapping[str, Any], source: object) -> None:
    """Raise BadCheckpoint, naming the entry, for what is of another type or beyond any model. What is null is not
    there."""
    for name, value in config.items():
        if name in SIZES and value is not None and not _is_size(value, SIZES[name]):
            raise BadCheckpoint(f"{source}: {name} is {brief(value)}, which should be a number up to {SIZES[name]}")
        if (
            name in LISTS
            and value is not None
            and not all(_is_size(v, LISTS[name]) for v in (value if isinstance(value, list) else [value]))
        ):
            raise BadCheckpoint(f"{source}: {name} is {brief(value)}, which should be a number up to {LISTS[name]}")
        if name in TYPES and value is not None and type(value) not in TYPES[name]:
            raise BadCheckpoint(f"{source}: {name} should be {NAMES[TYPES[name][0]]}, not {brief(value)}")
        if type(value) is int and abs(value) >= 1 << 63:
            raise BadCheckpoint(f"{source}: {brief(name)} is a number of more than 64 bits")
        if isinstance(value, dict):
            require_sound(value, source)
    if any(not isinstance(name, str) for name in config.get("architectures") or []):
        raise BadCheckpoint(f"{source}: architectures is no list of names")


def _is_size(value: object, most: int) -> bool:
    return type(value) is int and 0 <= value <= most
