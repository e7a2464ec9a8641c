"""What there is to choose from, by name: one line adds a container, a form of output, or a kind of checkpoint.

A line says where a class is, as entry points do (`module:name`), and nothing is imported here: wrong names are refused
before torch is, and a room may ask for what stands above it. The rooms' own tables are made of these.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from halfbyte.errors import BadCheckpoint
from halfbyte.files import exists, path_of


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
    """What grids are called that have other names in it: a module with `KIND`, `NAMES`, `PRESETS`, `TYPES`
    (the grid of each) and (in torch's words) `DTYPES`; and `in_name`, which of them the name of a file says."""


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

REMOTE = {
    ".gguf": "halfbyte.targets.gguf.remote:stand_in",
}
"""... and whose head can be had of the hub without the rest: what makes a file of it that is opened like the whole."""
IMPORTANCE = "halfbyte.targets.gguf.importance"
"""Importance matrices, which are llama.cpp's files: the module that measures, writes and reads them."""


HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?(@[\w./-]+)?")
"""org/name, or org/name@revision; org/name:WORD for a file of it whose name has that word."""


def located(source: str | Path) -> Path | None:
    """Where a checkpoint lies; None for one of the hub. Raises BadCheckpoint for what is neither, without torch."""
    path = path_of(source)
    if exists(path):
        if path.is_dir() or source_suffix(path):
            return path
        raise BadCheckpoint(
            f"{source} is a file and no {' or '.join(SOURCES)}; name the folder that holds config.json and the "
            "safetensors"
        )
    if HUB_ID.fullmatch(str(source)):
        return None
    raise BadCheckpoint(f"there is no folder {source}, and it is no hub id (org/name)")


def source_suffix(path: Path) -> str | None:
    """Of SOURCES, the suffix of a file, or of the files of a folder without safetensors; None for other paths."""
    if path.is_dir():
        bare = not any(path.glob("*.safetensors"))
        return next((suffix for suffix in SOURCES if bare and any(path.glob(f"*{suffix}"))), None)
    return path.suffix if path.suffix in SOURCES else None


def made(homes: Mapping[str, str]) -> dict[str, Any]:
    """One of each, by name."""
    return {name: resolve_name(home)() for name, home in homes.items()}
