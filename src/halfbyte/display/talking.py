"""What is said around answers: of the model, how it chooses tokens, how fast it was; and two answers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from halfbyte.errors import plural
from halfbyte.report.summary import size
from halfbyte.terminal import JOINERS, plain

if TYPE_CHECKING:  # `halfbyte --help` need not wait for them
    from halfbyte.inference.conversation import Tally, Turn
    from halfbyte.inference.model import Answering
    from halfbyte.inference.sampling import Sampling
    from halfbyte.inference.types import Answer

HERE = "bold reverse"
"""How the first token looks that another model did not say."""


def opened(answering: Answering, sampling: Sampling) -> str:
    """What answers, and how."""
    dtype = str(answering.model.dtype).removeprefix("torch.")
    stored = answering.checkpoint.container or "unquantized"
    lines = [
        f"{answering.checkpoint.path}: {stored}, computes in {dtype} on {answering.device}, "
        f"context {answering.context}; {drawn(sampling)}"
    ]
    if answering.template is None:
        lines.append("it has no chat template, or is to use none: texts are continued as they are")
    return "\n".join([*lines, *(f"note: {warning}" for warning in answering.warnings)])


def drawn(sampling: Sampling) -> str:
    """How tokens are chosen."""
    parts = []
    if sampling.temperature == 0:
        parts.append("each token the most likely one (temperature 0)")
    else:
        parts.append(f"tokens drawn at temperature {sampling.temperature:g}")
        parts += [f"top-k {sampling.top_k}"] if sampling.top_k else []
        parts += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
        parts += [f"min-p {sampling.min_p:g}"] if sampling.min_p else []
    parts += [f"repetition penalty {sampling.repetition_penalty:g}"] if sampling.repetition_penalty != 1 else []
    return ", ".join(parts)


def speeds(of: Tally | Answer) -> str:
    """How many tokens there were, and in a second."""
    read, answered = of.prompt_tokens, of.completion_tokens
    return (
        f"{plural(read, 'token')} read{_rate(of.prefill_rate)}, {plural(answered, 'token')} answered"
        f"{_rate(of.decode_rate)}"
    )


def memory(host: int | None, device: int | None, name: str) -> str:
    """The most that was in use; nothing where nobody knows."""
    parts = [size(host)] if host is not None else []
    parts += [f"{size(device)} of {name}"] if device is not None else []
    return f"memory at most {', '.join(parts)}" if parts else ""


def replied(result: Answer) -> str:
    """Of one answer: speeds, what ended it, memory."""
    ended = "ended by the model" if result.finish_reason == "stop" else "ended by --max-tokens, or a full context"
    used = memory(result.memory_bytes, result.device_bytes, result.device)
    return "; ".join(filter(None, (f"{speeds(result)}, {ended}", used)))


def _rate(rate: float | None) -> str:
    return "" if rate is None else f" ({rate:.1f} a second)"


def side_by_side(names: Sequence[str], turns: Sequence[Turn], at: int | None) -> Table:
    """Answers in columns; what each said at the first token where they part is marked."""
    table = Table(*(plain(Path(name).name) for name in names), expand=True)
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    table.add_row(*(_marked(turn, at) for turn in turns))
    return table


def _marked(turn: Turn, at: int | None) -> Text:
    text = Text()
    for number, piece in enumerate(turn.pieces):
        text.append(plain(piece.text, JOINERS), HERE if number == at else "")
    return text


def parting(names: Sequence[str], turns: Sequence[Turn], at: int | None) -> str:
    """Where they part, in words."""
    if at is None:
        least = min(len(turn.tokens) for turn in turns)
        return f"the same {plural(least, 'token')}" + ("" if _ended_together(turns) else ", as far as both came")
    said = (f"{Path(name).name} {turn.pieces[at].text!r}" for name, turn in zip(names, turns, strict=True))
    return f"the same for {plural(at, 'token')}; then " + ", ".join(said)


def _ended_together(turns: Sequence[Turn]) -> bool:
    return len({len(turn.tokens) for turn in turns}) == 1
