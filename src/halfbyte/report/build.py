"""The report of a run."""

import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch

from halfbyte.devices import KINDS
from halfbyte.engines.verdicts import Verdict
from halfbyte.errors import plural
from halfbyte.models.calibrate import Samples
from halfbyte.models.provenance import provenance_of
from halfbyte.report.lineage import source_of
from halfbyte.report.types import (
    SCHEMA,
    CacheReport,
    CalibrationReport,
    Devices,
    EngineReport,
    Environment,
    FoldReport,
    Output,
    PlannedWeight,
    Provenance,
    Report,
    Resources,
    RotationReport,
    Source,
    WeightReport,
)
from halfbyte.report.types import Plan as PlanReport
from halfbyte.targets.plan import Plan

LOST, LOST_ROW = 0.5, 0.75
"""Relative errors beyond which a weight, or a row of one, says little of what it did; of two bits, usual ones lose .4,
and a few rows .6."""


def planned(
    plan: Plan, size_bytes: int, file: str | None, files: list[str], resources: Resources | None = None
) -> PlanReport:
    """All that is known of a run before it; `size_bytes` of all tensors of the output, which lie in `files`."""
    notes = {c.weight: c.note for c in plan.weights}
    return PlanReport(
        **_common(plan),
        output=_output(plan, size_bytes).model_copy(update={"file": file, "files": files}),
        planned=resources,
        warnings=[*plan.warnings, *plan.checkpoint.left_out],
        weights=[
            PlannedWeight(
                name=w.name, grid=str(s), shape=w.shape, bits_per_weight=s.weight.bits(w.shape), note=notes[w]
            )
            for w, s in plan.schemes.items()
        ],
    )


def report(
    plan: Plan,
    rows: Mapping[str, WeightReport],
    folds: list[dict[str, Any]],
    samples: Samples | None,
    cache: CacheReport | None,
    size_bytes: int,
    file: str | None,
    seconds: float,
    devices: Devices,
    resources: tuple[Resources, Resources],
) -> Report:
    """All that is known of a run after it; `file` is what engines open of the output, None for the folder, and
    `resources` what the run was to take and took."""
    notes = Counter(row.note for row in rows.values() if row.note)
    warnings = [
        *plan.warnings,
        *plan.checkpoint.left_out,
        *(samples.warnings if samples else ()),
        *_lost(rows.values()),
    ]
    warnings += [f"{plural(count, 'weight')}: {note}" for note, count in notes.items()]
    made = Report(
        **_common(plan),
        output=_output(plan, size_bytes).model_copy(update={"file": file}),
        warnings=warnings,
        calibration=calibration(samples) if samples else None,
        error_of="outputs on the calibration tokens" if samples else "weights",
        weights=[rows[w.name] for w in plan.schemes],
        folds=[FoldReport(**fold) for fold in folds],
        environment=Environment(
            python=platform.python_version(),
            torch=version("torch"),
            transformers=version("transformers"),
            numpy=version("numpy"),
            numba=version("numba"),
            threads=torch.get_num_threads(),
            instructions=torch.backends.cpu.get_cpu_capability(),
        ),
        device=devices,
        peak_memory_bytes=KINDS["cpu"].peak_bytes(torch.device("cpu")),
        planned=resources[0],
        measured=resources[1],
        seconds=round(seconds, 2),
    )
    rotation = plan.checkpoint.rotation
    known = {"kv": cache, "rotation": rotation and RotationReport(**rotation.describe())}
    return made.model_copy(update={name: value for name, value in known.items() if value})


def _common(plan: Plan) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA,
        "halfbyte": version("halfbyte"),
        "recipe": plan.recipe,
        "source": _source(plan),
        "engines": [_engine_report(v) for v in plan.verdicts],
        "kept": dict(plan.unquantized),
        "dropped": dict(plan.dropped),
    }


def _source(plan: Plan) -> Source:
    source = plan.checkpoint.original
    provenance = asdict(provenance_of(source, plan.recipe.model))
    return Source(
        **source_of(source).as_dict(),
        hub=None if Path(plan.recipe.model).expanduser().exists() else plan.recipe.model,
        provenance=Provenance.model_validate_json(json.dumps(provenance)),  # in which its tuples are lists
        has_chat_template=source.has_chat_template,
        is_decoder=source.is_decoder,
        model_type=source.model_type,
        dtype=str(source.dtype).removeprefix("torch."),
        size_bytes=sum(e.size_bytes for e in source.entries.values()),
        parameters=parameters_of(plan),
    )


def parameters_of(plan: Plan) -> int:
    """Numbers of the model, as far as the output has them; of a head that was the embedding, once."""
    again = plan.checkpoint.untied
    quantized = sum(prod(w.shape) for w in plan.schemes if w.tensor not in again)
    return quantized + sum(prod(plan.checkpoint.spec(t).shape) for t in plan.unquantized if t not in again)


def _output(plan: Plan, size_bytes: int) -> Output:
    counted = sum(prod(w.shape) for w in plan.schemes)
    sizes = Counter((s, w.shape) for w, s in plan.schemes.items())
    stored = sum(n * spec.size_bytes for alike, n in sizes.items() for spec in plan.target.specs(*alike).values())
    return Output(
        container=plan.target.name,
        grid=plan.label,
        size_bytes=size_bytes,
        bits_per_weight=8 * stored / counted if counted else None,
        bits_per_parameter=8 * size_bytes / parameters_of(plan),
        quantized=len(plan.schemes),
        kept=len(plan.unquantized),
    )


def calibration(samples: Samples) -> CalibrationReport:
    """Which text ran through the model."""
    return CalibrationReport(**samples.about)


def _engine_report(verdict: Verdict) -> EngineReport:
    """Whether an engine loads the output."""
    return EngineReport(
        engine=verdict.engine,
        loads=verdict.loads,
        word=verdict.word.value,
        source=verdict.source,
        reasons=list(verdict.reasons),
        notes=list(verdict.notes),
        tensor_parallel=list(verdict.tensor_parallel),
        command=verdict.command,
    )


def _lost(rows: Iterable[WeightReport]) -> list[str]:
    """One line of the weights that are hardly those of the source any more, if there are any."""
    lost = [row for row in rows if not (row.error <= LOST and row.worst_row <= LOST_ROW)]  # NaN is not
    if not lost:
        return []
    worst = max(lost, key=lambda row: max(row.error, row.worst_row))
    count = plural(len(lost), "weight is", "weights are")
    return [
        f"NEARLY LOST: {count} hardly what the source has, the worst {worst.name} on {worst.grid} (relative error "
        f"{worst.error:.2f}, of its worst row {worst.worst_row:.2f}); give it a finer grid with --override, or --skip "
        "it"
    ]
