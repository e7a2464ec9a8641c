"""Commands that write a checkpoint."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte import display
from halfbyte.arguments import Caching, Converting, Dequantizing, Running
from halfbyte.budget.budget import Budget
from halfbyte.cli.groups import Group, Words, grouped
from halfbyte.cli.options import (
    STORED_CACHES,
    Adapter,
    Device,
    Engine,
    Json,
    Output,
    Overwrite,
    Quiet,
    option,
    require_caches,
    require_located,
    require_names,
)
from halfbyte.cli.output import out, print_json, show, show_plan, show_report, show_warnings
from halfbyte.devices import AUTO
from halfbyte.errors import BadRequest, plural
from halfbyte.formats import cache_parts
from halfbyte.recipe import OTHER_COMMANDS, Calibration, Recipe, method_named
from halfbyte.sizing.accounting import ACCOUNTINGS
from halfbyte.sizing.devices import devices
from halfbyte.sizing.question import of_words, question
from halfbyte.words import (
    DTYPES,
    FILES,
    GRIDS,
    PLAIN,
    PRESETS,
    grid_in_name,
    require_plain,
)

if TYPE_CHECKING:
    from halfbyte.sizing.types import Recommendation

CHOSEN = frozenset({"grid", "method", "to", "engine", "pure", "override"})
"""Entries of a recipe that choose a scheme."""


@grouped
def quantize(
    model: Annotated[str | None, typer.Argument(help="A folder, a GGUF, or a hub id such as org/name.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The folder to write, or a .gguf file.",
            show_default="what `plan` calls it, with --for or no scheme",
        ),
    ] = None,
    meant_for: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="ENGINE or ENGINE@DEVICE: take what `plan` recommends, such as vllm@rtx-4090.",
            autocompletion=lambda: [*ACCOUNTINGS, *(f"{e}@{d}" for e in ACCOUNTINGS for d in devices())],
        ),
    ] = None,
    *,
    fields: Annotated[Words, Group(Recipe)],
    recipe: Annotated[Path | None, typer.Option(help="A YAML file with any of these; options win over it.")] = None,
    limits: Annotated[Words, Group(Budget, panel="Mixed precision under a budget")],
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, option(Running, "dry_run", "--dry-run")] = False,
    device: Device = AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint into a folder, or a GGUF, that an engine loads.

    halfbyte quantize org/model -o model-int4 --method awq+gptq --grid int4-g128 --engine vllm

    halfbyte quantize org/model -o model-Q4_K_M.gguf --grid Q4_K_M

    halfbyte quantize org/model --for ollama

    halfbyte quantize org/model -o model.gguf --size 3.7GB
    """
    budget = Budget.of(**limits)
    if budget and meant_for:
        raise BadRequest(
            f"--for chooses a scheme, and so does a budget of {budget.description}; leave one of them out "
            f"(--engine {of_words(meant_for)[0]} has the budget keep to what that engine loads)"
        )
    chosen = fields.keys() & CHOSEN
    if model and recipe is None and (meant_for or (output is None and budget is None and not chosen)):
        best = _recommended(model, meant_for, chosen, quiet=as_json)
        fields, output = {**fields, **best.words, "engine": best.engine}, output or Path(best.output)
    if output is None or (model is None and recipe is None):
        raise BadRequest("quantize needs a model and an output folder: halfbyte quantize MODEL -o OUT")
    asked = _asked({**fields, "model": model} if model else fields, recipe)
    _require_known(asked, output, budget)
    require_located(asked.model)
    from halfbyte.api import quantize as run  # torch takes seconds, which wrong words need not wait for
    from halfbyte.report.types import Plan

    already_shown = []
    if asked.requantize and not (dry_run or quiet or as_json):  # it may not be worth the time
        already_shown = run(asked, output, overwrite=overwrite, dry_run=True).warnings
        show_warnings(already_shown)
    progress = not (quiet or as_json)
    report = run(asked, output, **limits, overwrite=overwrite, dry_run=dry_run, progress=progress, device=device)
    if as_json:
        print_json(report)
        return
    if isinstance(report, Plan):
        show_plan(report, output)
    else:
        show_report(report, output, already_shown)
    if budget is None and not asked.model_fields_set & CHOSEN and not grid_in_name(output):
        out.print(
            f"{report.output.grid} is the default, as no scheme was asked for; what suits a device: "
            f"halfbyte plan {shlex.quote(asked.model)}, or quantize --for ENGINE@DEVICE",
            soft_wrap=True,
        )


def _asked(fields: Words, recipe: Path | None) -> Recipe:
    """A recipe of fields, which win over those of a file. Raises BadRequest."""
    named = {name: value for name, value in fields.items() if name != "calibration"}
    base = Recipe.load(recipe, **named).model_dump(exclude_unset=True) if recipe else named
    return Recipe.of(**{**base, "calibration": {**base.get("calibration", {}), **fields["calibration"]}})


