"""A GGUF as a checkpoint, under the names, shapes and settings that the model has on the hub."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from halfbyte.containers.config import require_sound
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids.grid import Grid, Shape
from halfbyte.grids.quantized import PackedMatrix, Quantized, Scheme
from halfbyte.models import tokenizers
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.provenance import HUB, HUB_ID, text_of
from halfbyte.targets.gguf import blocks, file, hyperparameters
from halfbyte.targets.gguf.blocks import LAYOUTS
from halfbyte.targets.gguf.checked import require_hyperparameters, require_tokenizer
from halfbyte.targets.gguf.families import (
    FAMILIES,
    MappedTensor,
    TensorNameMap,
    checkpoint_shapes,
    family_named,
    family_of,
    reassembled,
)
from halfbyte.targets.gguf.modelfile import ENDS
from halfbyte.targets.gguf.tokenizer import SPECIAL
from halfbyte.targets.gguf.tokenizer_files import tokenizer_files

SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
"""Words of generation_config.json, and ggml's."""


class GGUFCheckpoint(Checkpoint):
    """A GGUF file, whole or split.

    Of an architecture that is in no table, tensors keep ggml's names, and only methods without calibration work.
    """

    splits_stacks = False  # they are as llama.cpp has them

    def __init__(self, path: Path):
        self.path = path
        self.file = file.read(path)
        stored = {name: tensor.shape for name, tensor in self.file.tensors.items()}
        self.names: Names = Untranslated()
        self.shapes = stored
        """Of every tensor by its name on the hub."""
        arch = str(self.file.get("general.architecture"))
        try:
            experts = self.file.get(f"{arch}.expert_count", 0)
            _, family = family_named(
                arch,
                experts if isinstance(experts, int) else 0,
                f"{arch}.attention.sliding_window" in self.file.metadata,
            )
        except Unsupported:
            require_sound({"num_hidden_layers": self.file.get(f"{arch}.block_count")}, path)
            self.config = {"model_type": arch, "num_hidden_layers": self.file.get(f"{arch}.block_count")}
        else:
            require_hyperparameters(self.file.metadata, arch)
            rope = {name: self.file.tensors[name].entry.read() for name in stored if name.startswith("rope_")}
            self.config = hyperparameters.config(self.file.metadata, stored, rope)
            self.shapes = checkpoint_shapes(family, stored)
            self.names = TensorNameMap(family, self.config, self.shapes)
        self._collect()
        self._seal()

    def _collect(self) -> None:
        """The bytes of every tensor, and its grid where it is one quantized matrix."""
        self.entries: dict[str, Entry] = {}
        self._quantized: dict[str, tuple[Scheme, Shape]] = {}
        for hf, shape in self.shapes.items():
            for mapped in self.names.mapped(hf):
                if mapped.name not in self.file.tensors:
                    raise BadCheckpoint(f"{self.path} lacks tensor '{mapped.name}'")
                stored = self.file.tensors[mapped.name]
                entry = stored.entry if mapped.expert is None else stored.entry.at(mapped.expert)
                if stored.type not in LAYOUTS and entry.dtype == torch.uint8:
                    raise Unsupported(
                        f"{self.path}: tensor '{mapped.name}' is {stored.type}, which is not decoded; "
                        f"decoded are {', '.join(LAYOUTS)}"
                    )
                if entry.dtype != torch.uint8:
                    self.entries[hf] = entry
                elif len(shape) == 2:
                    module = hf.removesuffix(".weight")
                    self._quantized[module] = (
                        LAYOUTS[stored.type].grid,
                        (shape[1], shape[0]) if mapped.transposed else shape,
                    )
                    self.entries[f"{module}."] = entry  # a matrix of a GGUF has one part, whose suffix is empty

    @property
    def dtype(self) -> torch.dtype:
        """That of most 16-bit matrices; fp16 where all are quantized."""
        floats = [
            e.dtype for n, e in self.entries.items() if e.dtype in (torch.bfloat16, torch.float16) and len(e.shape) > 1
        ]
        return max(set(floats), key=floats.count) if floats else torch.float16 if self._quantized else torch.float32

    @property
    def known_as(self) -> tuple[str, str | None]:
        """general.name, or the file's own; and the hub's repository, if general.source says one."""
        metadata = {name: value.value for name, value in self.file.metadata.items()}
        repository = (text_of(metadata.get("general.source.repo_url")) or "").removeprefix(HUB)
        name = text_of(metadata.get("general.name")) or self.path.resolve().stem
        return name, repository if HUB_ID.fullmatch(repository) else None

    @cached_property
    def card(self) -> dict[str, Any]:
        """general.* of the file (ggml's docs/gguf.md)."""
        metadata = {name: value.value for name, value in self.file.metadata.items()}
        count = metadata.get("general.base_model.count", 0)
        numbers = range(min(count, 16) if isinstance(count, int) else 0)
        urls = [text_of(metadata.get(f"general.base_model.{number}.repo_url")) or "" for number in numbers]
        return {
            **{
                name.replace(".", "_"): metadata.get(f"general.{name}")
                for name in ("license", "license.name", "license.link")
            },
            "base_model": [url.removeprefix(HUB) for url in urls],
            "tags": metadata.get("general.tags"),
            "language": metadata.get("general.languages"),
        }

    @property
    def has_chat_template(self) -> bool:
        """Whether the file has one."""
        return "tokenizer.chat_template" in self.file.metadata

    @property
    def generation(self) -> dict[str, Any]:
        """What the file says of how tokens are drawn, in the words of generation_config.json."""
        said = {word: self.file.metadata.get(f"general.sampling.{key}") for word, key in SAMPLING.items()}
        drawn = {word: entry.value for word, entry in said.items() if entry is not None}
        return {"do_sample": True, **drawn} if drawn else {}

    @property
    def ends(self) -> set[int]:
        """The tokens that the file says end a text, a turn or a message."""
        keys = (f"tokenizer.ggml.{end}_token_id" for end in ENDS)
        return {self.file.metadata[key].value for key in keys if key in self.file.metadata}

    @property
    def vocabulary(self) -> dict[int, str]:
        """The file's tokens by number. Raises BadCheckpoint for a broken vocabulary."""
        tokens = self.file.metadata.get("tokenizer.ggml.tokens")
        if tokens is None:
            return {}
        require_tokenizer(self.file.metadata, SPECIAL.values())
        return dict(enumerate(tokens.value))

    @cached_property
    def tied(self) -> bool:
        """Whether the file has no head of its own."""
        return "output.weight" not in self.file.tensors

    @property
    def other_files(self) -> list[Path]:
        """None: a GGUF is whole by itself."""
        return []

    @property
    def container(self) -> str | None:
        """ "gguf" where a matrix is quantized."""
        return "gguf" if self._quantized else None

    @property
    def unquantized_dtype(self) -> torch.dtype:
        """A GGUF does not say what its model was computed in."""
        return torch.bfloat16 if self._quantized else self.dtype

    @property
    def quantized(self) -> dict[str, tuple[Scheme, Shape]]:
        """Grid and shape of every matrix in a quantized type."""
        return self._quantized

    @cached_property
    def parts(self) -> dict[str, str]:
        """The one part of each quantized matrix, whose suffix is empty."""
        return {f"{module}.": module for module in self._quantized}

    def read_packed(self, module: str) -> PackedMatrix:
        """Blocks as they lie in the file, rows in the checkpoint's order."""
        scheme, _ = self._quantized[module]
        raw, tensor = self.entries[f"{module}."].read(), f"{module}.weight"
        rows = self.names.mapped(tensor if tensor in self.shapes else module)[0].rows
        raw = raw if rows is None else raw[torch.argsort(rows)]
        return PackedMatrix({"": raw}, partial(_unpacked, scheme.weight), by_rows=True)

    def _read(self, tensor: str) -> Tensor:
        if tensor.removesuffix(".weight") in self._quantized:
            return super()._read(tensor)
        values = []
        for mapped in self.names.mapped(tensor):
            value = self._value(mapped)
            if value.numel() == prod(self.shapes[tensor]):
                return mapped.restored(value).view(self.shapes[tensor])
            values.append(value)
        return reassembled(self.names.mapped(tensor), values)

    def _value(self, mapped: MappedTensor) -> Tensor:
        """A tensor as it lies in the file, or one expert of it; decoded."""
        stored = self.file.tensors[mapped.name]
        raw = (stored.entry if mapped.expert is None else stored.entry.at(mapped.expert)).read()
        if raw.dtype != torch.uint8:
            return raw
        layout = LAYOUTS[stored.type]
        return layout.unpack(raw.flatten(0, -2), layout.grid).decode().view(*raw.shape[:-1], stored.shape[-1])

    def spec(self, tensor: str) -> Spec:
        """The shape on the hub, and the dtype in the file or, of a quantized one, the model's."""
        entry = self.entries.get(tensor)
        return Spec(self.shapes[tensor], entry.dtype if entry else self.dtype)

    def tensors(self) -> dict[str, Shape]:
        """Names and shapes on the hub."""
        return dict(self.shapes)

    def settings(self):
        """Raises Unsupported for an architecture that is in no table: there is no model of it to run."""
        import transformers

        if isinstance(self.names, Untranslated):
            architectures = ", ".join(dict.fromkeys(family.arch for family in FAMILIES.values()))
            raise Unsupported(
                f"{self.path} is of '{self.config['model_type']}', and only {architectures} are known well "
                "enough to be run (--method nearest needs no model)"
            )
        return transformers.AutoConfig.for_model(**self.config)

    def tokenizer(self):
        """Transformers' reading of what the file says of its tokenizer."""

        with TemporaryDirectory() as folder:
            self.save_companions(Path(folder))
            return tokenizers.load(Path(folder))

    def save_companions(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, made of the file's metadata."""
        require_tokenizer(self.file.metadata, SPECIAL.values())
        for name, content in tokenizer_files(self.file.metadata).items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


@dataclass(frozen=True)
class Untranslated:
    """The names of a GGUF as they are."""

    def mapped(self, tensor: str) -> tuple[MappedTensor, ...]:
        """Where it lies: under its own name."""
        return (MappedTensor(tensor),)

    def dropped(self, tensor: str) -> None:
        """None: nothing is left out."""
        return None

    def extra(self) -> dict[str, Tensor]:
        """Nothing is added."""
        return {}


Names = TensorNameMap | Untranslated


@lru_cache(maxsize=1)  # of one model, plans of many grids are made
def name_map_of(checkpoint: Checkpoint) -> Names:
    """ggml's names of the tensors of any checkpoint. Raises Unsupported for a family that is in no table."""
    if isinstance(checkpoint, GGUFCheckpoint):
        return checkpoint.names
    return TensorNameMap(family_of(checkpoint.config), checkpoint.config, checkpoint.tensors())


def _unpacked(grid: Grid, tensors: Mapping[str, Tensor]) -> Quantized:
    return blocks.unpack(tensors[""], grid)
