"""Caches of models, as others have published or measured them (published.yaml)."""

import pytest
import transformers
from outlines import GIB, PUBLISHED, config_of

from halfbyte.errors import Unsupported
from halfbyte.sizing.accounting import ACCOUNTINGS, accounting_of
from halfbyte.sizing.cache import PLAIN, TYPES, LayerCache, ModelConfig, _layers, cache_bytes, layers_of


def attention_alone(layers: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
    return tuple(LayerCache(x.heads, x.keys, x.values, x.window) for x in layers)


@pytest.mark.parametrize("row", PUBLISHED["caches"], ids=lambda row: f"{row['model']}-{row.get('context')}")
def test_published_caches(row):
    layers = layers_of(config_of(row["model"]))
    layers = attention_alone(layers) if row.get("alike") == "attention" else layers
    paging = accounting_of(row["engine"]).paging(80 * GIB) if "engine" in row else None
    if "gib" in row:
        found = cache_bytes(layers, row["context"], 1, TYPES["16 bits"], paging)
        assert found / GIB == pytest.approx(row["gib"], rel=0.02)
        return
    at = row.get("beyond", 0) or row.get("context", 1) - 1
    of_token = cache_bytes(layers, at + 1, 1, TYPES["16 bits"]) - cache_bytes(layers, at, 1, TYPES["16 bits"])
    assert of_token == pytest.approx(row["of_token"], rel=0.02)


@pytest.mark.parametrize("row", PUBLISHED["vllm"], ids=lambda row: f"{row['model']}-{row.get('cards', 1)}")
def test_sequences_that_vllm_says_it_holds(row):
    layers, cards = layers_of(config_of(row["model"])), row.get("cards", 1)
    kind = TYPES[row.get("type", "16 bits")]
    paging = accounting_of("vllm").paging(80 * GIB)
    found = cache_bytes(layers, 8192, 1, kind, paging) / cards
    assert row["cache"] * GIB / found == pytest.approx(row["concurrency"], rel=0.02)


def test_types_of_a_head_of_128():
    """vllm-project/vllm pull request 39008: 68 bytes at 4 bits per token and head, for 256 in bf16."""
    assert TYPES["int4-token-head"].of_head(128) == 68
    assert TYPES["16 bits"].of_head(128) == 256
    assert TYPES["q8_0"].of_head(128) == 136
    assert TYPES["nvfp4"].of_head(128) == 72


def test_shared_layers_keep_nothing():
    """unslothai/unsloth pull request 5225: of 35 layers of Gemma 3n E4B 20 allocate."""
    assert len(layers_of(config_of("gemma-3n-e4b"))) == 20


def test_compressed_attention_is_not_guessed():
    with pytest.raises(Unsupported, match="not known"):
        layers_of({"model_type": "deepseek_v4", "num_hidden_layers": 43, "hidden_size": 4096})
    with pytest.raises(Unsupported, match="not known"):
        layers_of({"model_type": "t5", "is_encoder_decoder": True})


SMALL = {
    "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 1000,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 1}, {"head_dim": 32, "sliding_window": 128}], ids=str)
@pytest.mark.parametrize("family", PLAIN)
def test_plain_families_need_no_transformers(family, more):
    """What Transformers' own config says of them is what config.json says."""
    needed = {"sliding_window": None, "use_sliding_window": False, "num_key_value_heads": 2, "head_dim": 16}
    config = {**SMALL, "model_type": family, **{name: needed[name] for name in PLAIN[family]}, **more}
    alone = ModelConfig(config)
    assert alone.hf_config is None
    theirs = transformers.AutoConfig.for_model(**config)
    assert theirs.num_key_value_heads == config.get("num_key_value_heads", 4)
    asked = ModelConfig(config)
    asked.hf_config = theirs
    assert layers_of(config) == _layers(asked)
    for account in ACCOUNTINGS.values():
        assert account.activations(alone, 80 * GIB, 2, 512, 4) == account.activations(asked, 80 * GIB, 2, 512, 4)
    assert alone.head_dim == asked.head_dim


def test_windows_in_use_are_asked_of_transformers():
    config = {**SMALL, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 128, "max_window_layers": 1}
    assert [layer.window for layer in layers_of(config)] == [None, 128, 128]


def test_a_model_of_which_transformers_knows_nothing():
    config = {"model_type": "nobody", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    assert layers_of(config) == (LayerCache(4, 16, 16),) * 2


@pytest.mark.parametrize(
    "odd",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"kv_lora_rank": -5},
        {"num_key_value_heads": {"a": 1}},
        {"block_configs": [1, 2]},
        {"linear_attn_config": {"full_attn_layers": [1]}},
        {"full_attention_interval": "4"},
        {"sliding_window": 4, "sliding_window_pattern": 0},
        {"layer_types": ["a", "b"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["llama", "nobody"])
def test_settings_that_mean_nothing_are_refused(odd, model_type):
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(Unsupported):
        layers_of({**config, "model_type": model_type, **odd})


def test_a_width_that_differs_by_layer_is_its_largest():
    assert ModelConfig({"model_type": "nobody", "intermediate_size": [1, 3, 2]}).number("intermediate_size") == 3
