"""A GGUF: one file (or parts of one) under ggml's names, with hyper-parameters and tokenizer in it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.containers.folder import Shard
from halfbyte.containers.safetensors import Entry, Spec
from halfbyte.errors import BrokenOutput
from halfbyte.grids.grid import Shape
from halfbyte.grids.quantized import Quantized, Scheme, select_rows
from halfbyte.models.precision import cast
from halfbyte.models.provenance import provenance_of
from halfbyte.models.weight import Weight
from halfbyte.targets.gguf import blocks, families, file, hyperparameters, modelfile, presets, tokenizer
from halfbyte.targets.gguf.blocks import type_of
from halfbyte.targets.gguf.checked import require_types
from halfbyte.targets.gguf.families import MappedTensor
from halfbyte.targets.gguf.head import Value, part_name
from halfbyte.targets.gguf.origin import FALSE_OF_ANOTHER, origin
from halfbyte.targets.gguf.settings import settings
from halfbyte.targets.gguf.source import GGUFCheckpoint, name_map_of
from halfbyte.targets.plan import AS_ASKED, SKIPPED, Plan
from halfbyte.targets.target import CheckpointWriter, TensorRows, read_rows, split

HEADS_ROWS = 256
"""Chunks of rows come in multiples of a few heads', whose order may differ."""


