"""The head of a GGUF, read without torch (format: docs/gguf.md of ggml-org/ggml; limits: ggml's gguf.cpp).

A head says everything: typed metadata, then name, shape, type and offset of every tensor. It is not to be trusted:
whatever it counts is compared with what the file can hold before anything of that size is made.
"""

import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import gguf
import numpy as np

from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.files import HEADER_LIMIT, LARGEST_TENSOR, opened
from halfbyte.formats import ALIASES
from halfbyte.registry import Contents, StoredTensor
from halfbyte.targets.gguf import names

MAGIC, VERSION = gguf.GGUF_MAGIC.to_bytes(4, "little"), gguf.GGUF_VERSION
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT  # bytes, where general.alignment does not say otherwise
MOST_DIMENSIONS = 4  # of a tensor, in ggml
MOST_ELEMENTS, MOST_TENSORS, MOST_KEYS = (
    1 << 22,
    1 << 17,
    1 << 16,
)  # far beyond any real file, and few enough to hold in memory
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
BYTES = "uint8"


class Type(NamedTuple):
    """How ggml stores a row: blocks of `block` weights, `size_bytes` each."""

    number: int
    block: int
    size_bytes: int
    dtype: str = BYTES
    """What one element is, where no decoding is needed, as torch calls it; bytes otherwise."""


NEWER = {"NVFP4": Type(40, 64, 36), "Q1_0": Type(41, 128, 18), "Q2_0": Type(42, 64, 18)}
"""Of ggml.h and ggml-common.h, for those whose gguf does not know them yet."""
DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip
TYPES = NEWER | {
    kind.name: Type(kind.value, block, size_bytes, DTYPES.get(kind.name, BYTES))
    for kind, (block, size_bytes) in gguf.GGML_QUANT_SIZES.items()
}
"""ggml's tensor types, by ggml's names."""
TYPE_NAMES = {kind.number: name for name, kind in TYPES.items()}

LETTERS = {
    "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i", "float32": "f", "bool": "?",
    "uint64": "Q", "int64": "q", "float64": "d",
}  # fmt: skip
"""Numeric types of metadata, in `struct`."""
NUMBERS = {name: (gguf.GGUFValueType[name.upper()].value, letter) for name, letter in LETTERS.items()}
"""The same, with their numbers in a file."""
STRING, ARRAY = gguf.GGUFValueType.STRING.value, gguf.GGUFValueType.ARRAY.value
VALUE_NAMES = {number: name for name, (number, _) in NUMBERS.items()} | {STRING: "string"}
VALUE_NUMBERS = {name: number for number, name in VALUE_NAMES.items()}


class Value(NamedTuple):
    """A value of metadata, with the type that it has in the file."""

    type: str
    """A key of NUMBERS or "string"; with "[]" after it, a sequence of these."""
    value: Any


@dataclass(frozen=True)
class Placed:
    """A tensor, as a head tells of it."""

    type: str
    """A key of TYPES."""
    shape: tuple[int, ...]
    """In torch's order: [out, in], or [experts, out, in]."""
    path: Path
    offset: int

    @property
    def size_bytes(self) -> int:
        """Bytes of its blocks."""
        return prod(self.shape[:-1]) * row_bytes(self.type, self.shape[-1] if self.shape else 1)


Tensor = TypeVar("Tensor")


@dataclass(frozen=True)
class File(Generic[Tensor]):
    """One GGUF file, or the parts of a split one read as though they had not been split."""

    paths: tuple[Path, ...]
    metadata: dict[str, Value]
    tensors: dict[str, Tensor]

    def get(self, key: str, default: object = None):
        """A value of the metadata without its type."""
        return self.metadata[key].value if key in self.metadata else default


def row_bytes(type: str, width: int) -> int:
    """Bytes of a row of `width` weights. Raises Unsupported where blocks do not fill it."""
    kind = TYPES[type]
    if width % kind.block:
        raise Unsupported(f"{type} stores blocks of {kind.block} weights, which rows of {width} are no multiple of")
    return width // kind.block * kind.size_bytes


def read(path: Path) -> File[Placed]:
    """A file, a part of a split one (its other parts are found beside it), or a folder that holds one of either.

    Raises BadCheckpoint, naming the file, for one that is malformed, cut short, or lacks a part.
    """
    if path.is_dir():
        path = _only_model(path)
    first = _read_part(path)
    count = first.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return File(first.paths, _unsplit(first.metadata), first.tensors)
    parts = [first if name == path else _read_part(name) for name in _siblings(path, count)]
    tensors: dict[str, Placed] = {}
    for number, part in enumerate(parts):
        if part.get("split.no") != number or part.get("split.count") != count:
            raise BadCheckpoint(
                f"{part.paths[0]} says that it is part {part.get('split.no')} of {part.get('split.count')}, and its "
                f"name that it is {number}"
            )
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise BadCheckpoint(f"{part.paths[0]}: tensor {twice!r} is in an earlier part too")
        tensors |= part.tensors
    tensor_count = parts[0].get("split.tensors.count", len(tensors))
    if tensor_count != len(tensors):
        raise BadCheckpoint(
            f"{parts[0].paths[0]} says that all parts hold {tensor_count} tensors, and they hold {len(tensors)}; "
            "download them again"
        )
    return File(tuple(p.paths[0] for p in parts), _unsplit(parts[0].metadata), tensors)


