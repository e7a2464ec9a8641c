"""What is in a checkpoint: tensors, grids, bits per weight, sizes, and, of the report beside it, what was lost."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from halfbyte.errors import BadCheckpoint
from halfbyte.files import exists, path_of
from halfbyte.registry import HEADS, Contents, StoredTensor, source_suffix
from halfbyte.report import written
from halfbyte.report.types import Inspection, Report, Sizes, Stored, WeightReport

if TYPE_CHECKING:
    from halfbyte.models.checkpoint import Checkpoint


def inspect(path: str | Path) -> Inspection:
    """What is in the checkpoint at `path`. Reads headers only, and zero points and orders where only they tell a grid.

    Raises HalfbyteError. A report beside it that is not one of ours is named among the warnings.
    """
    place, contents = _contents(path)
    weights: list[WeightReport] = []
    report, warnings = None, []
    try:
        report = written.read(place)
    except BadCheckpoint as error:
        warnings = [f"{error}; nothing of it is shown"]
    if isinstance(report, Report):
        weights, warnings = sorted(report.weights, key=lambda row: -row.error), report.warnings
    return Inspection(
        path=str(place),
        model_type=contents.model_type,
        container=contents.container,
        **counted(contents.tensors).as_dict(),
        error_of=report.error_of if isinstance(report, Report) else None,
        weights=weights,
        warnings=warnings,
        evaluation=report.evaluation if report else None,
    )


def _contents(source: str | Path) -> tuple[Path, Contents]:
    """Where a checkpoint lies, and what is in it."""
    path = path_of(source)
    if exists(path) and (suffix := source_suffix(path)) in HEADS:
        return path, resolve_name(HEADS[suffix])(path)
    from halfbyte.models.checkpoint import Checkpoint  # torch, and seconds, which a head that says all can spare

    checkpoint = Checkpoint.open(source)
    return checkpoint.path, Contents(checkpoint.model_type, checkpoint.container, stored(checkpoint))


def counted(tensors: Iterable[StoredTensor]) -> Sizes:
    """How large it is, in all and by what its weights are stored as."""
    by_kind: dict[str, list[tuple[int, int]]] = defaultdict(list)  # weights and bytes of each tensor
    for tensor in tensors:
        by_kind[tensor.kind].append((tensor.weights, tensor.size_bytes))
    kinds = {kind: _stored(sizes) for kind, sizes in by_kind.items()}
    size_bytes, parameters = sum(k.size_bytes for k in kinds.values()), sum(k.weights for k in kinds.values())
    bits = 8 * size_bytes / max(parameters, 1)
    return Sizes(size_bytes=size_bytes, parameters=parameters, bits_per_parameter=bits, grids=kinds)


def stored(checkpoint: "Checkpoint") -> list[StoredTensor]:
    """Every tensor by its name in the unquantized checkpoint."""
    tensors = []
    for module, (scheme, shape) in checkpoint.quantized.items():
        size_bytes = sum(checkpoint.entries[t].size_bytes for t in checkpoint.parts_of[module])
        tensors.append(StoredTensor(f"{module}.weight", str(scheme), shape[0] * shape[1], size_bytes))
    for name, entry in checkpoint.entries.items():
        if name not in checkpoint.parts:
            kind = str(entry.dtype).removeprefix("torch.")
            tensors.append(StoredTensor(name, kind, entry.size_bytes // entry.dtype.itemsize, entry.size_bytes))
    return tensors


def _stored(sizes: list[tuple[int, int]]) -> Stored:
    weights, size_bytes = (sum(part) for part in zip(*sizes, strict=True))
    bits = 8 * size_bytes / max(weights, 1)
    return Stored(tensors=len(sizes), weights=weights, size_bytes=size_bytes, bits_per_weight=bits)
