"""Folders that Model Optimizer exported, what it reads from them itself (tests/goldens/make_modelopt.py), and what
becomes of them."""

import json
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import halfbyte
from halfbyte.containers.modelopt import ModelOpt
from halfbyte.containers.safetensors import Entry
from halfbyte.errors import Unsupported
from halfbyte.models.checkpoint import Checkpoint

FOLDERS = Path(__file__).parents[1] / "goldens" / "folders"
GRIDS = {
    "modelopt-fp8": ("fp8-e4m3-tensor", "fp8-e4m3-tensor"),
    "modelopt-fp8-channel": ("fp8-e4m3-channel", "fp8-e4m3-channel"),
    "modelopt-fp8-block": ("fp8-e4m3-tensor", "fp8-e4m3-block"),
    "modelopt-mxfp8": ("mxfp8-e4m3", "mxfp8-e4m3"),
    "modelopt-nvfp4": ("nvfp4-factor", "nvfp4-factor"),
    "modelopt-nvfp4-weights": ("nvfp4-factor", "nvfp4-factor"),
}
MODULES = ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"]


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {module: checkpoint.read_quantized(module).decode() for module in checkpoint.quantized}


def edited(name: str, out: Path, change: Callable = dict, config: dict | None = None) -> Path:
    """A copy whose tensors and quantization_config are changed; without `config`, config.json says nothing."""
    shutil.copytree(FOLDERS / name, out)
    save_file(change(load_file(out / "model.safetensors")), out / "model.safetensors")
    said = json.loads((out / "config.json").read_text())
    said["quantization_config"] = config
    (out / "config.json").write_text(json.dumps(said))
    return out


@pytest.mark.parametrize(("name", "grids"), GRIDS.items())
def test_every_value_is_the_one_that_model_optimizer_reads(name, grids):
    checkpoint = Checkpoint.open(FOLDERS / name)
    assert {m: str(scheme.weight) for m, (scheme, _) in checkpoint.quantized.items()} == dict(
        zip(MODULES, grids, strict=True)
    )
    expected = load_file(FOLDERS / name / "expected")
    assert all(torch.equal(w[::4], expected[module]) for module, w in decoded(FOLDERS / name).items())


@pytest.mark.parametrize("name", GRIDS)
def test_a_folder_whose_config_says_nothing_is_known_by_hf_quant_config(name, tmp_path):
    folder = edited(name, tmp_path / "old")
    ours, expected = decoded(folder), decoded(FOLDERS / name)
    assert all(torch.equal(ours[m], w) for m, w in expected.items())


@pytest.mark.parametrize("name", [name for name in GRIDS if "nvfp4" not in name])
def test_fp8_moves_to_compressed_tensors_value_for_value(name, tmp_path):
    report = halfbyte.convert(FOLDERS / name, tmp_path / "out", "compressed-tensors")
    assert {row["error"] for row in report["weights"]} == {0}
    ours, expected = decoded(tmp_path / "out"), decoded(FOLDERS / name)
    assert all(torch.equal(ours[m], w) for m, w in expected.items())


def test_fp8_is_a_source_whose_own_scales_stay_behind(tmp_path):
    report = halfbyte.quantize(FOLDERS / "modelopt-fp8", tmp_path / "out", method="nearest", grid="int4-g32")
    assert any("fp8-e4m3-tensor" in warning for warning in report["warnings"])
    out = Checkpoint.open(tmp_path / "out")
    assert {str(scheme) for scheme, _ in out.quantized.values()} == {"int4-g32-bf16"}
    assert not [name for name in out.entries if name.endswith(("k_scale", "input_scale"))]
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


