"""What the site shows that halfbyte's own tables say.

A comment in a page, such as `<!-- grids -->`, becomes what the function of its name makes. Files of the repository that
pages link to are put into the site.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import cache, reduce
from operator import or_
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import typer
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import TypeAdapter
from typer.cli import get_docs_for_click

from halfbyte import grids, words
from halfbyte.cli import app
from halfbyte.formats import ALIASES, SCHEMES
from halfbyte.report import support
from halfbyte.report.types import Support
from halfbyte.sizing.losses import losses as measured_losses
from halfbyte.sizing.preferences import PREFERENCES
from halfbyte.targets.gguf.names import PRESETS, TYPES

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LINK = re.compile(r"(?<=\]\()(?P<path>(?:\.\./)+[^)#\s]+)(?=[)#])")
MARK = re.compile(r"<!-- (\w+) -->")
SQUARE = (4096, 4096)
"""The matrix for which bits are counted."""
TYPES_OF_JSON: dict[str, str | tuple[str, ...]] = {
    "quantize": ("halfbyte.report.types:Report", "halfbyte.report.types:Plan"),
    "convert": "halfbyte.report.types:Report",
    "dequantize": "halfbyte.report.types:Report",
    "kv": "halfbyte.report.types:CacheReport",
    "imatrix": "halfbyte.report.types:ImatrixReport",
    "run": "halfbyte.inference.types:Answer",
    "eval": tuple(
        f"halfbyte.report.types:{kind}"
        for kind in ("Evaluation", "StatesEvaluation", "SuiteEvaluation", "TaskEvaluation")
    ),
    "needle": "halfbyte.report.types:Needle",
    "blame": "halfbyte.report.types:Blame",
    "bench": "halfbyte.report.types:Speeds",
    "compare": "halfbyte.report.types:Comparison",
    "inspect": "halfbyte.report.types:Inspection",
    "report": "halfbyte.report.types:Page",
    "push": "halfbyte.report.types:Upload",
    "demo": "halfbyte.report.types:DemoRow",
    "plan": "halfbyte.sizing.types:Advice",
    "devices": "halfbyte.sizing.devices:Device",
    "support": "halfbyte.report.types:Support",
}
"""What each command prints with --json; the page reference/json.md says where it is a list of it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the schemas, and what pages link to outside of docs."""
    for command in TYPES_OF_JSON:
        text = json.dumps(schema(command), indent=2)
        files.append(File.generated(config, f"reference/schemas/{command}.json", content=text))
    pages = [file for file in files if file.src_uri.endswith(".md")]
    for path in sorted({path for file in pages for path in outside(file)}):
        files.append(File.generated(config, f"repository/{path.as_posix()}", content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts tables in place of marks, and leads links of the repository into the site."""
    here = Path(page.file.src_uri).parent

    def lead(found: re.Match[str]) -> str:
        path = _from_root(here, found["path"])
        return found[0] if path is None else os.path.relpath(f"repository/{path.as_posix()}", here)

    return LINK.sub(lead, MARK.sub(lambda found: _made(found, page), markdown))


def outside(file: File) -> set[Path]:
    """The files of the repository that a page links to and that are no pages, by their paths in it."""
    here = Path(file.src_uri).parent
    found = (_from_root(here, match["path"]) for match in LINK.finditer(file.content_string))
    return {path for path in found if path is not None}


def _from_root(here: Path, link: str) -> Path | None:
    path = Path(os.path.normpath(Path("docs") / here / link))
    return None if path.parts[0] in ("docs", "..") else path


def type_of(command: str) -> Any:
    """What a command prints with --json."""
    homes = TYPES_OF_JSON[command]
    kinds = [resolve_name(home) for home in ((homes,) if isinstance(homes, str) else homes)]
    whole: Any = reduce(or_, kinds)
    return {"demo": list[whole], "devices": dict[str, list[whole]]}.get(command, whole)


def schema(command: str) -> dict[str, Any]:
    """The same as JSON Schema."""
    return TypeAdapter(type_of(command)).json_schema(mode="serialization")


def _made(found: re.Match[str], page: Page) -> str:
    make = MARKS.get(found[1])
    return make(page) if make else found[0]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def names_of(patterns: Sequence[str]) -> list[str]:
    """The grids that a page of a family is about."""
    return [name for name in words.GRIDS if any(fnmatch(name, pattern) for pattern in patterns)]


@cache
def supported() -> Support:
    """What fits where."""
    return support.support_matrix()


