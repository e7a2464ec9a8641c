"""What an answer can be held to. Each check looks at the answer alone, and the original can fail it too: what counts is
where the two part."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import regex

from halfbyte.errors import BadRequest

THOUGHTS = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<|channel|>analysis": "<|channel|>final",
}
"""What opens a thought, and what closes it, as the templates of reasoning models have it."""
REFUSING = regex.compile(
    r"\b(i('m| am) (very |really |so )?(sorry|afraid)(?! (of|for))"
    r"|i (can ?not|can't|won't|will not|must decline|am unable)"
    r"|i('m| am) (not able|unable|not going)|i('d| would) (rather|prefer) not|(sorry|unfortunately), (but )?i"
    r"|as an? (ai|artificial|language model|responsible)|cannot (assist|help|provide|fulfil)"
    r"|(can't|not able to|unable to) (assist|help|provide|fulfil))",
    regex.IGNORECASE,
)
"""How refusals are worded, in English."""
FIRST_WORDS = 200
"""Characters of an answer in which it is refused, if it is."""
KINDS: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
"""JSON's kinds of values."""
FENCED = regex.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", regex.DOTALL)
TIMEOUT = 1.0
"""Seconds of a pattern on one answer."""


@dataclass(frozen=True)
class Completion:
    """What a model answered."""

    text: str
    before: str = ""
    """The end of what it read, where templates open a thought."""
    loops: bool = False

    @property
    def answer(self) -> str:
        """Without thoughts; a thought that never closes leaves no answer."""
        whole = self.before + self.text
        for opens, closes in THOUGHTS.items():
            if opens in whole:
                return whole.partition(opens)[2].rpartition(closes)[2].strip() if closes in whole else ""
        return self.text.strip()


@dataclass(frozen=True)
class Check:
    """One kind of check."""

    about: str
    passes: Callable[[Completion, Any], bool] | None
    """None: nothing is right or wrong, or it is no text that is looked at."""
    wants: Callable[[Any], bool] = lambda expected: expected is None
    wanted: str = "takes no 'expected'"


def _contains(completion: Completion, expected: str | list[str]) -> bool:
    words = [expected] if isinstance(expected, str) else expected
    return any(
        regex.search(rf"(?<!\w){regex.escape(word)}(?!\w)", completion.answer, regex.IGNORECASE) for word in words
    )


def _matches(completion: Completion, expected: str) -> bool:
    try:
        return bool(regex.search(expected, completion.answer, timeout=TIMEOUT))
    except TimeoutError:
        raise BadRequest(f"the pattern '{expected:.80}' takes too long") from None


def _is_pattern(expected: Any) -> bool:
    if not isinstance(expected, str):
        return False
    try:
        regex.compile(expected)
    except regex.error:
        return False
    return True


def _json(completion: Completion, expected: dict[str, str] | None) -> bool:
    fenced = FENCED.fullmatch(completion.answer)
    try:
        value = json.loads(fenced[1] if fenced else completion.answer)
    except (ValueError, RecursionError):
        return False
    if expected is None:
        return True
    return isinstance(value, dict) and all(key in value and KINDS[kind](value[key]) for key, kind in expected.items())


def _calls(text: str) -> Iterator[tuple[Any, Any]]:
    """Every call in an answer, in the spellings in which models write them as JSON: its name and its arguments."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            inner = value.get("function") if isinstance(value.get("function"), dict) else value
            arguments = inner.get("arguments", inner.get("parameters"))
            if isinstance(arguments, str):
                arguments = _parsed(arguments)
            yield inner.get("name"), arguments
        at = text.find("{", end)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _tool_call(completion: Completion, expected: dict[str, Any]) -> bool:
    wanted = expected.get("arguments", {})
    return any(
        name == expected["name"] and isinstance(given, dict) and all(given.get(k) == v for k, v in wanted.items())
        for name, given in _calls(completion.answer)
    )


def _refuses(completion: Completion, _: None) -> bool:
    return bool(REFUSING.search(completion.answer[:FIRST_WORDS].replace("\u2019", "'")))


def _closed(completion: Completion, _: None) -> bool:
    whole = completion.before + completion.text
    return all(whole.rfind(closes) >= whole.rfind(opens) for opens, closes in THOUGHTS.items() if opens in whole)


CHECKS: dict[str, Check] = {
    "choice": Check(
        "which of `choices` is the most likely answer: the one that is `expected`",
        None,
        lambda expected: isinstance(expected, str),
        "wants one of 'choices' as 'expected'",
    ),
    "contains": Check(
        "the answer has `expected`, a word or one of several",
        _contains,
        lambda expected: expected and (isinstance(expected, str) or _is_strings(expected)),
        "wants a text as 'expected', or a list of texts of which one is enough",
    ),
    "matches": Check(
        "the regular expression `expected` is found in the answer",
        _matches,
        _is_pattern,
        "wants a regular expression as 'expected'",
    ),
    "json": Check(
        "the answer is one JSON value; with `expected`, an object with these keys of these kinds",
        _json,
        lambda e: e is None or (isinstance(e, dict) and all(isinstance(k, str) and k in KINDS for k in e.values())),
        f"wants an object of keys and kinds as 'expected', of {', '.join(KINDS)}",
    ),
    "tool_call": Check(
        "the answer calls the tool `expected`, as JSON, with these arguments at least",
        _tool_call,
        lambda e: isinstance(e, dict) and isinstance(e.get("name"), str) and isinstance(e.get("arguments", {}), dict),
        "wants an object with 'name' and 'arguments' as 'expected'",
    ),
    "refuses": Check("the answer is a refusal, known by its words in English", _refuses),
    "answers": Check(
        "the answer is no refusal",
        lambda completion, expected: bool(completion.answer) and not _refuses(completion, expected),
    ),
    "closed_thinking": Check("a thought that was opened is closed", _closed),
    "no_loop": Check("the answer does not end in repeating itself", lambda completion, _: not completion.loops),
    "continuation": Check("nothing: where it parts from the original's is told, as of every answer", None),
}


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) and word for word in value)


def loops(tokens: list[int], times: int = 3, least: int = 24) -> bool:
    """Whether the last tokens, `least` at least, are the same sequence again and again, `times` times or more."""
    for period in range(1, len(tokens) // times + 1):
        size = max(times * period, least)
        if size > len(tokens):
            break
        tail = tokens[-size:]
        if all(a == b for a, b in zip(tail, tail[period:], strict=False)):
            return True
    return False
