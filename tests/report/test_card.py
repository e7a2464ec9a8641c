"""The model card, as a person reads it: whole tables, commands that can be copied, nothing blank."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import halfbyte
import tiny
from halfbyte.engines import engines
from halfbyte.report.summary import size


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("card")
    tiny.make(home / "model")
    tiny.text(home / "text.txt")
    calibration = {"source": str(home / "text.txt"), "samples": 4, "length": 64}
    halfbyte.quantize(
        home / "model",
        home / "gptq it's",
        method="awq+gptq",
        grid="int4-g64",
        calibration=calibration,
        skip="layers.0.mlp.down_proj",
    )
    halfbyte.quantize(home / "model", home / "nearest", method="nearest", grid="int8-channel", to="gptq")
    halfbyte.quantize(home / "model", home / "int5", method="nearest", grid="int5-g64")
    halfbyte.quantize(home / "model", home / "w8a8", method="nearest", grid="w8a8-static", calibration=calibration)
    halfbyte.convert(home / "nearest", home / "converted", "compressed-tensors")
    halfbyte.evaluate([home / "gptq it's"], home / "model", str(home / "text.txt"), 64, 3)
    return home


CARDS = ["gptq it's", "nearest", "int5", "w8a8", "converted"]


def parts(card: str) -> tuple[dict, str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


@pytest.mark.parametrize("name", CARDS)
def test_markdown(name, home):
    front, body = parts((home / name / "README.md").read_text())
    assert front["library_name"] == "transformers"
    assert "halfbyte" in front["tags"]
    assert "base_model" not in front  # a folder of this machine means nothing to a reader
    assert f"\n# {name}\n" in body
    assert "None" not in body
    assert "{" not in re.sub(r"```.*?```", "", body, flags=re.S)
    assert "\n\n\n" not in body
    assert body.count("```") % 2 == 0
    headings = re.findall(r"^(#+) .*\n\n(#*)", body, flags=re.M)
    assert all(not following or len(following) > len(level) for level, following in headings), "an empty section"
    outside = re.sub(r"```.*?```", "", body, flags=re.S)
    for table in re.findall(r"(?:^\|.*\n)+", outside, flags=re.M):
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1
        assert re.fullmatch(r"[|:-]+", lines[1])
        assert len(lines) > 2
    for line in outside.splitlines():
        assert line == line.rstrip()
        assert not line.startswith("- ") or len(line) > 4
    for heading in re.findall(r"^#.*$", outside, flags=re.M):
        assert f"\n\n{heading}\n\n" in f"\n{outside}"


@pytest.mark.parametrize("name", CARDS)
def test_commands(name, home):
    """A shell reads the folder's name as it is, and Python too; where it lies on this machine is not said."""
    card, path = (home / name / "README.md").read_text(), home / name
    report = json.loads((path / "report.json").read_text())
    for engine in report["engines"]:
        title = engines.ENGINES[engine["engine"]].title
        assert (f"### {title}\n" in card) == engine["loads"] == (engine["word"] != "refused")
        assert (f"- {title}: " in card) != engine["loads"]
        assert f"- {engine['word']}: {engine['source']}\n" in card or not engine["loads"]
    for block in re.findall(r"```bash\n(.*?)```", card, flags=re.S):
        words = shlex.split(block)
        assert path.name in words or words[:2] == ["halfbyte", "quantize"]
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.S):
        compile(block, "card", "exec")
        assert repr(path.name) in block or json.dumps(path.name) in block or "apply_chat_template" in block
    assert str(home) not in card


def test_recipe_of_the_card(home):
    card = (home / "gptq it's" / "README.md").read_text()
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", card, flags=re.S)[0])
    written = yaml.safe_load((home / "gptq it's" / "recipe.yaml").read_text())
    assert shown["model"] == "model"
    assert shown["calibration"]["source"] == "text.txt"
    here = {
        "model": written["model"],
        "calibration": {**shown["calibration"], "source": written["calibration"]["source"]},
    }
    assert halfbyte.Recipe.of(**{**shown, **here}) == halfbyte.Recipe.of(**written)
    assert "calibration" not in parts((home / "converted" / "README.md").read_text())[1]


def test_texts_of_calibration_stay_out_of_the_card(tmp_path):
    tiny.make(tmp_path / "model")
    given = {"source": ["Once upon a time there was a fox. " * 9] * 2, "samples": 2, "length": 16}
    halfbyte.quantize(tmp_path / "model", tmp_path / "out", grid="int4-g32", calibration=given)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Once upon a time" not in card
    assert "  source: 2 texts given\n" in card
    assert "says, with every text in place of their number" in card


