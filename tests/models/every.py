"""Every language model that Transformers can build, as small as its code allows: for what must hold of all of them."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

VOCABULARY = 264
TOKENS = torch.randint(10, 250, (2, 24), generator=torch.Generator().manual_seed(3))

SIZES = {
    r"(unpadded_)?vocab_size|n_vocab|vocab_size_per_layer_input": VOCABULARY,
    r".*image.*token.*_(id|index)": 261, r".*video.*token.*_(id|index)": 262, r".*audio.*token.*_(id|index)": 263,
    r"(vision|image|audio|boi|eoi|boa|eoa).*_(id|index)": 260,
    r"bos_token_id|decoder_start_token_id": 0, r"(eos|pad|sep)_token_id": 1, r".*_token_id": 3,
    r"hidden_size|d_model|n_embd|dim|embed(ding)?_(size|dim)|emb_dim|word_embed_proj_dim|ple_embed_dim"
    r"|out_hidden_size|projection_dim"
    r"|lru_width|attention_hidden_size|(input|output)_embedding_size|hidden_size_per_layer_input": 64,
    r"intermediate_size(_mlp)?|n_inner|d_ff|dff|(ffn|d|mlp)_(dim|inner|hidden_size)|ffn_hidden_size"
    r"|(en|de)coder_ffn_dim|hidden_dim|block_ff_dim": 128,
    r"(moe|shared_experts?|moe_shared_expert|shared)_intermediate_size|expert_(hidden|ffn_hidden)_size": 64,
    r"num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_(en|de)coder_layers|depth|num_blocks"
    r"|encoder_num_layers": 2,
    r"(num_)?((en|de)coder_|hidden_)?attention_heads|n_heads?|num_heads|num_(hidden_)?attention_heads"
    r"|(num_)?encoder_(num_)?heads": 4,
    r"(num|swa_num|num_global)_key_value_heads|num_kv_heads|num_query_groups|attention_groups|kv_n_heads": 2,
    r"(global_|swa_|linear_|dim_|attention_)*head_(dim|size)|kv_channels|dim_head|d_kv|d_head|index_head_dim": 16,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length"
    r"|max_(target|source)_positions": 128,
    r"num_experts|n_routed_experts|(num_local|moe_num|num_moe|n)_experts|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_(k|topk|top_k)|top_k_experts|num_selected_experts|n_group|num_expert_group": 2,
    r"topk_group|(n|num|moe_num)_shared_experts|pretraining_tp|first_k_dense_replace|num_dense_layers"
    r"|moe_layer_(start|end)_index": 1,
    r"(q|kv|o)_lora_rank|index_topk|sliding_window|attention_window_size|window_size|chunk_size|mamba_chunk_size"
    r"|(attention_)?chunk_size": 32,
    r"qk_rope_head_dim|rotary_dim": 8,
    r"qk_nope_head_dim|v_head_dim|query_pre_attn_scalar|linear_(key|value)_head_dim": 16,
    r"qk_head_dim": 24, r"index_n_heads|linear_num_value_heads": 4, r"linear_num_key_heads|linear_num_heads": 2,
    r"mamba_n(um)?_heads|n_mamba_heads": 8, r"mamba_d_head|mamba_head_?dim": 16, r"mamba_d_ssm": 128,
    r"mamba_d_state|(ssm_)?state_size": 8,
    r"image_size": 28, r"patch_size": 14, r"num_mel_bins": 16, r"(laurel|adapter|time_step|mamba_dt)_rank": 8,
}  # fmt: skip
"""What a number is called in configs, and what it is here; the first that fits."""
RULES = [(re.compile(pattern), size) for pattern, size in SIZES.items()]
LEFT = re.compile(
    r"id2label|label2id|rope_.*|dtype|torch_dtype|transformers_version|layer_group_size|projector_patch.*"
    r"|quantization_config"
)
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Every:
    """A model type, what its smallest config needs beside the sizes, and the auto class that makes it."""

    kind: str
    changes: dict[str, Any] = field(default_factory=dict)
    by: str = "AutoModelForCausalLM"

    def build(self) -> transformers.PreTrainedModel:
        config = transformers.AutoConfig.for_model(
            self.kind, **{k: dict(v) for k, v in self.changes.items() if isinstance(v, dict) and "model_type" in v}
        )
        small = _merged(_small(config.to_dict()), self.changes)
        small.pop("model_type", None), small.pop("architectures", None)
        torch.manual_seed(0)
        model = getattr(transformers, self.by).from_config(
            transformers.AutoConfig.for_model(self.kind, **small), dtype=torch.float32
        )
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1 and not re.search(r"A_log|conv1d|rg_lru|time_|\.D$", name):
                    p.normal_(0, p.shape[-1] ** -0.5)
                elif p.is_floating_point():
                    p.add_(torch.randn_like(p) * 0.02)
        model.tie_weights()
        return model.eval()

    def save(self, folder: Path) -> Path:
        self.build().save_pretrained(folder)
        return folder


def _small(config: dict[str, Any]) -> dict[str, Any]:
    """Every number that has a rule, and of lists by layer, one layer of each of two kinds."""
    count = next((config[key] for key in DEPTHS if isinstance(config.get(key), int)), None)
    listed = {key: value for key, value in config.items() if isinstance(value, list) and count and len(value) == count}
    kinds = list(map(str, zip(*listed.values(), strict=True)))
    rows = ([kinds.index(kind) for kind in dict.fromkeys(kinds)] * 2)[:2]
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype", "per_layer_config", "use_bidirectional_attention"):
            continue
        if key in listed:
            small[key] = [value[row] for row in rows]
        elif isinstance(value, dict) and not LEFT.fullmatch(key):
            small[key] = _small(value)
        elif isinstance(value, int) and not isinstance(value, bool) and not LEFT.fullmatch(key):
            small[key] = next((size for pattern, size in RULES if pattern.fullmatch(key)), value)
        else:
            small[key] = value
    if small.get("kv_lora_rank") and "num_attention_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    if config.get("head_dim") and config.get("head_dim") == config.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    return small


def _merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(config.get(key), dict) and not key.startswith("rope")
        config[key] = _merged(dict(config[key]), value) if nested else value
    return config


def outputs(model: transformers.PreTrainedModel) -> torch.Tensor:
    """What the model returns for the tokens."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        out = model(input_ids=TOKENS, use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


