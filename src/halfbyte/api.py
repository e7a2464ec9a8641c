"""The public functions: what the command line calls, and nothing more."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import pipeline
from halfbyte.against import Against, conditions, several, text_named
from halfbyte.arguments import (
    Answering,
    Blaming,
    Caching,
    Evaluating,
    Fitting,
    Measuring,
    Retrieving,
    Running,
    Talking,
    Timing,
    documented,
    require_counts,
    sentence,
)
from halfbyte.budget.budget import Budget
from halfbyte.containers.place import one_file
from halfbyte.devices import AUTO, device_named, title
from halfbyte.engines.engines import timed_named
from halfbyte.errors import BadRequest, HalfbyteError, require_at_least
from halfbyte.evaluation.conventions import convention_named
from halfbyte.evaluation.suites.suite import suites as read_suites
from halfbyte.files import exists
from halfbyte.formats import Activations
from halfbyte.inference.sampling import Sampling
from halfbyte.inference.types import Answer
from halfbyte.models import calibrate, heads
from halfbyte.models.calibrate import Samples
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.placement import Placement
from halfbyte.models.texts import named
from halfbyte.pipeline import convert, dequantize
from halfbyte.progress import Progress, shown
from halfbyte.publish import push
from halfbyte.recipe import OTHER_COMMANDS, Calibration, CalibrationWords, Recipe
from halfbyte.registry import IMPORTANCE
from halfbyte.report import measured, written
from halfbyte.report.compare import compare
from halfbyte.report.gate import Limit, about_measures, limits, shared_out
from halfbyte.report.inspect import inspect
from halfbyte.report.types import (
    Blame,
    CacheReport,
    Evaluation,
    ImatrixReport,
    Needle,
    Plan,
    Report,
    Speeds,
    StatesEvaluation,
    SuiteEvaluation,
    TaskEvaluation,
)
from halfbyte.sizing import advice
from halfbyte.sizing.accounting import ACCOUNTINGS
from halfbyte.sizing.cache import TYPES
from halfbyte.sizing.question import question
from halfbyte.sizing.types import Advice
from halfbyte.targets.table import TARGETS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


SAMPLING = f"{sentence('source', Calibration)} Or a Calibration: {', '.join(Calibration.model_fields)}."
SEVERAL = "One, or a list."
CACHES = 'One, or a list; "stored" is the one that a model says it has.'
OTHERWISE = "Else that raises BadRequest. A card never shows such a comparison."


@documented(
    Recipe,
    Budget,
    Running,
    calibration=SAMPLING,
    dry_run="Returns the plan.",
    size="A number is of bytes.",
)
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
    sensitivity: str | None = None,
    sensitivities: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> Report | Plan:
    """Quantize `model` (a folder, a GGUF, a hub id, or a whole Recipe) into `out`, a folder or a .gguf file.

    Returns the report, which is also written there. What is None is as the recipe has it, or the default of `Recipe`.

    Args:
        {arguments}

    Raises:
        HalfbyteError: with nothing half-written left behind.
    """
    named = {name: value for name, value in locals().items() if name in Recipe.model_fields and name != "model"}
    recipe = _recipe(model, named)
    chosen, report_of_budget = device_named(device), None
    if budget := Budget.of(bits, size, fit, max_kl, context, candidates, sensitivity, sensitivities):
        with shown(progress) as show:
            recipe, report_of_budget, _ = pipeline.within(budget, recipe, out, overwrite, show, chosen)
    if dry_run:
        return pipeline.plan(recipe, out, overwrite=overwrite, budget=report_of_budget, device=chosen)
    if recipe.method in OTHER_COMMANDS:
        return _rewrite(recipe, out, overwrite, progress)
    with shown(progress) as show:
        return pipeline.quantize(
            recipe, out, overwrite=overwrite, progress=show, device=chosen, budget=report_of_budget
        )


def _recipe(model: str | Path | Recipe, entries: Mapping[str, Any]) -> Recipe:
    """A recipe with these words; those that are None are as it has them."""
    base = model.model_dump(exclude_unset=True) if isinstance(model, Recipe) else {"model": str(model)}
    given = {name: str(word) if isinstance(word, Path) else word for name, word in entries.items() if word is not None}
    return Recipe.of(**{**base, **given})


def _rewrite(recipe: Recipe, out: str | Path, overwrite: bool, progress: Progress | bool) -> Report:
    """What another command made, again."""
    if recipe.method == "dequantize":
        return dequantize(recipe.model, out, recipe.to, recipe.grid, recipe.adapter, overwrite, progress)
    if recipe.to is None:
        raise BadRequest(f"method convert needs a container in the recipe's entry 'to': {', '.join(TARGETS)}")
    grid = recipe.grid if "grid" in recipe.model_fields_set else None
    return convert(recipe.model, out, recipe.to, grid, recipe.engine, overwrite, progress)


@documented(Fitting, engine=f"One of {', '.join(ACCOUNTINGS)}.", cache=f"One of {', '.join(TYPES)}.")
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

    By default on this machine, with the engine that is usual for it. Sizes are bytes; what is not known is None.

    Args:
        {arguments}

    Raises:
        HalfbyteError: for what is no request.
    """
    return advice.advise(str(model), question(engine, device, memory, cards, context, batch, cache))


