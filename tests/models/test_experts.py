"""Experts that a checkpoint stacks in one tensor are written as those of a checkpoint that has them apart."""

import re
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

import halfbyte
import tiny
from halfbyte.errors import Unsupported
from halfbyte.models.checkpoint import Checkpoint
from models.every import EVERY, outputs
from models.families import FAMILIES

WORDS = {"grid": "int4-g16", "to": "compressed-tensors", "engine": "none"}
TOKENS = torch.randint(0, 250, (2, 32), generator=torch.Generator().manual_seed(1))


def names_of(folder) -> set[str]:
    return {re.sub(r"\.\d+\.", ".*.", name) for name in Checkpoint.open(folder).quantized if "experts" in name}


@pytest.mark.parametrize("method", ["nearest", pytest.param("awq+gptq", marks=pytest.mark.slow)])
def test_the_same_bytes_from_either_spelling(tmp_path, method):
    text = str(tiny.text(tmp_path / "text.txt"))
    stacked = FAMILIES["qwen3_5_moe"]
    sources = {
        "stacked": stacked.save(tmp_path / "stacked"),
        "apart": replace(stacked, as_published=True).save(tmp_path / "apart"),
    }
    assert "model.layers.0.mlp.experts.gate_up_proj" in Checkpoint.open(sources["stacked"]).entries
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in Checkpoint.open(sources["apart"]).entries
    written = {}
    for name, source in sources.items():
        halfbyte.quantize(
            source,
            tmp_path / f"{name}-out",
            method=method,
            calibration={"source": text, "samples": 4, "length": 32},
            **WORDS,
        )
        written[name] = load_file(tmp_path / f"{name}-out" / "model.safetensors")
    assert written["stacked"].keys() == written["apart"].keys()
    assert all(torch.equal(value, written["apart"][name]) for name, value in written["stacked"].items())

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stacked-out", dtype="auto")
    model.set_experts_implementation("eager")
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, halfbyte.load(tmp_path / "stacked-out")(TOKENS).logits)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "llama4",
            {"model.layers.*.feed_forward.experts.*.gate_proj", "model.layers.*.feed_forward.experts.*.down_proj"},
        ),  # [experts, in, out]
        (
            "granitemoe",
            {"model.layers.*.block_sparse_moe.experts.*.w1", "model.layers.*.block_sparse_moe.experts.*.w2"},
        ),
        (
            "gpt_oss",
            {"model.layers.*.mlp.experts.*.gate_up_proj", "model.layers.*.mlp.experts.*.down_proj"},
        ),  # which nobody reads apart
    ],
)
def test_each_expert_has_the_name_that_engines_look_for(tmp_path, family, names):
    source, out = FAMILIES[family].save(tmp_path / "model"), tmp_path / "out"
    report = halfbyte.quantize(source, out, method="nearest", **WORDS)
    assert names <= names_of(out) <= names | {n.replace("gate_proj", "up_proj").replace("w1", "w3") for n in names}
    assert len(report["weights"]) == len({row["name"] for row in report["weights"]}) == report["output"]["quantized"]
    stacks = [t for t, e in Checkpoint.open(source).entries.items() if len(e.shape) == 3]
    assert not set(stacks) & set(report["kept"])
    model, original = halfbyte.load(out), halfbyte.load(source)
    stacked = {name: p.float() for name, p in original.named_parameters() if p.dim() == 3}
    assert len(stacked) == len(stacks) == 4
    for name, p in stacked.items():  # each value lies where it did, near to what it was
        assert (model.get_parameter(name).float() - p).norm() < 0.15 * p.norm()


@pytest.mark.parametrize("family", ["llama4", "qwen3_5_moe"])
def test_experts_apart_lie_as_linears_do(tmp_path, family):
    """Whichever way their stack lies in Transformers' model, which is asked here; and what they read is rounded."""
    source = EVERY[family].save(tmp_path / "model")
    halfbyte.quantize(source, tmp_path / "out", method="nearest", grid="w8a8", engine="none")
    written = Checkpoint.open(tmp_path / "out")
    experts = [w for w in written.weights() if ".experts." in w.name]
    assert experts
    assert all(not w.transposed and w.shape == written.quantized[w.name][1] for w in experts)
    assert torch.isfinite(outputs(halfbyte.load(tmp_path / "out", torch.float32))).all()


def test_stacks_that_stay_stay_whole(tmp_path):
    source = FAMILIES["llama4"].save(tmp_path / "model")
    report = halfbyte.quantize(source, tmp_path / "out", method="nearest", skip=("experts.*.down_proj",), **WORDS)
    assert report["kept"]["model.layers.0.feed_forward.experts.down_proj"] == "skipped as asked"
    assert names_of(tmp_path / "out") == {
        f"model.layers.*.feed_forward.experts.*.{part}_proj" for part in ("gate", "up")
    }
    entries, before = Checkpoint.open(tmp_path / "out").entries, Checkpoint.open(source).entries
    assert torch.equal(
        entries["model.layers.0.feed_forward.experts.down_proj"].read(),
        before["model.layers.0.feed_forward.experts.down_proj"].read(),
    )
    assert halfbyte.load(tmp_path / "out")(TOKENS).logits.isfinite().all()


def test_experts_that_would_be_random_are_not_decoded_apart(tmp_path):
    for family in ("llama4", "qwen3_5_moe"):
        halfbyte.quantize(
            FAMILIES[family].save(tmp_path / family), tmp_path / f"{family}-out", method="nearest", **WORDS
        )
    with pytest.raises(Unsupported, match=r"experts\.0\..*out of one tensor of all experts"):
        halfbyte.dequantize(tmp_path / "llama4-out", tmp_path / "a")
    halfbyte.dequantize(tmp_path / "qwen3_5_moe-out", tmp_path / "b")
    _, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not loading["missing_keys"]