def grids_of(page: Page) -> str:
    """The grids of a family: their bits, and what holds them."""
    held = supported().containers
    called = {name: f" (`{other}`)" for other, name in ALIASES.items()}
    rows = [
        (
            f"`{name}`{called.get(name, '')}",
            f"{grids.parse(name).bits(SQUARE):.4g}",
            ", ".join(f"[{c}](../containers/{c}.md)" for c, schemes in held.items() if name in schemes) or "none",
        )
        for name in names_of(page.meta["grids"])
    ]
    return table(["grid", "bits per weight", "containers that hold it"], rows)


def schemes(_: Page) -> str:
    """Schemes by the names that they have."""
    held = supported().containers
    rows = [
        (
            f"`{name}`",
            ", some ".join(f"`{s}`" for s in dict.fromkeys((preset.scheme, *preset.others.values())) if s != "keep"),
            f"`{preset.method}`",
            ", ".join(f"[{c}](../containers/{c}.md)" for c, names in held.items() if preset.scheme in names),
        )
        for name, preset in SCHEMES.items()
    ]
    return table(["name", "stands for", "method by default", "containers"], rows)


def presets(_: Page) -> str:
    """Presets of a GGUF."""
    rows = [
        (
            f"`{name}`",
            preset.type,
            f"{grids.parse(TYPES[preset.type]).bits(SQUARE):.4g}" if preset.type in TYPES else "",
        )
        for name, preset in PRESETS.items()
    ]
    return table(["preset", "type of most tensors", "bits per weight of that type"], rows)


def holds(page: Page) -> str:
    """What a container holds, and which engines load it."""
    name = page.meta["container"]
    found = supported()
    if name not in found.containers:
        return ""
    rows = [
        (row.engine, support.condensed(row.tested_here) or "-", support.condensed(row.documented_there) or "-")
        for row in found.engines
        if row.container == name
    ]
    text = f"Holds {support.condensed(found.containers[name])}.\n\n"
    text += table(["engine", "tested here", "documented there"], rows) + "\n\n"
    return text + "Of a Llama-shaped model; every run checks its own shapes and tells why where an engine refuses it."


def preferences(_: Page) -> str:
    """Which scheme is taken where."""
    kinds = {"served": "vLLM, SGLang", "ggml": "llama.cpp, Ollama, LM Studio, Jan", "eager": "Transformers, MLX"}
    rows = [
        (kinds[p.kind], p.arithmetic.upper() if p.arithmetic else "any", f"`{name}`", p.reasons[name])
        for p in PREFERENCES
        for name in p.schemes
    ]
    return table(["engine", "the device multiplies in", "scheme", "because"], rows)


def losses(_: Page) -> str:
    """Every measured loss that `plan` knows."""
    rows = [(f"`{row.scheme}`", row.model, f"{row.kl:.5f}", row.method, row.source) for row in measured_losses()]
    return table(["scheme", "model", "KL, nats", "method", "source"], rows)


def index(page: Page) -> str:
    """The other pages of a folder, with what each says of itself."""
    folder = DOCS / Path(page.file.src_uri).parent
    rows = []
    for path in sorted(folder.glob("*.md")):
        if path.name != "index.md":
            _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
            title = re.search(r"^# (.+)$", body, re.MULTILINE)
            rows.append((f"[{title[1] if title else path.stem}]({path.name})", yaml.safe_load(front)["what"]))
    return table(["", ""], rows)


def commands(_: Page) -> str:
    """The command line, as its help has it."""
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="halfbyte")
    text = get_docs_for_click(obj=group, ctx=context, name="halfbyte", title="halfbyte")
    text = text.removeprefix("# halfbyte\n").replace("```console\n$ halfbyte", "```text\nhalfbyte")
    return re.sub(r"^(halfbyte .+)$(?!\n```)", r"`\1`", text, flags=re.MULTILINE)


def schema_table(_: Page) -> str:
    """The type and the schema of what each command prints."""
    rows = []
    for command, homes in TYPES_OF_JSON.items():
        kinds = " or ".join(
            f"[`{home.partition(':')[2]}`][{home.replace(':', '.')}]"
            for home in ((homes,) if isinstance(homes, str) else homes)
        )
        many = {"demo": "a list of ", "devices": "`devices` and `here`, lists of "}.get(command, "")
        rows.append((f"`{command}`", many + kinds, f"[schema](schemas/{command}.json)"))
    return table(["command", "prints", "as JSON Schema"], rows)


MARKS: dict[str, Callable[[Page], str]] = {
    "grids": grids_of,
    "schemes": schemes,
    "presets": presets,
    "holds": holds,
    "index": index,
    "commands": commands,
    "json": schema_table,
    "preferences": preferences,
    "losses": losses,
}
