"""The command line: each command parses, calls one function, and prints."""

import os
import shlex
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table

from halfbyte import display
from halfbyte.devices import AUTO, KINDS, require_name
from halfbyte.endings import Stop, hang_up, is_want_of_memory, speak_any_language
from halfbyte.engines.engines import ENGINES, NOBODY, engine_named
from halfbyte.errors import BadRequest, HalfbyteError, brief, plural
from halfbyte.evaluation.conventions import CONVENTIONS, convention_named
from halfbyte.formats import cache_parts
from halfbyte.progress import shown
from halfbyte.recipe import METHODS, OTHER_COMMANDS, SHORTEST, Calibration, Entries, Recipe, meaning, method_named
from halfbyte.report.gate import MEASURES, limits
from halfbyte.report.numbers import require_finite
from halfbyte.report.summary import headline, size, worst, worst_activations
from halfbyte.report.types import Evaluation, Part, Plan, Report, StatesEvaluation
from halfbyte.sizing.accounting import ACCOUNTINGS
from halfbyte.sizing.cache import TYPES
from halfbyte.sizing.choices import choices
from halfbyte.sizing.devices import device_called, here
from halfbyte.sizing.devices import devices as table_of_devices
from halfbyte.sizing.question import of_words, question
from halfbyte.sizing.types import Recommendation
from halfbyte.surroundings import arrange
from halfbyte.terminal import Terminal, as_json
from halfbyte.words import (
    CONTAINERS,
    DTYPES,
    FILES,
    PLAIN,
    PRESETS,
    SCHEMES,
    owner_of,
    require_container,
    require_grid,
    require_plain,
)

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
INTERRUPTED, BUG, GATE_BROKEN = 130, 70, 1
CHOSEN = frozenset({"grid", "method", "to", "engine", "pure", "override"})
"""Entries of a recipe that choose a scheme."""
UsageError: Any = typer.BadParameter.__mro__[1]  # of click, which some versions of typer bear within themselves
out = Terminal(width=None if sys.stdout.isatty() else 180)
err = Terminal(stderr=True)


def entry(
    name: str, *flags: str, names: Iterable[str] = (), more: str = "", of: type[Entries] = Recipe, **settings: Any
) -> Any:
    """An option for an entry of a recipe, whose own documentation is the help; `names` that it may be are listed."""
    listed = f"{', '.join(names)}." if names else ""
    return typer.Option(*flags, help=" ".join(filter(None, (meaning(name, of), listed, more))), **settings)


