"""Files that somebody made on purpose: one line each, whatever they hold, and nothing of theirs is an instruction to
the terminal."""

import json
import os
import shutil
from pathlib import Path

import pytest

import tiny
from halfbyte import cli
from halfbyte.errors import BadCheckpoint, BadRequest, HalfbyteError
from halfbyte.files import LARGEST, parse_json, read_bytes, read_object
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.recipe import Recipe
from halfbyte.terminal import as_json, plain

ESCAPES = "\x1b[31m\x9b2J\u202e[/b]"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("hostile")
    tiny.make(home / "model", num_hidden_layers=1)
    tiny.text(home / "text.txt")
    assert (
        tiny.halfbyte(
            "quantize", home / "model", "-o", home / "quantized", "--method", "nearest", "--grid", "int4-g64"
        ).code
        == 0
    )
    return home


@pytest.fixture
def model(home, tmp_path) -> Path:
    return Path(shutil.copytree(home / "model", tmp_path / "model"))


CONFIGS = {
    "model_type": ({}, 3),
    "num_hidden_layers": (1 << 31, 1_000_000, 10**30, -1, "2", True),
    "head_dim": (10**9, [1]),
    "vocab_size": (1 << 40, 1.5),
    "num_experts": ("x", [1 << 20]),
    "partial_rotary_factor": ("a", []),
    "rope_scaling": ("linear", [1]),
    "architectures": ([5], "LlamaForCausalLM"),
    "dtype": ([None], 16),
    "tie_word_embeddings": ("no", 1),
    "text_config": ([], "x"),
    "anything": (1 << 64, {"deeper": {"yet": -(10**40)}}),
    "quantization_config": ("x", {"quant_method": "compressed-tensors", "kv_cache_scheme": "x"}),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in CONFIGS.items() for value in values],
    ids=lambda v: str(v)[:20],
)
def test_a_config_of_absurd_values_is_refused_by_name(name, value, model):
    (model / "config.json").write_text(json.dumps(tiny.config(num_hidden_layers=1) | {name: value}))
    tiny.refused(tiny.halfbyte("inspect", model), "config.json")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "hf_quant_config.json",
        "x.gguf",
    ],
)
@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), lambda p: p.mkdir()], ids=["pipe", "device", "folder"]
)
def test_what_is_no_file_is_not_waited_for(name, make, model):
    (model / name).unlink(missing_ok=True)
    make(model / name)
    words = (
        ["eval", model, "--against", model, "--length", "64"]
        if name.startswith("tokenizer")
        else ["inspect", model / name if name == "x.gguf" else model]
    )
    tiny.refused(tiny.halfbyte(*words), name)


def test_a_file_of_nothing_but_size_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(BadCheckpoint, match="more than 128 MB"):
        Checkpoint.open(tmp_path)
    with pytest.raises(BadRequest, match="more than 0 MB"):
        read_bytes(tmp_path / "config.json", BadRequest, 10)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        '{"a":' * 100 + "1" + "}" * 100,
        '{"\\ud800": 1}',
        "[" + "[]," * (1 << 22),
        '{"a": ' + "9" * 5000 + "}",
        "[1]",
        "\ufeff{}",
        "",
    ],
)
def test_json_that_nobody_wrote_is_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadCheckpoint, match=r"a\.json"):
        read_object(tmp_path / "a.json")


def test_json_that_people_write_is_read():
    assert parse_json(b'{"a": [1, {"b": "\\ud83d\\ude00"}], "a": 2}') == {"a": 2}
    assert parse_json("[" * 64 + "]" * 64)


