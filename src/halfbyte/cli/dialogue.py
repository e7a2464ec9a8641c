"""A dialogue on the terminal: lines that are asked, answers as they come, and what ends either."""

from __future__ import annotations

import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import Any

from rich.live import Live
from rich.text import Text

from halfbyte import display
from halfbyte.cli.output import err, out
from halfbyte.devices import KINDS, kind_of, title
from halfbyte.errors import BadRequest
from halfbyte.evaluation import vocabulary
from halfbyte.formats import Activations
from halfbyte.inference.conversation import Conversation, Turn, parts_at
from halfbyte.inference.model import Answering
from halfbyte.inference.sampling import LARGEST_SEED, Sampling
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.terminal import JOINERS, plain

with suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  makes of `input` one that edits lines and remembers them

PROMPT = "> "
HELP = """/reset  forget what was said so far
/exit   end; as does the end of the input, and Ctrl-C where nothing is being answered
/help   this
Ctrl-C stops an answer. Everything else is said to the model."""
PER_SECOND = 8
"""How often answers that come side by side are drawn."""


class Interruption:
    """While this lasts, Ctrl-C asks for an end after the next token, so that what was read stays in the cache; while a
    prompt is read, or at the second time, at once."""

    def __init__(self) -> None:
        self.asked = self.gently = False

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.gently:
            raise KeyboardInterrupt
        self.asked = True


class Dialogue:
    """One model that is talked to, or two that are asked the same: the original first."""

    def __init__(self, models: Sequence[Answering], system: str | None, sampling: Sampling, quiet: bool = False):
        self._names = [str(model.checkpoint.path) for model in models]
        self._conversations = [Conversation(model, system) for model in models]
        self._sampling, self._quiet = sampling, quiet
        self._is_interactive = sys.stdin.isatty()

    @classmethod
    def begun(
        cls,
        paths: Sequence[str],
        system: str | None,
        raw: bool,
        context: int | None,
        words: dict[str, Any],
        dtype: str | None,
        activations: Activations,
        device: str,
        quiet: bool,
    ) -> Dialogue:
        """With the models loaded. Raises HalfbyteError."""
        if len(paths) > 1 and (odd := vocabulary.difference(*map(Checkpoint.open, paths))):
            raise BadRequest(f"the tokenizers of {paths[0]} and {paths[1]} differ: {odd}; talk to them one by one")
        models = []
        for path in paths:
            with err.status(f"loading {plain(path)}"):
                models.append(Answering.open(path, device, dtype, context, raw, activations))
        sampling = models[-1].sampling(words)
        if len(models) > 1:
            if sampling.seed is None:  # the same for both
                sampling = sampling.model_copy(update={"seed": secrets.randbelow(LARGEST_SEED)})
            context = min(model.context for model in models)
            models = [replace(model, context=context) for model in models]
        made = cls(models, system, sampling, quiet)
        if not quiet:
            for model in models:
                err.print(display.opened(model, sampling), highlight=False, soft_wrap=True)
        return made

    def run(self) -> None:
        """Until there is nothing more to be said."""
        try:
            for line in self._lines():
                word = line.strip()
                if word == "/exit":
                    return
                if word.startswith("/") and word[1:].isalpha():
                    self._obey(word)
                elif word:
                    self._answer(line)
        finally:
            if not self._quiet:
                self._sum_up()

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                if self._is_interactive:
                    yield input(PROMPT if out.is_terminal else "")
                elif line := sys.stdin.readline():
                    yield line.rstrip("\r\n")
                else:
                    return
            except (EOFError, KeyboardInterrupt):
                if self._is_interactive:
                    err.print()
                return
            except UnicodeDecodeError as error:
                raise BadRequest(f"standard input is not text in {error.encoding}") from None

    def _obey(self, word: str) -> None:
        if word == "/reset":
            for conversation in self._conversations:
                conversation.reset()
            err.print("nothing was said so far")
        elif word == "/help":
            err.print(HELP, highlight=False)
        else:
            err.print(f"there is no {word}; /help lists what there is", highlight=False, soft_wrap=True)

    def _answer(self, line: str) -> None:
        """Both, or the one. What cannot be read ends a program that nobody looks at."""
        try:
            turns = [conversation.ask(line, self._sampling) for conversation in self._conversations]
        except BadRequest as error:
            if not self._is_interactive:
                raise
            err.print(f"{error}; /reset forgets what was said", highlight=False, soft_wrap=True)
            return
        with Interruption() as interruption:
            try:
                self._show(turns, interruption)
            except KeyboardInterrupt:
                interruption.asked = True
        self._remark(turns, interruption.asked)

    def _show(self, turns: Sequence[Turn], interruption: Interruption) -> None:
        if len(turns) == 1:
            self._speak(turns[0], interruption)
        elif out.is_terminal:
            with Live(console=out, refresh_per_second=PER_SECOND) as live:
                for at in _by_turns(turns, interruption):
                    live.update(display.side_by_side(self._names, turns, at))
        else:
            for name, turn in zip(self._names, turns, strict=True):
                out.print(f"{name}:", highlight=False, soft_wrap=True)
                self._speak(turn, interruption)
                if interruption.asked:
                    return

    def _speak(self, turn: Turn, interruption: Interruption) -> None:
        """One answer, as it comes; thoughts are dim."""
        for piece in turn:
            interruption.gently = True
            if out.is_terminal:
                style = "dim" if turn.thinks else ""
                out.print(Text(plain(piece.text, JOINERS), style), end="", soft_wrap=True, highlight=False)
            else:
                out.file.write(piece.text)
                out.file.flush()
            if interruption.asked:
                break
        if not turn.text.endswith("\n"):
            out.file.write("\n")
        out.file.flush()

    def _remark(self, turns: Sequence[Turn], interrupted: bool) -> None:
        """What is to be said of the answers."""
        if interrupted:
            err.print("(stopped)", style="dim", highlight=False)
        elif any(turn.generation.finish_reason == "length" for turn in turns):
            limit = "--max-tokens" if self._sampling.max_tokens else "the context, which is full; /reset begins anew"
            err.print(f"(ended by {limit})", style="dim", highlight=False)
        if len(turns) > 1 and all(turn.pieces for turn in turns):
            at = parts_at(*(turn.tokens for turn in turns))
            out.print(display.parting(self._names, turns, at), highlight=False, soft_wrap=True)

    def _sum_up(self) -> None:
        for name, conversation in zip(self._names, self._conversations, strict=True):
            if conversation.tally.completion_tokens:
                of = f"{name}: " if len(self._names) > 1 else ""
                err.print(f"{of}{display.speeds(conversation.tally)}", highlight=False, soft_wrap=True)
        device = self._conversations[0].answering.device
        on_device = None if kind_of(device).is_host else kind_of(device).peak_bytes(device)
        err.print(display.memory(KINDS["cpu"].peak_bytes(device), on_device, title(device)), highlight=False)


def _by_turns(turns: Sequence[Turn], interruption: Interruption) -> Iterator[int | None]:
    """A token of each at a time; after each, where they part so far."""
    live = list(turns)
    while live and not interruption.asked:
        live = [turn for turn in live if next(turn, None) is not None]
        interruption.gently = True
        yield parts_at(*(turn.tokens for turn in turns))
