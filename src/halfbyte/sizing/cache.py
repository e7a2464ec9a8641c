"""What a model keeps of each sequence: keys and values, latents, windows, fixed states; layer by layer, from its
settings."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import Unsupported, brief

STATE_BYTES = 4
"""Of a number of a recurrence's state, which engines keep in float32."""
INDEX_BYTES = 132
"""Of a token's key for an indexer: 128 numbers in FP8 and a scale (vLLM, DeepseekV32IndexerCache)."""
FULL = ("full_attention", "attention", "global_attention", "indexed_attention", "chunked_attention")
WINDOWED = ("sliding_attention", "local_attention")
FIXED = ("linear_attention", "mamba", "mamba2", "conv", "recurrent", "short_conv", "linear")
EMPTY = ("mlp", "moe")
UNREADABLE = (KeyError, IndexError, TypeError, AttributeError, ValueError, ArithmeticError)
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
PLAIN: Mapping[str, tuple[str, ...]] = {
    "llama": (),
    "mistral": ("sliding_window", "num_key_value_heads"),
    "qwen2": ("use_sliding_window", "num_key_value_heads"),
    "qwen3": ("use_sliding_window", "num_key_value_heads", "head_dim"),
}
"""Families of plain attention, whose config.json says all that plans need if it has these entries and those of SIZES:
Transformers, which takes seconds to import, need not be asked then."""


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps."""

    heads: int = 0
    keys: int = 0
    """Numbers of a head's key, of each token."""
    values: int = 0
    window: int | None = None
    """Tokens that are kept at most."""
    index_bytes: int = 0
    """Of each token, whatever the type of the cache."""
    state_bytes: int = 0
    """Of a sequence, whatever its length."""


@dataclass(frozen=True)
class CacheType:
    """What numbers of a cache are stored as."""

    name: str
    bits: float
    """Of a number, with scales of blocks."""
    scale_bytes: int
    """Of a token's head beside that."""
    source: str

    def of_head(self, numbers: int) -> float:
        """Bytes of a token's key or value of one head."""
        return numbers * self.bits / 8 + self.scale_bytes if numbers else 0


TYPES = {
    row.name: row
    for row in (
        CacheType("16 bits", 16, 0, "bf16 or f16"),
        CacheType("fp8", 8, 0, "vLLM, --kv-cache-dtype fp8: scales per tensor"),
        CacheType("int8-token-head", 8, 4, "vLLM, --kv-cache-dtype int8_per_token_head: float32 scales"),
        CacheType("int4-token-head", 4, 4, "vLLM, --kv-cache-dtype int4_per_token_head"),
        CacheType("nvfp4", 4.5, 0, "vLLM, --kv-cache-dtype nvfp4: a byte for 16 numbers"),
        CacheType("q8_0", 8.5, 0, "llama.cpp, -ctk q8_0 -ctv q8_0: 34 bytes for 32 numbers"),
        CacheType("q4_0", 4.5, 0, "llama.cpp, -ctk q4_0 -ctv q4_0: 18 bytes for 32 numbers"),
    )
}


@dataclass(frozen=True)
class Paging:
    """How an engine sets tokens of a sequence aside."""

    block: int = 1
    """Tokens come in multiples of these."""
    ahead: int = 0
    """Tokens beyond a window that are kept while a batch is computed."""
    grouped: bool = False
    """Whether layers of several kinds are put into groups of one size, of which the last is filled up."""


