"""Commands that write a checkpoint."""

import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte import display
from halfbyte.budget.budget import Budget
from halfbyte.cli.options import (
    STORED_CACHES,
    Adapter,
    Container,
    Device,
    Engine,
    Json,
    Length,
    Observer,
    OldObserver,
    Overwrite,
    Quiet,
    Samples,
    Seed,
    Source,
    completing,
    entry,
    require_caches,
    require_names,
    sampling,
)
from halfbyte.cli.output import out, print_json, show, show_plan, show_report, show_warnings
from halfbyte.devices import AUTO
from halfbyte.errors import BadRequest, plural
from halfbyte.formats import cache_parts
from halfbyte.recipe import METHODS, OTHER_COMMANDS, Recipe, method_named
from halfbyte.sizing.accounting import ACCOUNTINGS
from halfbyte.sizing.devices import devices
from halfbyte.sizing.question import of_words, question
from halfbyte.words import (
    CONTAINERS,
    DTYPES,
    FILES,
    GRIDS,
    PLAIN,
    PRESETS,
    SCHEMES,
    grid_in_name,
    require_plain,
)

if TYPE_CHECKING:
    from halfbyte.sizing.types import Recommendation


def budgeted(meaning: str) -> Any:
    """An option of a budget."""
    return typer.Option(help=meaning, rich_help_panel="Mixed precision under a budget")


CHOSEN = frozenset({"grid", "method", "to", "engine", "pure", "override"})
"""Entries of a recipe that choose a scheme."""


