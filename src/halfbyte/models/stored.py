"""What of a folder is quantized already, and how that is read."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from halfbyte.containers.container import Modules, Reader, described, require_parts
from halfbyte.containers.safetensors import Entry
from halfbyte.containers.table import READERS
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.activations import ActivationQuant
from halfbyte.grids.quantized import PackedMatrix

CODES = (torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
"""What stands for a weight together with a scale only, in a checkpoint that is quantized."""


def reader_of(config: dict[str, Any], path: Path) -> Reader | None:
    """Who reads what a folder says is quantized so; None where nothing is. Raises Unsupported."""
    if not config:
        return None
    reader = next((reader for reader in READERS.values() if reader.reads(config)), None)
    if reader is None:
        raise Unsupported(
            f"{path} is quantized with '{config.get('quant_method')}', which is not read yet; known: "
            f"{', '.join(READERS)}"
        )
    return reader


class StoredModules(NamedTuple):
    """Modules that are quantized, of which every part is there."""

    reader: Reader
    modules: Modules
    """Scheme and shape."""
    entries: Mapping[str, Entry]
    parts: Mapping[str, str]
    """Tensor name to module."""

    @classmethod
    def of(cls, reader: Reader, config: dict[str, Any], entries: Mapping[str, Entry]) -> "StoredModules":
        """Raises BadCheckpoint for a module that lacks a part, and a part that is none of a module."""
        reader, modules = reader.opened(config, entries)
        for module, (scheme, shape) in modules.items():
            has = partial(_has, entries, module)
            require_parts(module, scheme, shape, reader.parts(scheme, shape, has), entries)
        for name, entry in entries.items():
            if name.endswith(".weight") and entry.dtype in CODES and name.removesuffix(".weight") not in modules:
                raise BadCheckpoint(
                    f"'{name}' is {described(entry)}, and no scale of it is stored; the checkpoint is not whole"
                )
        suffixes = {suffix for scheme, shape in set(modules.values()) for suffix in reader.suffixes(scheme, shape)}
        parts = {f"{m}.{s}": m for m in modules for s in suffixes if f"{m}.{s}" in entries}
        return cls(reader, modules, entries, parts)

    def read(self, module: str, tensors: Sequence[str]) -> PackedMatrix:
        """The matrix of a module as it lies in the file, in these tensors."""
        scheme, shape = self.modules[module]
        values = {n.removeprefix(f"{module}."): self.entries[n].read() for n in tensors}
        return PackedMatrix(values, partial(self.reader.unpack, scheme=scheme, shape=shape))

    def inputs(self, module: str, tensors: Sequence[str]) -> ActivationQuant | None:
        """How engines round what a module reads; None where it stays in 16 bits."""
        scheme, _ = self.modules[module]
        if scheme.activations is None:
            return None
        numbers = {
            n.removeprefix(f"{module}."): self.entries[n].read() for n in tensors if prod(self.entries[n].shape) == 1
        }
        return self.reader.inputs(numbers, scheme.activations)


def _has(entries: Mapping[str, Entry], module: str, suffix: str) -> bool:
    return f"{module}.{suffix}" in entries
