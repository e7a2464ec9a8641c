"""Commands that measure what was lost."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from halfbyte import display
from halfbyte.arguments import Answering, Blaming, Evaluating, Measuring, Retrieving, Timing
from halfbyte.cli.options import (
    Against,
    Caches,
    Device,
    Foreign,
    Json,
    MergedAdapter,
    Quiet,
    count,
    option,
    require_caches,
    require_located,
)
from halfbyte.cli.output import out, print_json, show, show_measured
from halfbyte.demo import LANGUAGES
from halfbyte.devices import AUTO
from halfbyte.engines.engines import TIMED, timed_named
from halfbyte.errors import BadRequest, plural
from halfbyte.evaluation.conventions import CONVENTIONS, convention_named
from halfbyte.evaluation.suites.suite import suites
from halfbyte.progress import shown
from halfbyte.report.gate import MEASURES, about_measures, as_words, limits, shared_out

if TYPE_CHECKING:
    from halfbyte.report.types import Evaluation, StatesEvaluation, SuiteEvaluation, TaskEvaluation

    Measured = Evaluation | StatesEvaluation | SuiteEvaluation | TaskEvaluation

GATE_BROKEN = 1
"""Exit code."""
Models = Annotated[list[str], typer.Argument(help="Checkpoints to measure.")]
Length = Annotated[int, count(Measuring, "length")]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints to measure; the second and later are also compared with the first, token by token."
        ),
    ],
    against: Against,
    text: Annotated[
        list[str] | None,
        option(
            Measuring,
            "text",
            more="Several are measured one by one, and may have names, such as de=news.txt; 'multilingual' is all 17.",
            show_default="heldout, unless a suite or tasks are named",
        ),
    ] = None,
    suite: Annotated[list[str] | None, option(Answering, "suites", "--suite", more="Repeatable.")] = None,
    tokens: Annotated[int | None, count(Answering, "tokens", show_default="each prompt's own limit")] = None,
    tasks: Annotated[str | None, option(Answering, "tasks")] = None,
    task_path: Annotated[Path | None, option(Answering, "folder", "--task-path")] = None,
    limit: Annotated[int | None, count(Answering, "limit", show_default="all")] = None,
    shots: Annotated[int | None, count(Answering, "shots", show_default="as the task says")] = None,
    as_chat: Annotated[bool, option(Answering, "as_chat", "--as-chat")] = False,
    run_code: Annotated[bool, option(Answering, "runs_code", "--run-code")] = False,
    length: Length = 512,
    windows: Annotated[int | None, count(Measuring, "windows")] = None,
    convention: Annotated[str, option(Evaluating, "convention", values=CONVENTIONS)] = "served",
    kv: Caches = None,
    adapter: MergedAdapter = None,
    foreign: Foreign = False,
    noise_floor: Annotated[bool, option(Evaluating, "noise_floor", "--noise-floor")] = False,
    gate: Annotated[
        str | None,
        option(
            Measuring,
            "gate",
            more=f"Exit code 1 where one does not hold. {about_measures()}",
            values=[f"{name}=" for name in MEASURES],
        ),
    ] = None,
    device: Device = AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Perplexity, and divergence from the original on the same tokens; answers to prompts, side by side.

    halfbyte eval model-int4 --against org/model --gate kl=0.05

    halfbyte eval model-int4 --against org/model --suite json --suite my-prompts.jsonl --gate flips=2%

    halfbyte eval model-int4 --against org/model --tasks gsm8k,hellaswag --limit 200
    """
    convention_named(convention)
    require_caches(*(kv or ()))
    of_text, of_answers = shared_out(limits(gate) if gate else [], answers=bool(suite or tasks))
    suites(suite or ())
    asked_for = text or ([] if (suite or tasks) and not of_text else ["heldout"])
    texts = [one for name in asked_for for one in _spread(name)]
    require_located(*models, against)
    from halfbyte import api

    common = {
        "kv": kv or ["stored"],
        "adapter": adapter,
        "foreign": foreign,
        "progress": not (quiet or as_json),
        "device": device,
    }
    results: list[Measured] = []
    for name in texts:
        asked = {"length": length, "windows": windows, "convention": convention, "noise_floor": noise_floor}
        results.append(api.evaluate(models, against, name, **asked, **common, gate=as_words(of_text)))
    if suite:
        results.append(api.suite(models, against, suite, tokens, **common, gate=as_words(of_answers)))
    if tasks:
        names = [name.strip() for name in tasks.split(",")]
        how = {"folder": task_path, "limit": limit, "shots": shots, "as_chat": as_chat, "runs_code": run_code}
        results.append(api.tasks(models, against, names, **how, **common, gate=as_words(of_answers)))
    _show_all(results, as_json)


def _spread(text: str) -> list[str]:
    """The texts that a name stands for, with names for each."""
    return [f"{code}=multilingual-{code}" for code in LANGUAGES] if text == "multilingual" else [text]


def _show_all(results: "Sequence[Measured]", as_json: bool) -> NoReturn:
    """Print what was measured, and end: with another code where a gate does not hold."""
    from halfbyte.report.types import Evaluation, StatesEvaluation

    if as_json:
        print_json(results if len(results) > 1 else results[0])
    else:
        for result in results:
            show_measured(result)
        of_texts = [result for result in results if isinstance(result, Evaluation)]
        if len(of_texts) > 1:
            show(display.by_text(of_texts))
    gates = [gate for result in results if not isinstance(result, StatesEvaluation) for gate in result.gates]
    raise typer.Exit(0 if all(gate.holds for gate in gates) else GATE_BROKEN)


