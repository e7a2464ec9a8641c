"""Which entries of a config.json a GGUF answers for.

Every entry that Transformers' class of a config has is written, or checked against what llama.cpp computes
(`Family.assumed`), or idle when a trained model predicts, or at its default. What is none of these may mean another
computation, and is refused by name.
"""

from collections.abc import Collection, Iterator
from types import SimpleNamespace
from typing import Any

SAID = frozenset({
    "num_hidden_layers", "max_position_embeddings", "hidden_size", "intermediate_size", "n_inner", "ffn_hidden_size",
    "vocab_size",
    "use_parallel_residual", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "head_dim", "multi_query",
    "num_ln_in_parallel_attn",
    "new_decoder_architecture",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "sliding_window", "layer_types",
    "attention_multiplier",
    "embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "attention_bias",
    "qkv_bias", "use_qkv_bias", "mlp_bias", "tie_word_embeddings", "rope_parameters", "rope_scaling", "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
})  # fmt: skip
"""What a GGUF says, or its tensors do."""
IDLE = frozenset({
    "initializer_range", "use_cache", "cache_implementation", "pretraining_tp", "router_aux_loss_coef",
    "router_jitter_noise", "output_router_logits",
    "reorder_and_upcast_attn", "attention_dropout", "residual_dropout", "embedding_dropout", "hidden_dropout",
    "classifier_dropout", "resid_pdrop",
    "embd_pdrop", "attn_pdrop", "is_decoder", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout", "max_window_layers", "no_rope_layer_interval", "_sliding_window_pattern",
    "sliding_window_pattern",
    "transformers_version", "architectures", "dtype", "torch_dtype", "model_type", "_name_or_path", "auto_map",
    "quantization_config",
    "_attn_implementation", "output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "id2label",
    "label2id", "problem_type",
})  # fmt: skip
"""What training alone, a part that a GGUF has not, or another entry reads."""


def unanswered(s: Any, checked: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Name and value of every entry that is none of these; `checked` are names that were looked at."""
    if isinstance(s, SimpleNamespace):
        return  # out of a table that knows every entry
    default = type(s)().to_dict()
    unchecked = {*default} - {*checked} - SAID - IDLE - set(s.attribute_map)
    unchecked -= {alias for name, alias in s.attribute_map.items() if name in SAID | IDLE}
    for name in sorted(unchecked):
        if getattr(s, name, default[name]) != default[name]:
            yield name, getattr(s, name)
