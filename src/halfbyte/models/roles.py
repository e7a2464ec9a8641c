"""The few facts about architectures that neither shapes nor data flow can give, as patterns over tensor names.

A weight that a method may quantize is a matrix inside a numbered block of the decoder. What follows says which such
matrices are something else, which lie transposed, and where the parts of a fused matrix begin.
"""

import re

# <prefix>.<integer>.: a block of a stack, "model.layers.3", "transformer.h.11", "gpt_neox.layers.0".
BLOCK = re.compile(r"^((?:[^.\d][^.]*\.)+?\d+)\.")

# Stacks that are not the text decoder.
FOREIGN = re.compile(r"(^|\.)(vision|visual|image|audio|speech|encoder|multi_modal|mm_projector|mtp)[^.]*\.", re.I)

# Matrices that choose experts or gate them, that normalize, convolve or hold positions: small, and ruined by rounding.
KEPT = re.compile(
    r"(^|\.)(gate|router|wg|shared_expert_gate|gate_weight|expert_bias|e_score_correction_bias|conv1d|A_log|dt_proj|x_proj)(\.weight|\.bias)?$"
    r"|(^|\.)(router|gate)\.(layer|wg|linear|classifier)\.weight$"
    r"|norm[^.]*(\.weight)?$|rotary|relative_attention_bias|embed|lora_"
)

HEAD = re.compile(r"^(.*\.)?(lm_head|embed_out|output_projection|output)\.weight$")

EMBEDDING = re.compile(r"^(?!.*(vision|visual|audio|image|position))(.*\.)?(embed_tokens|wte|embed_in|word_embeddings|token_embd)\.weight$")

# Checkpoints that store [in, out]: GPT-2's Conv1D, and the fused experts of gpt-oss and Llama 4.
TRANSPOSED = {
    "gpt2": re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$"),
    "gpt_oss": re.compile(r"\.experts\.(\d+\.)?(gate_up_proj|down_proj)(\.weight)?$"),
    "llama4_text": re.compile(r"\.experts\.(\d+\.)?(gate_up_proj|down_proj)(\.weight)?$"),
    "llama4": re.compile(r"\.experts\.(\d+\.)?(gate_up_proj|down_proj)(\.weight)?$"),
    "openai-gpt": re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$"),
    "imagegpt": re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$"),
}

SMALLEST = 16
"""Matrices with a side below this stay as they are: their scales would outweigh them."""


def block_of(tensor: str) -> str | None:
    """`model.layers.3` for a tensor of that block of the decoder."""
    match = BLOCK.match(tensor)
    return match[1] if match and not FOREIGN.search(tensor) else None


def is_transposed(tensor: str, model_type: str) -> bool:
    pattern = TRANSPOSED.get(model_type)
    return bool(pattern and pattern.search(tensor))
