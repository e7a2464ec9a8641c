"""Schemes with quantized inputs: written as compressed-tensors says it, and read back."""

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from halfbyte.containers.compressed.container import CompressedTensors
from halfbyte.containers.fp8 import FP8
from halfbyte.errors import HalfbyteError, Unsupported
from halfbyte.formats import SCHEMES
from halfbyte.grids.activations import parse as input_named
from halfbyte.grids.schemes import parse
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.packed import QuantLinear

SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
MODULE = "model.layers.0.self_attn.q_proj"
MIXED = {"layers.1.mlp.*": "int4-g128", "layers.0.mlp.down_proj": "fp8-e4m3-channel/fp8-e4m3-token"}
WITH_INPUTS = [name for name, preset in SCHEMES.items() if "/" in preset.scheme and not preset.others]
"""Of one scheme: tests/containers/test_mixtures.py has the one that is several."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    tiny.make(home / "model", **SIZES)
    tiny.text(home / "text.txt")
    return home


@pytest.fixture(scope="module")
def made(home):
    """A folder of each scheme, made once."""
    done = {}

    def make(name: str, **words):
        key = name, repr(words)
        if key not in done:
            out = home / f"out-{len(done)}"
            calibration = {"source": str(home / "text.txt"), "samples": 4, "length": 64}
            done[key] = (
                out,
                halfbyte.quantize(
                    home / "model", out, grid=name, **{"method": "nearest", "calibration": calibration, **words}
                ),
            )
        return done[key]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [*WITH_INPUTS, "int8-channel/int8-static-asym", "int8-tensor/int8-tensor", "int8-g128-asym/int8-token-asym"]
)
def test_compressed_tensors_reads_what_is_written(made, name):
    folder, _ = made(name, to="compressed-tensors")
    checkpoint = Checkpoint.open(folder)
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    # Weights of 4 bits under inputs in FP8 are packed for vLLM's kernel; the package would infer a byte each, and reads
    # both.
    assert infer_module_format(torch.nn.Linear, scheme) == scheme.format or name == "w4a8-fp8"
    for module, (found, _) in checkpoint.quantized.items():
        assert str(found) == str(CompressedTensors().resolve(parse(name), torch.bfloat16))
        tensors = {n.removeprefix(f"{module}."): checkpoint.entries[n].read() for n in checkpoint.parts_of[module]}
        weights = {n: t for n, t in tensors.items() if not n.startswith("input_")}
        theirs = BaseCompressor.get_value_from_registry(str(scheme.format)).decompress(weights, scheme)["weight"]
        assert torch.equal(theirs, checkpoint.read_quantized(module).decode().to(theirs.dtype))
        assert all(
            tensors[f"input_{n}"].shape == (1,)
            for n in ("scale", "zero_point", "global_scale")
            if f"input_{n}" in tensors
        )
        assert any(n.startswith("input_") for n in tensors) == found.activations.static


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w8a8", "w8a8-static", "fp8", "fp8-block", "w4a4-nvfp4", "w4a8-fp8"])
def test_evaluation_computes_what_a_loaded_model_computes(home, made, name):
    folder, _ = made(name)
    result = halfbyte.evaluate([folder], home / "model", str(home / "text.txt"), length=64, windows=2)["models"][0]
    plain, ours = halfbyte.load(home / "model", torch.float32), halfbyte.load(folder, torch.float32)
    assert {str(m.activations) for m in ours.modules() if isinstance(m, QuantLinear)} == {str(parse(name).activations)}
    from halfbyte.models import calibrate

    windows = calibrate.evaluation(Checkpoint.open(home / "model"), str(home / "text.txt"), 64, 2).tokens
    with torch.no_grad():
        reference, own = (m(windows).logits[:, :-1].log_softmax(-1) for m in (plain, ours))
    kl = (reference.exp() * (reference - own)).sum(-1).mean().item()
    assert kl > 0
    assert result["kl"] == pytest.approx(kl, rel=0.02)


def test_the_report_tells_scales_and_what_is_cut(made):
    _, widest = made("w8a8-static")
    _, narrow = made("w8a8-static", observer="mse")
    rows = [row["activations"] for row in widest["weights"]]
    assert all(
        row["clipped"] == row["saturated"] == 0 and row["scale"] * 127 >= 0.99 * max(-row["low"], row["high"])
        for row in rows
    )
    assert all(0 < row["error"] < 0.5 for row in rows)
    narrow = [row["activations"] for row in narrow["weights"]]
    assert any(
        a["scale"] < b["scale"] and a["saturated"] == a["clipped"] * a["values"] > 0
        for a, b in zip(narrow, rows, strict=True)
    )
    assert narrow[0]["error"] < rows[0]["error"]  # the first reads the same in both


def test_what_engines_fuse_shares_its_scales(made):
    """vLLM takes one scale of a tensor, one divisor and one input scale for q, k and v, and one for gate and up."""
    for name, shared in (
        ("fp8-static", ("weight_scale", "input_scale")),
        ("w4a4-nvfp4", ("weight_global_scale", "input_global_scale")),
    ):
        tensors = load_file(made(name, to="compressed-tensors")[0] / "model.safetensors")
        for suffix in shared:
            for fused in (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("mlp.gate_proj", "mlp.up_proj"),
            ):
                assert len({tensors[f"model.layers.1.{n}.{suffix}"].item() for n in fused}) == 1


def test_fp8_folders_say_how_their_inputs_are_rounded(home, made, tmp_path):
    static, _ = made("fp8-static", to="fp8")
    config = json.loads((static / "config.json").read_text())["quantization_config"]
    assert config["activation_scheme"] == "static"
    assert str(Checkpoint.open(static).quantized[MODULE][0]) == "fp8-e4m3-tensor/fp8-e4m3-static"
    report = halfbyte.convert(static, tmp_path / "ct", "compressed-tensors")
    assert {row["error"] for row in report["weights"]} == {0}
    ours, theirs = Checkpoint.open(static).read_inputs(MODULE), Checkpoint.open(tmp_path / "ct").read_inputs(MODULE)
    assert ours == theirs or torch.equal(ours.params["scale"], theirs.params["scale"])
    block, _ = made("fp8-block", to="fp8")
    assert str(Checkpoint.open(block).read_inputs(MODULE).grid) == "fp8-e4m3-g128"


def test_weights_move_where_inputs_stay_in_16_bits(made, tmp_path):
    report = halfbyte.convert(made("w8a8")[0], tmp_path / "gptq", "gptq")
    assert {row["error"] for row in report["weights"]} == {0}
    assert all("16 bits" in row["note"] for row in report["weights"])
    assert Checkpoint.open(tmp_path / "gptq").read_inputs(MODULE) is None


def test_weights_that_are_rounded_again_leave_the_stored_scales_of_other_inputs_behind(made, tmp_path):
    source, _ = made("w8a8-static", to="compressed-tensors")
    halfbyte.convert(source, tmp_path / "fp8", "fp8", grid="fp8-e4m3-tensor")
    assert str(Checkpoint.open(tmp_path / "fp8").quantized[MODULE][0]) == "fp8-e4m3-tensor/fp8-e4m3-token"


def test_groups_of_several_schemes_are_told_apart(home, made):
    folder, _ = made("int8-channel/int8-token", override=MIXED)
    found = {
        module.removeprefix("model."): str(scheme) for module, (scheme, _) in Checkpoint.open(folder).quantized.items()
    }
    assert found["layers.1.mlp.up_proj"] == "int4-g128-bf16"
    assert found["layers.0.mlp.down_proj"] == "fp8-e4m3-channel-bf16/fp8-e4m3-token"
    assert found["layers.0.mlp.up_proj"] == "int8-channel-bf16/int8-token"


def test_a_group_of_the_head_says_nothing_of_other_modules(made, tmp_path):
    shutil.copytree(made("int8-channel/int8-token")[0], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {
        "targets": ["lm_head"],
        "weights": groups["group_0"]["weights"],
        "input_activations": None,
    }  # as llm-compressor writes it
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert str(Checkpoint.open(tmp_path / "out").quantized[MODULE][0].activations) == "int8-token"


REFUSED = {
    "gptq has 16-bit inputs only": ({"grid": "w8a8", "to": "gptq"}, "compressed-tensors"),
    "awq has 16-bit inputs only": ({"grid": "int4-g128/int8-token", "to": "awq"}, "compressed-tensors"),
    "gguf has none": ({"grid": "w8a8", "to": "gguf"}, "GGUF"),
    "no words for E5M2 inputs": ({"grid": "fp8-e4m3-channel/fp8-e5m2-token"}, "fp8-e4m3"),
    "fp8 blocks read groups of 128": ({"grid": "fp8-e4m3-block/fp8-e4m3-static", "to": "fp8"}, "fp8-e4m3-g128"),
    "smoothquant of 16-bit inputs": ({"grid": "int4-g128", "method": "smoothquant"}, "w8a8"),
    "an importance matrix tells no scale": ({"grid": "w8a8-static", "method": "nearest", "imatrix": "x"}, "imatrix"),
    "an unknown input": ({"grid": "int8-channel/int8-tokens"}, "int8-token"),
    "E5M2 for an engine that has none": ({"grid": "fp8-e5m2-tensor", "engine": "vllm", "to": "fp8"}, "e4m3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_one_line_that_says_what_would_work(home, tmp_path, case):
    words, hint = REFUSED[case]
    with pytest.raises(HalfbyteError) as refused:
        halfbyte.quantize(home / "model", tmp_path / "out", **{"method": "nearest", **words})
    assert hint in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_stored_scale_needs_text_that_is_there(home, tmp_path):
    with pytest.raises(HalfbyteError, match="no text file"):
        halfbyte.quantize(
            home / "model", tmp_path / "out", method="nearest", grid="w8a8-static", calibration="nowhere.txt"
        )
    folder = tmp_path / "w8a8"
    halfbyte.quantize(home / "model", folder, method="nearest", grid="w8a8")
    with pytest.raises(Unsupported, match="calibration finds"):
        halfbyte.convert(folder, tmp_path / "out", "fp8", grid="fp8-static")


def test_containers_hold_the_inputs_that_their_engines_round():
    assert str(FP8().resolve(parse("fp8-e4m3-block"), torch.bfloat16)) == "fp8-e4m3-block/fp8-e4m3-g128"
    assert input_named("fp8-e4m3-g128") == FP8().resolve(parse("fp8-e4m3-block"), torch.bfloat16).activations


def with_another(home, folder, name):
    """The model with a matrix more than it has modules."""
    shutil.copytree(home / "model", folder)
    tensors = {**load_file(home / "model" / "model.safetensors"), name: torch.ones(256, 256)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_the_model_has_no_linear_for_is_kept(home, tmp_path):
    """It is given no scheme, so none of its inputs' scales is missed after hours."""
    source = with_another(home, tmp_path / "model", "model.layers.1.mlp.unknown_proj.weight")
    calibration = {"source": str(home / "text.txt"), "samples": 4, "length": 64}
    report = halfbyte.quantize(source, tmp_path / "out", grid="w8a8-static", method="nearest", calibration=calibration)
    assert "model.layers.1.mlp.unknown_proj.weight" in report["kept"]
    assert not any("unknown_proj" in row["name"] for row in report["weights"])


def test_what_is_called_a_linear_and_does_not_run_is_refused_a_stored_scale_before_any_block(home, tmp_path):
    """Names that many families have are taken for linears without asking the model, which may have no such module."""
    source = with_another(home, tmp_path / "model", "model.layers.1.mlp.shared_expert.up_proj.weight")
    calibration, seen = {"source": str(home / "text.txt"), "samples": 4, "length": 64}, []
    with pytest.raises(HalfbyteError, match=r"does not run 'model\.layers\.1\.mlp\.shared_expert\.up_proj'.*--skip it"):
        halfbyte.quantize(
            source,
            tmp_path / "out",
            grid="w8a8-static",
            method="nearest",
            calibration=calibration,
            progress=lambda what, *_: seen.append(what),
        )
    assert not any("layers" in what for what in seen)
    halfbyte.quantize(
        source,
        tmp_path / "out",
        grid="w8a8-static",
        method="nearest",
        calibration=calibration,
        skip=["*.shared_expert.*"],
    )
