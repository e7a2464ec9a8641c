"""Prompts as a model reads them: through its chat template, or as text where it has none."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import BadRequest, plural
from halfbyte.evaluation.suites.checks import THOUGHTS
from halfbyte.evaluation.suites.suite import Prompt
from halfbyte.models import calibrate, chats
from halfbyte.models.checkpoint import Checkpoint

BEFORE = 64
"""Characters of the end of what is read, in which a template may open a thought."""
CALLING = (
    "You can call these functions:\n{tools}\nTo call one, answer with one JSON object and nothing else: "
    '{{"name": "the function", "arguments": {{"argument": "value"}}}}'
)
"""For models whose template knows no tools."""


@dataclass(frozen=True)
class Asked:
    """A prompt, as the tokens that every model reads of it."""

    prompt: Prompt
    tokens: list[int]
    choices: list[list[int]]
    before: str
    """The end of what is read."""
    most: int
    """Tokens of an answer."""


@dataclass(frozen=True)
class Reading:
    """How prompts become tokens, and answers text."""

    tokenizer: Any
    asked: list[Asked]
    ends: set[int]
    """Tokens that end an answer."""
    thinks: bool
    """Whether the model knows any sign of a thought."""
    warnings: list[str]

    def text(self, tokens: Sequence[int]) -> str:
        """Of an answer, without what ends it."""
        return self.tokenizer.decode([token for token in tokens if token not in self.ends], skip_special_tokens=False)


def read(checkpoint: Checkpoint, prompts: Sequence[Prompt], most: int | None = None) -> Reading:
    """All prompts that this model can be asked; `most`: tokens of an answer, in place of each prompt's own.

    Raises BadRequest where none can be.
    """
    tokenizer = calibrate.tokenizer_of(checkpoint)
    template = chats.template_of(tokenizer)
    texts, warnings = _rendered(tokenizer, template, prompts)
    opening = list(calibrate.opening(tokenizer))

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    signs = (template or "") + " ".join(getattr(tokenizer, "added_tokens_encoder", {}))
    reading = Reading(
        tokenizer=tokenizer,
        asked=[],
        ends=checkpoint.ends | ({tokenizer.eos_token_id} - {None}),
        thinks=any(opens in signs for opens in THOUGHTS),
        warnings=warnings,
    )
    room = calibrate.longest(checkpoint, 1 << 62)
    for prompt, text in zip(prompts, texts, strict=True):
        if text is None or (prompt.check == "closed_thinking" and not reading.thinks):
            continue
        is_text = prompt.messages is None or template is None
        choices = [encode(f" {choice}" if is_text else choice) for choice in prompt.choices]
        tokens = [*opening, *encode(text)] if is_text else encode(text)
        longest = max(map(len, choices)) if choices else (most or prompt.tokens)
        if len(tokens) + longest > room:
            raise BadRequest(
                f"{prompt.place}: {len(tokens)} tokens and an answer of {longest} are more than the {room} that "
                "the model reads at once; give a smaller --tokens"
            )
        reading.asked.append(Asked(prompt, tokens, choices, "" if is_text else text[-BEFORE:], longest))
    return reading


def _rendered(tokenizer: Any, template: str | None, prompts: Sequence[Prompt]) -> tuple[list[str | None], list[str]]:
    """What is read of each prompt; None of those that the template does not take, even without a system message."""
    conversations = [_with_tools(prompt, template) for prompt in prompts]
    if template is None:
        return [
            prompt.text if chat is None else _as_text(chat)
            for prompt, (chat, _) in zip(prompts, conversations, strict=True)
        ], []
    rendered = [prompt.text for prompt in prompts]
    refused: list[tuple[int, str]] = []
    for folds in (False, True):
        if left := [number for number, text in enumerate(rendered) if text is None]:
            talks = [conversations[number][0] or [] for number in left]
            texts, odd = chats.render(
                tokenizer,
                [_folded(chat) for chat in talks] if folds else talks,
                [conversations[number][1] for number in left],
                to_answer=True,
            )
            for number, text in zip(left, texts, strict=True):
                rendered[number] = text
            refused = [(left[at], reason) for at, reason in odd]
    reasons = [f"{prompts[number].place}: the chat template does not take it: {reason}" for number, reason in refused]
    if len(reasons) == len(prompts):
        raise BadRequest(reasons[0])
    return rendered, [f"not asked: {plural(len(reasons), 'prompt')}; {reasons[0]}"] if reasons else []


def _with_tools(prompt: Prompt, template: str | None) -> tuple[list[dict[str, Any]] | None, list[dict] | None]:
    """The chat and its tools; tools that the template does not know of are told of in words."""
    if not prompt.tools or prompt.messages is None or (template and "tools" in template):
        return prompt.messages, prompt.tools
    tools = "\n".join(json.dumps(tool.get("function", tool)) for tool in prompt.tools)
    return [{"role": "system", "content": CALLING.format(tools=tools)}, *prompt.messages], None


def _folded(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the system's words as a part of what the user says first."""
    if len(chat) < 2 or chat[0]["role"] != "system":
        return chat
    return [{**chat[1], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}, *chat[2:]]


def _as_text(chat: list[dict[str, Any]]) -> str:
    """Of a chat, for a model without a template: questions, and answers up to the one that it is to give."""
    templates = {"user": "Question: {}", "assistant": "Answer: {}"}
    return "\n".join([templates.get(m["role"], "{}").format(m["content"]) for m in chat] + ["Answer:"])
