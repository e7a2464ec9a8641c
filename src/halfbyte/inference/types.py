"""What `run` says, as types."""

from typing import Any, Literal

from pydantic import BaseModel

from halfbyte.report.types import Count, Part

FinishReason = Literal["stop", "length"]


class Answer(Part, BaseModel, frozen=True):
    """What a model said to a prompt, and how long that took."""

    model: str
    text: str
    tokens: list[Count]
    finish_reason: FinishReason
    """stop: the model, or a stop string, ended it; length: --max-tokens, or the context, did."""
    as_chat: bool
    """Whether the prompt went through the model's chat template; else it was continued as it is."""
    prompt_tokens: Count
    completion_tokens: Count
    prefill_seconds: float
    """From the prompt to the first token."""
    decode_seconds: float
    """Of all tokens that follow."""
    prefill_rate: float | None
    """Tokens of the prompt in a second."""
    decode_rate: float | None
    """Further tokens in a second; None where there are none."""
    memory_bytes: Count | None
    """The most that the process had; None where the system does not say."""
    device_bytes: Count | None = None
    """Of a GPU's memory."""
    dtype: str
    device: str
    sampling: dict[str, Any]
    warnings: list[str] = []

    def __str__(self) -> str:
        return self.text
