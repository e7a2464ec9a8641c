"""What there is to choose from, by name: one line adds a container, a form of output, or a kind of checkpoint.

A line says where a class is, as entry points do (`module:name`), and nothing is imported here: wrong names are refused
before torch is, and a room may ask for what stands above it. The rooms' own tables are made of these.
"""

from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple


class Form(NamedTuple):
    """A form of output."""

    home: str
    """The class of its target."""
    suffix: str = ""
    """What the name of an output ends with that is one file; empty: outputs are folders."""
    quantized: bool = True
    """Whether it is a container of quantized weights."""
    unquantized: bool = False
    """Whether it holds a model in 16 or 32 bits."""
    own_names: str = ""
    """What grids are called that have other names in it: a module with `KIND`, `NAMES`, of these `PRESETS` and (in
    torch's words) `DTYPES`; and `in_name`, which of them the name of a file says."""


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint, as it is stored."""

    name: str
    kind: str
    """Its grid, or its dtype."""
    weights: int
    size_bytes: int


class Contents(NamedTuple):
    """What is in a checkpoint."""

    model_type: str
    container: str | None
    """None: it is not quantized."""
    tensors: list[StoredTensor]


CONTAINERS = {
    "compressed-tensors": "halfbyte.containers.compressed.container:CompressedTensors",
    "gptq": "halfbyte.containers.gptq:GPTQ",
    "awq": "halfbyte.containers.awq:AWQ",
    "bitsandbytes": "halfbyte.containers.bitsandbytes:BitsAndBytes",
    "fp8": "halfbyte.containers.fp8:FP8",
}
"""Of a folder of safetensors, in the order in which they are looked through."""
READ_ONLY = {
    "mxfp4": "halfbyte.containers.mxfp4:MXFP4",
    "modelopt": "halfbyte.containers.modelopt:ModelOpt",
}
"""What other tools write, and is read only; compressed-tensors holds the same values."""
FORMS = {
    "safetensors": Form("halfbyte.targets.hf.target:HuggingFace", quantized=False, unquantized=True),
    "gguf": Form("halfbyte.targets.gguf.target:GGUF", ".gguf", True, True, "halfbyte.targets.gguf.names"),
}
"""Of outputs. A container of CONTAINERS makes a form of its own: a folder of safetensors with it."""
SOURCES = {
    ".gguf": "halfbyte.targets.gguf.source:GGUFCheckpoint",
}
"""Of checkpoints that are no folders of safetensors, by the suffix of their files: what opens a file, or a folder of
such without safetensors."""
HEADS = {
    ".gguf": "halfbyte.targets.gguf.head:contents",
}
"""Of these, the ones whose head says what is in them: what makes Contents of it, and needs no torch."""

IMPORTANCE = "halfbyte.targets.gguf.importance"
"""Importance matrices, which are llama.cpp's files: the module that measures, writes and reads them."""


def source_suffix(path: Path) -> str | None:
    """Of SOURCES, the suffix of a file, or of the files of a folder without safetensors; None for other paths."""
    if path.is_dir():
        bare = not any(path.glob("*.safetensors"))
        return next((suffix for suffix in SOURCES if bare and any(path.glob(f"*{suffix}"))), None)
    return path.suffix if path.suffix in SOURCES else None


def made(homes: Mapping[str, str]) -> dict[str, Any]:
    """One of each, by name."""
    return {name: resolve_name(home)() for name, home in homes.items()}
