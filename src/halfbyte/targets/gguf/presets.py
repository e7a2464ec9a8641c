"""Presets: which type each tensor of a GGUF gets. They bear llama.cpp's names and mean what they mean there.

A preset is a type for most tensors and rules for those that deserve another: llama.cpp, src/llama-quant.cpp
(llama_tensor_get_type_impl), which the tests compare tensor by tensor.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from halfbyte.errors import UnknownName
from halfbyte.grids.grid import Shape
from halfbyte.targets.gguf.head import TYPES
from halfbyte.targets.gguf.names import ALIASES, PRESETS

PLAIN = {"F32", "F16", "BF16"}
PLAIN_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

# Where a row is no multiple of 256: the type in blocks of 32 that takes the place of one in blocks of 256.
FALLBACKS = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}  # fmt: skip
TWO_BITS = {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"}
IQ2_LARGE = {"IQ2_S", "IQ2_M"}

# Matrices that stay as they are, whatever the preset: parts of their names (tensor_allows_quantization).
KEPT = re.compile(
    r"_norm\.weight$|ffn_gate_inp\.weight$|^position_embd|token_types|ssm_conv1d|shortconv\.conv|attn_rel_b|altup|laurel|per_layer_model_proj"
)
KINDS = {  # in this order, by parts of names (tensor_get_category)
    "output": r"^output\.weight$", "embedding": r"^(per_layer_)?token_embd\.weight$", "qkv": r"attn_qkv\.weight",
    "kv_b": r"attn_kv_b\.weight",
    "v": r"attn_v\.weight", "k": r"attn_k\.weight", "q": r"attn_q\.weight", "o": r"attn_output\.weight", "up": "ffn_up",
    "gate": "ffn_gate", "down": "ffn_down",
}  # fmt: skip
LIKE_V = {"v", "qkv", "kv_b"}


@dataclass(frozen=True)
class Model:
    """What the rules ask of a model."""

    arch: str
    layers: int
    heads_per_kv: int = 1
    experts: int = 0
    imatrix: bool = False
    """llama.cpp chooses other types for some tensors when it has an importance matrix."""
    tied: bool = field(default=False, kw_only=True)


def is_preset(name: str) -> bool:
    """Whether a name, in any case, is a preset or another name of one."""
    return name.upper() in PRESETS or name.upper() in ALIASES


def preset_named(name: str) -> str:
    """The canonical name. Raises UnknownName."""
    upper = name.upper()
    upper = ALIASES.get(upper, upper)
    if upper not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return upper


def _is_quantizable(name: str, shape: Shape) -> bool:
    """Whether llama.cpp would quantize a tensor of this name."""
    return len(shape) > 1 and name.endswith("weight") and not KEPT.search(name)


def types(preset: str, tensors: Mapping[str, Shape], model: Model) -> dict[str, str]:
    """GGUF type by GGUF name, for every tensor that the preset quantizes; shapes as in torch, [..., in] last."""
    base = PRESETS[preset].type
    by_name: dict[str, str] = {}
    seen = dict.fromkeys((*KINDS, "other", "like v"), 0)
    like_v = sum(_kind(name) in LIKE_V for name in tensors)
    for name in sorted(tensors, key=order):
        if not _is_quantizable(name, tensors[name]):
            continue
        kind = _kind(name)
        counted = "like v" if kind in LIKE_V else kind
        layer = (
            order(name)[0]
            if model.experts > 1 and kind in ("down", "gate", "up") and preset not in TWO_BITS
            else seen[counted]
        )
        at = _Tensor(preset, base, kind, layer, like_v if counted == "like v" else model.layers, tensors[name], model)
        by_name[name] = _type(at)
        seen[counted] += 1
    return by_name


def fallback(type_name: str, width: int) -> str:
    """The type itself where its block divides the row, else one in smaller blocks, else F16."""
    for candidate in (type_name, FALLBACKS.get(type_name, type_name)):
        if width % TYPES[candidate].block == 0:
            return candidate
    return "F16"


@dataclass(frozen=True)
class _Tensor:
    preset: str
    base: str
    kind: str
    index: int
    """Which of its kind it is, counted by layers."""
    count: int
    shape: Shape
    model: Model

    @property
    def early(self) -> bool:
        return self.index < self.count // 8

    @property
    def deserves_more(self) -> bool:
        """The first and last eighth of the layers, and every third between them."""
        n = self.count
        return self.index < n // 8 or self.index >= 7 * n // 8 or (self.index - n // 8) % 3 == 2


def _type(at: _Tensor) -> str:
    if at.base in PLAIN:
        return at.base
    if at.kind == "output" or (at.kind == "embedding" and at.model.tied):
        return _output(at)
    if at.preset == "MXFP4_MOE":
        return "MXFP4" if len(at.shape) == 3 else "Q8_0"
    if at.kind == "embedding":
        return {"IQ2_XXS": "Q2_K", "IQ2_XS": "Q2_K", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "IQ3_XXS": "IQ3_S"}.get(
            at.preset, at.base
        )
    if at.preset in TWO_BITS:
        return _two_bits(at)
    if at.kind in LIKE_V:
        return _values(at)
    rules = {"k": _keys, "q": _queries, "down": _down, "o": _attention_output, "gate": _gate_up, "up": _gate_up}
    return rules[at.kind](at) if at.kind in rules else at.base


def _output(at: _Tensor) -> str:
    if (
        at.preset == "MXFP4_MOE"
        or at.model.arch == "falcon"
        or at.shape[-1] % TYPES[at.base].block
        or at.base == "Q8_0"
    ):
        return "Q8_0"
    return "Q5_K" if at.preset in (*TWO_BITS, "IQ3_XXS") else "Q6_K"


def _two_bits(at: _Tensor) -> str:
    larger = "IQ3_S" if at.preset in IQ2_LARGE else "Q2_K"
    if at.kind in LIKE_V:
        return "Q4_K" if at.model.heads_per_kv >= 4 or at.model.experts >= 4 else larger
    if at.kind == "k" and at.model.experts == 8:
        return "Q4_K"
    if at.kind == "down" and at.early:
        return larger
    if at.kind == "o":
        return "Q5_K" if at.model.experts == 8 else "IQ3_S" if at.preset in IQ2_LARGE else at.base
    return at.base


def _values(at: _Tensor) -> str:
    grouped = at.model.heads_per_kv >= 4
    chosen = at.base
    match at.preset:
        case "Q2_K":
            chosen = "Q4_K" if grouped else "Q3_K"
        case "IQ3_XXS":
            chosen = "Q4_K" if grouped else "IQ3_XXS" if at.model.imatrix else "IQ3_S"
        case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if grouped:
            chosen = "Q4_K"
        case "IQ3_M":
            chosen = "Q4_K"
        case "Q3_K_M":
            chosen = "Q5_K" if at.index < 2 else "Q4_K"
        case "Q3_K_L":
            chosen = "Q5_K"
        case "IQ4_NL" | "IQ4_XS" if grouped:
            chosen = "Q5_K"
        case "Q4_K_M" | "Q5_K_M" if at.deserves_more:
            chosen = "Q6_K"
        case "Q4_K_S" if at.index < 4:
            chosen = "Q5_K"
    # Eight heads share these: more bits cost next to nothing.
    if at.model.layers == 80 and at.model.heads_per_kv > 1 and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return "Q8_0" if at.model.experts == 8 else chosen


def _keys(at: _Tensor) -> str:
    return "Q8_0" if at.model.experts == 8 else _queries(at)


def _queries(at: _Tensor) -> str:
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(at.preset, at.base)


def _down(at: _Tensor) -> str:
    falcon = at.model.arch == "falcon"
    match at.preset:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S" if at.early:
            return "Q4_K"
        case "IQ3_XXS" if not at.model.imatrix:
            return "Q4_K" if at.early else "Q3_K"
        case "Q3_K_M":
            return "Q5_K" if at.index < at.count // 16 else "Q4_K" if not falcon or at.deserves_more else "Q3_K"
        case "IQ3_M" if at.early or (at.model.experts == 8 and at.deserves_more):
            return "Q4_K"
        case "Q3_K_L":
            return "Q4_K" if falcon else "Q5_K"
        case "Q4_K_M" if falcon:
            return "Q6_K" if at.index < at.count // 16 else "Q5_K" if at.deserves_more else "Q4_K"
        case "Q4_K_M" | "Q5_K_M" if at.deserves_more:
            return "Q6_K"
        case "IQ4_NL" | "IQ4_XS" if at.early and not at.model.imatrix:
            return "Q5_K"
        case "Q4_K_S" if at.early and not falcon:
            return "Q5_K"
        case "Q4_0" | "Q5_0" if at.early and at.model.imatrix:
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[at.preset]
    return at.base


EIGHT_EXPERTS = {
    "Q2_K",
    "IQ3_XS",
    "IQ3_XXS",
    "Q3_K_S",
    "Q3_K_M",
    "IQ4_NL",
    "Q4_K_S",
    "Q4_K_M",
    "IQ3_S",
    "IQ3_M",
    "IQ4_XS",
}


def _attention_output(at: _Tensor) -> str:
    if at.model.arch == "falcon":
        return "Q4_K" if at.preset == "Q3_K_L" else at.base
    if at.model.experts == 8:
        return "Q5_K" if at.preset in EIGHT_EXPERTS else at.base
    return {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}.get(
        at.preset, at.base
    )


def _gate_up(at: _Tensor) -> str:
    return "IQ3_XXS" if at.preset == "IQ3_XS" and at.count // 8 <= at.index < 7 * at.count // 8 else at.base


def _kind(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def order(name: str) -> tuple[int, str]:
    """llama.cpp's order of tensors: what is outside of the blocks first, then block by block."""
    match = re.match(r"blk\.(\d+)\.", name)
    return (int(match[1]) if match else -1, name)