VISION, ANY, HEADLESS = "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel"
REWARD = "AutoModelForSequenceClassification"
ONE_GROUP = {"n_group": 1, "topk_group": 1}
HYBRID = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
    "num_key_value_heads": 4,
}
SHARED_CACHE = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}


def sections(kind: str) -> dict[str, Any]:
    """Heads turned by three coordinates, where the family has such."""
    parts = {"ernie4_5_vl_moe": [3, 3, 2], "glm4v_moe": [2, 1, 1]}.get(kind, [2, 3, 3])
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": parts}
    return (
        {"text_config": {"rope_parameters": rope}}
        if re.match("qwen2_vl|qwen2_5|qwen3_vl|qwen3_omni|glm4v|ernie", kind)
        else {}
    )


TOWER = {
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    },
    "text_config": {"model_type": "mistral"},
}
DBRX = {
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4, "model_type": "dbrx"},
    "ffn_config": {
        "ffn_hidden_size": 64,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "hidden_size": 64,
        "ffn_act_fn": {"name": "silu"},
    },
}

SEEING = (
    "aria", "aya_vision", "cohere2_vision", "deepseek_vl", "ernie4_5_vl_moe", "exaone4_5", "gemma3", "gemma4", "glm4v",
    "glm4v_moe", "idefics2", "idefics3",
    "internvl", "kimi_k25", "lfm2_vl", "llama4", "llava", "llava_next", "llava_onevision", "minimax_m3_vl", "mistral3",
    "mistral4", "mllama", "ovis2",
    "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "smolvlm",
)  # fmt: skip

