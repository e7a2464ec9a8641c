"""What is in a checkpoint: tensors, grids, bits per weight, sizes, and, of the report beside it, what was lost."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from halfbyte.errors import BadCheckpoint
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report import written
from halfbyte.report.types import Inspection, Report, Sizes, Stored, WeightReport


def inspect(path: str | Path) -> Inspection:
    """What is in a checkpoint. Reads headers only, and zero points and orders where only they tell a grid.

    Raises HalfbyteError. A report beside it that is not one of ours is named among the warnings.
    """
    checkpoint = Checkpoint.open(path)
    weights: list[WeightReport] = []
    report, warnings = None, []
    try:
        report = written.read(checkpoint.path)
    except BadCheckpoint as error:
        warnings = [f"{error}; nothing of it is shown"]
    if isinstance(report, Report):
        weights, warnings = sorted(report.weights, key=lambda row: -row.error), report.warnings
    return Inspection(
        path=str(checkpoint.path),
        model_type=checkpoint.model_type,
        container=checkpoint.container,
        **counted(checkpoint).as_dict(),
        error_of=report.error_of if isinstance(report, Report) else None,
        weights=weights,
        warnings=warnings,
        evaluation=report.evaluation if report else None,
    )


def counted(checkpoint: Checkpoint) -> Sizes:
    """How large it is, in all and by what its weights are stored as."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)  # weights and bytes of each tensor
    for _, kind, weights, size_bytes in stored(checkpoint):
        found[kind].append((weights, size_bytes))
    kinds = {kind: _stored(tensors) for kind, tensors in found.items()}
    size_bytes, parameters = sum(k.size_bytes for k in kinds.values()), sum(k.weights for k in kinds.values())
    bits = 8 * size_bytes / max(parameters, 1)
    return Sizes(size_bytes=size_bytes, parameters=parameters, bits_per_parameter=bits, grids=kinds)


def stored(checkpoint: Checkpoint) -> Iterator[tuple[str, str, int, int]]:
    """Every tensor by its name in the unquantized checkpoint: its grid or dtype, numbers, and bytes."""
    for module, (scheme, shape) in checkpoint.quantized.items():
        size_bytes = sum(checkpoint.entries[t].size_bytes for t in checkpoint.parts_of[module])
        yield f"{module}.weight", str(scheme), shape[0] * shape[1], size_bytes
    for name, entry in checkpoint.entries.items():
        if name not in checkpoint.parts:
            kind = str(entry.dtype).removeprefix("torch.")
            yield name, kind, entry.size_bytes // entry.dtype.itemsize, entry.size_bytes


def _stored(tensors: list[tuple[int, int]]) -> Stored:
    weights, size_bytes = (sum(part) for part in zip(*tensors, strict=True))
    bits = 8 * size_bytes / max(weights, 1)
    return Stored(tensors=len(tensors), weights=weights, size_bytes=size_bytes, bits_per_weight=bits)