@documented(
    Evaluating,
    Running,
    text='With a name of its own, such as its language, as "de=news.txt".',
    kv=CACHES,
    foreign=OTHERWISE,
    gate=f"`gates` of the result says which hold. {about_measures()}",
)
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

    `compared` of the result says which. The result is also put into each model's report.json, beside those of other
    conditions; its card shows the longest against the source.

    Args:
        {arguments}

    Raises:
        HalfbyteError: for models that cannot be compared, among others.
    """
    require_counts(Evaluating, length=length, windows=windows)
    name, text = named(text)
    held_to, _ = shared_out(limits(gate) if gate else [], answers=False)
    rule = convention_named(convention)
    from halfbyte.evaluation import states

    compared = Against.of(models, against, kv, adapter, foreign, device)
    with shown(progress) as show:
        checkpoints = compared.checkpoints(show)
        taken = calibrate.evaluation(compared.reference, text_named(text), length, windows, rule.begin)
        predicts = states.predicts(checkpoints)
        if predicts:
            first = rule.first_scored(length, len(taken.stream.opening))
            rows = _divergences(checkpoints, taken, first, noise_floor, show, compared.placement)
        elif noise_floor or held_to:
            raise BadRequest(
                f"{compared.reference.path} predicts no tokens: its last hidden states are compared, which have no "
                "noise floor and no gates"
            )
        else:
            rows = states.compare(checkpoints, taken.tokens, progress=show, placement=compared.placement)
    asked = {"text_name": name, **conditions(text, taken, rule.name), **compared.about}
    floor = rows.pop() if noise_floor else None
    result = measured.evaluation(asked, checkpoints, rows, predicts, floor, held_to)
    return result.model_copy(update={"warnings": measured.record(result, compared.asked, compared.strangers)})


def _divergences(
    checkpoints: Sequence[Checkpoint],
    taken: Samples,
    first: int,
    noise_floor: bool,
    progress: Progress,
    placement: Placement,
) -> list[dict[str, Any]]:
    """Measures of each; positions from `first` on are scored."""
    from halfbyte.evaluation import classes, divergence

    return divergence.compare(
        checkpoints,
        taken.tokens,
        first,
        progress=progress,
        placement=placement,
        noise_floor=noise_floor,
        classes=classes.of(calibrate.tokenizer_of(checkpoints[0]), taken.tokens),
    )


@documented(Retrieving, Running, text="The fact is hidden in it.", kv=CACHES, foreign=OTHERWISE)
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
    `found`, the share of answers that greedy decoding gives. The result is also written into each model's report.json.

    Args:
        {arguments}

    Raises:
        HalfbyteError: for models that cannot be compared, among others.
    """
    require_counts(Retrieving, depths=depths, facts=facts, seed=seed)
    from halfbyte.evaluation.needle import measure

    compared = Against.of(models, against, kv, adapter, foreign, device)
    with shown(progress) as show:
        checkpoints = compared.checkpoints(show)
        rows = measure(checkpoints, text_named(text), lengths, depths, facts, seed, show, compared.placement)
    asked = {"text": text, "lengths": list(lengths), "depths": depths, "facts": facts, "seed": seed}
    result = measured.needle({**asked, **compared.about}, checkpoints, rows)
    return result.model_copy(update={"warnings": measured.record_needle(result, compared.asked, compared.strangers)})


