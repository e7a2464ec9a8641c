"""Texts, instructions and chats in the shapes in which people keep them; what is in none of them is refused by what it
has and what would work."""

import csv
import json
from pathlib import Path

import pytest

from halfbyte.errors import BadRequest
from halfbyte.models import texts

ASKED, ANSWERED = "What is a fox?", 'An animal, with a "tail",\nand teeth.'
CHAT = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}]
SHAPES = {
    "messages": {"messages": CHAT},
    "ShareGPT": {"id": 3, "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWERED}]},
    "roles in conversations": {"conversations": CHAT, "source": "x"},
    "Alpaca": {"instruction": ASKED, "input": "", "output": ANSWERED, "text": "Below is an instruction"},
    "Dolly": {"instruction": ASKED, "context": "", "response": ANSWERED, "category": "open_qa"},
    "prompt and completion": {"prompt": ASKED, "completion": ANSWERED},
    "chats in prompt and completion": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "question and answer": {"question": ASKED, "answer": ANSWERED},
    "a list": CHAT,
}


def write(path: Path, values: list) -> Path:
    """In the format that the path's name says."""
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(values[0]))
            table.writeheader()
            table.writerows(values)
    else:
        path.write_text(
            json.dumps(values, indent=1) if path.suffix == ".json" else "\n".join(map(json.dumps, values)),
            encoding="utf-8",
        )
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_the_same_chat(shape, kind, tmp_path):
    read = texts.records(write(tmp_path / f"x.{kind}", [SHAPES[shape], SHAPES[shape]]))
    assert [record.messages for record in read] == [CHAT, CHAT]
    assert ("line 2" if kind == "jsonl" else "record 2") in read[1].location


@pytest.mark.parametrize("shape", ["Alpaca", "Dolly", "prompt and completion", "question and answer"])
def test_tables(shape, tmp_path):
    """With commas, quotes and line ends in cells; and the other way round, a model without a template reads one after
    the other."""
    record = texts.records(write(tmp_path / "x.csv", [SHAPES[shape]]))[0]
    assert record.messages == CHAT
    assert record.text is not None
    assert record.text.startswith(ASKED)
    assert record.text.endswith(ANSWERED)


def test_context_and_system_are_read(tmp_path):
    record = texts.records(
        write(
            tmp_path / "x.json",
            [{"system": "Be brief.", "instruction": "Translate.", "input": "fox", "output": "renard"}],
        )
    )[0]
    assert record.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Translate.\n\nfox"},
        {"role": "assistant", "content": "renard"},
    ]


def test_plain_texts(tmp_path):
    for name, values in (
        ("a.jsonl", [{"text": "fox"}, "dog"]),
        ("b.json", ["fox", {"text": "dog"}]),
        ("c.csv", [{"n": 1, "text": "fox"}, {"n": 2, "text": "dog"}]),
    ):
        assert [record.text for record in texts.records(write(tmp_path / name, values))] == ["fox", "dog"]
    (tmp_path / "d.json").write_text('{\n "text": "one\\n record"\n}\n')
    (tmp_path / "e.json").write_text('{"text": "fox"}\n{"text": "dog"}\n')
    (tmp_path / "f.tsv").write_text("id\ttext\n1\tfox\n")
    assert [len(texts.records(tmp_path / name)) for name in ("d.json", "e.json", "f.tsv")] == [1, 2, 1]
    for name in ("g.txt", "g.md"):  # raw, whatever it looks like
        (tmp_path / name).write_text('{"text": "fox"}')
        assert texts.records(tmp_path / name)[0].text == '{"text": "fox"}'


REFUSED = {
    "unknown keys": (
        "x.json",
        '[{"headline": "a", "body": "b"}]',
        ("record 1", "'headline', 'body'", "'text'", "'instruction' and 'output'"),
    ),
    "unknown columns": ("x.csv", "headline,body\na,b\n", ("row 1", "'headline', 'body'", "'text'")),
    "a number": ("x.jsonl", "3", ("line 1", "a number", "a record is")),
    "not a list": ("x.jsonl", '{"messages": "hello"}', ("line 1", "'messages' is a string", "a record is")),
    "a message": (
        "x.jsonl",
        '{"messages": [{"speaker": "a", "says": "b"}]}',
        ("line 1", "'speaker', 'says'", "'role' and 'content'"),
    ),
    "no messages": ("x.jsonl", "[]", ("line 1", "no messages")),
    "not a text": ("x.jsonl", '{"instruction": "a", "output": 3}', ("line 1", "'output' is a number")),
    "a lone surrogate": ("x.jsonl", '{"text": "\\ud800 fox"}', ("line 1", "half a character", "\\ud800")),
    "nested": ("x.jsonl", "[" * 100_000, ("line 1", "nested too deeply")),
    "nested, whole": ("x.json", "[" * 100_000, ("x.json", "nested too deeply")),
    "cut": ("x.json", '[{"text"', ("x.json", "is not JSON")),
    "a cell too many": ("x.csv", "text\nfox, dog\n", ("row 1", "more cells", "quotes")),
    "a quote": ("x.csv", 'text\n"fox', "is no table"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    file, content, says = REFUSED[name]
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(BadRequest) as refusal:
        texts.records(tmp_path / file)
    for words in [says] if isinstance(says, str) else says:
        assert words in str(refusal.value)


def test_a_cell_may_hold_a_book(tmp_path):
    before = csv.field_size_limit()
    assert len(texts.records(write(tmp_path / "x.csv", [{"text": "fox " * 100_000}]))[0].text or "") == 400_000
    assert csv.field_size_limit() == before
