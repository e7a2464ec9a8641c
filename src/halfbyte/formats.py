"""Number formats by name, as data: what a weight's grid is made of, and schemes of grids.

Nothing here needs torch, so that wrong names are refused before it is imported. `halfbyte.grids` makes grids of these
rows; to add a scalar format whose levels and scales are known: one line in SCALARS.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from halfbyte.errors import BadRequest, UnknownName


class ScalarFormat(NamedTuple):
    """Levels times scales."""

    levels: str
    """Which numbers a code stands for: a key of `halfbyte.grids.scalar.LEVELS`."""
    granularity: int | str
    """Weights per scale; or "channel" (the whole row), "tensor", or "block" (128 x 128)."""
    scales: str
    """How a scale is stored: a key of `halfbyte.grids.scalar.STORAGES`."""
    flat: bool = False
    """Whether groups follow one another through the matrix, whatever its rows."""


@dataclass(frozen=True)
class KFormat:
    """What there is to know of a K-quant."""

    name: str
    super_block: int
    """In-features that share the fp16 numbers."""
    group: int
    """In-features that share one scale of the lowest level."""
    top: int
    """The largest code."""
    zero: int | None
    """The code of zero; None: codes count from a minimum."""
    scales: tuple[int, int] | None
    """The range of the integer scales (and, from 0, of the integer minima); None: one level."""
    stored_bits: int
    """Bytes of a block, in bits: padding and all."""

    @property
    def has_minimum(self) -> bool:
        """Whether codes count from a minimum."""
        return self.zero is None

    @property
    def middle(self) -> int:
        """The code that stands for the offset."""
        return self.zero or 0


@dataclass(frozen=True)
class LatticeFormat:
    """What there is to know of a lattice."""

    name: str
    magnitudes: tuple[int | float, ...]
    dimension: int
    """Magnitudes in one entry of the codebook."""
    vector_size: int
    group: int
    """In-features that share an integer scale."""
    top: int
    """The largest integer scale."""
    unit: int | float
    spread: int | float
    """The scale that suits normally distributed weights of variance 1."""
    parity: bool
    """The number of negative weights in each 8 is even."""
    stored_bits: int
    """Bytes of 256 weights, in bits."""


class Preset(NamedTuple):
    """A name that users know for a scheme, and the method that suits it."""

    scheme: str
    method: str
    others: Mapping[re.Pattern[str], str] = {}
    """Modules that get another scheme, or keep for 16 bits: the first pattern that is in their names decides. Heads
    that an engine does not load so stay in 16 bits."""


# Integer grids, FP8 and those of bitsandbytes are read by pattern; SCALARS has those of them that help, completion and
# the matrix test show.
INTEGERS = re.compile(
    r"int(?P<bits>[2-8])-(?P<granularity>tensor|channel|g(?P<group>[1-9]\d*))(?P<asym>-asym)?(-(?P<scale>fp16|bf16|fp32))?"
)
FP8 = re.compile(r"fp8-(?P<levels>e4m3|e5m2)-(?P<granularity>tensor|channel|block)(-(?P<scale>fp32|bf16|fp16))?")
ABSMAX = re.compile(r"(?P<kind>nf4|fp4)-g(?P<group>[1-9]\d*)(?P<double>-double)?")
PATTERNS = (INTEGERS, FP8, ABSMAX)
ACTIVATIONS = re.compile(
    r"(?P<number>int[2-8]|fp8-e4m3|fp8-e5m2)-(?P<granularity>tensor|token|static|head|g(?P<group>[1-9]\d*))(?P<asym>-asym)?"
)
"""What activations are rounded to: a number, and what shares a scale."""

SCALARS = {
    **{
        f"int{bits}-{word}{asym}": ScalarFormat(f"int{bits}{asym}", granularity, "fp16")
        for bits in range(2, 9)
        for word, granularity in (("g32", 32), ("g64", 64), ("g128", 128), ("channel", "channel"), ("tensor", "tensor"))
        for asym in (("", "-asym") if word != "tensor" else ("",))
    },
    "iq4_nl": ScalarFormat("iq4", 32, "iq4-fp16"),
    "iq4_xs": ScalarFormat("iq4", 32, "iq4-under-fp16"),
    "mxfp4": ScalarFormat("ggml-e2m1-mx", 32, "ggml-e8m0"),
    "ggml-nvfp4": ScalarFormat("ggml-e2m1", 16, "ggml-e4m3"),
    **{
        f"fp8-{levels}-{granularity}": ScalarFormat(levels, granularity, "fp32")
        for levels in ("e4m3", "e5m2")
        for granularity in ("tensor", "channel", "block")
    },
    "mxfp8-e4m3": ScalarFormat("e4m3", 32, "e8m0"),
    "mxfp8-e5m2": ScalarFormat("e5m2", 32, "e8m0"),
    "mxfp6-e2m3": ScalarFormat("e2m3", 32, "e8m0"),
    "mxfp6-e3m2": ScalarFormat("e3m2", 32, "e8m0"),
    "nvfp4": ScalarFormat("e2m1", 16, "e4m3-under-global"),
    "nf4-g64": ScalarFormat("nf4", 64, "absmax", flat=True),
    "nf4-g64-double": ScalarFormat("nf4", 64, "absmax-nested", flat=True),
    "fp4-g64": ScalarFormat("fp4", 64, "absmax", flat=True),
    "fp4-g64-double": ScalarFormat("fp4", 64, "absmax-nested", flat=True),
    "llm-int8": ScalarFormat("int8-absmax", "channel", "absmax"),
}
KQUANTS = {
    row.name: row
    for row in (
        KFormat("q2_k", 256, 16, 3, None, (0, 15), 84 * 8),
        KFormat("q3_k", 256, 16, 7, 4, (-32, 31), 110 * 8),
        KFormat("q4_k", 256, 32, 15, None, (0, 63), 144 * 8),
        KFormat("q5_k", 256, 32, 31, None, (0, 63), 176 * 8),
        KFormat("q6_k", 256, 16, 63, 32, (-128, 127), 210 * 8),
        KFormat("q4_1", 32, 32, 15, None, None, 20 * 8),
        KFormat("q5_1", 32, 32, 31, None, None, 24 * 8),
        KFormat("tq1_0", 256, 256, 2, 1, None, 54 * 8),
        KFormat("tq2_0", 256, 256, 2, 1, None, 66 * 8),
    )
}
IQ3_S, IQ3_XXS = (1, 3, 5, 7, 9, 11, 13, 15), (4, 12, 20, 28, 36, 44, 52, 62)
IQ2, IQ1 = (8, 25, 43), (0.125, 0.875, 1.125)
LATTICES = {
    row.name: row
    for row in (
        LatticeFormat("iq3_s", IQ3_S, 4, 4, 32, 15, 1, 0.162, False, 880),
        LatticeFormat("iq3_xxs", IQ3_XXS, 4, 8, 32, 15, 1 / 4, 0.037, True, 784),
        LatticeFormat("iq2_s", IQ2, 8, 8, 16, 15, 1 / 8, 0.0445, False, 656),
        LatticeFormat("iq2_xs", IQ2, 8, 8, 16, 15, 1 / 8, 0.0435, True, 592),
        LatticeFormat("iq2_xxs", IQ2, 8, 8, 32, 15, 1 / 8, 0.044, True, 528),
        LatticeFormat("iq1_s", IQ1, 8, 32, 32, 7, 1, 0, False, 400),
        LatticeFormat("iq1_m", IQ1, 8, 8, 16, 7, 1, 0, False, 448),
    )
}
ALIASES = {
    "q4_0": "int4-g32",
    "q5_0": "int5-g32",
    "q8_0": "int8-g32",
    "nf4": "nf4-g64",
    "fp4": "fp4-g64",
    "nvfp4-global": "nvfp4",
}
"""Types of ggml that are integer grids, what bitsandbytes takes where no block is named, and NVIDIA's format by a
former name."""
RELEASED = {
    re.compile(r"(^|\.)(in_proj_(a|b|ba)|[^.]*gate)$"): "keep",
    re.compile(r"(^|\.)(self_attn|self_attention|attention|attn|linear_attn)\."): "fp8",
    re.compile(r"^(.*\.)?(lm_head|embed_out|output_projection|output)$"): "fp8",
}
"""What models of some 27 billion parameters are released in since 2026, beside NVFP4: small gates, attention (with
linear attention), and the head. NVIDIA/Model-Optimizer, modelopt_recipes/huggingface/qwen3_5/ptq;
unsloth/Qwen3.8-27B-NVFP4, whose last eight MLPs are in FP8 too."""
SCHEMES: dict[str, Preset] = {
    "fp8": Preset("fp8-e4m3-channel/fp8-e4m3-token", "nearest"),
    "fp8-static": Preset("fp8-e4m3-tensor/fp8-e4m3-static", "nearest"),
    "fp8-block": Preset("fp8-e4m3-block/fp8-e4m3-g128", "nearest"),
    "mxfp8": Preset("mxfp8-e4m3/mxfp8-e4m3", "nearest"),
    "w8a16": Preset("int8-channel", "nearest"),
    "w4a16": Preset("int4-g128", "gptq"),
    "w8a8": Preset("int8-channel/int8-token", "smoothquant+gptq"),
    "w8a8-static": Preset("int8-channel/int8-static", "smoothquant+gptq"),
    "w4a8": Preset("int4-g128/int8-token", "gptq"),
    "w4a8-fp8": Preset("int4-g128/fp8-e4m3-token", "gptq"),
    "w4a4": Preset("int4-channel/int4-token", "smoothquant+gptq"),
    "w4a4-nvfp4": Preset("nvfp4/nvfp4", "gptq"),
    "w4a4-mxfp4": Preset("mxfp4/mxfp4", "gptq"),
    "nvfp4-fp8": Preset("nvfp4/nvfp4", "gptq", others=RELEASED),
}
"""Weights and activations together, or weights alone."""
SCALED_ACTIVATIONS = tuple(
    f"{number}-{granularity}{asym}"
    for number in ("int8", "int4", "fp8-e4m3")
    for granularity in ("token", "tensor", "static", "g128")
    for asym in ("", "-asym")
    if not (asym and number.startswith("fp8"))
)
"""Of ACTIVATIONS, those that messages name."""
BLOCK_ACTIVATIONS = ("mxfp8-e4m3", "mxfp4", "nvfp4", "llm-int8")
"""Activations that are rounded by rules of their own."""
CACHE_ALIASES = {"fp8": "fp8-e4m3-static", "fp8-e4m3": "fp8-e4m3-static", "int8": "int8-token", "int4": "int4-g32"}
GGML_CACHES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
"""KV caches of llama.cpp's own."""
Activations = Literal["exact", "int8"]
MULTIPLIED: tuple[Activations, ...] = ("exact", "int8")
"""What packed weights are multiplied by as a model runs: activations as they are, or rounded to 8 bits in groups of 32,
as llama.cpp does."""
DTYPES = ("bfloat16", "float16", "float32")
"""What a model is in that is not quantized, as torch calls it."""


