"""One prompt, one answer."""

from collections.abc import Callable

from halfbyte.devices import KINDS, kind_of, title
from halfbyte.inference.conversation import Conversation
from halfbyte.inference.sampling import Sampling
from halfbyte.inference.types import Answer


def answer(
    conversation: Conversation, prompt: str, sampling: Sampling, said: Callable[[str], None] | None = None
) -> Answer:
    """What is answered next; `said` is called with each part of the text. Raises HalfbyteError."""
    turn = conversation.ask(prompt, sampling)
    for piece in turn:
        if said and piece.text:
            said(piece.text)
    answering = conversation.answering
    generation, tally, device = turn.generation, conversation.tally, answering.device
    return Answer(
        model=str(answering.checkpoint.path),
        text=turn.text,
        tokens=turn.tokens,
        finish_reason=generation.finish_reason or "length",
        as_chat=answering.template is not None,
        prompt_tokens=generation.prompt_tokens,
        completion_tokens=generation.completion_tokens,
        prefill_seconds=generation.prefill_seconds,
        decode_seconds=generation.decode_seconds,
        prefill_rate=tally.prefill_rate,
        decode_rate=tally.decode_rate,
        memory_bytes=KINDS["cpu"].peak_bytes(device),
        device_bytes=None if kind_of(device).is_host else kind_of(device).peak_bytes(device),
        dtype=str(answering.model.dtype).removeprefix("torch."),
        device=title(device),
        sampling=sampling.model_dump(mode="json", exclude_none=True),
        warnings=list(answering.warnings),
    )