def cache_bytes(
    layers: tuple[LayerCache, ...], context: int, batch: int, kind: CacheType, paging: Paging | None = None
) -> int:
    """Of so many sequences of so many tokens each."""
    paging = paging or Paging()
    total = 0.0
    for layer, count in _groups(layers, paging).items():
        cached = context if layer.window is None else min(context, layer.window + paging.ahead)
        tokens = -(-cached // paging.block) * paging.block
        of_token = layer.heads * (kind.of_head(layer.keys) + kind.of_head(layer.values)) + layer.index_bytes
        total += count * batch * (tokens * of_token + layer.state_bytes)
    return int(total)


def _groups(layers: tuple[LayerCache, ...], paging: Paging) -> Mapping[LayerCache, int]:
    """How many of each kind of layer memory is set aside for (vllm/v1/core/kv_cache_utils.py)."""
    counts = Counter(layers)
    kinds = {layer: count for layer, count in counts.items() if layer.heads}
    if not paging.grouped or len(kinds) < 2:
        return counts
    least, most = min(kinds.values()), max(kinds.values())
    size = most if most < 1.25 * least else least
    return counts | {layer: -(-count // size) * size for layer, count in kinds.items()}


def layers_of(config: Mapping[str, Any]) -> tuple[LayerCache, ...]:
    """Of a model with such a config.json. Raises Unsupported for a kind of cache that is not known."""
    if config.get("is_encoder_decoder"):
        raise Unsupported("the cache of an encoder and a decoder is not known")
    try:
        return _layers(ModelConfig(config))
    except UNREADABLE as error:  # of a config that anybody may have written
        raise Unsupported(f"config.json does not say what its layers keep: {brief(error)}") from None


def _layers(s: "ModelConfig") -> tuple[LayerCache, ...]:
    kinds = list(_kinds(s))
    shared = s.number("num_kv_shared_layers")
    caching = kinds[: len(kinds) - shared]  # the last ones read what earlier ones keep
    return tuple(_layer(s, kind, i) for i, kind in enumerate(caching))


class ModelConfig:
    """A config.json, as Transformers reads it where it knows the model."""

    def __init__(self, config: Mapping[str, Any]):
        text = config.get("text_config")
        self.raw: Mapping[str, Any] = text if isinstance(text, dict) and text else config
        self.hf_config = None if _is_plain(self.raw) else _read(self.raw)

    def get(self, *names: str) -> Any:
        """The first that is said; what config.json says goes before what its family has by default."""
        values = (self.raw.get(name) for name in names)
        stated = next((value for value in values if value is not None), None)
        if stated is not None or self.hf_config is None:
            return stated
        return next((value for name in names if (value := getattr(self.hf_config, name, None)) is not None), None)

    def number(self, *names: str, default: int = 0) -> int:
        """A whole number, the largest where layers have their own. Raises Unsupported for another value."""
        value = self.get(*names)
        if value is None:
            return default
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            value = max(value)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise Unsupported(f"config.json has no number as {names[0]}")
        return int(value)

    def at(self, layer: int, *names: str) -> int:
        """A number that may differ by layer."""
        value = self.get(*names)
        return int(value[layer]) if isinstance(value, list | tuple) else self.number(*names)

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return self.number("num_hidden_layers", "n_layer", "num_layers")

    @property
    def hidden(self) -> int:
        """Features of a hidden state."""
        return self.number("hidden_size", "n_embd", "d_model")

    @property
    def heads(self) -> int:
        """How many query heads an attention has."""
        return self.number("num_attention_heads", "n_head", default=1)

    @property
    def head_dim(self) -> int:
        """In-features of an attention's head."""
        return self.number("head_dim", "attention_head_dim") or self.hidden // self.heads


def _is_plain(raw: Mapping[str, Any]) -> bool:
    """Whether it says all by itself: of a window in use, the family's code says in which layers."""
    needed = PLAIN.get(str(raw.get("model_type")))
    return needed is not None and raw.keys() >= {*SIZES, *needed} and not raw.get("use_sliding_window")


def _read(raw: Mapping[str, Any]) -> Any:
    import transformers  # seconds, which names of devices need not wait for
    from huggingface_hub.errors import StrictDataclassError

    try:
        return transformers.AutoConfig.for_model(**{**raw, "model_type": raw.get("model_type") or ""})
    except (*UNREADABLE, ImportError, StrictDataclassError):
        return None  # a model of which Transformers has no code: its config.json has to do


def _kinds(s: ModelConfig) -> Iterator[str]:
    """Of every layer, in order."""
    layer_types = s.get("layer_types", "layers_block_type")
    pattern = s.raw.get("hybrid_override_pattern")
    linear = s.raw.get("linear_attn_config")
    interval = s.raw.get("full_attention_interval") or s.raw.get("full_attn_interval")
    if isinstance(pattern, str):
        yield from ({"M": "mamba2", "*": "attention", "-": "mlp", "E": "moe"}.get(c, c) for c in pattern)
    elif isinstance(linear, dict) and isinstance(linear.get("full_attn_layers"), list):
        full = set(linear["full_attn_layers"])  # counted from 1
        yield from ("full_attention" if i + 1 in full else "linear_attention" for i in range(s.layers))
    elif isinstance(layer_types, list | tuple) and len(layer_types) == s.layers:
        yield from map(str, layer_types)
    elif interval:
        yield from ("linear_attention" if (i + 1) % interval else "full_attention" for i in range(s.layers))
    elif s.get("mamba_d_ssm") is not None:
        yield from ["both"] * s.layers
    elif s.get("model_type") in ("mamba", "mamba2", "falcon_mamba"):
        yield from ["mamba"] * s.layers
    else:
        yield from _by_window(s)


def _by_window(s: ModelConfig) -> Iterator[str]:
    pattern, window = s.get("sliding_window_pattern", "_sliding_window_pattern"), s.get("sliding_window")
    windowed = bool(window) and s.get("use_sliding_window") is not False
    for i in range(s.layers):
        is_full = not windowed or (isinstance(pattern, int) and (i + 1) % pattern == 0)
        yield "full_attention" if is_full else "sliding_attention"


def _layer(s: ModelConfig, kind: str, i: int) -> LayerCache:
    if kind in EMPTY:
        return LayerCache()
    if kind in FIXED:
        return LayerCache(state_bytes=_state(s) * STATE_BYTES)
    if kind in ("hybrid", "both"):
        attention = _attention(s, i, None)
        return LayerCache(attention.heads, attention.keys, attention.values, state_bytes=_state(s) * STATE_BYTES)
    if kind in FULL:
        return _attention(s, i, None)
    if kind in WINDOWED:
        return _attention(s, i, s.number("sliding_window", "attention_window_size"))
    raise Unsupported(f"what layers of {kind} keep is not known")


def _attention(s: ModelConfig, i: int, window: int | None) -> LayerCache:
    if latent := s.number("kv_lora_rank"):
        index = INDEX_BYTES if s.get("index_head_dim", "index_n_heads") else 0
        return LayerCache(1, latent + s.number("qk_rope_head_dim"), 0, window, index)
    if s.get("o_lora_rank", "compress_ratios", "compress_rates") is not None:
        raise Unsupported("what layers of compressed attention keep is not known")
    if blocks := s.raw.get("block_configs"):  # heads chosen by search (Nemotron)
        attention = blocks[i].get("attention", {})
        if attention.get("no_op") or attention.get("replace_with_linear"):
            return LayerCache()
        per_head = attention.get("n_heads_in_group") or 1
        return LayerCache(s.heads // per_head, s.head_dim, s.head_dim, window)
    heads, dim = _kv_heads(s, i), s.head_dim
    if window is None:  # Gemma 4 has others where it attends to all
        heads = s.number("num_global_key_value_heads") or heads
        dim = s.number("global_head_dim") or dim
    return LayerCache(heads, dim, s.number("v_head_dim") or dim, window)


def _kv_heads(s: ModelConfig, i: int) -> int:
    if s.get("multi_query") and not s.get("new_decoder_architecture"):
        return 1
    heads = s.at(i, "num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv")
    return heads or s.heads


def _state(s: ModelConfig) -> int:
    """Numbers that a recurrence or a convolution keeps of a sequence."""
    if kernel := s.number("conv_L_cache"):  # LFM2: a short convolution
        return s.hidden * (kernel - 1)
    if key_heads := s.number("linear_num_key_heads"):  # gated delta nets
        keys = key_heads * s.number("linear_key_head_dim")
        values = s.number("linear_num_value_heads") * s.number("linear_value_head_dim")
        wide = 2 * keys + values
        return values * s.number("linear_key_head_dim") + wide * (s.number("linear_conv_kernel_dim", default=4) - 1)
    if isinstance(kda := s.raw.get("linear_attn_config"), dict):  # Kimi Linear
        width = kda["num_heads"] * kda["head_dim"]
        return width * kda["head_dim"] + 3 * width * (kda.get("short_conv_kernel_size", 4) - 1)
    state, kernel = s.number("mamba_d_state", "ssm_state_size", "state_size"), s.number("mamba_d_conv", "conv_kernel")
    if not state:
        raise Unsupported("how large the states of its recurrent layers are is not known")
    heads = s.number("mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
    if heads:  # Mamba 2
        inner = heads * s.number("mamba_d_head", "mamba_head_dim", "mamba_headdim")
        groups = s.number("mamba_n_groups", "n_groups", "mamba_ngroups", default=1)
        return inner * state + (inner + 2 * groups * state) * (kernel - 1)
    inner = s.number("mamba_expand", "expand", default=2) * s.hidden
    return inner * state + inner * (kernel - 1)