DEFAULT = Calibration()
Source = Annotated[str | None, entry("source", of=Calibration, show_default="the embedded text")]
Samples = Annotated[int | None, entry("samples", of=Calibration, show_default=str(DEFAULT.samples))]
Length = Annotated[int | None, entry("length", of=Calibration, show_default=str(DEFAULT.length))]
Seed = Annotated[int | None, entry("seed", of=Calibration, show_default=str(DEFAULT.seed))]
Observer = Annotated[
    str | None, entry("observer", "--observer", show_default=str(Recipe.model_fields["observer"].default))
]
OldObserver = Annotated[str | None, typer.Option("--input-range", hidden=True)]
"""As it was called once."""
Container = Annotated[str | None, entry("to", names=CONTAINERS, show_default="the engine's, else what holds the grid")]
Engine = Annotated[str | None, entry("engine", names=ENGINES)]
Adapter = Annotated[str | None, entry("adapter")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Foreign = Annotated[
    bool, typer.Option("--foreign", help="Compare with another model than the source, or one with other tokens, too.")
]
Device = Annotated[
    str,
    typer.Option(
        help=f"What computes: {AUTO} (a GPU where there is one), {', '.join(KINDS)}, or a GPU by its number (cuda:1).",
        callback=lambda words: require_name(words),
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=lambda asked: _print_version(asked), is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Make large language models small enough to run."""


@app.command()
def quantize(
    model: Annotated[str | None, typer.Argument(help="A folder, a GGUF, or a hub id such as org/name.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The folder to write, or a .gguf file.")] = None,
    meant_for: Annotated[
        str | None,
        typer.Option("--for", help="ENGINE or ENGINE@DEVICE: take what `plan` recommends, such as vllm@rtx-4090."),
    ] = None,
    method: Annotated[str | None, entry("method", names=METHODS, show_default="the preset's, or gptq")] = None,
    grid: Annotated[
        str | None,
        entry(
            "grid",
            more=f"Schemes: {', '.join(SCHEMES)}. Of GGUF: {', '.join(PRESETS)}.",
            show_default=Recipe.model_fields["grid"].default,
        ),
    ] = None,
    to: Container = None,
    engine: Engine = None,
    calibration: Source = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    kv: Annotated[str | None, entry("kv")] = None,
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
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint into a folder, or a GGUF, that an engine loads.

    halfbyte quantize org/model -o model-int4 --method awq+gptq --grid int4-g128 --engine vllm

    halfbyte quantize org/model -o model-Q4_K_M.gguf --grid Q4_K_M

    halfbyte quantize org/model --for ollama
    """
    given = {name: value for name, value in locals().items() if name in Recipe.model_fields and value not in (None, [])}
    given |= {"observer": observer or old_observer} if observer or old_observer else {}
    given |= {"override": dict(_pair(pair) for pair in override)} if override else {}
    given.pop("calibration", None)
    if model and recipe is None and (meant_for or (output is None and not given.keys() & CHOSEN)):
        best = _recommended(model, meant_for, given.keys() & CHOSEN, quiet=as_json)
        given, output = {**given, **best.words, "engine": best.engine}, output or Path(best.output)
    if output is None or (model is None and recipe is None):
        raise BadRequest("quantize needs a model and an output folder: halfbyte quantize MODEL -o OUT")
    base = Recipe.load(recipe, **given).model_dump(exclude_unset=True) if recipe else given
    base["calibration"] = {**base.get("calibration", {}), **_sampling(calibration, samples, length, seed)}
    asked = Recipe.of(**base)
    if asked.method not in OTHER_COMMANDS:
        method_named(asked.method)
        meant = asked.to or FILES.get(output.suffix)
        _require_names(meant, asked.engine, asked.grid, *asked.override.values())
    _require_caches(*([asked.kv] if asked.kv else ()))
    from halfbyte.api import quantize as run  # torch takes seconds, which wrong words need not wait for

    report = run(asked, output, overwrite=overwrite, dry_run=dry_run, progress=not as_json, device=device)
    if as_json:
        _print_json(report)
        return
    if isinstance(report, Plan):
        _show_plan(report, output)
    else:
        _show_report(report, output)
    if not asked.model_fields_set & CHOSEN:
        out.print(
            f"{report.output.grid} is the default, as no scheme was asked for; what suits a device: "
            f"halfbyte plan {shlex.quote(asked.model)}, or quantize --for ENGINE@DEVICE",
            soft_wrap=True,
        )


@app.command()
def convert(
    path: Annotated[str, typer.Argument(help="A quantized checkpoint.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write, or a .gguf file.")],
    to: Annotated[str, entry("to", names=CONTAINERS)],
    grid: Annotated[
        str | None,
        typer.Option(
            help="What to round to where the container does not hold the source's grid.", show_default="as it is"
        ),
    ] = None,
    engine: Engine = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Move a quantized checkpoint into another container, exactly where the grids coincide."""
    _require_names(to, engine, *([grid] if grid else ()))
    from halfbyte.api import convert as run

    report = run(path, output, to, grid, engine, overwrite=overwrite, progress=not as_json)
    if as_json:
        _print_json(report)
    else:
        _show_report(report, output)


@app.command()
def dequantize(
    path: Annotated[str, typer.Argument(help="A quantized checkpoint, or one to merge an adapter into.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write, or a .gguf file.")],
    to: Annotated[
        str | None, typer.Option(help=f"{' or '.join(PLAIN)}.", show_default="as the output is called")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(DTYPES)}.", show_default="the checkpoint's; bfloat16 for a GGUF")
    ] = None,
    adapter: Adapter = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a quantized checkpoint in 16 bits, for tools that read nothing else."""
    require_plain(to, dtype)
    from halfbyte.api import dequantize as run

    report = run(path, output, to, dtype, adapter, overwrite, progress=not as_json)
    if as_json:
        _print_json(report)
    else:
        _show_report(report, output)


@app.command()
def kv(
    model: Annotated[str, typer.Argument(help="A folder or a hub id, quantized or not.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    grid: Annotated[
        str, typer.Option("--kv", help="fp8-e4m3, or fp8-e4m3-head with a scale for each head.")
    ] = "fp8-e4m3",
    calibration: Source = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    observer: Observer = None,
    old_observer: OldObserver = None,
    overwrite: Overwrite = False,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Add the scales of a quantized KV cache to a checkpoint; all else is copied byte for byte."""
    cache_parts(grid)
    how = Recipe.of(model=model, observer=observer or old_observer or "max").observer
    from halfbyte.api import kv as run

    asked = _sampling(calibration, samples, length, seed)
    found = run(model, output, grid, asked, how, overwrite, progress=not as_json, device=device)
    if as_json:
        _print_json(found)
        return
    _show(display.cached(found))
    out.print(f"{output}: the KV cache in {found.grid}; read back and verified. {found.serve}", soft_wrap=True)
    for warning in found.warnings:
        out.print(f"note: {warning}")


@app.command()
def imatrix(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF, or a hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    calibration: Source = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Measure an importance matrix, in the format of llama.cpp's own tools."""
    from halfbyte.api import imatrix as run

    made = run(
        model, output, _sampling(calibration, samples, length, seed), overwrite, progress=not as_json, device=device
    )
    if as_json:
        _print_json(made)
    else:
        out.print(
            f"{output}: {plural(made.matrices, 'matrix', 'matrices')}, measured on {plural(made.windows[0], 'window')} "
            f"of {made.windows[1]} tokens of {made.source}"
        )


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints to measure; the second and later are also compared with the first, token by token."
        ),
    ],
    against: Annotated[str, typer.Option(help="The original.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="A text file, a .jsonl, .json or .csv, a dataset, or 'heldout' for the embedded text; several are "
            "measured one by one.",
            show_default="heldout",
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=SHORTEST, help="Tokens in a window.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="Use only the first N windows.")] = None,
    convention: Annotated[
        str, typer.Option(help=". ".join(f"{c.name}: {c.about}" for c in CONVENTIONS.values()))
    ] = "served",
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="Run the models with this KV cache: fp8-e4m3, int8, int4 ..., none for 16 bits; repeatable.",
            show_default="as stored",
        ),
    ] = None,
    adapter: Adapter = None,
    foreign: Foreign = False,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor", help="Measure the original in bfloat16 against itself, too.")
    ] = False,
    gate: Annotated[
        str | None,
        typer.Option(
            help="Limits such as kl=0.05,flips=2%; exit code 1 where one does not hold. "
            + "; ".join(f"{name}: {measure.about}" for name, measure in MEASURES.items())
            + "."
        ),
    ] = None,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Perplexity, and divergence from the original on the same tokens.

    halfbyte eval model-int4 --against org/model --gate kl=0.05
    """
    convention_named(convention)
    _require_caches(*(kv or ()))
    if gate:
        limits(gate)
    from halfbyte.api import evaluate as run

    results = [
        run(
            models,
            against,
            name,
            length,
            windows,
            convention,
            kv or ["stored"],
            adapter,
            foreign,
            noise_floor,
            gate,
            progress=not as_json,
            device=device,
        )
        for name in text or ["heldout"]
    ]
    if as_json:
        _print_json(results if len(results) > 1 else results[0])
    else:
        for result in results:
            _show_measured(result)
    gates = [gate for result in results if isinstance(result, Evaluation) for gate in result.gates]
    raise typer.Exit(0 if all(gate.holds for gate in gates) else GATE_BROKEN)


@app.command()
def needle(
    models: Annotated[list[str], typer.Argument(help="Checkpoints to measure.")],
    against: Annotated[str, typer.Option(help="The original.")],
    text: Annotated[
        str, typer.Option(help="Where the fact is hidden: a text file, a .jsonl, a dataset, or 'heldout'.")
    ] = "heldout",
    lengths: Annotated[str, typer.Option("--lengths", "--length", help="Tokens of the texts.")] = "256,512,1024",
    depths: Annotated[int, typer.Option(min=1, help="Places from the beginning to the end.")] = 5,
    facts: Annotated[int, typer.Option(min=1, help="Facts at each place, of which the mean is shown.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Which facts and texts are drawn.")] = 0,
    kv: Annotated[
        list[str] | None,
        typer.Option(help="Run the models with this KV cache, as in eval; repeatable.", show_default="as stored"),
    ] = None,
    adapter: Adapter = None,
    foreign: Foreign = False,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Is a fact that was planted in a long text read back? By depth and length, before and after."""
    sizes = [int(size) for size in lengths.split(",") if size.strip().isdigit()]
    if len(sizes) != len(lengths.split(",")):
        raise BadRequest(f"--lengths takes numbers of tokens, such as 256,1024, not '{lengths}'")
    _require_caches(*(kv or ()))
    from halfbyte.api import needle as run

    result = run(
        models,
        against,
        text,
        sizes,
        depths,
        facts,
        seed,
        kv or ["stored"],
        adapter,
        foreign,
        progress=not as_json,
        device=device,
    )
    if as_json:
        _print_json(result)
        return
    _show(display.needles(result))


@app.command()
def blame(
    model: Annotated[str, typer.Argument(help="A quantized checkpoint.")],
    against: Annotated[str, typer.Option(help="The original.")],
    text: Annotated[
        str, typer.Option(help="A text file, a .jsonl, .json or .csv, a dataset, or 'heldout' for the embedded text.")
    ] = "heldout",
    length: Annotated[int, typer.Option(min=SHORTEST, help="Tokens in a window.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Use only the first N windows.")] = 8,
    blocks: Annotated[
        int, typer.Option(min=0, help="Of how many blocks, those that cost most, each weight is tried too.")
    ] = 3,
    worst: Annotated[int, typer.Option(min=1, help="How many parts to list.")] = 10,
    adapter: Adapter = None,
    foreign: Foreign = False,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Which part broke it? Each is put back as it was, and what that gives back is ranked.

    halfbyte blame model-int4 --against org/model
    """
    from halfbyte.api import blame as run

    result = run(model, against, text, length, windows, blocks, adapter, foreign, progress=not as_json, device=device)
    if as_json:
        _print_json(result)
        return
    out.print(f"{plural(result.windows, 'window')} of {length} tokens of {text}")
    _show(display.blamed(result, worst))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A checkpoint.")],
    b: Annotated[str, typer.Argument(help="Another version of the same model.")],
    values: Annotated[
        bool, typer.Option(help="Read all tensors, for how far apart their values are; else headers and reports alone.")
    ] = True,
    worst: Annotated[int, typer.Option(min=0, help="How many tensors to list.")] = 10,
    as_json: Json = False,
) -> None:
    """Two runs or checkpoints side by side: tensors, bytes, errors, losses.

    halfbyte compare model-int4 model-Q4_K_M.gguf
    """
    from halfbyte.api import compare as run

    found = run(a, b, values, progress=not as_json)
    if as_json:
        _print_json(found)
        return
    _show(display.compared(found, worst))


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Any checkpoint.")],
    worst: Annotated[int, typer.Option(min=0, help="How many weights to list.")] = 10,
    as_json: Json = False,
) -> None:
    """Tensors, grids, bits per weight, sizes, and which weights lost most."""
    from halfbyte.api import inspect as run

    found = run(path)
    if as_json:
        _print_json(found)
        return
    _show(display.inspected(found, worst))
    if found.evaluation:
        model, was = found.evaluation.model, found.evaluation.reference.perplexity
        kl = display.with_error(model.kl, model.kl_error, 5)
        out.print(f"KL to the original {kl}, perplexity {model.perplexity:.3f} (was {was:.3f})")


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="Outputs of quantize: folders, or .gguf files.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
    overwrite: Overwrite = False,
) -> None:
    """Show any number of runs on one page, which needs no network: size against loss, and where each lost it.

    halfbyte report model-int4 model-Q4_K_M.gguf -o report.html
    """
    from halfbyte.api import page as run

    run(runs, output, overwrite)
    out.print(f"{output}: {plural(len(runs), 'run')} on one page, {size(output.expanduser().stat().st_size)}")


@app.command()
def push(
    path: Annotated[str, typer.Argument(help="An output of quantize: a folder, or a .gguf file.")],
    repository: Annotated[str, typer.Argument(help="Where to: org/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")] = False,
) -> None:
    """Upload an output to the hub: its files, and a card whose commands name the repository.

    halfbyte push model-int4 me/model-int4
    """
    from halfbyte.api import push as run

    out.print(f"{path}: uploaded to {run(path, repository, private)}", soft_wrap=True)


@app.command()
def demo(
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows of 512 tokens.")] = 12,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows of 512 tokens.")] = 6,
    keep: Annotated[Path | None, typer.Option(help="Keep the quantized folders here.")] = None,
    as_json: Json = False,
) -> None:
    """Quantize the embedded model with several methods and print what each one lost. Works offline."""
    from halfbyte.demonstration import rows

    with tempfile.TemporaryDirectory() as scratch, shown(not as_json) as progress:
        table_rows = rows(keep or Path(scratch), samples, windows, progress)
    if as_json:
        _print_json(table_rows)
        return
    _show(display.demonstrated(table_rows))


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder, a GGUF, or a hub id: of that only headers are downloaded.")],
    device: Annotated[
        str | None,
        typer.Option(help="What it is to run on: a row of `halfbyte devices`, or cpu.", show_default="what is here"),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="In place of a device: such as 24GiB.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(ACCOUNTINGS)}.", show_default="vllm for cards of servers, else llama.cpp"),
    ] = None,
    cards: Annotated[int, typer.Option(min=1, help="How many of the device.")] = 1,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence.", show_default="8192, or the model's if less")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 1,
    cache: Annotated[str, typer.Option(help=f"What the cache is stored as: {', '.join(TYPES)}.")] = "16 bits",
    as_json: Json = False,
) -> None:
    """What fits where, how fast at most, what it loses, and which scheme to take. No weight is read.

    halfbyte plan org/model --device rtx-4090 --engine vllm --context 8192 --batch 8
    """
    question(engine, device, memory, cards, context, batch, cache)  # wrong words need not wait for torch
    from halfbyte.api import advise

    found = advise(
        model,
        device=device,
        memory=memory,
        engine=engine,
        cards=cards,
        context=context,
        batch=batch,
        cache=cache,
    )
    if as_json:
        _print_json(found)
        return
    for part in display.advised(found):
        out.print(part, soft_wrap=isinstance(part, str))


@app.command()
def devices(
    name: Annotated[str | None, typer.Argument(help="One of them, for what runs on it.", show_default="all")] = None,
    as_json: Json = False,
) -> None:
    """The cards, chips and processors that `plan` knows, with their sources, and what is on this machine.

    halfbyte devices rtx-4090
    """
    known = [device_called(name)] if name else list(table_of_devices().values())
    found = [] if name else here()
    if as_json:
        _print_value({"devices": [asdict(d) for d in known], "here": [asdict(d) for d in found]})
    elif name:
        _show(display.device(known[0], {engine: list(row.values()) for engine, row in choices().items()}))
    else:
        _show(display.devices(known, found))


@app.command()
def support(
    engine: Annotated[
        str | None, typer.Option(help="What this engine loads, as a list.", show_default="all, as tables of Markdown")
    ] = None,
) -> None:
    """Which grids each container holds, found by trying, and what engines load."""
    if engine:
        engine_named(engine)
    from halfbyte.report import support

    print(support.of_engine(engine) if engine else support.markdown())


def _print_version(asked: bool) -> None:
    if asked:
        print(f"halfbyte {metadata.version('halfbyte')}")
        raise typer.Exit


def _require_names(to: str | None, engine: str | None, *grids: str) -> None:
    """Raise BadRequest for names that are in no table; whether they fit each other and the model is looked at later."""
    if to:
        require_container(to)
    own = ENGINES[engine_named(engine)].default if engine and engine != NOBODY else None
    container = to or next(filter(None, map(owner_of, grids)), own)
    for grid in grids:
        if grid != "keep":
            require_grid(grid, container)


def _require_caches(*kinds: str) -> None:
    """Raise BadRequest for what no KV cache is called."""
    for kind in kinds:
        if kind not in ("stored", "none"):
            cache_parts(kind)


def _recommended(model: str, meant_for: str | None, asked: Iterable[str], quiet: bool) -> Recommendation:
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


def _sampling(source: str | None, samples: int | None, length: int | None, seed: int | None) -> dict[str, Any]:
    """What was asked of a calibration; the rest is as `Calibration` has it."""
    given = {"source": source, "samples": samples, "length": length, "seed": seed}
    return {name: value for name, value in given.items() if value is not None}


def _pair(text: str) -> tuple[str, str]:
    pattern, sign, grid = text.rpartition("=")
    if not sign or not pattern or not grid:
        raise BadRequest(f"--override takes PATTERN=GRID, such as 'layers.0.*=int8-channel', not '{text}'")
    return pattern, grid


def _show_plan(plan: Plan, output: Path) -> None:
    o = plan.output
    out.print(f"{output} would be: {headline(plan)}")
    for kind, count in Counter(row.grid for row in plan.weights).most_common():
        out.print(f"  {plural(count, 'matrix', 'matrices')} on {kind}")
    for reason, count in Counter(plan.kept.values()).most_common():
        out.print(f"  {plural(count, 'tensor')} kept: {reason}")
    for reason, count in Counter(plan.dropped.values()).most_common():
        out.print(f"  {plural(count, 'tensor')} left out: {reason}")
    names = ", ".join(o.files[:3]) + (" ..." if len(o.files) > 3 else "")
    out.print(f"  {plural(len(o.files), 'file')} of tensors, {size(o.size_bytes)}: {names}")
    for warning in plan.warnings:
        out.print(f"note: {warning}")
    for engine in plan.engines:
        reason = "" if engine.loads else f": {engine.reasons[0]}"
        out.print(f"{engine.engine} {'loads it' if engine.loads else 'does not load it'}{reason}", soft_wrap=True)
    out.print("nothing was written", highlight=False)


def _show_report(report: Report, output: Path) -> None:
    out.print(f"{output}: {headline(report)}, {report.seconds:.1f} s; read back and verified")
    _show(display.worst(worst(report), report.error_of))
    for row in worst_activations(report, 1):
        if seen := row.activations:
            out.print(
                f"activations: {seen.grid}, the largest error {seen.error:.4f} where {row.name} reads from "
                f"{seen.low:.3g} "
                f"to {seen.high:.3g}; {seen.saturated} of {seen.values} values cut there"
            )
    if cache := report.kv:
        out.print(
            f"KV cache: {cache.grid}, at most {100 * cache.most_clipped:.4f}% of an attention's keys or values beyond "
            f"the scales on other text. {cache.serve}",
            soft_wrap=True,
        )
    for warning in (*report.warnings, *(cache.warnings if cache else ())):
        out.print(f"note: {warning}")
    _show_engines(report, output)
    asked = report.recipe
    if asked.method not in OTHER_COMMANDS and report.source.is_decoder:
        merged = f" --adapter {shlex.quote(asked.adapter)}" if asked.adapter else ""
        words = f"{shlex.quote(str(output))} --against {shlex.quote(asked.model)}{merged}"
        out.print(f"what was lost: halfbyte eval {words}", soft_wrap=True)


def _show_engines(report: Report, output: Path) -> None:
    """What serves the output; of one engine, if it was asked for."""
    from halfbyte.report.card import command, original_of
    from halfbyte.targets.table import is_file

    o, asked = report.output, report.recipe
    place = output / o.file if o.file and not is_file(output) else output
    for engine in report.engines:
        if engine.loads and asked.engine in (None, "none", engine.engine):
            words = command(engine, place, original_of(asked))
            out.print(f"{engine.engine} ({engine.word}): {words}", soft_wrap=True)
    if report.engines and not any(engine.loads for engine in report.engines):
        out.print(
            "note: no engine is known to load it; halfbyte.load does, and report.json says of each engine "
            "why it does not",
            soft_wrap=True,
        )


def _show_measured(result: Evaluation | StatesEvaluation) -> None:
    begins = f", each begins with {''.join(result.opening)}" if result.opening else ""
    out.print(
        f"{plural(result.windows, 'window')} of {result.length} tokens of {result.text}, convention "
        f"{result.convention}{begins}"
    )
    _show(display.evaluated(result) if isinstance(result, Evaluation) else display.states(result))


def _show(parts: Sequence[Table | str]) -> None:
    for part in parts:
        out.print(part)


def _print_json(found: Part | Sequence[Part]) -> None:
    _print_value(found.as_dict() if isinstance(found, Part) else [part.as_dict() for part in found])


def _print_value(value: Any) -> None:
    print(as_json(require_finite(value)))


def main(words: Sequence[str] | None = None) -> None:
    """Entry point. A request that cannot be met is one line and exit code 2; an interrupted run says how to go on; a
    bug of ours is one line and exit code 70, unless HALFBYTE_DEBUG is set and it is a traceback."""
    started = time.monotonic()
    words = list(sys.argv[1:] if words is None else words) or ["--help"]
    arrange()
    stop = Stop()
    speak_any_language()
    try:
        code = app(args=words, prog_name="halfbyte", standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt  # typer swallows it and returns this number
        if code == GATE_BROKEN:
            sys.exit(code)
    except HalfbyteError as error:
        _refuse(str(error))
    except UsageError as error:
        context = getattr(error, "ctx", None)
        _refuse(f"{error.format_message().rstrip('.')}; see {context.command_path if context else 'halfbyte'} --help")
    except (KeyboardInterrupt, typer.Abort):
        goes_on = (
            "; the same command goes on where it stopped" if words[0] in ("quantize", "convert", "dequantize") else ""
        )
        with suppress(OSError):  # the terminal may be gone
            err.print(f"\nhalfbyte: {stop.said} after {time.monotonic() - started:.0f} s{goes_on}", soft_wrap=True)
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        hang_up()  # whoever read our output has seen enough
        sys.exit(1)
    except OSError as error:
        if stop.came:  # with the terminal
            hang_up()
            sys.exit(stop.exit_code)
        _refuse(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except Exception as error:
        if os.environ.get("HALFBYTE_DEBUG"):
            raise
        if is_want_of_memory(error):
            _refuse(
                f"there is too little memory ({brief(error)}); close other programs or raise the limit, and give "
                "the same command again"
            )
        _admit(error)


def _admit(error: Exception) -> NoReturn:
    """The last net: what no check foresaw is a fault of ours, and what is known of it goes into a file."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", errors="backslashreplace", prefix="halfbyte-", suffix=".txt", delete=False
    ) as file:
        file.write(f"halfbyte {metadata.version('halfbyte')}, {' '.join(map(shlex.quote, sys.argv[1:]))}\n\n")
        file.writelines(traceback.format_exception(error))
    err.print(
        f"halfbyte: this is a bug of halfbyte ({brief(error)}); please report it with {file.name}, which says where it "
        "happened",
        highlight=False,
        soft_wrap=True,
    )
    sys.exit(BUG)


def _refuse(reason: str) -> NoReturn:
    err.print("halfbyte: " + " ".join(reason.split()), highlight=False, soft_wrap=True)
    sys.exit(2)
