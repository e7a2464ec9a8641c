"""A form of output that nobody has heard of: its classes (bare.py), and one line in the table."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bare import Raw

import halfbyte
from halfbyte import demo
from halfbyte.errors import BrokenOutput, Unsupported
from halfbyte.targets.table import TARGETS

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def raw(monkeypatch):
    monkeypatch.setitem(TARGETS, "raw", Raw())
    return {"method": "nearest", "grid": "int8-channel", "to": "raw", "engine": "none"}


ONE_LINE = """
from halfbyte import registry
registry.FORMS["raw"] = registry.Form("bare:Raw")
"""
COMMAND = """
import sys
from halfbyte.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_the_command_line_knows_it_by_one_line(tmp_path):
    asked = ("quantize", demo.MODEL, "-o", tmp_path / "out", "--method", "nearest", "--grid", "int8-channel")
    words = [*map(str, asked), "--to", "raw", "--engine", "none"]
    home = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))}
    for line, status in ((ONE_LINE, 0), ("", 2)):
        made = subprocess.run(
            [sys.executable, "-c", line + COMMAND, *words], capture_output=True, text=True, check=False, env=home
        )
        assert made.returncode == status, made.stderr
        assert (tmp_path / "out" / "tensors.json").exists() == (status == 0)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_model_is_quantized_and_verified(raw, tmp_path):
    report = halfbyte.quantize(demo.MODEL, tmp_path / "out", **raw)
    plain = halfbyte.quantize(demo.MODEL, tmp_path / "ct", **{**raw, "to": "compressed-tensors"})
    assert report.output.container == "raw"
    assert {row.name for row in report.weights} == {row.name for row in plain.weights}
    out, width = next(row.shape for row in report.weights if row.name == MODULE)
    codes = np.fromfile(tmp_path / "out" / f"{MODULE}.codes.raw", np.uint8)[1:].reshape(out, width)
    scale = np.fromfile(tmp_path / "out" / f"{MODULE}.scale.raw", np.uint8)[1:].view(np.float32).reshape(out, 1)
    original = halfbyte.load(demo.MODEL, torch.float32).get_parameter(f"{MODULE}.weight").numpy()
    assert np.abs((codes.astype(np.float32) - 128) * scale - original).max() <= 0.51 * scale.max()


def test_what_the_disk_spoils_is_found(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(Raw, "pack", lambda self, q: {"codes": q.codes ^ 1, "scale": q.params["scale"]})
    with pytest.raises(BrokenOutput, match="raw's reader is broken"):
        halfbyte.quantize(demo.MODEL, tmp_path / "out", **raw)
    assert not (tmp_path / "out").exists()


def test_its_words_are_refused_and_its_folders_replaced_as_others_are(raw, tmp_path):
    with pytest.raises(Unsupported, match="raw holds int8-channel, not int4-g128"):
        halfbyte.quantize(demo.MODEL, tmp_path / "out", **{**raw, "grid": "int4-g128"})
    with pytest.raises(halfbyte.HalfbyteError, match="pure is for GGUF, and this is to be raw"):
        halfbyte.quantize(demo.MODEL, tmp_path / "out", **raw, pure=True)
    with pytest.raises(Unsupported, match="raw stores nothing of a KV cache"):
        halfbyte.quantize(demo.MODEL, tmp_path / "out", **raw, kv="fp8-e4m3")
    for overwrite in (False, True):
        halfbyte.quantize(demo.MODEL, tmp_path / "out", **raw, overwrite=overwrite)
    moved = halfbyte.convert(ct(tmp_path), tmp_path / "moved", "raw", grid="int8-channel", engine="none")
    assert moved.output.container == "raw"


def ct(folder: Path) -> Path:
    halfbyte.quantize(demo.MODEL, folder / "ct", method="nearest", grid="int8-g128", to="compressed-tensors")
    return folder / "ct"