def require_activations(name: str) -> None:
    """Raise BadRequest for what no way to round activations is called."""
    match = ACTIVATIONS.fullmatch(name)
    if match is None and name not in BLOCK_ACTIVATIONS:
        raise UnknownName("way to round inputs", name, (*SCALED_ACTIVATIONS, *BLOCK_ACTIVATIONS))
    if match and match["asym"] and not match["number"].startswith("int"):
        raise BadRequest(
            f"'{name}' is no way to round inputs: only integers have zero points; write {name.removesuffix('-asym')}"
        )


def cache_parts(name: str) -> tuple[str, str]:
    """What keys and values of a KV cache are rounded to, by the names of `activations` or of GGML_CACHES. Raises
    BadRequest for what no cache can do."""
    key, slash, value = name.lower().partition("/")
    return _cache_part(key), _cache_part(value if slash else key)


def _cache_part(text: str) -> str:
    name = CACHE_ALIASES.get(text, text)
    if name in GGML_CACHES:
        return name
    match = ACTIVATIONS.fullmatch(name)
    if match is None or (match["asym"] and not match["number"].startswith("int")):
        raise BadRequest(
            f"'{text}' is no KV cache; write fp8-e4m3, fp8-e4m3-head, int8, int4, int4-g64, q8_0 or the like, or two "
            "of them for keys and values: int8/int4"
        )
    if match["granularity"] == "tensor":
        raise BadRequest(
            "a cache grows token by token, so no scale of all tokens can be found as it runs; write "
            f"{match['number']}-static or {match['number']}-token"
        )
    if match["granularity"] in ("static", "head") and match["asym"]:
        raise BadRequest(f"no engine has zero points of a whole cache; write {name.removesuffix('-asym')}")
    return name
