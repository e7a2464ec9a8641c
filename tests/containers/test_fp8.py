"""FP8 checkpoints: Transformers reads ours, and those of others are sources like any other."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import halfbyte
import tiny
from halfbyte.containers.compressed.container import CompressedTensors
from halfbyte.containers.fp8 import FP8
from halfbyte.errors import BadCheckpoint, Unsupported
from halfbyte.grids import parse
from halfbyte.grids.quantized import Quantized
from halfbyte.models.checkpoint import Checkpoint
from halfbyte.packed import QuantLinear

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("fp8") / "source", **SIZES)


@pytest.fixture(scope="module")
def blocks(source) -> Path:
    out = source.parent / "blocks"
    halfbyte.quantize(source, out, method="nearest", grid="fp8-e4m3-block", to="fp8")
    return out


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {module: checkpoint.read_quantized(module).decode() for module in checkpoint.quantized}


def edited(folder: Path, out: Path, change, **config) -> Path:
    """A copy of a folder whose tensors and quantization_config are changed."""
    out.mkdir()
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] |= config
    (out / "config.json").write_text(json.dumps(said))
    save_file(change(load_file(folder / "model.safetensors")), out / "model.safetensors")
    return out


def test_blocks_lie_as_in_deepseeks_checkpoints(blocks):
    tensors = load_file(blocks / "model.safetensors")
    assert tensors[f"{MODULE}.weight"].dtype == torch.float8_e4m3fn
    assert tensors[f"{MODULE}.weight_scale_inv"].shape == (2, 3)
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    config = json.loads((blocks / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fp8"
    assert config["weight_block_size"] == [128, 128]
    assert config["modules_to_not_convert"] == ["lm_head"]


def test_transformers_decodes_what_we_decode(source, blocks):
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ours = decoded(blocks)
    for module, w in ours.items():
        plain.state_dict()[f"{module}.weight"].copy_(w)
    theirs = AutoModelForCausalLM.from_pretrained(blocks, dtype=torch.bfloat16)  # without a GPU, they decode
    tokens = torch.arange(5, 69)[None]
    loaded = halfbyte.load(blocks)
    for linear in (m for m in loaded.modules() if isinstance(m, QuantLinear)):
        assert str(linear.activations) == "fp8-e4m3-g128"
        linear.activations = None  # nor do they round what a decoded weight reads
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, plain(tokens).logits)
        assert torch.equal(loaded(tokens).logits, plain(tokens).logits)


def test_a_whole_matrix_may_have_one_scale(source, tmp_path):
    report = halfbyte.quantize(source, tmp_path / "out", method="minmax", grid="fp8-e5m2-tensor", engine="none")
    assert report["output"]["container"] == "fp8"
    entries = Checkpoint.open(tmp_path / "out").entries
    assert entries[f"{MODULE}.weight"].dtype == torch.float8_e5m2
    assert entries[f"{MODULE}.weight_scale"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "to"), [("int4-g128", "compressed-tensors"), ("q4_k", "gguf"), ("fp8-e4m3-channel", "compressed-tensors")]
)
def test_an_fp8_checkpoint_is_a_source_like_any_other(blocks, tmp_path, grid, to):
    same = tiny_copy(blocks, tmp_path / "decoded")
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    report = halfbyte.quantize(blocks, out, method="nearest", grid=grid, to=to)
    assert any("fp8-e4m3-block" in warning for warning in report["warnings"])
    expected = tmp_path / ("expected.gguf" if to == "gguf" else "expected")
    halfbyte.quantize(same, expected, method="nearest", grid=grid, to=to)
    ours, theirs = decoded(out), decoded(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[m], theirs[m]) for m in ours)
    kept = Checkpoint.open(out)
    assert not [n for n, e in kept.entries.items() if n not in kept.parts and e.dtype == torch.float8_e4m3fn]


def tiny_copy(blocks: Path, out: Path) -> Path:
    """The same weights in fp32."""
    tiny.make(out, **SIZES)
    tensors = {n: t for n, t in load_file(blocks / "model.safetensors").items() if t.dtype == torch.bfloat16}
    save_file({**tensors, **{f"{m}.weight": w for m, w in decoded(blocks).items()}}, out / "model.safetensors")
    return out


def test_gptq_reads_an_fp8_source(blocks, tmp_path):
    text = tiny.text(tmp_path / "text.txt")
    calibration = {"source": str(text), "samples": 4, "length": 64}
    report = halfbyte.quantize(blocks, tmp_path / "out", method="gptq", grid="int4-g128", calibration=calibration)
    assert all(row["error"] < 0.2 for row in report["weights"])


def test_blocks_move_between_containers_value_for_value(blocks, tmp_path):
    halfbyte.convert(blocks, tmp_path / "ct", "compressed-tensors")
    report = halfbyte.convert(tmp_path / "ct", tmp_path / "back", "fp8")
    assert {row["error"] for row in report["weights"]} == {0}
    for folder in (tmp_path / "ct", tmp_path / "back"):
        assert all(torch.equal(w, decoded(folder)[m]) for m, w in decoded(blocks).items())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_that_are_powers_of_two_in_bytes_are_read(blocks, tmp_path, dtype):
    def in_bytes(tensors):
        names = [n for n in tensors if n.endswith("_scale_inv")]
        return {**tensors, **{n: (torch.frexp(tensors[n]).exponent + 127).to(torch.uint8).view(dtype) for n in names}}

    folder = edited(blocks, tmp_path / "out", in_bytes, scale_fmt="ue8m0")
    tensors = load_file(folder / "model.safetensors")
    scale = torch.exp2(tensors[f"{MODULE}.weight_scale_inv"].view(torch.uint8).float() - 127)
    expected = tensors[f"{MODULE}.weight"].float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(decoded(folder)[MODULE], expected)


def test_mxfp8_in_this_layout_is_read(blocks, tmp_path):
    def scaled(tensors):
        weights = {n: t for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn}
        scales = {
            f"{n}_scale_inv": torch.full((t.shape[0], t.shape[1] // 32), 120, dtype=torch.uint8)
            for n, t in weights.items()
        }
        return {**tensors, **scales}

    folder = edited(blocks, tmp_path / "out", scaled, quant_method="mxfp8", weight_block_size=[1, 32])
    weight = load_file(folder / "model.safetensors")[f"{MODULE}.weight"]
    assert {str(scheme) for scheme, _ in Checkpoint.open(folder).quantized.values()} == {"mxfp8-e4m3/mxfp8-e4m3"}
    assert torch.equal(decoded(folder)[MODULE], weight.float() * 2.0**-7)


def test_scales_of_quantized_inputs_are_left_out(blocks, tmp_path):
    folder = edited(
        blocks, tmp_path / "in", lambda t: {**t, f"{MODULE}.input_scale": torch.tensor(0.1)}, activation_scheme="static"
    )
    halfbyte.quantize(folder, tmp_path / "out", method="minmax", grid="int4-g128")
    assert not [n for n in Checkpoint.open(tmp_path / "out").entries if n.endswith("input_scale")]


@pytest.mark.parametrize("name", ["input_scale", "activation_scale"])
def test_a_stored_scale_of_inputs_is_read_under_both_its_names(source, tmp_path, name):
    """vLLM's, and that of Transformers (integrations/finegrained_fp8.py)."""
    halfbyte.quantize(source, tmp_path / "in", method="minmax", grid="fp8-e4m3-tensor", to="fp8")
    folder = edited(
        tmp_path / "in",
        tmp_path / "out",
        lambda t: {**t, f"{MODULE}.{name}": torch.tensor(0.125)},
        activation_scheme="static",
    )
    inputs = Checkpoint.open(folder).read_inputs(MODULE)
    assert str(inputs.grid) == "fp8-e4m3-static"
    assert inputs.params["scale"].tolist() == [0.125]


