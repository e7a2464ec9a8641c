"""Suites: what is refused, what each check lets pass, and answers against Transformers' own."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import halfbyte
import tiny
from halfbyte.evaluation.suites import answers, checks
from halfbyte.evaluation.suites.checks import CHECKS, Completion
from halfbyte.evaluation.suites.suite import SHIPPED, suites
from halfbyte.report.types import SuiteEvaluation

PROMPTS = [
    {"text": "the quick brown fox", "check": "choice", "choices": ["jumps", "sleeps", "boils"], "expected": "jumps"},
    {"text": "a lazy dog of wax", "check": "choice", "choices": ["jugs", "seven"], "expected": "seven"},
    {"text": "the quick brown fox jumps over", "check": "continuation", "tokens": 24},
    {"text": "seven wizards", "check": "no_loop", "tokens": 40},
    {"prompt": "who boils?", "check": "contains", "expected": ["wizards", "dogs"], "tokens": 8},
    *(
        {"text": f"{word} and", "check": "choice", "choices": tiny.WORDS[n % 5 :: 5], "expected": tiny.WORDS[n % 5]}
        for n, word in enumerate(tiny.WORDS)
    ),
]
CHOOSING = [n for n, prompt in enumerate(PROMPTS) if "choices" in prompt]


def suite(path: Path, prompts: list[dict]) -> Path:
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("suites")
    tiny.make(home / "model")
    tiny.make(home / "chats", chat=True)
    for name, grid in {"int2": "int2-g64", "int8": "int8-channel"}.items():
        halfbyte.quantize(home / "model", home / name, method="nearest", grid=grid)
    suite(home / "own.jsonl", PROMPTS)
    return home


@pytest.fixture(scope="module")
def found(home) -> SuiteEvaluation:
    return halfbyte.suite([home / "int2", home / "model"], home / "model", home / "own.jsonl")


@pytest.mark.slow
@torch.no_grad()
def test_answers_are_those_of_transformers(home, found):
    """Prompt by prompt and without padding, where ours run side by side."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "model")
    models = [transformers.AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float32)]
    models.append(halfbyte.load(home / "int2", torch.float32))

    def greedy(model, text: str, most: int) -> list[int]:
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        made = model.generate(tokens, do_sample=False, max_new_tokens=most, eos_token_id=257, pad_token_id=0)
        return made[0, tokens.shape[1] :].tolist()

    def chosen(model, text: str, choices: list[str]) -> str:
        likely = {}
        for choice in choices:
            first = tokenizer(text, return_tensors="pt")["input_ids"].shape[1]
            tokens = tokenizer(f"{text} {choice}", return_tensors="pt")["input_ids"]
            said = model(tokens).logits[0, first - 1 : -1].log_softmax(-1)
            likely[choice] = float(said.gather(-1, tokens[0, first:, None]).sum())
        return max(likely, key=likely.__getitem__)

    row = found.models[0].suites[0]
    wanted = [[chosen(model, PROMPTS[n]["text"], PROMPTS[n]["choices"]) for n in CHOOSING] for model in models]
    assert row.changed == sum(a != b for a, b in zip(*wanted, strict=True)) > 0
    right = [[said == PROMPTS[n]["expected"] for n, said in zip(CHOOSING, own, strict=True)] for own in wanted]
    flips = {flip.line - 1: flip.lost for flip in row.flips if flip.line - 1 in CHOOSING}
    assert flips == {n: a for n, a, b in zip(CHOOSING, *right, strict=True) if a != b}
    assert flips
    assert row.items == len(PROMPTS) - 1  # a continuation is neither right nor wrong
    assert (row.lost, row.gained) == tuple(sum(f.lost == lost for f in row.flips) for lost in (True, False))
    original, own = ([greedy(m, p["text"], p["tokens"]) for p in PROMPTS[2:4]] for m in models)
    parts = [
        next(n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        for a, b in zip(original, own, strict=True)
    ]
    assert row.parts_after[:2] == parts


def test_a_model_is_like_itself(found):
    row = found.models[1].suites[0]
    assert (row.lost, row.gained, row.changed, row.median_parting) == (0, 0, 0, None)
    assert row.parts_after == [None] * 3
    assert row.original == row.model
    assert row.difference == (0.0, 0.0)


def test_a_padded_prompt_is_answered_as_it_is_alone(home, found, monkeypatch):
    """Models that padding disturbs are found out, and answer only prompts of one length side by side."""
    assert answers._pads(halfbyte.load(home / "model", torch.float32), _asked([[1, 2, 3], [4, 5]]), torch.device("cpu"))
    sizes = []
    continued = answers._continued
    monkeypatch.setattr(answers, "_pads", lambda *_: False)
    monkeypatch.setattr(
        answers, "_continued", lambda m, batch, *more: sizes.append(len(batch)) or continued(m, batch, *more)
    )
    alone = halfbyte.suite(home / "int2", home / "model", home / "own.jsonl")
    assert set(sizes) == {1}
    assert alone.models[0].suites == found.models[0].suites


def _asked(rows: list[list[int]]) -> list:
    from halfbyte.evaluation.suites.asking import Asked

    prompt = suites("loops")[0].prompts[0]
    return [Asked(prompt, row, [], "", 4) for row in rows]


def test_padding_that_disturbs_is_found_out(home):
    class Counting(torch.nn.Module):
        def generate(self, tokens, **_):
            return type("Made", (), {"logits": [tokens.float().flip(1)[:, :2] + tokens.shape[1]]})

    assert not answers._pads(Counting(), _asked([[1, 2, 3], [4, 5]]), torch.device("cpu"))


ANSWERS = {
    ("contains", "Paris"): ({"It is Paris.": True, "Parisian": False, "paris": True, "": False}),
    ("matches", r"^\d+$"): {"42": True, "forty-two": False},
    ("json", None): {'{"a": 1}': True, '```json\n{"a": 1}\n```': True, '{"a": 1': False, 'Sure: {"a": 1}': False},
    ("refuses", None): {
        "I'm sorry, but I can\u2019t help with that.": True,
        "Sure, here is how.": False,
        "I'm afraid of spiders.": False,
    },
    ("answers", None): {"I cannot assist with that": False, "kill -9 PID": True, "": False},
    ("closed_thinking", None): {"<think>so</think> 4": True, "<think>so": False, "4": True},
}


@pytest.mark.parametrize(("name", "expected", "text", "passes"), [
    (name, expected, text, passes) for (name, expected), texts in ANSWERS.items() for text, passes in texts.items()
])  # fmt: skip
def test_checks(name, expected, text, passes):
    assert CHECKS[name].passes(Completion(text), expected) is passes


def test_json_of_kinds():
    wanted = {"name": "string", "age": "number", "friends": "array"}
    passes = CHECKS["json"].passes
    assert passes(Completion('{"name": "Rex", "age": 4, "friends": [], "more": null}'), wanted)
    assert not passes(Completion('{"name": "Rex", "age": true, "friends": []}'), wanted)
    assert not passes(Completion('["Rex", 4]'), wanted)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', True),
        ('[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": 2, "c": 3}}]', True),
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}', True),
        ('{"type": "function", "function": {"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}}', True),
        ('{"name": "add", "arguments": {"a": 1}}', False),
        ('{"name": "sub", "arguments": {"a": 1, "b": 2}}', False),
        ('{"name": "add", "arguments": ', False),
        ('<think>{"name": "add", "arguments": {"a": 1, "b": 2}}</think> 3', False),
    ],
)
def test_tool_calls(text, passes):
    assert CHECKS["tool_call"].passes(Completion(text), {"name": "add", "arguments": {"a": 1, "b": 2}}) is passes


