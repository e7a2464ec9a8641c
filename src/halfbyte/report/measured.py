"""What was measured of models, as a result for the user, and in the report beside each model."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report import written
from halfbyte.report.diagnosis import findings, in_calibration
from halfbyte.report.gate import Limit, of_answers, of_text
from halfbyte.report.inspect import counted, stored
from halfbyte.report.numbers import require_finite
from halfbyte.report.types import (
    Blame,
    Blamed,
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
    Report,
    SpeedConditions,
    SpeedRecord,
    Speeds,
    StateError,
    StatesEvaluation,
    StatesRecord,
    SuiteConditions,
    SuiteEvaluation,
    SuiteModel,
    SuiteRecord,
    SuiteResult,
    TaskConditions,
    TaskEvaluation,
    TaskModel,
    TaskRecord,
    TaskResult,
)

if TYPE_CHECKING:
    from halfbyte.evaluation.blame import Attribution

Asked = tuple[str | Path, str]
"""A model, and the KV cache that it ran with: "stored" is its own."""


def evaluation(
    conditions: Mapping[str, Any],
    checkpoints: Sequence[Checkpoint],
    rows: Sequence[dict[str, Any]],
    predicts: bool,
    noise_floor: dict[str, Any] | None = None,
    limits: Sequence[Limit] = (),
) -> Evaluation | StatesEvaluation:
    """The measures of each checkpoint, of which the first is the reference; `noise_floor`, those of the reference in
    bfloat16. Raises BrokenOutput for NaN."""
    require_finite([*rows, noise_floor], "evaluation")
    reference, *models = [_named(checkpoint) | row for checkpoint, row in zip(checkpoints, rows, strict=True)]
    reference_measures = {name: value for name, value in reference.items() if name not in ("path", "kv")}
    if predicts:
        text = conditions["text"]
        measured = [_diagnosed(Divergence(**row), c, text) for row, c in zip(models, checkpoints[1:], strict=True)]
        update: dict[str, Any] = (
            {"noise_floor": Divergence(**_named(checkpoints[0]), **noise_floor)} if noise_floor else {}
        )
        update |= {"gates": [gate for row in measured for gate in of_text(limits, row)]} if limits else {}
        result = Evaluation(
            **conditions, compared="predictions", reference=Perplexity(**reference_measures), models=measured
        )
        return result.model_copy(update=update)
    states = [StateError(**row) for row in models]
    return StatesEvaluation(
        **conditions, compared="last hidden states", reference=Measured(**reference_measures), models=states
    )


def _diagnosed(row: Divergence, checkpoint: Checkpoint, text: str) -> Divergence:
    report = written.report_or_none(checkpoint.path)
    row = row.model_copy(update={"in_calibration": in_calibration(text, report)})
    return row.model_copy(update={"findings": findings(row, report)})


def _named(checkpoint: Checkpoint) -> dict[str, Any]:
    size = counted(stored(checkpoint))
    return {
        "path": str(checkpoint.path),
        "kv": _cache(checkpoint),
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
        fields = {**conditions, "foreign": foreign, "reference": result.reference, "model": row, "other_caches": others}
        if isinstance(result, Evaluation):
            warnings += written.add_evaluation(Path(row.path), EvaluationRecord(**fields))
        else:
            name = "foreign_states" if foreign else "states"
            warnings += written.add(Path(row.path), **{name: StatesRecord(**fields)})
    return warnings


def needle(
    conditions: Mapping[str, Any], checkpoints: Sequence[Checkpoint], rows: Sequence[list[dict[str, Any]]]
) -> Needle:
    """The rows of each checkpoint, of which the first is the reference. Raises BrokenOutput for NaN."""
    require_finite(list(rows), "needle")
    reference, *recalled = [[Recalled(**row) for row in part] for part in rows]
    models = [
        NeedleModel(path=str(c.path), kv=_cache(c), rows=part)
        for c, part in zip(checkpoints[1:], recalled, strict=True)
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


def suites(
    conditions: Mapping[str, Any],
    checkpoints: Sequence[Checkpoint],
    results: Sequence[list[dict[str, Any]]],
    limits: Sequence[Limit] = (),
) -> SuiteEvaluation:
    """What each model answered beside what the original did."""
    models = [
        SuiteModel(path=str(c.path), kv=_cache(c), suites=[SuiteResult.model_validate(row) for row in rows])
        for c, rows in zip(checkpoints, results, strict=True)
    ]
    gates = [gate for m in models for gate in of_answers(limits, m.suites, m.path, m.kv, "answers of suites")]
    return SuiteEvaluation(**conditions, models=models, gates=gates)


def tasks(
    conditions: Mapping[str, Any],
    checkpoints: Sequence[Checkpoint],
    results: Sequence[list[dict[str, Any]]],
    limits: Sequence[Limit] = (),
) -> TaskEvaluation:
    """What each model scored beside the original, item by item. A task that has several scores is held to the first."""
    models = [
        TaskModel(path=str(c.path), kv=_cache(c), tasks=[TaskResult.model_validate(row) for row in rows])
        for c, rows in zip(checkpoints, results, strict=True)
    ]
    gates = []
    for m in models:
        first = {row.name: row for row in reversed(m.tasks)}
        gates += of_answers(limits, list(first.values()), m.path, m.kv, "answers of tasks")
    return TaskEvaluation(**conditions, models=models, gates=gates)


def record_answers(
    result: SuiteEvaluation | TaskEvaluation, asked: Sequence[Asked], strangers: Collection[str | Path]
) -> list[str]:
    """Put what each model with its own cache answered into the report beside it; returns what could not be."""
    is_suite = isinstance(result, SuiteEvaluation)
    name, of, record = ("suites", SuiteConditions, SuiteRecord) if is_suite else ("tasks", TaskConditions, TaskRecord)
    conditions = {field: getattr(result, field) for field in of.model_fields}
    warnings: list[str] = []
    for (model, kind), row in zip(asked, result.models, strict=True):
        if kind == "stored":
            entry = record.model_validate({**conditions, "model": row})
            warnings += written.add(Path(row.path), **{f"foreign_{name}" if model in strangers else name: entry})
    return warnings


def record_speeds(result: Speeds) -> list[str]:
    """Put how fast each model was into the report beside it; returns what could not be."""
    conditions = {name: getattr(result, name) for name in SpeedConditions.model_fields}
    warnings: list[str] = []
    for path in dict.fromkeys(row.path for row in result.models):
        rows = [row for row in result.models if row.path == path]
        warnings += written.add(Path(path), speed=SpeedRecord(**conditions, models=rows, reference=result.reference))
    return warnings


def _cache(checkpoint: Checkpoint) -> str | None:
    return str(checkpoint.kv.grid) if checkpoint.kv else None


def blame(conditions: Mapping[str, Any], checkpoint: Checkpoint, attribution: "Attribution") -> Blame:
    """What each part costs, beside the errors that the run reported. Raises BrokenOutput for NaN."""
    report = written.report_or_none(checkpoint.path)
    rows = report.weights if isinstance(report, Report) else []
    parts = []
    for part in attribution.parts:
        trial = part.trial
        errors = [row.error for row in rows if row.name in trial.weights or row.name.startswith(f"{trial.name}.")]
        parts.append(Blamed(name=trial.name, kind=trial.kind, kl=part.kl, error=max(errors, default=None)))
    result = Blame(**conditions, compared="predictions", path=str(checkpoint.path), kl=attribution.kl, parts=parts)
    require_finite(result.as_dict(), "blame")
    return result


def folds(checkpoint: Checkpoint) -> list[list[str]]:
    """The modules that share a scale, as the report beside a checkpoint says."""
    report = written.report_or_none(checkpoint.path)
    reported = report.folds if isinstance(report, Report) else []
    return [[name.removesuffix(".weight") for name in (fold.producer, *fold.readers)] for fold in reported]