def quantize(
    model: Annotated[str | None, typer.Argument(help="A folder, a GGUF, or a hub id such as org/name.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The folder to write, or a .gguf file.")] = None,
    meant_for: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="ENGINE or ENGINE@DEVICE: take what `plan` recommends, such as vllm@rtx-4090.",
            autocompletion=lambda: [*ACCOUNTINGS, *(f"{e}@{d}" for e in ACCOUNTINGS for d in devices())],
        ),
    ] = None,
    method: Annotated[str | None, entry("method", names=METHODS, show_default="the preset's, or gptq")] = None,
    grid: Annotated[
        str | None,
        entry(
            "grid",
            more=f"Schemes: {', '.join(SCHEMES)}. Of GGUF: {', '.join(PRESETS)}.",
            values=(*SCHEMES, *PRESETS, *GRIDS),
            show_default=Recipe.model_fields["grid"].default,
        ),
    ] = None,
    to: Container = None,
    engine: Engine = None,
    calibration: Source = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    kv: Annotated[str | None, entry("kv", values=STORED_CACHES)] = None,
    skip: Annotated[list[str] | None, entry("skip", more="Repeatable.")] = None,
    override: Annotated[
        list[str] | None,
        entry("override", more="PATTERN=GRID, such as 'layers.0.*=int8-channel', or PATTERN=keep; repeatable."),
    ] = None,
    observer: Observer = None,
    old_observer: OldObserver = None,
    alpha: Annotated[float | None, entry("alpha")] = None,
    head: Annotated[bool | None, entry("head", "--head/--no-head", show_default="no")] = None,
    smaller_groups: Annotated[bool | None, entry("smaller_groups", "--smaller-groups", show_default=False)] = None,
    pure: Annotated[bool | None, entry("pure", "--pure")] = None,
    imatrix: Annotated[str | None, entry("imatrix")] = None,
    pre: Annotated[str | None, entry("pre")] = None,
    shard_gb: Annotated[float | None, entry("shard_gb")] = None,
    adapter: Adapter = None,
    requantize: Annotated[bool | None, entry("requantize", "--requantize")] = None,
    repository: Annotated[str | None, entry("repository")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML file with any of these; options win over it.")] = None,
    bits: Annotated[float | None, budgeted("Choose each weight's grid: so many bits per parameter in all.")] = None,
    size: Annotated[str | None, budgeted("... files of this size: 3.7GB, 3500MiB, or bytes.")] = None,
    fit: Annotated[str | None, budgeted("... what fits into this memory with a cache: 22GiB.")] = None,
    max_kl: Annotated[float | None, budgeted("... the smallest output with this predicted KL divergence.")] = None,
    context: Annotated[int | None, budgeted("Tokens of the cache beside what is to --fit.")] = None,
    candidates: Annotated[str | None, budgeted("Grids to choose among, such as Q4_K,Q5_K,Q6_K.")] = None,
    sensitivities: Annotated[
        Path | None, budgeted("The file of what each weight costs, which other budgets read; beside the output.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
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
    budget = Budget.of(bits, size, fit, max_kl, context, candidates, sensitivities)
    given = {name: value for name, value in locals().items() if name in Recipe.model_fields and value not in (None, [])}
    given |= {"observer": observer or old_observer} if observer or old_observer else {}
    given |= {"override": dict(_pair(pair) for pair in override)} if override else {}
    given.pop("calibration", None)
    if model and recipe is None and (meant_for or (output is None and budget is None and not given.keys() & CHOSEN)):
        best = _recommended(model, meant_for, given.keys() & CHOSEN, quiet=as_json)
        given, output = {**given, **best.words, "engine": best.engine}, output or Path(best.output)
    if output is None or (model is None and recipe is None):
        raise BadRequest("quantize needs a model and an output folder: halfbyte quantize MODEL -o OUT")
    base = Recipe.load(recipe, **given).model_dump(exclude_unset=True) if recipe else given
    base["calibration"] = {**base.get("calibration", {}), **sampling(calibration, samples, length, seed)}
    asked = Recipe.of(**base)
    if asked.method not in OTHER_COMMANDS:
        method_named(asked.method)
        meant = asked.to or FILES.get(output.suffix)
        require_names(meant, asked.engine, asked.grid, *asked.override.values(), *(budget.candidates if budget else ()))
    require_caches(*([asked.kv] if asked.kv else ()))
    from halfbyte.api import quantize as run  # torch takes seconds, which wrong words need not wait for
    from halfbyte.report.types import Plan

    told = []
    if asked.requantize and not (dry_run or quiet or as_json):  # it may not be worth the time
        told = run(asked, output, overwrite=overwrite, dry_run=True).warnings
        show_warnings(told)
    limits = {} if budget is None else asdict(budget)
    progress = not (quiet or as_json)
    report = run(asked, output, **limits, overwrite=overwrite, dry_run=dry_run, progress=progress, device=device)
    if as_json:
        print_json(report)
        return
    if isinstance(report, Plan):
        show_plan(report, output)
    else:
        show_report(report, output, told)
    if budget is None and not asked.model_fields_set & CHOSEN and not grid_in_name(output):
        out.print(
            f"{report.output.grid} is the default, as no scheme was asked for; what suits a device: "
            f"halfbyte plan {shlex.quote(asked.model)}, or quantize --for ENGINE@DEVICE",
            soft_wrap=True,
        )


def convert(
    path: Annotated[str, typer.Argument(help="A quantized checkpoint.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write, or a .gguf file.")],
    to: Annotated[str, entry("to", names=CONTAINERS)],
    grid: Annotated[
        str | None,
        typer.Option(
            help="What to round to where the container does not hold the source's grid.",
            show_default="as it is",
            autocompletion=completing(*PRESETS, *GRIDS),
        ),
    ] = None,
    engine: Engine = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Move a quantized checkpoint into another container, exactly where the grids coincide.

    halfbyte convert model-int4 -o model-gptq --to gptq
    """
    require_names(to, engine, *([grid] if grid else ()))
    from halfbyte.api import convert as run

    report = run(path, output, to, grid, engine, overwrite=overwrite, progress=not (quiet or as_json))
    if as_json:
        print_json(report)
    else:
        show_report(report, output)


def dequantize(
    path: Annotated[str, typer.Argument(help="A quantized checkpoint, or one to merge an adapter into.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write, or a .gguf file.")],
    to: Annotated[
        str | None,
        typer.Option(
            help=f"{' or '.join(PLAIN)}.", show_default="as the output is called", autocompletion=completing(*PLAIN)
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(DTYPES)}.",
            show_default="as a GGUF is called (X-F16.gguf), else the checkpoint's; bfloat16 of a GGUF",
            autocompletion=completing(*DTYPES),
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
    from halfbyte.api import dequantize as run

    report = run(path, output, to, dtype, adapter, overwrite, progress=not (quiet or as_json))
    if as_json:
        print_json(report)
    else:
        show_report(report, output)


def kv(
    model: Annotated[str, typer.Argument(help="A folder or a hub id, quantized or not.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    grid: Annotated[
        str,
        typer.Option(
            "--kv",
            help="fp8-e4m3, or fp8-e4m3-head with a scale for each head.",
            autocompletion=completing(*STORED_CACHES),
        ),
    ] = "fp8-e4m3",
    calibration: Source = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    observer: Observer = None,
    old_observer: OldObserver = None,
    overwrite: Overwrite = False,
    device: Device = AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Add the scales of a quantized KV cache to a checkpoint; all else is copied byte for byte.

    halfbyte kv model-int4 -o model-int4-kv --kv fp8-e4m3
    """
    cache_parts(grid)
    resolved = Recipe.of(model=model, observer=observer or old_observer or "max").observer
    from halfbyte.api import kv as run

    asked = sampling(calibration, samples, length, seed)
    found = run(model, output, grid, asked, resolved, overwrite, progress=not (quiet or as_json), device=device)
    if as_json:
        print_json(found)
        return
    show(display.cached(found))
    out.print(f"{output}: the KV cache in {found.grid}; read back and verified. {found.serve}", soft_wrap=True)
    show_warnings(found.warnings)


def imatrix(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF, or a hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    calibration: Source = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    device: Device = AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure an importance matrix, in the format of llama.cpp's own tools.

    halfbyte imatrix org/model -o imatrix.gguf
    """
    from halfbyte.api import imatrix as run

    made = run(
        model,
        output,
        sampling(calibration, samples, length, seed),
        overwrite,
        progress=not (quiet or as_json),
        device=device,
    )
    if as_json:
        print_json(made)
    else:
        out.print(
            f"{output}: {plural(made.matrices, 'matrix', 'matrices')}, measured on {plural(made.windows[0], 'window')} "
            f"of {made.windows[1]} tokens of {made.source}"
        )


def _recommended(model: str, meant_for: str | None, asked: Iterable[str], quiet: bool) -> "Recommendation":
    """What `plan` would take, said with the reason. Raises BadRequest where that is nothing."""
    if words := sorted(asked):
        raise BadRequest(f"--for chooses the scheme: leave out --{' and --'.join(words)}, or leave out --for")
    engine, device = of_words(meant_for) if meant_for else (None, None)
    question(engine, device)  # wrong words need not wait for torch
    from halfbyte.api import advise

    best = advise(model, engine=engine, device=device).recommendation
    if best is None:
        where = {"--engine": engine, "--device": device}
        told = " ".join(["halfbyte plan", shlex.quote(model), *(f"{k} {v}" for k, v in where.items() if v)])
        raise BadRequest(f"no scheme fits {meant_for or 'this machine'} that could be made of {model}; see {told}")
    if not quiet:
        out.print(f"{best.scheme} for {best.engine}: {best.reason}", soft_wrap=True)
        out.print(best.command, soft_wrap=True)
    return best


def _pair(text: str) -> tuple[str, str]:
    pattern, sign, grid = text.rpartition("=")
    if not sign or not pattern or not grid:
        raise BadRequest(f"--override takes PATTERN=GRID, such as 'layers.0.*=int8-channel', not '{text}'")
    return pattern, grid
