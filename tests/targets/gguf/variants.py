"""Small configurations of every family that a GGUF is written of, and of the variants that its tables tell apart."""

from pathlib import Path

import torch
import transformers

import halfbyte
from models.families import GPT

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
ALL_HEADS = {"num_key_value_heads": 4}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = {"sliding_window": 16, "num_hidden_layers": 7}
BY_LAYERS = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GRANITE = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}

CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-3": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "qwen2-yarn-shares": ("qwen2", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1}}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "granite": ("granite", GRANITE),
    "granitemoe": (
        "granitemoe",
        {**GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_moe": (
        "qwen2_moe",
        {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 48, "norm_topk_prob": False},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {**MOE, "num_experts": 8, "head_dim": 16, "norm_topk_prob": True}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, **WINDOW}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, **WINDOW}),
    "gemma3-stretched": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, **WINDOW, "rope_parameters": BY_LAYERS},
    ),
    "phi3": ("phi3", {}),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "phi3-long": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 256, "max_position_embeddings": 1024},
    ),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOW),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2, **ALL_HEADS}),
    "gpt_oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 16,
            "rope_parameters": YARN,
        },
    ),
    "gpt2": ("gpt2", {**GPT, **ALL_HEADS}),
    "starcoder2": ("starcoder2", {"use_bias": True, "sliding_window": None}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "gpt_neox": ("gpt_neox", ALL_HEADS),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, **ALL_HEADS}),
    "falcon": ("falcon", {"multi_query": True, "alibi": False, "ffn_hidden_size": 128}),
    "falcon-new": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "ffn_hidden_size": 128},
    ),
    "falcon-one-norm": (
        "falcon",
        {
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "num_kv_heads": 2,
            "alibi": False,
            "ffn_hidden_size": 128,
        },
    ),
    "cohere": ("cohere", {"logit_scale": 0.25}),
}
"""Name to `model_type` and what its config changes."""


def as_f32(folder: Path, path: Path) -> Path:
    """The checkpoint in `folder` as a GGUF in which nothing is rounded."""
    halfbyte.quantize(folder, path, grid="F32", overwrite=True)
    return path


def transformers_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    """[position, vocabulary], computed in 32 bits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())
