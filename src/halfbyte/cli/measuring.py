"""Commands that measure what was lost."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from halfbyte import display
from halfbyte.cli.options import CACHES, Adapter, Device, Foreign, Json, Quiet, completing, require_caches
from halfbyte.cli.output import out, print_json, show, show_measured
from halfbyte.devices import AUTO
from halfbyte.errors import BadRequest, plural
from halfbyte.evaluation.conventions import CONVENTIONS, convention_named
from halfbyte.evaluation.suites.suite import ALL, SHIPPED, suites
from halfbyte.progress import shown
from halfbyte.recipe import SHORTEST
from halfbyte.report.gate import MEASURES, as_words, limits, shared_out

GATE_BROKEN = 1
"""Exit code."""


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
            "measured one by one, and may have names, such as de=news.txt.",
            show_default="heldout, unless a suite or tasks are named",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Prompts with a check each, answered greedily by both: {', '.join(SHIPPED)}, {ALL}, or a .jsonl of "
            "your own; repeatable."
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="The most that an answer in a suite has.", show_default="each prompt's own limit"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, such as arc_easy,hellaswag,gsm8k,ifeval,mmlu (halfbyte\\[tasks])."),
    ] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own, as lm-eval's YAML; they run offline.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.", show_default="all")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each item.", show_default="as the task says")
    ] = None,
    as_chat: Annotated[bool, typer.Option("--as-chat", help="Put tasks through the model's chat template.")] = False,
    run_code: Annotated[
        bool,
        typer.Option("--run-code", help="Let tasks such as humaneval execute what the models write, on this machine."),
    ] = False,
    length: Annotated[int, typer.Option(min=SHORTEST, help="Tokens in a window.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="Use only the first N windows.")] = None,
    convention: Annotated[
        str,
        typer.Option(
            help=". ".join(f"{c.name}: {c.about}" for c in CONVENTIONS.values()),
            autocompletion=completing(*CONVENTIONS),
        ),
    ] = "served",
    kv: Annotated[
        list[str] | None,
        typer.Option(
            help="Run the models with this KV cache: fp8-e4m3, int8, int4 ..., none for 16 bits; repeatable.",
            show_default="as stored",
            autocompletion=completing(*CACHES),
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
            + ".",
            autocompletion=completing(*(f"{name}=" for name in MEASURES)),
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
    texts = text or ([] if (suite or tasks) and not of_text else ["heldout"])
    from halfbyte import api
    from halfbyte.report.types import Evaluation, StatesEvaluation, SuiteEvaluation, TaskEvaluation

    common = {
        "kv": kv or ["stored"],
        "adapter": adapter,
        "foreign": foreign,
        "progress": not (quiet or as_json),
        "device": device,
    }
    results: list[Evaluation | StatesEvaluation | SuiteEvaluation | TaskEvaluation] = []
    for name in texts:
        asked = {"length": length, "windows": windows, "convention": convention, "noise_floor": noise_floor}
        results.append(api.evaluate(models, against, name, **asked, **common, gate=as_words(of_text)))
    if suite:
        results.append(api.suite(models, against, suite, tokens, **common, gate=as_words(of_answers)))
    if tasks:
        names = [name.strip() for name in tasks.split(",")]
        how = {"folder": task_path, "limit": limit, "shots": shots, "as_chat": as_chat, "runs_code": run_code}
        results.append(api.tasks(models, against, names, **how, **common, gate=as_words(of_answers)))
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
        typer.Option(
            help="Run the models with this KV cache, as in eval; repeatable.",
            show_default="as stored",
            autocompletion=completing(*CACHES),
        ),
    ] = None,
    adapter: Adapter = None,
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
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Which part broke it? Each is put back as it was, and what that gives back is ranked.

    halfbyte blame model-int4 --against org/model
    """
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