class GGUFWriter(CheckpointWriter):
    """Rows may lie in another order than in the checkpoint, and experts in stacks; kept matrices stay in 16 bits, the
    rest is in 32."""

    def __init__(self, plan: Plan):
        super().__init__(plan)
        self.names = name_map_of(plan.checkpoint)

    @cached_property
    def types(self) -> dict[str, tuple[str, Shape]]:
        """Type and shape of every tensor of the file, in llama.cpp's order."""
        tensors: dict[str, tuple[str, Shape]] = {}
        experts: dict[str, int] = {}

        def add(mapped: MappedTensor, type_name: str, shape: Shape, expert: int | None) -> None:
            tensors.setdefault(mapped.name, (type_name, shape))
            if expert is not None:
                experts[mapped.name] = max(experts.get(mapped.name, 0), expert + 1)

        for weight, scheme in self.plan.schemes.items():
            for mapped in self.names.mapped(weight.tensor):
                out = weight.shape[0] if mapped.rows is None else len(mapped.rows)
                add(
                    mapped,
                    type_of(scheme.weight),
                    (out, weight.shape[1]),
                    mapped.expert if weight.expert is None else weight.expert,
                )
        for tensor in self.plan.unquantized:
            shape = self.plan.checkpoint.spec(tensor).shape
            for mapped in self.names.mapped(tensor):
                stored = _stored_shape(mapped, shape)
                add(mapped, self._plain(tensor, mapped), stored, mapped.expert)
        for name, value in self.names.extra().items():
            tensors[name] = "F32", tuple(value.shape)
        stacked = {
            name: (kind, (experts[name], *shape) if name in experts else shape)
            for name, (kind, shape) in tensors.items()
        }
        return dict(sorted(stacked.items(), key=lambda item: presets.order(item[0])))

    def _plain(self, tensor: str, mapped: MappedTensor) -> str:
        """F32 for what llama.cpp wants so; a matrix keeps its 16 bits, or has those that were asked for."""
        if mapped.plain or len(self.plan.checkpoint.spec(tensor).shape) < 2:
            return "F32"
        asked = None if self.plan.unquantized[tensor] in (SKIPPED, AS_ASKED) else self._asked_type
        return asked or presets.PLAIN_NAMES.get(self.plan.checkpoint.spec(tensor).dtype, "F32")

    @property
    def _asked_type(self) -> str | None:
        """Of every matrix, where none is quantized."""
        return self.plan.preset if self.plan.preset in presets.PLAIN else None

    def tensors(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor of the file, under ggml's names."""
        return {name: file.spec_of(*tensor) for name, tensor in self.types.items()}

    def shards(self, stem: str) -> dict[str, Shard]:
        """One file; or parts of at most `shard_gb`, the first of which says how many there are."""
        specs = self.tensors()
        parts = split(specs, (self.plan.recipe.shard_gb or float("inf")) * 1e9)
        part_metadata = (
            [self.metadata]
            if len(parts) == 1
            else [file.split_metadata(self.metadata, i, len(parts), len(specs)) for i in range(len(parts))]
        )
        names = [f"{stem}.gguf"] if len(parts) == 1 else [part_name(stem, i, len(parts)) for i in range(len(parts))]
        return {
            name: _shard(sum(s.size_bytes for s in part.values()), metadata, {t: self.types[t] for t in part})
            for name, metadata, part in zip(names, part_metadata, parts, strict=True)
        }

    def entry_file(self, stem: str) -> str:
        """The file, or the first of its parts."""
        return next(iter(self.shards(stem)))

    @cached_property
    def metadata(self) -> dict[str, Value]:
        """What the file says of the model, its tokenizer and its types."""
        metadata = _metadata_of(self.plan)
        if self.plan.recipe.method == "convert" and "general.file_type" in metadata:
            return metadata
        label, kinds = self.plan.label, [kind for kind, shape in self.types.values() if len(shape) > 1]
        commonest = (
            label
            if label in presets.PRESETS
            else max(presets.PRESETS, key=lambda name: kinds.count(presets.PRESETS[name].type))
        )
        return {**metadata, "general.file_type": Value("uint32", presets.PRESETS[commonest].number)}

    def row_chunks(self, weight: Weight, size: int) -> list[Weight]:
        """Blocks lie within rows, so rows go apart wherever the file's order of them does not mix the chunks."""
        source, places, (out, width) = self.plan.checkpoint, self.names.mapped(weight.tensor), weight.shape
        plain = (
            not isinstance(source, GGUFCheckpoint)
            and weight.tensor in source.entries
            and weight.tensor not in source.parts
            and not (source.rotation and weight.block)  # which mixes rows of what writes hidden states
        )
        if not plain or weight.transposed or weight.expert is not None or len(places) != 1:
            return [weight]
        (mapped,) = places
        rows = max(HEADS_ROWS, size // width // HEADS_ROWS * HEADS_ROWS)
        chunks = [
            replace(weight, row_offset=start, shape=(min(rows, out - start), width)) for start in range(0, out, rows)
        ]
        return chunks if mapped.expert is None and all(_closed(_order(mapped, chunk)) for chunk in chunks) else [weight]

    def pack(self, weight: Weight, q: Quantized) -> Iterator[TensorRows]:
        """Blocks of the matrix at each of its places, rows in the file's order."""
        for mapped in self.names.mapped(weight.tensor):
            order = _order(mapped, weight)
            raw = blocks.pack(q if order is None else select_rows(q, order))
            expert = mapped.expert if weight.expert is None else weight.expert
            yield (
                TensorRows(mapped.name, raw, weight.row_offset)
                if expert is None
                else TensorRows(mapped.name, raw[None], expert)
            )

    def unpack(self, entries: Mapping[str, Entry], weight: Weight, scheme: Scheme) -> Quantized:
        """The matrix from its places, rows in the checkpoint's order."""
        parts = []
        for mapped in self.names.mapped(weight.tensor):
            expert = mapped.expert if weight.expert is None else weight.expert
            raw = (
                read_rows(entries[mapped.name], expert)
                if weight.row_offset is None
                else entries[mapped.name].read(weight.row_offset, weight.row_offset + weight.shape[0])
            )
            raw = raw if expert is None else raw[0]
            part = blocks.unpack(raw, scheme.weight)
            if part.shape == weight.shape:
                order = _order(mapped, weight)
                return part if order is None else select_rows(part, torch.argsort(order))
            parts.append(part)
        params = {name: torch.cat([part.params[name] for part in parts]) for name in parts[0].params}
        whole = Quantized(scheme.weight, torch.cat([part.codes for part in parts]), params)
        return select_rows(whole, torch.argsort(families.rows_of(self.names.mapped(weight.tensor))))

    def pack_unquantized(self, tensor: str, value: Tensor) -> Iterator[TensorRows]:
        """The tensor under each of its names, in the type that the file has it in."""
        for mapped in self.names.mapped(tensor):
            stored = cast(tensor, mapped.stored(value), file.dtype_of(self._plain(tensor, mapped)), self.plan.wider)
            yield (
                TensorRows(mapped.name, stored)
                if mapped.expert is None
                else TensorRows(mapped.name, stored[None], mapped.expert)
            )

    def precision(self, tensor: str) -> torch.dtype:
        """F32 of what llama.cpp wants so, whatever the source had."""
        return file.dtype_of(self._plain(tensor, self.names.mapped(tensor)[0]))

    def read_unquantized(self, entries: Mapping[str, Entry], tensor: str) -> list[Tensor]:
        """What lies under each of its names."""
        return [read_rows(entries[mapped.name], mapped.expert) for mapped in self.names.mapped(tensor)]

    def restored(self, entries: Mapping[str, Entry], tensor: str) -> Tensor:
        """The checkpoint's tensor, from what lies under its names."""
        spec = self.plan.checkpoint.spec(tensor)
        values = []
        for mapped, stored in zip(self.names.mapped(tensor), self.read_unquantized(entries, tensor), strict=True):
            value = stored if mapped.expert is None else stored[0]
            if value.numel() == torch.Size(spec.shape).numel():
                return mapped.restored(value).to(spec.dtype)
            values.append(value)
        return families.reassembled(self.names.mapped(tensor), values).to(spec.dtype)

    def extra(self) -> Iterator[TensorRows]:
        """What the config says and llama.cpp reads as tensors: factors of rotary embeddings."""
        for name, value in self.names.extra().items():
            yield TensorRows(name, value.float())

    def write_sidecars(self, folder: Path) -> None:
        """What Ollama is told; a GGUF is whole by itself otherwise."""
        first = min(folder.glob("*.gguf"))
        first.with_name(f"{first.stem}.Modelfile").write_text(
            modelfile.text(first.name, self.metadata), encoding="utf-8", newline="\n"
        )

    def reopen(self, folder: Path) -> Mapping[str, Entry]:
        """The written file's tensors. Raises BrokenOutput if it has others than were planned."""
        written = file.read(next(folder.glob("*.gguf")))
        if {n: (s.type, s.shape) for n, s in written.tensors.items()} != self.types:
            raise BrokenOutput(
                f"the written file holds {len(written.tensors)} tensors, and not the {len(self.types)} that were "
                "planned as they were planned"
            )
        return {name: stored.entry for name, stored in written.tensors.items()}


def _order(mapped: MappedTensor, weight: Weight) -> Tensor | None:
    """Where the rows of a matrix, or of a chunk of it, come from; None: as they lie."""
    if mapped.rows is None or weight.row_offset is None:
        return mapped.rows
    return mapped.rows[weight.row_offset : weight.row_offset + weight.shape[0]] - weight.row_offset


def _closed(order: Tensor | None) -> bool:
    return order is None or torch.equal(order.sort().values, torch.arange(len(order)))


def _stored_shape(mapped: MappedTensor, shape: Shape) -> Shape:
    shape = (*shape[:-2], shape[-1], shape[-2]) if mapped.transposed else shape
    at = mapped.dim(len(shape))
    return shape if mapped.rows is None else (*shape[:at], len(mapped.rows), *shape[at + 1 :])


def _shard(size_bytes: int, metadata: Mapping[str, Value], types: Mapping[str, tuple[str, Shape]]) -> Shard:
    def lay_out(path: Path, resume: bool) -> file.GGUFFileWriter:
        return file.GGUFFileWriter(path, metadata, types, resume)

    return Shard(size_bytes, lay_out, lambda: file.Layout.of(Path(), metadata, types).size_bytes)


def _metadata_of(plan: Plan) -> dict[str, Value]:
    """What the file says of the model."""
    source = plan.checkpoint
    if isinstance(source, GGUFCheckpoint):
        require_types(source.file.metadata)
        inherited = {
            k: v
            for k, v in source.file.metadata.items()
            if plan.recipe.method == "convert" or not FALSE_OF_ANOTHER.fullmatch(k)
        }
        return {**inherited, "general.quantization_version": Value("uint32", hyperparameters.QUANTIZATION_VERSION)}
    family = families.family_of(source.config)
    parameters = sum(prod(shape) for tensor, shape in source.tensors().items() if tensor not in plan.dropped)
    metadata = hyperparameters.metadata(source.config, family, source.path) | origin(
        provenance_of(source, plan.recipe.model), parameters
    )
    return {
        **metadata,
        **tokenizer.tokenizer_metadata(source.path, settings(source.config).vocab_size, plan.recipe.pre),
    }