def test_a_stored_scale_that_is_not_there_is_a_broken_checkpoint(source, tmp_path):
    halfbyte.quantize(source, tmp_path / "in", method="minmax", grid="w8a8", to="compressed-tensors")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= {
        "strategy": "tensor",
        "dynamic": False,
    }
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match="input_scale' is not stored"):
        Checkpoint.open(tmp_path / "in").read_inputs(MODULE)


def test_what_the_layout_does_not_hold_is_refused_with_what_would_work():
    with pytest.raises(Unsupported, match="fp8-e4m3-block"):
        FP8().resolve(parse("fp8-e4m3-channel"), torch.bfloat16)
    with pytest.raises(Unsupported, match="compressed-tensors"):
        FP8().check(parse("fp8-e4m3-block"), (64, 256))
    with pytest.raises(Unsupported, match="fp8-e4m3"):
        CompressedTensors().resolve(parse("fp8-e5m2-channel"), torch.bfloat16)


def test_a_scale_of_another_shape_is_no_block(blocks, tmp_path):
    folder = edited(blocks, tmp_path / "out", lambda t: {**t, f"{MODULE}.weight_scale_inv": torch.ones(3, 3)})
    with pytest.raises(Unsupported, match="not read"):
        _ = Checkpoint.open(folder).quantized


