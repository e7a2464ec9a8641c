"""llama.cpp's importance matrix: how large the inputs of every linear are, feature by feature (its tools/imatrix).

Two formats hold it. A GGUF file has the tensors `NAME.in_sum2` [experts, in] and `NAME.counts` [experts, 1] for every
weight; the older .dat file has one row of values for each, with the experts of a stack one after the other.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from halfbyte.errors import BadCheckpoint, BadRequest
from halfbyte.targets.gguf import file as gguf
from halfbyte.targets.gguf.head import Value

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


class Squares(NamedTuple):
    """What one weight has read: sums, so that the file holds exactly what was measured."""

    sums: Float32[Tensor, "experts in"]
    """Sum of x^2 over the tokens that an expert has read; one row for a weight without experts."""
    counts: Float32[Tensor, " experts"]
    """How many tokens those were."""

    @property
    def mean(self) -> Float32[Tensor, "experts in"]:
        """Mean of x^2, as llama-quantize computes it: all ones for an expert that no token has reached."""
        counts = self.counts[:, None]
        return torch.where(counts > 0, self.sums / counts, 1.0)


@dataclass(frozen=True)
class Importance:
    """An importance matrix."""

    tensors: Mapping[str, Squares]
    """By GGUF's names of weights, such as blk.0.attn_q.weight."""
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0
    """Tokens in a chunk."""

    def of(self, name: str, experts: int, width: int) -> Float32[Tensor, "experts width"] | None:
        """Mean of x^2 of the inputs of one weight; None if nothing is known of it.

        The older format does not say where an expert ends, so the number of experts is the caller's to say.
        Raises BadRequest if the matrix is of another model.
        """
        if name not in self.tensors:
            return None
        mean = self.tensors[name].mean
        if mean.numel() != experts * width:
            raise BadRequest(
                f"the importance matrix has {mean.numel()} values for {name}, which needs {experts * width}; it is "
                "of another model"
            )
        return mean.reshape(experts, width)


def read(path: Path) -> Importance:
    """Either format. Raises BadCheckpoint, naming the file, for one that is malformed."""
    try:
        with open(path, "rb") as file:
            is_gguf = file.read(4) == gguf.MAGIC
            file.seek(0)
            importance = _read_gguf(path) if is_gguf else _read_legacy(file, path.stat().st_size)
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as wrong:
        raise BadCheckpoint(f"{path} is no importance matrix of llama.cpp, or is cut short: {wrong}") from None
    for name, squares in importance.tensors.items():
        if not squares.mean.isfinite().all() or squares.mean.min() < 0:
            raise BadCheckpoint(
                f"{path} holds values for {name!r} that are no means of squares (NaN, infinite or negative); "
                "make it again"
            )
    return importance


def _read_gguf(path: Path) -> Importance:
    file = gguf.read(path)
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    tensors = {name: Squares(*_sums_and_counts(file, name)) for name in names}
    if not tensors:
        raise ValueError(f"it has no tensor NAME{SUMS}")
    datasets = file.metadata.get(DATASETS, Value("string[]", ()))
    chunks, size = (file.metadata.get(key, Value("uint32", 0)) for key in (CHUNKS, CHUNK_SIZE))
    if (datasets.type, chunks.type, size.type) != ("string[]", "uint32", "uint32"):
        raise ValueError(f"{DATASETS}, {CHUNKS} and {CHUNK_SIZE} are {datasets.type}, {chunks.type} and {size.type}")
    return Importance(tensors, tuple(datasets.value), chunks.value, size.value)


def _sums_and_counts(file: gguf.File, name: str) -> tuple[Tensor, Tensor]:
    sums, counts = file.tensors[name + SUMS], file.tensors.get(name + COUNTS)
    if counts is None or (sums.type, counts.type) != ("F32", "F32"):
        raise ValueError(f"{name!r} needs {SUMS} and {COUNTS}, both of F32")
    experts, values = counts.entry.read().reshape(-1), sums.entry.read().reshape(-1)
    if not len(experts) or not len(values) or len(values) % len(experts):
        raise ValueError(f"{name!r} has {len(values)} sums for {len(experts)} counts")
    return values.view(len(experts), -1), experts


def _read_legacy(file: BinaryIO, size: int) -> Importance:
    """A count of entries; for each its name, how often it was called and its values; then chunks and the name of the
    dataset."""

    def take(count: int) -> bytes:
        if not 0 <= count <= size - file.tell():
            raise ValueError(f"{count} bytes are said to follow byte {file.tell()} of {size}")
        return file.read(count)

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    tensors: dict[str, Squares] = {}
    for _ in range(number()):
        name = take(number()).decode()
        calls, width = number(), number()
        sums = torch.frombuffer(bytearray(take(4 * width)), dtype=torch.float32) if width > 0 else torch.empty(0)
        if name in tensors or not width or calls < 0:
            raise ValueError(f"{name!r} comes twice or has {width} values of {calls} calls")
        tensors[name] = Squares(sums[None], torch.tensor([float(max(calls, 1))]))
    if not tensors:
        raise ValueError("it has no entries")
    chunks = number() if file.tell() < size else 0
    datasets = (take(number()).decode(),) if file.tell() < size else ()
    return Importance(tensors, datasets, chunks)


def write(path: Path, importance: Importance) -> None:
    """A GGUF file that llama-quantize --imatrix reads."""
    metadata = {
        "general.type": Value("string", "imatrix"),
        DATASETS: Value("string[]", importance.datasets),
        CHUNKS: Value("uint32", importance.chunks),
        CHUNK_SIZE: Value("uint32", importance.chunk_size),
    }
    contents: dict[str, Tensor] = {}
    for name, squares in sorted(importance.tensors.items()):
        contents |= {name + SUMS: squares.sums, name + COUNTS: squares.counts[:, None]}
    writer = gguf.GGUFFileWriter(
        path, metadata, {name: ("F32", tuple(tensor.shape)) for name, tensor in contents.items()}
    )
    for name, tensor in contents.items():
        writer.write(name, tensor)
    writer.close()
