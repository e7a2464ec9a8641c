"""Checkpoints as they are: what they are stored as, what each lost, how two differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.display.tables import table, with_error, without_prefix
from halfbyte.errors import plural

if TYPE_CHECKING:  # `halfbyte --help` need not wait for them
    from halfbyte.report.types import (
        BudgetReport,
        CacheReport,
        Comparison,
        Inspection,
        WeightReport,
    )


def inspected(inspection: Inspection, count: int) -> list[Table | str]:
    """What a checkpoint is stored as, and the `count` weights that lost most."""
    megabytes, millions = inspection.size_bytes / 1e6, inspection.parameters / 1e6
    rows = [
        (k, str(r.tensors), f"{r.weights:,}", f"{r.size_bytes / 1e6:.2f}", f"{r.bits_per_weight:.3f}")
        for k, r in inspection.grids.items()
    ]
    return [
        f"{inspection.path}: {inspection.model_type}, {inspection.container or 'not quantized'}",
        f"{megabytes:.2f} MB, {millions:.2f} M parameters, {inspection.bits_per_parameter:.3f} bits per parameter",
        table(["stored as", "tensors", "weights", "MB", "bits"], rows),
        *worst(inspection.weights[:count], inspection.error_of),
        *(f"- {warning}" for warning in inspection.warnings),
    ]


def worst(rows: Sequence[WeightReport], error_of: str | None) -> list[Table | str]:
    """The weights that lost most, and what is to be said of them."""
    if not rows:
        return []
    if rows[0].error == 0:
        return ["every weight is bit for bit that of the source"]
    shared, names = without_prefix([row.name for row in rows])
    cells = [(n, r.grid, f"{r.bits_per_weight:.3f}", f"{r.error:.4f}") for n, r in zip(names, rows, strict=True)]
    notes = Counter(row.note for row in rows if row.note)
    title = f"lost most: relative error of the {error_of}{f'; names begin with {shared}' if shared else ''}"
    return [
        title,
        table(["weight", "grid", "bits", "error"], cells, name_columns=2),
        *(f"{count} of these: {note}" for note, count in notes.items()),
    ]


def budget(report: BudgetReport) -> str:
    """Which grids a budget has chosen, and what they are predicted to lose."""
    grids = ", ".join(f"{name} x {count}" for name, count in report.grids.items())
    measured = ", the sum of what each weight was measured to lose" if report.sensitivity == "measured" else ""
    return (
        f"for {report.asked}: {grids}; {report.file_bytes:,} bytes of files, predicted KL to the original "
        f"{report.predicted_kl:.5f}{measured}"
    )


FEW = 3
"""Patterns of a recipe that are spelled out: a mix under a budget has one for nearly every weight."""


def _entry(value: object) -> str:
    """Of a recipe, in a line."""
    if isinstance(value, Mapping):
        return plural(len(value), "pattern") if len(value) > FEW else str(dict(value)) if value else "none"
    return str(value)


def compared(comparison: Comparison, count: int) -> list[Table | str]:
    """Two checkpoints: their sizes, the `count` tensors that are furthest apart, and what each lost."""
    a, b = comparison.a, comparison.b
    rows = [
        (name, c.path, c.container or "not quantized", f"{c.size_bytes / 1e6:.2f}", f"{c.bits_per_parameter:.3f}")
        for name, c in (("A", a), ("B", b))
    ]
    shown: list[Table | str] = [
        table(["", "checkpoint", "container", "MB", "bits"], rows, name_columns=3),
        f"B takes {100 * (b.size_bytes / a.size_bytes - 1):+.1f} % of A's bytes",
        *(f"{name}: {_entry(mine)} in A, {_entry(its)} in B" for name, (mine, its) in comparison.recipes.items()),
    ]
    same = sum(t.difference == 0 for t in comparison.tensors)
    changed = [t for t in comparison.tensors if t.difference or None in t.stored_as or t.stored_as[0] != t.stored_as[1]]
    has_differences = any(t.difference is not None for t in comparison.tensors)
    shown.append(
        f"{len(comparison.tensors)} tensors"
        + (f", {same} with the same values" if has_differences else f", {len(changed)} stored otherwise")
    )
    changed.sort(key=lambda t: (-(t.difference or 0), -abs(t.size_bytes[1] - t.size_bytes[0])))
    prefix, names = without_prefix([t.name.removesuffix(".weight") for t in changed[:count]])
    cells = [
        (
            name,
            " → ".join(dict.fromkeys(kind or "-" for kind in t.stored_as)),
            f"{t.size_bytes[0] / 1e3:.1f} → {t.size_bytes[1] / 1e3:.1f}",
            "" if t.difference is None else f"{t.difference:.4f}",
            " → ".join("-" if error is None else f"{error:.4f}" for error in t.error) if any(t.error) else "",
        )
        for name, t in zip(names, changed[:count], strict=True)
    ]
    if cells:
        shown += [
            "furthest apart: distance of B's values from A's, relative; errors as the runs reported them"
            + (f"; names begin with {prefix}" if prefix else ""),
            table(["tensor", "stored as", "kB", "apart", "error"], cells, name_columns=2),
        ]
    for mine, its in comparison.evaluations:
        shown.append(
            f"KL on {mine.windows} windows of {mine.length} tokens of {mine.text}: "
            f"{with_error(mine.model.kl, mine.model.kl_error, 5)} → {with_error(its.model.kl, its.model.kl_error, 5)}; "
            f"perplexity {mine.model.perplexity:.3f} → {its.model.perplexity:.3f}"
        )
    if not comparison.evaluations:
        shown.append("no measurement of both on one text is in their reports: halfbyte eval A B --against ORIGINAL")
    return [*shown, *(f"note: {warning}" for warning in comparison.warnings)]


def cached(report: CacheReport) -> list[Table | str]:
    """The scales of a KV cache, a row for each attention."""
    shared, names = without_prefix([row.module for row in report.rows])
    cells = [
        (
            name,
            *("" if scale is None else f"{scale:.5f}" for scale in (row.key_scale, row.value_scale)),
            *(f"{100 * share:.4f} %" for share in (row.keys_clipped, row.values_clipped)),
        )
        for name, row in zip(names, report.rows, strict=True)
    ]
    title = "scales of the KV cache (the largest of heads), and what lies beyond them on other text"
    title += f"; names begin with {shared}" if shared else ""
    return [title, table(["attention", "keys", "values", "keys cut", "values cut"], cells)]
