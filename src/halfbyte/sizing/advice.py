"""A row for every sensible scheme, and which of them to take."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.containers.place import is_file
from halfbyte.engines.verdicts import Verdict
from halfbyte.errors import HalfbyteError, Unsupported
from halfbyte.files import exists, path_of
from halfbyte.models import headers, heads, sizes
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.plan import resolve
from halfbyte.recipe import Recipe
from halfbyte.registry import FORMS, located
from halfbyte.sizing import speed
from halfbyte.sizing.accounting import Accounting, accounting_of, cache_types
from halfbyte.sizing.cache import LayerCache, ModelConfig, cache_bytes, layers_of
from halfbyte.sizing.choices import PLAIN, Choice, choices
from halfbyte.sizing.losses import MeasuredLoss, losses_of
from halfbyte.sizing.memory import Load, MemoryModel, Weights, parameters_of, weights_of
from halfbyte.sizing.preferences import Words, recommended
from halfbyte.sizing.question import CONTEXT, Question
from halfbyte.sizing.types import SCHEMA, Advice, CacheRow, Loss, Row
from halfbyte.targets.plan import commonest_name
from halfbyte.words import own_name

DEGREES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of cards that are tried."""


def opened(source: str) -> Checkpoint:
    """A checkpoint's headers: of a folder or a GGUF, or of the hub, which gives no weights for that."""
    return heads.settled(Checkpoint.open(source) if located(source) else headers.of_hub(source))


@dataclass(frozen=True)
class Subject:
    """A model, as far as plans need it."""

    name: str
    checkpoint: Checkpoint
    settings: ModelConfig
    parameters: Weights
    layers: tuple[LayerCache, ...] | None
    """None: what it keeps of a sequence is not known."""
    unknown: str = ""
    """Why."""

    @classmethod
    def of(cls, source: str) -> "Subject":
        """Raises HalfbyteError for what is no checkpoint."""
        checkpoint = opened(source)
        sizes.require(checkpoint)
        s = ModelConfig(checkpoint.config)
        parameters = parameters_of(checkpoint, s)
        try:
            return cls(source, checkpoint, s, parameters, layers_of(checkpoint.config))
        except Unsupported as error:
            return cls(source, checkpoint, s, parameters, None, str(error))

    @property
    def longest(self) -> int | None:
        """Tokens that it is made for."""
        return self.settings.number("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len") or None


def advise(source: str, asked: Question) -> Advice:
    """What fits, how fast at most, what it loses, and what to take. Raises HalfbyteError."""
    subject = Subject.of(source)
    context = asked.context or min(CONTEXT, subject.longest or CONTEXT)
    account = accounting_of(asked.engine)
    offered = choices()[asked.engine]
    lost = losses_of(offered, subject.parameters.total)
    rows = [_row(subject, choice, asked, account, context, lost.get(name)) for name, choice in offered.items()]
    plain = MemoryModel(_plain(subject), subject.layers or (), subject.settings, account, asked.device)
    return Advice(
        schema_version=SCHEMA,
        model=source,
        parameters=subject.parameters.total,
        active_parameters=int(subject.parameters.of_token),
        engine=asked.engine,
        accounting=account.source,
        device=asked.device.name,
        device_title=asked.device.title,
        device_memory=asked.device.memory_bytes,
        budget=plain.budget,
        cards=asked.cards,
        context=context,
        longest_known=subject.longest,
        batch=asked.batch,
        cache=asked.kind.name,
        caches=_caches(subject, asked, account, context),
        rows=rows,
        recommendation=recommended(rows, asked, plain.budget, command_of(source, asked)),
        notes=list(_notes(subject, asked, context)),
    )


def _notes(subject: Subject, asked: Question, context: int) -> Iterator[str]:
    if subject.layers is None:
        yield f"memory is without a cache: {subject.unknown}"
    if subject.longest and context > subject.longest:
        yield f"the model is made for {subject.longest} tokens, and {context} were asked for"
    if asked.device.memory_bytes is None:
        yield f"the memory of {asked.device.title} is the machine's: say it with --memory 32GiB"
    if asked.device.bandwidth is None:
        yield f"speed is not known: the bandwidth of {asked.device.title} is not"


def _caches(subject: Subject, asked: Question, account: Accounting, context: int) -> list[CacheRow]:
    if subject.layers is None:
        return []
    paging = account.paging(asked.device.memory_bytes or 0)
    kinds = cache_types(asked.engine)
    return [
        CacheRow(name=k.name, size_bytes=cache_bytes(subject.layers, context, asked.batch, k, paging), source=k.source)
        for k in kinds
    ]


