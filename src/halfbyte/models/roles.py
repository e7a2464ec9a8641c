"""The few facts about architectures that neither shapes nor data flow can give, as patterns over tensor names.

A weight that a method may quantize is a matrix inside a numbered block of the decoder. What follows says which such
matrices are something else, and which lie transposed. Of names that are in no pattern, the model's modules are asked
(models/linears.py).
"""

import re
from functools import lru_cache

# <prefix>.<integer>.: a block of a stack, "model.layers.3", "transformer.h.11", "gpt_neox.layers.0".
BLOCK = re.compile(r"^((?:[^.\d][^.]*\.)+?\d+)\.")

# Stacks that are not the text decoder, by what comes before a block's number: a decoder's cross-attention may be called
# encoder_attn.
FOREIGN = re.compile(
    r"(^|\.)((vision|visual|image|audio|speech|encoder|multi_modal|mm_projector|mtp)[^.]*|[^.]*(connector|resampler|perceiver|projector|aligner))\.",
    re.I,
)

# What predicts further tokens ahead, beside the decoder.
AHEAD = re.compile(r"(^|\.)mtp[^.]*\.")

# Matrices that choose experts or gate them, that normalize, convolve or hold positions: small, and ruined by rounding.
KEPT = re.compile(
    r"(^|\.)(gate|wg|shared_expert_gate|gate_weight|expert_bias|e_score_correction_bias|conv1d|A_log|dt_proj|x_proj)(\.weight|\.bias)?$"
    r"|(^|\.)(gate|[^.]*router[^.]*)(\.|$)"
    r"|norm[^.]*(\.weight)?$|rotary|relative_attention_bias|embed|lora_"
)

# Linears of the well-known families, in their blocks: nobody need be asked what these are, or how they lie.
ORDINARY = re.compile(
    r"\.self_attn\.((q|k|v|o|qkv|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa)\.weight$"
    r"|\.mlp\.(experts\.\d+\.|shared_experts?\.)?(gate|up|gate_up|down)_proj\.weight$"
    r"|\.block_sparse_moe\.experts\.\d+\.w[123]\.weight$"
    r"|^blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?)\.weight$"
)

HEAD = re.compile(r"^(.*\.)?(lm_head|embed_out|output_projection|output)\.weight$")

# Families whose head is the embedding where config.json says nothing of it; others are asked.
TIED = {
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "falcon",
    "bloom",
    "mpt",
    "opt",
    "mamba",
    "cohere",
    "cohere2",
    "starcoder2",
}

EMBEDDING = re.compile(
    r"^(?!.*(vision|visual|audio|image|position))(.*\.)?(embed_tokens|wte|embed_in|word_embeddings|token_embd)\.weight$"
)

# Checkpoints that store [in, out]: GPT-2's Conv1D, and the fused experts of gpt-oss and Llama 4.
TRANSPOSED = {
    "gpt2": re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$"),
    "gpt_oss": re.compile(r"\.experts\.(\d+\.)?(gate_up_proj|down_proj)(\.weight)?$"),
    "llama4_text": re.compile(r"\.experts\.(gate_up_proj|down_proj)$"),
    "llama4": re.compile(r"\.experts\.(gate_up_proj|down_proj)$"),
    "openai-gpt": re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$"),
    "imagegpt": re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$"),
}

# Stacks of experts, and what engines call the linears of one expert, whose rows the stack has one after the other: vllm
# model_executor/models/{llama4,qwen3_vl_moe,granitemoe,granitemoehybrid}.py. Stacks of other families are not known to
# be read apart.
GATED = {
    ".experts.gate_up_proj": (".experts", ("gate_proj", "up_proj")),
    ".experts.down_proj": (".experts", ("down_proj",)),
}
GRANITE, IN, OUT = ".block_sparse_moe.experts", ".block_sparse_moe.input_linear", ".block_sparse_moe.output_linear"
STACKS: dict[str, dict[str, tuple[str, tuple[str, ...]]]] = {
    **dict.fromkeys(
        ("llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_5_moe", "qwen3_5_moe_text"), GATED
    ),
    # Published apart, and fused where Transformers saved them as it has them.
    **dict.fromkeys(
        (
            "qwen2_moe",
            "qwen3_moe",
            "qwen3_next",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe",
            "ernie4_5_moe",
            "olmoe",
        ),
        GATED,
    ),
    **{family: {IN: (GRANITE, ("w1", "w3")), OUT: (GRANITE, ("w2",))} for family in ("granitemoe", "granitemoeshared")},
    "granitemoehybrid": {IN: (GRANITE, ("gate_proj", "up_proj")), OUT: (GRANITE, ("down_proj",))},
}

SMALLEST = 16
"""Matrices with a side below this stay as they are: their scales would outweigh them."""


@lru_cache(maxsize=1 << 17)  # large mixtures have as many tensors, and each is asked about many times
def block_of(tensor: str, encoders: bool = False) -> str | None:
    """`model.layers.3` for a tensor of a module in that block of the decoder, and with `encoders` in that of another
    stack."""
    match = BLOCK.match(tensor)
    inside = (
        match is not None and "." in tensor[match.end() :]
    )  # what is numbered itself is a list of matrices, and no block
    return match[1] if match and inside and (encoders or not FOREIGN.search(f"{match[1]}.")) else None


def is_head(tensor: str) -> bool:
    """Whether a tensor is the weight of the language model's head."""
    return bool(HEAD.match(tensor)) and not BLOCK.match(tensor) and not FOREIGN.search(tensor)


def is_transposed(tensor: str, model_type: str) -> bool:
    """Whether a family's checkpoints store this tensor [in, out]."""
    pattern = TRANSPOSED.get(model_type)
    return bool(pattern and pattern.search(tensor))


def parts_of(stack: str, model_type: str) -> list[tuple[str, str]]:
    """What a stack of experts is apart: of each linear the list of experts and, after the expert's number, its name."""
    name = stack.removesuffix(".weight")
    return [
        (name.removesuffix(end) + home, part)
        for end, (home, parts) in STACKS.get(model_type, {}).items()
        if name.endswith(end)
        for part in parts
    ]


def stacks_of(home: str, part: str, model_type: str) -> list[tuple[str, int]]:
    """The inverse: stacks in which the linear of that name may lie, each with the number of parts before it."""
    stacks = STACKS.get(model_type, {}).items()
    return [
        (home.removesuffix(ending) + end, parts.index(part))
        for end, (ending, parts) in stacks
        if home.endswith(ending) and part in parts
    ]
