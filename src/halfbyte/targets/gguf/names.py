"""What types and presets of a GGUF are called; known before torch is imported."""

from typing import NamedTuple


class Preset(NamedTuple):
    """A type for most tensors, and how the file says so."""

    type: str
    """Of most tensors."""
    file_type: int
    """`general.file_type`: LLAMA_FTYPE in llama.h."""


KIND = "preset or type of GGUF"
PRESETS = {
    "F32": Preset("F32", 0), "F16": Preset("F16", 1), "BF16": Preset("BF16", 32),
    "Q4_0": Preset("Q4_0", 2), "Q4_1": Preset("Q4_1", 3), "Q5_0": Preset("Q5_0", 8), "Q5_1": Preset("Q5_1", 9),
    "Q8_0": Preset("Q8_0", 7),
    "Q2_K": Preset("Q2_K", 10), "Q2_K_S": Preset("Q2_K", 21),
    "Q3_K_S": Preset("Q3_K", 11), "Q3_K_M": Preset("Q3_K", 12), "Q3_K_L": Preset("Q3_K", 13),
    "Q4_K_S": Preset("Q4_K", 14), "Q4_K_M": Preset("Q4_K", 15), "Q5_K_S": Preset("Q5_K", 16),
    "Q5_K_M": Preset("Q5_K", 17), "Q6_K": Preset("Q6_K", 18),
    "IQ2_XXS": Preset("IQ2_XXS", 19), "IQ2_XS": Preset("IQ2_XS", 20), "IQ2_S": Preset("IQ2_XS", 28),
    "IQ2_M": Preset("IQ2_S", 29),
    "IQ3_XXS": Preset("IQ3_XXS", 23), "IQ3_XS": Preset("IQ3_S", 22), "IQ3_S": Preset("IQ3_S", 26),
    "IQ3_M": Preset("IQ3_S", 27),
    "IQ4_NL": Preset("IQ4_NL", 25), "IQ4_XS": Preset("IQ4_XS", 30), "MXFP4_MOE": Preset("MXFP4", 38),
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
