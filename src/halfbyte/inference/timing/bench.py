"""Models in engines, timed in turn: what else a machine does then slows all of them alike."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from halfbyte import nn
from halfbyte.devices import AUTO, device_named, kind_of, title
from halfbyte.engines.engines import OURS
from halfbyte.engines.handover import place
from halfbyte.errors import BadRequest, UnknownName, Unsupported
from halfbyte.evaluation.whole import require_answers
from halfbyte.formats import MULTIPLIED
from halfbyte.inference.memory import UNLIMITED, context_within
from halfbyte.inference.timing.engines import HOMES, TimedEngine, chosen, why_not
from halfbyte.inference.timing.figures import Costs, pace, spread
from halfbyte.inference.timing.load import Load, Seconds
from halfbyte.inference.timing.process import EngineFailed, EngineProcess, started
from halfbyte.inference.timing.reasons import Facts, of_the_run, reasons
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.progress import Progress
from halfbyte.report.inspect import stored
from halfbyte.report.types import SCHEMA, Machine, Pace, Products, Runtime, Speeds
from halfbyte.surroundings import of_the_user

SHARE = 0.8
"""Of the free memory that all models may take together; else they are timed one after another."""
LIBRARIES = 500_000_000
"""Bytes that torch and Transformers take in a process."""
WARMING = 4
"""Tokens that are decoded before anything is timed."""
MACHINE = "halfbyte.inference.timing.machine:InTorch"
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
"""So that the process of an engine is the whole of it."""


@dataclass(frozen=True)
class Asked:
    """What is timed, and how."""

    batches: Sequence[int] = (1,)
    prompts: Sequence[int] = (512,)
    tokens: int = 128
    repeats: int = 5
    threads: int | None = None
    device: str = AUTO
    activations: Sequence[str] = ("exact",)

    def __post_init__(self) -> None:
        for way in self.activations:
            if way not in MULTIPLIED:
                raise UnknownName("way to take activations", way, MULTIPLIED)

    @property
    def loads(self) -> list[Load]:
        """Each batch of each prompt."""
        return [Load(batch, prompt, self.tokens) for prompt in self.prompts for batch in self.batches]


@dataclass
class Contestant:
    """A model in an engine."""

    checkpoint: Checkpoint
    engine: str
    row: TimedEngine
    opening: dict[str, Any]
    """What its model is opened with."""
    activations: str | None = None
    process: EngineProcess | None = None
    opened: dict[str, Any] = field(default_factory=dict)
    seconds: dict[Load, list[Seconds]] = field(default_factory=dict)
    shares: dict[Load, float] = field(default_factory=dict)
    """Of products, in the time of a step."""
    memory_bytes: int | None = None
    device_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    failed: str | None = None

    @property
    def name(self) -> str:
        """As it is told."""
        return f"{self.checkpoint.path} in {self.engine}" + (f", {self.activations}" if self.activations else "")

    def start(self, stack: ExitStack, threads: int, loads: Sequence[Load]) -> None:
        """Load the model, and have it run each load once."""
        try:
            self._start(stack, threads, loads, self.opening)
        except EngineFailed as error:
            if not (error.signal_name and self.row.plainer):
                self.failed = str(error)
                return
            self.notes.append(self.row.about_plainer.format(error.signal_name))
            try:
                self._start(stack, threads, loads, {**self.opening, **self.row.plainer})
            except EngineFailed as again:
                self.failed = str(again)

    def _start(self, stack: ExitStack, threads: int, loads: Sequence[Load], opening: Mapping[str, Any]) -> None:
        is_ours = self.engine == OURS
        environment = (os.environ if is_ours else of_the_user()) | ENVIRONMENT
        self.process = stack.enter_context(started(self.row.home, is_ours, threads, environment))
        self.opened = self.process.call("open", path=str(place(self.checkpoint)), threads=threads, **opening)
        for load in loads:
            self.process.call("run", **load._replace(tokens=min(WARMING, load.tokens))._asdict())

    def time(self, load: Load) -> None:
        """One more repeat."""
        if self.process is None or self.failed:
            return
        try:
            self.seconds.setdefault(load, []).append(Seconds(*self.process.call("run", **load._asdict())))
        except EngineFailed as error:
            self.failed = str(error)

    def finish(self, loads: Sequence[Load]) -> None:
        """What else there is to be known, once nothing more is timed."""
        if self.process is None or self.failed:
            return
        try:
            self.device_bytes, self.memory_bytes = self.process.call("device_bytes"), self.process.memory_bytes
            if "products" in self.opened:
                for load in loads:
                    self.shares[load] = self.process.call("share_of_products", batch=load.batch, prompt=load.prompt)
        except EngineFailed as error:
            self.failed = str(error)


def bench(
    models: Sequence[Checkpoint], reference: Checkpoint | None, engines: Sequence[str], asked: Asked, show: Progress
) -> Speeds:
    """Raises BadRequest for what cannot be timed, before anything is; Unsupported where no model ran."""
    everyone = [*models, *([reference] if reference else [])]
    for checkpoint in everyone:
        if not checkpoint.is_decoder:
            raise BadRequest(f"{checkpoint.path} is no decoder, so it answers nothing")
    require_answers(everyone)
    names, left_out = chosen(engines, models)
    _require_room(everyone, asked)
    contestants = [c for model in models for c in contesting(model, names, asked)]
    originals = []
    if reference:
        loading = [name for name in names if why_not(name, reference) is None]
        originals = contesting(reference, loading or [OURS], asked)
    return measure(contestants, originals, asked, left_out, show)


def contesting(checkpoint: Checkpoint, engines: Sequence[str], asked: Asked) -> list[Contestant]:
    """A checkpoint in each of these that loads it, and in ours with each way to take activations."""
    vocabulary = checkpoint.text_config.get("vocab_size")
    common = {"device": asked.device, "vocabulary": vocabulary if isinstance(vocabulary, int) else 256}
    found = []
    for engine in engines:
        if why_not(engine, checkpoint):
            continue
        if engine == OURS and checkpoint.container:
            ways = asked.activations
            found += [Contestant(checkpoint, engine, HOMES[engine], common | {"activations": way}, way) for way in ways]
            continue
        sizes = {"sequences": max(asked.batches), "length": max(load.length for load in asked.loads)}
        opening = common | (sizes if engine == "vllm" else {})
        found.append(Contestant(checkpoint, engine, HOMES[engine], opening))
    return found


def _require_room(checkpoints: Sequence[Checkpoint], asked: Asked) -> None:
    """Raises BadRequest for a model that does not fit in memory, or reads no text as long as is asked for."""
    length, device = max(load.length for load in asked.loads), device_named(asked.device)
    for checkpoint in checkpoints:
        longest = calibrate.longest(checkpoint, UNLIMITED)
        if length > longest:
            raise BadRequest(
                f"{checkpoint.path} reads at most {longest} tokens at once, and a prompt with its answer has {length}; "
                "give a smaller --prompt, --context or --tokens"
            )
        context_within(checkpoint, checkpoint.unquantized_dtype, device, length, max(asked.batches))


def measure(
    contestants: list[Contestant],
    originals: list[Contestant],
    asked: Asked,
    left_out: Mapping[str, str],
    show: Progress,
) -> Speeds:
    """All of them, and the machine, in one run."""
    everyone = [*originals, *contestants]
    in_turn = _fit_together(everyone, asked.device)
    threads, found = asked.threads or torch.get_num_threads(), []
    for group in [everyone] if in_turn else [[one] for one in everyone]:
        with ExitStack() as stack:
            machine = stack.enter_context(started(MACHINE, True, threads, os.environ))
            machine.call("open", threads=threads, device=asked.device)
            for number, one in enumerate(group):
                show(f"loading {Path(one.name).name}", number, len(group))
                one.start(stack, threads, asked.loads)
            for what, number, total in _rounds(group, asked):
                show(what, number, total)
                found.append(machine.call("run"))
            for one in group:
                one.finish(asked.loads)
    cores = psutil.cpu_count(logical=False)
    limits = Machine(
        device=title(device_named(asked.device)),
        threads=threads,
        cores=cores,
        bandwidth=spread([each["bandwidth"] for each in found]),
        arithmetic={name: spread([each["arithmetic"][name] for each in found]) for name in found[0]["arithmetic"]},
    )
    return _speeds(contestants, originals, asked, limits, in_turn, left_out)


def _rounds(group: Sequence[Contestant], asked: Asked) -> Iterator[tuple[str, int, int]]:
    """One of each load of each contestant at a time, every second time from the last to the first."""
    for number in range(asked.repeats):
        yield f"round {number + 1} of {asked.repeats}", number, asked.repeats
        for load in asked.loads:
            for one in group if number % 2 == 0 else reversed(group):
                one.time(load)


def _fit_together(contestants: Sequence[Contestant], device: str) -> bool:
    where = device_named(device)
    return sum(map(_needed, contestants)) <= SHARE * kind_of(where).free_bytes(where)


def _needed(one: Contestant) -> int:
    """Bytes of its weights in memory, and of its libraries."""
    if one.engine == OURS:
        return LIBRARIES + nn.loaded_bytes(one.checkpoint, one.checkpoint.unquantized_dtype)
    return LIBRARIES + sum(tensor.size_bytes for tensor in stored(one.checkpoint))


def _speeds(
    contestants: list[Contestant],
    originals: list[Contestant],
    asked: Asked,
    machine: Machine,
    in_turn: bool,
    left_out: Mapping[str, str],
) -> Speeds:
    everyone = [*originals, *contestants]
    failed = {one.name: one.failed for one in everyone if one.failed}
    if all(one.failed for one in contestants):
        raise Unsupported("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    reference = [_runtime(one, asked, machine, None) for one in originals if not one.failed]
    rows = [_runtime(one, asked, machine, reference) for one in contestants if not one.failed]
    by_path = {row.engine: row for row in reference}
    facts = [[Facts.of(row, pace, by_path.get(row.compared_with or ""), machine) for pace in row.paces] for row in rows]
    rows = [row.model_copy(update={"reasons": reasons(of)}) for row, of in zip(rows, facts, strict=True)]
    return Speeds(
        schema_version=SCHEMA,
        halfbyte=version("halfbyte"),
        machine=machine,
        tokens=asked.tokens,
        repeats=asked.repeats,
        in_turn=in_turn,
        reference_path=str(originals[0].checkpoint.path) if originals else None,
        models=rows,
        reference=reference,
        failed=failed,
        left_out=dict(left_out),
        warnings=of_the_run([fact for of in facts for fact in of]),
    )


def _runtime(one: Contestant, asked: Asked, machine: Machine, reference: list[Runtime] | None) -> Runtime:
    products = [Products(**row) for row in one.opened.get("products", ())]
    costs = Costs.of(one.checkpoint, one.engine == OURS, products)
    fastest = max(each.median for each in machine.arithmetic.values())
    original = _beside(one.engine, reference or [])
    paces = []
    for number, load in enumerate(asked.loads):
        found = pace(load, one.seconds[load], costs, machine.bandwidth.median, fastest)
        ratios = _ratios(found, original.paces[number]) if original else {}
        paces.append(found.model_copy(update={"products_share": one.shares.get(load), **ratios}))
    return Runtime(
        path=str(one.checkpoint.path),
        kv=str(one.checkpoint.kv.grid) if one.checkpoint.kv else None,
        engine=one.engine,
        version=one.opened["version"],
        dtype=one.opened.get("dtype"),
        activations=one.activations,
        size_bytes=costs.size_bytes,
        read_bytes=int(costs.weights.read(1)),
        head_bytes=costs.head_bytes,
        load_seconds=one.opened["load_seconds"],
        memory_bytes=one.memory_bytes,
        device_bytes=one.device_bytes,
        products=products,
        paces=paces,
        compared_with=original.engine if original else None,
        notes=one.notes,
    )


def _beside(engine: str, reference: list[Runtime]) -> Runtime | None:
    """The original in the same engine, or else in ours."""
    by_engine = {row.engine: row for row in reference}
    return by_engine.get(engine) or by_engine.get(OURS)


def _ratios(mine: Pace, original: Pace) -> dict[str, float]:
    return {
        "prefill_ratio": mine.prefill.median / original.prefill.median,
        "decode_ratio": mine.decode.median / original.decode.median,
    }
