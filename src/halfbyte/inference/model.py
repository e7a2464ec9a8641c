"""A checkpoint that is opened to answer: its model, its tokenizer, its chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte import nn
from halfbyte.devices import AUTO, device_named
from halfbyte.errors import BadCheckpoint, BadRequest, UnknownName
from halfbyte.evaluation.whole import require_answers
from halfbyte.formats import Activations
from halfbyte.inference.memory import context_within
from halfbyte.inference.sampling import Sampling
from halfbyte.models import calibrate, chats
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.precision import DTYPE_NAMES
from halfbyte.multiplying import ready_to_answer

Message = Mapping[str, Any]
DRAWN = ("temperature", "top_k", "top_p", "min_p")
"""What says that tokens are drawn."""
ANSWER = "halfbyte"
"""What is answered where it is looked at how answers end."""


@dataclass(frozen=True)
class Answering:
    """A model in memory, and all that stands between it and text."""

    checkpoint: Checkpoint
    model: Any
    """Of Transformers."""
    tokenizer: Any
    template: str | None
    """Its chat template; None: it has none, and texts are continued."""
    ends: frozenset[int]
    """Tokens that end an answer."""
    context: int
    """Tokens of a prompt and an answer together."""
    device: torch.device
    warnings: tuple[str, ...] = ()
    renderer: chats.Renderer | None = None
    """Of the template."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        device: str = AUTO,
        dtype: str | None = None,
        context: int | None = None,
        raw: bool = False,
        activations: Activations = "exact",
        sequences: int = 1,
    ) -> "Answering":
        """A checkpoint of any kind that is read. `context`: tokens that there is to be memory for in each of so many
        sequences; by default all that the model reads, or as many as there is memory for. `raw`: without the chat
        template that it has.

        Raises HalfbyteError; for what does not fit in memory before it is loaded.
        """
        where = device_named(device)
        if dtype is not None and dtype not in DTYPE_NAMES:
            raise UnknownName("dtype", dtype, DTYPE_NAMES)
        checkpoint = Checkpoint.open(path)
        if not checkpoint.is_decoder:
            raise BadRequest(f"{checkpoint.path} is no decoder, so it answers nothing")
        require_answers([checkpoint])
        tokenizer = calibrate.tokenizer_of(checkpoint)
        computes_in = DTYPE_NAMES[dtype] if dtype else checkpoint.unquantized_dtype
        room, warnings = context_within(checkpoint, computes_in, where, context, sequences)
        model = nn.built(checkpoint, computes_in, where)
        ready_to_answer(model, checkpoint, where, activations)
        template = None if raw else chats.template_of(tokenizer)
        renderer = chats.Renderer(tokenizer) if template else None
        ends = checkpoint.ends | ({tokenizer.eos_token_id} - {None}) | _end_of_turn(tokenizer, renderer)
        return cls(checkpoint, model, tokenizer, template, frozenset(ends), room, where, warnings, renderer)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """The tokens of a text; where it begins, after what the tokenizer puts before one."""
        opening = calibrate.opening(self.tokenizer) if begins else ()
        return [*opening, *self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The tokens of a chat, up to where an answer begins. Raises BadRequest where there is no template, or it does
        not take this chat."""
        if self.renderer is None:
            raise BadRequest(f"{self.checkpoint.path} has no chat template; ask it to continue a text")
        (text,), refused = self.renderer.render([[dict(message) for message in messages]], [tools], to_answer=True)
        if text is None:
            raise BadRequest(f"the model's chat template does not take this chat: {refused[0][1]}")
        return self.encode(text, begins=False)

    def sampling(self, words: Mapping[str, Any]) -> Sampling:
        """These words, and for the rest those of the model's makers. Where nobody says how tokens are drawn, each is
        the most likely one. Raises BadRequest, or BadCheckpoint for what makers cannot mean."""
        said = self.checkpoint.generation
        names = ("repetition_penalty", *(DRAWN if said.get("do_sample") else ()))
        makers = {name: said[name] for name in names if said.get(name) is not None}
        try:
            Sampling.of(makers)
        except BadRequest as error:
            raise BadCheckpoint(f"how {self.checkpoint.path} generates cannot be: {error}") from None
        is_drawn = said.get("do_sample") or any(words.get(name) is not None for name in DRAWN)
        return Sampling.of({"temperature": 1.0} if is_drawn else {}, makers, words)


def _end_of_turn(tokenizer: Any, renderer: chats.Renderer | None) -> set[int]:
    """The token that the template puts after an answer: not every file names it among those that end one."""
    if renderer is None:
        return set()
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ANSWER}]
    (text,), _ = renderer.render([chat])
    after = (text or "").rpartition(ANSWER)[2].lstrip()
    first = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"][:1]
    return {token for token in first if token in tokenizer.added_tokens_decoder}