def test_blocks_that_end_early_decode_as_their_scales_say():
    grid, w = parse("fp8-e4m3-block"), torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    params = grid.fit(w, None)
    q = Quantized(grid, grid.encode(w, params), params)
    scale = params["scale"].repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(q.decode(), q.codes.view(torch.float8_e4m3fn).float() * scale)


FUSED = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}


def test_fused_experts_are_read_one_by_one(tmp_path):
    """Transformers' own names for them (integrations/finegrained_fp8.py FP8Experts)."""
    plain = tiny.make(
        tmp_path / "plain",
        **SIZES,
        **FUSED,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        hidden_act="silu",
    )
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    for name in [n for n, t in tensors.items() if t.dim() == 3]:
        blocks = tensors[name].float().unflatten(1, (-1, 128)).unflatten(3, (-1, 128))
        scale = blocks.abs().amax((2, 4), keepdim=True) / 448
        codes = (blocks / scale).to(torch.float8_e4m3fn)
        stored |= {name: codes.flatten(3).flatten(1, 2), f"{name}_scale_inv": scale[:, :, 0, :, 0].contiguous()}
        tensors[name] = (codes.float() * scale).flatten(3).flatten(1, 2)
    save_file(tensors, plain / "model.safetensors")
    fused = tmp_path / "fused"
    fused.mkdir()
    said = json.loads((plain / "config.json").read_text())
    said["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (fused / "config.json").write_text(json.dumps(said))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (fused / name).write_bytes((plain / name).read_bytes())
    save_file(stored, fused / "model.safetensors")
    assert Checkpoint.open(fused).quantized["model.layers.1.mlp.experts.3.gate_up_proj"][1] == (256, 256)
    for folder in (plain, fused):
        halfbyte.quantize(
            folder,
            tmp_path / f"{folder.name}-int4",
            method="gptq",
            grid="int4-g128",
            engine="none",
            calibration=sample(tmp_path),
        )
    ours, expected = decoded(tmp_path / "fused-int4"), decoded(tmp_path / "plain-int4")
    for module in [
        m for m in expected if m.endswith(".gate_proj") and ".experts." in m
    ]:  # which is written apart where it can be read apart
        home = module.removesuffix("gate_proj")
        expected[f"{home}gate_up_proj"] = torch.cat([expected.pop(module), expected.pop(f"{home}up_proj")])
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[m], expected[m]) for m in ours)


def sample(folder: Path) -> dict:
    return {"source": str(tiny.text(folder / "text.txt")), "samples": 4, "length": 64}


def test_llama_4s_experts_lie_transposed(tmp_path):
    """[experts, in, out] with scales of rows (Transformers integrations/fbgemm_fp8.py FbgemmFp8Llama4TextExperts)."""
    generator = torch.Generator().manual_seed(0)
    home, folder = "model.layers.0.feed_forward.experts", tmp_path / "llama4"
    up, down = (
        torch.randn(2, *shape, generator=generator).to(torch.float8_e4m3fn) for shape in ((192, 512), (256, 192))
    )
    scales = {
        "gate_up_proj_scale": torch.rand(2, 1, 512, generator=generator),
        "down_proj_scale": torch.rand(2, 192, 1, generator=generator),
    }
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama4_text", "quantization_config": {"quant_method": "fbgemm_fp8"}})
    )
    save_file(
        {f"{home}.gate_up_proj": up, f"{home}.down_proj": down, **{f"{home}.{n}": s for n, s in scales.items()}},
        folder / "model.safetensors",
    )
    ours, checkpoint = decoded(folder), Checkpoint.open(folder)
    for expert in range(2):
        w = up[expert].float() * scales["gate_up_proj_scale"][expert]
        assert torch.equal(ours[f"{home}.{expert}.gate_up_proj"], w.T)
        assert torch.equal(
            checkpoint.read(f"{home}.{expert}.gate_up_proj.weight"), w.T
        )  # an expert by itself lies as linears do
        assert torch.equal(
            ours[f"{home}.{expert}.down_proj"], (down[expert].float() * scales["down_proj_scale"][expert].T).T
        )