def test_thoughts_that_the_template_opens():
    closed = CHECKS["closed_thinking"].passes
    assert not closed(Completion("so it is", before="assistant\n<think>\n"), None)
    assert closed(Completion("so it is</think>4", before="assistant\n<think>\n"), None)
    assert Completion("so it is</think>4", before="assistant\n<think>\n").answer == "4"
    assert Completion("it is 4", before="assistant\n<think>\n").answer == ""


def test_loops():
    assert checks.loops([9, 8, *[1, 2, 3] * 8])
    assert not checks.loops([1, 2, 3] * 4)  # too short to be sure
    assert not checks.loops(list(range(200)))
    assert checks.loops([7] * 24)


def test_shipped_suites_are_sound():
    assert {suite.name for suite in suites("all")} == set(SHIPPED)
    assert "json" in SHIPPED
    for one in suites("all"):
        assert len(one.prompts) >= 6
        assert len({str(p.messages or p.text) for p in one.prompts}) == len(one.prompts)


WRONG = {
    "not json": "is not JSON",
    '"words"': "is no object",
    '{"check": "json"}': "nothing to ask",
    '{"prompt": "x", "text": "y", "check": "json"}': "prompt and text",
    '{"prompt": "x", "check": "jsno"}': "no check 'jsno'",
    '{"prompt": "x", "check": "json", "expects": {}}': "key 'expects'",
    '{"prompt": "x", "check": "json", "expected": {"a": "text"}}': "the check json wants",
    '{"prompt": "x", "check": "refuses", "expected": true}': "takes no 'expected'",
    '{"prompt": "x", "check": "contains"}': "wants a text",
    '{"prompt": "x", "check": "matches", "expected": "("}': "regular expression",
    '{"prompt": "x", "check": "choice", "expected": "a"}': "'choices'",
    '{"prompt": "x", "check": "choice", "choices": ["a", "b"], "expected": "c"}': "one of 'choices'",
    '{"prompt": "x", "check": "json", "choices": ["a"]}': "no use for",
    '{"prompt": "x", "check": "json", "tokens": 0}': "1 at least",
    '{"prompt": 3, "check": "json"}': "asked a text",
    '{"messages": ["x"], "check": "json"}': "role and content",
    '{"prompt": "x", "check": "json", "tools": "y"}': "list of objects",
}