def test_what_changes_inputs_beside_the_weights_is_refused(tmp_path):
    scaled = {f"{MODULES[1]}.pre_quant_scale": torch.ones(256)}
    folder = edited(
        "modelopt-nvfp4",
        tmp_path / "awq",
        lambda tensors: {**tensors, **scaled},
        {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"},
    )
    with pytest.raises(Unsupported, match="pre_quant_scale is not read"):
        _ = Checkpoint.open(folder).quantized


def test_weights_of_other_algorithms_are_refused(tmp_path):
    def integers(tensors):
        return {**tensors, f"{MODULES[1]}.weight": torch.zeros(64, 256, dtype=torch.int8)}

    folder = edited(
        "modelopt-fp8-channel",
        tmp_path / "int8",
        integers,
        {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"},
    )
    with pytest.raises(Unsupported, match=r"torch.int8 .* FP8, MXFP8 and NVFP4 are"):
        _ = Checkpoint.open(folder).quantized


@pytest.mark.parametrize("name", ["modelopt-fp8", "modelopt-fp8-channel", "modelopt-nvfp4"])
def test_inputs_are_rounded_as_model_optimizer_rounds_them(name):
    read, expected = Checkpoint.open(FOLDERS / name).read_inputs(MODULES[1]), load_file(FOLDERS / name / "expected")
    assert read
    torch.testing.assert_close(read.round(expected["inputs"]), expected["rounded"], rtol=1e-6, atol=0)


def test_inputs_of_weights_alone_stay_in_16_bits():
    assert Checkpoint.open(FOLDERS / "modelopt-nvfp4-weights").read_inputs(MODULES[1]) is None


@pytest.mark.parametrize(("name", "scheme"), [("modelopt-nvfp4", "nvfp4/nvfp4"), ("modelopt-nvfp4-weights", "nvfp4")])
def test_nvfp4_moves_to_compressed_tensors_but_for_the_last_bit(name, scheme, tmp_path):
    """Its factor becomes a divisor: all codes and scales stay."""
    report = halfbyte.convert(FOLDERS / name, tmp_path / "out", "compressed-tensors")
    assert {row["grid"] for row in report["weights"]} == {scheme}
    assert max(row["error"] for row in report["weights"]) < 1e-7
    before, after = load_file(FOLDERS / name / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after[f"{MODULES[1]}.weight_packed"], before[f"{MODULES[1]}.weight"])
    assert torch.equal(
        after[f"{MODULES[1]}.weight_scale"].view(torch.uint8), before[f"{MODULES[1]}.weight_scale"].view(torch.uint8)
    )


def test_nvfp4_is_a_source(tmp_path):
    report = halfbyte.quantize(FOLDERS / "modelopt-nvfp4", tmp_path / "out", method="nearest", grid="int8-g32")
    assert max(row["error"] for row in report["weights"]) < 0.01


@pytest.mark.parametrize("turned", [False, True])
def test_fused_experts_in_nvfp4_are_read_whichever_way_they_lie(turned, tmp_path):
    """As nvidia/Llama-4-Scout-17B-16E-Instruct-NVFP4 has them, [experts, in / 2, out], or [experts, out, in / 2]."""
    module, home = MODULES[1], "model.layers.0.feed_forward.experts"
    one = load_file(FOLDERS / "modelopt-nvfp4" / "model.safetensors")
    stack = {
        part: torch.stack(
            [one[f"{module}.{part}"].view(torch.uint8), one[f"{module}.{part}"].view(torch.uint8).flip(0)]
        )
        for part in ("weight", "weight_scale")
    }
    stack = {part: (t.mT if turned else t).contiguous() for part, t in stack.items()}
    fused = {
        f"{home}.gate_up_proj": stack["weight"],
        f"{home}.gate_up_proj_weight_scale": stack["weight_scale"].view(torch.float8_e4m3fn),
        f"{home}.gate_up_proj_weight_scale_2": one[f"{module}.weight_scale_2"],
    }
    folder = edited("modelopt-nvfp4", tmp_path / "fused", lambda tensors: fused)
    w = decoded(FOLDERS / "modelopt-nvfp4")[module]
    ours = decoded(folder)
    assert torch.equal(ours[f"{home}.0.gate_up_proj"], w)
    assert torch.equal(ours[f"{home}.1.gate_up_proj"], w.flip(0))


def test_fused_experts_are_told_from_their_scales_in_any_order_of_tensors(tmp_path):
    parts = {"w_proj": torch.uint8, "w_proj_weight_scale": torch.float8_e4m3fn, "w_proj_weight_scale_2": torch.float32}
    entries = {
        f"experts.{name}": Entry((2, 64, 8)[: 1 if name.endswith("2") else 3], dtype, tmp_path, 0)
        for name, dtype in parts.items()
    }
    wanted = {
        f"experts.{number}.w_proj.{part}"
        for number in range(2)
        for part in ("weight", "weight_scale", "weight_scale_2")
    }
    for order in permutations(entries.items()):
        assert ModelOpt().unfuse_experts(dict(order)).keys() == wanted
