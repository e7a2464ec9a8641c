"""The model card: README.md of an output."""

import json
import os
import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from halfbyte.containers.place import beside, is_file
from halfbyte.engines.engines import ENGINES
from halfbyte.errors import plural
from halfbyte.models.texts import called
from halfbyte.recipe import OTHER_COMMANDS, Recipe
from halfbyte.report.summary import passed, size, worst, worst_activations
from halfbyte.report.types import EngineReport, Report
from halfbyte.targets.table import TARGETS, UNQUANTIZED
from halfbyte.targets.target import Target


def card(report: Report, path: Path, picture: str | None = None) -> str:
    """The model card of what lies in `path`, with a picture that lies beside it. It is to be published, so of this
    machine's files it has the names only."""
    report = Report.model_validate(without_paths(report.as_dict(), local_paths(report, path)))
    recipe = {
        name: value
        for name, value in report.recipe.model_dump(mode="json", exclude_none=True).items()
        if value not in ([], {}, False) and (name != "calibration" or report.calibration)
    }
    if report.budget:
        recipe["override"] = f"{len(report.recipe.override)} patterns, each with its grid"
    if texts := not isinstance(report.recipe.calibration.source, str) and "calibration" in recipe:
        recipe["calibration"]["source"] = called(report.recipe.calibration.source)  # they may be as long as a book
    served = _served(report, path)
    original = original_of(report.recipe)
    adapter = report.recipe.adapter
    return _template().render(
        r=report,
        name=path.resolve().name,
        is_file=is_file(path),
        library=getattr({**UNQUANTIZED, **TARGETS}.get(report.output.container), "library", Target.library),
        path=_place(report, path),
        repository=report.recipe.repository if report.output.file else None,
        against=shlex.quote(original) + (f" --adapter {shlex.quote(adapter)}" if adapter else ""),
        recipe=recipe,
        texts=texts,
        recipe_file=beside(path, "recipe.yaml").name,
        engines=[(e, _title(e), code(e, served, original)) for e in report.engines],
        worst=worst(report),
        worst_activations=worst_activations(report),
        evaluation=report.evaluation,
        picture=picture and quote(picture),
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
    environment.globals |= {"begins": _begins, "plural": plural, "passed": passed}
    environment.filters |= {
        "size": size,
        "quote": shlex.quote,
        "zip": zip,
        "yaml": lambda value: yaml.safe_dump(value, sort_keys=False, allow_unicode=True),
    }
    return environment.get_template("card.md.jinja")


def _title(engine: EngineReport) -> str:
    return ENGINES[engine.engine].title if engine.engine in ENGINES else engine.engine


def _place(report: Report, path: Path) -> str:
    """What commands call it: by its repository's id, which stands for no single file."""
    return report.recipe.repository if report.recipe.repository and not is_file(path) else path.resolve().name


def _served(report: Report, path: Path) -> Path:
    """What engines open, as somebody who has downloaded it calls it."""
    called, file = Path(_place(report, path)), report.output.file
    return called / file if file and not is_file(path) else called


def local_paths(report: Report, path: Path) -> dict[str, str]:
    """Every file of this machine that a report speaks of, and its name alone."""
    recipe = report.recipe
    mentioned = [path, path.resolve(), report.source.path, recipe.adapter, recipe.imatrix, recipe.calibration.source]
    of_others = (report.states, report.foreign_states, report.needle, report.foreign_needle, report.blame)
    measured = [one for one in (report.evaluation, *report.evaluations, *of_others) if one]
    mentioned += [one.text for one in measured]
    answered = [one for one in (report.suites, report.foreign_suites) if one]
    scored = [one for one in (report.tasks, report.foreign_tasks) if one]
    mentioned += [of for one in (*measured, *answered, *scored) for of in (one.reference_path, one.reference_adapter)]
    mentioned += [suite.name for one in answered for suite in one.files]
    if speed := report.speed:
        mentioned += [speed.reference_path, *(row.path for row in (*speed.models, *speed.reference))]
    mentioned += [origin.path for origin in report.source.made_of or ()]
    mentioned += [report.kv.calibration.source] if report.kv else []
    mentioned += [] if report.source.hub else [recipe.model]
    paths = {
        str(one): os.path.basename(os.path.abspath(os.path.expanduser(one)))  # which asks no disk
        for one in mentioned
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


def original_of(recipe: Recipe) -> str:
    """The model in 16 bits; a word for it where only its quantized offspring is known."""
    return "ORIGINAL" if recipe.method in OTHER_COMMANDS else recipe.model


def command(engine: EngineReport, path: Path, original: str) -> str:
    """What serves the folder or file: a line for the shell, or of Python, whose strings stand in quotes."""
    return _filled(engine.command or "", path, original)


def code(engine: EngineReport, path: Path, original: str) -> str:
    """The same with what Python needs around it."""
    line = engine.command or ""
    if "AutoModel" not in line:
        return _filled(line, path, original)
    needed = sorted({"AutoTokenizer", *re.findall(r"\bAutoModel\w*|\bCompressedTensorsConfig\b", line)})
    file = re.search(r'\w+="\{file\}"', line)
    names = f'"{{folder}}", {file[0]}' if file else '"{path}"'
    imported = f"from transformers import {', '.join(needed)}"
    whole = f"{imported}\n\nmodel = {line}\ntokenizer = AutoTokenizer.from_pretrained({names})"
    return _filled(whole, path, original)


def _filled(text: str, path: Path, original: str) -> str:
    values = {
        "path": path,
        "folder": path.parent,
        "file": path.name,
        "modelfile": beside(path, "Modelfile"),
        "name": path.stem.lower(),
        "original": original,
    }
    for name, value in values.items():
        text = text.replace(f'"{{{name}}}"', json.dumps(str(value))).replace(f"{{{name}}}", shlex.quote(str(value)))
    return text


def _begins(opening: list[str]) -> str:
    """What windows began with, as the end of a sentence."""
    return f", each begins with `{''.join(opening)}`" if opening else ""
