"""What a GGUF says of a model beside its tensors: general.* and {architecture}.*, out of config.json, and back into
one.

Keys and types as in ggml's docs/gguf.md and gguf-py's constants.py, chosen as llama.cpp's conversion/base.py does.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from math import log, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.targets.gguf.families import Family, family_named, head_dim, llama3_factors, lost_window, rope_of
from halfbyte.targets.gguf.head import Value
from halfbyte.targets.gguf.settings import settings

QUANTIZATION_VERSION = gguf.GGML_QUANT_VERSION
"""Of ggml's block formats: GGML_QNT_VERSION."""

INNER = ("intermediate_size", "n_inner", "ffn_hidden_size")


def _inner(s: Any) -> int:
    """GPT-2 and Falcon leave it to 4 times the width."""
    return _first(s, INNER) or 4 * s.hidden_size


def _expert_inner(s: Any) -> int | None:
    return s.intermediate_size if s.model_type == "gpt_oss" else getattr(s, "moe_intermediate_size", None)


def _key_value_heads(s: Any) -> int:
    if s.model_type == "falcon":
        return s.num_kv_heads if s.new_decoder_architecture else 1 if s.multi_query else s.num_attention_heads
    return getattr(s, "num_key_value_heads", None) or s.num_attention_heads


def _rotated(s: Any) -> int | None:
    """In-features of a head that are rotated; None for a family without rotary embeddings."""
    rope = rope_of(s)
    return int(head_dim(s) * rope.get("partial_rotary_factor", 1.0)) if rope else None