def needle(
    models: Models,
    against: Against,
    text: Annotated[str, option(Measuring, "text", more="The fact is hidden in it.")] = "heldout",
    lengths: Annotated[str, option(Retrieving, "lengths", "--lengths", "--length")] = "256,512,1024",
    depths: Annotated[int, count(Retrieving, "depths")] = 5,
    facts: Annotated[int, count(Retrieving, "facts")] = 8,
    seed: Annotated[int, count(Retrieving, "seed")] = 0,
    kv: Caches = None,
    adapter: MergedAdapter = None,
    foreign: Foreign = False,
    device: Device = AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Is a fact that was planted in a long text read back? By depth and length, before and after.

    halfbyte needle model-int4 --against org/model --lengths 1024,4096
    """
    sizes = [int(size) for size in lengths.split(",") if size.strip().isdigit()]
    if len(sizes) != len(lengths.split(",")):
        raise BadRequest(f"--lengths takes numbers of tokens, such as 256,1024, not '{lengths}'")
    require_caches(*(kv or ()))
    require_located(*models, against)
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
        progress=not (quiet or as_json),
        device=device,
    )
    if as_json:
        print_json(result)
        return
    show(display.needles(result))


def bench(
    models: Annotated[list[str], typer.Argument(help="Checkpoints of any kind.")],
    against: Annotated[str | None, option(Timing, "against")] = None,
    engine: Annotated[list[str] | None, option(Timing, "engines", "--engine", more="Repeatable.", values=TIMED)] = None,
    tokens: Annotated[int, count(Timing, "tokens")] = 128,
    prompt: Annotated[int, count(Timing, "prompt")] = 512,
    batch: Annotated[str | None, option(Timing, "batch", show_default="1")] = None,
    context: Annotated[str | None, option(Timing, "context", show_default="the prompt alone")] = None,
    repeats: Annotated[int, count(Timing, "repeats")] = 5,
    threads: Annotated[int | None, count(Timing, "threads")] = None,
    activations: Annotated[
        list[str] | None,
        option(Timing, "activations", more="Repeatable.", values=("exact", "int8"), show_default="exact"),
    ] = None,
    card: Annotated[bool, option(Timing, "card", "--card")] = False,
    device: Device = AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """How fast is it, and why? Prefill, decoding, first token, memory: each engine in a process of its own, in turn.

    halfbyte bench model-int4 --against org/model
    """
    batches = _numbers("batch", batch) if batch is not None else [1]
    contexts = _numbers("context", context) if context is not None else None
    names = [timed_named(name) for name in engine or ()]
    require_located(*models, *([against] if against else []))
    from halfbyte import api

    result = api.bench(
        models,
        against,
        names,
        tokens,
        prompt,
        batches,
        contexts,
        repeats,
        threads,
        activations or ["exact"],
        card,
        progress=not (quiet or as_json),
        device=device,
    )
    if as_json:
        print_json(result)
        return
    show(display.timed(result))


def _numbers(option: str, words: str) -> list[int]:
    """Such as 1,4. Raises BadRequest for what is no list of numbers."""
    numbers = [int(word) for word in words.split(",") if word.strip().isdecimal()]
    if len(numbers) != len(words.split(",")):
        raise BadRequest(f"--{option} takes numbers, such as 1,4, not '{words}'")
    return numbers


def blame(
    model: Annotated[str, typer.Argument(help="A quantized checkpoint.")],
    against: Against,
    text: Annotated[str, option(Measuring, "text")] = "heldout",
    length: Length = 512,
    windows: Annotated[int, count(Blaming, "windows")] = 8,
    blocks: Annotated[int, count(Blaming, "blocks")] = 3,
    worst: Annotated[int, typer.Option(min=1, help="How many parts to list.")] = 10,
    adapter: MergedAdapter = None,
    foreign: Foreign = False,
    device: Device = AUTO,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Which part broke it? Each is put back as it was, and what that gives back is ranked.

    halfbyte blame model-int4 --against org/model
    """
    require_located(model, against)
    from halfbyte.api import blame as run

    result = run(
        model, against, text, length, windows, blocks, adapter, foreign, progress=not (quiet or as_json), device=device
    )
    if as_json:
        print_json(result)
        return
    out.print(f"{plural(result.windows, 'window')} of {length} tokens of {text}")
    show(display.blamed(result, worst))


def demo(
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows of 512 tokens.")] = 12,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows of 512 tokens.")] = 6,
    keep: Annotated[Path | None, typer.Option(help="Keep the quantized folders here.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Quantize the embedded model with several methods and print what each one lost. Works offline.

    halfbyte demo
    """
    from halfbyte.demonstration import rows

    with tempfile.TemporaryDirectory() as scratch, shown(not (quiet or as_json)) as progress:
        table_rows = rows(keep or Path(scratch), samples, windows, progress)
    if as_json:
        print_json(table_rows)
        return
    show(display.demonstrated(table_rows))
