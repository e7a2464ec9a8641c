"""Turns of a chat, of which each reads what is new alone; or a text that goes on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import BadRequest
from halfbyte.evaluation.suites.checks import THOUGHTS
from halfbyte.inference.generation import CachedSequence, Generation, Piece
from halfbyte.inference.model import Answering
from halfbyte.inference.sampling import Sampling

BEFORE = 16
"""Tokens at the end of a prompt, in which a template may open a thought."""


@dataclass(frozen=True)
class Tally:
    """Tokens of several answers, and what they took."""

    prompt_tokens: int = 0
    """Of prompts, those that were not in the cache."""
    prefill_seconds: float = 0.0
    completion_tokens: int = 0
    decoded: int = 0
    """Tokens of answers after the first one of each, which comes of reading the prompt."""
    decode_seconds: float = 0.0

    def with_one_more(self, generation: Generation | None) -> "Tally":
        """An answer added, as far as it came."""
        if generation is None or not generation.completion_tokens:
            return self
        return Tally(
            self.prompt_tokens + generation.prompt_tokens - generation.reused_tokens,
            self.prefill_seconds + generation.prefill_seconds,
            self.completion_tokens + generation.completion_tokens,
            self.decoded + generation.completion_tokens - 1,
            self.decode_seconds + generation.decode_seconds,
        )

    @property
    def prefill_rate(self) -> float | None:
        """Tokens in a second; None of none."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens in a second; None of none."""
        return self.decoded / self.decode_seconds if self.decode_seconds else None


class Conversation:
    """What was said so far, by a user and a model."""

    def __init__(self, answering: Answering, system: str | None = None):
        """Raises BadRequest for a model that takes no system message."""
        self.answering, self._earlier = answering, Tally()
        self._latest: Generation | None = None
        self._system = [{"role": "system", "content": system}] if system else []
        if system:
            if answering.template is None:
                raise BadRequest(
                    f"{answering.checkpoint.path} is asked to continue texts, where there is no place for a system "
                    "message; leave out --system"
                )
            answering.render([*self._system, {"role": "user", "content": "hello"}])  # now, and not at the first turn
        self.reset()

    def reset(self) -> None:
        """Forget all of it, but not the system message."""
        self._earlier, self._latest = self.tally, None
        self._sequence = CachedSequence(self.answering.model)
        self._messages: list[dict[str, Any]] = list(self._system)
        self._tokens: list[int] = []

    @property
    def tally(self) -> Tally:
        """Of all answers."""
        return self._earlier.with_one_more(self._latest)

    def ask(self, text: str, sampling: Sampling) -> "Turn":
        """The answer to what the user says next. Raises BadRequest for what the model cannot read."""
        messages = [*self._messages, {"role": "user", "content": text}]
        if self.answering.template is not None:
            tokens = self.answering.render(messages)
        elif self._tokens:
            tokens = [*self._tokens, *self.answering.encode(f"\n{text}", begins=False)]
        else:
            tokens = self.answering.encode(text)
        generation = Generation(self.answering, tokens, sampling, self._sequence)
        answer = {"role": "assistant", "content": ""}
        self._messages, self._tokens = [*messages, answer], list(tokens)
        self._earlier, self._latest = self.tally, generation
        before = self.answering.tokenizer.decode(tokens[-BEFORE:], skip_special_tokens=False)
        return Turn(generation, answer, self._tokens, before)


class Turn(Iterator[Piece]):
    """An answer that comes piece by piece; however far it came, the conversation goes on from there."""

    def __init__(self, generation: Generation, answer: dict[str, Any], tokens: list[int], before: str):
        self.generation, self._answer, self._tokens, self._before = generation, answer, tokens, before
        self.pieces: list[Piece] = []

    def __next__(self) -> Piece:
        piece = next(self.generation)
        self.pieces.append(piece)
        self._answer["content"] += piece.text
        self._tokens += piece.tokens if self.generation.finish_reason != "stop" else ()
        return piece

    @property
    def text(self) -> str:
        """What was said so far."""
        return self._answer["content"]

    @property
    def tokens(self) -> list[int]:
        """All tokens so far."""
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def thinks(self) -> bool:
        """Whether a thought is open, which the prompt may have begun."""
        whole = self._before + self.text
        return any(whole.rfind(opens) > whole.rfind(closes) for opens, closes in THOUGHTS.items())


def parts_at(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The first token at which two answers are not the same; None where neither goes another way so far."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
