"""The report of a run, and the model card that is made of it."""

import json
import os
import platform
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template, TemplateError

from halfbyte.containers.place import beside, is_file, replace_text
from halfbyte.engines.engines import ENGINES
from halfbyte.engines.verdicts import Verdict
from halfbyte.models.calibrate import Windows
from halfbyte.models.provenance import has_chat_template, provenance_of
from halfbyte.plan import Job
from halfbyte.recipe import OTHER_COMMANDS
from halfbyte.report.lineage import source_of
from halfbyte.report.numbers import require_finite
from halfbyte.report.summary import Report, size
from halfbyte.report.written import read

WORST = 5
UNREADABLE = (TemplateError, KeyError, TypeError, AttributeError, ValueError)
"""What making a card of some other text than a report of ours raises."""
LOST, LOST_ROW = 0.5, 0.75
"""Relative errors beyond which a weight, or a row of one, says little of what it did; of two bits, usual ones lose .4, and a few rows .6."""


def planned(job: Job, size_bytes: int) -> dict[str, Any]:
    """All that is known of a run before it, ready for JSON; `size_bytes` of all tensors of the output."""
    source = job.checkpoint
    schemes = job.schemes
    counted = sum(w.shape[0] * w.shape[1] for w in schemes)
    stored = sum(spec.size_bytes for w, s in schemes.items() for spec in job.container.plan(s, w.shape).values())
    parameters = counted + sum(prod(source.spec(t).shape) for t in job.kept)
    notes = {c.weight: c.note for c in job.choices}
    return {
        "halfbyte": version("halfbyte"),
        "recipe": job.recipe.model_dump(mode="json", exclude_none=True),
        "source": {
            **source_of(source),
            "hub": None if Path(job.recipe.model).expanduser().exists() else job.recipe.model,
            "provenance": {
                name: list(v) if isinstance(v, tuple) else v
                for name, v in asdict(provenance_of(source, job.recipe.model)).items()
            },
            "has_chat_template": has_chat_template(source),
            "model_type": source.model_type,
            "dtype": str(source.dtype).removeprefix("torch."),
            "size_bytes": sum(e.size_bytes for e in source.entries.values()),
            "parameters": parameters,
        },
        "output": {
            "container": job.container.name,
            "grid": job.label,
            "size_bytes": size_bytes,
            "bits_per_weight": 8 * stored / counted if counted else None,
            "bits_per_parameter": 8 * size_bytes / parameters,
            "quantized": len(schemes),
            "kept": len(job.kept),
        },
        "warnings": [*job.warnings, *source.left_out],
        "engines": [_engine(v) for v in job.verdicts],
        "weights": [
            {
                "name": w.name,
                "grid": str(s),
                "shape": list(w.shape),
                "bits_per_weight": s.weight.bits(w.shape),
                "note": notes[w],
            }
            for w, s in schemes.items()
        ],
        "kept": job.kept,
        "dropped": job.dropped,
    }


def report(
    job: Job, rows: Mapping[str, Any], folds: list[dict], windows: Windows | None, size_bytes: int, seconds: float
) -> Report:
    """All that is known of a run after it, ready for JSON."""
    fallbacks = Counter(row.note for row in rows.values() if row.note)
    warnings = [*job.warnings, *job.checkpoint.left_out, *(windows.warnings if windows else ()), *lost(rows.values())]
    warnings += [f"{count} weight{'s' if count > 1 else ''}: {note}" for note, count in fallbacks.items()]
    return Report(
        planned(job, size_bytes)
        | {
            "warnings": warnings,
            "calibration": windows and windows.about,
            "error_of": "outputs on the calibration tokens" if windows else "weights",
            "weights": [vars(rows[w.name]) for w in job.schemes],
            "folds": folds,
            "environment": {
                "python": platform.python_version(),
                **{p: version(p) for p in ("torch", "transformers", "numpy", "numba")},
                "threads": torch.get_num_threads(),
                "instructions": torch.backends.cpu.get_cpu_capability(),
            },
            "peak_memory_bytes": peak_memory_bytes(),
            "seconds": round(seconds, 2),
        }
    )


