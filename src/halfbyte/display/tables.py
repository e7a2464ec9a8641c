"""Tables of at most 80 columns that cut neither numbers nor names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:  # `halfbyte --help` need not wait for them
    from halfbyte.report.types import (
        Measured,
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], name_columns: int = 1) -> Table:
    """The first `name_columns` are names, which go on in the next line where they are long; the rest are numbers, which
    are never broken."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, header in enumerate(headers):
        is_name = number < name_columns
        made.add_column(header, overflow="fold", no_wrap=not is_name, justify="left" if is_name else "right")
    for row in rows:
        made.add_row(*row)
    return made


def in_parts(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Table]:
    """A table wider than 80 columns as several, each with the first column."""
    widths = [2 + max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    runs: list[list[int]] = [[]]
    room = 0
    for i in range(1, len(headers)):
        if room + widths[i] > 80 - widths[0] and runs[-1]:
            runs.append([])
            room = 0
        runs[-1].append(i)
        room += widths[i]
    return [
        table(
            [headers[0], *(headers[i] for i in run)], [[row[0], *(row[i] for i in run)] for row in rows], name_columns=0
        )
        for run in runs
    ]


def without_prefix(names: Sequence[str], separator: str = ".") -> tuple[str, list[str]]:
    """The parts that all names begin with, and the rest of each."""
    parts = list(zip(*(name.split(separator)[:-1] for name in names), strict=False)) if len(names) > 1 else []
    same = next((i for i, part in enumerate(parts) if len(set(part)) > 1), len(parts))
    shared = "".join(part[0] + separator for part in parts[:same])
    return shared, [name.removeprefix(shared) for name in names]


def with_error(value: float, error: float | None, digits: int) -> str:
    """A number and its standard error, if it is known."""
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def signed(value: float, error: float | None, digits: int) -> str:
    """A difference, with its sign, and its standard error, if it is known."""
    return f"{value:+.{digits}f}" if error is None else f"{value:+.{digits}f} ± {error:.{digits}f}"


def megabytes(row: Measured) -> str:
    """The size of a model, if it is known."""
    return f"{row.size_bytes / 1e6:.1f}" if row.size_bytes else ""
