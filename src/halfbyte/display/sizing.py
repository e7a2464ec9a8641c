"""Devices, and what fits on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.display.tables import table
from halfbyte.sizing.devices import GIB

if TYPE_CHECKING:  # `halfbyte --help` need not wait for them
    from halfbyte.sizing.choices import Choice, Kernel
    from halfbyte.sizing.devices import Device
    from halfbyte.sizing.types import Advice

UNKNOWN = "-"
UNCHECKED = "figures not checked against their source"


def devices(listed: Sequence[Device], here: Sequence[Device]) -> list[Table | str]:
    """The table of devices, and which are on this machine."""
    rows = [
        (
            d.name if d.checked else f"{d.name} *",
            UNKNOWN if d.memory is None else f"{d.memory:g}",
            UNKNOWN if d.bandwidth is None else f"{d.bandwidth:g}",
            *(UNKNOWN if rate is None else f"{rate:g}" for rate in (d.fp16, d.int8, d.fp8, d.fp4)),
            UNKNOWN if d.capability is None else f"{d.capability:.1f}",
        )
        for d in listed
    ]
    return [
        "10^12 dense operations per second by dtype; cc: NVIDIA's compute capability",
        table(["device", "GiB", "GB/s", "fp16", "int8", "fp8", "fp4", "cc"], rows),
        f"{UNKNOWN}: unpublished, or there is none; sources: halfbyte devices --json",
        *([] if all(d.checked for d in listed) else [f"*: {UNCHECKED}"]),
        *(f"here: {_named(device)}" for device in here),
    ]


def _named(device: Device) -> str:
    memory = "" if device.memory_bytes is None else f", {device.memory_bytes / GIB:.1f} GiB"
    return f"{device.title}{memory} (--device {device.name})"


def device(one: Device, choices: Mapping[str, Sequence[Choice]]) -> list[Table | str]:
    """A device, and what multiplies there in each engine."""
    facts = [
        ("memory", None if one.memory_bytes is None else f"{one.memory_bytes / GIB:.1f} GiB"),
        ("bandwidth", None if one.bandwidth is None else f"{one.bandwidth:g} GB/s"),
        *((f"{name}, dense", _rate(one.arithmetic(name))) for name in ("fp16", "int8", "fp8", "fp4")),
        ("compute capability", None if one.capability is None else f"{one.capability:.1f}"),
    ]
    rows: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for engine, options in choices.items():
        runs = [(choice.name, kernel) for choice in options if (kernel := choice.kernel_on(one))]
        rows.setdefault(tuple((name, _titled(kernel)) for name, kernel in runs), []).append(engine)
    cells = [
        (", ".join(engines), ", ".join(name for name, kernel_title in runs if kernel_title == title), title)
        for runs, engines in rows.items()
        for title in dict.fromkeys(title for _, title in runs)
    ]
    return [
        f"{one.title} ({one.name}); source: {one.source}",
        *([] if one.checked else [UNCHECKED]),
        *(f"{name}: {value or 'unknown, or none'}" for name, value in facts),
        table(["engine", "what runs on it", "kernel"], cells, name_columns=3),
    ]


def _titled(kernel: Kernel) -> str:
    return f"{kernel.name}, {kernel.note}" if kernel.note else kernel.name


def _rate(operations: float | None) -> str | None:
    return None if operations is None else f"{operations / 1e12:g}e12 operations/s"


def advised(advice: Advice) -> list[Table | str]:
    """A row for every scheme, and which to take."""
    rows = [
        (
            row.scheme,
            _digits((row.file_bytes or 0) / 1e9),
            _digits((row.memory_bytes or 0) / GIB),
            {True: "yes", False: "no", None: "?"}[row.fits] if row.kernel else "no",
            *(UNKNOWN if n is None else f"{n}" for n in (row.longest_context, row.largest_batch, row.cards)),
            *(UNKNOWN if n is None else f"{n:.0f}" for n in (row.decode_tokens, row.prefill_tokens)),
            UNKNOWN if row.loss is None else f"{row.loss.kl:.4f}",
        )
        for row in advice.rows
        if not row.refused
    ]
    headers = ["scheme", "GB", "GiB", "fits", "context", "batch", "cards", "tok/s", "prompt", "KL"]
    return [*_about(advice), table(headers, rows), *_explained(advice), *_taken(advice)]


def _digits(number: float) -> str:
    """Three that count."""
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def _about(advice: Advice) -> list[str]:
    active, total = advice.active_parameters / 1e9, advice.parameters / 1e9
    share = f", of which a token is multiplied by {_digits(active)}" if active < 0.9 * total else ""
    memory = "of unknown memory" if advice.budget is None else f"{advice.budget / GIB:.1f} GiB to use"
    cards = f"{advice.cards} x " if advice.cards > 1 else ""
    caches = ", ".join(f"{row.name} {_digits(row.size_bytes / GIB)}" for row in advice.caches)
    return [
        f"{advice.model}: {_digits(total)} billion parameters{share}",
        f"{advice.engine} on {cards}{advice.device_title}, {memory}",
        f"context {advice.context}, batch {advice.batch}, cache in {advice.cache}",
        *([f"GiB of cache: {caches}"] if caches else []),
    ]


def _explained(advice: Advice) -> list[str]:
    models: dict[str, dict[str, None]] = {}
    for row in advice.rows:
        if row.loss:
            models.setdefault(row.loss.model, {})[row.loss.source] = None
    measured = "; ".join(f"{model} ({', '.join(sources)})" for model, sources in models.items())
    refused: dict[str, list[str]] = {}
    for row in advice.rows:
        if row.refused:
            refused.setdefault(row.refused, []).append(row.scheme)
    bare = [row.scheme for row in advice.rows if not row.refused and not row.kernel]
    return [
        "GB: the file; GiB: of a card in use, with cache; context, batch: the most that fit;",
        "cards: the fewest; tok/s, prompt: at most, by a roofline that no engine reaches",
        *([f"KL: nats per token where somebody measured, on {measured}"] if measured else []),
        *([f"nothing on {advice.device_title} multiplies by: {', '.join(bare)}"] if bare else []),
        *(f"{', '.join(schemes)} cannot be: {reason}" for reason, schemes in refused.items()),
        *(f"note: {note}" for note in advice.notes),
    ]


def _taken(advice: Advice) -> list[str]:
    best = advice.recommendation
    if best is None:
        if any(row.fits for row in advice.rows):
            return ["it fits as it is, and there is nothing better to make of it here"]
        return ["nothing fits: take a smaller model, a shorter context or more memory"]
    row = next(row for row in advice.rows if row.scheme == best.scheme)
    parts = {
        "weights": row.weights_bytes,
        "cache": row.cache_bytes,
        "activations": row.activations_bytes,
        "libraries": row.beside_bytes,
    }
    sizes = ", ".join(f"{name} {_digits(size / GIB)}" for name, size in parts.items() if size is not None)
    many = f" on {best.cards} cards" if best.cards > 1 else ""
    return [f"take {best.scheme}{many}: {best.reason}", f"GiB of {best.scheme}: {sizes}", best.command]
