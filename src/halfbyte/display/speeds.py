"""How fast models are, and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.display.tables import table
from halfbyte.errors import plural

if TYPE_CHECKING:  # `halfbyte --help` need not wait for them
    from halfbyte.report.types import Machine, Runtime, Speeds, Spread


def timed(result: Speeds) -> list[Table | str]:
    """Models in engines beside their original, what of the machine each reaches, and why."""
    rows = [*result.reference, *result.models]
    heads = ["model", "engine", "batch", "prompt"]
    speeds = [
        (
            *_named(row, row in result.reference),
            str(pace.batch),
            str(pace.prompt),
            f"{pace.prefill.median:.1f}",
            f"{1e3 * pace.first_token.median:.0f}",
            f"{pace.decode.median:.1f}",
            _apart(pace.decode),
        )
        for row in rows
        for pace in row.paces
    ]
    shares = [
        (
            *_named(row, row in result.reference),
            str(pace.batch),
            str(pace.prompt),
            _percent(pace.prefill_share),
            _percent(pace.decode_share),
            _times(pace.prefill_ratio),
            _times(pace.decode_ratio),
        )
        for row in rows
        for pace in row.paces
    ]
    sizes = [
        (
            *_named(row, row in result.reference),
            f"{row.size_bytes / 1e6:.1f}",
            f"{(row.memory_bytes or 0) / 1e6:.0f}" if row.memory_bytes else "",
            f"{row.device_bytes / 1e6:.0f}" if row.device_bytes else "",
            f"{row.load_seconds:.2f}",
        )
        for row in rows
    ]
    return [
        limits(result.machine),
        f"tokens a second, the median of {plural(result.repeats, 'repeat')}; {plural(result.tokens, 'token')} decoded; "
        f"{'all took turns' if result.in_turn else 'one after another, as they do not fit in memory together'}",
        _filled([*heads, "prefill", "first, ms", "decode", "±"], speeds),
        "of what was measured: arithmetic in prefill, bandwidth in decoding; and times the original's speed",
        _filled([*heads, "arithmetic", "bandwidth", "prefill", "decode"], shares),
        _filled(["model", "engine", "MB", "memory, MB", "GPU's, MB", "load, s"], sizes),
        *_told(result),
    ]


def limits(machine: Machine) -> str:
    """What the machine can do at most."""
    of = f" of {plural(machine.cores, 'core')}" if machine.cores else ""
    products = ", ".join(f"{name} at {rate.median / 1e9:.0f}" for name, rate in machine.arithmetic.items())
    return (
        f"{machine.device}, {plural(machine.threads, 'thread')}{of}: memory is read at "
        f"{machine.bandwidth.median / 1e9:.1f} GB/s ({machine.bandwidth.low / 1e9:.1f} to "
        f"{machine.bandwidth.high / 1e9:.1f}), products of {products} billion operations a second"
    )


def _told(result: Speeds) -> list[str]:
    """Sentences: reasons, and what did not run."""
    said = []
    for row in result.models:
        name = ", ".join(_named(row, False))
        said += [f"{name}: {'; '.join(row.reasons)}"] if row.reasons else []
        said += [f"note: {name}: {text}" for text in row.notes]
    said += [f"{name} failed: {reason}" for name, reason in result.failed.items()]
    said += [f"not timed: {reason}" for reason in result.left_out.values()]
    return [*said, *(f"note: {warning}" for warning in result.warnings)]


def _named(row: Runtime, is_original: bool) -> Sequence[str]:
    name, engine = Path(row.path).name, f"{row.engine}, {row.activations}" if row.activations else row.engine
    return f"original: {name}" if is_original else name, engine


def _filled(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of the columns in which there is something."""
    kept = [i for i in range(len(headers)) if any(row[i] for row in rows)]
    return table([headers[i] for i in kept], [[row[i] for i in kept] for row in rows], 2)


def _apart(spread: Spread) -> str:
    """Half of how far repeats are apart."""
    return f"{50 * (spread.high - spread.low) / spread.median:.0f} %" if spread.median else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"
