"""What was measured of models, as a result for the user, and in the report beside each model."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report import written
from halfbyte.report.inspect import counted
from halfbyte.report.numbers import require_finite
from halfbyte.report.types import (
    Conditions,
    Divergence,
    Evaluation,
    EvaluationRecord,
    Measured,
    Needle,
    NeedleConditions,
    NeedleModel,
    NeedleRecord,
    Perplexity,
    Recalled,
    StateError,
    StatesEvaluation,
    StatesRecord,
)

Asked = tuple[str | Path, str]
"""A model, and the KV cache that it ran with: "stored" is its own."""


def evaluation(
    conditions: Mapping[str, Any], checkpoints: Sequence[Checkpoint], rows: Sequence[dict[str, Any]], predicts: bool
) -> Evaluation | StatesEvaluation:
    """The measures of each checkpoint, of which the first is the reference. Raises BrokenOutput for NaN."""
    require_finite(list(rows), "evaluation")
    reference, *models = [_named(checkpoint) | row for checkpoint, row in zip(checkpoints, rows, strict=True)]
    own = {name: value for name, value in reference.items() if name not in ("path", "kv")}
    if predicts:
        measured = [Divergence(**row) for row in models]
        return Evaluation(**conditions, compared="predictions", reference=Perplexity(**own), models=measured)
    states = [StateError(**row) for row in models]
    return StatesEvaluation(**conditions, compared="last hidden states", reference=Measured(**own), models=states)


def _named(checkpoint: Checkpoint) -> dict[str, Any]:
    size = counted(checkpoint)
    kv = str(checkpoint.kv.grid) if checkpoint.kv else None
    return {
        "path": str(checkpoint.path),
        "kv": kv,
        "size_bytes": size.size_bytes,
        "bits_per_parameter": size.bits_per_parameter,
    }


def record(
    result: Evaluation | StatesEvaluation, asked: Sequence[Asked], strangers: Collection[str | Path]
) -> list[str]:
    """Put what was measured of each model with its own cache into the report beside it; returns what could not be."""
    conditions = {name: getattr(result, name) for name in Conditions.model_fields}
    warnings: list[str] = []
    for (model, kind), row in zip(asked, result.models, strict=True):
        if kind != "stored":
            continue
        others = [o for (same, _), o in zip(asked, result.models, strict=True) if same == model and o.kv != row.kv]
        foreign = model in strangers
        said = {**conditions, "foreign": foreign, "reference": result.reference, "model": row, "other_caches": others}
        if isinstance(result, Evaluation):
            warnings += written.add_evaluation(Path(row.path), EvaluationRecord(**said))
        else:
            name = "foreign_states" if foreign else "states"
            warnings += written.add(Path(row.path), **{name: StatesRecord(**said)})
    return warnings


def needle(
    conditions: Mapping[str, Any], checkpoints: Sequence[Checkpoint], rows: Sequence[list[dict[str, Any]]]
) -> Needle:
    """The rows of each checkpoint, of which the first is the reference. Raises BrokenOutput for NaN."""
    require_finite(list(rows), "needle")
    reference, *found = [[Recalled(**row) for row in part] for part in rows]
    models = [
        NeedleModel(path=str(c.path), kv=str(c.kv.grid) if c.kv else None, rows=part)
        for c, part in zip(checkpoints[1:], found, strict=True)
    ]
    return Needle(**conditions, reference=reference, models=models)


def record_needle(result: Needle, asked: Sequence[Asked], strangers: Collection[str | Path]) -> list[str]:
    """Put what each model with its own cache read back into the report beside it; returns what could not be."""
    conditions = {name: getattr(result, name) for name in NeedleConditions.model_fields}
    warnings: list[str] = []
    for (model, kind), row in zip(asked, result.models, strict=True):
        if kind == "stored":
            name = "foreign_needle" if model in strangers else "needle"
            warnings += written.add(Path(row.path), **{name: NeedleRecord(**conditions, model=row)})
    return warnings