def lost(rows: Iterable[Any]) -> list[str]:
    """One line of the weights that are hardly those of the source any more, if there are any."""
    found = [row for row in rows if not (row.error <= LOST and row.worst_row <= LOST_ROW)]  # NaN is not
    if not found:
        return []
    worst = max(found, key=lambda row: max(row.error, row.worst_row))
    count = f"{len(found)} weights are" if len(found) > 1 else "1 weight is"
    return [
        f"NEARLY LOST: {count} hardly what the source has, the worst {worst.name} on {worst.grid} (relative error {worst.error:.2f}, "
        f"of its worst row {worst.worst_row:.2f}); give it a finer grid with --override, or --skip it"
    ]


def peak_memory_bytes() -> int | None:
    """The most memory that this process has had; None where the system does not say (macOS)."""
    if sys.platform != "linux":
        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def _engine(verdict: Verdict) -> dict[str, Any]:
    return {
        "engine": verdict.engine,
        "loads": verdict.loads,
        "word": verdict.word.value,
        "source": verdict.source,
        "reasons": list(verdict.reasons),
        "notes": list(verdict.notes),
        "tensor_parallel": list(verdict.tensor_parallel),
        "command": verdict.command,
    }


def worst(report: Mapping[str, Any], count: int = WORST) -> list[dict[str, Any]]:
    """The weights that lost most."""
    return sorted(report["weights"], key=lambda row: -row["error"])[:count]


def worst_inputs(report: Mapping[str, Any], count: int = WORST) -> list[dict[str, Any]]:
    """The rounded inputs with the largest errors, with the first of the weights that read them."""
    found = {repr(row["input"]): row for row in reversed(report["weights"]) if row.get("input")}
    return sorted(found.values(), key=lambda row: -row["input"]["error"])[:count]


def card(report: Mapping[str, Any], path: Path) -> str:
    """The model card: README.md of the output. It is to be published, so of this machine's files it says the names only."""
    report = without_paths(report, local_paths(report, path))
    recipe = {
        name: value
        for name, value in report["recipe"].items()
        if value not in ([], {}, False) and (name != "calibration" or report["calibration"])
    }
    place = Path(report["recipe"].get("repository") or path.resolve().name)
    file = report["output"]["file"]
    served = place / file if file and not is_file(path) else place if not file else Path(file)
    original = original_of(report)
    against = shlex.quote(original) + (f" --adapter {shlex.quote(recipe['adapter'])}" if recipe.get("adapter") else "")
    engines = [{**e, "title": ENGINES[e["engine"]].title, "code": code(e, served, original)} for e in report["engines"]]
    return _template().render(
        r=report,
        provenance=report["source"].get("provenance", {}),
        name=path.resolve().name,
        is_file=is_file(path),
        path=str(place),
        against=against,
        recipe=recipe,
        recipe_file=beside(path, "recipe.yaml").name,
        engines=engines,
        worst=worst(report),
        worst_inputs=worst_inputs(report),
        evaluation=report.get("evaluation"),
    )


