"""What commands print: tables and sentences for people, JSON for machines."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from halfbyte import display
from halfbyte.errors import plural
from halfbyte.recipe import OTHER_COMMANDS
from halfbyte.report.numbers import require_finite
from halfbyte.report.summary import beside_planned, headline, in_words, size, worst, worst_activations
from halfbyte.terminal import Terminal, as_json
from halfbyte.words import own_name

if TYPE_CHECKING:  # `halfbyte --help` need not wait for them
    from halfbyte.report.types import (
        Evaluation,
        Part,
        Plan,
        Report,
        StatesEvaluation,
        SuiteEvaluation,
        TaskEvaluation,
    )

out = Terminal(width=None if sys.stdout.isatty() else 180)
err = Terminal(stderr=True)


def show(parts: Sequence[Table | str]) -> None:
    """Print what `display` made."""
    for part in parts:
        out.print(part)


def print_json(result: Part | Sequence[Part]) -> None:
    """Print what was found as JSON, one value or a list of them."""
    print_value([part.as_dict() for part in result] if isinstance(result, Sequence) else result.as_dict())


def print_value(value: Any) -> None:
    """Print as JSON, in which no number may be a NaN."""
    print(as_json(require_finite(value)))


def show_plan(plan: Plan, output: Path) -> None:
    """Print what a dry run says."""
    o = plan.output
    out.print(f"{output} would be: {headline(plan)}")
    for kind, count in Counter(own_name(o.container, row.grid) for row in plan.weights).most_common():
        out.print(f"  {plural(count, 'matrix', 'matrices')} on {kind}")
    for reason, count in Counter(plan.kept.values()).most_common():
        out.print(f"  {plural(count, 'tensor')} kept: {reason}")
    for reason, count in Counter(plan.dropped.values()).most_common():
        out.print(f"  {plural(count, 'tensor')} left out: {reason}")
    if plan.budget:
        out.print(f"  {display.budget(plan.budget)}", soft_wrap=True)
    names = ", ".join(o.files[:3]) + (" ..." if len(o.files) > 3 else "")
    out.print(f"  {plural(len(o.files), 'file')} of tensors, {size(o.size_bytes)}: {names}")
    if plan.planned:
        out.print(f"  the run would take {in_words(plan.planned)}", soft_wrap=True)
    show_warnings(plan.warnings)
    for engine in plan.engines:
        reason = "" if engine.loads else f": {engine.reasons[0]}"
        out.print(f"{engine.engine} {'loads it' if engine.loads else 'does not load it'}{reason}", soft_wrap=True)
    but = ", but the file of what each weight costs, from which another budget takes seconds" if plan.budget else ""
    out.print(f"nothing was written{but}", highlight=False, soft_wrap=True)


def show_report(report: Report, output: Path, already_shown: Sequence[str] = ()) -> None:
    """Print what became of a run, and how the output is served and measured; without the warnings that were told."""
    out.print(f"{output}: {headline(report)}, {report.seconds:.1f} s; read back and verified")
    if report.planned and report.measured:
        out.print(f"took {beside_planned(report.measured, report.planned)}", soft_wrap=True)
    if report.budget:
        out.print(display.budget(report.budget), soft_wrap=True)
    show(display.worst(worst(report), report.error_of))
    for row in worst_activations(report, 1):
        if seen := row.activations:
            out.print(
                f"activations: {seen.grid}, the largest error {seen.error:.4f} where {row.name} reads from "
                f"{seen.low:.3g} "
                f"to {seen.high:.3g}; {seen.saturated} of {seen.values} values cut there"
            )
    if cache := report.kv:
        out.print(
            f"KV cache: {cache.grid}, at most {100 * cache.most_clipped:.4f}% of an attention's keys or values beyond "
            f"the scales on other text. {cache.serve}",
            soft_wrap=True,
        )
    show_warnings(w for w in (*report.warnings, *(cache.warnings if cache else ())) if w not in already_shown)
    _show_engines(report, output)
    asked = report.recipe
    if asked.method not in OTHER_COMMANDS and report.source.is_decoder:
        merged = f" --adapter {shlex.quote(asked.adapter)}" if asked.adapter else ""
        arguments = f"{shlex.quote(str(output))} --against {shlex.quote(asked.model)}{merged}"
        out.print(f"what was lost: halfbyte eval {arguments}", soft_wrap=True)


def show_warnings(warnings: Iterable[str]) -> None:
    """Print each in a line."""
    for warning in warnings:
        out.print(f"note: {warning}")


def _show_engines(report: Report, output: Path) -> None:
    """What serves the output; of one engine, if it was asked for."""
    from halfbyte.containers.place import is_file
    from halfbyte.report.card import command, original_of

    o, asked = report.output, report.recipe
    place = output / o.file if o.file and not is_file(output) else output
    for engine in report.engines:
        if engine.loads and asked.engine in (None, "none", engine.engine):
            serve = command(engine, place, original_of(asked))
            out.print(f"{engine.engine} ({engine.word}): {serve}", soft_wrap=True)
    if report.engines and not any(engine.loads for engine in report.engines):
        out.print(
            "note: no engine is known to load it; halfbyte.load does, and report.json says of each engine "
            "why it does not",
            soft_wrap=True,
        )


def _text(result: Evaluation | StatesEvaluation) -> str:
    return f"{result.text_name} ({result.text})" if result.text_name else result.text


def show_measured(result: Evaluation | StatesEvaluation | SuiteEvaluation | TaskEvaluation) -> None:
    """Print an evaluation, with its conditions."""
    from halfbyte.report.types import Evaluation, SuiteEvaluation, TaskEvaluation

    if isinstance(result, SuiteEvaluation):
        show(display.answered(result))
        return
    if isinstance(result, TaskEvaluation):
        show(display.scored(result))
        return
    begins = f", each begins with {''.join(result.opening)}" if result.opening else ""
    out.print(
        f"{plural(result.windows, 'window')} of {result.length} tokens of {_text(result)}, convention "
        f"{result.convention}{begins}"
    )
    show(display.evaluated(result) if isinstance(result, Evaluation) else display.states(result))
