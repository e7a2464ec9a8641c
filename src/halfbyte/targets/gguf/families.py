"""What llama.cpp calls the tensors of a Hugging Face checkpoint, and how it wants their rows to lie.

One row a family, of names without `.weight` and `.bias`; ggml's are those of the gguf package. Where the same tensor
may bear several names, that which Hugging Face publishes comes first: a GGUF is read under it. Facts as in llama.cpp's
conversion/*.py and src/models/*.cpp.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any

import gguf
import torch
from jaxtyping import Int64
from torch import Tensor

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.models import roles
from halfbyte.names import Expert
from halfbyte.targets.gguf.entries import unanswered
from halfbyte.targets.gguf.settings import settings

Names = Mapping[str, str | tuple[str, str]]
"""What a checkpoint calls a tensor, and what gguf's own table of names calls it: mostly the same; two names: those of
the upper and the lower half of the rows. {e} is the number of an expert."""
Rows = Int64[Tensor, "rows"]


def _same_names(*names: str) -> Names:
    """Names that gguf's table has."""
    return {name: name for name in names}


OUTSIDE = _same_names("embed_tokens", "norm", "lm_head")
HEADS = ("lm_head", "embed_out")
"""Which gguf's table has only for families whose heads are not always the embedding."""
ATTENTION = _same_names("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
HEAD_NORMS = _same_names("self_attn.q_norm", "self_attn.k_norm")
GATED = _same_names("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = _same_names("input_layernorm", "post_attention_layernorm")
LATER_NORMS = _same_names("post_attention_layernorm", "post_feedforward_layernorm")
SANDWICH = _same_names(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
LLAMA: Names = {**ATTENTION, **NORMS, **GATED}
EXPERT_PARTS = ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj", "mlp.experts.{e}.down_proj")
GATE_AND_UP = EXPERT_PARTS[:2]
EXPERTS: Names = {
    **_same_names("mlp.gate", *EXPERT_PARTS),
    "mlp.experts.{e}.gate_up_proj": GATE_AND_UP,
    "mlp.experts.gate_up_proj": GATE_AND_UP,
    "mlp.experts.down_proj": "mlp.experts.{e}.down_proj",
}
MIXTRAL_EXPERTS: Names = {
    **_same_names("block_sparse_moe.gate", *(f"block_sparse_moe.experts.{{e}}.w{part}" for part in (1, 3, 2))),
    **EXPERTS,
}
GRANITE_EXPERTS: Names = {
    "block_sparse_moe.router.layer": "block_sparse_moe.router.layer",
    "block_sparse_moe.router": "block_sparse_moe.router.layer",
    "block_sparse_moe.input_linear": GATE_AND_UP,
    "block_sparse_moe.output_linear": "block_sparse_moe.output_linear",
    **{name.replace("mlp", "block_sparse_moe"): table_name for name, table_name in EXPERTS.items()},
    **_same_names(*(f"block_sparse_moe.experts.{{e}}.w{part}" for part in (1, 3, 2))),
}
GPT_OSS: Names = {
    **_same_names("input_layernorm"),
    **ATTENTION,
    **_same_names("self_attn.sinks", "post_attention_layernorm", "mlp.router"),
    "mlp.experts.gate_up_proj": GATE_AND_UP,
    "mlp.experts.down_proj": "mlp.experts.{e}.down_proj",
    "mlp.experts.{e}.gate_up_proj": GATE_AND_UP,
    "mlp.experts.{e}.down_proj": "mlp.experts.{e}.down_proj",
}
SHARED_EXPERT = _same_names(
    "mlp.shared_expert_gate",
    "mlp.shared_expert.gate_proj",
    "mlp.shared_expert.up_proj",
    "mlp.shared_expert.down_proj",
)
GPT2 = _same_names("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
GPT2_OUTSIDE = _same_names("wte", "wpe", "ln_f", "lm_head")
NEOX = _same_names(
    "input_layernorm",
    "attention.query_key_value",
    "attention.dense",
    "post_attention_layernorm",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
FALCON = _same_names(
    "input_layernorm",
    "ln_mlp",
    "ln_attn",
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
PHI3 = _same_names(
    "input_layernorm",
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)


def _numbered(rows: int, heads: int, parts: int) -> Int64[Tensor, "heads parts rest"]:
    """Rows by the head that they are of, and by their part of it."""
    if heads < 1 or rows % (heads * parts):
        raise BadCheckpoint(
            f"a matrix of {rows} rows is not that of {heads} heads of {parts} parts; it is not whole, or the model's "
            "config is of another"
        )
    return torch.arange(rows).reshape(heads, parts, -1)


def _pairs(heads: str) -> Callable[[Any, int], Rows]:
    """Rotary pairs as neighbours, as ggml's NORM rotation takes them; Hugging Face stores the first of every pair, then
    the second."""
    return lambda s, rows: _numbered(rows, getattr(s, heads), 2).transpose(1, 2).reshape(-1)


def _thirds(s: Any, rows: int) -> Rows:
    """All of q, all of k, all of v, out of a checkpoint that has them head by head."""
    return _numbered(rows, s.num_attention_heads, 3).transpose(0, 1).reshape(-1)


def _groups(s: Any, rows: int) -> Rows:
    """All of q, all of k, all of v, out of Falcon's groups: the heads of q that share a k and a v, then these two."""
    shared = s.num_kv_heads if s.new_decoder_architecture else 1 if s.multi_query else s.num_attention_heads
    grouped = _numbered(rows, shared, s.num_attention_heads // shared + 2)
    return torch.cat([grouped[:, :-2].reshape(-1), grouped[:, -2].reshape(-1), grouped[:, -1].reshape(-1)])


PAIRED = {"attn_q": _pairs("num_attention_heads"), "attn_k": _pairs("num_key_value_heads")}
PLAIN_ROPE = ("default", "linear", "yarn")


def _gemma_scale(layers: int) -> Callable[[Any], float]:
    """llama.cpp knows the one size whose queries are scaled by the width of a head that it has not by its number of
    blocks."""
    return lambda s: s.hidden_size // s.num_attention_heads if s.num_hidden_layers == layers else s.head_dim


@dataclass(frozen=True)
class Family:
    """What llama.cpp must know of one `model_type`."""

    arch: str
    block: Names = field(default_factory=lambda: LLAMA)
    outside: Names = field(default_factory=lambda: OUTSIDE)
    stem: tuple[str, str] = ("model.", "layers")
    """Where the decoder's tensors lie, and its blocks therein."""
    rows: Mapping[str, Callable[[Any, int], Rows]] = field(default_factory=dict)
    """ggml's names of tensors whose rows lie otherwise, and in which order."""
    transposed: tuple[str, ...] = ()
    """ggml's names of matrices that the checkpoint stores [in, out]."""
    alternating: bool = False
    """Where one tensor holds the rows of two, they alternate; otherwise the first half of them is the first
    tensor's."""
    beside: Names = field(default_factory=dict)
    """What a checkpoint calls a tensor only in files whose blocks have this one of ggml's too."""
    bare: tuple[str, ...] = ()
    """Tensors that the checkpoint names without `.weight`, and their biases with `_bias`."""
    adds_one: bool = False
    """Norms multiply by 1 + weight; GGUF stores that sum."""
    own_head: bool = False
    """The file holds a head even where the model has none but the embedding."""
    windowed: bool = False
    """Layers attend to a window by turns, where another row with the same `arch` has none."""
    turns_part: bool = False
    """Rotary embeddings may leave a part of each head as it is."""
    two_bases: bool = False
    """Layers with a window may turn heads from another base than the others."""
    loses_window: bool = False
    """All layers may attend to a window of tokens, which llama.cpp does not do."""
    ropes: tuple[str, ...] = PLAIN_ROPE
    assumed: Mapping[str, Any] = field(default_factory=dict)
    """What llama.cpp computes whatever the file says, by the config's names: a value, several that are the same to it,
    or a function of the config."""

    @cached_property
    def block_names(self) -> Names:
        """ggml's names of a block's tensors, without its number."""
        return {name: self._in_ggml(table_name, f"{''.join(self.stem)}.0.") for name, table_name in self.block.items()}

    @cached_property
    def outside_names(self) -> Names:
        """ggml's names of all others."""
        return {name: self._in_ggml(table_name, self.stem[0]) for name, table_name in self.outside.items()}

    def _in_ggml(self, table_name: str | tuple[str, str], home: str) -> str | tuple[str, str]:
        if isinstance(table_name, tuple):
            return ggml_name(self.arch, f"{home}{table_name[0]}"), ggml_name(self.arch, f"{home}{table_name[1]}")
        return (
            gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.OUTPUT]
            if table_name in HEADS
            else ggml_name(self.arch, f"{home}{table_name}")
        )


@cache
def ggml_name(arch: str, name: str) -> str:
    """What gguf's table says of a tensor, without the number of its block. Raises Unsupported for what it has not."""
    found = _table(arch).get_name(name.replace(".{e}.", "."))
    if found is None:
        raise Unsupported(f"gguf {version('gguf')} has no name for '{name}' of '{arch}'; pip install -U gguf")
    return found.removeprefix("blk.0.")


@cache
def _table(arch: str) -> gguf.TensorNameMap:
    """Of a model of one block."""
    number = next((number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    if number is None:
        raise Unsupported(f"gguf {version('gguf')} does not know '{arch}'; pip install -U gguf")
    return gguf.get_tensor_name_map(number, 1)


LLAMA_LIKE = Family("llama", rows=PAIRED, ropes=(*PLAIN_ROPE, "llama3"), assumed={"hidden_act": "silu"})
UNBIASED = {"hidden_act": "silu", "attention_bias": False}
QWEN = {**UNBIASED, "use_sliding_window": False}
SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu"}
GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": (False, None),
}
GELU = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast")
"""Which llama.cpp looks up in a table of 16 bits, further from each than they are from one another."""
GRANITE_ROWS: dict[str, Any] = {"rows": PAIRED, "ropes": (*PLAIN_ROPE, "llama3"), "assumed": {"hidden_act": "silu"}}

FAMILIES: dict[str, Family] = {
    "llama": LLAMA_LIKE,
    "mistral": replace(LLAMA_LIKE, loses_window=True),
    "mixtral": Family(
        "llama",
        {**ATTENTION, **NORMS, **MIXTRAL_EXPERTS},
        rows=PAIRED,
        loses_window=True,
        assumed={"hidden_act": "silu"},
    ),
    "smollm3": Family(
        "smollm3",
        rows=PAIRED,
        assumed={
            "no_rope_layers": lambda s: [int((i + 1) % 4 != 0) for i in range(s.num_hidden_layers)],
            "use_sliding_window": False,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "granite": Family("granite", **GRANITE_ROWS),
    "granitemoe": Family("granitemoe", {**ATTENTION, **NORMS, **GRANITE_EXPERTS}, **GRANITE_ROWS),
    "qwen2": Family("qwen2", assumed=QWEN),
    "qwen2_moe": Family(
        "qwen2moe",
        {**ATTENTION, **NORMS, **EXPERTS, **SHARED_EXPERT},
        own_head=True,
        assumed={**QWEN, **SPARSE, "norm_topk_prob": False},
    ),
    "qwen3": Family("qwen3", {**LLAMA, **HEAD_NORMS}, assumed=QWEN),
    "qwen3_moe": Family(
        "qwen3moe",
        {**ATTENTION, **HEAD_NORMS, **NORMS, **EXPERTS},
        assumed={**QWEN, **SPARSE, "norm_topk_prob": True},
    ),
    "gemma": Family(
        "gemma",
        adds_one=True,
        assumed={
            "tie_word_embeddings": True,
            "hidden_act": GELU,
            "attention_bias": False,
            "use_bidirectional_attention": (False, None),
        },
    ),
    "gemma2": Family(
        "gemma2",
        {**ATTENTION, **SANDWICH, **GATED},
        adds_one=True,
        assumed={
            **GEMMA,
            "tie_word_embeddings": True,
            "query_pre_attn_scalar": _gemma_scale(46),
            "attn_logit_softcapping": lambda s: s.attn_logit_softcapping or 50.0,  # where the file says none, too
            "final_logit_softcapping": lambda s: s.final_logit_softcapping or 30.0,
        },
    ),
    "gemma3_text": Family(
        "gemma3",
        {**ATTENTION, **HEAD_NORMS, **SANDWICH, **GATED},
        adds_one=True,
        two_bases=True,
        assumed={**GEMMA, "attn_logit_softcapping": None, "query_pre_attn_scalar": _gemma_scale(62)},
    ),
    "phi3": Family(
        "phi3", PHI3, turns_part=True, loses_window=True, ropes=("default", "longrope"), assumed={"hidden_act": "silu"}
    ),
    "olmo2": Family("olmo2", {**ATTENTION, **HEAD_NORMS, **LATER_NORMS, **GATED}, own_head=True, assumed=UNBIASED),
    "olmo3": Family(
        "olmo2", {**ATTENTION, **HEAD_NORMS, **LATER_NORMS, **GATED}, own_head=True, windowed=True, assumed=UNBIASED
    ),
    "gpt_oss": Family(
        "gpt-oss",
        GPT_OSS,
        transposed=("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        alternating=True,
        bare=("self_attn.sinks", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
        windowed=True,
        assumed={
            "layer_types": lambda s: (
                s.layer_types if "sliding_attention" in s.layer_types else "some that attend to a window"
            ),
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "attention_bias": True,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
        },
    ),
    "olmoe": Family(
        "olmoe",
        {**ATTENTION, **HEAD_NORMS, **NORMS, **EXPERTS},
        own_head=True,
        assumed={
            "norm_topk_prob": False,
            "clip_qkv": None,
            **UNBIASED,
            "num_key_value_heads": lambda s: s.num_attention_heads,
        },
    ),
    "gpt2": Family(
        "gpt2",
        GPT2,
        GPT2_OUTSIDE,
        ("transformer.", "h"),
        transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
        assumed={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "starcoder2": Family(
        "starcoder2",
        {**ATTENTION, **NORMS, **_same_names("mlp.c_fc", "mlp.c_proj")},
        loses_window=True,
        assumed={"hidden_act": "gelu_pytorch_tanh", "use_bias": True},
    ),
    "stablelm": Family(
        "stablelm", own_head=True, turns_part=True, assumed={"hidden_act": "silu", "qk_layernorm": False}
    ),
    "gpt_neox": Family(
        "gptneox",
        NEOX,
        _same_names("embed_in", "final_layer_norm", *HEADS[::-1]),
        ("gpt_neox.", "layers"),
        rows={"attn_qkv": _thirds},
        own_head=True,
        turns_part=True,
        assumed={"attention_bias": True, "hidden_act": ("gelu", *GELU)},
    ),
    "falcon": Family(
        "falcon",
        FALCON,
        _same_names("word_embeddings", "ln_f", "lm_head"),
        ("transformer.", "h"),
        rows={"attn_qkv": _groups},
        beside={"ln_mlp": "attn_norm_2"},
        assumed={"alibi": False, "parallel_attn": True, "bias": False},
    ),
    "cohere": Family(
        "command-r",
        {**_same_names("input_layernorm"), **ATTENTION, **GATED},
        assumed={"use_qk_norm": False, "tie_word_embeddings": True, **UNBIASED},
    ),
}
"""Transformers' `model_type` to its row."""

WRAPPERS = re.compile(r"^((model|transformer|gpt_neox|language_model)\.)+")
ELSEWHERE = "not of the text decoder"
BUFFERS = re.compile(r"rotary_emb\.|\.rotary\.|(^|\.)attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$")
PLAIN = re.compile(r"\.bias$|norm(_2)?\.weight$|^position_embd|_gate_inp(_shexp)?\.weight$")
"""Tensors that llama.cpp wants in 32 bits: biases, norms, positions, and what chooses experts."""


@dataclass(frozen=True)
class MappedTensor:
    """A tensor of the GGUF that a tensor of the checkpoint fills, or a part of it that it fills."""

    name: str
    expert: int | None = None
    """Its index in the stack; None also where the checkpoint's tensor is a stack itself."""
    rows: Rows | None = None
    """Row r of the GGUF's matrix is row rows[r] of the checkpoint's [out, in]; None: as it lies. Fewer rows than there
    are: a part."""
    transposed: bool = False
    """The checkpoint's matrix is [in, out]."""
    add: float = 0.0
    """To be added to every value."""
    plain: bool = False
    """Stored in 32 bits, never quantized."""

    def dim(self, dims: int) -> int:
        """Of the rows, in a tensor of so many dimensions: a matrix, a bias, or a stack of either."""
        return dims - 1 if dims == 1 or self.name.endswith(".bias") else dims - 2

    def stored(self, value: Tensor) -> Tensor:
        """The checkpoint's tensor as it lies in the GGUF; in 32 bits where something is added."""
        value = value.mT if self.transposed else value
        value = value if self.rows is None else value.index_select(self.dim(value.dim()), self.rows.to(value.device))
        return value.float() + self.add if self.add else value

    def restored(self, stored: Tensor) -> Tensor:
        """The inverse of `stored`, of a tensor that is whole."""
        value = stored - self.add if self.add else stored
        value = value if self.rows is None else value.index_select(self.dim(value.dim()), torch.argsort(self.rows))
        return value.mT if self.transposed else value


def family_of(config: Mapping[str, Any]) -> Family:
    """The row of a config.json. Raises Unsupported for a family, or a variant of one, that llama.cpp would compute
    otherwise."""
    kind = (config.get("text_config") or config).get("model_type", "")
    if kind not in FAMILIES:
        raise Unsupported(
            f"GGUF is not written for '{kind}' yet; known are {', '.join(FAMILIES)} (safetensors formats "
            "take any family)"
        )
    family, s = FAMILIES[kind], settings(config)
    for name, wanted in family.assumed.items():
        wanted = wanted(s) if callable(wanted) else wanted
        if getattr(s, name, None) not in wanted if isinstance(wanted, tuple) else getattr(s, name, wanted) != wanted:
            expected = " or ".join(map(str, wanted)) if isinstance(wanted, tuple) else wanted
            raise Unsupported(
                f"llama.cpp computes '{family.arch}' with {name} = {expected}, but config.json says "
                f"{getattr(s, name)}: a GGUF of it would go wrong"
            )
    if entry := next(unanswered(s, family.assumed), None):
        raise Unsupported(
            f"config.json says {entry[0]} = {entry[1]}, and what llama.cpp's '{family.arch}' makes of that is not "
            "known: a GGUF of it might go wrong"
        )
    _require_ropes(family, s)
    return family


def _require_ropes(family: Family, s: Any) -> None:
    """Raise Unsupported for rotary embeddings that llama.cpp has not."""
    by_layers = [rope for rope in (getattr(s, "rope_parameters", None) or {}).values() if isinstance(rope, dict)]
    sliding = (getattr(s, "rope_parameters", None) or {}).get("sliding_attention") or {}
    kind = rope_of(s).get("rope_type", "default")
    if kind not in family.ropes:
        raise Unsupported(
            f"llama.cpp computes '{family.arch}' without rotary scaling of type '{kind}'; it has "
            f"{', '.join(family.ropes)}"
        )
    for name, fixed in (
        ("beta_fast", 32),
        ("beta_slow", 1),
    ):  # which it reads from its command line, and from files of one other architecture
        if kind == "yarn" and (configured := rope_of(s).get(name) or fixed) != fixed:
            raise Unsupported(
                f"llama.cpp computes yarn with {name} = {fixed} alone, and config.json says {configured}: a GGUF of it "
                "would go wrong"
            )
    if sliding.get("rope_type", "default") != "default":
        raise Unsupported(
            "llama.cpp stretches no rotary embeddings of layers with a window, and config.json does: "
            f"{sliding['rope_type']}"
        )
    if sliding and not family.two_bases and sliding["rope_theta"] != rope_of(s)["rope_theta"]:
        raise Unsupported(
            f"llama.cpp turns all layers of '{family.arch}' from one base, and config.json says "
            f"{sliding['rope_theta']} for those with a window"
        )
    if not family.turns_part and any(
        rope.get("partial_rotary_factor", 1.0) != 1.0 for rope in by_layers or [rope_of(s)]
    ):
        raise Unsupported(
            f"llama.cpp turns whole heads of '{family.arch}', and config.json says partial_rotary_factor = "
            f"{rope_of(s)['partial_rotary_factor']}"
        )


def family_named(arch: str, experts: int = 0, windowed: bool = False) -> tuple[str, Family]:
    """`model_type` and row for a GGUF's `general.architecture`, number of experts and whether it has a sliding window,
    for reading.

    Raises Unsupported for one that is in no row.
    """
    candidates = [(kind, family) for kind, family in FAMILIES.items() if family.arch == arch]
    if not candidates:
        raise Unsupported(
            f"a GGUF of '{arch}' is not read yet; known are "
            f"{', '.join(dict.fromkeys(f.arch for f in FAMILIES.values()))}"
        )

    def alike(family: Family) -> tuple[bool, bool]:
        sparse = any(
            "ffn_down_exps" in (name if isinstance(name, tuple) else (name,)) for name in family.block_names.values()
        )
        return sparse == bool(experts), family.windowed == windowed

    return max(candidates, key=lambda named: alike(named[1]))


def rope_of(s: Any) -> dict[str, Any]:
    """Rotary parameters of the layers that attend to everything."""
    parameters = getattr(s, "rope_parameters", None) or {}
    return parameters.get("full_attention", parameters)


def lost_window(s: Any) -> int | None:
    """The tokens that every layer attends to, where llama.cpp attends to all."""
    return getattr(s, "sliding_window", None) if FAMILIES[s.model_type].loses_window else None


def head_dim(s: Any) -> int:
    """In-features of an attention's head."""
    return getattr(s, "head_dim", None) or s.hidden_size // s.num_attention_heads


def reassembled(mapped: Sequence[MappedTensor], parts: Sequence[Tensor]) -> Tensor:
    """The checkpoint's tensor that became several of the GGUF, from these."""
    dim, order = mapped[0].dim(parts[0].dim()), torch.argsort(rows_of(mapped))
    value = torch.cat(list(parts), dim).index_select(dim, order)
    return value.mT if mapped[0].transposed else value


def rows_of(mapped: Sequence[MappedTensor]) -> Rows:
    """Which rows of the checkpoint's tensor these hold, one after the other."""
    return torch.cat([part.rows for part in mapped if part.rows is not None])


class TensorNameMap:
    """Tensors of one checkpoint under ggml's names.

    It serves both ways: what `mapped` says of a tensor that is to be written is also where it is read from. To read a
    GGUF as a checkpoint, take `checkpoint_shapes` of its tensors.
    """

    def __init__(self, family: Family, config: Mapping[str, Any], shapes: Mapping[str, Shape]):
        """`shapes`: of the checkpoint's tensors, by name."""
        self.family, self.shapes, self.settings = family, shapes, settings(config)
        self.has_head = any(re.search(r"(lm_head|embed_out)\.weight$", name) for name in shapes)
        self.tied = bool(self.settings.tie_word_embeddings) or not self.has_head
        self._reasons: dict[str, str | None] = {}
        self._mapped_tensors: dict[str, tuple[MappedTensor, ...]] = {}

    def dropped(self, tensor: str) -> str | None:
        """Why the GGUF has no such tensor; None if it has."""
        if tensor not in self._reasons:
            self._reasons[tensor] = self._reason(tensor)
        return self._reasons[tensor]

    def _reason(self, tensor: str) -> str | None:
        if roles.AHEAD.search(tensor):
            return "for predicting several tokens at once"
        if roles.FOREIGN.search(tensor):
            return ELSEWHERE
        if BUFFERS.search(tensor):
            return "computed from the config"
        name, _, block = self._split(tensor)
        if block is not None and block >= self.settings.num_hidden_layers:
            return "beyond the model's last block"
        if self.family.outside_names.get(name) == "output" and self.tied:
            return "the head is the embedding"
        return None

    def mapped(self, tensor: str) -> tuple[MappedTensor, ...]:
        """What a tensor of the checkpoint becomes: one tensor, or several; none if it is dropped. Raises Unsupported
        for a tensor that is in no table."""
        if tensor not in self._mapped_tensors:
            self._mapped_tensors[tensor] = () if self.dropped(tensor) else self._placed(tensor)
        return self._mapped_tensors[tensor]

    def _placed(self, tensor: str) -> tuple[MappedTensor, ...]:
        name, suffix, block = self._split(tensor)
        of = Expert.of(name)
        pattern, expert = (f"{of.home}.{{e}}.{of.part}", of.number) if of else (name, None)
        names = (self.family.outside_names if block is None else self.family.block_names).get(pattern)
        if names is None:
            raise Unsupported(
                f"llama.cpp's '{self.family.arch}' has no place for tensor '{tensor}', so no GGUF can hold this model"
            )
        if isinstance(names, tuple):
            rows = torch.arange(
                self.shapes[tensor][-1 if suffix == "bias" or names[0] in self.family.transposed else -2]
            )
            halves = (rows[::2], rows[1::2]) if self.family.alternating else rows.split(len(rows) // 2)
            return tuple(
                self._mapped(base, suffix, block, expert, half) for base, half in zip(names, halves, strict=True)
            )
        placed = (self._mapped(names, suffix, block, expert, self._order(names, tensor)),)
        if names == "token_embd" and self.family.own_head and self.tied:
            return (*placed, self._mapped("output", suffix, None, None, None))
        return placed

    def extra(self) -> dict[str, Tensor]:
        """Tensors of the GGUF that the config says and no checkpoint holds, [head_dim / 2] in F32."""
        rope = rope_of(self.settings)
        if rope.get("rope_type") == "llama3":
            return {"rope_freqs.weight": llama3_factors(rope, head_dim(self.settings))}
        if rope.get("rope_type") == "longrope":
            return {
                f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
                for kind in ("long", "short")
            }
        return {}

    def _split(self, tensor: str) -> tuple[str, str, int | None]:
        """Name without wrappers and block, suffix, number of the block."""
        name = WRAPPERS.sub("", tensor)
        block = re.match(rf"{self.family.stem[1]}\.(\d+)\.(.*)", name)
        name = block[2] if block else name
        body, _, last = name.rpartition(".")
        number = int(block[1]) if block else None
        if name.removesuffix("_bias") in self.family.bare:
            return name.removesuffix("_bias"), "bias" if name.endswith("_bias") else "weight", number
        return (body, last, number) if last in ("weight", "bias") else (name, "weight", number)

    def _order(self, base: str, tensor: str) -> Rows | None:
        shape = self.shapes[tensor]
        return self.family.rows[base](self.settings, shape[0]) if base in self.family.rows else None

    def _mapped(self, base: str, suffix: str, block: int | None, expert: int | None, rows: Rows | None) -> MappedTensor:
        name = f"{base}.{suffix}" if block is None else f"blk.{block}.{base}.{suffix}"
        add = 1.0 if self.family.adds_one and name.endswith("norm.weight") else 0.0
        return MappedTensor(
            name,
            expert,
            rows,
            base in self.family.transposed and suffix == "weight",
            add,
            bool(PLAIN.search(name.removeprefix(f"blk.{block}."))),
        )


def checkpoint_shapes(family: Family, tensors: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes of the checkpoint that a GGUF with `tensors` holds, as Hugging Face publishes such: experts of a
    stack apart where the family has them apart. Raises Unsupported for a tensor that is in no table.
    """
    shapes: dict[str, Shape] = {}
    for tensor, shape in tensors.items():
        if tensor.startswith("rope_f"):
            continue  # the config says them
        body, _, suffix = tensor.rpartition(".")
        block = re.match(r"blk\.(\d+)\.(.*)", body)
        table, base = (family.block_names, block[2]) if block else (family.outside_names, body)
        called = [(hf, ggml) for hf, ggml in table.items() if base in (ggml if isinstance(ggml, tuple) else (ggml,))]
        beside = {hf for hf, other in family.beside.items() if block and f"blk.{block[1]}.{other}.weight" in tensors}
        name, ggml = max(called, key=lambda names: names[0] in beside, default=("", ""))
        if not name:
            raise Unsupported(
                f"tensor '{tensor}' of the GGUF is none that a Hugging Face checkpoint of '{family.arch}' has"
            )
        decoder, blocks = family.stem
        is_bias = suffix == "bias"
        ending = f".{suffix}" if name not in family.bare else "_bias" if is_bias else ""
        name = (
            f"{decoder}{blocks}.{block[1]}.{name}{ending}"
            if block
            else f"{'' if base == 'output' else decoder}{name}{ending}"
        )
        if "{e}" in name:
            shapes |= {name.format(e=e): shape[1:] for e in range(shape[0])}
        elif base == "ffn_gate_inp_shexp":
            shapes[name] = (1, shape[-1])  # llama.cpp's own files have it without the 1
        else:
            rows = len(shape) - (1 if is_bias else 2)
            shape = (*shape[:rows], 2 * shape[rows], *shape[rows + 1 :]) if isinstance(ggml, tuple) else shape
            shapes[name] = (*shape[:-2], shape[-1], shape[-2]) if base in family.transposed and not is_bias else shape
    return shapes


def llama3_factors(rope: Mapping[str, Any], width: int) -> Tensor:
    """By what llama.cpp divides each frequency so that Llama 3's stretched context comes out, [width / 2]
    (Transformers' modeling_rope_utils.py)."""
    wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
