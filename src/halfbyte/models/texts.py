"""What a source of text holds: plain text, or records in the shapes in which people keep texts, instructions and
chats."""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.errors import BadRequest, plural

DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%-]+)?")
LINES, LISTS, TABLES = (".jsonl", ".ndjson"), (".json",), {".csv": ",", ".tsv": "\t"}
BINARY = {".parquet": "Parquet", ".arrow": "Arrow"}
CHATS = ("messages", "conversations", "conversation")
PAIRS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
"""Keys of what is asked and of what is answered."""
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""ShareGPT's names of who speaks, and those of templates."""
EXPECTED = (
    "a record is a string, a list of messages, or an object with 'text', with 'messages' or 'conversations', "
    + ", ".join(f"with '{ask}' and '{answer}'" for ask, answer in PAIRS[:-1])
    + f", or with '{PAIRS[-1][0]}' and '{PAIRS[-1][1]}'"
)


class Record(NamedTuple):
    """One text or one chat, and where it stands."""

    location: str
    text: str | None
    """As a model without a chat template sees it; None: a chat is no text without one."""
    messages: list[dict[str, Any]] | None = None
    is_whole: bool = True
    """Whether the tokenizer's special tokens belong around it: a file of text is cut anyway."""


NAMED = re.compile(r"([\w-]+)=(.+)", re.DOTALL)


def named(argument: str) -> tuple[str | None, str]:
    """What a text is called, and where it is: of `de=news.txt`, "de" and the file; a file called that has none."""
    match = NAMED.fullmatch(argument)
    return (match[1], match[2]) if match and not Path(argument).expanduser().exists() else (None, argument)


def called(source: str | Path | tuple[str, ...]) -> str:
    """A source of text in messages and reports."""
    return f"{plural(len(source), 'text')} given" if isinstance(source, tuple) else str(source)


def records(source: str | Path | tuple[str, ...]) -> list[Record]:
    """All that a file or a dataset holds, or texts that are given.

    Raises BadRequest for one that is not there, cannot be read, or holds records of another shape.
    """
    if isinstance(source, tuple):
        return [Record(f"text {number}", sound(text, f"text {number}")) for number, text in enumerate(source, 1)]
    path = Path(source).expanduser()
    if path.is_file():
        return _of_file(path)
    if DATASET.fullmatch(str(source)) and not path.exists():
        return [_record(value, f"{source}, record {number}") for number, value in enumerate(_dataset(str(source)), 1)]
    raise BadRequest(f"there is no text file '{source}'")


def _of_file(path: Path) -> list[Record]:
    """Raw text, unless the file's name says that it holds records."""
    kind = path.suffix.lower()
    if kind in BINARY:
        raise BadRequest(
            f"{path} is in {BINARY[kind]}, which is not read here; save its records as .jsonl, one JSON object per line"
        )
    text = _read(path)
    if kind in LINES or (kind in LISTS and not _is_whole(text)):
        return [
            _record(_parsed(line, f"{path}, line {n}", f"; {EXPECTED}"), f"{path}, line {n}")
            for n, line in _lines(text)
        ]
    if kind in LISTS:
        value = _parsed(text, str(path))
        return [
            _record(one, f"{path}, record {number}")
            for number, one in enumerate(value if isinstance(value, list) else [value], 1)
        ]
    if kind in TABLES:
        return [_record(row, f"{path}, row {number}") for number, row in enumerate(_rows(text, TABLES[kind], path), 1)]
    return [Record(str(path), text, is_whole=False)]


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path} is not UTF-8 text: {error}") from None
    if "\0" in text:
        raise BadRequest(f"{path} is not text: it holds NUL bytes")
    return text


