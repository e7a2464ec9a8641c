"""What clients are answered, in OpenAI's words: whole, or in pieces as they come."""

import json
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from transformers.convert_slow_tokenizer import bytes_to_unicode

from halfbyte.inference.generation import Piece
from halfbyte.inference.server.scheduler import Done
from halfbyte.inference.text import UNFINISHED

Words = dict[str, Any]
"""JSON."""
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece calls a token that is one byte."""


class Said(NamedTuple):
    """What one forward pass adds, in words."""

    text: str
    logprobs: list[Words]
    """Of each token: the token, its log-probability, its bytes, and the same of the likeliest."""


class TokenNames:
    """Tokens as clients read them: each by itself, where it stands inside a text."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._before = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        self._bytes = {letter: byte for byte, letter in bytes_to_unicode().items()}

    def said(self, piece: Piece, is_end: bool) -> Said:
        """A piece of an answer. The token that ends an answer is no part of it."""
        logprobs = [] if is_end else piece.logprobs
        return Said(
            piece.text,
            [
                {
                    **self._named(of.token, of.logprob),
                    "top_logprobs": [self._named(token, logprob) for token, logprob in of.top],
                }
                for of in logprobs
            ],
        )

    def _named(self, token: int, logprob: float) -> Words:
        text = self._decode([*self._before, token])[len(self._decode(self._before)) :]
        return {"token": text, "logprob": logprob, "bytes": list(self._bytes_of(token, text))}

    def _bytes_of(self, token: int, text: str) -> bytes:
        """Also of a token that is no whole character."""
        piece = self._tokenizer.convert_ids_to_tokens(token) or "" if UNFINISHED in text else ""
        if match := BYTE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        if piece and all(letter in self._bytes for letter in piece):
            return bytes(self._bytes[letter] for letter in piece)
        return text.encode(errors="replace")

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Response(ABC):
    """The answer to one request."""

    kind: str
    """Of the whole object."""
    piece_kind: str
    prefix: str

    def __init__(self, model: str):
        self.id, self._model, self._created = f"{self.prefix}-{uuid.uuid4().hex}", model, int(time.time())

    @abstractmethod
    def opening(self) -> Words | None:
        """The choice of the first piece of a stream, before anything is said."""

    @abstractmethod
    def choice(self, said: Said) -> Words:
        """The choice of a piece of a stream."""

    @abstractmethod
    def message(self, said: Sequence[Said]) -> Words:
        """The choice of a whole answer."""

    @abstractmethod
    def closing(self) -> Words:
        """What the last piece of a stream says, but for how it ended."""

    def whole(self, said: Sequence[Said], done: Done) -> Words:
        """All of it at once."""
        choice = {"index": 0, **self.message(said), "finish_reason": done.finish_reason}
        return {**self._head(self.kind), "choices": [choice], "usage": usage(done)}

    def piece(self, choice: Words, finish_reason: str | None = None) -> Words:
        """A part of a stream."""
        choices = [{"index": 0, "logprobs": None, **choice, "finish_reason": finish_reason}]
        return {**self._head(self.piece_kind), "choices": choices}

    def counts(self, done: Done) -> Words:
        """The part of a stream that says how many tokens there were."""
        return {**self._head(self.piece_kind), "choices": [], "usage": usage(done)}

    def _head(self, kind: str) -> Words:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}


class ChatResponse(Response):
    """Of a chat."""

    kind, piece_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> Words:
        """Who speaks."""
        return {"delta": {"role": "assistant", "content": ""}}

    def choice(self, said: Said) -> Words:
        """What is said."""
        return {"delta": {"content": said.text}, "logprobs": _contents([said])}

    def message(self, said: Sequence[Said]) -> Words:
        """All that was said."""
        text = "".join(part.text for part in said)
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": _contents(said)}

    def closing(self) -> Words:
        """Nothing more."""
        return {"delta": {}}


class CompletionResponse(Response):
    """Of a text that is continued."""

    kind = piece_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str):
        super().__init__(model)
        self._length = 0
        """Characters that were said."""

    def opening(self) -> None:
        """Nothing: a text has no speaker."""

    def choice(self, said: Said) -> Words:
        """What is said."""
        return {"text": said.text, "logprobs": self._columns([said])}

    def message(self, said: Sequence[Said]) -> Words:
        """All that was said."""
        return {"text": "".join(part.text for part in said), "logprobs": self._columns(said)}

    def closing(self) -> Words:
        """Nothing more."""
        return {"text": ""}

    def _columns(self, said: Sequence[Said]) -> Words | None:
        """Log-probabilities by column; `text_offset` is how much was said before the token."""
        columns: Words = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for part in said:
            for of in part.logprobs:
                columns["tokens"].append(of["token"])
                columns["token_logprobs"].append(of["logprob"])
                columns["top_logprobs"].append({likely["token"]: likely["logprob"] for likely in of["top_logprobs"]})
                columns["text_offset"].append(self._length)
            self._length += len(part.text)
        return columns if columns["tokens"] else None


def usage(done: Done) -> Words:
    """How many tokens there were."""
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }


def event(words: Words) -> bytes:
    """A part of a stream as it is sent."""
    return f"data: {json.dumps(words, ensure_ascii=False)}\n\n".encode(errors="replace")


END = b"data: [DONE]\n\n"


def _contents(said: Iterable[Said]) -> Words | None:
    tokens = [of for part in said for of in part.logprobs]
    return {"content": tokens, "refusal": None} if tokens else None
