"""A matrix that is written chunk after chunk of rows is the matrix that is written whole."""

from typing import Any

import pytest

import halfbyte
from halfbyte import demo
from halfbyte.containers.safetensors import FileWriter
from halfbyte.errors import BrokenOutput
from halfbyte.models import placement
from halfbyte.targets.gguf import writer

WORDS: dict[str, Any] = {"method": "nearest", "grid": "Q4_K_M", "to": "gguf"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "model.gguf"
    return halfbyte.quantize(demo.MODEL, out, **WORDS), out


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [256, 64, 32], ids=["several heads", "a head", "half a head, whose rows the file mixes"]
)
def test_the_bytes_are_the_same(rows, whole, tmp_path, monkeypatch):
    before, out = whole
    monkeypatch.setattr(placement, "CHUNK", 1)
    monkeypatch.setattr(writer, "HEADS_ROWS", rows)
    after = halfbyte.quantize(demo.MODEL, tmp_path / "model.gguf", **WORDS)
    assert (tmp_path / "model.gguf").read_bytes() == out.read_bytes()
    errors = [{row["name"]: row["error"] for row in report["weights"]} for report in (before, after)]
    assert all(errors[1][name] == pytest.approx(error, rel=0.05) for name, error in errors[0].items())


def test_a_chunk_that_the_disk_spoils_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "CHUNK", 1)
    written = FileWriter._write

    def spoil(self, data, offset):
        written(self, data if len(data) < 1 << 16 else bytes(data[:-1]) + bytes([data[-1] ^ 1]), offset)

    monkeypatch.setattr(FileWriter, "_write", spoil)
    with pytest.raises(BrokenOutput, match="reads back as something else"):
        halfbyte.quantize(demo.MODEL, tmp_path / "model.gguf", **WORDS)
    assert not list(tmp_path.iterdir())