def _plain(subject: Subject) -> Weights:
    tensors = {name: entry.size_bytes for name, entry in subject.checkpoint.entries.items()}
    return weights_of(tensors, subject.checkpoint, subject.settings)


def _row(
    subject: Subject, choice: Choice, asked: Question, account: Accounting, context: int, loss: MeasuredLoss | None
) -> Row:
    try:
        weights, verdict = _planned(subject, choice, asked.engine)
    except HalfbyteError as error:
        return Row(scheme=choice.name, words=dict(choice.recipe), refused=str(error))
    model = MemoryModel(weights, subject.layers or (), subject.settings, account, asked.device)
    load = Load(context, asked.batch, asked.kind, asked.cards)
    degrees = _degrees(subject, account, verdict)
    memory, enough = model.memory(load), model.budget is not None and asked.cards in degrees
    fitting = (n for n in degrees if model.fits(Load(context, asked.batch, asked.kind, n)))
    return Row(
        scheme=_named(subject, choice),
        words=dict(choice.recipe),
        **_on_device(subject, choice, asked, weights, memory.cache * asked.cards),
        file_bytes=weights.total,
        weights_bytes=memory.weights,
        cache_bytes=memory.cache if subject.layers is not None else None,
        activations_bytes=memory.activations,
        beside_bytes=memory.beside,
        memory_bytes=memory.total,
        fits=model.fits(load) if enough else None if model.budget is None else False,
        longest_context=model.longest(load, subject.longest or 0) if enough and subject.layers else None,
        largest_batch=model.largest(load) if enough and subject.layers else None,
        cards=next(fitting, None),
        tensor_parallel=tuple(n for n in degrees if n > 1),
        loss=loss and Loss(kl=loss.kl, model=loss.model, method=loss.method, source=loss.source),
    )


def _on_device(subject: Subject, choice: Choice, asked: Question, weights: Weights, cache: int) -> dict[str, Any]:
    """The kernel, and how fast it can be."""
    kernel = choice.kernel_on(asked.device)
    if kernel is None:
        return {}
    parts = (weights, subject.parameters, cache, asked.batch, asked.cards, asked.device, kernel)
    return {
        "kernel": kernel.name,
        "kernel_note": kernel.note,
        "kernel_source": kernel.source,
        "decode_tokens": speed.decode_tokens(*parts),
        "prefill_tokens": speed.prefill_tokens(subject.parameters, asked.cards, asked.device, kernel),
    }


def _named(subject: Subject, choice: Choice) -> str:
    """What is quantized already is not in 16 bits."""
    container = subject.checkpoint.container
    if choice.name != PLAIN or not container:
        return choice.name
    return f"as it is: {own_name(container, commonest_name(subject.checkpoint.quantized))}"


def _planned(subject: Subject, choice: Choice, engine: str) -> tuple[Weights, Verdict | None]:
    """The bytes of what would be written, and what the engine says of it. Raises HalfbyteError."""
    if choice.name == PLAIN:
        return _plain(subject), None
    plan = resolve(recipe_of(subject.name, choice.recipe, engine), subject.checkpoint, [engine])
    tensors = {name: spec.size_bytes for name, spec in plan.target.writer(plan).tensors().items()}
    return weights_of(tensors, subject.checkpoint, subject.settings), next(
        v for v in plan.verdicts if v.engine == engine
    )


def recipe_of(model: str, entries: Words, engine: str) -> Recipe:
    """What makes a scheme for an engine."""
    return Recipe.of(model=model, engine=engine, **entries)


def _degrees(subject: Subject, account: Accounting, verdict: Verdict | None) -> list[int]:
    """Numbers of cards over which it can be split: by heads and matrices where engines split these, by layers else."""
    if account.kind != "served":
        layers = max(1, subject.settings.layers)
        return [n for n in DEGREES if n <= layers]
    permitted = (verdict.tensor_parallel if verdict else ()) or DEGREES[:4]
    return [n for n in permitted if subject.settings.heads % n == 0]


def command_of(source: str, asked: Question) -> Callable[[Words], tuple[str, str]]:
    """What is written for the words of a scheme, and what to type."""

    def command(entries: Words) -> tuple[str, str]:
        grid = str(entries["grid"])
        path = Path(source if exists(path_of(source)) else source.partition("@")[0].replace(":", "-")).expanduser()
        stem = path.stem if is_file(path) else (path if path.name else path.resolve()).name
        form = FORMS.get(str(entries.get("to")))
        out = f"{stem}-{grid}{form.suffix if form else ''}"
        parts = ["halfbyte", "quantize", source, "-o", out]
        for name, value in entries.items():
            flag = f"--{name.replace('_', '-')}"
            parts += [flag] if value is True else [flag, str(value)]
        return out, shlex.join([*parts, "--engine", asked.engine])

    return command