RECIPES = {
    "a bomb": "a: &a [x,x]\n"
    + "".join(
        f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "a date that is none": "model: 2001-99-99",
    "a truth that is none": "model: !!bool x",
    "a time that is none": "model: !!timestamp x",
    "an empty number": "model: !!int ''",
    "many digits": "skip: " + "9" * 10_000,
    "many digits in hexadecimal": "skip: 0x" + "f" * 9_000,
    "deep": "[" * 3000,
    "no text": "\xff",
    "code": "model: !!python/object/apply:os.system ['true']",
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_anything_is_refused(name, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(RECIPES[name].encode("latin-1"))
    with pytest.raises(BadRequest) as refusal:
        Recipe.load(tmp_path / "recipe.yaml")
    assert len(str(refusal.value)) < 600


def changed(path: Path, change) -> None:
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))


REPORTS = {
    "error is a list": lambda r: r["weights"][0].update(error=[]),
    "no error": lambda r: r["weights"][0].pop("error"),
    "evaluation is a number": lambda r: r.update(evaluation=5),
    "evaluation of nothing": lambda r: r.update(evaluation={}),
    "weights are words": lambda r: r.update(weights=["a"]),
    "source is a list": lambda r: r.update(source=[]),
    "engines is a number": lambda r: r.update(engines=3),
    "warnings": lambda r: r.update(warnings=[ESCAPES]),
    "names": lambda r: r["weights"][0].update(name=ESCAPES, note=ESCAPES, grid=ESCAPES, error=9.0),
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_that_came_with_the_download_is_shown_or_ignored(name, home, tmp_path):
    model = Path(shutil.copytree(home / "quantized", tmp_path / "model"))
    changed(model / "report.json", REPORTS[name])
    shown = tiny.halfbyte("inspect", model)
    assert (shown.code, shown.err) == (0, "")
    assert not any(c in shown.out for c in "\x1b\x9b\u202e")
    measured = tiny.halfbyte(
        "eval", model, "--against", home / "model", "--text", home / "text.txt", "--length", "64", "--windows", "1"
    )
    assert measured.code == 0, measured.err


def test_texts_of_a_checkpoint_do_not_command_the_terminal(model):
    (model / "config.json").write_text(json.dumps(tiny.config(num_hidden_layers=1, model_type=ESCAPES)))
    for words in (
        ["inspect", model],
        ["inspect", model, "--json"],
        ["eval", model, "--against", model],
        ["inspect", f"{model}/{ESCAPES}"],
    ):
        shown = tiny.halfbyte(*words)
        assert not any(c in shown.out + shown.err for c in "\x1b\x9b\u202e")
        assert "[/b]" in shown.out + shown.err
    assert plain("é 中 \x1b") == "é 中 \\x1b"
    assert json.loads(as_json({ESCAPES: ["\U000e0001 é"]})) == {ESCAPES: ["\U000e0001 é"]}


@pytest.mark.parametrize("path", ["a" * 5000, "a\0b", "a/" * 3000, "/dev/null", "~nobody-at-all/x"])
def test_names_that_no_file_can_have_are_refused_in_python_too(path, home, tmp_path):
    with pytest.raises(HalfbyteError):
        Checkpoint.open(path)
    with pytest.raises(HalfbyteError):
        Recipe.load(Path(path))


def test_a_bug_is_one_line_and_a_file(monkeypatch, home):
    def broken(*_):
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("halfbyte.report.inspect.inspect", broken)
    monkeypatch.delenv("HALFBYTE_DEBUG", raising=False)
    result = tiny.halfbyte("inspect", home / "model")
    assert (result.code, result.out) == (70, "")
    assert result.err.startswith(
        "halfbyte: this is a bug of halfbyte (ZeroDivisionError('of ours')); please report it with "
    )
    assert result.err.count("\n") == 1
    account = Path(result.err.partition("report it with ")[2].partition(",")[0])
    assert "in broken" in account.read_text()
    account.unlink()
    monkeypatch.setenv("HALFBYTE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", str(home / "model")])


VOCABULARIES = {
    "ids that are no int": ("tokenizer.json", lambda t: t["added_tokens"][0].update(id="256")),
    "a negative id": ("tokenizer.json", lambda t: t["model"]["vocab"].update({"!": -1})),
    "tokens that are no list": ("tokenizer.json", lambda t: t.update(added_tokens="x")),
    "a token that is no text": ("tokenizer.json", lambda t: t["added_tokens"][0].update(content=5)),
    "a merge of nothing": ("tokenizer.json", lambda t: t["model"].update(merges=[[]])),
    "no model": ("tokenizer.json", lambda t: t.update(model=[])),
    "no pre-tokenizers": ("tokenizer.json", lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": 5})),
    "no special id": (
        "tokenizer.json",
        lambda t: t["post_processor"].update(special_tokens={tiny.BOS: {"id": tiny.BOS, "ids": [], "tokens": []}}),
    ),
    "a special id too high": (
        "tokenizer.json",
        lambda t: t["post_processor"]["special_tokens"][tiny.BOS].update(ids=[99999]),
    ),
    "templates of nothing": ("tokenizer_config.json", lambda t: t.update(chat_template=[None])),
    "a template that is a number": (
        "tokenizer_config.json",
        lambda t: t.update(chat_template=[{"name": "a", "template": 5}]),
    ),
    "an end that is a list": ("tokenizer_config.json", lambda t: t.update(eos_token=[])),
    "an end of no content": ("tokenizer_config.json", lambda t: t.update(eos_token={"content": None})),
}


@pytest.mark.parametrize(("name", "change"), VOCABULARIES.values(), ids=VOCABULARIES)
def test_a_gguf_of_a_broken_tokenizer_is_refused_by_the_files_name(name, change, model, tmp_path):
    tiny.tokenizer(adds_bos=True).save(str(model / "tokenizer.json"))
    changed = json.loads((model / name).read_text())
    change(changed)
    (model / name).write_text(json.dumps(changed))
    tiny.refused(
        tiny.halfbyte("quantize", model, "-o", tmp_path / "x.gguf", "--method", "nearest", "--grid", "Q8_0"), name
    )
    assert not (tmp_path / "x.gguf").exists()


def test_a_model_without_a_type_is_inspected(model):
    (model / "config.json").write_text(json.dumps(tiny.config(num_hidden_layers=1) | {"model_type": None}))
    assert tiny.halfbyte("inspect", model).code == 0
