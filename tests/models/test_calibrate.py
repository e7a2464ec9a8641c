"""Windows begin as texts begin where the model is served, chats come through the model's template, and no template goes
on for ever."""

import json
import time
from pathlib import Path

import pytest
import torch
import transformers

import halfbyte
import tiny
from halfbyte import demo
from halfbyte.errors import BadCheckpoint
from halfbyte.models import calibrate, chats, tokenizers
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.recipe import Calibration

BOS, BOS_ID = tiny.BOS, 256


def calibrated(checkpoint: Checkpoint, source: str, samples: int, length: int, seed: int) -> calibrate.Samples:
    return calibrate.calibration(checkpoint, Calibration(source=source, samples=samples, length=length, seed=seed))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("calibrate")
    tiny.make(home / "begins", adds_bos=True, chat=True)
    tiny.make(home / "plain", chat=True)
    tiny.text(home / "text.txt", 400)
    talk = [{"role": "user", "content": "lazy dog " * 20}, {"role": "assistant", "content": "quick fox " * 20}]
    (home / "chats.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 5))
    (home / "texts.jsonl").write_text("\n".join(json.dumps({"text": f"{n} lazy dogs " * 20}) for n in range(10)))
    return home


def with_template(source: Path, folder: Path, template: str) -> Path:
    """The same model with another chat template."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    about = json.loads((source / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("source", ["text.txt", "texts.jsonl", "chats.jsonl"])
def test_every_window_begins_as_the_tokenizer_begins_a_text(source, home):
    begins, plain = Checkpoint(home / "begins"), Checkpoint(home / "plain")
    for samples in (4, 200):  # without overlap, and drawn at random
        windows = calibrated(begins, str(home / source), samples, 64, 0)
        assert windows.tokens.shape == (samples, 64)
        assert (windows.tokens[:, 0] == BOS_ID).all()
        assert (windows.tokens[:, 1] != BOS_ID).all()  # once
        assert windows.about["opening"] == [BOS]
        assert windows.about["chats"] == (samples if source == "chats.jsonl" else 0)
    assert (calibrated(plain, str(home / source), 4, 64, 0).tokens != BOS_ID).all()


def test_windows_lose_no_text(home):
    """What follows the opening of one window goes on in the next."""
    begins = calibrate.evaluation(Checkpoint(home / "begins"), str(home / "text.txt"), 64, None)
    plain = calibrate.evaluation(Checkpoint(home / "plain"), str(home / "text.txt"), 63, None)
    assert torch.equal(begins.tokens[:, 1:], plain.tokens[: len(begins.tokens)])
    assert len(begins.tokens) >= len(plain.tokens) - 1


def test_what_a_text_begins_with(home, tmp_path):
    """Nothing, one token, or several; GLM begins with two."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "begins")
    assert calibrate.opening(tokenizer) == (BOS_ID,)
    assert calibrate.opening(transformers.AutoTokenizer.from_pretrained(home / "plain")) == ()
    tokenizer.backend_tokenizer.post_processor = tiny.processors.TemplateProcessing(
        single=f"{BOS} {tiny.EOS} $A {tiny.EOS}", special_tokens=[(BOS, BOS_ID), (tiny.EOS, 257)]
    )
    assert calibrate.opening(tokenizer) == (BOS_ID, 257)


def test_a_gguf_begins_as_it_says(home, tmp_path):
    for name, opening in (("begins", [BOS]), ("plain", [])):
        halfbyte.quantize(home / name, tmp_path / f"{name}.gguf", grid="Q8_0", method="nearest", pre="llama-bpe")
        windows = calibrated(Checkpoint.open(tmp_path / f"{name}.gguf"), str(home / "text.txt"), 2, 64, 0)
        assert windows.about["opening"] == opening


def test_where_only_the_chat_template_puts_bos(home, tmp_path):
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    checkpoint = Checkpoint(with_template(home / "plain", tmp_path / "model", template))
    windows = calibrated(checkpoint, str(home / "chats.jsonl"), 20, 64, 0)
    assert (windows.tokens[:, 0] == BOS_ID).all()
    assert (calibrated(checkpoint, str(home / "text.txt"), 4, 64, 0).tokens != BOS_ID).all()


def test_chats_are_rendered_as_transformers_renders_them(home):
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "begins")
    talks = [json.loads(line)["messages"] for line in demo.CHATS.read_text(encoding="utf-8").splitlines()]
    rendered = chats.render(tokenizer, talks)
    assert rendered.refused == []
    assert rendered.texts == [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    long = [{"role": "user", "content": "word " * 40_000}]  # more than a pipe takes at once
    assert chats.render(tokenizer, [long]).texts == [tokenizer.apply_chat_template(long, tokenize=False)]


@pytest.mark.slow
def test_the_default_text_has_chats_for_models_that_chat(home, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CALIBRATION", home / "text.txt")  # the real one is a million tokens of single bytes
    windows = calibrated(Checkpoint(home / "begins"), "default", 16, 128, 0)
    said = transformers.AutoTokenizer.from_pretrained(home / "begins").decode(windows.tokens.flatten())
    assert windows.about["chats"] == 8
    assert (windows.tokens[:, 0] == BOS_ID).all()
    assert "assistant" in said
    tiny.make(tmp_path / "base")
    assert calibrated(Checkpoint(tmp_path / "base"), "default", 16, 128, 0).about["chats"] == 0
    odd = calibrated(
        Checkpoint(with_template(home / "plain", tmp_path / "odd", "{{ raise_exception('no') }}")), "default", 4, 64, 0
    )
    assert odd.about["chats"] == 0
    assert any("calibrated without chats" in warning and "no" in warning for warning in odd.warnings)
    assert not any("chats.jsonl" in warning for warning in odd.warnings)  # a path of this machine, and cards say it too


def test_chats_that_the_template_does_not_take_are_left_out_and_counted(home, tmp_path):
    lines = (home / "chats.jsonl").read_text().splitlines()
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, json.dumps([{"role": "nobody", "content": ""}])]))
    refusal = "{% if m.role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}"
    template = "{% for m in messages %}" + refusal + "{{ m.content }}{% endfor %}"
    windows = calibrated(
        Checkpoint(with_template(home / "plain", tmp_path / "model", template)), str(tmp_path / "x.jsonl"), 4, 64, 0
    )
    assert any(
        "left out: 1 of 6 chats;" in warning and "line 6" in warning and "who?" in warning
        for warning in windows.warnings
    )


