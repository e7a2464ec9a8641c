"""A checkpoint that is opened to answer: its model, its tokenizer, its chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfbyte import nn
from halfbyte.devices import AUTO, device_named
from halfbyte.errors import BadRequest, UnknownName
from halfbyte.evaluation.whole import require_answers
from halfbyte.inference.memory import context_within
from halfbyte.models import calibrate, chats
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.models.precision import DTYPE_NAMES

Message = Mapping[str, Any]


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

    @classmethod
    def open(
        cls, path: str | Path, device: str = AUTO, dtype: str | None = None, context: int | None = None
    ) -> "Answering":
        """A checkpoint of any kind that is read. `context`: tokens that there is to be memory for; by default all that
        the model reads, or as many as there is memory for.

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
        room, warnings = context_within(checkpoint, computes_in, where, context)
        model = nn.built(checkpoint, computes_in, where)
        nn.ready_to_answer(model, checkpoint, where)
        ends = checkpoint.ends | ({tokenizer.eos_token_id} - {None})
        return cls(checkpoint, model, tokenizer, chats.template_of(tokenizer), frozenset(ends), room, where, warnings)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, after what the tokenizer puts before one."""
        return [*calibrate.opening(self.tokenizer), *self._tokens(text)]

    def render(self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The tokens of a chat, up to where an answer begins. Raises BadRequest where there is no template, or it does
        not take this chat."""
        if self.template is None:
            raise BadRequest(f"{self.checkpoint.path} has no chat template; ask it to continue a text")
        (text,), refused = chats.render(self.tokenizer, [[dict(m) for m in messages]], [tools], to_answer=True)
        if text is None:
            raise BadRequest(f"the model's chat template does not take this chat: {refused[0][1]}")
        return self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
