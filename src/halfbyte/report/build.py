"""The report of a run, and the model card that is made of it."""

import json
import platform
import resource
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from halfbyte.models.calibrate import Windows
from halfbyte.plan.engines import Verdict
from halfbyte.recipe import Job

WORST = 5


def report(job: Job, rows: Mapping[str, Any], folds: list[dict], windows: Windows | None, seconds: float) -> dict[str, Any]:
    """All that is known of a run, ready for JSON."""
    source = job.checkpoint
    grids = job.grids
    counted = sum(w.shape[0] * w.shape[1] for w in grids)
    stored = sum(spec.size_bytes for w, g in grids.items() for spec in job.container.plan(g, w.shape).values())
    kept = sum(source.entries[t].size_bytes for t in job.kept)
    parameters = counted + sum(source.entries[t].size_bytes // source.entries[t].dtype.itemsize for t in job.kept)
    warnings = [windows.warning] if windows and windows.warning else []
    fallbacks = Counter(row.note for row in rows.values() if row.note)
    warnings += [f"{count} weight{'s' if count > 1 else ''}: {note}" for note, count in fallbacks.items()]
    return {
        "halfbyte": version("halfbyte"),
        "recipe": job.recipe.model_dump(mode="json", exclude_none=True),
        "source": {"path": str(source.path), "model_type": source.model_type, "dtype": str(source.dtype).removeprefix("torch."), "size_bytes": sum(e.size_bytes for e in source.entries.values()), "parameters": parameters},
        "output": {"container": job.container.name, "size_bytes": stored + kept, "bits_per_weight": 8 * stored / counted, "bits_per_parameter": 8 * (stored + kept) / parameters, "quantized": len(grids), "kept": len(job.kept)},
        "calibration": windows and {"source": windows.source, "windows": list(windows.tokens.shape), "tokens_sha256": windows.digest},
        "warnings": warnings,
        "engines": [_engine(v) for v in job.verdicts],
        "error_of": "outputs on the calibration tokens" if windows else "weights",
        "weights": [vars(rows[w.name]) for w in grids],
        "folds": folds,
        "kept": job.kept,
        "environment": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "numpy", "numba")}},
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds": round(seconds, 2),
    }  # fmt: skip


def _engine(verdict: Verdict) -> dict[str, Any]:
    return {"engine": verdict.engine, "loads": verdict.loads, "reasons": list(verdict.reasons), "notes": list(verdict.notes), "tensor_parallel": list(verdict.tensor_parallel), "command": verdict.command}


def worst(report: Mapping[str, Any], count: int = WORST) -> list[dict[str, Any]]:
    """The weights that lost most."""
    return sorted(report["weights"], key=lambda row: -row["error"])[:count]


def card(report: Mapping[str, Any], path: Path) -> str:
    """The model card: README.md of the output."""
    environment = Environment(loader=PackageLoader("halfbyte.report"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return environment.get_template("card.md.jinja").render(r=report, name=path.name, path=str(path), worst=worst(report), evaluation=report.get("evaluation"))


def as_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def add_evaluation(path: Path, evaluation: dict[str, Any]) -> None:
    """Put a measurement into the report and the card of a folder that we wrote; other folders stay as they are."""
    try:
        written = json.loads((path / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if "halfbyte" in written:
        written["evaluation"] = evaluation
        (path / "report.json").write_text(as_json(written), encoding="utf-8")
        (path / "README.md").write_text(card(written, path), encoding="utf-8")