def _rope(name: str, of: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """A rotary parameter; `of`: only where the scaling is one of these."""
    return lambda s: rope_of(s).get(name) if not of or rope_of(s).get("rope_type") in of else None


def _rope_scaling(s: Any) -> str | None:
    kind = rope_of(s).get("rope_type")
    return kind if kind in ("linear", "yarn", "longrope") else None


def _stretch(s: Any) -> float | None:
    """By how much the context is longer than the one that was trained first."""
    rope = rope_of(s)
    original = rope.get("original_max_position_embeddings")
    return rope.get("factor") or (s.max_position_embeddings / original if original else None)


def _yarn_factor(stretch: float, share: float = 1.0) -> float:
    """What YaRN multiplies sine and cosine with by default."""
    return 0.1 * share * log(stretch) + 1 if stretch > 1 else 1.0


def _attention_factor(s: Any) -> float | None:
    """What llama.cpp multiplies sine and cosine with, beside what it does by itself: all of it for longrope, the rest
    for yarn."""
    rope, stretch = rope_of(s), _stretch(s)
    given, shares = (
        rope.get("attention_factor"),
        [share for name in ("mscale", "mscale_all_dim") if (share := rope.get(name))],
    )
    if rope.get("rope_type") == "longrope" and stretch:
        return given or (sqrt(1 + log(stretch) / log(rope["original_max_position_embeddings"])) if stretch > 1 else 1.0)
    if rope.get("rope_type") == "yarn" and stretch and (given is not None or len(shares) == 2):
        wanted = given if given is not None else _yarn_factor(stretch, shares[0]) / _yarn_factor(stretch, shares[1])
        return wanted / _yarn_factor(stretch)
    return None


def _sliding_layers(s: Any) -> list[bool] | None:
    layers = getattr(s, "layer_types", None) or []
    return [kind == "sliding_attention" for kind in layers] if "sliding_attention" in layers else None


def _window(s: Any) -> int | None:
    """Only families with full and sliding layers by turns: llama.cpp has no window in the others, nor have their later
    models."""
    return s.sliding_window if _sliding_layers(s) else None


def _context(s: Any) -> int:
    """As far as llama.cpp computes what the model does; Falcon's config may not say how far that goes."""
    longest = getattr(s, "max_position_embeddings", None) or 2048
    return min(longest, lost_window(s) or longest)


class Key(NamedTuple):
    """A value of {architecture}.*."""

    type: str
    names: tuple[str, ...] = ()
    """What configs call it, for reading; for writing too, the first that a config has, unless there is `of`."""
    of: Callable[[Any], Any] | None = None


KEYS: dict[str, Key] = {
    "block_count": Key("uint32", ("num_hidden_layers",)),
    "context_length": Key("uint32", ("max_position_embeddings",), _context),
    "embedding_length": Key("uint32", ("hidden_size",)),
    "feed_forward_length": Key("uint32", INNER, _inner),
    "vocab_size": Key("uint32", ("vocab_size",)),
    "use_parallel_residual": Key("bool", ("use_parallel_residual",)),
    "attention.head_count": Key("uint32", ("num_attention_heads",)),
    "attention.head_count_kv": Key("uint32", ("num_key_value_heads", "num_kv_heads"), _key_value_heads),
    "attention.key_length": Key("uint32", ("head_dim",), head_dim),
    "attention.value_length": Key("uint32", (), head_dim),
    "attention.layer_norm_rms_epsilon": Key("float32", ("rms_norm_eps",)),
    "attention.layer_norm_epsilon": Key("float32", ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")),
    "attention.sliding_window": Key("uint32", ("sliding_window",), _window),
    "attention.sliding_window_pattern": Key("bool", (), _sliding_layers),
    "attention.scale": Key("float32", ("attention_multiplier",)),
    "embedding_scale": Key("float32", ("embedding_multiplier",)),
    "residual_scale": Key("float32", ("residual_multiplier",)),
    "logit_scale": Key("float32", ("logits_scaling", "logit_scale")),
    "attn_logit_softcapping": Key("float32", ("attn_logit_softcapping",)),
    "final_logit_softcapping": Key("float32", ("final_logit_softcapping",)),
    "rope.dimension_count": Key("uint32", (), _rotated),
    "rope.freq_base": Key("float32", (), _rope("rope_theta")),
    "rope.freq_base_swa": Key(
        "float32",
        (),
        lambda s: (getattr(s, "rope_parameters", None) or {}).get("sliding_attention", {}).get("rope_theta"),
    ),
    "rope.scaling.type": Key("string", (), _rope_scaling),
    "rope.scaling.factor": Key(
        "float32", (), lambda s: _stretch(s) if _rope_scaling(s) in ("linear", "yarn") else None
    ),
    "rope.scaling.original_context_length": Key(
        "uint32", (), _rope("original_max_position_embeddings", ("yarn", "longrope"))
    ),
    "rope.scaling.attn_factor": Key("float32", (), _attention_factor),
    "rope.scaling.yarn_beta_fast": Key("float32", (), _rope("beta_fast", ("yarn",))),
    "rope.scaling.yarn_beta_slow": Key("float32", (), _rope("beta_slow", ("yarn",))),
    "expert_count": Key("uint32", ("num_local_experts", "num_experts")),
    "expert_used_count": Key("uint32", ("num_experts_per_tok",)),
    "expert_feed_forward_length": Key("uint32", ("moe_intermediate_size",), _expert_inner),
    "expert_shared_feed_forward_length": Key("uint32", ("shared_expert_intermediate_size",)),
}

SAME = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
"""Keys that may be a list, with the same number for each layer: no family here has layers of different sizes."""
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
BIASES = {"attention_bias": "attn_q", "use_qkv_bias": "attn_q", "mlp_bias": "ffn_up"}
"""What configs say of biases, and the tensor of the first block that has one then."""


def metadata(config: Mapping[str, Any], family: Family, folder: Path) -> dict[str, Value]:
    """Every key but `general.file_type` and the tokenizer's; `folder` is the checkpoint's, and gives the model its
    name."""
    s = settings(config)
    entries = {
        "general.architecture": Value("string", family.arch),
        "general.type": Value("string", "model"),
        "general.name": Value("string", folder.resolve().name),
        "general.quantization_version": Value("uint32", QUANTIZATION_VERSION),
    }
    for name, key in KEYS.items():
        value: Any = key.of(s) if key.of else _first(s, key.names)
        if isinstance(value, list):
            entries[f"{family.arch}.{name}"] = Value(f"{key.type}[]", value)
        elif value is not None:
            entries[f"{family.arch}.{name}"] = Value(key.type, float(value) if key.type == "float32" else value)
    return entries


def remarks(config: Mapping[str, Any]) -> list[str]:
    """What is to be said of how llama.cpp computes a model of this config."""
    s = settings(config)
    rope, window = rope_of(s), lost_window(s)
    original = rope.get("original_max_position_embeddings")
    notes = []
    if window and window < s.max_position_embeddings:
        notes.append(
            f"every layer attends to the last {window} tokens, which llama.cpp does not do for '{s.model_type}': the "
            f"GGUF says a context of {window} "
            f"tokens in place of {s.max_position_embeddings}, up to which both compute the same"
        )
    if rope.get("rope_type") == "yarn" and rope.get("truncate") is False:
        notes.append(
            "llama.cpp rounds the limits between which YaRN stretches to whole pairs of in-features, which this "
            "model does not: long texts differ a little"
        )
    if rope.get("rope_type") == "longrope":
        notes.append(
            f"llama.cpp takes the rotary factors for long texts wherever its context (-c) is above {original}, "
            "Transformers where the text is that long"
        )
    return notes


def config(metadata: Mapping[str, Value], tensors: Mapping[str, Shape], rope: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config.json of a GGUF that has none beside it; what a GGUF does not say is Transformers' default for the
    family.

    `tensors` are the file's; `rope` those of them that are called rope_*, with their values. Raises Unsupported for an
    architecture that is in no row, or a variant that Transformers cannot be told.
    """
    import transformers

    arch = str(metadata["general.architecture"].value)
    hparams = _hparams(metadata, arch)
    kind, family = family_named(arch, hparams.get("expert_count", 0), "attention.sliding_window" in hparams)
    default = transformers.AutoConfig.for_model(kind)
    fields = {*default.to_dict(), *default.attribute_map}
    entries = {**_assumed(family), **dict(_translated(hparams, fields))}
    width = _head_width(hparams, entries)
    if "head_dim" in fields or width != entries["hidden_size"] // entries["num_attention_heads"]:
        entries["head_dim"] = width
    entries.setdefault("vocab_size", tensors["token_embd.weight"][0])
    entries |= {
        name: f"blk.0.{base}.bias" in tensors
        for name, base in BIASES.items()
        if name in fields and name not in family.assumed
    }
    entries["tie_word_embeddings"] = "output.weight" not in tensors
    if kind == "falcon":
        entries |= _falcon(entries, "blk.0.attn_norm_2.weight" in tensors)
    if pattern := hparams.get("attention.sliding_window_pattern"):
        entries["layer_types"] = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
    if getattr(default, "rope_parameters", None):
        entries["rope_parameters"] = _rope_parameters(hparams, rope, width, "full_attention" in default.rope_parameters)
        if hparams.get("rope.scaling.type") == "longrope":
            entries["original_max_position_embeddings"] = hparams["rope.scaling.original_context_length"]
    entries |= _special_tokens(metadata)
    s = settings({"model_type": kind, **entries})
    entries |= {name: value(s) for name, value in family.assumed.items() if callable(value) and name in fields}
    names = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {"architectures": [names[kind]], "model_type": kind, **entries}


def _hparams(metadata: Mapping[str, Value], arch: str) -> dict[str, Any]:
    """What is said of the architecture, without its name; of lists that all layers share, the value."""
    hparams: dict[str, Any] = {
        name.removeprefix(f"{arch}."): value.value for name, value in metadata.items() if name.startswith(f"{arch}.")
    }
    hparams = {name: _shortest(value) if isinstance(value, float) else value for name, value in hparams.items()}
    return hparams | {name: hparams[name][0] for name in SAME if isinstance(hparams.get(name), list)}


def _assumed(family: Family) -> dict[str, Any]:
    """What llama.cpp computes with whatever a file says, where that follows from nothing else."""
    return {
        name: value[0] if isinstance(value, tuple) else value
        for name, value in family.assumed.items()
        if not callable(value)
    }


def _translated(hparams: Mapping[str, Any], fields: Collection[str]) -> Iterator[tuple[str, Any]]:
    """What is said, by the config's names, of which `fields` are the family's."""
    for name, key in KEYS.items():
        called = next((n for n in key.names if n in fields), None)
        if called and name in hparams:
            yield called, hparams[name]


def _head_width(hparams: Mapping[str, Any], entries: Mapping[str, Any]) -> int:
    """In-features of an attention's head. Raises BadCheckpoint."""
    width = hparams.get("attention.key_length", entries["hidden_size"] // entries["num_attention_heads"])
    if width < 1:
        raise BadCheckpoint(f"the GGUF says that a head of attention is {width} wide")
    return width


def _special_tokens(metadata: Mapping[str, Value]) -> dict[str, Any]:
    """Their numbers."""
    stored = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL_TOKENS.items()}
    return {f"{name}_token_id": number.value if number else None for name, number in stored.items()}


def _falcon(entries: Mapping[str, Any], two_norms: bool) -> dict[str, Any]:
    """Which of its layers it has: the new ones have groups of heads, and one or two norms before attention and MLP."""
    grouped = two_norms or 1 < entries["num_kv_heads"] < entries["num_attention_heads"]
    norms = {"num_ln_in_parallel_attn": 2 if two_norms else 1} if grouped else {}
    return {"new_decoder_architecture": grouped, "multi_query": entries["num_kv_heads"] == 1, **norms}


def _rope_parameters(
    hparams: Mapping[str, Any], rope: Mapping[str, Tensor], width: int, by_layers: bool
) -> dict[str, Any]:
    """`rope_parameters` as Transformers has them."""
    parameters: dict[str, Any] = {
        "rope_theta": hparams.get("rope.freq_base", 10000.0),
        "rope_type": hparams.get("rope.scaling.type", "default"),
    }
    if parameters["rope_type"] in ("none", "linear") and not hparams.get("rope.scaling.factor"):
        parameters["rope_type"] = "default"
    if hparams.get("rope.dimension_count", width) != width:
        parameters["partial_rotary_factor"] = hparams["rope.dimension_count"] / width
    if "rope_freqs.weight" in rope:
        parameters |= _llama3(rope["rope_freqs.weight"], parameters["rope_theta"], width)
    elif parameters["rope_type"] in ("linear", "yarn"):
        parameters["factor"] = hparams["rope.scaling.factor"]
    if parameters["rope_type"] == "longrope":
        parameters |= {f"{kind}_factor": rope[f"rope_factors_{kind}.weight"].tolist() for kind in ("long", "short")}
        if "rope.scaling.attn_factor" in hparams:
            parameters["attention_factor"] = hparams["rope.scaling.attn_factor"]
    if parameters["rope_type"] in ("yarn", "longrope"):
        parameters["original_max_position_embeddings"] = hparams["rope.scaling.original_context_length"]
    if parameters["rope_type"] == "yarn":
        parameters |= {
            name: hparams[f"rope.scaling.yarn_{name}"]
            for name in ("beta_fast", "beta_slow")
            if f"rope.scaling.yarn_{name}" in hparams
        }
        if "rope.scaling.attn_factor" in hparams:
            parameters["attention_factor"] = hparams["rope.scaling.attn_factor"] * _yarn_factor(parameters["factor"])
    if not by_layers:
        return parameters
    return {
        "full_attention": parameters,
        "sliding_attention": {"rope_type": "default", "rope_theta": hparams.get("rope.freq_base_swa", 10000.0)},
    }


def _llama3(factors: Tensor, base: float, width: int) -> dict[str, Any]:
    """Llama 3's scaling from the factors that it leads to: a GGUF holds nothing else of it."""
    for context in (8192, *(2**n for n in range(4, 20))):
        guess = {
            "rope_type": "llama3",
            "rope_theta": base,
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        guess["original_max_position_embeddings"] = context
        if torch.allclose(llama3_factors(guess, width), factors, rtol=1e-4):
            return guess
    raise Unsupported(
        "rope_freqs.weight of this GGUF follows no scaling that Transformers knows as llama3; take the model's "
        "Hugging Face folder"
    )


def _first(s: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(s, name, None)) is not None), None)


def _shortest(value: float) -> float:
    """The decimal number that was meant: 1e-06 where 32 bits hold 9.99999997e-07."""
    return float(str(np.float32(value)))
