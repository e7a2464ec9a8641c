"""What clients ask, by OpenAI's protocol: read strictly, as a word that is passed over would be answered otherwise than
was asked."""

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from halfbyte.errors import brief
from halfbyte.files import parse_json
from halfbyte.inference.sampling import Sampling
from halfbyte.inference.server.refusal import Refusal

Request = TypeVar("Request", bound="Asked")

PASSED_OVER = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "parallel_tool_calls",
)
"""What changes no answer here."""
NEUTRAL: dict[str, tuple[tuple[object, ...], str]] = {
    "n": ((1,), "one answer is given to a request; ask again for another"),
    "best_of": ((1,), "one answer is given to a request"),
    "echo": ((False,), "the prompt is not repeated"),
    "suffix": (("",), "texts are continued, and not filled in"),
    "presence_penalty": ((0,), "there is repetition_penalty in its place"),
    "frequency_penalty": ((0,), "there is repetition_penalty in its place"),
    "logit_bias": (({},), "tokens are chosen as the model predicts"),
    "response_format": (({"type": "text"},), "answers are text, of no form"),
    "modalities": ((["text"],), "answers are text"),
    "tool_choice": (("auto", "none"), "the model chooses; auto and none are known"),
}
"""Words that are known, the values of them that ask for nothing, and why no others are met."""
STOPS, TOOLS, LIKELIEST = 16, 128, 20
"""The most that a request has of each."""
COMPLETION_TOKENS = 16
"""Of a text that is continued, where the request does not say how many: as OpenAI has it."""


def read(kind: type[Request], body: bytes) -> Request:
    """The request in a body. Raises Refusal."""
    try:
        words = parse_json(body)
    except ValueError as wrong:
        raise Refusal(400, f"the body is not JSON: {wrong}") from None
    if not isinstance(words, dict):
        raise Refusal(400, f"the body is {brief(words)}, and has to be a JSON object")
    for name, (values, reason) in NEUTRAL.items():
        if words.get(name) is not None and words[name] not in values:
            raise Refusal(400, f"{name}: {reason}, and was asked to be {brief(words[name])}", name)
    passed_over = {*PASSED_OVER, *NEUTRAL} - {"tool_choice"}
    try:
        return kind.model_validate({name: value for name, value in words.items() if name not in passed_over})
    except ValidationError as error:
        raise _refusal(error, kind) from None


def _refusal(error: ValidationError, kind: type["Asked"]) -> Refusal:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"{place} is not known here; known are {', '.join(kind.model_fields)}", place)
    reason = first["msg"].removeprefix("Value error, ")
    reason = f"{reason[:1].lower()}{reason[1:]}"
    given = "" if first["type"] == "missing" else f", not {brief(first['input'])}"
    return Refusal(400, f"{place}: {reason}{given}" if place else reason, place or None)


class Part(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(Part):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


def _one_or_several(value: object) -> object:
    return [value] if isinstance(value, str) else value


class Asked(Part):
    """What both kinds of requests have."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_one_or_several)] = Field(None, max_length=STOPS)

    @model_validator(mode="after")
    def _options_of_a_stream(self):
        if self.stream_options and not self.stream:
            raise ValueError("stream_options are of answers that are streamed; give stream: true too")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer; None: all that there is room for."""
        return self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """Of how many tokens the log-probability is wanted, beside that of the one that was chosen."""
        return None

    @property
    def sampling(self) -> dict[str, Any]:
        """How tokens are chosen, in words; None is not said."""
        words = {name: getattr(self, name) for name in Sampling.model_fields if name in type(self).model_fields}
        return words | {"max_tokens": self.limit, "logprobs": self.likeliest, "stop": tuple(self.stop or ()) or None}


def _text_of(value: object) -> object:
    """Parts of a text as one."""
    if not isinstance(value, list):
        return value
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text, or a list of parts of type 'text': this server reads nothing else")
    return "\n".join(map(str, texts))


class FunctionCall(Part):
    """Which function the model called, with what."""

    name: str
    arguments: str

    @property
    def values(self) -> dict[str, Any]:
        """The arguments as templates read them. Raises ValueError."""
        values = json.loads(self.arguments)
        if not isinstance(values, dict):
            raise ValueError
        return values

    @model_validator(mode="after")
    def _are_an_object(self):
        try:
            self.values  # noqa: B018
        except (ValueError, RecursionError):
            raise ValueError("arguments are a JSON object, as a string") from None
        return self


class ToolCall(Part):
    """A call of the model's that a chat tells of."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One of a chat."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text_of)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _is_whole(self):
        if self.content is None and not self.tool_calls:
            raise ValueError("a message has content")
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], ""):
                raise ValueError(f"{name} is not read here")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates read it. A developer's is a system message to models of others than OpenAI."""
        words: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.tool_calls:
            words["tool_calls"] = [
                {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": arguments}}
                for call in self.tool_calls
                if (arguments := call.function.values) is not None
            ]
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        return words | {name: value for name, value in more.items() if value is not None}


class Function(BaseModel):
    """A function that the model may call: handed on to its template as it is."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: str


class Tool(Part):
    """What the model may call."""

    type: Literal["function"]
    function: Function


class ChatRequest(Asked):
    """Of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=LIKELIEST)
    tools: list[Tool] | None = Field(None, max_length=TOOLS)
    tool_choice: str | None = None

    @model_validator(mode="after")
    def _likeliest_of_logprobs(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs are given with logprobs; give logprobs: true too")
        return self

    @property
    def limit(self) -> int | None:
        """The newer word goes first."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """None, where no log-probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def chat(self) -> list[dict[str, Any]]:
        """As templates read it."""
        return [message.for_template() for message in self.messages]

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """Those that the model is told of."""
        return [tool.model_dump() for tool in self.tools] if self.tools and self.tool_choice != "none" else None


def _only_prompt(value: object) -> object:
    """A list of one prompt is that one."""
    if isinstance(value, list) and any(isinstance(part, str | list) for part in value):
        if len(value) > 1:
            raise ValueError("one prompt is continued in a request")
        value = value[0]
    if not isinstance(value, str) and not (isinstance(value, list) and all(type(part) is int for part in value)):
        raise ValueError("a text, or a list of tokens")
    return value


class CompletionRequest(Asked):
    """Of /v1/completions."""

    prompt: Annotated[str | list[int], BeforeValidator(_only_prompt)]
    logprobs: int | None = Field(None, ge=0, le=LIKELIEST)

    @property
    def limit(self) -> int | None:
        """Few, where nobody says how many."""
        return self.max_tokens or COMPLETION_TOKENS

    @property
    def likeliest(self) -> int | None:
        """As the word says."""
        return self.logprobs