def _require_known(asked: Recipe, output: Path, budget: Budget | None) -> None:
    """Raise BadRequest for names that are in no table."""
    if asked.method not in OTHER_COMMANDS:
        method_named(asked.method)
        meant = asked.to or FILES.get(output.suffix)
        require_names(meant, asked.engine, asked.grid, *asked.override.values(), *(budget.candidates if budget else ()))
    require_caches(*([asked.kv] if asked.kv else ()))


def convert(
    path: Annotated[str, typer.Argument(help="A quantized checkpoint.")],
    output: Output,
    to: Annotated[str, option(Recipe, "to")],
    grid: Annotated[str | None, option(Converting, "grid", values=(*PRESETS, *GRIDS), show_default="as it is")] = None,
    engine: Engine = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Move a quantized checkpoint into another container, exactly where the grids coincide.

    halfbyte convert model-int4 -o model-gptq --to gptq
    """
    require_names(to, engine, *([grid] if grid else ()))
    require_located(path)
    from halfbyte.api import convert as run

    report = run(path, output, to, grid, engine, overwrite=overwrite, progress=not (quiet or as_json))
    if as_json:
        print_json(report)
    else:
        show_report(report, output)


def dequantize(
    path: Annotated[str, typer.Argument(help="A quantized checkpoint, or one to merge an adapter into.")],
    output: Output,
    to: Annotated[str | None, option(Dequantizing, "to", values=PLAIN, show_default="as the output is called")] = None,
    dtype: Annotated[
        str | None,
        option(
            Dequantizing,
            "dtype",
            values=DTYPES,
            show_default="as a GGUF is called (X-F16.gguf), else the checkpoint's; bfloat16 of a GGUF",
        ),
    ] = None,
    adapter: Adapter = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write a quantized checkpoint in 16 bits, for tools that read nothing else.

    halfbyte dequantize model.gguf -o model-16

    halfbyte dequantize org/model -o merged --adapter lora
    """
    require_plain(to, dtype)
    require_located(path)
    from halfbyte.api import dequantize as run

    report = run(path, output, to, dtype, adapter, overwrite, progress=not (quiet or as_json))
    if as_json:
        print_json(report)
    else:
        show_report(report, output)


@grouped
def kv(
    model: Annotated[str, typer.Argument(help="A folder or a hub id, quantized or not.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    grid: Annotated[str, option(Caching, "grid", "--kv", values=STORED_CACHES)] = "fp8-e4m3",
    *,
    calibration: Annotated[Words, Group(Calibration)],
    fields: Annotated[Words, Group(Recipe, ("observer",))],
    overwrite: Overwrite = False,
    device: Device = AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Add the scales of a quantized KV cache to a checkpoint; all else is copied byte for byte.

    halfbyte kv model-int4 -o model-int4-kv --kv fp8-e4m3
    """
    cache_parts(grid)
    observer = Recipe.of(model=model, **fields).observer
    require_located(model)
    from halfbyte.api import kv as run

    report = run(model, output, grid, calibration, observer, overwrite, progress=not (quiet or as_json), device=device)
    if as_json:
        print_json(report)
        return
    show(display.cached(report))
    out.print(f"{output}: the KV cache in {report.grid}; read back and verified. {report.serve}", soft_wrap=True)
    show_warnings(report.warnings)


@grouped
def imatrix(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF, or a hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    *,
    calibration: Annotated[Words, Group(Calibration)],
    overwrite: Overwrite = False,
    device: Device = AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure an importance matrix, in the format of llama.cpp's own tools.

    halfbyte imatrix org/model -o imatrix.gguf
    """
    require_located(model)
    from halfbyte.api import imatrix as run

    made = run(model, output, calibration, overwrite, progress=not (quiet or as_json), device=device)
    if as_json:
        print_json(made)
    else:
        out.print(
            f"{output}: {plural(made.matrices, 'matrix', 'matrices')}, measured on {plural(made.windows[0], 'window')} "
            f"of {made.windows[1]} tokens of {made.source}"
        )


def _recommended(model: str, meant_for: str | None, asked: Iterable[str], quiet: bool) -> "Recommendation":
    """What `plan` would take, said with the reason. Raises BadRequest where that is nothing."""
    if given := sorted(asked):
        raise BadRequest(f"--for chooses the scheme: leave out --{' and --'.join(given)}, or leave out --for")
    engine, device = of_words(meant_for) if meant_for else (None, None)
    wanted = question(engine, device)  # what is wrong need not wait for torch
    require_located(model)
    from halfbyte.sizing.advice import advise

    best = advise(model, wanted).recommendation
    if best is None:
        where = {"--engine": engine, "--device": device}
        command = " ".join(["halfbyte plan", shlex.quote(model), *(f"{k} {v}" for k, v in where.items() if v)])
        raise BadRequest(f"no scheme fits {meant_for or 'this machine'} that could be made of {model}; see {command}")
    if not quiet:
        out.print(f"{best.scheme} for {best.engine}: {best.reason}", soft_wrap=True)
        out.print(best.command, soft_wrap=True)
    return best
