"""Names that people write, and what somebody most likely means by one that is in no table.

All are checked before torch is imported, which takes seconds. What the names stand for is in the tables beside their
subjects, whose keys these are: tests/test_words.py holds them together.
"""

import re

from halfbyte.errors import BadRequest, UnknownName
from halfbyte.recipe import PARTS

CONTAINERS = ("compressed-tensors", "gptq", "awq", "bitsandbytes", "fp8", "gguf")
READ_ONLY = ("mxfp4", "modelopt")
"""Containers that are read and never written, as whoever asks for one is told."""
PLAIN = ("safetensors", "gguf")
DTYPES = ("bfloat16", "float16", "float32")
GRIDS = (
    *(
        name
        for bits in range(2, 9)
        for span in ("g32", "g64", "g128", "channel", "tensor")
        for name in (f"int{bits}-{span}", *([f"int{bits}-{span}-asym"] if span != "tensor" else []))
    ),
    *(
        "q2_k",
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
        "q4_1",
        "q5_1",
        "tq1_0",
        "tq2_0",
        "iq4_nl",
        "iq4_xs",
        "mxfp4",
        "ggml-nvfp4",
    ),
    *("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_s", "iq1_m"),
    *(f"fp8-{element}-{span}" for element in ("e4m3", "e5m2") for span in ("tensor", "channel", "block")),
    *("mxfp8-e4m3", "mxfp8-e5m2", "mxfp6-e2m3", "mxfp6-e3m2", "nvfp4"),
    *("nf4-g64", "nf4-g64-double", "fp4-g64", "fp4-g64-double", "llm-int8"),
)
"""The grids that are listed; others of these kinds have other sizes of groups or precisions of scales, and begin as
`OTHERS` has it."""
OTHERS = re.compile(r"int[2-8]-(g\d+|channel|tensor)|(nf4|fp4)-g\d+|fp8-(e4m3|e5m2)-(channel|tensor|block)")
ALIASES = ("q4_0", "q5_0", "q8_0", "nf4", "fp4", "nvfp4-global")
SCHEMES = (
    *("fp8", "fp8-static", "fp8-block", "mxfp8", "w8a16", "w4a16", "w8a8", "w8a8-static", "w4a8", "w4a8-fp8", "w4a4"),
    *("w4a4-nvfp4", "w4a4-mxfp4"),
)
"""Names of schemes: weights and inputs together."""
PRESETS = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS"),
    *("IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "MXFP4_MOE"),
)
"""Of a GGUF: a type for each tensor."""
TYPES = (
    *(
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q8_0",
        "Q2_K",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "TQ1_0",
        "TQ2_0",
        "IQ4_NL",
        "IQ4_XS",
    ),
    *("MXFP4", "NVFP4", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"),
)
"""Of a GGUF's tensors."""
FILES = {".gguf": "gguf"}
"""Containers of outputs that are one file, by what such a file's name ends with."""
OWN = {"gguf": ("preset or type of GGUF", (*PRESETS, *TYPES))}
"""Containers whose grids are called otherwise: what such names are, and all of them."""
BITS = re.compile(r"(?:u?int|w|q)?([2-8])(?:b|bits?)?")
PRESET_OF_BITS = {"2": "Q2_K", "3": "Q3_K_M", "4": "Q4_K_M", "5": "Q5_K_M", "6": "Q6_K", "8": "Q8_0"}


def require_container(name: str) -> None:
    """Raises UnknownName."""
    if name not in (*CONTAINERS, *READ_ONLY):
        raise UnknownName("container", name, CONTAINERS)


def owner_of(grid: str) -> str | None:
    """The container that has such a grid of its own."""
    return next((name for name, (_, known) in OWN.items() if grid.upper() in known), None)


def require_grid(name: str, container: str | None = None) -> None:
    """Raise BadRequest for what no grid, scheme, preset or type is called, or is called like; `container`: where it is
    asked for."""
    weight = name.lower().partition("/")[0]
    known = {other.lower() for other in (*GRIDS, *ALIASES, *SCHEMES, *PRESETS, *TYPES)}
    if weight not in known and not OTHERS.match(weight):
        raise unknown_grid(name, container)


def require_plain(to: str | None, dtype: str | None) -> None:
    """Raise BadRequest for a container or a precision in which nobody writes 16 bits; what is None has a default."""
    if to is not None and to not in PLAIN:
        raise BadRequest(f"16 bits are written as {' or '.join(PLAIN)}, not as {to}")
    if dtype is not None and dtype not in DTYPES:
        raise UnknownName("dtype", dtype, DTYPES)


def unknown_grid(name: str, container: str | None = None) -> BadRequest:
    """The error to raise where a grid is wanted, of a container if that is known.

    Names that are the same but for their dashes come first, then the usual ones of as many bits, then those that begin
    so.
    """
    plain = _plain(name)
    if any(plain in (_plain(part), _plain(f"{part}+gptq")) for part in PARTS):
        grid = "w8a8" if "smoothquant" in plain else "int4-g128"
        return BadRequest(
            f"'{name}' is a method, not a grid; write --method {name.lower()} with a grid such as --grid {grid}"
        )
    kind, names = OWN.get(container or "", ("grid", (*GRIDS, *ALIASES, *SCHEMES, *PRESETS)))
    known = list(dict.fromkeys(names))
    meant = [other for other in known if _plain(other) == plain]
    if match := BITS.fullmatch(plain):
        usual = [f"int{match[1]}-{'channel' if match[1] == '8' else 'g128'}", PRESET_OF_BITS.get(match[1])]
        meant += [other for other in usual if other in known]
    meant += [other for other in known if plain and _plain(other).startswith(plain) and not match]
    return UnknownName(kind, name, known, list(dict.fromkeys(meant))[:3])


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]", "", name.lower())