CAUSAL = {kind: Every(kind) for kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
NEEDS = {
    "bamba": Every("bamba", {"attn_layer_indices": [1]}),
    "dbrx": Every("dbrx", DBRX),
    "deepseek_v2": Every("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None, "num_experts_per_tok": 2}),
    "deepseek_v2-groups": Every(
        "deepseek_v2", {"topk_method": "group_limited_greedy", "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    ),
    "doge-moe": Every("doge", {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 4}),
    "dots1": Every("dots1", {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, **ONE_GROUP}),
    "falcon-alibi": Every(
        "falcon", {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True, "num_kv_heads": 4}
    ),
    "falcon-two-norms": Every("falcon", {"new_decoder_architecture": True, "alibi": False}),
    "gemma3n_text": Every(
        "gemma3n_text", {**SHARED_CACHE, "intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4}
    ),
    "gemma4_text": Every("gemma4_text", SHARED_CACHE),
    "hunyuan_v1_dense": Every("hunyuan_v1_dense", {"head_dim": 16}),
    "hunyuan_v1_moe": Every("hunyuan_v1_moe", {"head_dim": 16, "moe_topk": 2, "num_experts": 4}),
    "jamba": Every(
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
    ),
    "lfm2_moe": Every("lfm2_moe", {"layer_types": ["full_attention", "conv"]}),
    "llama-tied": Every("llama", {"tie_word_embeddings": True}),
    "llama-embedding": Every("llama", {}, HEADLESS),
    "llama-reward": Every("llama", {"num_labels": 1, "pad_token_id": 1}, REWARD),
    "mamba2": Every("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "ministral": Every("ministral", {"head_dim": 16}),
    "minimax": Every("minimax", {"layer_types": ["linear_attention", "full_attention"]}),
    "nemotron": Every("nemotron", {"head_dim": 16, "num_key_value_heads": 2}),
    "opt-projected": Every("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "pixtral": Every("llava", TOWER, VISION),
    "qwen3-embedding": Every("qwen3", {}, HEADLESS),
    "qwen2-reward": Every("qwen2", {"num_labels": 1, "pad_token_id": 1}, REWARD),
    "recurrent_gemma": Every("recurrent_gemma", {"num_hidden_layers": 3, "num_key_value_heads": 1}),
    "zamba": Every("zamba", {**HYBRID, "n_mamba_heads": 2}),
    "zamba2": Every(
        "zamba2",
        {
            **HYBRID,
            "hybrid_layer_ids": [1, 3],
            "num_mem_blocks": 1,
            "kv_channels": 32,
            "num_query_groups": 4,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
        },
    ),
    "zaya": Every("zaya", {"num_experts_per_tok": 1}),
    **{kind: Every(kind, sections(kind), VISION) for kind in SEEING},
    **{
        kind: Every(kind, sections(kind), ANY)
        for kind in ("granite_speech", "qwen2_audio", "qwen3_omni_moe_thinker", "voxtral")
    },
}
ENCODERS = {
    "bert-masked": Every("bert", {}, "AutoModelForMaskedLM"),
    "modernbert": Every("modernbert", {}, "AutoModelForMaskedLM"),
    "t5": Every("t5", {}, "AutoModelForSeq2SeqLM"),
    "whisper": Every("whisper", {}, "AutoModelForSpeechSeq2Seq"),
}
UNBUILT = {
    "blt": "made for bytes, with models within the model",
    "cohere_compass_text": "its config has no default that runs",
    "emu3": "is saved as another",
    "dots3_note": "the text of it stands beside",
    "gemma3n": "its tower is of another package",
    "gemma4_assistant": "runs beside another model",
    "gemma4_unified_assistant": "runs beside another model",
    "musicgen": "decodes what another model encodes",
    "musicgen_melody": "decodes what another model encodes",
    "qwen4_exp": "its config has no default that runs",
    "qwen4_exp_text": "its config has no default that runs",
    "reformer": "is an encoder by default",
    "xmod": "wants a language to be chosen",
}
EVERY = {name: family for name, family in {**CAUSAL, **NEEDS}.items() if name not in UNBUILT}
