"""Which model it is: to a run that is taken up again, where every file counts, and to a report, where folders may have
moved."""

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import torch
import xxhash

from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.folder import NOT_COPIED

SAMPLED = 256
"""Bytes of each tensor that tell a model from others of its shape: whoever trains one further changes all rows."""
TOOLS = ("halfbyte", "torch", "transformers", "numpy", "numba")


def stamp(checkpoint: Checkpoint) -> list[tuple]:
    """Of tensors their place, size and time; of every other file its bytes; and what rounds: versions, and the
    processor's instructions."""
    tensors = [(name, e.shape, str(e.dtype), str(e.path), e.offset) for name, e in checkpoint.entries.items()]
    weights = {entry.path for entry in checkpoint.entries.values()}
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(weights)]
    configs = [checkpoint.path / name for name in NOT_COPIED] if checkpoint.path.is_dir() else []
    files = [(path.name, digest(path)) for path in (*configs, *checkpoint.other_files) if path.is_file()]
    return [
        *tensors,
        *stats,
        *files,
        *((tool, version(tool)) for tool in TOOLS),
        (torch.backends.cpu.get_cpu_capability(),),
    ]


def origin(checkpoint: Checkpoint) -> str:
    """Of a model wherever it lies: its config, its tensors' names, shapes and first bytes, and what an adapter adds to
    them."""
    hasher = xxhash.xxh3_128(json.dumps(checkpoint.config, sort_keys=True, default=str).encode())
    files = defaultdict(list)
    for name, entry in checkpoint.entries.items():
        files[entry.path].append((entry.offset, name, entry))
    sampled = []
    for path, tensors in files.items():
        with open(path, "rb") as file:
            for offset, name, entry in sorted(tensors, key=lambda place: place[:2]):
                file.seek(offset)
                sampled.append((name, entry.shape, str(entry.dtype), file.read(min(SAMPLED, entry.size_bytes))))
    for one in sorted(sampled):
        hasher.update(repr(one).encode())
    for part in (checkpoint.adapter, checkpoint.rotation):
        hasher.update((part.digest if part else "").encode())
    return hasher.hexdigest()


def digest(path: Path) -> str:
    """xxh3_128 of a file's bytes."""
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            hasher.update(part)
    return hasher.hexdigest()