def contents(path: Path) -> Contents:
    """What a file says that is in it, under ggml's names, what is quantized first. Raises BadCheckpoint as `read`
    does."""
    file = read(path)
    plain_last = sorted(file.tensors.items(), key=lambda item: TYPES[item[1].type].dtype != BYTES)
    tensors = [
        StoredTensor(name, _kind(placed.type), prod(placed.shape), placed.size_bytes) for name, placed in plain_last
    ]
    is_quantized = any(TYPES[placed.type].dtype == BYTES for placed in file.tensors.values())
    return Contents(str(file.get("general.architecture", "")), "gguf" if is_quantized else None, tensors)


def _kind(type: str) -> str:
    """The dtype or the grid of a type; of one that is not decoded, its name."""
    if TYPES[type].dtype != BYTES:
        return TYPES[type].dtype
    grid = names.TYPES.get(type, type)
    return ALIASES.get(grid, grid)


def _only_model(folder: Path) -> Path:
    """The first part of the one model in a folder."""
    names = sorted(p.name for p in folder.glob("*.gguf"))
    models = {(m["stem"], m["count"]) if (m := PART.fullmatch(name)) else name for name in names}
    if not models:
        raise BadCheckpoint(f"{folder} holds no .gguf file")
    if len(models) > 1:
        raise BadCheckpoint(
            f"{folder} holds {len(models)} models, such as {' and '.join(names[:: max(1, len(names) - 1)][:2])}; "
            "name one file"
        )
    return folder / names[0]


def _siblings(path: Path, count: int) -> list[Path]:
    match = PART.fullmatch(path.name)
    if not match or int(match["count"]) != count:
        raise BadCheckpoint(
            f"{path} is one of {count} parts, which are found by their names; it should be named "
            f"{part_name('NAME', 0, count)}"
        )
    names = [path.with_name(part_name(match["stem"], number, count)) for number in range(count)]
    missing = [name for name in names if not name.exists()]
    if missing:
        raise BadCheckpoint(
            f"{path} is one of {count} parts, and {len(missing)} are missing, the first {missing[0].name}; "
            "download it again"
        )
    return names


def _unsplit(metadata: dict[str, Value]) -> dict[str, Value]:
    return {key: value for key, value in metadata.items() if not key.startswith("split.")}


