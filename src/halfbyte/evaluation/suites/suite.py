"""A suite: a JSONL of prompts with a check each. Some are in the package; any other is a file of the user's."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import BadRequest, UnknownName, brief, nearest
from halfbyte.evaluation.suites.checks import CHECKS
from halfbyte.files import parse_json, read_text

HOME = Path(__file__).parent / "data"
SHIPPED = tuple(sorted(path.stem for path in HOME.glob("*.jsonl")))
ALL = "all"
KEYS = ("prompt", "messages", "text", "tools", "check", "expected", "choices", "tokens")
PROMPT_KEYS = ("prompt", "messages", "text")
"""A question for a model that chats, a whole chat, or a text to go on with; one of these."""
TOKENS = 64
"""Of an answer, where a prompt does not say how long it may be."""


@dataclass(frozen=True)
class Prompt:
    """What is asked, and what the answer is held to."""

    place: str
    """The file and the line."""
    line: int
    check: str
    messages: list[dict[str, Any]] | None
    text: str | None
    """To be gone on with as it is: no chat."""
    expected: Any
    choices: tuple[str, ...]
    tools: list[dict[str, Any]] | None
    tokens: int

    @property
    def in_short(self) -> str:
        """The last message."""
        last = self.text if self.messages is None else str(self.messages[-1].get("content"))
        return " ".join((last or "").split())


@dataclass(frozen=True)
class Suite:
    """Prompts, by a name."""

    name: str
    digest: str
    prompts: list[Prompt]


def suites(names: str | Path | Sequence[str | Path]) -> list[Suite]:
    """Those that are named, or lie in these files; `all` that are in the package. Raises BadRequest."""
    named = [names] if isinstance(names, str | Path) else names
    asked = [one for word in named for one in (SHIPPED if word == ALL else [word])]
    return [_suite(word) for word in dict.fromkeys(asked)]


def _suite(word: str | Path) -> Suite:
    path = HOME / f"{word}.jsonl" if word in SHIPPED else Path(word).expanduser()
    if word not in SHIPPED and not path.exists():
        if path.suffix or len(path.parts) > 1 or nearest(str(word), SHIPPED) == []:
            raise BadRequest(
                f"there is no suite file '{word}'; those in the package are {', '.join(SHIPPED)}, and {ALL}"
            )
        raise UnknownName("suite", str(word), [ALL, *SHIPPED])
    text = read_text(path, BadRequest)
    called = str(word) if word in SHIPPED else str(path)
    prompts = [
        _prompt(line, number, f"{path.name if word in SHIPPED else path}, line {number}")
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1)
        if line.strip()
    ]
    if not prompts:
        raise BadRequest(f"{path} has no prompts; a suite has one JSON object in each line")
    return Suite(called, hashlib.sha256(text.encode()).hexdigest(), prompts)


def _prompt(line: str, number: int, place: str) -> Prompt:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise BadRequest(f"{place}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest(f"{place}: is no object; a prompt is one with 'prompt', 'check' and what the check wants")
    if odd := next((key for key in value if key not in KEYS), None):
        raise BadRequest(f"{place}: has the key {brief(odd)}; known are {', '.join(KEYS)}")
    given = [key for key in PROMPT_KEYS if key in value]
    if len(given) != 1:
        raise BadRequest(
            f"{place}: has {' and '.join(given) or 'nothing to ask'}; it wants one of {', '.join(PROMPT_KEYS)}"
        )
    name, tokens, tools = value.get("check"), value.get("tokens", TOKENS), value.get("tools")
    if not isinstance(name, str) or name not in CHECKS:
        raise BadRequest(f"{place}: there is no check {brief(name)}; known are {', '.join(CHECKS)}")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise BadRequest(f"{place}: 'tokens' is {brief(tokens)}, and has to be a whole number, 1 at least")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRequest(f"{place}: 'tools' is {brief(tools)}, and has to be a list of objects")
    return Prompt(
        place=place,
        line=number,
        check=name,
        messages=_messages(value, given[0], place),
        text=_text(value["text"], place) if given[0] == "text" else None,
        expected=value.get("expected"),
        choices=_choices(value, name, place),
        tools=tools,
        tokens=tokens,
    )


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{place}: is asked {brief(value)}, and has to be asked a text")
    return value


def _messages(value: dict[str, Any], kind: str, place: str) -> list[dict[str, Any]] | None:
    if kind == "text":
        return None
    if kind == "prompt":
        return [{"role": "user", "content": _text(value["prompt"], place)}]
    chat = value["messages"]
    if not (
        isinstance(chat, list)
        and chat
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in chat)
    ):
        raise BadRequest(f"{place}: 'messages' is {brief(chat)}, and has to be a list of objects with role and content")
    return chat


def _choices(value: dict[str, Any], name: str, place: str) -> tuple[str, ...]:
    check, choices, expected = CHECKS[name], value.get("choices", []), value.get("expected")
    if not check.wants(expected):
        raise BadRequest(f"{place}: the check {name} {check.wanted}, not {brief(expected)}")
    if name != "choice":
        if choices:
            raise BadRequest(f"{place}: has 'choices', which the check {name} has no use for")
        return ()
    if not (isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)):
        raise BadRequest(f"{place}: 'choices' is {brief(choices)}, and has to be a list of two texts or more")
    if len(set(choices)) < len(choices) or expected not in choices:
        raise BadRequest(f"{place}: 'expected' is {brief(expected)}, and has to be one of 'choices', which all differ")
    return tuple(choices)
