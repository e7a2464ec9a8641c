"""What was answered: suites, item by item."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.display.measurements import gates, short_names
from halfbyte.display.tables import signed, table
from halfbyte.report.summary import passed

if TYPE_CHECKING:  # `halfbyte --help` need not wait for them
    from halfbyte.report.types import Flip, SuiteEvaluation, SuiteResult, TaskEvaluation, TaskResult

FLIPS, LONGEST = 6, 60
"""Answers that are shown of a model, and the most characters of each."""


def answered(result: SuiteEvaluation) -> list[Table | str]:
    """A table for each model: a row for each suite, the original and the model side by side."""
    shown: list[Table | str] = []
    for name, model in zip(short_names(result.models), result.models, strict=True):
        rows = [
            (
                Path(s.name).name,
                str(s.prompts),
                passed(s),
                f"{s.lost} / {s.gained}" if s.items else "",
                parted(s),
                f"{s.loops[0]} → {s.loops[1]}" if s.parts_after else "",
            )
            for s in model.suites
        ]
        heads = ["suite", "prompts", "right", "lost / gained", "part, after", "loop"]
        shown += [f"{name} beside {Path(result.reference_path).name}, both in {result.dtype}", table(heads, rows)]
        flips = [(suite, flip) for suite in model.suites for flip in suite.flips]
        shown += [_flip(suite, flip) for suite, flip in flips[:FLIPS]]
        shown += [f"... and {len(flips) - FLIPS} more (--json)"] if len(flips) > FLIPS else []
        shown += [remark for suite in model.suites for remark in remarks(suite)]
    legend = (
        "right: answers that pass, of the original → of the model; lost, gained: right of the original alone, of the "
        "model alone; part: greedy answers that differ from the original's, and after how many tokens (the median); "
        "loop: answers that end in repeating themselves"
    )
    return [*shown, legend, *gates(result.gates), *(f"note: {warning}" for warning in result.warnings)]


def scored(result: TaskEvaluation) -> list[Table | str]:
    """A table for each model: a row for each task and score."""
    shown: list[Table | str] = []
    for name, model in zip(short_names(result.models), result.models, strict=True):
        rows = [
            (
                row.name,
                row.metric if row.filter is None else f"{row.metric}, {row.filter}",
                str(row.items),
                f"{100 * (row.original or 0):.1f} → {100 * (row.model or 0):.1f}",
                _points(row),
                f"{row.lost} / {row.gained}",
            )
            for row in model.tasks
        ]
        how = f"lm-eval {result.lm_eval}, both in {result.dtype}" + (", as chats" if result.as_chat else "")
        shown += [
            f"{name} beside {Path(result.reference_path).name}: {how}",
            table(["task", "score", "items", "% right", "difference", "lost / gained"], rows, name_columns=2),
        ]
    legend = (
        "difference: of the model from the original, item by item, ± its standard error; lost, gained: items that only "
        "the original, only the model got right"
    )
    return [*shown, legend, *gates(result.gates), *(f"note: {warning}" for warning in result.warnings)]


def _points(row: TaskResult) -> str:
    """The difference, in points of a hundred."""
    if row.difference is None:
        return ""
    mean, error = row.difference
    return signed(100 * mean, None if error is None else 100 * error, 2)


def parted(suite: SuiteResult) -> str:
    """How many of the answers part from the original's, and where."""
    count = sum(at is not None for at in suite.parts_after)
    where = "" if suite.median_parting is None else f", {suite.median_parting:g}"
    return f"{count} of {len(suite.parts_after)}{where}" if suite.parts_after else ""


def remarks(suite: SuiteResult) -> list[str]:
    """What a suite does not tell."""
    name = Path(suite.name).name
    if suite.items and not suite.original:
        return [f"{name}: the original passes none, so what was lost does not show here"]
    if not suite.items and not suite.parts_after:
        return [f"{name}: not asked, as this model opens no thoughts"]
    return []


def _flip(suite: SuiteResult, flip: Flip) -> str:
    what = "lost" if flip.lost else "gained"
    texts = [_short(text) for text in (flip.prompt, flip.original, flip.model)]
    return f"{what}, {Path(suite.name).name} {flip.line}: {texts[0]} original: {texts[1]} model: {texts[2]}"


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return repr(one_line if len(one_line) <= LONGEST else f"{one_line[: LONGEST - 3]}...")