@documented(Answering, Running, kv=CACHES, foreign=OTHERWISE, suites=SEVERAL, gate=about_measures())
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

    Each line of a JSONL has a prompt and a check of `halfbyte.evaluation.suites.checks.CHECKS`. One whole model is in
    memory at a time, in float32 where there is room. The result is also written into each model's report.json.

    Args:
        {arguments}

    Raises:
        HalfbyteError: for models that cannot be compared, among others.
    """
    require_counts(Answering, tokens=tokens)
    held_to = _limits_of_answers(gate)
    asked = read_suites(suites)
    from halfbyte.evaluation.suites.measure import measure
    from halfbyte.evaluation.whole import require_answers

    compared = Against.of(models, against, kv, adapter, foreign, device)
    with shown(progress) as show:
        checkpoints = compared.checkpoints(show)
        require_answers(checkpoints)
        answers = measure(checkpoints, asked, tokens, compared.device, show)
    about = {
        "files": [{"name": one.name, "sha256": one.digest} for one in asked],
        "tokens": tokens,
        "dtype": str(answers.dtype).removeprefix("torch."),
        **compared.about,
    }
    result = measured.suites(about, checkpoints[1:], answers.models, held_to)
    warnings = [*answers.warnings, *measured.record_answers(result, compared.asked, compared.strangers)]
    return result.model_copy(update={"warnings": warnings})


@documented(Answering, Running, kv=CACHES, foreign=OTHERWISE, tasks=SEVERAL, gate=about_measures())
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

    Tasks that lie in no `folder` take their data from the hub. The result is also written into each model's
    report.json.

    Args:
        {arguments}

    Raises:
        HalfbyteError: for models that cannot be compared, among others.
    """
    require_counts(Answering, limit=limit, shots=shots)
    held_to = _limits_of_answers(gate)
    from halfbyte.evaluation import tasks as of_lm_eval
    from halfbyte.evaluation.whole import require_answers

    of_lm_eval.require_installed()
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    home = Path(folder).expanduser() if folder is not None else None
    asked = of_lm_eval.Asked(names, home, limit, shots, as_chat, runs_code)
    compared = Against.of(models, against, kv, adapter, foreign, device)
    with shown(progress if callable(progress) else False) as show:
        checkpoints = compared.checkpoints(show)
        require_answers(checkpoints)
        rows, dtype, version = of_lm_eval.measure(checkpoints, asked, compared.device, show, progress is True)
    how = {"lm_eval": version, "limit": limit, "shots": shots, "as_chat": as_chat}
    about = {**how, "dtype": str(dtype).removeprefix("torch."), **compared.about}
    result = measured.tasks(about, checkpoints[1:], rows, held_to)
    return result.model_copy(update={"warnings": measured.record_answers(result, compared.asked, compared.strangers)})


def _limits_of_answers(gate: str | None) -> Sequence[Limit]:
    """Raises BadRequest for limits of what is measured on a text."""
    (odd, held_to) = shared_out(limits(gate) if gate else [], answers=True)
    if odd:
        raise BadRequest(f"{odd[0].name} is measured on a text, not on answers: leave it to halfbyte.evaluate")
    return held_to


