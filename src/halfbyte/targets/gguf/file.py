"""Reading and writing GGUF as a stream: tensors one at a time at their offsets, as in `containers.safetensors`."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from halfbyte.containers.safetensors import Entry, FileWriter, Spec
from halfbyte.errors import Unsupported
from halfbyte.grids.grid import Shape
from halfbyte.targets.gguf.head import (
    ALIGNMENT,
    ARRAY,
    BYTES,
    MAGIC,
    MOST_DIMENSIONS,
    NUMBERS,
    STRING,
    TYPES,
    VALUE_NUMBERS,
    VERSION,
    File,
    Value,
    padded,
    row_bytes,
)
from halfbyte.targets.gguf.head import read as read_head

LONGEST_NAME = 63  # of a tensor, in ggml


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file."""

    type: str
    """A key of TYPES."""
    shape: Shape
    """In torch's order: [out, in], or [experts, out, in]."""
    entry: Entry
    """Its bytes: of shape and dtype where the type is plain, uint8 [..., out, row_bytes] where it is not."""


def read(path: Path) -> File[TensorInfo]:
    """As `head.read`, with the place of every tensor's bytes."""
    header = read_head(path)
    tensors = {
        name: TensorInfo(placed.type, placed.shape, _entry(placed.type, placed.shape, placed.path, placed.offset))
        for name, placed in header.tensors.items()
    }
    return File(header.paths, header.metadata, tensors)


def dtype_of(type: str) -> torch.dtype:
    """What one element of a type is; bytes, where it takes decoding."""
    return getattr(torch, TYPES[type].dtype)


def spec_of(type: str, shape: Shape) -> Spec:
    """A tensor as its bytes are read. Raises Unsupported where blocks do not fill its rows."""
    if TYPES[type].dtype == BYTES:
        shape = (*shape[:-1], row_bytes(type, shape[-1] if shape else 1))
    return Spec(shape, dtype_of(type))


def _entry(type: str, shape: Shape, path: Path, offset: int) -> Entry:
    spec = spec_of(type, shape)
    return Entry(spec.shape, spec.dtype, path, offset)


def split_metadata(metadata: Mapping[str, Value], number: int, count: int, tensors: int) -> dict[str, Value]:
    """What part `number`, from 0, says of a model of `tensors` tensors in all: the first everything, the others their
    place."""
    place = {
        "split.no": Value("uint16", number),
        "split.count": Value("uint16", count),
        "split.tensors.count": Value("int32", tensors),
    }
    return {**(metadata if number == 0 else {}), **place}


class Layout(NamedTuple):
    """Where everything is to lie in a file."""

    head: bytes
    """What comes before the tensors."""
    entries: Mapping[str, Entry]
    """The tensors, counted from the first."""
    size_bytes: int
    """Of the whole file."""

    @classmethod
    def of(cls, path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[str, Shape]]) -> "Layout":
        """`tensors` gives type (a key of TYPES) and shape, in torch's order.

        Raises Unsupported for what llama.cpp would refuse to read.
        """
        step = metadata.get("general.alignment", Value("uint32", ALIGNMENT)).value
        infos, entries, offset = bytearray(), {}, 0
        for name, (type, shape) in tensors.items():
            _require_name(name, shape)
            entries[name] = _entry(type, shape, path, offset)
            infos += _string(name) + struct.pack(
                f"<I{len(shape)}QIQ", len(shape), *shape[::-1], TYPES[type].number, offset
            )
            offset += padded(entries[name].size_bytes, step)
        head = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
        head += b"".join(_string(key) + _value(value) for key, value in metadata.items()) + infos
        head += bytes(padded(len(head), step) - len(head))
        return cls(head, entries, len(head) + offset)


class GGUFFileWriter(FileWriter):
    """A GGUF file of version 3, laid out from the types and shapes of its tensors."""

    def __init__(
        self, path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[str, Shape]], resume: bool = False
    ):
        """As `Layout.of`. Tensors are written as `TensorInfo.entry` reads them."""
        head, entries, size_bytes = Layout.of(path, metadata, tensors)
        placed = {name: Entry(e.shape, e.dtype, path, len(head) + e.offset) for name, e in entries.items()}
        super().__init__(path, head, placed, size_bytes, resume)


def _require_name(name: str, shape: Shape) -> None:
    if len(name.encode()) > LONGEST_NAME:
        raise Unsupported(
            f"the name {name!r} is longer than the {LONGEST_NAME} bytes that ggml has for a tensor's name"
        )
    if len(shape) > MOST_DIMENSIONS:
        raise Unsupported(f"tensor {name!r} has {len(shape)} dimensions; ggml has at most {MOST_DIMENSIONS}")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    kind = value.type.removesuffix("[]")
    number = VALUE_NUMBERS[kind]
    if kind == value.type:
        head, items = struct.pack("<I", number), [value.value]
    else:
        head, items = struct.pack("<IIQ", ARRAY, number, len(value.value)), value.value
    if number == STRING:
        return head + b"".join(_string(item) for item in items)
    return head + struct.pack(f"<{len(items)}{NUMBERS[kind][1]}", *items)
