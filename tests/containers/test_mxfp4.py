"""gpt-oss checkpoints: Transformers reads from them what we read, and they are sources like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM
from transformers.utils.quantization_config import Mxfp4Config

import halfbyte
import tiny
from halfbyte.errors import Unsupported
from halfbyte.models.checkpoint import Checkpoint

EXPERTS = "model.layers.{}.mlp.experts"
SHAPES = {"gate_up_proj": (192, 64), "down_proj": (64, 96)}
"""[out, in]"""
CONFIG: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16, "vocab_size": 264,
    "max_position_embeddings": 256,
    "bos_token_id": 256, "eos_token_id": 257, "architectures": ["GptOssForCausalLM"],
}  # fmt: skip
TOKENS = torch.arange(5, 69)[None]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """As openai/gpt-oss-20b lies on the hub: every code and many exponents are among the experts' random bytes."""
    folder = tmp_path_factory.mktemp("mxfp4") / "source"
    config = GptOssConfig(**CONFIG)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).bfloat16()
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator).bfloat16()
    tensors = {n: t for n, t in model.state_dict().items() if not n.endswith(tuple(SHAPES))}
    for layer in range(2):
        for name, (out, width) in SHAPES.items():
            stem = f"{EXPERTS.format(layer)}.{name}"
            tensors[f"{stem}_blocks"] = torch.randint(
                256, (4, out, width // 32, 16), dtype=torch.uint8, generator=generator
            )
            tensors[f"{stem}_scales"] = torch.randint(
                110, 124, (4, out, width // 32), dtype=torch.uint8, generator=generator
            )
    folder.mkdir()
    said = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    }
    (folder / "config.json").write_text(
        json.dumps({**config.to_dict(), "dtype": "bfloat16", "quantization_config": said})
    )
    tiny.tokenizer(False).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tiny.BOS, "eos_token": tiny.EOS})
    )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def theirs(source):
    """What Transformers reads."""
    return AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )


@pytest.fixture(scope="module")
def plain(source, theirs) -> Path:
    """The same model without quantization, as Transformers saves it."""
    folder = source.parent / "plain"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    save_file({n: t.contiguous() for n, t in theirs.state_dict().items()}, folder / "model.safetensors")
    return folder


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {module: checkpoint.read_quantized(module).decode() for module in checkpoint.quantized}


def test_every_expert_is_a_matrix_that_transformers_decodes_to_the_same_bits(source, theirs):
    ours = decoded(source)
    assert len(ours) == 2 * len(SHAPES) * 4
    for module, w in ours.items():
        head, expert, name = module.rsplit(".", 2)
        assert w.shape == SHAPES[name]
        assert torch.equal(w.bfloat16(), theirs.get_parameter(f"{head}.{name}")[int(expert)].T)


def test_it_runs_with_the_logits_of_transformers(source, theirs):
    with torch.no_grad():
        assert torch.equal(halfbyte.load(source)(TOKENS).logits, theirs(TOKENS).logits)


def test_inspect_counts_its_bits(source):
    row = halfbyte.inspect(source)["grids"]["mxfp4"]
    assert row["bits_per_weight"] == 4.25
    assert row["weights"] == 2 * 4 * sum(out * width for out, width in SHAPES.values())


@pytest.mark.parametrize("method", ["nearest", "gptq"])
def test_quantizing_it_is_quantizing_the_model_that_it_decodes_to(source, plain, tmp_path, method):
    settings = {
        "method": method,
        "grid": "int4-g32",
        "engine": "none",
        "calibration": {"source": str(tiny.text(tmp_path / "text.txt")), "samples": 4, "length": 64},
    }
    report = halfbyte.quantize(source, tmp_path / "ours", **settings)
    assert any("mxfp4" in warning for warning in report["warnings"])
    halfbyte.quantize(plain, tmp_path / "expected", **settings)
    ours, expected = (
        load_file(tmp_path / "ours" / "model.safetensors"),
        load_file(tmp_path / "expected" / "model.safetensors"),
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in ours.items())


def test_its_values_move_to_compressed_tensors_and_run_there(source, theirs, tmp_path):
    report = halfbyte.convert(source, tmp_path / "out", "compressed-tensors", engine="none")
    assert {row["error"] for row in report["weights"]} == {0}
    said = Checkpoint.open(tmp_path / "out").config["quantization_config"]
    assert said["format"] == "mxfp4-pack-quantized"
    with torch.no_grad():
        assert torch.equal(halfbyte.load(tmp_path / "out")(TOKENS).logits, theirs(TOKENS).logits)


def test_it_is_no_container_to_write(source, tmp_path):
    with pytest.raises(Unsupported, match=r"mxfp4 is read and not written.*compressed-tensors"):
        halfbyte.quantize(source, tmp_path / "out", grid="mxfp4", to="mxfp4")


def test_experts_whose_scales_do_not_fit_are_refused(source, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    name = f"{EXPERTS.format(0)}.down_proj_scales"
    save_file({**tensors, name: tensors[name][:, :, :1].contiguous()}, folder / "model.safetensors")
    with pytest.raises(Unsupported, match="no MXFP4"):
        _ = Checkpoint.open(folder).quantized


def test_its_values_move_to_a_gguf_and_back(source, tmp_path):
    """ggml's MXFP4 holds the same codes and scales: llama.cpp's own converter repacks them too."""
    report = halfbyte.convert(source, tmp_path / "model.gguf", "gguf")
    assert {(row["grid"], row["error"]) for row in report["weights"]} == {("mxfp4", 0)}
    ours = Checkpoint.open(tmp_path / "model.gguf")
    stacks = {
        f"{EXPERTS.format(layer)}.{name}": ours.read(f"{EXPERTS.format(layer)}.{name}")
        for layer in range(2)
        for name in SHAPES
    }
    for module, w in decoded(source).items():
        head, expert, name = module.rsplit(".", 2)
        assert torch.equal(stacks[f"{head}.{name}"][int(expert)].T, w)
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {t.name: t for t in GGUFReader(tmp_path / "model.gguf").tensors}
    gate, up = (
        torch.from_numpy(dequantize(t.data, t.tensor_type))
        for t in (tensors["blk.1.ffn_gate_exps.weight"], tensors["blk.1.ffn_up_exps.weight"])
    )
    alternating = torch.stack([gate, up], 2).flatten(1, 2)
    assert torch.equal(alternating[3], decoded(source)[f"{EXPERTS.format(1)}.3.gate_up_proj"])


@pytest.mark.parametrize("grid", ["Q4_K_M", "mxfp4"])
def test_it_is_a_source_of_ggufs(source, plain, tmp_path, grid):
    for name, folder in (("ours", source), ("expected", plain)):
        halfbyte.quantize(folder, tmp_path / f"{name}.gguf", method="nearest", grid=grid)
    ours, expected = (Checkpoint.open(tmp_path / f"{name}.gguf") for name in ("ours", "expected"))
    assert ours.tensors() == expected.tensors()
    assert all(torch.equal(ours.read(name), expected.read(name)) for name in ours.tensors())
