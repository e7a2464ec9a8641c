"""What stands out of what was measured: where a loss is, if it is not everywhere."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

from halfbyte import demo
from halfbyte.errors import plural
from halfbyte.evaluation import languages
from halfbyte.models.texts import records
from halfbyte.report.types import Divergence, Measurements, Report

LEAST = 1e-3
"""Nats per token; of less, nothing is to be explained."""
TIMES, ERRORS, TOKENS = 2.0, 3.0, 30
"""How many times the average a part loses that stands out, by how many standard errors, on how many tokens at least."""
WORST = 3.0
"""Times the median weight's error."""
CUT = 0.01
"""Share of the activations that a weight reads which lie beyond their scale."""
SHARE = 0.25
"""Of the divergence, that one part gives back."""


def findings(row: Divergence, report: Measurements | None) -> list[str]:
    """Which tokens, positions, layers and inputs carry the loss of a model, as far as they do more than others."""
    if row.kl < LEAST:
        return []
    lines = [*_tokens(row), *_positions(row), *_language(row, report)]
    return [*lines, *_layers(report), *_inputs(report)] if isinstance(report, Report) else lines


def _stands_out(kl: float, error: float | None, average: float) -> bool:
    return error is not None and kl > TIMES * average and kl - average > ERRORS * error


def _tokens(row: Divergence) -> Iterator[str]:
    for part in row.kl_by_class:
        if part.tokens >= TOKENS and _stands_out(part.kl, part.kl_error, row.kl):
            yield (
                f"{part.name} lose {part.kl / row.kl:.1f} times the average: KL {part.kl:.4f} ± {part.kl_error:.4f} on "
                f"{part.tokens} of {row.tokens} tokens"
            )


def _positions(row: Divergence) -> Iterator[str]:
    for part in row.kl_by_position:
        if _stands_out(part.kl, part.kl_error, row.kl):
            yield (
                f"positions {part.first} to {part.last} of a window lose {part.kl / row.kl:.1f} times the average: KL "
                f"{part.kl:.4f} ± {part.kl_error:.4f}"
            )


def in_calibration(text: str, report: Measurements | None) -> float | None:
    """How much of a text's runs of letters the calibration's text has; None where that is not known, or none was."""
    if not isinstance(report, Report) or report.calibration is None:
        return None
    source = report.recipe.calibration.source
    if source == "default":
        calibration = [str(demo.CALIBRATION), *([str(demo.CHATS)] if report.calibration.chats else [])]
    else:
        calibration = [source]
    evaluation = demo.TEXTS.get(text, text)
    if not all(isinstance(one, tuple) or Path(one).expanduser().is_file() for one in (evaluation, *calibration)):
        return None  # a dataset, or a file that has gone
    return languages.shared(_letters(evaluation), " ".join(map(_letters, calibration)))


def _letters(source: str | Path | tuple[str, ...]) -> str:
    spoken = (
        record.text or " ".join(str(m.get("content")) for m in record.messages or ()) for record in records(source)
    )
    return " ".join(spoken)


def _language(row: Divergence, report: Measurements | None) -> Iterator[str]:
    if row.in_calibration is None or row.in_calibration >= languages.ALIKE or report is None:
        return
    alike = [
        e.model.kl for e in report.evaluations if (e.model.in_calibration or 0) >= languages.ALIKE and not e.foreign
    ]
    if alike and _stands_out(row.kl, row.kl_error, fmean(alike)):
        yield (
            f"the text is in another language than the calibration's ({100 * row.in_calibration:.0f} % of its runs of "
            f"four letters are in that), and loses {row.kl / fmean(alike):.1f} times what texts in that language lose; "
            "--calibration FILE takes text of this one"
        )


def _layers(report: Report) -> Iterator[str]:
    errors = [row.error for row in report.weights]
    if errors and (worst := max(report.weights, key=lambda row: row.error)).error > WORST * median(errors) > 0:
        times = worst.error / median(errors)
        yield (
            f"{worst.name} on {worst.grid} has {times:.1f} times the error of the median weight; halfbyte blame "
            "measures what that costs"
        )
    if report.blame and report.blame.parts and (whole := report.blame.kl[0]) > 0:
        first = report.blame.parts[0]
        if first.kl[0] > SHARE * whole:
            yield f"{first.name} put back takes off {100 * first.kl[0] / whole:.0f} % of the divergence, as blame found"


def _inputs(report: Report) -> Iterator[str]:
    cut = [row for row in report.weights if row.activations and row.activations.clipped > CUT]
    if cut:
        worst = max(cut, key=lambda row: row.activations.clipped if row.activations else 0.0)
        share = 100 * worst.activations.clipped if worst.activations else 0.0
        yield (
            f"{plural(len(cut), 'weight reads', 'weights read')} activations that are cut by their scale, the most "
            f"{worst.name} with {share:.1f} % of them"
        )
    idle = [row for row in report.weights if row.tokens == 0]
    if idle:
        yield f"no calibration token reached {plural(len(idle), 'weight')}, such as the expert {idle[0].name}"
