"""Options that several commands have, and what is asked with them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer

from halfbyte.devices import AUTO, KINDS, require_name
from halfbyte.engines.engines import ENGINES, NOBODY, engine_named
from halfbyte.formats import CACHE_ALIASES, GGML_CACHES, cache_parts
from halfbyte.recipe import OBSERVERS, Calibration, Entries, Recipe, meaning
from halfbyte.words import (
    CONTAINERS,
    owner_of,
    require_container,
    require_grid,
)


def completing(*values: str) -> Callable[[], Sequence[str]] | None:
    """What a shell offers for an option."""
    return (lambda: values) if values else None


def entry(
    name: str,
    *flags: str,
    names: Iterable[str] = (),
    more: str = "",
    values: Iterable[str] = (),
    of: type[Entries] = Recipe,
    **settings: Any,
) -> Any:
    """An option for an entry of a recipe, whose own documentation is the help; `names` that it may be are listed, and
    completed as `values` are."""
    listed = f"{', '.join(names)}." if names else ""
    text = " ".join(filter(None, (meaning(name, of), listed, more)))
    return typer.Option(*flags, help=text, autocompletion=completing(*names, *values), **settings)


DEFAULT = {name: str(field.default) for name, field in Calibration.model_fields.items()}
Source = Annotated[str | None, entry("source", of=Calibration, show_default="the embedded text")]
Samples = Annotated[int | None, entry("samples", of=Calibration, show_default=DEFAULT["samples"])]
Length = Annotated[int | None, entry("length", of=Calibration, show_default=DEFAULT["length"])]
Seed = Annotated[int | None, entry("seed", of=Calibration, show_default=DEFAULT["seed"])]
Observer = Annotated[
    str | None,
    entry("observer", "--observer", values=OBSERVERS, show_default=str(Recipe.model_fields["observer"].default)),
]
OldObserver = Annotated[str | None, typer.Option("--input-range", hidden=True)]
"""As it was called once."""
Container = Annotated[str | None, entry("to", names=CONTAINERS, show_default="the engine's, else what holds the grid")]
Engine = Annotated[str | None, entry("engine", names=ENGINES)]
Adapter = Annotated[str | None, entry("adapter")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Show no progress.")]
Foreign = Annotated[
    bool, typer.Option("--foreign", help="Compare with another model than the source, or one with other tokens, too.")
]
Device = Annotated[
    str,
    typer.Option(
        help=f"What computes: {AUTO} (a GPU where there is one), {', '.join(KINDS)}, or a GPU by its number (cuda:1).",
        callback=lambda words: require_name(words),
        autocompletion=completing(AUTO, *KINDS),
    ),
]
STORED_CACHES = ("fp8-e4m3", "fp8-e4m3-head")
CACHES = ("stored", "none", *CACHE_ALIASES, *STORED_CACHES[1:], *GGML_CACHES)
"""What models are run with, as far as it has a name."""
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]


def sampling(source: str | None, samples: int | None, length: int | None, seed: int | None) -> dict[str, Any]:
    """What was asked of a calibration; the rest is as `Calibration` has it."""
    given = {"source": source, "samples": samples, "length": length, "seed": seed}
    return {name: value for name, value in given.items() if value is not None}


def require_names(to: str | None, engine: str | None, *grids: str) -> None:
    """Raise BadRequest for names that are in no table; whether they fit each other and the model is looked at later."""
    if to:
        require_container(to)
    own = ENGINES[engine_named(engine)].default if engine and engine != NOBODY else None
    container = to or next(filter(None, map(owner_of, grids)), own)
    for grid in grids:
        if grid != "keep":
            require_grid(grid, container)


def require_caches(*kinds: str) -> None:
    """Raise BadRequest for what no KV cache is called."""
    for kind in kinds:
        if kind not in ("stored", "none"):
            cache_parts(kind)