@pytest.mark.parametrize("output", ["out.gguf", "folder"])
def test_a_published_gguf_is_downloaded_before_it_is_opened(tmp_path, output):
    """A hub id stands for no single file: neither llama.cpp's -m nor halfbyte eval opens one by it."""
    tiny.make(tmp_path / "model")
    halfbyte.quantize(
        tmp_path / "model", tmp_path / output, method="nearest", grid="Q8_0", to="gguf", repository="me/x"
    )
    card = (tmp_path / {"out.gguf": "out.README.md"}.get(output, "folder/README.md")).read_text()
    place, file = (".", "out.gguf") if output == "out.gguf" else ("me/x", "me/x/folder.gguf")
    assert f"hf download me/x --local-dir {place}\n" in card
    assert f"llama-server -m {file}\n" in card
    assert f"halfbyte eval {'out.gguf' if output == 'out.gguf' else 'me/x'} --against" in card


def test_what_was_lost(home):
    measured, unmeasured = ((home / name / "README.md").read_text() for name in ("gptq it's", "nearest"))
    evaluation = json.loads((home / "gptq it's" / "report.json").read_text())["evaluation"]
    assert (
        f"| perplexity | {evaluation['reference']['perplexity']:.3f} | {evaluation['model']['perplexity']:.3f} |"
        in measured
    )
    assert "3 windows of 64, convention *served*" in measured
    assert "halfbyte eval" not in measured
    assert "halfbyte eval nearest --against model" in unmeasured
    assert "--against ORIGINAL" in (home / "converted" / "README.md").read_text()
    assert "bit for bit that of the source" in (home / "converted" / "README.md").read_text()


def test_a_card_to_be_published(tmp_path):
    tiny.make(tmp_path / "model", chat=True)
    (tmp_path / "model" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine\nbase_model: org/base\nlanguage: [en, de]\n---\n# Its own words\n"
    )
    halfbyte.quantize(
        tmp_path / "model", tmp_path / "out", method="nearest", grid="int4-g32", repository="me/model-int4"
    )
    front, body = parts((tmp_path / "out" / "README.md").read_text())
    assert front["base_model"] == "org/base"
    assert front["base_model_relation"] == "quantized"
    assert (front["license"], front["license_name"], front["language"]) == ("other", "mine", ["en", "de"])
    assert "vllm serve me/model-int4\n" in body
    assert "tokenizer.apply_chat_template(messages" in body
    assert str(tmp_path) not in body
    result = tiny.halfbyte(
        "quantize", tmp_path / "model", "-o", tmp_path / "b", "--method", "nearest", "--repository", "no id"
    )
    tiny.refused(result, "repository")


def test_size():
    assert [size(n) for n in (291_000, 15_020_000_000)] == ["0.29 MB", "15.02 GB"]


def test_report_counts_every_byte(home):
    """The report's sizes are those of the file, and every tensor of the source is accounted for."""
    for name in CARDS:
        report = json.loads((home / name / "report.json").read_text())
        data = (home / name / "model.safetensors").read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header.pop("__metadata__")
        assert report["output"]["size_bytes"] == sum(
            e["data_offsets"][1] - e["data_offsets"][0] for e in header.values()
        )
        assert len(report["weights"]) == report["output"]["quantized"]
        assert len(report["kept"]) == report["output"]["kept"]
        assert len(report["weights"]) + len(report["kept"]) == 21


def test_picture_of_where_it_lost_most(home, tmp_path, monkeypatch):
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed: pip install '.[report]'")
    card, drawn = (home / "gptq it's" / "README.md").read_text(), home / "gptq it's" / "errors.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert drawn.stat().st_size < 200_000
    worst = max(row["error"] for row in json.loads((home / "gptq it's" / "report.json").read_text())["weights"])
    said = (
        f"![The relative error of the outputs on the calibration tokens by layer and role; the largest is {worst:.4f}]"
    )
    assert f"{said}(errors.png)\n" in card
    assert "errors.png" not in (home / "nearest" / "README.md").read_text()  # which was not measured
    halfbyte.convert(home / "gptq it's", tmp_path / "moved", "gptq")
    assert not (tmp_path / "moved" / "errors.png").exists()  # it would be of another run

    gguf, text = tmp_path / "one.gguf", str(home / "text.txt")
    for grid in ("Q4_0", "Q8_0"):
        halfbyte.quantize(home / "model", gguf, method="nearest", grid=grid, overwrite=True)
        assert not (tmp_path / "one.errors.png").exists()
        halfbyte.evaluate([gguf], home / "model", text, 64, 2)
        assert "](one.errors.png)" in (tmp_path / "one.README.md").read_text()

    (home / "gptq it's" / "errors.png").unlink()
    monkeypatch.setattr("halfbyte.report.picture.find_spec", lambda name: None)
    halfbyte.evaluate([home / "gptq it's"], home / "model", text, 64, 3)
    assert "errors.png" not in (home / "gptq it's" / "README.md").read_text()


def test_what_a_source_is_for(tmp_path):
    tiny.make(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\npipeline_tag: image-text-to-text\n---\n")
    halfbyte.quantize(tmp_path / "model", tmp_path / "out", method="nearest", grid="int4-g32")
    assert parts((tmp_path / "out" / "README.md").read_text())[0]["pipeline_tag"] == "image-text-to-text"
