"""Activation order: columns of a group lie anywhere, and every command that reads a model reads them where they
lie."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import actorder
import halfbyte
import tiny
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.report.inspect import inspect


@pytest.fixture(scope="module", params=["gptq", "compressed-tensors"])
def home(tmp_path_factory, request):
    home = tmp_path_factory.mktemp("actorder")
    tiny.make(home / "model", num_hidden_layers=1)
    halfbyte.quantize(home / "model", home / "plain", method="nearest", grid="int4-g32-asym", to=request.param)
    shutil.copytree(home / "plain", home / "ordered")
    actorder.shuffle(home / "ordered")
    return home


def test_every_column_has_the_scale_of_its_group(home):
    folder = shutil.copytree(home / "plain", home / "again")
    orders, plain, ordered = actorder.shuffle(folder), Checkpoint.open(home / "plain"), Checkpoint.open(folder)
    assert {str(grid) for grid, _ in ordered.quantized.values()} == {"int4-g32-asym-bf16-actorder"}
    for module, order in orders.items():
        assert torch.equal(ordered.read_quantized(module).decode(), plain.read_quantized(module).decode()[:, order])


def test_it_runs_as_what_it_decodes_to_runs(home):
    halfbyte.dequantize(home / "ordered", home / "decoded")
    tokens = torch.arange(24)[None]
    assert torch.equal(halfbyte.load(home / "ordered")(tokens).logits, halfbyte.load(home / "decoded")(tokens).logits)


def test_it_is_told_and_taken_as_a_source(home):
    assert "int4-g32-asym-bf16-actorder" in inspect(home / "ordered")["grids"]
    report = halfbyte.quantize(
        home / "ordered", home / "rounded", method="nearest", grid="int8-channel", requantize=True
    )
    assert 0 < max(row["error"] for row in report["weights"]) < 0.02


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "awq"])
def test_no_container_is_written_in_such_an_order(home, to):
    tiny.refused(
        tiny.halfbyte("convert", home / "ordered", "-o", home / f"to-{to}", "--to", to),
        "int4-g32-asym-bf16-actorder",
        "halfbyte dequantize",
        "--grid",
    )
    assert not (home / f"to-{to}").exists()


def test_it_is_no_grid_to_quantize_to(home):
    words = [
        "quantize",
        home / "model",
        "-o",
        home / "out",
        "--method",
        "nearest",
        "--grid",
        "int4-g32-actorder",
        "--to",
        "gptq",
    ]
    tiny.refused(tiny.halfbyte(*words), "neighbouring in-features only", "int4-g32-actorder")


def test_gptq_is_read_as_the_format_defines_it(tmp_path):
    """scales[g_idx] * (codes - zeros[g_idx]), by NumPy alone; version 1 stores zeros less one."""
    tiny.make(tmp_path / "model", num_hidden_layers=1)
    halfbyte.quantize(tmp_path / "model", tmp_path / "q", method="nearest", grid="int4-g32-asym", to="gptq")
    actorder.shuffle(tmp_path / "q")
    stored, checkpoint = load_file(tmp_path / "q" / "model.safetensors"), Checkpoint.open(tmp_path / "q")
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    assert checkpoint.quantized
    for module in checkpoint.quantized:
        words, zeros = (stored[f"{module}.{part}"].numpy().view(np.uint32) for part in ("qweight", "qzeros"))
        codes = (words[:, None] >> shifts[:, None] & 15).reshape(-1, words.shape[1]).astype(np.float32)
        zeros = (zeros[..., None] >> shifts & 15).reshape(len(zeros), -1).astype(np.float32) + 1
        groups, scales = stored[f"{module}.g_idx"].numpy(), stored[f"{module}.scales"].float().numpy()
        assert (np.diff(groups) < 0).any()
        wanted = (scales[groups] * (codes - zeros[groups])).T
        assert np.array_equal(checkpoint.read_quantized(module).decode().numpy(), wanted)
