"""What types and presets of a GGUF are called; known before torch is imported."""

import re
from typing import NamedTuple


class FileType(NamedTuple):
    """A type for most tensors, and how the file says so."""

    type: str
    """Of most tensors."""
    number: int
    """`general.file_type`: LLAMA_FTYPE in llama.h."""


KIND = "preset or type of GGUF"
PRESETS = {
    "F32": FileType("F32", 0), "F16": FileType("F16", 1), "BF16": FileType("BF16", 32),
    "Q4_0": FileType("Q4_0", 2), "Q4_1": FileType("Q4_1", 3), "Q5_0": FileType("Q5_0", 8), "Q5_1": FileType("Q5_1", 9),
    "Q8_0": FileType("Q8_0", 7),
    "Q2_K": FileType("Q2_K", 10), "Q2_K_S": FileType("Q2_K", 21),
    "Q3_K_S": FileType("Q3_K", 11), "Q3_K_M": FileType("Q3_K", 12), "Q3_K_L": FileType("Q3_K", 13),
    "Q4_K_S": FileType("Q4_K", 14), "Q4_K_M": FileType("Q4_K", 15), "Q5_K_S": FileType("Q5_K", 16),
    "Q5_K_M": FileType("Q5_K", 17), "Q6_K": FileType("Q6_K", 18),
    "IQ2_XXS": FileType("IQ2_XXS", 19), "IQ2_XS": FileType("IQ2_XS", 20), "IQ2_S": FileType("IQ2_XS", 28),
    "IQ2_M": FileType("IQ2_S", 29),
    "IQ3_XXS": FileType("IQ3_XXS", 23), "IQ3_XS": FileType("IQ3_S", 22), "IQ3_S": FileType("IQ3_S", 26),
    "IQ3_M": FileType("IQ3_S", 27),
    "IQ4_NL": FileType("IQ4_NL", 25), "IQ4_XS": FileType("IQ4_XS", 30), "MXFP4_MOE": FileType("MXFP4", 38),
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
OTHERWISE = {"NVFP4": "ggml-nvfp4"}
"""Types whose grid is not called as they are: nvfp4 is NVIDIA's format, with one divisor for a matrix."""
TYPES = {
    name: OTHERWISE.get(name, name.lower())
    for name in (
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"),
        *("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"),
    )
}
"""Types of ggml whose tensors are quantized, and the grid of each."""
NAMES = (*PRESETS, *TYPES)
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Presets that do not quantize, as torch calls their numbers."""
LAST_WORD = re.compile(rf"(?:^|[-._ ])({'|'.join(sorted(NAMES, key=len, reverse=True))})$", re.IGNORECASE)


def in_name(stem: str) -> str | None:
    """The preset or type that a file's name ends with, as people call such files; None where it says nothing."""
    match = LAST_WORD.search(stem)
    return match and match[1].upper()