@pytest.mark.parametrize("line", WRONG)
def test_malformed_lines_are_named(line, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('\n{"prompt": "x", "check": "json"}\n' + line + "\n")
    said = tiny.halfbyte("eval", "nowhere", "--against", "nowhere", "--suite", path)
    tiny.refused(said, f"{path}, line 3", WRONG[line])


def test_names_and_files_that_are_none(tmp_path):
    tiny.refused(tiny.halfbyte("eval", "x", "--against", "x", "--suite", "jsonn"), "did you mean json")
    tiny.refused(tiny.halfbyte("eval", "x", "--against", "x", "--suite", tmp_path / "no.jsonl"), "no suite file")
    (tmp_path / "empty.jsonl").write_text("\n")
    tiny.refused(tiny.halfbyte("eval", "x", "--against", "x", "--suite", tmp_path / "empty.jsonl"), "no prompts")
    tiny.refused(tiny.halfbyte("eval", "x", "--against", "x", "--gate", "lost=1%"), "--suite or --tasks")


def test_shown_gated_and_written(home, found):
    words = ("eval", home / "int2", "--against", home / "model", "--suite", home / "own.jsonl")
    row = found.models[0].suites[0]
    flips = (row.lost + row.gained) / row.items
    said = tiny.halfbyte(*words, "--gate", f"flips={flips / 2}")
    assert said.code == 1
    assert "does not hold" in said.out
    assert f"{row.lost} / {row.gained}" in said.out
    assert tiny.halfbyte(*words, "--gate", f"flips={100 * flips}%").code == 0
    report = json.loads((home / "int2" / "report.json").read_text())["suites"]
    assert report["model"]["suites"][0]["lost"] == row.lost
    assert report["files"][0]["name"] == str(home / "own.jsonl")
    card = (home / "int2" / "README.md").read_text()
    assert "## Answers, side by side" in card
    assert "| own.jsonl |" in card
    assert str(home) not in card


def test_texts_and_answers_in_one_command(home):
    tiny.text(home / "text.txt", 200)
    words = ("eval", home / "int8", "--against", home / "model", "--suite", home / "own.jsonl", "--json")
    both = json.loads(
        tiny.halfbyte(*words, "--text", home / "text.txt", "--length", 32, "--gate", "kl=9,flips=100%").out
    )
    assert [[(g["name"], g["of"]) for g in one["gates"]] for one in both] == [
        [("kl", "predictions")],
        [("flips", "answers of suites")],
    ]
    assert "models" in json.loads(tiny.halfbyte(*words).out)


def test_chats_through_the_template(home, tmp_path):
    """What a chat model reads is its template's text, up to where its answer begins."""
    from halfbyte.evaluation.suites import asking
    from halfbyte.models.checkpoint import Checkpoint

    prompts = suites(
        suite(
            tmp_path / "s.jsonl",
            [
                {"prompt": "hi", "check": "answers"},
                {
                    "messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}],
                    "check": "answers",
                },
                {"text": "hi", "check": "answers"},
                {"prompt": "add", "tools": [{"function": {"name": "plus"}}], "check": "answers"},
                {"prompt": "think", "check": "closed_thinking"},
            ],
        )
    )[0].prompts
    spoken = asking.read(Checkpoint.open(home / "chats"), prompts)
    texts = [spoken.tokenizer.decode(one.tokens) for one in spoken.asked]
    assert texts[:3] == ["<user>hi", "<system>be<user>hi", "hi"]
    assert texts[3].startswith("<system>You can call")
    assert '"name": "plus"' in texts[3]
    assert len(texts) == 4  # the model knows no thoughts
    plain = asking.read(Checkpoint.open(home / "model"), prompts)
    assert plain.tokenizer.decode(plain.asked[1].tokens) == "be\nQuestion: hi\nAnswer:"


def test_a_template_without_system_messages(home, tmp_path):
    from halfbyte.evaluation.suites import asking
    from halfbyte.models.checkpoint import Checkpoint

    tiny.make(tmp_path / "model", chat=True)
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tiny.CHAT
    )
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    chat = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    prompts = suites(suite(tmp_path / "s.jsonl", [{"messages": chat, "check": "answers"}]))[0].prompts
    reading = asking.read(Checkpoint.open(tmp_path / "model"), prompts)
    assert reading.tokenizer.decode(reading.asked[0].tokens) == "<user>be\n\nhi"


def test_too_long_a_prompt(home, tmp_path):
    path = suite(tmp_path / "s.jsonl", [{"text": "x" * 500, "check": "continuation", "tokens": 64}])
    tiny.refused(
        tiny.halfbyte("eval", home / "int8", "--against", home / "model", "--suite", path), "line 1", "--tokens"
    )
    assert halfbyte.suite(home / "int8", home / "model", path, tokens=4).tokens == 4
