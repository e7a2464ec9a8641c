"""What is in a checkpoint: tensors, grids, bits per weight, sizes, and, where a report lies beside it, the worst layers."""

from pathlib import Path
from typing import Any

from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report import written


def inspect(path: str | Path) -> dict[str, Any]:
    """Read headers only, and zero points and orders where only they tell a grid."""
    checkpoint = Checkpoint.open(path)
    report = written.read(checkpoint.path)
    return {
        "path": str(checkpoint.path),
        "model_type": checkpoint.model_type,
        "container": checkpoint.container.name if checkpoint.container else None,
        **counted(checkpoint),
        "error_of": report.get("error_of"),
        "weights": sorted(report.get("weights", []), key=lambda row: -row["error"]),
        "warnings": report.get("warnings", []),
        "evaluation": report.get("evaluation"),
    }


def counted(checkpoint: Checkpoint) -> dict[str, Any]:
    """How large it is, in all and by what its weights are stored as."""
    kinds: dict[str, dict[str, Any]] = {}
    for module, (grid, shape) in checkpoint.quantized.items():
        _count(
            kinds,
            str(grid),
            shape[0] * shape[1],
            sum(checkpoint.entries[t].size_bytes for t in checkpoint.parts_of[module]),
        )
    for name, entry in checkpoint.entries.items():
        if name not in checkpoint.parts:
            _count(
                kinds,
                str(entry.dtype).removeprefix("torch."),
                entry.size_bytes // entry.dtype.itemsize,
                entry.size_bytes,
            )
    for row in kinds.values():
        row["bits_per_weight"] = 8 * row["size_bytes"] / max(row["weights"], 1)
    total = sum(row["size_bytes"] for row in kinds.values())
    parameters = sum(row["weights"] for row in kinds.values())
    return {
        "size_bytes": total,
        "parameters": parameters,
        "bits_per_parameter": 8 * total / max(parameters, 1),
        "grids": kinds,
    }


def _count(kinds: dict[str, dict[str, Any]], kind: str, weights: int, size_bytes: int) -> None:
    row = kinds.setdefault(kind, {"tensors": 0, "weights": 0, "size_bytes": 0})
    row["tensors"] += 1
    row["weights"] += weights
    row["size_bytes"] += size_bytes
