"""Damaged files: each is read, or refused with an error of ours, in little time and memory."""

import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from halfbyte.errors import HalfbyteError
from halfbyte.targets.gguf import file as gguf_file
from halfbyte.targets.gguf import imatrix
from halfbyte.targets.gguf.file import GGUFFileWriter
from halfbyte.targets.gguf.head import File, Value

CASES, SECONDS, BYTES = 60, 2.0, 32 << 20
EXTREMES = (
    0,
    1,
    31,
    255,
    256,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
)


def model(path: Path) -> bytes:
    metadata = {
        "general.architecture": Value("string", "llama"),
        "general.alignment": Value("uint32", 32),
        "split.count": Value("uint16", 1),
        "tokens": Value("string[]", ["a", "b", "c"]),
        "scores": Value("float32[]", [0.5, 1.5]),
        "flag": Value("bool", True),
    }
    tensors = {"q": ("Q4_K", (2, 256)), "w": ("F32", (3, 5)), "e": ("IQ4_NL", (2, 2, 32)), "s": ("BF16", ())}
    writer = GGUFFileWriter(path, metadata, tensors)
    for name, entry in writer.entries.items():
        writer.write(name, torch.zeros(entry.shape, dtype=entry.dtype))
    writer.close()
    return path.read_bytes()


def importance(path: Path) -> bytes:
    squares = {
        name: imatrix.Squares(torch.rand(experts, 8), torch.full((experts,), 7.0))
        for name, experts in (("a.weight", 1), ("b.weight", 3))
    }
    imatrix.write(path, imatrix.Importance(squares, ("text",), 2, 512))
    return path.read_bytes()


def legacy(path: Path) -> bytes:
    entries = [(b"a.weight", 3, 8), (b"b.weight", 2, 16)]
    body = b"".join(
        struct.pack("<i", len(n)) + n + struct.pack("<ii", calls, width) + struct.pack(f"<{width}f", *range(width))
        for n, calls, width in entries
    )
    return struct.pack("<i", len(entries)) + body + struct.pack("<ii", 3, 4) + b"text"


def flip(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        damaged[rng.randrange(min(len(data), 600))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A count, length, type or offset becomes another: every field is of 4 or 8 bytes, so any place will do."""
    size, at = rng.choice((4, 8)), rng.randrange(4, min(len(data) - 8, 600))
    value = rng.choice((*EXTREMES, rng.getrandbits(64))) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A stretch is left out, or comes twice."""
    first, last = sorted(rng.randrange(min(len(data), 600)) for _ in range(2))
    return data[:first] + data[last:] if rng.random() < 0.5 else data[:last] + data[first:]


def shuffle(data: bytes, rng: random.Random) -> bytes:
    return data[:24] + rng.randbytes(rng.randrange(4096))


FILES = {"model": (model, gguf_file.read), "imatrix": (importance, imatrix.read), "imatrix.dat": (legacy, imatrix.read)}
DAMAGES = (flip, cut, overwrite, splice, shuffle)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_is_read_or_refused(tmp_path, kind: str, damage: Callable[[bytes, random.Random], bytes]):
    make, read = FILES[kind]
    whole, rng, path = make(tmp_path / "whole"), random.Random(f"{kind} {damage.__name__}"), tmp_path / "damaged"
    refused = 0
    tracemalloc.start()
    try:
        for case in range(CASES):
            path.write_bytes(damage(whole, rng))
            tracemalloc.reset_peak()
            started = time.process_time()
            refusal = read_all(read, path)
            if refusal is not None:
                refused += 1
                assert str(path) in refusal
                assert "\n" not in refusal
            assert time.process_time() - started < SECONDS, f"case {case}"
            assert tracemalloc.get_traced_memory()[1] < BYTES, f"case {case}"
    finally:
        tracemalloc.stop()
    assert refused


def read_all(read: Callable[[Path], File | imatrix.Importance], path: Path) -> str | None:
    """What is said against the file. Where nothing is, every byte that its header promises is there."""
    try:
        value = read(path)
    except HalfbyteError as error:
        return str(error)
    if isinstance(value, File):
        for stored in value.tensors.values():
            stored.entry.read()
    return None
