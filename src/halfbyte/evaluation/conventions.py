"""How a text becomes scored positions. Perplexities of one model differ by half between conventions, so each has a
name."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.errors import UnknownName

if TYPE_CHECKING:
    from halfbyte.models.calibrate import Begin


@dataclass(frozen=True)
class Convention:
    """Windows do not overlap; positions from `skip * length` on are scored, each predicting the next token."""

    name: str
    skip: float
    begin: "Begin"
    about: str

    def first_scored(self, length: int, opening: int) -> int:
        """The first position whose prediction is scored: no model is asked to predict how a text begins."""
        return max(int(length * self.skip), opening - 1 if self.begin == "before" else 0)


CONVENTIONS = {
    "served": Convention(
        "served",
        0.0,
        "before",
        "each window begins as the tokenizer begins a text, and every token of the text after it is scored",
    ),
    "papers": Convention(
        "papers",
        0.0,
        "none",
        "non-overlapping windows of text alone, every position scored (GPTQ, AWQ and later papers)",
    ),
    "llama.cpp": Convention(
        "llama.cpp",
        0.5,
        "over",
        "llama-perplexity: the second half of each window scored, BOS first if the tokenizer adds it",
    ),
}


def convention_named(name: str) -> Convention:
    """Raises UnknownName."""
    if name not in CONVENTIONS:
        raise UnknownName("convention", name, CONVENTIONS)
    return CONVENTIONS[name]
