"""Small random checkpoints of many families, as their users would have them on disk.

Values are drawn so that nothing hides: norms and biases differ from channel to channel, and every part of a block
matters to what it returns.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny

VOCABULARY = 264
BF16 = torch.bfloat16
GEOMETRY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 128}
ONE_GROUP = {"n_group": 1, "topk_group": 1}

Folds = dict[str, str]
"""Producer to readers, as they are called in the block; `*` is the number of an expert, `1+` a norm that adds 1 to its
weight."""

QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
GATED = "mlp.gate_proj mlp.up_proj"
VALUES = {"self_attn.v_proj": "self_attn.o_proj"}
ATTENTION = {"input_layernorm": QKV, **VALUES}
UP_DOWN = {"mlp.up_proj": "mlp.down_proj"}
LLAMA = {**ATTENTION, "post_attention_layernorm": GATED, **UP_DOWN}
GEMMA = {"1+input_layernorm": QKV, **VALUES, "1+pre_feedforward_layernorm": GATED, **UP_DOWN}
EXPERTS = "mlp.experts.*.gate_proj mlp.experts.*.up_proj"
EXPERT_UP_DOWN = {"mlp.experts.*.up_proj": "mlp.experts.*.down_proj"}
SHARED = "mlp.shared_experts.gate_proj mlp.shared_experts.up_proj"
SHARED_UP_DOWN = {"mlp.shared_experts.up_proj": "mlp.shared_experts.down_proj"}
SHARED_MOE = {"post_attention_layernorm": f"mlp.gate {EXPERTS} {SHARED}", **EXPERT_UP_DOWN, **SHARED_UP_DOWN}


@dataclass(frozen=True)
class Family:
    """A configuration, and the folds that the formulas of its last block allow."""

    model_type: str
    folds: Folds
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    as_published: bool = True
    """False: saved as Transformers has it in memory, which for Qwen3.5 is how it was published."""

    def build(self) -> transformers.PreTrainedModel:
        config = transformers.AutoConfig.for_model(self.model_type, **(GEOMETRY | self.config))
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.2) if p.dim() == 1 else p.normal_(0, p.shape[-1] ** -0.5)
        return model.to(self.dtype).eval()

    def save(self, path: Path, **options) -> Path:
        """The checkpoint with a tokenizer of single bytes beside it."""
        self.build().save_pretrained(path, save_original_format=self.as_published, **options)
        tiny.tokenizer(adds_bos=False).save(str(path / "tokenizer.json"))
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tiny.BOS, "eos_token": tiny.EOS}
        (path / "tokenizer_config.json").write_text(json.dumps(about))
        return path


IN_QUICK = ("llama", "gemma3", "phi3", "gpt2", "falcon-new", "mamba", "lfm2", "mixtral", "deepseek_v3")
"""Families of each kind of block: plain, with scaled embeddings and norms of 1 + w, with one matrix for several, with
transposed ones, with heads that lie in groups, without attention, with experts."""


def every(names=None) -> list:
    """The names of families as parameters of a test, of which `make quick` takes some."""
    return [name if name in IN_QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names or FAMILIES]


FAMILIES = {
    "llama": Family("llama", LLAMA),
    "mistral": Family("mistral", LLAMA, dtype=BF16),
    "qwen2": Family("qwen2", LLAMA),  # biases of q, k, v
    "qwen3": Family(
        "qwen3", LLAMA, {"head_dim": 32, "tie_word_embeddings": True}, BF16
    ),  # norms of q and k; heads wider than the hidden states
    "gemma2": Family("gemma2", GEMMA, {"head_dim": 16, "query_pre_attn_scalar": 16}, BF16),
    "gemma3": Family("gemma3_text", GEMMA, {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "phi3": Family(
        "phi3",
        {"input_layernorm": "self_attn.qkv_proj", "self_attn.qkv_proj": "self_attn.o_proj"}
        | {"post_attention_layernorm": "mlp.gate_up_proj", "mlp.gate_up_proj": "mlp.down_proj"},
    ),
    "phi": Family("phi", {"input_layernorm": f"{QKV} mlp.fc1", "self_attn.v_proj": "self_attn.dense"}),
    "gpt2": Family("gpt2", {"ln_1": "attn.c_attn", "attn.c_attn": "attn.c_proj", "ln_2": "mlp.c_fc"}, GPT),
    "gptj": Family(
        "gptj",
        {"ln_1": "attn.q_proj attn.k_proj attn.v_proj mlp.fc_in", "attn.v_proj": "attn.out_proj"},
        GPT | {"rotary_dim": 8},
    ),
    "bigcode": Family(
        "gpt_bigcode", {"ln_1": "attn.c_attn", "attn.c_attn": "attn.c_proj", "ln_2": "mlp.c_fc"}, GPT
    ),  # one head of k and v
    "opt": Family(  # ReLU lets a scale through
        "opt",
        {
            "self_attn_layer_norm": QKV,
            "self_attn.v_proj": "self_attn.out_proj",
            "final_layer_norm": "fc1",
            "fc1": "fc2",
        },
        {"ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    "gpt_neox": Family(  # q, k, v head by head
        "gpt_neox",
        {
            "input_layernorm": "attention.query_key_value",
            "attention.query_key_value": "attention.dense",
            "post_attention_layernorm": "mlp.dense_h_to_4h",
        },
    ),
    "bloom": Family(
        "bloom",
        {"input_layernorm": "self_attention.query_key_value", "self_attention.query_key_value": "self_attention.dense"}
        | {"post_attention_layernorm": "mlp.dense_h_to_4h"},
        {"n_layer": 2, "n_head": 4},
    ),
    "stablelm": Family("stablelm", LLAMA, {"use_qkv_bias": True}, BF16),
    "stablelm-parallel": Family(
        "stablelm", {"input_layernorm": f"{QKV} {GATED}", **VALUES, **UP_DOWN}, {"use_parallel_residual": True}
    ),
    "falcon": Family(
        "falcon",
        {
            "input_layernorm": "self_attention.query_key_value mlp.dense_h_to_4h",
            "self_attention.query_key_value": "self_attention.dense",
        },
        {"multi_query": True, "alibi": False, "ffn_hidden_size": 128},
    ),
    "falcon-new": Family(  # q, k, v group by group
        "falcon",
        {
            "ln_attn": "self_attention.query_key_value",
            "self_attention.query_key_value": "self_attention.dense",
            "ln_mlp": "mlp.dense_h_to_4h",
        },
        {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "ffn_hidden_size": 128},
        BF16,
    ),
    "nemotron": Family(
        "nemotron", {"1+input_layernorm": QKV, **VALUES, "1+post_attention_layernorm": "mlp.up_proj"}, dtype=BF16
    ),  # ReLU squared
    "cohere": Family("cohere", {"input_layernorm": f"{QKV} {GATED}", **VALUES, **UP_DOWN}, {"logit_scale": 1.0}),
    "olmo2": Family("olmo2", {**VALUES, **UP_DOWN}),  # norms come after
    "glm4": Family(
        "glm4",
        {**ATTENTION, "post_attention_layernorm": "mlp.gate_up_proj", "mlp.gate_up_proj": "mlp.down_proj"},
        {"head_dim": 16},
    ),
    "lfm2": Family(
        "lfm2",
        {
            "operator_norm": "conv.in_proj",
            "conv.in_proj": "conv.out_proj",
            "ffn_norm": "feed_forward.w1 feed_forward.w3",
            "feed_forward.w3": "feed_forward.w2",
        },
        {"layer_types": ["full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ),
    "mamba": Family("mamba", {"norm": "mixer.in_proj"}, {"state_size": 8, "time_step_rank": 8}),
    "mixtral": Family(
        "mixtral",
        {
            **ATTENTION,
            "post_attention_layernorm": "block_sparse_moe.gate block_sparse_moe.experts.*.w1 "
            "block_sparse_moe.experts.*.w3",
        }
        | {"block_sparse_moe.experts.*.w3": "block_sparse_moe.experts.*.w2"},
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
        BF16,
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        {**ATTENTION, "post_attention_layernorm": f"mlp.gate {EXPERTS}", **EXPERT_UP_DOWN},
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "glm4_moe": Family(
        "glm4_moe",
        {**ATTENTION, **SHARED_MOE},
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16} | ONE_GROUP,
        BF16,
    ),
    "deepseek_v3": Family(  # latent attention; k and v head by head in one matrix
        "deepseek_v3",
        {
            "input_layernorm": "self_attn.q_a_proj self_attn.kv_a_proj_with_mqa",
            "self_attn.q_a_layernorm": "self_attn.q_b_proj",
        }
        | {"self_attn.kv_a_layernorm": "self_attn.kv_b_proj", "self_attn.kv_b_proj": "self_attn.o_proj", **SHARED_MOE},
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "first_k_dense_replace": 1,
        }
        | {
            "qk_rope_head_dim": 8,
            "head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "num_key_value_heads": 4,
            **ONE_GROUP,
        },
    ),
    # What follows has all experts in one 3-D tensor on disk.
    "granitemoe": Family(
        "granitemoe",
        {**ATTENTION, "post_attention_layernorm": "block_sparse_moe.router.layer block_sparse_moe.input_linear"}
        | {"block_sparse_moe.input_linear": "block_sparse_moe.output_linear"},
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    ),
    "gpt_oss": Family(  # transposed, with biases; up is clamped and has 1 added, so it takes no scale
        "gpt_oss",
        {**ATTENTION, "post_attention_layernorm": "mlp.router mlp.experts.gate_up_proj"},
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "intermediate_size": 64},
        BF16,
    ),
    "llama4": Family(
        "llama4_text",
        {
            **ATTENTION,
            "post_attention_layernorm": "feed_forward.router feed_forward.experts.gate_up_proj"
            " feed_forward.shared_expert.gate_proj feed_forward.shared_expert.up_proj",
            "feed_forward.experts.gate_up_proj": "feed_forward.experts.down_proj",
            "feed_forward.shared_expert.up_proj": "feed_forward.shared_expert.down_proj",
        },
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "intermediate_size": 64,
            "intermediate_size_mlp": 128,
            "head_dim": 16,
        },
    ),
    "qwen3_5_moe": Family(  # gated attention and linear attention by turns
        "qwen3_5_moe_text",
        {
            "1+input_layernorm": QKV,
            **VALUES,
            "1+post_attention_layernorm": "mlp.gate mlp.experts.gate_up_proj mlp.shared_expert.gate_proj "
            "mlp.shared_expert.up_proj mlp.shared_expert_gate",
            "mlp.experts.gate_up_proj": "mlp.experts.down_proj",
            "mlp.shared_expert.up_proj": "mlp.shared_expert.down_proj",
        },
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "head_dim": 16,
        }
        | {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        }
        | {"layer_types": ["linear_attention", "full_attention"]},
        BF16,
        as_published=False,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Such small products are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
