"""A GGUF says what its model is called, how large it is, whence it comes and under which terms, as published files
do."""

from pathlib import Path

import gguf
import pytest

import halfbyte
import tiny
from halfbyte.models.provenance import Provenance
from halfbyte.targets.gguf.origin import origin, size_label

CARD = "---\nlicense: other\nlicense_name: gemma\nbase_model: org/Base-7B\ntags: [chat]\n---\n"


@pytest.mark.parametrize(
    ("count", "label"),
    [(134_515_008, "135M"), (8_030_261_248, "8.0B"), (70_553_706_496, "71B"), (5_800_000, "5.8M"), (300_000, "300K")],
)
def test_sizes_are_labelled_as_llama_cpp_labels_them(count, label):
    assert size_label(count) == label


def test_the_parts_of_a_name():
    said = origin(Provenance("SmolLM2-135M-Instruct", "org/SmolLM2-135M-Instruct"), 134_515_008)
    assert [said[f"general.{name}"].value for name in ("basename", "finetune", "organization")] == [
        "SmolLM2",
        "Instruct",
        "org",
    ]
    assert "general.finetune" not in origin(Provenance("bookworm"), 10**6)


def test_a_file_says_where_its_model_comes_from(tmp_path: Path):
    model = tiny.make(tmp_path / "Made-2M-Chat", chat=True)
    (model / "README.md").write_text(CARD)
    halfbyte.quantize(model, tmp_path / "out.gguf", grid="Q8_0", method="nearest")
    halfbyte.quantize(tmp_path / "out.gguf", tmp_path / "again.gguf", grid="Q4_0", method="nearest", requantize=True)
    for name in ("out", "again"):
        fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / f"{name}.gguf").fields.items()}
        assert fields["general.name"] == "Made-2M-Chat"
        assert (fields["general.license"], fields["general.license.name"]) == ("other", "gemma")
        assert (fields["general.base_model.count"], fields["general.base_model.0.repo_url"]) == (
            1,
            "https://huggingface.co/org/Base-7B",
        )
        assert fields["general.tags"] == ["chat"]
        assert fields["tokenizer.chat_template"] == tiny.CHAT
        assert "general.quantized_by" not in fields
        assert not any(str(tmp_path) in str(value) for value in fields.values())
