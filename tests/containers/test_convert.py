"""`halfbyte convert`: exact where the grids coincide, otherwise rounded again with the error stated."""

import json

import pytest
import torch

import halfbyte
import tiny
from halfbyte import demo
from halfbyte.containers.awq import AWQ
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids import parse
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.targets.table import TARGETS


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module", params=["int4-g128", "int4-g64-asym"])
def start(request, home):
    halfbyte.quantize(demo.MODEL, home / request.param, method="nearest", grid=request.param)
    return home / request.param


def decoded(folder) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {m: checkpoint.read_quantized(m).decode() for m in checkpoint.quantized}


@pytest.mark.slow
def test_round_through_all_three_is_exact(start):
    original, at = decoded(start), start
    for to in ("gptq", "awq", "compressed-tensors"):
        out = start.with_name(f"{start.name}-{to}")
        report = halfbyte.convert(at, out, to)
        assert max(row["error"] for row in report["weights"]) == 0
        assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == to
        now = decoded(out)
        assert now.keys() == original.keys()
        assert all(torch.equal(now[m], original[m]) for m in now)
        at = out


def test_a_zero_point_of_zero_makes_version_2(home):
    source, out = home / "zero", home / "zero-gptq"
    halfbyte.quantize(demo.MODEL, source, method="minmax", grid="int4-g128-asym", to="awq")
    checkpoint = Checkpoint.open(source)
    module = next(iter(checkpoint.quantized))
    entry, words = checkpoint.entries[f"{module}.qzeros"], checkpoint.entries[f"{module}.qzeros"].read()
    words[0] &= ~0xF  # another tool's file may hold a zero point of 0
    with open(entry.path, "r+b") as file:
        file.seek(entry.offset)
        file.write(words.numpy().tobytes())
    report = halfbyte.convert(source, out, "gptq")
    assert max(row["error"] for row in report["weights"]) == 0
    assert json.loads((out / "quantize_config.json").read_text())["checkpoint_format"] == "gptq_v2"
    now = decoded(out)
    assert all(torch.equal(w, now[m]) for m, w in decoded(source).items())


def test_what_the_target_cannot_hold_is_refused_with_the_reason(home):
    halfbyte.quantize(demo.MODEL, home / "int8", method="minmax", grid="int8-channel")
    with pytest.raises(Unsupported, match="awq holds int4"):
        halfbyte.convert(home / "int8", home / "int8-awq", "awq")
    assert not (home / "int8-awq").exists()


def test_an_unquantized_checkpoint_is_sent_to_quantize(home):
    with pytest.raises(BadRequest, match="halfbyte quantize"):
        halfbyte.convert(demo.MODEL, home / "nothing", "gptq")


@pytest.mark.parametrize("to", TARGETS)
def test_scales_that_fp16_cannot_hold(to):
    grid, w = parse("int4-g32-fp32"), torch.randn(64, 64)
    params = {"scale": grid.fit(w, None)["scale"] * 1.0001}
    same = TARGETS[to].cast_exact(halfbyte_quantized(grid, w, params))
    assert (same is not None) == (to == "compressed-tensors")


def halfbyte_quantized(grid, w, params):
    from halfbyte.grids.quantized import Quantized

    return Quantized(grid, grid.encode(w, params), params)


def test_awq_interleaves_columns_as_its_kernels_expect():
    grid = parse("int4-channel")
    codes = torch.arange(16, dtype=torch.uint8)[:, None].repeat(1, 8)
    packed = AWQ().pack(
        halfbyte_quantized(grid, torch.zeros(16, 8), {"scale": torch.ones(16, 1, dtype=torch.float16)})._replace(
            codes=codes
        )
    )
    assert packed["qweight"][0].tolist() == [
        0x75316420,
        0xFDB9ECA8 - (1 << 32),
    ]  # AutoAWQ's order 0 2 4 6 1 3 5 7, lowest bits first


def test_nvfp4_of_a_gguf_is_ggmls_where_it_is_asked_for(tmp_path):
    tiny.make(tmp_path / "model", hidden_size=128, intermediate_size=256)
    words = {"method": "nearest", "engine": "none"}
    halfbyte.quantize(tmp_path / "model", tmp_path / "folder", grid="nvfp4", **words)
    report = halfbyte.convert(tmp_path / "folder", tmp_path / "out.gguf", to="gguf", grid="nvfp4")
    assert {row.grid for row in report.weights} == {"ggml-nvfp4"}


@pytest.mark.parametrize("to", ["gguf", "compressed-tensors"])
@pytest.mark.parametrize("name", ["nvfp4", "NVFP4", "ggml-nvfp4", "nvfp4-global"])
def test_nvfp4_is_nvidias_grid_and_ggmls_type(tmp_path, name, to):
    """A grid's name means one grid; a GGUF takes names of types too, in any case."""
    tiny.make(tmp_path / "model", hidden_size=128, intermediate_size=256)
    out, words = tmp_path / ("out.gguf" if to == "gguf" else "out"), {"method": "nearest", "to": to, "engine": "none"}
    refusal = {
        ("ggml-nvfp4", "compressed-tensors"): "compressed-tensors has no format for ggml-nvfp4; it has .*, nvfp4$",
        ("nvfp4-global", "gguf"): r"gguf has no type for nvfp4; it has .*, NVFP4 \(the grid ggml-nvfp4\), ",
    }.get((name, to))
    if refusal:
        with pytest.raises(Unsupported, match=refusal):
            halfbyte.quantize(tmp_path / "model", out, grid=name, **words)
    else:
        report = halfbyte.quantize(tmp_path / "model", out, grid=name, **words)
        assert {row.grid for row in report.weights} == {"ggml-nvfp4" if to == "gguf" else "nvfp4"}
