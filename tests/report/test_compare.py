"""Two checkpoints side by side."""

import json

import pytest

import halfbyte
import tiny
from halfbyte.models.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("compare")
    tiny.make(home / "model")
    tiny.text(home / "text.txt", 200)
    for bits in (4, 3):
        halfbyte.quantize(home / "model", home / f"int{bits}", method="nearest", grid=f"int{bits}-g64")
    halfbyte.quantize(home / "model", home / "q8.gguf", method="nearest", grid="Q8_0")
    return home


def test_values_bytes_and_errors(home):
    found = halfbyte.compare(home / "model", home / "int4")
    original, quantized = Checkpoint(home / "model"), Checkpoint(home / "int4")
    errors = {row.name: row.error for row in halfbyte.inspect(home / "int4").weights}
    assert {t.name for t in found.tensors} == set(original.tensors())
    for tensor in found.tensors:
        x, y = original.read(tensor.name).double(), quantized.read(tensor.name).double()
        assert tensor.difference == pytest.approx(float((x - y).norm() / x.norm()), rel=1e-6)
        assert tensor.error == (None, errors.get(tensor.name.removesuffix(".weight")))
    assert sum(t.size_bytes[1] for t in found.tensors) == found.b.size_bytes


def test_recipes_and_what_was_measured(home):
    halfbyte.evaluate([home / "int4", home / "int3"], home / "model", str(home / "text.txt"), 48, 4)
    found = halfbyte.compare(home / "int4", home / "int3", values=False)
    assert found.recipes == {"grid": ("int4-g64", "int3-g64")}
    assert all(t.difference is None for t in found.tensors)
    ((mine, its),) = found.evaluations
    assert 0 < mine.model.kl < its.model.kl
    said = tiny.halfbyte("compare", home / "int4", home / "int3").out
    wanted = (f"{mine.model.kl:.5f}", f"{its.model.kl:.5f}", "grid: int4-g64 in A")
    assert all(words in said for words in wanted)
    assert ".weight" not in said  # what every name ends with takes the room of a number in 80 columns


def test_a_folder_and_a_gguf(home):
    found = json.loads(tiny.halfbyte("compare", home / "model", home / "q8.gguf", "--json").out)
    stored = {t["name"]: t for t in found["tensors"]}["model.layers.0.mlp.down_proj.weight"]
    assert stored["stored_as"][1] == "int8-g32" or "8" in stored["stored_as"][1]
    assert 0 < stored["difference"] < 0.01


def test_another_model_is_refused(home, tmp_path):
    tiny.make(tmp_path / "other", hidden_size=64, intermediate_size=64, vocab_size=300)
    tiny.refused(tiny.halfbyte("compare", home / "int4", tmp_path / "other"), "compare two versions of one model")