def _is_whole(text: str) -> bool:
    """Whether a .json file is one value, and not a record per line."""
    if text.lstrip().startswith("["):
        return True
    lines = [line for _, line in _lines(text)]
    return len(lines) > 1 and lines[0].strip() == "{"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Not splitlines(): JSON strings may hold other kinds of line ends."""
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _parsed(text: str, location: str, expected: str = "") -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise BadRequest(f"{location}: is nested too deeply{expected}") from None
    except ValueError as error:
        raise BadRequest(f"{location}: is not JSON: {error}{expected}") from None


def _rows(text: str, delimiter: str, path: Path) -> list[dict[str, Any]]:
    """Of a table whose first row names its columns."""
    limit = csv.field_size_limit(max(len(text), 1))  # a cell may hold a whole book
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise BadRequest(f"{path} is no table: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if odd := next((number for number, row in enumerate(rows, 1) if None in row), None):
        raise BadRequest(
            f"{path}, row {odd}: has more cells than the first row has names; put cells that hold a "
            f"'{delimiter}' in quotes"
        )
    return [{name: cell for name, cell in row.items() if cell is not None} for row in rows]


def _dataset(source: str) -> Any:
    """Records of `org/name` or `org/name:split` on the hub."""
    try:
        import datasets  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError:
        raise BadRequest(
            f"there is no text file '{source}'; to look for it on the hub as a dataset: pip install "
            "'halfbyte[datasets]'"
        ) from None
    name, _, split = source.partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise BadRequest(f"dataset {source} cannot be read: {' '.join(str(error).split())}") from None


def _record(value: Any, location: str) -> Record:
    if isinstance(value, str):
        return Record(location, sound(value, location))
    if isinstance(value, list):
        return Record(location, None, _messages(value, location))
    if not isinstance(value, dict):
        raise BadRequest(f"{location}: is {_called(value)}; {EXPECTED}")
    if chat := next((value[key] for key in CHATS if isinstance(value.get(key), list)), None):
        return Record(location, None, [*_system(value), *_messages(chat, location)])
    if pair := next(
        ((ask, answer) for ask, answer in PAIRS if value.get(ask) is not None and value.get(answer) is not None), None
    ):
        return _pair(value, *pair, location)
    if isinstance(value.get("text"), str):
        return Record(location, sound(value["text"], location))
    if wrong := next((key for key in ("text", *CHATS) if key in value), None):
        raise BadRequest(f"{location}: '{wrong}' is {_called(value[wrong])}; {EXPECTED}")
    keys = ", ".join(f"'{str(key)[:40]}'" for key in list(value)[:8]) + (", ..." if len(value) > 8 else "")
    raise BadRequest(f"{location}: has {f'the keys {keys}' if keys else 'no keys'}; {EXPECTED}")


def _system(value: dict[str, Any]) -> list[dict[str, Any]]:
    """What stands beside a chat or an instruction for the model to obey."""
    return [
        {"role": "system", "content": value[key]}
        for key in SYSTEMS
        if isinstance(value.get(key), str) and value[key].strip()
    ][:1]


def _pair(value: dict[str, Any], ask: str, answer: str, location: str) -> Record:
    """What is asked, with its context, and what is answered: a chat of two, or both in a row for a model without a chat
    template."""
    if isinstance(value[ask], list) and isinstance(value[answer], list):
        return Record(location, None, [*_system(value), *_messages([*value[ask], *value[answer]], location)])
    for key in (ask, answer):
        if not isinstance(value[key], str):
            raise BadRequest(f"{location}: '{key}' is {_called(value[key])}; {EXPECTED}")
    context = [value[key] for key in CONTEXTS if isinstance(value.get(key), str) and value[key].strip()][:1]
    asked, answered = sound("\n\n".join([value[ask], *context]), location), sound(value[answer], location)
    chat = [*_system(value), {"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return Record(location, asked + ("" if answer == "completion" else "\n\n") + answered, chat)


def _messages(value: list[Any], location: str) -> list[dict[str, Any]]:
    """Messages with 'role' and 'content', whichever way they were spelled."""
    messages = []
    for message in value:
        if isinstance(message, dict) and isinstance(message.get("role"), str):
            messages.append({key: part for key, part in message.items() if part is not None})
        elif isinstance(message, dict) and isinstance(message.get("from"), str):
            messages.append(
                {"role": ROLES.get(message["from"].lower(), message["from"]), "content": message.get("value")}
            )
        else:
            what = (
                f"an object with the keys {', '.join(map(repr, message))}"
                if isinstance(message, dict)
                else _called(message)
            )
            raise BadRequest(
                f"{location}: a message is {what}; it is an object with 'role' and 'content', or with 'from' and "
                "'value'"
            )
    if not messages:
        raise BadRequest(f"{location}: has no messages; {EXPECTED}")
    return messages


def _called(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def sound(text: str, location: str) -> str:
    """Raises BadRequest for text that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"{location}: holds half a character, \\u{ord(text[error.start]):04x}, without its other half; write "
            "both or none"
        ) from None
    return text