@cache
def _template() -> Template:
    """Of the card. Compiling it takes longer than all that is filled in, so it is compiled once."""
    environment = Environment(
        loader=PackageLoader("halfbyte.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["begins"] = begins
    environment.filters |= {
        "size": size,
        "quote": shlex.quote,
        "zip": zip,
        "yaml": lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True),
    }
    return environment.get_template("card.md.jinja")


def local_paths(report: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Every file of this machine that a report speaks of, and its name alone."""
    recipe, measured, needle = report["recipe"], report.get("evaluation") or {}, report.get("needle") or {}
    said = [
        path,
        path.resolve(),
        report["source"]["path"],
        recipe.get("adapter"),
        recipe.get("imatrix"),
        (recipe.get("calibration") or {}).get("source"),
    ]
    said += [measured.get("reference_path"), measured.get("text"), needle.get("reference_path"), needle.get("text")]
    said += [] if report["source"]["hub"] else [recipe["model"]]
    paths = {
        str(one): Path(one).expanduser().resolve().name
        for one in said
        if isinstance(one, str | Path) and os.sep in str(one)
    }
    return dict(sorted(paths.items(), key=lambda item: -len(item[0])))


def without_paths(value: Any, names: Mapping[str, str]) -> Any:
    """The same with every path in a text replaced by a name."""
    if isinstance(value, Mapping):
        return {key: without_paths(one, names) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one, names) for one in value]
    if isinstance(value, str):
        for path, name in names.items():
            value = value.replace(path, name)
    return value


def original_of(report: Mapping[str, Any]) -> str:
    """The model in 16 bits; a word for it where only its quantized offspring is known."""
    return "ORIGINAL" if report["recipe"]["method"] in OTHER_COMMANDS else report["recipe"]["model"]


def command(engine: Mapping[str, Any], path: Path, original: str) -> str:
    """What serves the folder or file: a line for the shell, or of Python, whose strings stand in quotes."""
    return _filled(engine["command"] or "", path, original)


def code(engine: Mapping[str, Any], path: Path, original: str) -> str:
    """The same with what Python needs around it."""
    line = engine["command"] or ""
    if "AutoModel" not in line:
        return _filled(line, path, original)
    needed = sorted({"AutoTokenizer", *re.findall(r"\bAutoModel\w*|\bCompressedTensorsConfig\b", line)})
    place = '"{folder}", gguf_file="{file}"' if "gguf_file" in line else '"{path}"'
    return _filled(
        f"from transformers import {', '.join(needed)}\n\nmodel = {line}\ntokenizer = AutoTokenizer.from_pretrained({place})",
        path,
        original,
    )


def _filled(text: str, path: Path, original: str) -> str:
    said = {
        "path": path,
        "folder": path.parent,
        "file": path.name,
        "modelfile": beside(path, "Modelfile"),
        "name": path.stem.lower(),
        "original": original,
    }
    for name, value in said.items():
        text = text.replace(f'"{{{name}}}"', json.dumps(str(value))).replace(f"{{{name}}}", shlex.quote(str(value)))
    return text


def begins(opening: list[str] | None) -> str:
    """What windows began with, as the end of a sentence."""
    return f", each begins with `{''.join(opening)}`" if opening else ""


def as_json(value: Any) -> str:
    """Raises BrokenOutput for NaN and infinities."""
    return json.dumps(require_finite(value), indent=2, ensure_ascii=False) + "\n"


def add(path: Path, **measured: Any) -> None:
    """Put measurements into the report and the card of a folder that we wrote; other folders stay as they are."""
    written = of_ours(path)
    if written is not None:
        with suppress(OSError):  # a folder that we may only read: the caller has the measurement
            _write(written | measured, path, path)


CONDITIONS = ("reference_path", "reference_xxh3_128", "text", "windows", "length", "convention", "tokens_sha256")


def add_evaluation(path: Path, measured: dict[str, Any]) -> None:
    """Put a measurement beside those under other conditions. `evaluation`, which the card shows, is the longest against the source,
    and never one against a foreign model."""
    written = of_ours(path) or {}
    before = written.get("evaluations") or [written.get("evaluation")]  # reports had one, once
    known = [e for e in before if isinstance(e, dict) and isinstance(e.get("model"), dict)]
    kept = [
        e
        for e in known
        if any(e.get(name) != measured[name] for name in CONDITIONS) or e["model"].get("kv") != measured["model"]["kv"]
    ]
    evaluations = [*kept, measured]
    source = written.get("source") or {}
    own = [e for e in evaluations if not e.get("foreign")]
    of_source = [
        e
        for e in own
        if e.get("reference_xxh3_128", "") == source.get("xxh3_128") or e.get("reference_path") == source.get("path")
    ]
    add(
        path,
        evaluations=evaluations,
        evaluation=max(of_source or own, key=lambda e: e["model"].get("tokens", 0), default=None),
    )


def add_kv(source: Path, folder: Path, path: Path, about: dict[str, Any]) -> None:
    """Write the report of a cache into `folder`, which is to be `path`; where we wrote the source, beside what its report says."""
    written = of_ours(source) or {"halfbyte": version("halfbyte")}
    measured = (
        "evaluation",
        "evaluations",
        "states",
        "needle",
        "foreign_states",
        "foreign_needle",
    )  # of the model before
    _write({name: value for name, value in written.items() if name not in measured} | {"kv": about}, folder, path)


def of_ours(path: Path) -> dict[str, Any] | None:
    """The report beside a checkpoint that this version wrote: that of another has other entries."""
    found = read(path)
    if found.get("halfbyte") != version("halfbyte"):
        return None
    try:
        return found if "recipe" not in found or card(found, path) else None
    except UNREADABLE:
        return None  # somebody has changed it beyond what a card can be made of


def _write(report: dict[str, Any], folder: Path, path: Path) -> None:
    """The report, and the card of a model that we quantized."""
    replace_text(beside(folder, "report.json"), as_json(report))
    if "recipe" in report:
        replace_text(beside(folder, "README.md"), card(report, path))
