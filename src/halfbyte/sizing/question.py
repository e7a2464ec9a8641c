"""What is asked of a plan: a model, where it is to run, and how."""

from dataclasses import dataclass

from halfbyte.engines.engines import engine_named
from halfbyte.errors import BadRequest, UnknownName
from halfbyte.sizing.accounting import ACCOUNTINGS, accounting_of
from halfbyte.sizing.cache import TYPES, CacheType
from halfbyte.sizing.devices import Device, device_called, here, unlisted

CONTEXT = 8192
"""Tokens, where no context is asked for and the model has as many."""


@dataclass(frozen=True)
class Question:
    """Where a model is to run, and how much of it."""

    engine: str
    device: Device
    cards: int
    context: int | None
    batch: int
    kind: CacheType


def question(
    engine: str | None = None,
    device: str | None = None,
    memory: str | int | None = None,
    cards: int = 1,
    context: int | None = None,
    batch: int = 1,
    cache: str = "16 bits",
) -> Question:
    """Of words; where none is said, this machine. Raises BadRequest."""
    hardware = _device(device, memory)
    name = engine_named(engine) if engine else usual_engine(hardware, batch)
    if name not in ACCOUNTINGS:
        raise BadRequest(
            f"what {name} takes of a device's memory is not known; known: {', '.join(ACCOUNTINGS)}; "
            f"to write for it: quantize --engine {name}"
        )
    if cache not in accounting_of(name).types:
        raise (UnknownName("cache", cache, TYPES) if cache not in TYPES else _foreign(name, cache))
    for number, what in ((cards, "cards"), (batch, "batch"), (context, "context")):
        if number is not None and number < 1:
            raise BadRequest(f"--{what} is {number}, and has to be 1 at least")
    return Question(name, hardware, cards, context, batch, TYPES[cache])


def _foreign(engine: str, cache: str) -> BadRequest:
    return BadRequest(f"{engine} has no cache in {cache}; it has {', '.join(accounting_of(engine).types)}")


def _device(name: str | None, memory: str | int | None) -> Device:
    if name and memory:
        raise BadRequest("name a device or a memory, not both: --device rtx-4090, or --memory 24GiB")
    if memory:
        return unlisted(memory)
    if name and name.lower() not in ("cpu", "gpu"):
        return device_called(name)
    present = here()
    if name and name.lower() == "cpu":
        return present[-1]
    return present[0]


def usual_engine(device: Device, batch: int) -> str:
    """What most people run on such a device: vLLM where it serves many, llama.cpp at home."""
    serves = device.vendor in ("nvidia", "amd") and device.kind in ("datacentre", "workstation") and not device.unified
    many = batch > 1 and device.vendor in ("nvidia", "amd", "unknown")
    return "vllm" if serves or many else "llama.cpp"


def of_words(target: str) -> tuple[str, str | None]:
    """Engine and device of ENGINE or ENGINE@DEVICE, as `--for` has it."""
    engine, _, device = target.partition("@")
    return engine, device or None