def part_name(stem: str, number: int, count: int) -> str:
    """File name of part `number`, from 0, as llama.cpp looks for it."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


# Reading a header ---------------------------------------------------------------------------------------------------


class _Malformed(Exception):
    """What is wrong with a header."""


class _CutShort(Exception):
    """The bytes at hand end before the byte at `end`."""

    def __init__(self, end: int):
        self.end = end


def _read_part(path: Path) -> File[Placed]:
    try:
        with opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            return File((path,), *read_head(file.read, size, path))
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None


def read_head(more: Callable[[int], bytes], size: int, path: Path) -> tuple[dict[str, Value], dict[str, Placed]]:
    """Metadata and tensors of a file of `size` bytes, of which `more` gives the next few each time. Raises
    BadCheckpoint, naming the file."""
    try:
        return _header(more, size, path)
    except _Malformed as wrong:
        raise BadCheckpoint(f"{path} is no GGUF file that can be read, or is cut short: {wrong}") from None


def padded(size_bytes: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size_bytes // step) * step


def _header(read_more: Callable[[int], bytes], size: int, path: Path) -> tuple[dict[str, Value], dict[str, Placed]]:
    """Where a header ends is known only once it is parsed, so more of the file is taken until it is whole."""
    data = read_more(1 << 20)
    while True:
        try:
            return _parse(data, size, path)
        except _CutShort as cut:
            wanted = min(HEADER_LIMIT, max(cut.end, 4 * len(data)))
            more = b"" if cut.end > min(size, HEADER_LIMIT) else read_more(wanted - len(data))
            if not more:
                raise _Malformed(f"its header goes on to byte {cut.end} of {size}") from None
            data += more


def _parse(data: bytes, size: int, path: Path) -> tuple[dict[str, Value], dict[str, Placed]]:
    """Metadata and tensors of a header; `size` is that of the whole file."""
    cursor = _Cursor(data, size)
    tensor_count, key_count = _preamble(cursor)
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = cursor.name("key")
        if key in metadata:
            raise _Malformed(f"key {key!r} comes twice")
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", Value("uint32", ALIGNMENT))
    step = alignment.value
    if alignment.type != "uint32" or step < 1 or step & (step - 1):
        raise _Malformed(f"general.alignment is {step!r} ({alignment.type}), not a power of two")
    tensors: dict[str, Placed] = {}
    for _ in range(tensor_count):
        name = cursor.name("tensor's name")
        if name in tensors:
            raise _Malformed(f"tensor {name!r} comes twice")
        tensors[name] = cursor.tensor(name, path)
    start = padded(cursor.at, step)
    _require_apart(tensors, size - start, step)
    return metadata, {name: replace(t, offset=start + t.offset) for name, t in tensors.items()}


def _require_apart(tensors: Mapping[str, Placed], size: int, step: int) -> None:
    """Every tensor lies at a multiple of `step`, overlaps no other, and ends before the file does, `size` bytes on."""
    end = 0
    for name, placed in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if placed.offset % step:
            raise _Malformed(f"tensor {name!r} is at {placed.offset}, not a multiple of {step}")
        if placed.offset < end:
            raise _Malformed(f"tensor {name!r} overlaps another")
        end = placed.offset + placed.size_bytes
        if end > size:
            raise _Malformed(f"tensor {name!r} needs {end - size} bytes more than there are; download the file again")


def _preamble(cursor: "_Cursor") -> tuple[int, int]:
    """How many tensors and keys there are."""
    magic = cursor.take(4)
    if magic != MAGIC:
        hint = "; it is a pointer of Git LFS: fetch it with git lfs pull" if magic == b"vers" else ""
        raise _Malformed(f"it starts with {magic!r}, not {MAGIC!r}{hint}")
    version = cursor.number("I")
    if not version & 0xFFFF:
        raise _Malformed(
            "it is big-endian, and only little-endian files are read; convert it with gguf_convert_endian.py "
            "of llama.cpp"
        )
    if version not in (2, VERSION):
        raise _Malformed(
            f"it is of version {version}, and versions 2 and 3 are read"
            + ("; convert the model again" if version == 1 else "")
        )
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if tensors > MOST_TENSORS or keys > MOST_KEYS:
        raise _Malformed(
            f"it counts {tensors} tensors and {keys} keys; at most {MOST_TENSORS} and {MOST_KEYS} are read"
        )
    return tensors, keys


class _Cursor:
    """A place in the bytes of a header. Raises _CutShort where they end too early."""

    def __init__(self, data: bytes, size: int):
        self.data, self.size, self.at = data, size, 0
        self.left = MOST_ELEMENTS
        """Elements of arrays that may follow."""

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise _CutShort(end)
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, letter: str):
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def name(self, what: str) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _Malformed(f"a {what} is not UTF-8: {raw[:64]!r}") from None

    def value(self, key: str) -> Value:
        number, count = self.number("I"), None
        if number == ARRAY:
            number, count = self.number("I"), self.number("Q")
        if number not in VALUE_NAMES:
            what = "an array of arrays" if number == ARRAY else f"of type {number}"
            raise _Malformed(f"{key!r} is {what}, which is not known")
        self.left -= count or 0
        if self.left < 0:
            raise _Malformed(f"{key!r} counts {count} elements; at most {MOST_ELEMENTS} in all are read")
        name, wanted = VALUE_NAMES[number], 1 if count is None else count
        items = self.strings(wanted) if number == STRING else self.numbers(name, wanted)
        return Value(name, items[0]) if count is None else Value(f"{name}[]", items)

    def numbers(self, name: str, count: int) -> list:
        kind = np.dtype(NUMBERS[name][1]).newbyteorder("<")
        raw = np.frombuffer(self.take(count * kind.itemsize), np.uint8 if name == "bool" else kind)
        return (raw != 0).tolist() if name == "bool" else raw.tolist()

    def strings(self, count: int) -> list[str]:
        """Bytes that are not UTF-8, as in some vocabularies, become surrogates, which are written back as they were."""
        if self.at + 8 * count > self.size:
            raise _CutShort(self.at + 8 * count)
        data, at, length, strings = self.data, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            start = at + 8
            if start > len(data):
                raise _CutShort(start)
            at = start + length(data, at)[0]
            if at > len(data):
                raise _CutShort(at)
            strings.append(data[start:at].decode("utf-8", "surrogateescape"))
        self.at = at
        return strings

    def tensor(self, name: str, path: Path) -> Placed:
        """What is said of one tensor; its offset is still counted from the first."""
        dimensions = self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise _Malformed(f"tensor {name!r} has {dimensions} dimensions; ggml has at most {MOST_DIMENSIONS}")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        number, offset = self.number("I"), self.number("Q")
        if prod(max(n, 1) for n in shape) > LARGEST_TENSOR:
            raise _Malformed(f"tensor {name!r} is of shape {list(shape)}, more than any file holds")
        if number not in TYPE_NAMES:
            raise _Malformed(f"tensor {name!r} is of ggml type {number}, which is not known")
        try:
            row_bytes(TYPE_NAMES[number], shape[-1] if shape else 1)
        except Unsupported as wrong:
            raise _Malformed(f"tensor {name!r}: {wrong}") from None
        return Placed(TYPE_NAMES[number], shape, path, offset)
