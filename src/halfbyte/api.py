"""The public functions: what the command line calls, and nothing more."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from halfbyte import demo, pipeline
from halfbyte.budget.budget import Budget
from halfbyte.containers.place import one_file
from halfbyte.devices import AUTO, device_named, title
from halfbyte.engines.engines import ENGINES
from halfbyte.errors import BadRequest, HalfbyteError, require_at_least
from halfbyte.evaluation.conventions import convention_named
from halfbyte.evaluation.suites.suite import suites as read_suites
from halfbyte.files import exists
from halfbyte.models import adapter as adapters
from halfbyte.models import calibrate, heads
from halfbyte.models.calibrate import Samples
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.placement import Placement
from halfbyte.models.stamp import origin
from halfbyte.models.texts import named
from halfbyte.pipeline import convert, dequantize
from halfbyte.progress import Progress, shown
from halfbyte.publish import push
from halfbyte.recipe import METHODS, SHORTEST, Calibration, CalibrationWords, Recipe, meaning
from halfbyte.registry import IMPORTANCE
from halfbyte.report import lineage, measured, written
from halfbyte.report.compare import compare
from halfbyte.report.gate import limits, shared_out
from halfbyte.report.inspect import inspect
from halfbyte.report.types import (
    Blame,
    CacheReport,
    Evaluation,
    ImatrixReport,
    Needle,
    Plan,
    Report,
    StatesEvaluation,
    SuiteEvaluation,
    TaskEvaluation,
)
from halfbyte.sizing import advice
from halfbyte.sizing.question import question
from halfbyte.sizing.types import Advice
from halfbyte.targets.table import TARGETS

Function = TypeVar("Function", bound=Callable[..., Any])

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def _with_entries(function: Function) -> Function:
    """Its documentation, with a line for each entry of a recipe."""
    names = {"method": METHODS, "to": TARGETS, "engine": ENGINES}
    more = {name: f" One of {', '.join(table)}." for name, table in names.items()}
    more["calibration"] = f" {meaning('source', Calibration)} Or a Calibration: {', '.join(Calibration.model_fields)}."
    lines = [f"{name}: {meaning(name)}{more.get(name, '')}" for name in Recipe.model_fields if name != "model"]
    function.__doc__ = (function.__doc__ or "").replace("{entries}", "\n        ".join(lines))
    return function


@_with_entries
def quantize(
    model: str | Path | Recipe,
    out: str | Path,
    *,
    method: str | None = None,
    grid: str | None = None,
    to: str | None = None,
    engine: str | None = None,
    adapter: str | Path | None = None,
    requantize: bool | None = None,
    calibration: CalibrationWords | None = None,
    observer: str | None = None,
    kv: str | None = None,
    alpha: float | None = None,
    smaller_groups: bool | None = None,
    skip: str | Sequence[str] | None = None,
    override: Mapping[str, str] | None = None,
    head: bool | None = None,
    pure: bool | None = None,
    imatrix: str | Path | None = None,
    pre: str | None = None,
    repository: str | None = None,
    shard_gb: float | None = None,
    bits: float | None = None,
    size: str | int | None = None,
    fit: str | int | None = None,
    max_kl: float | None = None,
    context: int | None = None,
    candidates: str | Sequence[str] | None = None,
    sensitivities: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> Report | Plan:
    """Quantize `model` (a folder, a GGUF, a hub id, or a whole Recipe) into `out`, a folder or a .gguf file.

    Returns the report, which is also written there. What is None is as the recipe has it, or the default of `Recipe`.

    Args:
        {entries}
        bits: In place of a grid: choose each weight's, so that least is lost with so many bits per parameter.
        size: ... with files of this size, such as "3.7GB", or bytes.
        fit: ... with as much as fits into this memory beside a cache.
        context: Tokens of that cache; by default 8192, or as many as the model is made for if these are fewer.
        max_kl: ... or so that the output is smallest with this predicted KL divergence, in nats per token.
        candidates: Grids to choose among; by default those that the engine reads.
        sensitivities: The file of what each weight costs, which other budgets read; by default beside the output.
        overwrite: Replace an output that exists.
        dry_run: Return the plan, and write nothing.
        progress: True for a bar, or a function of (what, done, total).
        device: What solves and runs the model: auto (a GPU where there is one), cpu, cuda, cuda:1, mps or xpu.

    Raises:
        HalfbyteError: with nothing half-written left behind.
    """
    chosen = device_named(device)
    given = {
        name: value
        for name, value in locals().items()
        if name in Recipe.model_fields and name != "model" and value is not None
    }
    asked = model.model_dump(exclude_unset=True) if isinstance(model, Recipe) else {"model": str(model)}
    recipe = Recipe.of(
        **{**asked, **{name: str(value) if isinstance(value, Path) else value for name, value in given.items()}}
    )
    found = None
    if budget := Budget.of(bits, size, fit, max_kl, context, candidates, sensitivities):
        with shown(progress) as show:
            recipe, found, _ = pipeline.within(budget, recipe, out, overwrite, show, chosen)
    if dry_run:
        return pipeline.plan(recipe, out, overwrite=overwrite, budget=found, device=chosen)
    if recipe.method == "convert":
        if recipe.to is None:
            raise BadRequest(f"method convert needs a container in the recipe's entry 'to': {', '.join(TARGETS)}")
        rounded = recipe.grid if "grid" in recipe.model_fields_set else None
        return convert(recipe.model, out, recipe.to, rounded, recipe.engine, overwrite, progress)
    if recipe.method == "dequantize":
        return dequantize(recipe.model, out, recipe.to, recipe.grid, recipe.adapter, overwrite, progress)
    with shown(progress) as show:
        return pipeline.quantize(recipe, out, overwrite=overwrite, progress=show, device=chosen, budget=found)


def advise(
    model: str | Path,
    *,
    device: str | None = None,
    memory: str | int | None = None,
    engine: str | None = None,
    cards: int = 1,
    context: int | None = None,
    batch: int = 1,
    cache: str = "16 bits",
) -> Advice:
    """What to make of `model` (a folder, a GGUF, or a hub id, of which only headers are downloaded), and what fits.

    `device`: a row of `halfbyte devices`, by default what is here; `memory`: instead of one, such as "24GiB". `engine`:
    by default the usual one for the device. `cards`, `context` (tokens of a sequence), `batch` (sequences at a time)
    and `cache` (what it is stored as: 16 bits, fp8, int8-token-head, int4-token-head, nvfp4, q8_0, q4_0) are what is to
    run on it. Sizes are bytes; what is not known is None. Raises HalfbyteError.
    """
    return advice.advise(str(model), question(engine, device, memory, cards, context, batch, cache))


def evaluate(
    models: str | Path | Sequence[str | Path],
    against: str | Path,
    text: str = "heldout",
    length: int = 512,
    windows: int | None = None,
    convention: str = "served",
    kv: str | Sequence[str] = ("stored",),
    adapter: str | Path | None = None,
    foreign: bool = False,
    noise_floor: bool = False,
    gate: str | None = None,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> Evaluation | StatesEvaluation:
    """Perplexity of `against` and `models`, and how far each of `models` diverges from it, on the same tokens; of
    models that predict no tokens (reward, embedding), how far their last hidden states are from those of `against`.
    `compared` says which.

    `text`: a file, a dataset, or "heldout", the embedded text; with a name of its own, such as its language, as
    "de=news.txt". `convention`: how it becomes windows and scored
    positions, a key of `halfbyte.evaluation.conventions.CONVENTIONS`: "served", each window begins as the tokenizer
    begins a text; "papers", none does; "llama.cpp". `kv`: caches to run each model with; "stored" is the one that it
    says it has, "none" one of 16 bits. `adapter`: the folder of a LoRA adapter that is merged into `against`. The
    result is also put into each model's report.json, beside those of other conditions; its card shows the longest
    against the source.

    `foreign`: compare a model with another than its report names as its source too, or with one whose tokenizer has
    other tokens; else that raises BadRequest. The card never shows such a comparison. `noise_floor`: measure the
    original in bfloat16 against itself, too. `gate`: limits such as "kl=0.05,flips=2%", of
    `halfbyte.report.gate.MEASURES`; `gates` of the result says which hold. `device`: what runs the models, as in
    `quantize`.
    """
    _require_windows(length, windows)
    name, text = named(text)
    chosen, (held_to, _) = device_named(device), shared_out(limits(gate) if gate else [], answers=False)
    from halfbyte.evaluation import classes, divergence, states
    from halfbyte.kv_cache import with_cache

    rule = convention_named(convention)
    reference = _reference(against, adapter)
    kinds = [(model, kind) for model in _several(models) for kind in ([kv] if isinstance(kv, str) else kv)]
    strangers = _strangers(reference, _several(models), foreign)
    placement = Placement.on(chosen)
    with shown(progress) as show:
        checkpoints = [reference, *(with_cache(model, kind, show, placement) for model, kind in kinds)]
        taken = calibrate.evaluation(reference, _text(text), length, windows, rule.begin)
        predicts = states.predicts(checkpoints)
        if not predicts and (noise_floor or held_to):
            raise BadRequest(
                f"{reference.path} predicts no tokens: its last hidden states are compared, which have no noise floor "
                "and no gates"
            )
        if predicts:
            rows = divergence.compare(
                checkpoints,
                taken.tokens,
                rule.first_scored(length, len(taken.stream.opening)),
                progress=show,
                placement=placement,
                noise_floor=noise_floor,
                classes=classes.of(calibrate.tokenizer_of(reference), taken.tokens),
            )
        else:
            rows = states.compare(checkpoints, taken.tokens, progress=show, placement=placement)
    conditions = {"text_name": name, **_conditions(text, taken, rule.name, chosen, reference)}
    floor = rows.pop() if noise_floor else None
    result = measured.evaluation(conditions, checkpoints, rows, predicts, floor, held_to)
    return result.model_copy(update={"warnings": measured.record(result, kinds, strangers)})


def needle(
    models: str | Path | Sequence[str | Path],
    against: str | Path,
    text: str = "heldout",
    lengths: Sequence[int] = (256, 512, 1024),
    depths: int = 5,
    facts: int = 8,
    seed: int = 0,
    kv: str | Sequence[str] = ("stored",),
    adapter: str | Path | None = None,
    foreign: bool = False,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> Needle:
    """How well `against` and `models` read back a fact that is planted in texts of these lengths, at `depths` places
    from beginning to end.

    For each length and depth: `gain`, how much likelier its having been told makes the answer, in nats per token;
    `found`, the share of answers that greedy decoding gives. `kv`, `adapter`, `foreign` and `device` are as in
    `evaluate`. The result is also written into each model's report.json.
    """
    require_at_least(1, depths=depths, facts=facts)
    require_at_least(0, seed=seed)
    chosen = device_named(device)
    from halfbyte.evaluation.needle import measure
    from halfbyte.kv_cache import with_cache

    reference = _reference(against, adapter)
    kinds = [(model, kind) for model in _several(models) for kind in ([kv] if isinstance(kv, str) else kv)]
    strangers = _strangers(reference, _several(models), foreign)
    placement = Placement.on(chosen)
    with shown(progress) as show:
        checkpoints = [with_cache(model, kind, show, placement) for model, kind in kinds]
        rows = measure(
            [reference, *checkpoints],
            _text(text),
            lengths,
            depths,
            facts,
            seed,
            show,
            placement,
        )
    conditions = {
        "text": text,
        "lengths": list(lengths),
        "depths": depths,
        "facts": facts,
        "seed": seed,
        "device": title(chosen),
        **_about(reference),
    }
    result = measured.needle(conditions, [reference, *checkpoints], rows)
    return result.model_copy(update={"warnings": measured.record_needle(result, kinds, strangers)})


def suite(
    models: str | Path | Sequence[str | Path],
    against: str | Path,
    suites: str | Path | Sequence[str | Path] = "all",
    tokens: int | None = None,
    kv: str | Sequence[str] = ("stored",),
    adapter: str | Path | None = None,
    foreign: bool = False,
    gate: str | None = None,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> SuiteEvaluation:
    """What averages hide: prompts with a check each, answered greedily by `against` and by `models`, side by side.

    `suites`: names of `halfbyte.evaluation.suites.suite.SHIPPED`, "all" of these, or JSONL files, each line of which
    has a prompt and a check of `halfbyte.evaluation.suites.checks.CHECKS`. `tokens`: the most that an answer has, in
    place of each prompt's own limit. `gate`: limits such as "flips=2%,lost=1%". `kv`, `adapter`, `foreign` and `device`
    are as in `evaluate`. One whole model is in memory at a time, in float32 where there is room. The result is also
    written into each model's report.json. Raises HalfbyteError.
    """
    if tokens is not None:
        require_at_least(1, tokens=tokens)
    chosen, (odd, held_to) = device_named(device), shared_out(limits(gate) if gate else [], answers=True)
    if odd:
        raise BadRequest(f"{odd[0].name} is measured on a text, not on answers: leave it to halfbyte.evaluate")
    asked = read_suites(suites)
    from halfbyte.evaluation.suites.measure import measure
    from halfbyte.evaluation.whole import require_answers
    from halfbyte.kv_cache import with_cache

    reference = _reference(against, adapter)
    kinds = [(model, kind) for model in _several(models) for kind in ([kv] if isinstance(kv, str) else kv)]
    strangers = _strangers(reference, _several(models), foreign)
    with shown(progress) as show:
        checkpoints = [with_cache(model, kind, show, Placement.on(chosen)) for model, kind in kinds]
        require_answers([reference, *checkpoints])
        found = measure([reference, *checkpoints], asked, tokens, chosen, show)
    conditions = {
        "files": [{"name": one.name, "sha256": one.digest} for one in asked],
        "tokens": tokens,
        "device": title(chosen),
        "dtype": str(found.dtype).removeprefix("torch."),
        **_about(reference),
    }
    result = measured.suites(conditions, checkpoints, found.models, held_to)
    warnings = [*found.warnings, *measured.record_answers(result, kinds, strangers)]
    return result.model_copy(update={"warnings": warnings})


def tasks(
    models: str | Path | Sequence[str | Path],
    against: str | Path,
    tasks: str | Sequence[str],
    folder: str | Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    as_chat: bool = False,
    runs_code: bool = False,
    kv: str | Sequence[str] = ("stored",),
    adapter: str | Path | None = None,
    foreign: bool = False,
    gate: str | None = None,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> TaskEvaluation:
    """Tasks of lm-eval (`pip install 'halfbyte[tasks]'`), such as "gsm8k", by `against` and by `models`, compared item
    by item.

    `folder`: with tasks of your own, as lm-eval's YAML; all others take their data from the hub. `limit`: items of each
    task. `shots`: examples before each, by default as many as the task says. `as_chat`: put them through the model's
    chat template. `runs_code`: let tasks such as humaneval execute what the models write, on this machine. All else is
    as in `suite`. The result is also written into each model's report.json. Raises HalfbyteError.
    """
    for name, count in {"limit": limit, "shots": shots}.items():
        if count is not None:
            require_at_least(1 if name == "limit" else 0, **{name: count})
    chosen, (odd, held_to) = device_named(device), shared_out(limits(gate) if gate else [], answers=True)
    if odd:
        raise BadRequest(f"{odd[0].name} is measured on a text, not on answers: leave it to halfbyte.evaluate")
    from halfbyte.evaluation import tasks as of_lm_eval
    from halfbyte.evaluation.whole import require_answers
    from halfbyte.kv_cache import with_cache

    of_lm_eval.require_installed()
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    place = Path(folder).expanduser() if folder is not None else None
    asked = of_lm_eval.Asked(names, place, limit, shots, as_chat, runs_code)
    reference = _reference(against, adapter)
    kinds = [(model, kind) for model in _several(models) for kind in ([kv] if isinstance(kv, str) else kv)]
    strangers = _strangers(reference, _several(models), foreign)
    with shown(progress if callable(progress) else False) as show:
        checkpoints = [with_cache(model, kind, show, Placement.on(chosen)) for model, kind in kinds]
        require_answers([reference, *checkpoints])
        rows, dtype, version = of_lm_eval.measure([reference, *checkpoints], asked, chosen, show, progress is True)
    conditions = {
        "lm_eval": version,
        "limit": limit,
        "shots": shots,
        "as_chat": as_chat,
        "device": title(chosen),
        "dtype": str(dtype).removeprefix("torch."),
        **_about(reference),
    }
    result = measured.tasks(conditions, checkpoints, rows, held_to)
    return result.model_copy(update={"warnings": measured.record_answers(result, kinds, strangers)})


def blame(
    model: str | Path,
    against: str | Path,
    text: str = "heldout",
    length: int = 512,
    windows: int | None = 8,
    blocks: int = 3,
    adapter: str | Path | None = None,
    foreign: bool = False,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> Blame:
    """Which part of a quantized `model` costs what: each block, the embedding, the head and the KV cache are put back
    as `against` has them, one at a time, and what that takes off the KL divergence is measured; then each weight of
    those `blocks` that gave back most.

    Weights that share a scale (of awq or smoothquant) are put back together. Parts need not add up to the whole.
    `text`, `length`, `windows`, `adapter`, `foreign` and `device` are as in `evaluate`. The result is also written into
    the model's report.json. Raises HalfbyteError.
    """
    _require_windows(length, windows)
    require_at_least(0, blocks=blocks)
    chosen = device_named(device)
    from halfbyte.evaluation import states
    from halfbyte.evaluation.blame import blame as measure

    rule = convention_named("served")
    reference, checkpoint = _reference(against, adapter), heads.settled(Checkpoint.open(model))
    strangers = _strangers(reference, [model], foreign)
    taken = calibrate.evaluation(reference, _text(text), length, windows, rule.begin)
    if not states.predicts([reference, checkpoint]):
        raise BadRequest(f"{checkpoint.path} predicts no tokens, and predictions are what blame compares")
    with shown(progress) as show:
        found = measure(
            checkpoint,
            reference,
            taken.tokens,
            rule.first_scored(length, len(taken.stream.opening)),
            blocks,
            measured.folds(checkpoint),
            show,
            Placement.on(chosen),
        )
    result = measured.blame(_conditions(text, taken, rule.name, chosen, reference), checkpoint, found)
    unwritten = [] if strangers else written.add(checkpoint.path, blame=result)
    return result.model_copy(update={"warnings": unwritten})


def _require_windows(length: int, windows: int | None) -> None:
    require_at_least(SHORTEST, length=length)
    if windows is not None:
        require_at_least(1, windows=windows)


def _several(paths: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    """One stands for a list of it: a text is a sequence too, of letters."""
    return [paths] if isinstance(paths, str | Path) else paths


def _text(name: str) -> str:
    return str(demo.HELDOUT) if name == "heldout" else name


def _conditions(
    text: str, taken: Samples, convention: str, device: "torch.device", reference: Checkpoint
) -> dict[str, Any]:
    """Of a measurement, for the report."""
    return {
        "text": text,
        "length": taken.tokens.shape[1],
        "windows": len(taken.tokens),
        "tokens_sha256": taken.digest,
        "convention": convention,
        "device": title(device),
        "opening": list(taken.stream.opening_words),
        **_about(reference),
    }


def _reference(against: str | Path, adapter: str | Path | None) -> Checkpoint:
    reference = heads.settled(Checkpoint.open(against))
    return adapters.merged(reference, adapter) if adapter else reference


def _about(reference: Checkpoint) -> dict[str, Any]:
    """For the report."""
    merged = str(reference.adapter.path) if reference.adapter else None
    return {"reference_path": str(reference.path), "reference_adapter": merged, "reference_xxh3_128": origin(reference)}


def _strangers(reference: Checkpoint, models: Sequence[str | Path], foreign: bool) -> set[str | Path]:
    """Those of the models that were made of another than this reference, or have other tokens, if that was asked for.

    Raises BadRequest where it was not, and for models whose predictions cannot be compared at all.
    """
    from halfbyte.evaluation import vocabulary

    found, given = set(), lineage.told(reference.path, reference.adapter and reference.adapter.path)
    for model in models:
        checkpoint = Checkpoint.open(model)
        if checkpoint.text_config.get("vocab_size") != reference.text_config.get("vocab_size"):
            raise BadRequest(
                f"{checkpoint.path} and {reference.path} have different vocabularies; their predictions cannot be "
                "compared"
            )
        reasons = []
        if source := lineage.stranger(checkpoint.path, reference):
            reasons.append(f"{checkpoint.path} was made of {source}, as its report says, and not of {given}")
        if odd := vocabulary.difference(reference, checkpoint):
            reasons.append(f"the tokenizers differ: {odd}; predictions of other tokens cannot be compared")
        if reasons and not foreign:
            raise BadRequest(
                f"{reasons[0]}; name the source, or compare them all the same with --foreign (foreign=True)"
            )
        if reasons:
            found.add(model)
    return found


def kv(
    model: str | Path,
    out: str | Path,
    grid: str = "fp8-e4m3",
    calibration: CalibrationWords | None = None,
    observer: str = "max",
    overwrite: bool = False,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> CacheReport:
    """Write a checkpoint, quantized or not, into `out` with the scales of a quantized KV cache; returns its report.

    `grid`: fp8-e4m3, or fp8-e4m3-head with a scale for each head. `calibration` and `observer`: as in `quantize`.
    Raises HalfbyteError.
    """
    from halfbyte.kv_cache import attach

    chosen = device_named(device)
    with shown(progress) as show:
        return attach(model, out, grid, Calibration.of(calibration), observer, overwrite, show, chosen)


def imatrix(
    model: str | Path,
    out: str | Path,
    calibration: CalibrationWords | None = None,
    overwrite: bool = False,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> ImatrixReport:
    """Measure an importance matrix of a model and write it in llama.cpp's format; returns what was measured.

    `calibration`: as in `quantize`. Raises HalfbyteError.
    """
    importance = import_module(IMPORTANCE)  # needs the model's code
    chosen, out, asked = device_named(device), Path(out).expanduser(), Calibration.of(calibration)
    checkpoint = Checkpoint.open(model)
    with one_file(out, overwrite) as partial:
        windows = calibrate.calibration(checkpoint, asked)
        with shown(progress) as show:
            found = importance.measure(checkpoint, windows, show, Placement.on(chosen))
        importance.write(partial, found)
    return ImatrixReport(path=str(out), matrices=len(found.tensors), device=title(chosen), **windows.about)


def page(
    runs: str | Path | Sequence[str | Path],
    out: str | Path,
    overwrite: bool = False,
    device: str | None = None,
    engine: str | None = None,
) -> None:
    """Write one page, for a browser, of what the reports of any number of outputs say. It needs no network.

    `device` and `engine`: where what `advise` says of the runs' models is for, by default what is here; of models that
    are not here any more it says nothing. Charts are Vega-Lite's, which `halfbyte[report]` brings. Raises
    HalfbyteError.
    """
    from halfbyte.report import page as pages

    asked, outputs, plans = question(engine, device), [Path(run).expanduser() for run in _several(runs)], []
    for path in dict.fromkeys(run.report.source.path for run in pages.reports(outputs)):
        if exists(Path(path)):
            with suppress(HalfbyteError):  # something else may lie there by now
                plans.append(advice.advise(path, asked))
    text = pages.page(outputs, plans)
    with one_file(Path(out).expanduser(), overwrite) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def load(
    path: str | Path, dtype: "torch.dtype | str | None" = None, device: "torch.device | str" = "cpu"
) -> "PreTrainedModel":
    """Any checkpoint that halfbyte reads, as a Transformers model that runs; quantized linears stay packed."""
    from halfbyte import nn

    return nn.load(path, dtype, device)


__all__ = [
    "advise",
    "blame",
    "compare",
    "convert",
    "dequantize",
    "evaluate",
    "imatrix",
    "inspect",
    "kv",
    "load",
    "needle",
    "page",
    "push",
    "quantize",
    "suite",
    "tasks",
]