@documented(Blaming, Running, foreign=OTHERWISE)
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

    Weights that share a scale (of awq or smoothquant) are put back together. Parts need not add up to the whole. The
    result is also written into the model's report.json.

    Args:
        {arguments}

    Raises:
        HalfbyteError: for models that cannot be compared, among others.
    """
    require_counts(Blaming, length=length, blocks=blocks)
    require_counts(Measuring, windows=windows)
    from halfbyte.evaluation import states
    from halfbyte.evaluation.blame import blame as measure

    rule = convention_named("served")
    compared = Against.of(model, against, "stored", adapter, foreign, device)
    reference, checkpoint = compared.reference, heads.settled(Checkpoint.open(model))
    taken = calibrate.evaluation(reference, text_named(text), length, windows, rule.begin)
    if not states.predicts([reference, checkpoint]):
        raise BadRequest(f"{checkpoint.path} predicts no tokens, and predictions are what blame compares")
    first, folds = rule.first_scored(length, len(taken.stream.opening)), measured.folds(checkpoint)
    with shown(progress) as show:
        attribution = measure(checkpoint, reference, taken.tokens, first, blocks, folds, show, compared.placement)
    asked = {**conditions(text, taken, rule.name), **compared.about}
    result = measured.blame(asked, checkpoint, attribution)
    unwritten = [] if compared.strangers else written.add(checkpoint.path, blame=result)
    return result.model_copy(update={"warnings": unwritten})


@documented(Caching, Recipe, Running, calibration=SAMPLING)
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
    """Write `model`, a checkpoint that is quantized or not, into `out` with the scales of a quantized KV cache;
    returns its report.

    Args:
        {arguments}

    Raises:
        HalfbyteError: with nothing half-written left behind.
    """
    from halfbyte.kv_cache import attach

    chosen = device_named(device)
    with shown(progress) as show:
        return attach(model, out, grid, Calibration.of(calibration), observer, overwrite, show, chosen)


@documented(Recipe, Running, calibration=SAMPLING)
def imatrix(
    model: str | Path,
    out: str | Path,
    calibration: CalibrationWords | None = None,
    overwrite: bool = False,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> ImatrixReport:
    """Measure an importance matrix of `model` and write it to `out` in llama.cpp's format; returns what was measured.

    Args:
        {arguments}

    Raises:
        HalfbyteError: with nothing half-written left behind.
    """
    importance = import_module(IMPORTANCE)  # needs the model's code
    chosen, out, asked = device_named(device), Path(out).expanduser(), Calibration.of(calibration)
    checkpoint = Checkpoint.open(model)
    with one_file(out, overwrite) as partial:
        windows = calibrate.calibration(checkpoint, asked)
        with shown(progress) as show:
            matrix = importance.measure(checkpoint, windows, show, Placement.on(chosen))
        importance.write(partial, matrix)
    return ImatrixReport(path=str(out), matrices=len(matrix.tensors), device=title(chosen), **windows.about)


@documented(Fitting, Running)
def page(
    runs: str | Path | Sequence[str | Path],
    out: str | Path,
    overwrite: bool = False,
    device: str | None = None,
    engine: str | None = None,
) -> None:
    """Write one page, for a browser, of what the reports of `runs` (any number of outputs) say to `out`. It needs no
    network.

    `device` and `engine` are of the plans on it; of models that are not here any more there is none. Charts are
    Vega-Lite's, which `halfbyte[report]` brings.

    Args:
        {arguments}

    Raises:
        HalfbyteError: with nothing half-written left behind.
    """
    from halfbyte.report import page as pages

    asked, outputs, plans = question(engine, device), [Path(run).expanduser() for run in several(runs)], []
    sources = [run.report.source.path for run in pages.reports(outputs)]
    for path in {Path(source).resolve(): source for source in sources}.values():  # one plan of a model with two names
        if exists(Path(path)):
            with suppress(HalfbyteError):  # something else may lie there by now
                plans.append(advice.advise(path, asked))
    text = pages.page(outputs, plans)
    with one_file(Path(out).expanduser(), overwrite) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@documented(Talking, Sampling, Running)
def generate(
    model: str | Path,
    prompt: str,
    system: str | None = None,
    raw: bool = False,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    max_tokens: int | None = None,
    stop: str | Sequence[str] | None = None,
    context: int | None = None,
    dtype: str | None = None,
    activations: Activations = "exact",
    device: str = AUTO,
    said: Callable[[str], None] | None = None,
) -> Answer:
    """What `model`, a checkpoint of any kind that halfbyte reads, answers to `prompt`: through its chat template, if it
    has one.

    What is None of how tokens are chosen is as the model's generation_config.json says; where it says nothing, each
    token is the most likely one. `said` is called with each part of the text as it comes.

    Args:
        {arguments}

    Raises:
        HalfbyteError: for a model that does not fit in memory, before it is loaded, among others.
    """
    words = {name: value for name, value in locals().items() if name in Sampling.model_fields}
    words["stop"] = None if stop is None else several(stop)
    Sampling.of(words)
    from halfbyte.inference.answer import answer  # needs the model's code
    from halfbyte.inference.conversation import Conversation
    from halfbyte.inference.model import Answering

    opened = Answering.open(model, device, dtype, context, raw, activations)
    return answer(Conversation(opened, system), prompt, opened.sampling(words), said)


@documented(Timing, Running)
def bench(
    models: str | Path | Sequence[str | Path],
    against: str | Path | None = None,
    engines: str | Sequence[str] = (),
    tokens: int = 128,
    prompt: int = 512,
    batch: int | Sequence[int] = (1,),
    context: int | Sequence[int] | None = None,
    repeats: int = 5,
    threads: int | None = None,
    activations: str | Sequence[str] = ("exact",),
    card: bool = False,
    progress: Progress | bool = False,
    device: str = AUTO,
) -> Speeds:
    """How fast `models` run, and why: prefill and decoding in tokens a second, the time to the first token, peak memory
    and load time, in each engine, beside the bandwidth and the arithmetic of this machine.

    Each engine has a process of its own, which is warmed up; then all take turns. Prompts are tokens drawn at random:
    no tokenizer is needed.

    Args:
        {arguments}

    Raises:
        HalfbyteError: for a model that does not fit in memory and an engine that does not load one, before anything is
            timed, among others.
    """
    require_counts(Timing, tokens=tokens, prompt=prompt, repeats=repeats, threads=threads)
    batches, prompts = _counts("batch", batch), _counts("context", prompt if context is None else context)
    names = [timed_named(str(name)) for name in several(engines)]
    from halfbyte.inference.timing.bench import Asked  # needs the model's code
    from halfbyte.inference.timing.bench import bench as measure

    asked = Asked(batches, prompts, tokens, repeats, threads, device, [str(way) for way in several(activations)])
    original = None if against is None else Checkpoint.open(against)
    with shown(progress) as show:
        result = measure([Checkpoint.open(model) for model in several(models)], original, names, asked, show)
    unwritten = measured.record_speeds(result) if card else []
    return result.model_copy(update={"warnings": [*result.warnings, *unwritten]})


def _counts(name: str, value: int | Sequence[int]) -> list[int]:
    """One number or several. Raises BadRequest for none, and for what is no count."""
    counts = list(value) if isinstance(value, Sequence) else [value]
    if not counts:
        raise BadRequest(f"{name} is empty; give one number at least")
    for count in counts:
        require_at_least(1, **{name: count})
    return counts


def load(
    path: str | Path,
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str" = "cpu",
    activations: Activations | None = None,
) -> "PreTrainedModel":
    """The checkpoint at `path`, of any kind that halfbyte reads, as a Transformers model that runs.

    Quantized linears stay packed; `dtype` is that of all else, by default what the checkpoint says, and `device` where
    they lie. They are decoded for each product, which is the reference. With `activations` "exact" they are multiplied
    by as they are packed, as where a model answers; "int8" also rounds what they meet to 8 bits in groups of 32, as
    llama.cpp does, and a little is lost. Raises HalfbyteError.
    """
    from halfbyte import nn

    return nn.load(path, dtype, device, activations)


__all__ = [
    "advise",
    "bench",
    "blame",
    "compare",
    "convert",
    "dequantize",
    "evaluate",
    "generate",
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
