"""Options: made of what arguments are and say (`halfbyte.arguments`), with what only a command line needs."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.arguments import LISTED, Measuring, Running, least, sentence
from halfbyte.devices import AUTO, KINDS, require_name
from halfbyte.engines.engines import ENGINES, NOBODY, engine_named
from halfbyte.formats import CACHE_ALIASES, GGML_CACHES, cache_parts
from halfbyte.recipe import Entries, Recipe
from halfbyte.registry import located
from halfbyte.words import owner_of, require_container, require_grid


def completing(*values: str) -> Callable[[], Sequence[str]] | None:
    """What a shell offers for an option."""
    return (lambda: values) if values else None


def option(
    kind: type[Entries], name: str, *flags: str, more: str = "", values: Iterable[str] = (), **settings: Any
) -> Any:
    """An option for a field, whose own documentation is the help; `more` is what the command line alone has to say, and
    `values` are completed."""
    text = " ".join(filter(None, (sentence(name, kind), more))).replace("[", r"\[")
    offered = (*(LISTED.get(name, ()) if kind is Recipe else ()), *values)
    return typer.Option(*flags, **{"help": text, "autocompletion": completing(*offered), **settings})


def count(kind: type[Entries], name: str, **settings: Any) -> Any:
    """The same for a number that has a least value, which is checked."""
    return option(kind, name, min=least(name, kind), **settings)


STORED_CACHES = ("fp8-e4m3", "fp8-e4m3-head")
CACHES = ("stored", "none", *CACHE_ALIASES, *STORED_CACHES[1:], *GGML_CACHES)
"""What models are run with, as far as it has a name."""
Output = Annotated[Path, typer.Option("-o", "--output", help="The folder to write, or a .gguf file.")]
Engine = Annotated[str | None, option(Recipe, "engine")]
Adapter = Annotated[str | None, option(Recipe, "adapter")]
Overwrite = Annotated[bool, option(Running, "overwrite", "--overwrite")]
Device = Annotated[str, option(Running, "device", values=(AUTO, *KINDS), callback=lambda device: require_name(device))]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")]
Against = Annotated[str, option(Measuring, "against")]
Caches = Annotated[
    list[str] | None, option(Measuring, "kv", more="Repeatable.", values=CACHES, show_default="as stored")
]
MergedAdapter = Annotated[str | None, option(Measuring, "adapter")]
Foreign = Annotated[bool, option(Measuring, "foreign", "--foreign")]


def require_located(*sources: str) -> None:
    """Raise BadCheckpoint for what is none by its name alone."""
    for source in sources:
        located(source)


def require_names(to: str | None, engine: str | None, *grids: str) -> None:
    """Raise BadRequest for names that are in no table; whether they fit each other and the model is looked at later."""
    if to:
        require_container(to)
    default = ENGINES[engine_named(engine)].default if engine and engine != NOBODY else None
    container = to or next(filter(None, map(owner_of, grids)), default)
    for grid in grids:
        if grid != "keep":
            require_grid(grid, container)


def require_caches(*kinds: str) -> None:
    """Raise BadRequest for what no KV cache is called."""
    for kind in kinds:
        if kind not in ("stored", "none"):
            cache_parts(kind)
