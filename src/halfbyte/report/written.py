"""report.json beside a checkpoint. It may be anybody's: it is read as what this version writes, or not at all."""

import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from halfbyte.containers.place import beside, replace_text
from halfbyte.errors import BadCheckpoint, BrokenOutput, brief
from halfbyte.files import read_object
from halfbyte.report.numbers import require_finite
from halfbyte.report.types import SCHEMA, CacheRecord, CacheReport, EvaluationRecord, Measurements, Origin, Report

CONDITIONS = ("reference_path", "reference_xxh3_128", "text", "windows", "length", "convention", "tokens_sha256")
MEASURED = ("evaluation", "evaluations", "states", "needle", "blame", "suites", "tasks", "speed")
MEASURED += tuple(f"foreign_{name}" for name in ("states", "needle", "suites", "tasks"))


def read(checkpoint: Path) -> Report | CacheRecord | None:
    """The report beside a checkpoint; None where there is none. Raises BadCheckpoint for one of another form."""
    path = beside(checkpoint, "report.json")
    value = read_object(path)
    if not value:
        return None
    written = value.get("schema_version", SCHEMA)
    if written != SCHEMA:
        raise BadCheckpoint(f"{path} is of schema version {brief(written)}, and this halfbyte reads {SCHEMA}")
    try:
        kind = Report if "recipe" in value else CacheRecord
        return kind.model_validate({"schema_version": SCHEMA, **require_finite(value)})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise BadCheckpoint(f"{path} is no report of this version's: {where}: {first['msg'].lower()}") from None
    except BrokenOutput as error:
        raise BadCheckpoint(f"{path} is no report: {brief(error)}") from None


def report_of(output: Path) -> Report:
    """That of a run which is done. Raises BadCheckpoint where something else lies there."""
    report = read(output)
    if not isinstance(report, Report):
        raise BadCheckpoint(f"{beside(output, 'report.json')} is not the report of a run")
    return report


def cache_of(output: Path) -> CacheReport:
    """That of a KV cache which was added. Raises BadCheckpoint where something else lies there."""
    report = read(output)
    if report is None or report.kv is None:
        raise BadCheckpoint(f"{beside(output, 'report.json')} is not the report of a KV cache")
    return report.kv


def report_or_none(checkpoint: Path) -> Report | CacheRecord | None:
    """The same, and None for a report of another form: what it says is not known."""
    with suppress(BadCheckpoint):
        return read(checkpoint)
    return None


def _write(report: Measurements, folder: Path, path: Path) -> None:
    """Put a report into `folder`, which is to be `path`, with the card of a model that we quantized."""
    from halfbyte.report.card import card  # which knows targets, and these torch: who reads a report needs none
    from halfbyte.report.picture import add_picture

    replace_text(beside(folder, "report.json"), as_json(report))
    if isinstance(report, Report):
        picture = add_picture(report, folder) if report.evaluation else None
        replace_text(beside(folder, "README.md"), card(report, path, picture))


def as_json(report: Measurements) -> str:
    """Raises BrokenOutput for NaN and infinities."""
    return json.dumps(require_finite(report.as_dict()), indent=2, ensure_ascii=False) + "\n"


def add(path: Path, **measured: Any) -> list[str]:
    """Put measurements into the report and the card of a checkpoint that we wrote; others stay as they are.

    Returns why a report that is there was left as it is, if one was.
    """
    try:
        report = read(path)
    except BadCheckpoint as error:
        return [f"{error}; what was measured is not put into it"]
    if report is not None:
        with suppress(OSError):  # a folder that we may only read: the caller has the measurement
            _write(report.model_copy(update=measured), path, path)
    return []


def add_evaluation(path: Path, measured: EvaluationRecord) -> list[str]:
    """Put a measurement beside those under other conditions. `evaluation`, which the card shows, is the longest against
    the source, and never one against a foreign model."""
    report = report_or_none(path)
    before = report.evaluations if report else []
    evaluations = [*(e for e in before if not _same_conditions(e, measured)), measured]
    not_foreign = [e for e in evaluations if not e.foreign]
    source = report.source if isinstance(report, Report) else None
    of_source = [e for e in not_foreign if source and _is_against(e, source)]
    longest = max(of_source or not_foreign, key=lambda e: e.model.tokens, default=None)
    return add(path, evaluations=evaluations, evaluation=longest)


def _same_conditions(one: EvaluationRecord, other: EvaluationRecord) -> bool:
    alike = all(getattr(one, name) == getattr(other, name) for name in CONDITIONS)
    return alike and one.model.kv == other.model.kv


def _is_against(measured: EvaluationRecord, source: Origin) -> bool:
    digest = measured.reference_xxh3_128
    return measured.reference_path == source.path or (digest is not None and digest == source.xxh3_128)


def add_cache(source: Path, folder: Path, path: Path, cache: CacheReport) -> None:
    """Write the report of a KV cache into `folder`, which is to be `path`: beside what the source's own report says,
    but for what was measured of the model before."""
    report = report_or_none(source)
    fields = report.as_dict() if report else {"schema_version": SCHEMA, "halfbyte": version("halfbyte")}
    fields = {name: value for name, value in fields.items() if name not in MEASURED} | {"kv": cache}
    _write((Report if isinstance(report, Report) else CacheRecord).model_validate(fields), folder, path)
