"""Tokens to text as they come: whole characters only, and nothing of what ends an answer."""

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers make of bytes that are no whole character yet."""
BEFORE = 8
"""Tokens before an answer that are decoded with it: whether a word begins with a space depends on what is there."""


class TextStream:
    """The text of tokens that come one by one, up to a stop string."""

    def __init__(self, tokenizer: Any, before: Sequence[int], stop: Sequence[str] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(before[-BEFORE:])
        self._decoded, self._open = 0, len(self._tokens)
        """Where decoding begins, and where that begins which is not said yet."""
        self._held = ""
        self.stopped = False
        """Whether a stop string has come."""

    def add(self, token: int) -> str:
        """What there is to say with one more token: nothing that may be the beginning of a stop string."""
        self._tokens.append(token)
        text = self._new()
        if text.endswith(UNFINISHED):
            return ""
        self._decoded, self._open = self._open, len(self._tokens)
        return self._said(text)

    def end(self) -> str:
        """What is left to say."""
        said = self._said(self._new())
        said, self._held = said + self._held, ""
        self._decoded = self._open = len(self._tokens)
        return said

    def _new(self) -> str:
        """The text of the tokens that are not said yet, as it is after those before them."""
        known = self._decode(self._tokens[self._decoded : self._open])
        return self._decode(self._tokens[self._decoded :])[len(known) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _said(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            said, self._held, self.stopped = self._held[: min(found)], "", True
            return said
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        at = len(self._held) - keep
        said, self._held = self._held[:at], self._held[at:]
        return said


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of the text with which the stop string begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
