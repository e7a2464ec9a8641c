"""What is printed: texts of anybody's making, of which nothing is an instruction to the terminal or to rich."""

import json
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

COMMANDS = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode's categories of what controls a terminal, turns the direction of what follows, or is no character."""


JOINERS = "\t\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Tabs, and what scripts and emoji are joined by: of what a model says, they stay."""


def plain(text: str, kept: str = "") -> str:
    """The text with such characters written out, as \\x1b; the ends of its lines stay, and what is `kept`."""
    return "".join(ascii(c)[1:-1] if _commands(c) and c not in kept else c for c in text)


def as_json(value: Any) -> str:
    """JSON that means what it did, without any such character in it."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(json.dumps(c)[1:-1] if _commands(c) else c for c in text)


def duration(seconds: float) -> str:
    """In words: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _commands(c: str) -> bool:
    return c != "\n" and unicodedata.category(c) in COMMANDS


class Terminal(Console):
    """A console on which strings, those in tables too, are only ever text."""

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text with control characters written out."""
        return super().render_str(plain(text), **options)
