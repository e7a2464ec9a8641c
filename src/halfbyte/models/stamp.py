"""What a run's identity says of its source: another model, or the same with another config or tokenizer, is another run."""

from importlib.metadata import version
from pathlib import Path

import torch
import xxhash

from halfbyte.models.checkpoint import NOT_COPIED, Checkpoint

TOOLS = ("halfbyte", "torch", "transformers", "numpy", "numba")


def stamp(checkpoint: Checkpoint) -> list[tuple]:
    """Of tensors their place, size and time; of every other file its bytes; and what rounds: versions, and the processor's instructions."""
    tensors = [(name, e.shape, str(e.dtype), str(e.path), e.offset) for name, e in checkpoint.entries.items()]
    weights = {entry.path for entry in checkpoint.entries.values()}
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(weights)]
    said = [checkpoint.path / name for name in NOT_COPIED] if checkpoint.path.is_dir() else []
    files = [(path.name, digest(path)) for path in (*said, *checkpoint.other_files) if path.is_file()]
    return [*tensors, *stats, *files, *((tool, version(tool)) for tool in TOOLS), (torch.backends.cpu.get_cpu_capability(),)]


def digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while part := file.read(1 << 24):
            hasher.update(part)
    return hasher.hexdigest()
