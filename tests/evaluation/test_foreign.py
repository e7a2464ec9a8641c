"""What a model lost is what it differs from its own source by: another reference, or other tokens, are refused unless
asked for."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import halfbyte
import tiny

SHORT = "--length", 48, "--windows", 2


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("foreign")
    tiny.make(home / "model")
    tiny.make(home / "other", seed=1)
    tiny.text(home / "text.txt", 200)
    halfbyte.quantize(home / "model", home / "q", method="nearest", grid="int4-g64")
    halfbyte.convert(home / "q", home / "converted", "gptq")
    halfbyte.dequantize(home / "q", home / "plain")
    return home


def evaluated(home, model, against, *words):
    return tiny.halfbyte("eval", model, "--against", against, "--text", home / "text.txt", *SHORT, *words)


def with_other_tokens(model: Path, folder: Path) -> Path:
    """The same model, whose tokenizer of the same size has two letters in one another's places."""
    shutil.copytree(model, folder)
    said = json.loads((folder / "tokenizer.json").read_text())
    words = said["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("name", ["q", "converted", "plain"])
def test_another_model_of_the_same_shape_is_refused_by_name(home, name):
    tiny.refused(
        evaluated(home, home / name, home / "other"), f"was made of {home}", f"and not of {home / 'other'}", "--foreign"
    )
    words = "needle", home / name, "--against", home / "other", "--text", home / "text.txt", "--lengths", "256"
    tiny.refused(tiny.halfbyte(*words), f"and not of {home / 'other'}", "--foreign")


@pytest.mark.parametrize("name", ["q", "converted", "plain"])
def test_the_source_is_known_wherever_it_lies(home, tmp_path, name):
    shutil.copytree(home / "model", tmp_path / "moved")
    shutil.copytree(home / name, tmp_path / name)
    assert evaluated(home, tmp_path / name, tmp_path / "moved").code == 0
    assert json.loads((tmp_path / name / "report.json").read_text())["evaluation"]["foreign"] is False


def test_a_source_that_was_trained_further_under_its_name_is_another(home, tmp_path):
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    halfbyte.quantize(model, tmp_path / "q", method="nearest", grid="int4-g64")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    tiny.refused(evaluated(home, tmp_path / "q", model), "was made of")


def test_a_foreign_reference_that_was_asked_for_is_recorded_and_not_shown(home, tmp_path):
    out = Path(shutil.copytree(home / "q", tmp_path / "q"))
    before = (out / "README.md").read_text()
    assert evaluated(home, out, home / "other", "--foreign").code == 0
    report = json.loads((out / "report.json").read_text())
    assert [(e["foreign"], e["reference_path"]) for e in report["evaluations"]] == [(True, str(home / "other"))]
    assert report["evaluation"] is None
    assert (out / "README.md").read_text() == before
    assert halfbyte.inspect(out)["evaluation"] is None


def test_a_model_without_our_report_may_be_of_any(home):
    assert evaluated(home, home / "other", home / "model").code == 0


def test_what_was_converted_from_a_model_that_nobody_vouches_for_may_be_of_any(home, tmp_path):
    shutil.copytree(home / "q", tmp_path / "q")
    (tmp_path / "q" / "report.json").unlink()
    halfbyte.convert(tmp_path / "q", tmp_path / "converted", "gptq")
    assert evaluated(home, tmp_path / "converted", home / "model").code == 0


def test_other_tokens_are_refused_whoever_made_the_model(home, tmp_path):
    for name in ("other", "q"):
        model = with_other_tokens(home / name, tmp_path / name)
        tiny.refused(evaluated(home, model, home / "model"), "the tokenizers differ: token", "'b'", "'a'", "--foreign")
        assert evaluated(home, model, home / "model", "--foreign").code == 0
    assert json.loads((tmp_path / "q" / "report.json").read_text())["evaluation"] is None


def test_tokens_of_a_gguf_are_compared_too(home, tmp_path):
    model = tiny.make(tmp_path / "model", vocab_size=258)
    halfbyte.quantize(model, tmp_path / "q.gguf", method="nearest", grid="Q8_0", pre="gpt-2")
    assert evaluated(home, tmp_path / "q.gguf", model).code == 0
    (tmp_path / "q.report.json").unlink()
    tiny.refused(
        evaluated(home, tmp_path / "q.gguf", with_other_tokens(model, tmp_path / "b")), "the tokenizers differ: token"
    )


def test_a_report_that_came_with_a_download_is_no_traceback(home, tmp_path):
    out = Path(shutil.copytree(home / "q", tmp_path / "q"))
    for source in (5, {"path": 5}, {"path": "\0"}, {"path": "x", "made_of": [5]}):
        (out / "report.json").write_text(
            json.dumps({**json.loads((home / "q" / "report.json").read_text()), "source": source})
        )
        assert evaluated(home, out, home / "model").code in (0, 2)
