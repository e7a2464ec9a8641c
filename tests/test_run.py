"""What a report says of a matrix, and what is refused before it is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from halfbyte.grids import GRIDS, parse
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.run import SAMPLED, relative, squared_error
from halfbyte.solvers import SOLVERS

DOWN = "model.layers.0.mlp.down_proj"
WRITTEN = [name for name in GRIDS if not name.startswith("iq1")]


@pytest.mark.parametrize("name", WRITTEN)
def test_the_error_over_some_rows_is_near_that_over_all(name):
    w = torch.randn(4 * SAMPLED // 256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    q = SOLVERS["minmax"](w, parse(name), None)
    assert relative([squared_error(w, q)])[0] == pytest.approx(float((q.decode() - w).norm() / w.norm()), rel=0.02)


@pytest.mark.parametrize("factor", [1e11, 1e-12], ids=["large", "small"])
@pytest.mark.parametrize("grid", ["int4-g64-fp16", "q8_0", "q4_k", "iq2_xs", "ggml-nvfp4"])
def test_a_row_that_a_grid_cannot_hold_is_seen_wherever_it_is(grid, factor):
    w = torch.randn(4 * SAMPLED // 256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    assert squared_error(w, SOLVERS["minmax"](w, parse(grid), None)).worst < 0.6
    w[1234] *= factor
    assert squared_error(w, SOLVERS["minmax"](w, parse(grid), None)).worst > 0.9


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_a_weight_that_is_nearly_lost_is_named_everywhere(method, tmp_path):
    model = tiny.make(tmp_path / "model")
    change(model, lambda w: w[3].mul_(1e9))
    text = tiny.text(tmp_path / "text.txt")
    words = ["--grid", "Q4_0", "--method", method, "--calibration", text, "--samples", "2", "--length", "64"]
    done = tiny.halfbyte("quantize", model, "-o", tmp_path / "out.gguf", *words)
    assert done.code == 0, done.err
    for said in (done.out, (tmp_path / "out.README.md").read_text(), (tmp_path / "out.report.json").read_text()):
        assert f"NEARLY LOST: 1 weight is hardly what the source has, the worst {DOWN}" in " ".join(said.split())


@pytest.mark.parametrize("factor", [3e6, 1e-8], ids=["large", "small"])
def test_what_f16_has_not_is_refused_by_name_and_the_advice_helps(factor, tmp_path):
    """A BF16 model's numbers may lie beyond those of F16."""
    model = tiny.make(tmp_path / "model")
    change(model, lambda w: w.mul_(factor))
    words = ["quantize", model, "-o", tmp_path / "out.gguf", "--grid"]
    tiny.refused(tiny.halfbyte(*words, "F16"), DOWN, "F16 only those from 6e-08 to 65504", "--grid BF16", "--skip")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    for advice in (["BF16"], ["F32"], ["F16", "--skip", DOWN]):
        done = tiny.halfbyte(*words, *advice, "--overwrite")
        assert done.code == 0, done.err
        written = Checkpoint.open(tmp_path / "out.gguf").read(f"{DOWN}.weight")
        assert torch.equal(written.float(), Checkpoint.open(model).read(f"{DOWN}.weight").float())


def test_what_f16_has_not_is_refused_of_a_dequantized_model_too(tmp_path):
    model = tiny.make(tmp_path / "model")
    change(model, lambda w: w.mul_(3e6))
    assert (
        tiny.halfbyte("quantize", model, "-o", tmp_path / "q", "--grid", "int8-channel", "--method", "nearest").code
        == 0
    )
    words = ["dequantize", tmp_path / "q", "-o"]
    for out in ("out.gguf", "out"):
        tiny.refused(tiny.halfbyte(*words, tmp_path / out, "--dtype", "float16"), DOWN, "--dtype bfloat16")
        assert tiny.halfbyte(*words, tmp_path / out, "--dtype", "bfloat16").code == 0


def change(model: Path, edit: Callable[[torch.Tensor], object]) -> None:
    """Edit the weight DOWN of a checkpoint."""
    tensors = load_file(model / "model.safetensors")
    edit(tensors[f"{DOWN}.weight"])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
