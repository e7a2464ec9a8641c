"""Reading and writing safetensors as a stream (format: the README of huggingface/safetensors).

The safetensors package maps whole files and writes whole dictionaries. Here tensors are read and written one at a time
at their offsets, so that memory stays at one tensor whatever the file's size: pages of a mapped file count as resident.
"""

import errno
import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.containers.place import not_through_links
from halfbyte.errors import BadCheckpoint, brief
from halfbyte.files import HEADER_LIMIT, LARGEST_TENSOR, opened, parse_json

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_VALUES = (
    1 << 20
)  # in a header, of which each tensor has seven: 28 times as many as the largest shard that is known
LONGEST_NAME = 1024  # characters


@dataclass(frozen=True)
class Spec:
    """What a file says of a tensor before its bytes are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry(Spec):
    """A tensor in a file on disk."""

    path: Path
    offset: int

    def at(self, index: int) -> "Entry":
        """One row of the leading dimension, as a tensor of its own."""
        row = Spec(self.shape[1:], self.dtype)
        return Entry(row.shape, row.dtype, self.path, self.offset + index * row.size_bytes)

    def read(self, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first : last` of the leading dimension (all by default), in memory of their own."""
        if not self.shape:
            shape, start = self.shape, self.offset
        else:
            last = self.shape[0] if last is None else last
            shape = (last - first, *self.shape[1:])
            start = self.offset + first * prod(self.shape[1:]) * self.dtype.itemsize
        raw = torch.from_numpy(
            np.empty(prod(shape) * self.dtype.itemsize, np.uint8)
        )  # NumPy asks for huge pages: fewer faults
        with opened(self.path) as file:
            file.seek(start)
            view, done = raw.numpy().data, 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    raise BadCheckpoint(f"{self.path} ends {len(view) - done} bytes before one of its tensors does")
                done += count
        return raw.view(self.dtype).view(shape) if raw.numel() else torch.empty(shape, dtype=self.dtype)


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of the file. Raises BadCheckpoint for what the reference implementation refuses too: a file that is
    cut short, malformed, or has bytes that are no tensor's."""
    with opened(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            text = file.read(length) if 2 <= length <= min(HEADER_LIMIT, size - 8) else None
        except OSError as error:
            raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    if start == b"version ":
        raise BadCheckpoint(f"{path} is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull")
    if text is None:
        raise BadCheckpoint(f"{path} is no safetensors file, or is cut short: it has {size} bytes and no whole header")
    try:
        entries = _entries(text, path, 8 + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{path} has a malformed safetensors header: {brief(error)}") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size_bytes)):
        if entry.offset != end:
            wrong = (
                "overlaps another"
                if entry.offset < end
                else f"comes {entry.offset - end} bytes after the one before it"
            )
            raise BadCheckpoint(f"{path} has a malformed safetensors header: tensor '{name}' {wrong}")
        end = entry.offset + entry.size_bytes
        if end > size:
            raise BadCheckpoint(
                f"{path} is cut short: tensor '{name}' needs {end - size} bytes more; download the file again"
            )
    if end != size:
        raise BadCheckpoint(f"{path} has {size - end} bytes after its last tensor; download the file again")
    return entries


def _entries(text: bytes, path: Path, start: int) -> dict[str, Entry]:
    header = parse_json(text, MOST_VALUES, unique=True)
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("__metadata__ does not map names to texts")
    return {_named(name): _entry(path, start, value) for name, value in header.items()}


def _named(name: str) -> str:
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a tensor's name has {len(name)} characters")
    return name


def _entry(path: Path, data: int, value: Mapping) -> Entry:
    if value["dtype"] not in DTYPES:
        raise ValueError(f"dtype {value['dtype']} is not known")
    (begin, end), shape = value["data_offsets"], value["shape"]
    if (
        not all(type(n) is int and n >= 0 for n in (begin, end, *shape))
        or prod(max(n, 1) for n in shape) > LARGEST_TENSOR
    ):
        raise ValueError(f"shape {shape} and offsets {begin}..{end} are not all sizes")
    entry = Entry(tuple(shape), DTYPES[value["dtype"]], path, data + begin)
    if end - begin != entry.size_bytes:
        raise ValueError(f"offsets {begin}..{end} do not fit shape {shape}")
    return entry


class FileWriter:
    """A file in which every tensor has its place before the first byte is written; tensors then come in any order."""

    def __init__(self, path: Path, head: bytes, entries: Mapping[str, Entry], size_bytes: int, resume: bool = False):
        """`head` is what lies before the tensors. With `resume`, the tensors that the file holds already are kept."""
        self.path = path
        self.entries = dict(entries)
        self.file = open(path, "r+b" if resume else "w+b", buffering=0, opener=not_through_links)  # noqa: SIM115
        self._turn = Lock()
        self._write(head, 0)
        # Reserve the whole file at once: a disk that is too small says so now, not hours later.
        if size_bytes > len(head):
            _reserve(self.file.fileno(), path, size_bytes)

    def write(self, name: str, tensor: Tensor, at: int | None = None) -> None:
        """The whole tensor, or its rows (of the leading dimension) from `at` on."""
        entry = self.entries[name]
        planned = entry.shape if at is None else (tensor.shape[0], *entry.shape[1:])
        if (
            tuple(tensor.shape) != planned
            or tensor.dtype != entry.dtype
            or (at is not None and at + tensor.shape[0] > entry.shape[0])
        ):
            raise ValueError(
                f"{name}: planned {entry.shape} {entry.dtype}, got {tuple(tensor.shape)} {tensor.dtype} at "
                f"row {at or 0}"
            )
        if tensor.numel():
            start = entry.offset + (at or 0) * prod(entry.shape[1:]) * entry.dtype.itemsize
            self._write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, start)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view, done = memoryview(data), 0
        with self._turn:  # threads write side by side; where a write begins is the file's, not theirs
            self.file.seek(offset)
            while done < len(view):
                done += self.file.write(view[done:])

    def close(self) -> None:
        """Have every byte on the disk, and let go of the file."""
        os.fsync(self.file.fileno())
        self.abandon()

    def abandon(self) -> None:
        """Let go of the file as it is."""
        self.file.close()


class SafetensorsFileWriter(FileWriter):
    """A safetensors file, laid out from the shapes of its tensors."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], resume: bool = False):
        head = head_of(specs)
        entries, offset = {}, len(head)
        for name, spec in specs.items():
            entries[name] = Entry(spec.shape, spec.dtype, path, offset)
            offset += spec.size_bytes
        super().__init__(path, head, entries, offset, resume)


def head_of(specs: Mapping[str, Spec]) -> bytes:
    """What comes before the tensors in a file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.size_bytes],
        }
        offset += spec.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _reserve(file: int, path: Path, size_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        try:
            return os.posix_fallocate(file, 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):  # some file systems have it not
                raise
    if size_bytes - os.fstat(file).st_size > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    os.ftruncate(file, size_bytes)
