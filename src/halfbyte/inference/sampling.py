"""How the next token is chosen, in words: no torch."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from halfbyte.errors import BadRequest, UnknownName, brief
from halfbyte.recipe import Entries

LARGEST_SEED = (1 << 63) - 1


class Sampling(Entries, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """What a token is chosen by, and when there are enough of them."""

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """How evenly tokens are drawn: 0 always takes the most likely one, 1 draws as the model predicts."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw among the most likely tokens that have this probability together."""
    top_k: int = Field(default=0, ge=0)
    """Draw among so many of the most likely tokens; 0 among all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Draw among tokens that have at least this share of the most likely one's probability."""
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Above 1, tokens that the text has already become less likely."""
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED)
    """Which tokens are drawn: with the same seed, the same ones."""
    max_tokens: int | None = Field(default=None, ge=1)
    """The most that an answer has."""
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""
    logprobs: int | None = Field(default=None, ge=0)
    """With each token, its log-probability and that of so many of the most likely ones."""

    @classmethod
    def of(cls, *words: Mapping[str, Any]) -> "Sampling":
        """What these say, later ones before earlier ones; what is None is not said. Raises BadRequest."""
        said = {name: value for given in words for name, value in given.items() if value is not None}
        try:
            made = cls(**said)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                raise UnknownName("sampling option", name, cls.model_fields) from None
            reason = first["msg"].lower().removeprefix("value error, ")
            raise BadRequest(f"{name}: {reason}, not {brief(first.get('input'))}") from None
        if not all(made.stop):
            raise BadRequest("stop: a text at which an answer is to end has one character at least")
        return made
