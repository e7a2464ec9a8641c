"""A decoder's config with every default in place.

Transformers knows the defaults, but takes two seconds to import. The config.json of most dense models leaves little
open, and a table says what that means.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from halfbyte.errors import BadCheckpoint
from halfbyte.targets.gguf.entries import IDLE, SAID

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
COMMON = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
RMS = {**COMMON, "rms_norm_eps": 1e-6}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": RMS,
    "mistral": {**RMS, "num_key_value_heads": 8},
    "granite": {
        **RMS,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
    },
    "qwen2": {**RMS, "num_key_value_heads": 32, "use_sliding_window": False},
    "qwen3": {**RMS, "num_key_value_heads": 32, "use_sliding_window": False, "head_dim": 128, "attention_bias": False},
    "gemma": {
        **RMS,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_bidirectional_attention": None,
    },
    "olmo2": {**RMS, "rms_norm_eps": 1e-5, "attention_bias": False},
    "cohere": {
        **COMMON,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "use_qk_norm": False,
        "tie_word_embeddings": True,
        "rope_theta": 500000.0,
        "attention_bias": False,
    },
}
"""What it means that config.json lacks a name, by `model_type`: families for which Transformers derives nothing else
that a GGUF says."""
ROPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""What each kind of rotary scaling cannot do without."""
UNCOMMON = ("partial_rotary_factor", "per_layer_config")


def settings(config: Mapping[str, Any]) -> Any:
    """The decoder's config as Transformers reads it: every default in place, rotary embeddings in `rope_parameters`.

    Raises BadCheckpoint for a config.json that Transformers refuses.
    """
    text = dict(config.get("text_config") or config)
    return from_table(text) or from_transformers(text)


def from_table(config: Mapping[str, Any]) -> SimpleNamespace | None:
    """None where it takes Transformers to know or to refuse: a family that is in no row, another entry, a size that is
    left out, a value of another kind."""
    defaults = DEFAULTS.get(config.get("model_type", ""))
    recognised = {*(defaults or ()), *SIZES} | SAID | IDLE
    if (
        defaults is None
        or not recognised.issuperset(config)
        or any(name in config for name in UNCOMMON)
        or not all(type(config.get(name)) is int and config[name] > 0 for name in SIZES)
    ):
        return None
    s = SimpleNamespace(**{**defaults, **config})
    usual = all(_alike(getattr(s, name), default) for name, default in defaults.items())
    even = s.hidden_size % s.num_attention_heads == 0 and (s.head_dim or 0) % 2 == 0
    rope = _rope(config.get("rope_scaling") or config.get("rope_parameters") or {}, s.rope_theta)
    if (
        not usual
        or not even
        or rope is None
        or config.get("layer_types") not in (None, ["full_attention"] * s.num_hidden_layers)
    ):
        return None
    s.rope_parameters, s.num_key_value_heads = rope, s.num_key_value_heads or s.num_attention_heads
    return s


def from_transformers(config: Mapping[str, Any]) -> Any:
    """What Transformers makes of a decoder's config, of any family. Raises BadCheckpoint for one that it refuses."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    kind, text = config.get("model_type", ""), {name: value for name, value in config.items() if name != "model_type"}
    try:
        return transformers.AutoConfig.for_model(kind, **text).get_text_config(decoder=True)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise BadCheckpoint(
            f"Transformers {transformers.__version__} cannot read the config of '{kind}': "
            f"{' '.join(str(error).split())}"
        ) from None


def _alike(value: Any, default: Any) -> bool:
    return type(value) in {type(None): (type(None), int), float: (float, int)}.get(type(default), (type(default),))


def _rope(scaling: Any, base: Any) -> dict[str, Any] | None:
    """`rope_parameters`, out of what a config says in place of it; None for scaling of another kind, or one that lacks
    something."""
    if not isinstance(scaling, dict) or "partial_rotary_factor" in scaling:
        return None
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    rope = {"rope_theta": base, **scaling, "rope_type": kind}
    numbers = (rope["rope_theta"], *(scaling.get(name) for name in ROPES.get(kind, ())))
    return rope if kind in ROPES and all(type(number) in (int, float) for number in numbers) else None