HOSTILE = {
    "an error": ("{{ 1 / 0 }}", "division by zero"),
    "not a template": ("{% break %}", "break"),
    "a million for a word": ("{{ 'x' | replace('', 'y' * 999999) }}", "makes 1999999 characters of one chat"),
    "a width": ("{{ '%999999999d' | format(1) }}", ("characters of one chat", "GB of memory")),
    "a product": ("{{ 'x' * 10**10 }}", "GB of memory"),
    "a list": (
        "{% set x = ['x' * 1000] * 100000 %}{% for i in range(60) %}{% set x = x + x %}{{ x | join }}{% endfor %}",
        "GB of memory",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused(name, home, tmp_path):
    template, says = HOSTILE[name]
    model = with_template(home / "plain", tmp_path / "model", template)
    said = tiny.halfbyte(
        "quantize", model, "-o", tmp_path / "out", "--calibration", home / "chats.jsonl", "--samples", 2, "--length", 64
    )
    tiny.refused(said)
    assert any(words in said.err for words in ([says] if isinstance(says, str) else says))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_a_template_that_does_not_end_is_ended(home, tmp_path, monkeypatch):
    monkeypatch.setattr(chats, "SECONDS", 2.0)
    endless = "{% for i in range(100000) %}{% for j in range(100000) %}{{ '' }}{% endfor %}{% endfor %}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(with_template(home / "plain", tmp_path / "model", endless))
    started = time.process_time()
    with pytest.raises(BadCheckpoint, match="does not end within 2 s"):
        chats.render(tokenizer, [[{"role": "user", "content": "hello"}]])
    assert time.process_time() - started < 1


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text"])
def test_a_folder_without_a_tokenizer_is_refused(model_type, tmp_path):
    """For some families Transformers then makes one that knows special tokens alone."""
    settings = tiny.config(model_type=model_type, architectures=None)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(BadCheckpoint, match="holds no tokenizer"):
        tokenizers.load(tmp_path)
