"""NVFP4 with attention and head in FP8, as large models are released: which module gets what, as compressed-tensors'
own code and engines' rules see it."""

import json
import re

import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import is_match, match_named_modules
from safetensors.torch import load_file, save_file

import halfbyte
import tiny
from engines.test_engines import LLAMA, MOE, QWEN3_MOE, judge, place
from halfbyte.containers.compressed.container import CompressedTensors
from halfbyte.errors import BadRequest, Unsupported
from halfbyte.grids.schemes import parse
from halfbyte.models import calibrate
from halfbyte.models.checkpoint import Checkpoint
from models.families import FAMILIES
from models.test_checkpoints import IMAGES, logits_of

FP8, NVFP4 = "fp8-e4m3-channel-bf16/fp8-e4m3-token", "nvfp4/nvfp4"
EXPECTED = {
    r"linear_attn\.(in_proj_qkv|in_proj_z|out_proj)|self_attn\.[qkvo]_proj|lm_head": FP8,
    r"mlp\.(gate|up|down)_proj": NVFP4,
}
AHEAD = {f"mtp.layers.0.self_attn.{part}_proj": (64, 64) for part in "qkv"} | {"mtp.fc": (64, 128)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A decoder of linear and other attention beside an encoder of images, with a head and what predicts ahead."""
    source = tmp_path_factory.mktemp("mixtures") / "model"
    torch.manual_seed(0)
    words = IMAGES["qwen3_5"] | {"tie_word_embeddings": False}
    words["text_config"] = words["text_config"] | {"tie_word_embeddings": False, "vocab_size": 264}
    config = transformers.AutoConfig.for_model("qwen3_5", **words)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2) if p.dim() == 1 else p.normal_(0, p.shape[-1] ** -0.5)
    model.save_pretrained(source)
    ahead = {f"{name}.weight": torch.randn(shape).bfloat16() for name, shape in AHEAD.items()}
    tiny.tokenizer(False).save(str(source / "tokenizer.json"))
    save_file(load_file(source / "model.safetensors") | ahead, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.fixture(scope="module")
def made(source):
    out = source.parent / "out"
    calibration = {"source": str(tiny.text(source.parent / "text.txt")), "samples": 2, "length": 32}
    halfbyte.quantize(source, out, grid="nvfp4-fp8", method="nearest", engine="vllm", calibration=calibration)
    return out


def said(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_each_module_is_what_is_released(made):
    found = Checkpoint.open(made).quantized
    assert {"lm_head"} < found.keys()
    for name, (scheme, _) in found.items():
        wanted = next(scheme for pattern, scheme in EXPECTED.items() if re.search(rf"({pattern})$", name))
        assert str(scheme) == wanted, name
    assert not any("in_proj_a" in name or "in_proj_b" in name or "visual" in name for name in found)


def test_compressed_tensors_finds_the_same_modules(made):
    config = QuantizationConfig.model_validate(said(made))
    assert said(made)["format"] == "mixed-precision"
    assert {str(group.format) for group in config.config_groups.values()} == {"float-quantized", "nvfp4-pack-quantized"}
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(transformers.AutoConfig.from_pretrained(made))
    theirs = {
        name: "nvfp4" in str(group.format)
        for group in config.config_groups.values()
        for name, _ in match_named_modules(model, group.targets, config.ignore)
    }
    ours = {name: "nvfp4" in str(scheme) for name, (scheme, _) in Checkpoint.open(made).quantized.items()}
    assert theirs == ours


def test_targets_are_found_where_vllm_has_the_decoder(made):
    """vLLM calls `model.language_model.layers` `language_model.model.layers`, and translates no patterns."""
    linear = torch.nn.Linear(2, 2)
    for name in Checkpoint.open(made).quantized:
        elsewhere = name.replace("model.language_model.", "language_model.model.")
        groups = [
            key
            for key, group in said(made)["config_groups"].items()
            if any(is_match(elsewhere, linear, target) for target in group["targets"])
        ]
        assert len(groups) == 1, name


@pytest.mark.slow
def test_transformers_loads_the_same_weights(made):
    """And rounds what each reads in the same way; logits differ by rounding in bfloat16, as of each scheme alone."""
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(made, dtype=torch.bfloat16)
    ours, quantized = halfbyte.load(made, torch.bfloat16), Checkpoint.open(made).quantized
    assert logits_of(theirs).isfinite().all()  # weights are decompressed as they are first used
    read = {name: m.quantization_scheme for name, m in theirs.named_modules() if hasattr(m, "quantization_scheme")}
    assert read.keys() == quantized.keys()
    for name, scheme in read.items():
        assert torch.equal(theirs.get_submodule(name).weight, ours.get_submodule(name).weight.bfloat16()), name
        assert scheme.input_activations.num_bits == (4 if str(quantized[name][0]) == NVFP4 else 8)


def test_evaluation_rounds_what_the_head_reads(tmp_path):
    """As a loaded model does, whose head is a linear like others."""
    source, text = tiny.make(tmp_path / "model"), str(tiny.text(tmp_path / "text.txt"))
    override = {"*.self_attn.*": "keep", "*.mlp.*": "keep", "layers.0.mlp.up_proj": "w4a4-nvfp4"}
    words = {"method": "nearest", "calibration": {"source": text, "samples": 2, "length": 64}}
    halfbyte.quantize(source, tmp_path / "out", grid="nvfp4-fp8", override=override, **words)
    loss = halfbyte.evaluate([tmp_path / "out"], source, text, length=64, windows=2).models[0].kl
    windows = calibrate.evaluation(Checkpoint.open(source), text, 64, 2).tokens
    models = [halfbyte.load(path, torch.float32) for path in (source, tmp_path / "out")]
    with torch.no_grad():
        reference, own = (model(windows).logits[:, :-1].log_softmax(-1) for model in models)
    assert loss == pytest.approx((reference.exp() * (reference - own)).sum(-1).mean().item(), rel=0.02)


def test_what_stays_is_named_so_that_every_loader_finds_it(made):
    ignored, quantized = said(made)["ignore"], Checkpoint.open(made).quantized
    assert AHEAD.keys() <= set(ignored)  # one by one
    assert "mtp.layers.0.self_attn.qkv_proj" in ignored  # SGLang's name of them together
    assert not any(other.startswith(f"{name}.") for name in ignored for other in quantized)  # no parents
    assert not any(name in other for name in ignored for other in quantized)


def test_names_within_others_are_patterns():
    q = parse("int4-g128")
    config = CompressedTensors().config({"model.layers.0.mlp.gate_proj": q}, ["model.layers.0.mlp.gate"], torch.float16)
    (name,) = config["ignore"]
    linear = torch.nn.Linear(2, 2)
    assert is_match("model.layers.0.mlp.gate", linear, name)
    assert not is_match("model.layers.0.mlp.gate_proj", linear, name)
    assert name not in "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize(
    ("engine", "loads"),
    [("vllm", True), ("sglang", True), ("transformers", True), ("tgi", False), ("tensorrt-llm", False)],
)
def test_engines(engine, loads):
    attention = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "fp8")
    verdict = judge(engine, "compressed-tensors", place("w4a4-nvfp4", head="fp8", **attention), LLAMA)
    assert verdict.loads == loads
    notes = " ".join(verdict.notes)
    assert ("32736" in notes and "35228" in notes) == (engine == "sglang")
    assert ("37291" in notes) == (engine == "vllm")


def test_sglang_wants_shared_experts_like_the_others():
    shapes = MOE | {f"mlp.shared_expert.{n}": (768, 2048) for n in ("gate_proj", "up_proj")}
    placed = place("w4a4-nvfp4", shapes)
    assert judge("sglang", "compressed-tensors", placed, QWEN3_MOE).loads
    other = {w: parse("fp8") if "shared" in w.name else s for w, s in placed.items()}
    assert "shared_expert" in judge("sglang", "compressed-tensors", other, QWEN3_MOE).reasons[0]
    assert judge("vllm", "compressed-tensors", other, QWEN3_MOE).loads


def test_heads_that_an_engine_does_not_load_stay(source):
    plan = halfbyte.quantize(source, "unused", grid="nvfp4-fp8", head=False, dry_run=True)
    assert "lm_head" not in {w.name for w in plan.weights}


def test_one_word_for_several_schemes_is_no_grid_of_a_weight(source, tmp_path):
    with pytest.raises(BadRequest, match="'nvfp4-fp8' is several schemes"):
        halfbyte.quantize(source, tmp_path / "out", override={"*.up_proj": "nvfp4-fp8"})
    with pytest.raises((Unsupported, BadRequest)):
        halfbyte.quantize(source, tmp_path / "out.gguf", grid="nvfp4-fp8")
    with pytest.raises(Unsupported):
        halfbyte.quantize(source, tmp_path / "out", grid="nvfp4-fp8", to="gptq")


def test_stacked_experts_that_predict_ahead_are_named_one_by_one(tmp_path):
    source = FAMILIES["qwen3_5_moe"].save(tmp_path / "model")
    stack = {"mtp.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 64, 64).bfloat16()}
    save_file(load_file(source / "model.safetensors") | stack, source / "model.safetensors", {"format": "pt"})
    halfbyte.quantize(source, tmp_path / "out", method="nearest", grid="int4-g32", to="compressed-tensors")
    home = "mtp.layers.0.mlp.experts"
    wanted = {f"{home}.{number}.{part}_proj" for number in range(3) for part in ("gate", "up")}
    assert {name for name in said(tmp_path / "out")["ignore"] if name.startswith(home)} == wanted


def test_layers_beyond_those_that_the_config_counts_are_named_as_engines_fuse_them(tmp_path):
    """DeepSeek's and GLM's layers for multi-token prediction."""
    source = tiny.make(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    last = "model.layers.1."
    beyond = {n.replace(last, "model.layers.2."): w.clone() for n, w in weights.items() if n.startswith(last)}
    beyond["model.layers.2.eh_proj.weight"] = torch.randn(64, 128).bfloat16()
    save_file(weights | beyond, source / "model.safetensors", {"format": "pt"})
    halfbyte.quantize(source, tmp_path / "out", method="nearest", grid="int4-g32", to="compressed-tensors")
    parts = ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.up_proj", "mlp.gate_up_proj", "eh_proj")
    assert {f"model.layers.2.{part}" for part in parts} <= set(said(tmp_path / "out")["ignore"])
    assert not any("layers.2." in name for name in Checkpoint.open(tmp_path / "out").quantized)
